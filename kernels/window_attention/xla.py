"""Window attention in XLA: a scan over blocks of queries, in time and memory linear in T."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.kernels.numerics import pad_axes

MASKED = -1e30  # finite: a row that sees nothing must not become NaN
_QUERY_BLOCK = 128  # of 64, 128 and 256 the fastest on CPU at window 512


def window_attention_xla(q, k, v, ids, past, window):
    """Run `window_attention` of api.py for heads alone, [B, A, T, hd]."""
    num_tokens = q.shape[2]
    block = min(_QUERY_BLOCK, max(window, 64), num_tokens)
    (q, k, v), ids = pad_tokens((q, k, v), ids, block)
    return _attend(q, k, v, ids, past, window, block)[:, :, :num_tokens]


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Compute the einsum `spec` of a [...] and b [...] in the dtype of b, with float32 sums."""
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def pad_tokens(arrays, ids, multiple: int):
    """Pad arrays [B, A, T, hd] and ids [B, T] (or None) at the end of T to a multiple."""
    more = 0, -arrays[0].shape[2] % multiple
    arrays = [pad_axes(x, {2: more}) for x in arrays]
    return arrays, None if ids is None else pad_axes(ids, {1: more})


def front_pad(x, rows: int):
    """Put `rows` zeros before arrays [B, A, T, hd] or ids [B, T], along their middle axis."""
    return pad_axes(x, {x.ndim // 2: (rows, 0)})


def behind(past, x):
    """Put arrays [B, A, T, hd] or ids [B, T] behind their past, along their middle axis."""
    return jnp.concatenate([past, x], axis=x.ndim // 2)


def _visible(start, size: int, window: int, ids) -> jax.Array:
    """Which keys, from start - window + 1 on, the queries of a block see; [1 or B, 1, q, k]."""
    query = jnp.arange(size)[:, None]
    key = jnp.arange(size + window - 1)[None] - (window - 1)  # both relative to the block's start
    seen = (key <= query) & (query - key < window)
    if ids is None:
        return (seen & (start + key >= 0))[None, None]
    at_query = lax.dynamic_slice_in_dim(ids, start + window - 1, size, axis=1)[:, :, None]
    at_key = lax.dynamic_slice_in_dim(ids, start, size + window - 1, axis=1)[:, None]
    return (seen & (at_query == at_key) & (at_query > 0))[:, None]


def _reachable(k, v, ids, past, window: int):
    """k, v and ids (or None) behind the window - 1 rows before them: zeros without a past."""
    if past is not None:
        return [behind(a, b) for a, b in zip(past, (k, v, ids), strict=True)]
    return [None if x is None else front_pad(x, window - 1) for x in (k, v, ids)]


def _to_blocks(x, block: int):
    """[B, A, T, ...] -> [T / block, B, A, block, ...]."""
    blocks = x.reshape(*x.shape[:2], -1, block, *x.shape[3:])
    return jnp.moveaxis(blocks, 2, 0)


def _from_blocks(x):
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, ids, past, window: int, block: int):
    return _attend_forward(q, k, v, ids, past, window, block)[0]


def _attend_forward(q, k, v, ids, past, window, block):
    """A scan over blocks of queries; each looks at the slab of keys that its window can reach."""
    before = window - 1
    keys, values, padded_ids = _reachable(k, v, ids, past, window)
    scale = q.shape[-1] ** -0.5

    def attend_block(start, queries):
        slab = [lax.dynamic_slice_in_dim(x, start, block + before, axis=2) for x in (keys, values)]
        seen = _visible(start, block, window, padded_ids)
        scores = jnp.where(seen, scale * product("baqh,bakh->baqk", queries, slab[0]), MASKED)
        top = scores.max(-1, keepdims=True)
        weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
        total = jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
        out = product("baqk,bakh->baqh", weights, slab[1]) / total
        return start + block, (out.astype(q.dtype), (top + jnp.log(total))[..., 0])

    _, (out, log_total) = lax.scan(attend_block, 0, _to_blocks(q, block))
    out = _from_blocks(out)
    return out, (q, k, v, ids, past, out, _from_blocks(log_total))


def _attend_backward(window, block, residuals, cotangent):
    """Recomputes the probabilities of a block from its log normaliser."""
    q, k, v, ids, past, out, log_total = residuals
    before = window - 1
    keys, values, padded_ids = _reachable(k, v, ids, past, window)
    scale = q.shape[-1] ** -0.5
    cotangent = cotangent.astype(q.dtype)
    delta = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), -1)

    def add_slab(total, part, start):
        old = lax.dynamic_slice_in_dim(total, start, block + before, axis=2)
        return lax.dynamic_update_slice_in_dim(total, old + part, start, axis=2)

    def block_gradients(carry, inputs):
        start, dk, dv = carry
        queries, d_out, delta, log_total = inputs
        slab_k, slab_v = (
            lax.dynamic_slice_in_dim(x, start, block + before, axis=2) for x in (keys, values)
        )
        seen = _visible(start, block, window, padded_ids)
        scores = scale * product("baqh,bakh->baqk", queries, slab_k)
        weights = jnp.where(seen, jnp.exp(scores - log_total[..., None]), 0.0)
        d_weights = product("baqh,bakh->baqk", d_out, slab_v)
        d_scores = scale * weights * (d_weights - delta[..., None])
        dq = product("baqk,bakh->baqh", d_scores, slab_k)
        dk = add_slab(dk, product("baqk,baqh->bakh", d_scores, queries), start)
        dv = add_slab(dv, product("baqk,baqh->bakh", weights, d_out), start)
        return (start + block, dk, dv), dq.astype(q.dtype)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    inputs = tuple(_to_blocks(x, block) for x in (q, cotangent, delta, log_total))
    (_, dk, dv), dq = lax.scan(block_gradients, (0, zeros, zeros), inputs)
    dk, dv = (x.astype(k.dtype) for x in (dk, dv))
    d_past = None if past is None else (dk[:, :, :before], dv[:, :, :before], None)
    return _from_blocks(dq), dk[:, :, before:], dv[:, :, before:], None, d_past


_attend.defvjp(_attend_forward, _attend_backward)
