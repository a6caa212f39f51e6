"""LaCT's fast weights for forks in a gradient pass: read in the trace, without decode states.

A decode state has copies of its chunk's weights and momentum, and sums over up to C tokens. Here
all chunks are given all forks (`_read_in_chunks`), and a fork that leaves its chunk, which few do,
gets the update that is pending by itself (`slabs.py`).

Letters: B batch, T tokens, G groups of L numbers that hold the attention heads, H fast-weight heads
of width d with hidden F, N chunks of C tokens, E rate channels, R forks of a sequence, S <= C new
tokens of each.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.kernels import fork_reads, sequence
from refine_jax.kernels.heads import regroup
from refine_jax.kernels.lact import (
    FastState,
    Options,
    Weights,
    apply_fast_weights,
    apply_update,
    update_sums,
)
from refine_jax.models.chunks import ChunkPlan, chunk_of, first_rows, tokens_in_chunk
from refine_jax.models.config import LaCTConfig
from refine_jax.models.layers import l2_norm_lact, rope
from refine_jax.models.slabs import ForkPlace, RowAxes, of_crossing


def fast_input(
    config: LaCTConfig, x: jax.Array, scales: tuple[jax.Array, jax.Array], positions: jax.Array
) -> jax.Array:
    """Queries or keys x [..., H, T, d] as the fast weights take them.

    scales: scale and offset, [H d] each. positions broadcast to [..., 1, T]. H may be the heads
    that a device has.
    """
    heads, size = x.shape[-3], config.attn_head_dim
    scale, offset = (p.astype(x.dtype).reshape(heads, 1, -1) for p in scales)
    x = x * scale + offset
    y = l2_norm_lact(jax.nn.silu(x) if config.qkv_silu else x)
    if config.ttt_nope:
        return y
    if config.lact_head_dim % size == 0:
        return rope(y, positions, config.rope_theta, size)
    attn_heads = heads * config.lact_head_dim // size
    return regroup(rope(regroup(y, attn_heads), positions, config.rope_theta, size), heads)


def fast_value(config: LaCTConfig, v: jax.Array) -> jax.Array:
    """Make of values v [..., H, T, d] what the fast weights take, of the same shape."""
    return jax.nn.silu(v) if config.qkv_silu and not config.no_v_silu else v


def fork_place(
    config: LaCTConfig,
    last: jax.Array,
    seen: jax.Array,
    plan: ChunkPlan | None,
    num_tokens: int,
    num_new: int,
) -> ForkPlace:
    """Find where forks [B, R] of `num_new` tokens stand; last, seen: of `last_and_seen`."""
    chunk = config.lact_chunk_size
    start, count = first_rows(last, min(chunk, num_tokens)), tokens_in_chunk(seen, chunk)
    return ForkPlace(
        chunk=chunk_of(last, seen, plan, chunk),
        start=start,
        before=last - start,
        seen=seen,
        count=count,
        crosses=count + num_new > chunk,
    )


def read_forks(
    config: LaCTConfig,
    options: Options,
    axes: RowAxes,
    new: tuple[jax.Array, ...],
    tokens: tuple[jax.Array, ...],
    chunks: FastState,
    scales: tuple[jax.Array, jax.Array],
    norms: Weights,
    place: ForkPlace,
) -> tuple[jax.Array, tuple[jax.Array, ...], FastState]:
    """Read the tokens of forks with the weights of their chunks, and of the next.

    new: q, k, v [B, R, H, S, d], rates [B, R, H, S, 3, E], momentum [B, R, H, S] or None. tokens: k
    (with rope) and v [B, G, T, L], rates and momentum [B, H, T, ...] of the rows. chunks:
    [B, N, H, ...]. scales: of `fast_input` for keys. norms: `row_norms`. axes: of T and N; where it
    spreads T alone, each device has its part of H in `new`, chunks, scales and norms.
    Returns the output [B, R, H, S, d], and tokens and chunks as `of_crossing` does.
    """
    later, tokens, chunks = _read_next_chunks(
        config, options, axes, new, tokens, chunks, scales, norms, place
    )
    out = _read_in_chunks(chunks.weights, new[0], place.chunk, axes.chunks)
    return _where_inside(config, place, out, later), tokens, chunks


def read_traced_forks(
    config: LaCTConfig,
    options: Options,
    axes: RowAxes,
    heads_per_group: int,
    window: tuple[jax.Array, ...],
    fast: tuple[jax.Array, ...],
    tokens: tuple[jax.Array, ...],
    chunks: FastState,
    scales: tuple[jax.Array, jax.Array],
    norms: Weights,
    place: ForkPlace,
    last: jax.Array,
    layer: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Attention [B, R, G, S, L] and fast weights' output [B, R, H, S, d] of forks in one layer.

    Not for gradients. window: q, k, v [B, R, G, S, L] with rope. fast, scales, norms, place, axes:
    as `new`, ... of `read_forks`. tokens: [layers, B, heads, T, ...] as there, and chunks
    [layers, B, N, ...], of which what a fork reads is read where it is. last: [B, R].
    """
    row = jnp.broadcast_to(jnp.arange(last.shape[0])[:, None], last.shape)
    places = (x.reshape(-1) for x in (row, last, place.seen, place.chunk))
    where = fork_reads.ForkRows(layer, *places)
    *new, q = (x.reshape(-1, *x.shape[2:]) for x in (*window, fast[0]))
    windows = *tokens[:2], where, config.window_size, heads_per_group
    attention = fork_reads.attend_windows(new, *windows, axis_name=axes.tokens)
    out = fork_reads.read_weights(q, chunks.weights, where, axis_name=axes.chunks)
    attention, out = (x.reshape(*last.shape, *x.shape[1:]) for x in (attention, out))

    def read_next():
        of_layer = functools.partial(
            jax.tree.map, lambda x: lax.dynamic_index_in_dim(x, layer, keepdims=False)
        )
        rows = of_layer(tokens), of_layer(chunks)
        later, *_ = _read_next_chunks(config, options, axes, fast, *rows, scales, norms, place)
        return _where_inside(config, place, out, later)

    return attention, lax.cond(place.crosses.any(), read_next, lambda: out)


