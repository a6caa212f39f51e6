"""Next-token loss and its figures from all logits at once: the specification of the op."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class TokenStats(NamedTuple):
    """Per-token figures [B, T] of the next-token distribution; constants for the gradient."""

    nll: jax.Array  # nats, of the target
    entropy: jax.Array  # nats
    correct: jax.Array  # 1.0 where no logit is larger than the target's


def next_token_loss_reference(hidden, head, targets, weights, block_tokens=None):
    """`next_token_loss` of api.py in float32. `block_tokens` has no meaning here."""
    del block_tokens
    z = jnp.einsum(
        "btd,vd->btv",
        hidden.astype(jnp.float32),
        head.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )
    log_probs = jax.nn.log_softmax(z)
    nll = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    chosen = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
    stats = TokenStats(
        nll=nll,
        entropy=-jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1),
        correct=(chosen >= z.max(-1)).astype(jnp.float32),
    )
    return jnp.sum(nll * weights), jax.tree.map(lax.stop_gradient, stats)
