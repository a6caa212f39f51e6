"""LaCT's chunks: where tokens stand among their slots, and what is pending in a part of one.

Chunks count from the start of a document. Letters: B batch, T tokens, H heads, N chunks of C slots,
R forks of a sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.models.config import LaCTConfig
from refine_jax.models.layout import Layout
from refine_jax.parallel import axis_size, over_shards


class ChunkPlan(NamedTuple):
    """Where the tokens of rows [B, T] stand among N * C chunk slots, documents aligned to chunks.

    slot: [B, T] int32, the slot of a token; 0 at padding. source: [B, N * C] int32, the way back;
    0 at empty slots. live: [B, N * C] bool, slots that hold a token. token: [B, T] bool.
    reset: [B, N] bool, chunks that begin a document.
    """

    slot: jax.Array
    source: jax.Array
    live: jax.Array
    token: jax.Array
    reset: jax.Array


def plan_chunks(
    config: LaCTConfig, layout: Layout | None, shape: tuple[int, int]
) -> ChunkPlan | None:
    """Chunk slots of the tokens of `layout`; None where every row is one full document."""
    if layout is None:
        return None
    chunk, (num_rows, num_tokens) = config.lact_chunk_size, shape
    num_chunks = -(-num_tokens // chunk) + layout.max_documents - 1
    num_chunks += -num_chunks % axis_size("sequence")  # whose devices share them
    num_slots = num_chunks * chunk
    # A chunk begins at every C-th token of a document; its number is their running count.
    begins = layout.mask & (layout.position % chunk == 0)
    index = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
    slot = index * chunk + layout.position % chunk
    row = jnp.arange(num_rows)[:, None]
    kept = jnp.where(layout.mask, slot, num_slots)  # padding falls out of bounds: dropped
    tokens = jnp.broadcast_to(jnp.arange(1, num_tokens + 1, dtype=jnp.int32), shape)
    source = jnp.zeros((num_rows, num_slots), jnp.int32)
    source = source.at[row, kept].set(tokens, mode="drop")
    first = layout.mask & (layout.position == 0)
    reset = jnp.zeros((num_rows, num_chunks), bool)
    reset = reset.at[row, jnp.where(first, index, num_chunks)].set(True, mode="drop")
    return ChunkPlan(
        slot=jnp.where(layout.mask, slot, 0),
        source=jnp.maximum(source - 1, 0),
        live=source > 0,
        token=layout.mask,
        reset=reset,
    )


def to_slots(tokens, plan: ChunkPlan | None, chunk: int):
    """Arrays [B, H, T, ...] to chunk slots [B, N, H, C, ...], their mask and the resets."""
    num_tokens = tokens[0].shape[2]
    pad = -num_tokens % chunk

    def cut(x):
        if plan is not None:
            x = _take_of_heads(x, plan.source, plan.slot, plan.token)
        elif pad:
            x = jnp.pad(x, ((0, 0), (0, 0), (0, pad), *[(0, 0)] * (x.ndim - 3)))
        return jnp.swapaxes(x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:]), 1, 2)

    slots = jax.tree.map(cut, tokens)
    if plan is not None:
        return slots, plan.live.reshape(*plan.reset.shape, chunk), plan.reset
    if not pad:
        return slots, None, None
    live = jnp.arange(num_tokens + pad) < num_tokens
    return slots, jnp.broadcast_to(live.reshape(-1, chunk), (*slots[0].shape[:2], chunk)), None


def to_tokens(slots: jax.Array, plan: ChunkPlan | None, num_tokens: int) -> jax.Array:
    """The way back from chunk slots, [B, N, H, C, d] -> [B, H, T, d]."""
    x = jnp.swapaxes(slots, 1, 2)
    x = x.reshape(*x.shape[:2], -1, *x.shape[4:])
    if plan is None:
        return x[:, :, :num_tokens]
    return _take_of_heads(x, plan.slot, plan.source, plan.live)


def tokens_in_chunk(seen: jax.Array, chunk: int) -> jax.Array:
    """Tokens whose update is pending after `seen` of a document: 0 before any, else 1 ... C."""
    return jnp.where(seen > 0, (seen - 1) % chunk + 1, 0)


def first_rows(last: jax.Array, size: int) -> jax.Array:
    """Where slabs of `size` rows up to row `last` [B, R] begin; the first `size` rows if fewer."""
    return jnp.maximum(last - size + 1, 0)


def cut_slabs(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Rows start [B, R] ... start + size - 1 of x [B, heads, T, ...]: [B, R, heads, size, ...].

    Of rows that are spread over devices, what each has of a slab is added up.
    """
    devices = axis_size("sequence")
    spread = devices > 1 and x.shape[2] % devices == 0 and x.shape[2] // devices >= size

    def cut(x, start):
        if not spread:
            return _cut(x, start, size)
        start = start - lax.axis_index("sequence") * x.shape[2]
        # The slab that begins here or nearest, and how far the wanted one begins behind it.
        begin = jnp.clip(start, 0, x.shape[2] - size)
        slabs = _cut(x, begin, size)
        beside = [(0, 0)] * slabs.ndim
        beside[3] = (size, size)
        slabs = jnp.pad(slabs, beside)
        behind = jnp.clip(start - begin, -size, size)
        move = jax.vmap(jax.vmap(lambda x, by: lax.dynamic_slice_in_dim(x, size + by, size, 1)))
        return lax.psum(move(slabs, behind), "sequence")

    axes = ("batch", "heads", "tokens" if spread else None)
    return over_shards(cut, (axes, ("batch",)), ("batch", None, "heads"))(x, start)


