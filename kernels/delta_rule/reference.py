"""The delta rule, token by token in float32: the specification of the op."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def delta_rule_reference(
    q, k, v, beta, log_decay, *, initial_state, document, scale, chunk_size, save_every
):
    """`delta_rule` of api.py, one token at a time. `chunk_size` has no meaning here."""
    del chunk_size
    tokens, key_heads = k.shape[1:3]
    value_heads = v.shape[2]

    def per_token(x, heads=value_heads):
        x = jnp.repeat(x.astype(jnp.float32), value_heads // heads, axis=2)
        return jnp.moveaxis(x, 1, 0)

    keep = jnp.ones(beta.shape[:2], jnp.float32)
    if document is not None:
        keep = keep.at[:, 1:].set(document[:, 1:] == document[:, :-1])
    decay = jnp.ones(beta.shape) if log_decay is None else jnp.exp(log_decay)
    inputs = (
        per_token(k if q is None else q, key_heads) * scale,
        per_token(k, key_heads),
        per_token(v),
        per_token(beta),
        per_token(decay * keep[..., None]),
    )

    def step(state, token):
        q_t, k_t, v_t, beta_t, decay_t = token
        decayed = decay_t[..., None, None] * state
        error = v_t - jnp.einsum("bhkv,bhk->bhv", decayed, k_t)
        new = decayed + jnp.einsum("bhk,bhv->bhkv", k_t, beta_t[..., None] * error)
        return new, (jnp.einsum("bhkv,bhk->bhv", new, q_t), state)

    with jax.default_matmul_precision("highest"):
        final, (out, states) = lax.scan(step, initial_state, inputs)
    out = None if q is None else jnp.moveaxis(out, 0, 1).astype(v.dtype)
    saved = None if save_every is None else jnp.moveaxis(states[0:tokens:save_every], 0, 1)
    return out, final, saved
