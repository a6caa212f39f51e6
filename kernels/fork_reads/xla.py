"""What forks read of rows, by XLA: for other devices than TPUs, and sizes that kernels refuse."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.kernels import heads as heads_of
from refine_jax.kernels.fork_reads.reference import MASKED, ForkRows, Reach
from refine_jax.kernels.lact.reference import Weights
from refine_jax.kernels.lact.xla import apply_fast_weights
from refine_jax.kernels.window_attention.xla import product

_SCORE_BYTES = 1 << 26  # most bytes of float32 scores at a time; more go by blocks of keys
_LAYER_BLOCK = 1024  # keys of a layer that decoding reads at a time
_LANES = 128  # blocks are whole multiples of it


def _block_size(q: jax.Array, num_tokens: int, window: int) -> int:
    """Keys of a block: as many as have `_SCORE_BYTES` of scores; a window at most for many forks.

    q: [J, B, G, M, L].
    """
    per_key = 4 * q[0, ..., 0].size
    block = max(_SCORE_BYTES // per_key // _LANES, 1) * _LANES
    if len(q) > 1:
        block = min(block, -(-window // _LANES) * _LANES)
    return min(block, num_tokens)


def _over_blocks(function, carry, block: int, num_tokens: int, reach: Reach | None):
    """`function(carry, start, fresh)` for blocks of keys from `start` on.

    The last block begins early enough to be a whole one; `fresh` [block] bool leaves out the keys
    that the one before had. reach: [B, M], leaves out blocks that none sees; None: all count.
    """
    if block == num_tokens:
        return function(carry, 0, jnp.ones(block, bool))

    def step(index, carry):
        start = jnp.minimum(index * block, num_tokens - block)
        return function(carry, start, start + jnp.arange(block) >= index * block)

    low, high = 0, -(-num_tokens // block)
    if reach is not None:
        first, last = jnp.maximum(reach.first, 0), jnp.minimum(reach.last, num_tokens - 1)
        low = jnp.min(jnp.where(first <= last, first // block, high))
        high = jnp.max(jnp.where(first <= last, last // block + 1, 0))
    return lax.fori_loop(low, high, step, carry)


def _cut(x: jax.Array, start, size: int) -> jax.Array:
    """Tokens start ... start + size - 1 of [B, G, T, L]; x itself if these are all."""
    return x if size == x.shape[2] else lax.dynamic_slice_in_dim(x, start, size, axis=2)


def _add(x: jax.Array, part: jax.Array, start) -> jax.Array:
    """`x` [B, G, T, L] with `part` added to its tokens from `start` on."""
    total = _cut(x, start, part.shape[2]) + part.astype(x.dtype)
    if part.shape[2] == x.shape[2]:
        return total
    return lax.dynamic_update_slice_in_dim(x, total, start, axis=2)


def _seen(reach: Reach, start, fresh: jax.Array) -> jax.Array:
    """Which keys of a block a query sees: [B, 1, M, block]."""
    slot = start + jnp.arange(fresh.size)
    inside = (slot >= reach.first[..., None]) & (slot <= reach.last[..., None])
    return (inside & fresh)[:, None]


def _met_none(q: jax.Array):
    """Sum, maximum and denominator of the softmax of queries [B, G, M, L] before any key."""
    top = jnp.full(q.shape[:3], MASKED)
    return jnp.zeros(q.shape, jnp.float32), top, jnp.zeros_like(top)


def _meet(carry, q, keys, values, seen, scale: float):
    """Let queries meet a block of keys, of which they see `seen` [B, 1, M, block]."""
    out, top, total = carry
    scores = product("bgmh,bgth->bgmt", q, keys) * scale
    scores = jnp.where(seen, scores, MASKED)
    new_top = jnp.maximum(top, scores.max(-1))
    weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
    decay = jnp.exp(top - new_top)
    found = product("bgmt,bgth->bgmh", weights, values)
    return decay[..., None] * out + found, new_top, decay * total + weights.sum(-1)


def _divided(carry):
    """The output and the log of the softmax's denominator."""
    out, top, total = carry
    total = jnp.maximum(total, 1e-30)
    return out / total[..., None], top + jnp.log(total)


def attend_blocks_of_layer(q, k, v, layer, reach: Reach, scale: float):
    """Run `attend_row_of_layer` of api.py: keys and values in blocks, where they are.

    A copy of a layer takes longer than a token, and XLA:CPU makes one of what is reshaped whole.
    """
    tokens = k.shape[-2]
    block = min(_LAYER_BLOCK, tokens)

    def attend(carry, start, fresh):
        keys, values = (cut_layer(x, layer, q.shape[0], start, block) for x in (k, v))
        return _meet(carry, q, keys, values, _seen(reach, start, fresh), scale)

    return _divided(_over_blocks(attend, _met_none(q), block, tokens, reach))