def _cut(x, start, size):
    """One by one: all at once would be a gather, whose result XLA fills with zeros first."""
    forks = start.shape[1]

    def slab(index):
        row, fork = index // forks, index % forks
        begin = (row, 0, start[row, fork], *[0] * (x.ndim - 3))
        return lax.dynamic_slice(x, begin, (1, x.shape[1], size, *x.shape[3:]))[0]

    slabs = lax.map(slab, jnp.arange(start.size))
    return slabs.reshape(*start.shape, *slabs.shape[1:])


class ForkPlace(NamedTuple):
    """Where forks of rows stand: int32 or bool [B, R].

    chunk: whose weights a fork reads. start: where the slab of tokens up to the fork's last begins.
    before: that last token's place in the slab. seen: tokens of the document so far. count: of
    these, those whose update is pending. crosses: whether the fork's tokens leave the chunk.
    """

    chunk: jax.Array
    start: jax.Array
    before: jax.Array
    seen: jax.Array
    count: jax.Array
    crosses: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def of_crossing(
    function: Callable, size: int, shared: Any, own: Any, tokens: Any, chunks: Any, place: ForkPlace
) -> tuple[jax.Array, Any, Any]:
    """`function(shared, own, slab, chunk, place)` of the forks that cross a chunk's end.

    For one fork: `own` of arrays [B, R, ...]; `slab`, the `size` tokens up to its last, of `tokens`
    [B, heads, T, ...]; `chunk` of `chunks` [B, N, ...]. Nothing is cut out for other forks, which
    are most: the loop has as many turns as there are forks that cross.

    Returns the results [B, R, ...], 0 for forks that do not cross, and `tokens` and `chunks` as
    they are. What else differentiates through these must take them from here: their gradient then
    comes to the backward pass of this function, which adds slabs to it in place.
    """
    return _of_crossing_forward(function, size, shared, own, tokens, chunks, place)[0]


class _Fork(NamedTuple):
    """What `of_crossing` reads of one fork; arrays keep the axes along which they are cut."""

    own: Any
    slab: Any
    chunk: Any


def _crossing_forks(crosses: jax.Array):
    """How many forks cross; and of a turn of the loop over them, the fork's (row, number)."""
    order = jnp.argsort(jnp.logical_not(crosses).reshape(-1))
    return crosses.sum(), lambda turn: divmod(order[turn], crosses.shape[1])


def _read(tree: Any, begin: tuple, sizes: Callable[[jax.Array], tuple[int, ...]]) -> Any:
    """A part of each array: `sizes(x)` long along its first axes, the other axes whole."""

    def read(x):
        shape = sizes(x)
        at = (*begin, *[0] * (x.ndim - len(shape)))
        return lax.dynamic_slice(x, at, (*shape, *x.shape[len(shape) :]))

    return jax.tree.map(read, tree)


