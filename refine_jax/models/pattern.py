"""The order of a model's layers, and scans over them.

Parameters, traces and states of all layers are stacked, [L, ...]. Where layers are of several
kinds, there is one stack for each kind, {kind: [layers of the kind, ...]}, and what is scanned is
such a dict. A scan goes over the repeats of the pattern's period, such as three layers of the delta
rule and one of attention, so that a program does not grow with the depth of the model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LONGEST_PERIOD = 32  # layers


class Segment(NamedTuple):
    """Layers that follow each other: the kinds `unit`, as often as `repeats`."""

    unit: tuple[str, ...]
    repeats: int


def segments_of(kinds: Sequence[str]) -> tuple[Segment, ...]:
    """The layers as few segments: from the first layer on, what repeats over the most layers."""
    kinds, found, at = tuple(kinds), [], 0
    while at < len(kinds):
        best = Segment(kinds[at : at + 1], 1)
        for size in range(1, min(_LONGEST_PERIOD, (len(kinds) - at) // 2) + 1):
            unit, repeats = kinds[at : at + size], 1
            while kinds[at + repeats * size : at + (repeats + 1) * size] == unit:
                repeats += 1
            if repeats > 1 and repeats * size > len(best.unit) * best.repeats:
                best = Segment(unit, repeats)
        found.append(best)
        at += len(best.unit) * best.repeats
    return tuple(found)


class Pattern:
    """The kinds of a model's layers, in order; None: all are of one, which has no name."""

    def __init__(self, kinds: Sequence[str] | None):
        self.kinds: tuple[str | None, ...] = (
            (None,) if kinds is None else tuple(dict.fromkeys(kinds))
        )
        self._uniform = kinds is None
        if kinds is not None:
            self._segments = segments_of(kinds)
            # Where each layer stands in the stacks of all kinds, one after the other.
            counts = [kinds.count(kind) for kind in self.kinds]
            starts = dict(zip(self.kinds, itertools.accumulate([0, *counts]), strict=False))
            seen = dict.fromkeys(self.kinds, 0)
            self._places = np.zeros(len(kinds), np.int32)
            for layer, kind in enumerate(kinds):
                self._places[layer] = starts[kind] + seen[kind]
                seen[kind] += 1

    def of_kind(self, tree: Any, kind: str | None) -> Any:
        """The part of a dict by kinds that belongs to one; None has no parts."""
        return tree if self._uniform or tree is None else tree[kind]

    def map(self, function: Callable, *trees: Any) -> Any:
        """`function(kind, *parts)` for each kind, as a dict by kinds."""
        found = {
            kind: function(kind, *(self.of_kind(tree, kind) for tree in trees))
            for kind in self.kinds
        }
        return found[None] if self._uniform else found

    def zip(self, *trees: Any) -> Any:
        """Tuples of what the trees hold for each kind."""
        return self.map(lambda _, *parts: parts, *trees)

    def unzip(self, tree: Any, count: int) -> tuple[Any, ...]:
        """Inverse of `zip`, of tuples of `count`."""
        return tuple(self.map(lambda _, parts, i=i: parts[i], tree) for i in range(count))

    def in_order(self, stacks: Any) -> jax.Array:
        """Arrays by kinds as one [L, ...], layers in their order."""
        if self._uniform:
            return stacks
        return jnp.concatenate([stacks[kind] for kind in self.kinds])[self._places]

    def by_kind(self, x: jax.Array) -> Any:
        """Inverse of `in_order`."""
        if self._uniform:
            return x
        order, at, found = np.argsort(self._places), 0, {}
        for kind, count in zip(self.kinds, self._counts(), strict=True):
            found[kind] = x[order[at : at + count]]
            at += count
        return found

    def _counts(self) -> list[int]:
        return [sum(s.unit.count(kind) * s.repeats for s in self._segments) for kind in self.kinds]

    def scan(
        self, layer: Callable, carry: Any, xs: Any, *, reverse: bool = False
    ) -> tuple[Any, Any]:
        """`lax.scan` over all layers: `layer(kind, carry, x) -> (carry, y)`; xs, ys by kinds."""
        if self._uniform:
            return lax.scan(functools.partial(layer, None), carry, xs, reverse=reverse)
        starts, parts = dict.fromkeys(self.kinds, 0), []
        for segment in self._segments:
            taken = {}
            for kind in dict.fromkeys(segment.unit):
                count = segment.unit.count(kind) * segment.repeats
                taken[kind] = _cut(xs[kind], starts[kind], count)
                starts[kind] += count
            parts.append((segment, taken))
        found: dict[str, list] = {kind: [] for kind in self.kinds}
        for segment, taken in reversed(parts) if reverse else parts:
            carry, ys = _scan_segment(layer, carry, segment, taken, reverse)
            for kind, y in ys.items():
                found[kind].append(y)
        return carry, {kind: _join(ys, reverse) for kind, ys in found.items()}


def _scan_segment(layer, carry, segment: Segment, xs: dict, reverse: bool):
    unit, repeats = segment
    if len(unit) == 1 and repeats > 1:
        carry, ys = lax.scan(functools.partial(layer, unit[0]), carry, xs[unit[0]], reverse=reverse)
        return carry, {unit[0]: ys}
    run = functools.partial(_run_unit, layer, unit, reverse)
    if repeats == 1:
        return run(carry, xs)
    xs = jax.tree.map(lambda x: x.reshape(repeats, len(x) // repeats, *x.shape[1:]), xs)
    carry, ys = lax.scan(run, carry, xs, reverse=reverse)
    return carry, jax.tree.map(lambda y: y.reshape(y.shape[0] * y.shape[1], *y.shape[2:]), ys)


def _run_unit(layer, unit: tuple[str, ...], reverse: bool, carry, xs: dict):
    """One repeat of a segment, whose runs of equal layers are scanned."""
    starts, runs = dict.fromkeys(unit, 0), []
    for kind, group in itertools.groupby(unit):
        count = len(list(group))
        runs.append((kind, starts[kind], count))
        starts[kind] += count
    found: dict[str, list] = {kind: [] for kind in starts}
    for kind, start, count in reversed(runs) if reverse else runs:
        if count == 1:
            carry, y = layer(kind, carry, jax.tree.map(lambda x, i=start: x[i], xs[kind]))
            y = jax.tree.map(lambda y: y[None], y)
        else:
            part = _cut(xs[kind], start, count)
            carry, y = lax.scan(functools.partial(layer, kind), carry, part, reverse=reverse)
        found[kind].append(y)
    return carry, {kind: _join(ys, reverse) for kind, ys in found.items()}


def _cut(tree: Any, start: int, count: int) -> Any:
    """Layers start ... start + count - 1 of a stack; the stack itself if these are all."""
    return jax.tree.map(
        lambda x: x if x.shape[0] == count else lax.slice_in_dim(x, start, start + count), tree
    )


def _join(parts: list, reverse: bool) -> Any:
    """Stacks one after the other, in the order of the layers."""
    if len(parts) == 1:
        return parts[0]
    parts = parts[::-1] if reverse else parts
    return jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)
