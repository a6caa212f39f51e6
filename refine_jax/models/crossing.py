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

from refine_jax.parallel import Slab


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def of_crossing(
    function: Callable,
    size: int,
    axis_name: str | None,
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
    axis_name: inside `jax.shard_map`, the mesh axis over which T and N are spread in contiguous
    blocks, those of tokens no shorter than a slab.

    Returns the results [B, R, ...], 0 for forks that do not cross, and `tokens` and `chunks` as
    they are. What else differentiates through these must take them from here: their gradient then
    comes to the backward pass of this function, which adds to it in place. A gradient of its own
    would be arrays of zeros as large as the row.
    """
    return _forward(function, size, axis_name, shared, own, tokens, chunks, place)[0]


class _Fork(NamedTuple):
    """What one fork is given; arrays keep the axes along which they are cut, as 1."""

    own: Any
    slab: Any
    chunk: Any


def _forward(function, size, axis_name, shared, own, tokens, chunks, place):
    read, _ = _reader_and_adder(size, axis_name, place)
    number, fork_of = crossing_forks(place.crosses)

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


def _backward(function, size, axis_name, residuals, cotangents):
    shared, own, tokens, chunks, place = residuals
    d_out, d_tokens, d_chunks = cotangents
    read, add = _reader_and_adder(size, axis_name, place)
    number, fork_of = crossing_forks(place.crosses)

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


def crossing_forks(crosses: jax.Array):
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


def _reader_and_adder(size: int, axis_name: str | None, place: ForkPlace):
    """Functions that cut a fork's part out of arrays, and add its gradient to theirs.

    Every device of `axis_name` computes each fork. What it has of a slab is added up, in the
    backward pass as well, where each has its share of the gradient.
    """

    def slabs(row, fork) -> tuple[ForkPlace, _Fork]:
        own = _of_fork((row, fork))
        here = jax.tree.map(lambda x: own.read(x)[0, 0], place)
        tokens = Slab(row, 2, here.start, size, axis_name)
        return here, _Fork(own, tokens, Slab(row, 1, here.chunk, 1, axis_name))

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
