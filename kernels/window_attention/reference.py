"""Window attention with a mask of all queries and keys: the specification of the op."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def window_attention_reference(q, k, v, ids, past, window):
    """Run `window_attention` of api.py for heads alone, [B, A, T, hd], in float32."""
    query_ids, num_tokens = ids, q.shape[2]
    if past is not None:
        k, v = (jnp.concatenate(pair, axis=2) for pair in zip(past[:2], (k, v), strict=True))
        ids = jnp.concatenate([past[2], ids], axis=1)
    num_keys = k.shape[2]
    distance = jnp.arange(num_tokens)[:, None] + (num_keys - num_tokens) - jnp.arange(num_keys)
    seen = (distance >= 0) & (distance < window)  # [T, keys]
    if ids is not None:
        at_query, at_key = query_ids[:, None, :, None], ids[:, None, None, :]
        seen = seen & (at_query == at_key) & (at_query > 0)  # [B, 1, T, keys]
    q, k, v_float = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("bath,bash->bats", q, k, precision=lax.Precision.HIGHEST)
    scores = jnp.where(seen, scores * q.shape[-1] ** -0.5, -jnp.inf)
    # A token at padding sees nothing: it gets a key, so that nothing is NaN, and then no output.
    is_blind = ~seen.any(-1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(is_blind, 0.0, scores), axis=-1)
    weights = jnp.where(is_blind, 0.0, weights)
    out = jnp.einsum("bats,bash->bath", weights, v_float, precision=lax.Precision.HIGHEST)
    return out.astype(v.dtype)
