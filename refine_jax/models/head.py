"""The vocabulary head of the models: logits, next-token loss, entropy and log-probabilities.

Logits are [tokens, V] only for one block of tokens at a time; the op is `kernels/cross_entropy`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from refine_jax.kernels import cross_entropy
from refine_jax.kernels.cross_entropy import (
    TokenStats,
    entropy,
    log_prob,
    logits,
    token_log_probs,
)
from refine_jax.parallel import axis_size, over_shards

__all__ = ["TokenStats", "entropy", "log_prob", "logits", "next_token_loss", "token_log_probs"]


def next_token_loss(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, TokenStats]:
    """`next_token_loss` of the kernels, each device on its rows, tokens and words."""
    shared = axis_size("tensor") > 1 and head.shape[0] % axis_size("tensor") == 0
    tokens = ("batch", "tokens" if targets.shape[1] % axis_size("sequence") == 0 else None)

    def loss(hidden, head, targets, weights):
        axis_name = "tensor" if shared else None
        total, stats = cross_entropy.next_token_loss(
            hidden, head, targets, weights, axis_name=axis_name, implementation=implementation
        )
        return total[None, None], stats

    loss = over_shards(
        loss, (tokens, ("vocab" if shared else None,), tokens, tokens), (tokens, tokens)
    )
    totals, stats = loss(hidden, head, targets, weights)
    return jnp.sum(totals), stats