def _add(tree: Any, parts: Any, begin: tuple) -> Any:
    """Arrays with parts added to them where `_read` found them."""

    def add(x, part):
        at = (*begin, *[0] * (x.ndim - len(begin)))
        total = lax.dynamic_slice(x, at, part.shape) + part.astype(x.dtype)
        return lax.dynamic_update_slice(x, total, at)

    return jax.tree.map(add, tree, parts)


def _one(x: jax.Array) -> tuple[int, ...]:
    del x
    return 1, 1


def _fork_reader(size: int, own, tokens, chunks, place: ForkPlace):
    """A function of (row, fork): the fork's place, where its arrays begin, and what they hold."""

    def read(row, fork):
        here = jax.tree.map(lambda x: x[0, 0], _read(place, (row, fork), _one))
        begins = _Fork((row, fork), (row, 0, here.start), (row, here.chunk))
        found = _Fork(
            _read(own, begins.own, _one),
            _read(tokens, begins.slab, lambda x: (1, x.shape[1], size)),
            _read(chunks, begins.chunk, _one),
        )
        return here, begins, found

    return read


def _call(function: Callable, here: ForkPlace, shared: Any, found: _Fork) -> jax.Array:
    """`function` of one fork, [1, 1, ...]."""
    own, chunk = (jax.tree.map(lambda x: x[0, 0], tree) for tree in (found.own, found.chunk))
    slab = jax.tree.map(lambda x: x[0], found.slab)
    return function(shared, own, slab, chunk, here)[None, None]


def _of_crossing_forward(function, size, shared, own, tokens, chunks, place):
    read = _fork_reader(size, own, tokens, chunks, place)
    number, fork_of = _crossing_forks(place.crosses)

    def result(row, fork):
        here, _, found = read(row, fork)
        return _call(function, here, shared, found)

    def write(turn, out):
        begin = fork_of(turn)
        return _add(out, result(*begin), begin)

    one = jax.eval_shape(result, 0, 0)
    out = jnp.zeros((*place.crosses.shape, *one.shape[2:]), one.dtype)
    out = lax.fori_loop(0, number, write, out)
    return (out, tokens, chunks), (shared, own, tokens, chunks, place)


def _of_crossing_backward(function, size, residuals, cotangents):
    shared, own, tokens, chunks, place = residuals
    d_out, d_tokens, d_chunks = cotangents
    read = _fork_reader(size, own, tokens, chunks, place)
    number, fork_of = _crossing_forks(place.crosses)

    def add(turn, totals):
        d_shared, d_forks = totals
        here, begins, found = read(*fork_of(turn))
        _, pullback = jax.vjp(functools.partial(_call, function, here), shared, found)
        more, parts = pullback(_read(d_out, begins.own, _one))
        return jax.tree.map(jnp.add, d_shared, more), _Fork(*map(_add, d_forks, parts, begins))

    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    totals = zeros(shared), _Fork(zeros(own), d_tokens, d_chunks)
    d_shared, (d_own, d_tokens, d_chunks) = lax.fori_loop(0, number, add, totals)
    return d_shared, d_own, d_tokens, d_chunks, None


of_crossing.defvjp(_of_crossing_forward, _of_crossing_backward)


@jax.custom_vjp
def _take_rows(x: jax.Array, index: jax.Array, inverse: jax.Array, taken: jax.Array) -> jax.Array:
    """Rows `index` [B, M] of x [B, K, ...], with a gather for its gradient too.

    inverse: [B, K], where in the result a row went; taken: [B, K] bool, whether it did. Rows of the
    result that stand for nothing hold any row, and get no gradient.
    """
    return jax.vmap(lambda row, i: row[i])(x, index)


def _take_rows_forward(x, index, inverse, taken):
    return _take_rows(x, index, inverse, taken), (inverse, taken)


def _take_rows_backward(residuals, cotangent):
    inverse, taken = residuals
    back = jax.vmap(lambda row, i: row[i])(cotangent, inverse)
    return jnp.where(taken.reshape(*taken.shape, *[1] * (back.ndim - 2)), back, 0), None, None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


# The same of arrays [B, H, K, ...].
_take_of_heads = jax.vmap(_take_rows, in_axes=(1, None, None, None), out_axes=1)
