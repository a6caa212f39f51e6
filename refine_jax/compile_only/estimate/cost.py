"""What a compiled program costs: bytes, collectives and time, with loops multiplied out.

The time is a *static estimate*. The instructions run in the order of the compiler's schedule:

* a fusion, or another operation of XLA, takes the cycles that the TPU compiler wrote beside it, or,
  where it wrote none, the time of its products of matrices or to move its bytes, the longer one, at
  the shares of the chip's peaks that the compiler's own cycles come to on average;
* a Pallas kernel takes its operations at the rate of `KERNEL_SHARE` of the chip's peak, or the time
  to move its bytes if that is longer: the compiler says nothing of kernels;
* a collective takes what `network.py` says. One that starts and ends apart from each other runs
  beside what is between; the program waits for the rest. So do asynchronous copies.

Left out: contention of transfers for the HBM, the host, and what the runtime needs to start a
program.
"""

from __future__ import annotations

import collections
import dataclasses
import re

import numpy as np

from refine_jax.compile_only.estimate.chips import Chip
from refine_jax.compile_only.estimate.hlo import Computation, Instruction, Module
from refine_jax.compile_only.estimate.network import (
    KINDS,
    Collective,
    Network,
    parse_group,
    parse_pairs,
)

_CHAIN = re.compile(r'chain_id="(\w+)"')
_KERNEL = 'custom_call_target="tpu_custom_call"'
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "opt-barrier", "optimization-barrier", "add-dependency"),
    "async-update",
}
_MEETING = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)".*_xla_megascale_')
# Operations reach these shares of the chip's peaks, by libtpu's cycles for the rollouts of
# DeltaNet-1.3B on a v5e: those with products of matrices took 1.88 s where the peak needs 1.66 s,
# all others 2.39 s where their transfers need 0.92 s.
_PRODUCT_SHARE, _TRANSFER_SHARE = 0.88, 0.38
# Where libtpu has no estimate, it writes the largest number there is.
NO_ESTIMATE = 1e15


