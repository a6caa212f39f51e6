"""How long a collective takes on the links of a slice.

An estimate by bandwidth: what a chip must send, over the links that its group of devices can use,
and a microsecond a hop. A group that lies along n axes of the torus is taken for n rings, or lines
where the ends of an axis are not linked; rings send both ways. Nothing else uses the links of these
axes meanwhile. What goes to other slices takes the data-centre network, each chip a part, after its
slice is done.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

HOP_SECONDS = 1e-6

_MESH = re.compile(
    r"@?(?:mesh)?\[([^\]]*)\]"
    r"(?:, ?device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
)

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    size: bytes on a chip of the whole array: an all-gather's result, the operand of the others.
    group: numbers of the devices of one group, in the order of the program's devices; pairs: of a
    permutation, (from, to).
    """

    kind: str
    size: float
    group: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def sent(self) -> float:
        """Bytes that a chip sends, by an algorithm that sends no more than it must."""
        if self.kind == "collective-permute":
            return self.size if any(a != b for a, b in self.pairs) else 0.0
        n = max(len(self.group), 1)
        return self.size * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Network:
    """The links between the devices of a program.

    coordinates, slices: of each device, in the order of the program's devices. sizes, wraps: of the
    axes of a slice. link: bytes a second of one link in one direction. dcn: bytes a second that a
    device sends to other slices.
    """

    coordinates: Sequence[tuple[int, ...]]
    sizes: tuple[int, ...]
    wraps: tuple[bool, ...]
    link: float
    slices: Sequence[int] = ()
    dcn: float = math.inf

    def sent_across(self, collective: Collective) -> float:
        """Count the bytes that a chip sends to other slices."""
        if not self.slices:
            return 0.0
        if collective.kind == "collective-permute":
            crosses = any(self.slices[a] != self.slices[b] for a, b in collective.pairs)
            return collective.size if crosses else 0.0
        members = collections.Counter(self.slices[device] for device in collective.group)
        across = dataclasses.replace(collective, group=tuple(members))
        return across.sent / max(members.values(), default=1)

    def seconds(self, collective: Collective) -> float:
        """Estimate the time of one collective, in seconds."""
        if not collective.sent:
            return 0.0
        if crossing := self.sent_across(collective):
            inside = [d for d in collective.group if self.slices[d] == self.slices[0]]
            within = dataclasses.replace(collective, group=tuple(inside), pairs=())
            return crossing / self.dcn + (self.seconds(within) if inside else 0.0)
        if collective.kind == "collective-permute":
            hops = max(self._distance(a, b) for a, b in collective.pairs)
            # Messages over several hops share the links on their way.
            return collective.size * hops / self.link + hops * HOP_SECONDS
        axes = self._axes(collective.group)
        ways = sum(2 if wraps else 1 for _, wraps in axes)
        hops = sum(extent // 2 if wraps else extent - 1 for extent, wraps in axes)
        if collective.kind == "all-to-all":
            # Half of all data crosses the middle of the longest axis.
            extent, wraps = max(axes)
            seconds = collective.size * extent / (8 if wraps else 4) / self.link
        else:
            seconds = collective.sent / (self.link * ways)
        return seconds + hops * HOP_SECONDS

    def axes(self, collective: Collective) -> frozenset[int]:
        """Numbers of the slice's axes whose links a collective uses."""
        used = set()
        for group in collective.pairs or (collective.group,):
            places = zip(*(self.coordinates[device] for device in group), strict=True)
            used |= {axis for axis, place in enumerate(places) if len(set(place)) > 1}
        return frozenset(used)

    def _axes(self, group: tuple[int, ...]) -> list[tuple[int, bool]]:
        """List (extent, whether it is a ring) of each axis that a group lies along."""
        axes = []
        for axis, (size, wraps) in enumerate(zip(self.sizes, self.wraps, strict=True)):
            extent = len({self.coordinates[device][axis] for device in group})
            if extent > 1:
                axes.append((extent, wraps and extent == size))
        return axes or [(2, False)]  # devices of one chip

    def _distance(self, a: int, b: int) -> int:
        steps = 0
        for x, y, size, wraps in zip(
            self.coordinates[a], self.coordinates[b], self.sizes, self.wraps, strict=True
        ):
            steps += min(abs(x - y), size - abs(x - y)) if wraps else abs(x - y)
        return max(steps, int(a != b))


def parse_pairs(attributes: str) -> tuple[tuple[int, int], ...]:
    """Parse the pairs of a permutation: source_target_pairs={{0,1},{1,2}}."""
    match = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    pairs = re.findall(r"\{(\d+),(\d+)\}", match[1]) if match else []
    return tuple((int(a), int(b)) for a, b in pairs)


def parse_group(attributes: str, devices: int) -> tuple[int, ...]:
    """Parse the first group of replica_groups in any of its notations; none: all devices.

    {{0,1},{2,3}}; [2,4]<=[4,2]T(1,0), groups as rows of a transposed range of numbers; or
    mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, the axes of a mesh that a group lies along.
    """
    _, _, text = attributes.partition("replica_groups=")
    if match := re.match(r"\{\{([\d,]+)\}", text):
        return tuple(map(int, match[1].split(",")))
    if match := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape = _numbers(match[1])
        return tuple(_range(_numbers(match[2]), _numbers(match[3]))[: shape[-1]])
    if match := _MESH.match(text):
        sizes = {name: int(size) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", match[1])}
        flat = [math.prod(sizes.values())]
        ids = _range(_numbers(match[2]) or flat, _numbers(match[3]))
        return _along(ids, sizes, match[4])
    return tuple(range(devices))


def _numbers(text: str | None) -> list[int]:
    return [int(x) for x in (text or "").split(",") if x]


def _range(shape: list[int], order: list[int]) -> list[int]:
    """Make 0, 1, 2, ... an array of `shape`, its axes in another order, flat."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose(order or range(len(shape))).ravel().tolist()


def _along(ids: list[int], sizes: dict[str, int], axes: str) -> tuple[int, ...]:
    """List devices along some axes from the first one; an axis may be a part: 'x':(2)4."""
    strides, stride = {}, 1
    for name, size in reversed(sizes.items()):
        strides[name] = stride
        stride *= size
    offsets = [0]
    for name, before, part in re.findall(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?", axes):
        size, stride = sizes[name], strides[name]
        if part:
            stride *= size // (int(before) * int(part))
            size = int(part)
        offsets = [o + i * stride for o in offsets for i in range(size)]
    return tuple(ids[o] for o in offsets)