def _read_next_chunks(config, options, axes, new, tokens, chunks, scales, norms, place):
    """What `read_forks` takes and returns, of the tokens alone that lie in the next chunk."""
    size = config.lact_chunk_size
    if axes.tokens is None:
        size = min(size, tokens[0].shape[2])
    function = functools.partial(_read_next_chunk, config, options, axes.tokens)
    return of_crossing(function, size, axes, (scales, norms), new, tokens, chunks, place)


def _where_inside(config: LaCTConfig, place: ForkPlace, out, later) -> jax.Array:
    """Outputs [B, R, H, S, d]: `out` of tokens inside the forks' chunks, `later` behind them."""
    inside = place.count[..., None] + jnp.arange(out.shape[3]) < config.lact_chunk_size  # [B, R, S]
    return jnp.where(inside[:, :, None, :, None], out, later)


def _read_in_chunks(weights: Weights, q: jax.Array, chunk: jax.Array, axis_name: str | None):
    """`apply_fast_weights` of q [B, R, H, S, d], each fork with the weights of its chunk [B, R].

    weights: [B, N, H, ...]. Every chunk is given all forks, those of other chunks as zeros, whose
    outputs and gradients are 0: N R S tokens are few beside T, no weights are copied, and their
    gradient comes out by chunk, without a scatter.
    """
    queries = jnp.swapaxes(q, 1, 2)[:, None]  # [B, 1, H, R, S, d]
    number = jnp.arange(weights.w0.shape[1])[:, None]
    if axis_name is not None:
        number += lax.axis_index(axis_name) * len(number)
    here = (chunk[:, None] == number)[:, :, None, :, None, None]
    by_chunk = jnp.where(here, queries, 0)  # [B, N, H, R, S, d]
    flat = by_chunk.reshape(*by_chunk.shape[:3], -1, q.shape[-1])
    out = apply_fast_weights(weights, flat).reshape(by_chunk.shape).sum(1)
    if axis_name is not None:
        out = lax.psum(out, axis_name)
    return jnp.swapaxes(out, 1, 2)


def _read_next_chunk(
    config: LaCTConfig,
    options: Options,
    axis_name: str | None,
    shared,
    new,
    slab,
    fast: FastState,
    place: ForkPlace,
) -> jax.Array:
    """Outputs [H, S, d] of one fork's tokens with the weights after the chunk that they leave.

    shared, new: as in `read_forks`. slab: k, v [G, C, L], rates [H, C, 3, E] and momentum [H, C] of
    the row's last tokens, of which `place.count` are in the chunk; or the row's first tokens. If
    the slab has more heads than `new`, the devices of `axis_name` take each its part of them.
    """
    scales, norms = shared
    q, k, v, rates, momentum = new
    row_k, row_v, row_rates, row_momentum = slab
    chunk, heads = config.lact_chunk_size, row_rates.shape[0]

    def own(x):
        return x if heads == q.shape[0] else sequence.own_part(x, axis_name, axis=0)

    ahead = jnp.arange(row_k.shape[1]) - place.before  # 0 at the fork's last token
    pending = (ahead <= 0) & (ahead > -place.count)
    inside = place.count + jnp.arange(q.shape[1]) < chunk

    positions = (place.seen - 1 + ahead)[None]
    row_k = rope(row_k, -positions, config.rope_theta, config.attn_head_dim)  # takes rope off
    row_k = fast_input(config, own(regroup(row_k, heads)), scales, positions)
    row_v = fast_value(config, own(regroup(row_v, heads)))
    row_rates = jnp.where(pending[:, None, None], own(row_rates), 0.0)
    rates = jnp.where(inside[:, None, None], rates, 0.0)
    sums = jax.tree.map(
        jnp.add,
        update_sums(fast.weights, row_k, row_v, row_rates),
        update_sums(fast.weights, k, v, rates),
    )
    mean = None
    if momentum is not None:
        total = jnp.where(pending, own(row_momentum), 0.0).sum(-1)
        mean = (total + jnp.where(inside, momentum, 0.0).sum(-1)) / chunk
    fast = apply_update(fast, sums, mean, norms, options)
    return apply_fast_weights(fast.weights, q)
