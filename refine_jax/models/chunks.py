"""LaCT's chunks: where tokens stand among their slots, and what is pending in a part of one.

Chunks count from the start of a document. Letters: B batch, T tokens, H heads, N chunks of C slots,
R forks of a sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from refine_jax.models.config import LaCTConfig
from refine_jax.models.layout import Layout
from refine_jax.parallel import axis_size


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
    """Count tokens whose update is pending after `seen` [...] of a document: from 1 to C, or 0."""
    return jnp.where(seen > 0, (seen - 1) % chunk + 1, 0)


def last_and_seen(positions: jax.Array, layout: Layout | None) -> tuple[jax.Array, jax.Array]:
    """The slot of a fork's last token, and how many tokens its document has up to there.

    positions: [B, R], the number of slots before a fork. Returns [B, R] each; -1 and 0 before any
    token.
    """
    if layout is None:
        return positions - 1, positions
    return layout.last_real(positions), layout.tokens_before(positions)


def chunk_of(last, seen, plan: ChunkPlan | None, chunk: int) -> jax.Array:
    """Number of the chunk [B, R] that slot `last` lies in, or of any document's first."""
    if plan is None:
        return jnp.maximum(last, 0) // chunk
    slot = jnp.take_along_axis(plan.slot, jnp.maximum(last, 0), axis=1)
    return jnp.where(seen > 0, slot // chunk, 0)


def first_rows(last: jax.Array, size: int) -> jax.Array:
    """Where slabs of `size` rows up to row `last` [B, R] begin; the first `size` rows if fewer."""
    return jnp.maximum(last - size + 1, 0)


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
