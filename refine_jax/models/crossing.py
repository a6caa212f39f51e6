"""What forks need that leave their chunk: a loop over them alone, forward and backward.

A fork of k tokens leaves a chunk of C in k of C places: in one of 400 for the published 5 and 2048.
All others need neither the C tokens whose update is pending nor the momentum of their chunk.

Letters: B batch, T tokens, N chunks of C tokens, R forks of a sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class ForkPlace(NamedTuple):
    """Where forks of rows stand, [B, R] each.

    chunk: int32, whose weights a fork reads. start: where the slab of tokens up to the fork's last
    begins. before: that last token's place in the slab. seen: tokens of the document so far. count:
    of these, those whose update is pending. crosses: bool, whether the fork's tokens leave the
    chunk.
    """

    chunk: jax.Array
    start: jax.Array
    before: jax.Array
    seen: jax.Array
    count: jax.Array
    crosses: jax.Array


class RowAxes(NamedTuple):
    """Mesh axes, inside `jax.shard_map`, over which rows are spread in contiguous blocks.

    tokens: of their tokens; None where each device has whole rows. chunks: of the states of their
    chunks; None where each device has those of all chunks, of some heads or of all.
    """

    tokens: str | None = None
    chunks: str | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def of_crossing(
    function: Callable,
    size: int,
    axes: RowAxes,
    shared: Any,
    own: Any,
    tokens: Any,
    chunks: Any,
    place: ForkPlace,
) -> tuple[jax.Array, Any, Any]:
    """`function(shared, own, slab, chunk, place)` of the forks that cross a chunk's end.

    For one fork: `own` of arrays [B, R, ...]; `slab`, the `size` tokens up to its last, of `tokens`
    [B, heads, T, ...]; `chunk` of `chunks` [B, N, ...]. Nothing is cut out for other forks: the
    loop has as many turns as there are forks that cross.
    axes: of T and N; blocks of tokens are no shorter than a slab.

    Returns the results [B, R, ...], 0 for forks that do not cross, and `tokens` and `chunks` as
    they are. What else differentiates through these must take them from here: their gradient then
    comes to the backward pass of this function, which adds to it in place. A gradient of its own
    would be arrays of zeros as large as the row.
    """
    return _forward(function, size, axes, shared, own, tokens, chunks, place)[0]


class _Fork(NamedTuple):
    """What one fork is given; arrays keep the axes along which they are cut, as 1."""

    own: Any
    slab: Any
    chunk: Any


def _forward(function, size, axes, shared, own, tokens, chunks, place):
    read, _ = _reader_and_adder(size, axes, place)
    number, fork_of = _crossing_forks(place.crosses)

    def result(row, fork):
        here, found = read(row, fork, _Fork(own, tokens, chunks))
        return _call(function, here, shared, found)

    def write(turn, out):
        fork = fork_of(turn)
        return _add_at(out, result(*fork), fork)

    one = jax.eval_shape(result, 0, 0)
    out = jnp.zeros((*place.crosses.shape, *one.shape[2:]), one.dtype)
    out = _loop_if_any(number, write, out)
    return (out, tokens, chunks), (shared, own, tokens, chunks, place)


def _backward(function, size, axes, residuals, cotangents):
    shared, own, tokens, chunks, place = residuals
    d_out, d_tokens, d_chunks = cotangents
    read, add = _reader_and_adder(size, axes, place)
    number, fork_of = _crossing_forks(place.crosses)

    def add_fork(turn, totals):
        d_shared, d_arrays = totals
        fork = fork_of(turn)
        here, found = read(*fork, _Fork(own, tokens, chunks))
        _, pullback = jax.vjp(functools.partial(_call, function, here), shared, found)
        more, parts = pullback(_read_at(d_out, fork))
        return jax.tree.map(jnp.add, d_shared, more), add(*fork, d_arrays, parts)

    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    totals = zeros(shared), _Fork(zeros(own), d_tokens, d_chunks)
    d_shared, d_arrays = _loop_if_any(number, add_fork, totals)
    return d_shared, *d_arrays, None


of_crossing.defvjp(_forward, _backward)


def _loop_if_any(number: jax.Array, turn: Callable, carry: Any) -> Any:
    """`lax.fori_loop` from 0 to `number`, under a condition.

    XLA moves what a loop does not change in front of it, there to be computed for no turns too.
    """
    loop = functools.partial(lax.fori_loop, 0, number, turn)
    return lax.cond(number > 0, loop, lambda carry: carry, carry)


def _crossing_forks(crosses: jax.Array):
    """Count the forks [B, R] that cross; and return a function from a turn to a (row, number)."""
    order = jnp.argsort(jnp.logical_not(crosses).reshape(-1))
    return crosses.sum(), lambda turn: divmod(order[turn], crosses.shape[1])


def _call(function: Callable, here: ForkPlace, shared: Any, found: _Fork) -> jax.Array:
    """`function` of one fork, [1, 1, ...]."""
    own, chunk = (jax.tree.map(lambda x: x[0, 0], tree) for tree in (found.own, found.chunk))
    slab = jax.tree.map(lambda x: x[0], found.slab)
    return function(shared, own, slab, chunk, here)[None, None]


def _reader_and_adder(size: int, axes: RowAxes, place: ForkPlace):
    """Functions that cut a fork's part out of arrays, and add its gradient to theirs.

    Every device that shares a row computes each of its forks. What it has of a slab is added up,
    in the backward pass as well, where each has its share of the gradient.
    """
    maps = jax.tree.map

    def runs(row, fork):
        here = maps(lambda x: _read_at(x, (row, fork))[0, 0], place)
        slab = functools.partial(_Run, row, 2, here.start, size, axes.tokens)
        chunk = functools.partial(_Run, row, 1, here.chunk, 1, axes.chunks)
        return here, slab, chunk

    def read(row, fork, arrays: _Fork):
        here, slab, chunk = runs(row, fork)
        return here, _Fork(
            maps(lambda x: _read_at(x, (row, fork)), arrays.own),
            maps(lambda x: slab(x.shape).read(x), arrays.slab),
            maps(lambda x: chunk(x.shape).read(x), arrays.chunk),
        )

    def add(row, fork, totals: _Fork, parts: _Fork) -> _Fork:
        _, slab, chunk = runs(row, fork)
        return _Fork(
            maps(lambda x, part: _add_at(x, part, (row, fork)), totals.own, parts.own),
            maps(lambda x, part: slab(x.shape).add(x, part), totals.slab, parts.slab),
            maps(lambda x, part: chunk(x.shape).add(x, part), totals.chunk, parts.chunk),
        )

    return read, add


class _Run:
    """A row's entries start ... start + size - 1 along an axis of arrays of one shape."""

    def __init__(self, row, axis: int, start, size: int, axis_name: str | None, shape):
        self.axis, self.size, self.axis_name = axis, size, axis_name
        if axis_name is not None:
            # The run that begins here or nearest, and how far the wanted one begins behind it.
            start = start - lax.axis_index(axis_name) * shape[axis]
            begin = jnp.clip(start, 0, shape[axis] - size)
            self.behind = jnp.clip(start - begin, -size, size)
            start = begin
        self.begin = tuple({0: row, axis: start}.get(i, 0) for i in range(len(shape)))
        self.shape = tuple({0: 1, axis: size}.get(i, n) for i, n in enumerate(shape))

    def read(self, x: jax.Array) -> jax.Array:
        part = lax.dynamic_slice(x, self.begin, self.shape)
        return part if self.axis_name is None else self._sum(self._move(part, self.behind))

    def add(self, x: jax.Array, part: jax.Array) -> jax.Array:
        if self.axis_name is not None:
            part = self._move(self._sum(part), -self.behind)
        return _add_at(x, part, self.begin)

    def _sum(self, part):
        return lax.psum(part, self.axis_name)

    def _move(self, part, by):
        """Entries `by` further on, zeros where there are none."""
        beside = [(0, 0)] * part.ndim
        beside[self.axis] = (self.size, self.size)
        return lax.dynamic_slice_in_dim(
            jnp.pad(part, beside), self.size + by, self.size, axis=self.axis
        )


def _read_at(x: jax.Array, fork) -> jax.Array:
    """One fork of [B, R, ...], as [1, 1, ...]."""
    return lax.dynamic_slice(x, (*fork, *[0] * (x.ndim - 2)), (1, 1, *x.shape[2:]))


def _add_at(x: jax.Array, part: jax.Array, begin) -> jax.Array:
    """`x` with `part` added to it from `begin` on, an index of its first axes."""
    begin = (*begin, *[0] * (x.ndim - len(begin)))
    total = lax.dynamic_slice(x, begin, part.shape) + part.astype(x.dtype)
    return lax.dynamic_update_slice(x, total, begin)
