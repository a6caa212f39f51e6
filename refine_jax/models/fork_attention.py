"""Window attention of the tokens of forks, which reads the keys and values of rows where they are.

A fork sees at most W - 1 tokens before it: a copy of them for each of R forks is R W tokens, for 64
forks eight times a row of 16,384. Here the queries of few forks meet all keys of the row, in one
product and under a mask. It takes R S / W of the operations of the row's own attention, and the
gradients with respect to the row's keys and values are one product each. Many forks go in blocks of
neighbours, which begin near each other, or together: each block meets the keys that one of it sees.

Letters as in attention.py: B batch, G groups of n heads side by side with L numbers, R forks of a
row in J blocks, S tokens of a fork, M = n S R / J queries of a group, T tokens of a row, W window.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.kernels import fork_reads, heads
from refine_jax.kernels.fork_reads import Reach
from refine_jax.models.attention import MASKED, product

_SCORE_BYTES = 1 << 26  # most bytes of float32 scores at a time; more go by blocks of keys
_LAYER_BLOCK = 1024  # keys of a layer that decoding reads at a time
_FORKS = 8  # most forks of a block, where there are blocks
_LANES = 128  # blocks are whole multiples of it


def fork_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    row_k: jax.Array,
    row_v: jax.Array,
    last: jax.Array,
    seen: jax.Array,
    window: int,
    *,
    heads_per_group: int = 1,
    axis_name: str | None = None,
) -> jax.Array:
    """Causal attention of the S tokens of each fork to themselves and to the row before them.

    q, k, v: [B, R, G, S, L], of the forks. row_k, row_v: [B, G, T, L]; keys with rope. last:
    [B, R] int32, the slot of the row's last token before a fork; seen: [B, R], how many tokens its
    document has up to there, which may be 0. Scores are scaled by hd^-0.5, the softmax is float32.
    axis_name: inside `jax.shard_map`, the mesh axis over which rows are spread in blocks of T, in
    their order; `last` counts slots of the whole row. All devices return the same.
    Returns [B, R, G, S, L] in the dtype of k.
    """
    rows, forks, groups, num_new, size = q.shape
    scale, tokens = (size / heads_per_group) ** -0.5, row_k.shape[2]
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # [B, G, R, S, L]
    queries = heads.alone(q.reshape(rows, groups, -1, size), heads_per_group)

    # Token s of a fork has a distance of last - t + 1 + s to slot t.
    first = last[..., None] + jnp.maximum(1 - seen[..., None], jnp.arange(num_new) + 2 - window)
    reach = Reach(first, jnp.broadcast_to(last[..., None], first.shape))
    if axis_name is not None:
        offset = lax.axis_index(axis_name) * tokens
        reach = jax.tree.map(lambda slot: slot - offset, reach)
    blocks = _fork_blocks(forks, tokens, window)
    reach = jax.tree.map(lambda x: x.reshape(rows, blocks, -1).swapaxes(0, 1), reach)
    reach = jax.tree.map(lambda x: jnp.tile(x, (1, 1, heads_per_group)), reach)
    by_block = queries.reshape(rows, groups, heads_per_group, blocks, -1, size)
    by_block = jnp.moveaxis(by_block, 3, 0)
    shape = by_block.shape
    by_block = by_block.reshape(*shape[:3], -1, size)  # [J, B, G, M, L]
    out, log_total = attend_row(by_block, row_k, row_v, reach, scale, window)
    if axis_name is not None:
        out, log_total = join_devices(out, log_total, axis_name)
    out = jnp.moveaxis(out.reshape(shape), 0, 3)
    log_total = jnp.moveaxis(log_total.reshape(shape[:-1]), 0, 3)

    own = queries.reshape(rows, groups, heads_per_group, forks, num_new, size)
    back = jnp.arange(num_new)[:, None] - jnp.arange(num_new)
    scores = product("bgnrsh,bgrth->bgnrst", own, k) * scale
    scores = jnp.where((back >= 0) & (back < window), scores, MASKED)
    log_own = jax.nn.logsumexp(scores, axis=-1)  # finite: a token sees itself
    own = product("bgnrst,bgrth->bgnrsh", jnp.exp(scores - log_own[..., None]), v)

    share = jax.nn.sigmoid(log_total.reshape(log_own.shape) - log_own)[..., None]
    out = (share * out.reshape(own.shape) + (1 - share) * own).astype(k.dtype)
    out = heads.together(out.reshape(rows, -1, forks * num_new, size), heads_per_group)
    return jnp.swapaxes(out.reshape(rows, groups, forks, num_new, size), 1, 2)


def join_devices(out, log_total, axis_name: str):
    """What `attend_row` finds in whole rows, of what each device found in its part of them."""
    top = lax.pmax(lax.stop_gradient(log_total), axis_name)
    weight = jnp.exp(log_total - top)
    total = lax.psum(weight, axis_name)
    out = lax.psum(weight[..., None] * out, axis_name) / total[..., None]
    return out, top + jnp.log(total)


def _fork_blocks(forks: int, num_tokens: int, window: int) -> int:
    """J: 1 for few forks, and for rows not much longer than what a block of forks would see."""
    if forks <= _FORKS or num_tokens <= 4 * window:
        return 1
    return forks // max(n for n in range(1, _FORKS + 1) if forks % n == 0)


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


def attend_row_of_layer(q, k, v, layer, reach: Reach, scale: float):
    """`attend_row` of q [B, G, M, L] to one `layer` of k and v [N, ..., G, T, L]. For decoding.

    ...: axes that are B together. Keys and values are read in blocks, where they are: a copy of a
    layer takes longer than a token, and XLA:CPU makes one of what is reshaped as a whole.
    Not differentiable. Returns [B, G, M, L] and [B, G, M].
    """
    tokens, rows = k.shape[-2], (q.shape[0], *k.shape[-3:])

    def cut(x, start, count):
        begin = (layer, *[0] * (x.ndim - 3), start, 0)
        found = lax.dynamic_slice(x, begin, (1, *x.shape[1:-2], count, x.shape[-1]))
        return found.reshape(*rows[:2], count, rows[3])

    if tokens <= _LAYER_BLOCK or fork_reads.takes_row((1, *q.shape), rows):
        reach = jax.tree.map(lambda x: x[None], reach)
        k, v = (cut(x, 0, tokens) for x in (k, v))
        return tuple(x[0] for x in attend_row(q[None], k, v, reach, scale, tokens))

    def attend(carry, start, fresh):
        keys, values = (cut(x, start, _LAYER_BLOCK) for x in (k, v))
        return _meet(carry, q, keys, values, _seen(reach, start, fresh), scale)

    return _divided(_over_blocks(attend, _met_none(q), _LAYER_BLOCK, tokens, reach))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_row(q, k, v, reach: Reach, scale: float, window: int):
    """Softmax attention of q [J, B, G, M, L] to a row's k and v [B, G, T, L].

    Returns the output [J, B, G, M, L] and the log of the softmax's denominator [J, B, G, M], both
    float32; queries that see nothing get 0 and about `MASKED`. window: for the size of blocks.
    """
    return _attend_row_forward(q, k, v, reach, scale, window)[0]


def _attend_row_forward(q, k, v, reach, scale, window):
    if fork_reads.takes_row(q.shape, k.shape):
        found = fork_reads.attend_row(q.astype(k.dtype), k, v, reach, scale)
        return found, (q, k, v, reach, *found)
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
    if fork_reads.takes_row(q.shape, k.shape):
        dq, dk, dv = fork_reads.attend_row_backward(
            q.astype(k.dtype), k, v, reach, scale, log_total, d_out, rest
        )
        return dq.astype(q.dtype), dk, dv, None
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


attend_row.defvjp(_attend_row_forward, _attend_row_backward)