@dataclasses.dataclass
class ProgramCost:
    """What one program, or a part of it, costs on one chip.

    seconds: estimate; kernels, xla, waits: its parts, the last for collectives and copies.
    bytes: read from and written to the HBM. sent, counts: of collectives by kind. links, dcn:
    seconds that collectives need of links and between slices, overlapped or not. unknown: loops of
    unknown length, counted once. rare: seconds more if conditions took their longest branches, of
    which the shortest are counted.
    """

    seconds: float = 0.0
    kernels: float = 0.0
    xla: float = 0.0
    waits: float = 0.0
    bytes: float = 0.0
    links: float = 0.0
    dcn: float = 0.0
    rare: float = 0.0
    unknown: int = 0
    sent: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: ProgramCost, times: int = 1) -> None:
        """Add a part that runs `times` times."""
        for name in ("seconds", "kernels", "xla", "waits", "bytes", "links", "dcn", "rare"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        self.unknown += other.unknown
        for kind in other.counts:
            self.sent[kind] += times * other.sent[kind]
            self.counts[kind] += times * other.counts[kind]


# What is on its way while the program goes on: when the links of each axis of the slice, and the
# copy engine, are free again, and when each transfer that has started will be done.
@dataclasses.dataclass
class _Transfers:
    links: dict[int, float] = dataclasses.field(default_factory=dict)
    copies: float = 0.0
    dcn: float = 0.0
    meetings: dict[str, str] = dataclasses.field(default_factory=dict)
    done: dict[str, float] = dataclasses.field(default_factory=dict)


class Estimator:
    """The cost of a module.

    kernel_seconds: of a Pallas call, given its name, the shapes of its results and its bytes.
    """

    def __init__(self, module: Module, chip: Chip, network: Network, kernel_seconds):
        self._module, self._chip, self._network = module, chip, network
        self._kernel_seconds = kernel_seconds
        self._known: dict[str, ProgramCost] = {}

    def run(self) -> ProgramCost:
        """Estimate the cost of the whole program; nothing for an empty module."""
        if not self._module.computations:
            return ProgramCost()
        return self._computation(self._module.entry)

    def _computation(self, name: str) -> ProgramCost:
        if name not in self._known:
            computation = self._module.computations[name]
            cost, transfers = ProgramCost(), _Transfers()
            for instruction in computation.instructions.values():
                self._instruction(instruction, computation, cost, transfers)
            self._known[name] = cost
        return self._known[name]

    def _instruction(self, instruction, computation, cost, transfers) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            trips = self._module.trips(instruction, computation)
            cost.unknown += trips is None
            cost.add(self._computation(instruction.callee("body")), 1 if trips is None else trips)
        elif opcode == "conditional":
            branches = [self._computation(name) for name in instruction.callees]
            branches.sort(key=lambda branch: branch.seconds)
            cost.add(branches[0])
            longest = branches[-1]
            cost.rare += longest.seconds + longest.rare - branches[0].seconds - branches[0].rare
        elif opcode == "call":
            for name in instruction.callees:
                cost.add(self._computation(name))
        elif opcode in ("send", "recv") and (meeting := _MEETING.search(instruction.attributes)):
            self._cross(meeting[1], instruction, computation, cost, transfers)
        elif opcode.endswith("-done"):
            self._wait(instruction, computation, cost, transfers)
        elif (chain := self._chain(instruction)) is not None:
            self._fused(chain, instruction, computation, cost, transfers)
        elif (collectives := self.collectives(instruction, computation)) is not None:
            self._communicate(collectives, instruction, computation, cost, transfers)
        elif opcode.endswith("-start"):
            self._copy(instruction, cost, transfers)
        elif opcode not in _FREE:
            self._compute(instruction, computation, cost)

    def _chain(self, instruction: Instruction) -> tuple[str, bool, bool] | None:
        """Tell which part a fusion is of a collective that XLA has divided into several.

        (chain, whether it starts it, whether it ends it): the fusions between go on with other work
        beside it, and all of them hold the collective. None: it is no such part.
        """
        if instruction.opcode != "fusion":
            return None
        inner = self._module.computations[instruction.callees[0]].instructions.values()
        chains = [match[1] for i in inner if (match := _CHAIN.search(i.attributes))]
        if not chains:
            return None
        targets = {i.attributes.partition('custom_call_target="')[2].split('"')[0] for i in inner}
        return chains[0], "AsyncCollectiveStart" in targets, "AsyncCollectiveDone" in targets

    def _fused(self, chain, instruction, computation, cost, transfers) -> None:
        name, starts, ends = chain
        if starts:
            collectives = self.collectives(instruction, computation)
            transfers.done[name] = self._send(collectives, cost, transfers)
        elif ends:
            self._until(transfers.done.get(name, 0.0), cost)
        else:
            self._compute(instruction, computation, cost)

    def _copy(self, instruction, cost: ProgramCost, transfers: _Transfers) -> None:
        """Start a copy, or a slice, that goes on beside the program."""
        arrays = instruction.arrays
        if instruction.opcode == "async-start":
            arrays = self._module.computations[instruction.callee("calls")].root.arrays
        moved = arrays[0].bytes if arrays else 0.0
        cost.bytes += moved * (1 if arrays and arrays[0].space else 2)
        transfers.copies = max(cost.seconds, transfers.copies) + moved / self._chip.bandwidth
        transfers.done[instruction.name] = transfers.copies

    def _wait(self, instruction, computation, cost, transfers) -> None:
        name = instruction.operands[0]
        if name in transfers.meetings:
            if instruction.opcode == "recv-done":
                self._until(transfers.done.get(transfers.meetings[name], 0.0), cost)
            return
        while name not in transfers.done:
            source = computation.instructions[name]
            if not source.operands:
                return
            name = source.operands[0]
        self._until(transfers.done[name], cost)

    @staticmethod
    def _until(done: float, cost: ProgramCost) -> None:
        waited = max(done - cost.seconds, 0.0)
        cost.seconds += waited
        cost.waits += waited

    def _send(self, collectives: list[Collective], cost: ProgramCost, transfers) -> float:
        """Start collectives now, one after the other; returns when they are done.

        Those along different axes of the slice use different links, at the same time.
        """
        done = cost.seconds
        for collective in collectives:
            seconds, axes = self._network.seconds(collective), self._network.axes(collective)
            cost.links += seconds
            cost.sent[collective.kind] += collective.sent
            cost.counts[collective.kind] += 1
            done = max(done, *(transfers.links.get(axis, 0.0) for axis in axes), 0.0) + seconds
            transfers.links |= dict.fromkeys(axes, done)
        return done

    def _cross(self, meeting, instruction, computation, cost, transfers) -> None:
        """Start what chips of several slices do together over the data-centre network.

        libtpu writes it as a send to the host and a receive from there, in either order, which meet
        by name; the parts within a slice are collectives of their own.
        """
        transfers.meetings[instruction.name] = meeting
        if instruction.opcode == "recv":
            return
        kind, groups = (
            found[1] if (found := re.search(rf'{name}="([^"]*)"', instruction.attributes)) else ""
            for name in ("_xla_megascale_transfer_type", "_xla_megascale_target")
        )
        operand = computation.instructions[instruction.operands[0]]
        slices = len(re.findall(r"\d+", groups.partition("x")[0])) or 2
        name = kind.lower().replace("_", "-") or "transfer"
        size = sum(array.bytes for array in operand.arrays)
        size *= slices if name == "all-gather" else 1
        sent = Collective(name, size, tuple(range(slices))).sent
        cost.sent[f"{name} between slices"] += sent
        cost.counts[f"{name} between slices"] += 1
        transfers.dcn = max(cost.seconds, transfers.dcn) + sent / self._network.dcn
        cost.dcn += sent / self._network.dcn
        transfers.done[meeting] = transfers.dcn

    def _communicate(self, collectives, instruction, computation, cost, transfers) -> None:
        done = self._send(collectives, cost, transfers)
        if instruction.opcode.endswith("-start"):
            transfers.done[instruction.name] = done
            return
        if instruction.opcode == "fusion":  # computes beside what it sends
            self._compute(instruction, computation, cost)
        self._until(done, cost)

    def collectives(
        self, instruction: Instruction, computation: Computation
    ) -> list[Collective] | None:
        """List the collectives that an instruction is, starts or has fused into it; or None."""
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            return [self._collective(kind, instruction, computation)]
        if instruction.opcode not in ("fusion", "async-start"):
            return None
        collectives = []
        for name in instruction.callees:
            inner = self._module.computations[name]
            for fused in inner.instructions.values():
                collectives += self.collectives(fused, inner) or []
        return collectives or None

    def _collective(self, kind, instruction, computation) -> Collective:
        operands = [computation.instructions[name] for name in instruction.operands]
        size = sum(array.bytes for operand in operands for array in operand.arrays)
        devices = len(self._network.coordinates)
        group = parse_group(instruction.attributes, devices)
        if kind == "all-gather":
            size *= len(group)
        elif kind == "all-reduce" and self._is_scattered(instruction, computation):
            kind = "reduce-scatter"
        return Collective(kind, size, group, parse_pairs(instruction.attributes))

    @staticmethod
    def _is_scattered(instruction: Instruction, computation: Computation) -> bool:
        """Tell whether an all-reduce keeps only each device's part: XLA fuses the two on TPUs."""
        users = computation.users.get(instruction.name, [])
        return bool(users) and all(user.opcode == "dynamic-slice" for user in users)

    def _compute(self, instruction, computation, cost: ProgramCost) -> None:
        moved = self.traffic(instruction, computation)
        cost.bytes += moved
        if instruction.opcode == "custom-call" and _KERNEL in instruction.attributes:
            # A differentiated function is called `transpose(jvp(name))`.
            name = re.search(r"(\w+)\)*/pallas_call", instruction.source)
            shapes = tuple(array.shape for array in instruction.arrays)
            seconds = self._kernel_seconds(name[1] if name else instruction.name, shapes, moved)
            cost.kernels += seconds
        else:
            match = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
            cycles = int(match[1]) if match else NO_ESTIMATE
            if cycles < NO_ESTIMATE:
                seconds = cycles / self._chip.clock
            else:
                products = self._products(instruction, computation) / self._chip.flops
                transfers, share = moved / self._chip.bandwidth, _TRANSFER_SHARE
                if products:
                    share = _PRODUCT_SHARE
                seconds = max(products, transfers) / share
            cost.xla += seconds
        cost.seconds += seconds

    def _products(self, instruction: Instruction, computation: Computation) -> float:
        """Count operations of an instruction's products, which XLA calls convolutions."""
        if instruction.opcode == "fusion":
            inner = self._module.computations[instruction.callee("calls")]
            return sum(self._products(fused, inner) for fused in inner.instructions.values())
        if instruction.opcode != "convolution":
            return 0.0
        left, right = (computation.instructions[name].arrays[0] for name in instruction.operands)
        return convolution_operations(
            instruction.attributes, left.shape, right.shape, instruction.arrays[0].shape
        )

    def traffic(self, instruction: Instruction, computation: Computation) -> float:
        """Count the bytes that an instruction reads from the HBM and writes to it.

        A slice of an array counts as large as the slice, inside a fusion too. Kernels that read
        parts of arrays say how much.
        """
        opcode = instruction.opcode
        if 'custom_call_target="AllocateBuffer"' in instruction.attributes:
            return 0.0
        if _KERNEL in instruction.attributes:
            stated = re.search(r'"bytes_accessed":"([1-9]\d*)"', instruction.attributes)
            if stated:
                return float(stated[1])
        written = _written(instruction, computation, self._module)
        if opcode in ("dynamic-slice", "slice", "gather", "broadcast"):
            read = 0.0 if opcode == "broadcast" else written
            return written + read
        read = 0.0
        for index, name in enumerate(instruction.operands):
            operand = computation.instructions[name]
            whole = _in_hbm(operand)
            if opcode == "fusion":
                inner = self._module.computations[instruction.callee("calls")]
                whole = min(whole, _read(inner, inner.parameter(index), self._module) or 0.0)
            elif opcode == "dynamic-update-slice" and index == 0:
                whole = 0.0
            read += whole
        return read + written


def convolution_operations(attributes: str, left: tuple, right: tuple, out: tuple) -> float:
    """Count multiplications and additions of a convolution; XLA writes products as such.

    Axes that only one side has may be slid over the other's, of size 1: of all pairs of a place and
    an entry of the window those count that meet the other array.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    axes = [
        dict(zip(names, shape, strict=True))
        for names, shape in zip(labels.groups(), (left, right, out), strict=True)
    ]
    operations = 2.0 * axes[1]["i"] * axes[2]["b"] * axes[2]["f"]
    window = dict(
        re.findall(r"(\w+)=([\dx_-]+)", attributes.partition("window={")[2].split("}")[0])
    )
    for axis in range(len(left) - 2):

        def option(name, default, axis=axis):
            return window[name].split("x")[axis] if name in window else default

        low = int(option("pad", "0_0").split("_")[0])
        place = np.arange(axes[2][str(axis)])[:, None] * int(option("stride", 1))
        entry = np.arange(axes[1][str(axis)]) * int(option("rhs_dilate", 1))
        spread = int(option("lhs_dilate", 1))
        at = place + entry - low
        meets = (at >= 0) & (at <= (axes[0][str(axis)] - 1) * spread) & (at % spread == 0)
        operations *= np.count_nonzero(meets)
    return operations


def _in_hbm(instruction: Instruction) -> float:
    return sum(array.bytes for array in instruction.arrays if array.space == 0)


def _sizes(instruction: Instruction) -> float:
    return sum(array.bytes for array in instruction.arrays)


def _read(computation: Computation, value: Instruction, module: Module) -> float:
    """Count the bytes of a fusion's parameter that its computation reads."""
    total = 0.0
    for user in computation.users.get(value.name, ()):
        index = user.operands.index(value.name)
        if user.opcode in ("dynamic-slice", "slice") or (user.opcode == "gather" and index == 0):
            total += _sizes(user) if index == 0 else _sizes(value)
        elif user.opcode == "tuple" or _sends(user):
            continue  # handed on, to a collective that goes on beside
        elif user.opcode == "dynamic-update-slice" and index == 0:
            continue
        elif user.opcode in ("bitcast", "reshape"):
            total += _read(computation, user, module)
        elif user.opcode == "fusion":
            inner = module.computations[user.callee("calls")]
            total += _read(inner, inner.parameter(index), module)
        else:
            return _sizes(value)
    return min(total, _sizes(value))


def _sends(instruction: Instruction) -> bool:
    """Tell whether an instruction is a collective, or a part of one that XLA has divided."""
    opcode = instruction.opcode
    return opcode in KINDS or "AsyncCollective" in instruction.attributes


def _written(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Count the bytes that an instruction writes to the HBM."""
    if instruction.opcode == "dynamic-update-slice":
        return min(_sizes(computation.instructions[instruction.operands[1]]), _in_hbm(instruction))
    if instruction.opcode != "fusion":
        return _in_hbm(instruction)
    inner = module.computations[instruction.callee("calls")]
    roots = [inner.root]
    if inner.root.opcode == "tuple":
        roots = [inner.instructions[name] for name in inner.root.operands]
    if len(roots) != len(instruction.arrays):
        return _in_hbm(instruction)
    total = 0.0
    for root, array in zip(roots, instruction.arrays, strict=True):
        while root.opcode in ("bitcast", "reshape"):
            root = inner.instructions[root.operands[0]]
        part = array.bytes if array.space == 0 else 0.0
        if root.opcode == "parameter" or _sends(root):
            part = 0.0
        if root.opcode in ("dynamic-update-slice", "fusion") and array.space == 0:
            part = min(part, _written(root, inner, module))
        total += part
    return total
