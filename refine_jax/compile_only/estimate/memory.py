"""The memory of a program by XLA's buffer assignment, which also exists where it is too much."""

import dataclasses
import re

from refine_jax.compile_only.estimate.hlo import Module

_ALLOCATION = re.compile(r"^allocation (\d+): size (\d+)(.*?):?$")
_VALUE = re.compile(
    r"^ value: <\d+ ([\w.\-]+)(?:\{[\d,]*\})?( \(phi\))? @\d+> "
    r"\(size=(\d+),offset=(\d+)\): (.*)$"
)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A place in memory: bytes, the largest value that it holds, and where that comes from."""

    bytes: int
    shape: str
    source: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on a chip. aliased: of outputs that take the place of arguments, which hold them."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int = 0

    @property
    def peak(self) -> int:
        """All that is there at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def read_assignment(text: str, module: Module) -> tuple[Memory, list[Buffer]]:
    """Read memory and buffers, largest first, from a `buffer-assignment.txt` of XLA's dumps."""
    sources = {
        instruction.name: instruction.source
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
    }
    sizes = {"arguments": 0, "outputs": 0, "aliased": 0, "temporaries": 0}
    slots: dict[tuple[int, int], Buffer] = {}
    main = kind = None
    for line in text.splitlines():
        if match := _ALLOCATION.match(line):
            number, size, about = int(match[1]), int(match[2]), match[3]
            main = not re.search(r"color [1-9]", about) and "thread-local" not in about
            kind = _kind(about)
            if main:
                sizes[kind] += size
                if kind == "arguments" and "maybe-live-out" in about:
                    sizes["outputs"] += size
                    sizes["aliased"] += size
        elif main and (match := _VALUE.match(line)):
            name, phi, size, offset, shape = match.groups()
            known = slots.get((number, int(offset)))
            source = sources.get(name, "")
            # The largest value in a place stands for the place, if it says where it is from.
            better = known is None or int(size) > known.bytes
            equal = known is not None and int(size) == known.bytes and not known.source
            if better or (equal and source and not phi):
                slots[number, int(offset)] = Buffer(int(size), _plain(shape), source)
    buffers = sorted(slots.values(), key=lambda buffer: -buffer.bytes)
    return Memory(**sizes), buffers


def _kind(about: str) -> str:
    if re.search(r"\bparameter \d+", about):
        return "arguments"
    return "outputs" if "maybe-live-out" in about else "temporaries"


def _plain(shape: str) -> str:
    """Shorten f32[8,128]{1,0:T(8,128)} to f32[8,128]."""
    return re.sub(r"\{[^{}]*\}", "", shape)
