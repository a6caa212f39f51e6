"""Slabs: neighbouring tokens cut out of rows for forks, whose gradient is added in place.

`take_slabs` cuts for all forks. `of_crossing` loops over the forks that leave their chunk alone,
forward and backward. A fork of k tokens leaves a chunk of C in k of C places: in one of 400 for the
published 5 and 2048. All others need neither the C tokens whose update is pending nor the momentum
of their chunk.

Letters: B batch, T tokens, N chunks of C tokens, R forks of a sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.parallel import axis_size, over_shards, token_axis


class Slab(NamedTuple):
    """Entries `start` ... `start + size - 1` along an axis of arrays [B, ...], in one row of them.

    axis_name: inside `jax.shard_map`, the mesh axis over which the arrays' axis is spread in
    contiguous blocks, no shorter than the slab. None: every device has all entries.
    """

    row: Any
    axis: int
    start: Any
    size: int
    axis_name: str | None = None

    def read(self, x: jax.Array) -> jax.Array:
        """Read the slab [1, ..., size, ...]; of spread x what the device has of it, else 0."""
        begin, behind = self._place(x)
        sizes = [1, *x.shape[1:]]
        sizes[self.axis] = self.size
        part = lax.dynamic_slice(x, begin, sizes)
        return part if behind is None else self._move(part, behind)

    def add(self, x: jax.Array, part: jax.Array) -> jax.Array:
        """Add `part` [1, ..., size, ...] to the slab in x; where x is spread, to the device's."""
        begin, behind = self._place(x)
        part = part if behind is None else self._move(part, -behind)
        total = lax.dynamic_slice(x, begin, part.shape) + part.astype(x.dtype)
        return lax.dynamic_update_slice(x, total, begin)

    def _place(self, x: jax.Array) -> tuple[list, Any]:
        """Find the device's nearest slab, and how far the wanted one begins behind it."""
        begin, behind = [self.row, *[0] * (x.ndim - 1)], None
        begin[self.axis] = self.start
        if self.axis_name is not None:
            start = self.start - lax.axis_index(self.axis_name) * x.shape[self.axis]
            begin[self.axis] = jnp.clip(start, 0, x.shape[self.axis] - self.size)
            behind = jnp.clip(start - begin[self.axis], -self.size, self.size)
        return begin, behind

    def _move(self, part: jax.Array, by: jax.Array) -> jax.Array:
        """Move entries up by `by` places; zeros take the places where there are none."""
        beside = [(0, 0)] * part.ndim
        beside[self.axis] = (self.size, self.size)
        return lax.dynamic_slice_in_dim(
            jnp.pad(part, beside), self.size + by, self.size, axis=self.axis
        )


def take_slabs(
    x: jax.Array,
    start: jax.Array,
    size: int,
    *rest: str | None,
    axis: int = 1,
    forks: str | None = "forks",
) -> jax.Array:
    """Cut tokens start [B, R] ... start + size - 1 out of x, whose `axis` they are.

    x: [B, T, ...], or [B, heads, T, ...] with axis 2. rest: logical names of its other axes behind
    the first. Slabs must lie inside the rows.
    forks: "forks": devices that share the rows' tokens share out the forks, where their numbers
    divide; None: each has all.

    Returns [B, R, size, ...], or [B, R, heads, size, ...].
    """
    name = _slab_axis(x, size, axis)
    if name is None or start.shape[1] % axis_size(name):
        forks = None

    def take(x, start):
        def slab(index):
            row, fork = index // start.shape[1], index % start.shape[1]
            return Slab(row, axis, start[row, fork], size, name).read(x)[0]

        # Cut slab by slab: all at once would be a gather, whose result XLA fills with zeros first.
        slabs = lax.map(slab, jnp.arange(start.size))
        slabs = slabs.reshape(*start.shape, *slabs.shape[1:])
        if name is None:
            return slabs
        if forks is None:
            return lax.psum(slabs, name)
        return lax.psum_scatter(slabs, name, scatter_dimension=1, tiled=True)

    before, behind = rest[: axis - 1], rest[axis - 1 :]
    tokens = ("batch", *before, name and "tokens", *behind)
    slabs = ("batch", forks, *before, None, *behind)
    return over_shards(take, (tokens, ("batch",)), slabs)(x, start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def tap_slabs(
    x: jax.Array, start: jax.Array, size: int, rest: tuple[str | None, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Return x [B, T, ...] and `take_slabs` of it, [B, R, size, ...].

    The gradient of the slabs is added, in place, to that of the x that is returned. The gradient
    of `take_slabs` alone is an array of zeros as large as x, which XLA then adds to the other.
    """
    return x, take_slabs(x, start, size, *rest)


def _tap_forward(x, start, size, rest):
    return tap_slabs(x, start, size, rest), start


def _tap_backward(size, rest, start, cotangents):
    name = _slab_axis(cotangents[0], size, 1)

    def add(x, slabs, start):
        def one(index, x):
            row, fork = index // start.shape[1], index % start.shape[1]
            return Slab(row, 1, start[row, fork], size, name).add(x, slabs[row, fork][None])

        return lax.fori_loop(0, start.size, one, x)

    tokens = ("batch", name and "tokens", *rest)
    add = over_shards(add, (tokens, ("batch", None, None, *rest), ("batch",)), tokens)
    return add(*cotangents, start), None


tap_slabs.defvjp(_tap_forward, _tap_backward)


def _slab_axis(x: jax.Array, size: int, axis: int) -> str | None:
    """Name the mesh axis that spreads axis `axis` of x in blocks no shorter than slabs."""
    name = token_axis(x.shape[axis], 1)
    return None if name is None or x.shape[axis] // axis_size(name) < size else name


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
        return _of_fork(fork).add(out, result(*fork))

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
        more, parts = pullback(_of_fork(fork).read(d_out))
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


def _of_fork(fork) -> Slab:
    """What belongs to a fork, (row, number), in arrays [B, R, ...]: [1, 1, ...]."""
    return Slab(fork[0], 1, fork[1], 1)


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

    def slabs(row, fork) -> tuple[ForkPlace, _Fork]:
        own = _of_fork((row, fork))
        here = jax.tree.map(lambda x: own.read(x)[0, 0], place)
        tokens = Slab(row, 2, here.start, size, axes.tokens)
        return here, _Fork(own, tokens, Slab(row, 1, here.chunk, 1, axes.chunks))

    def whole(part, slab: Slab):
        return part if slab.axis_name is None else lax.psum(part, slab.axis_name)

    def read(row, fork, arrays: _Fork) -> tuple[ForkPlace, _Fork]:
        here, parts = slabs(row, fork)

        def read_tree(slab, tree):
            return jax.tree.map(lambda x: whole(slab.read(x), slab), tree)

        return here, _Fork(*map(read_tree, parts, arrays))

    def add(row, fork, totals: _Fork, parts: _Fork) -> _Fork:
        def add_tree(slab, total, part):
            return jax.tree.map(lambda x, y: slab.add(x, whole(y, slab)), total, part)

        return _Fork(*map(add_tree, slabs(row, fork)[1], totals, parts))

    return read, add