def cut_layer(x: jax.Array, layer, rows: int, start, count: int) -> jax.Array:
    """Tokens start ... start + count - 1 of a layer of x [N, ..., G, T, L]: [rows, G, count, L]."""
    begin = (layer, *[0] * (x.ndim - 3), start, 0)
    found = lax.dynamic_slice(x, begin, (1, *x.shape[1:-2], count, x.shape[-1]))
    return found.reshape(rows, x.shape[-3], count, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_row_xla(q, k, v, reach: Reach, scale: float, window: int):
    """Run `attend_row` of api.py; blocks of keys pass by, of many forks those that one sees."""
    return _attend_row_forward(q, k, v, reach, scale, window)[0]


def _attend_row_forward(q, k, v, reach, scale, window):
    block, by_reach = _block_size(q, k.shape[2], window), len(q) > 1

    def attend_forks(_, inputs):
        q, reach = inputs

        def attend(carry, start, fresh):
            keys, values = _cut(k, start, block), _cut(v, start, block)
            return _meet(carry, q, keys, values, _seen(reach, start, fresh), scale)

        bounds = reach if by_reach else None
        return None, _divided(_over_blocks(attend, _met_none(q), block, k.shape[2], bounds))

    _, found = lax.scan(attend_forks, None, (q, reach), unroll=not by_reach)
    return found, (q, k, v, reach, *found)


def _attend_row_backward(scale, window, residuals, cotangents):
    """Recomputes the probabilities from the log of their denominator."""
    q, k, v, reach, out, log_total = residuals
    d_out, d_log = cotangents
    rest = jnp.sum(d_out * out, -1) - d_log
    block, by_reach = _block_size(q, k.shape[2], window), len(q) > 1

    def add_forks(totals, inputs):
        q, reach, d_out, rest, log_total = inputs

        def add_block(carry, start, fresh):
            dq, dk, dv = carry
            keys, values = _cut(k, start, block), _cut(v, start, block)
            seen = _seen(reach, start, fresh)
            scores = product("bgmh,bgth->bgmt", q, keys) * scale
            weights = jnp.where(seen, jnp.exp(scores - log_total[..., None]), 0.0)
            d_weights = product("bgmh,bgth->bgmt", d_out, values)
            d_scores = scale * weights * (d_weights - rest[..., None])
            dq = dq + product("bgmt,bgth->bgmh", d_scores, keys)
            dk = _add(dk, product("bgmt,bgmh->bgth", d_scores, q), start)
            return dq, dk, _add(dv, product("bgmt,bgmh->bgth", weights, d_out), start)

        carry = jnp.zeros(q.shape, jnp.float32), *totals
        bounds = reach if by_reach else None
        dq, *totals = _over_blocks(add_block, carry, block, k.shape[2], bounds)
        return tuple(totals), dq.astype(q.dtype)

    # Blocks of forks add to the same keys: in float32 then.
    totals = tuple(jnp.zeros(x.shape, jnp.float32 if by_reach else x.dtype) for x in (k, v))
    inputs = q, reach, d_out.astype(v.dtype), rest, log_total
    (dk, dv), dq = lax.scan(add_forks, totals, inputs, unroll=not by_reach)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


attend_row_xla.defvjp(_attend_row_forward, _attend_row_backward)


def _over_forks(function, forks: int):
    """`function` of each fork's number, one by one: nothing is kept for all of them at once."""
    return lax.map(function, jnp.arange(forks))


def _part(x: jax.Array, where: ForkRows, fork, axis: int, start, size: int) -> jax.Array:
    """Entries start ... start + size - 1 along an axis of a fork's row in traces [N, B, ...]."""
    begin = [where.layer, where.row[fork], *[0] * (x.ndim - 2)]
    begin[axis] = start
    sizes = [1, 1, *x.shape[2:]]
    sizes[axis] = size
    return lax.dynamic_slice(x, begin, sizes)[0, 0]


def attend_windows_xla(new, row_k, row_v, where: ForkRows, own, window: int, heads: int):
    """Run `attend_windows` of api.py on one device's part of the rows."""
    forks, groups, count, size = new[0].shape
    tokens, token = row_k.shape[3], jnp.arange(count)
    reach = min(window, tokens)
    back = token[:, None] - token
    of_own = (back >= 0) & (back < window) & own

    def attend(fork):
        q, k, v = (x[fork] for x in new)
        last = where.last[fork]
        start = jnp.clip(last - reach + 1, 0, tokens - reach)
        slot = start + jnp.arange(reach)
        # Token s of a fork has a distance of last - t + 1 + s to slot t.
        first = last + jnp.maximum(1 - where.seen[fork], token[:, None] + 2 - window)
        visible = jnp.concatenate([(slot >= first) & (slot <= last), of_own], axis=1)
        keys, values = (
            jnp.concatenate([_part(x, where, fork, 3, start, reach), y], axis=1)
            for x, y in ((row_k, k), (row_v, v))
        )
        queries = heads_of.alone(q[None], heads)[0].reshape(groups, heads, count, size)
        scores = product("gnsh,gth->gnst", queries, keys) * (size // heads) ** -0.5
        scores = jnp.where(visible, scores, MASKED)
        log_total = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.where(visible, jnp.exp(scores - log_total[..., None]), 0.0)
        out = product("gnst,gth->gnsh", weights, values)
        return heads_of.together(out.reshape(1, -1, count, size), heads)[0], log_total

    return _over_forks(attend, forks)


def read_weights_xla(q, weights, where: ForkRows):
    """Run `read_weights` of api.py on one device's part of the chunks."""

    def read(fork):
        chunk = (_part(w, where, fork, 2, where.chunk[fork], 1)[0] for w in weights)
        return apply_fast_weights(Weights(*chunk), q[fork])

    return _over_forks(read, len(q))
