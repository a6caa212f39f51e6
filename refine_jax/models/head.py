"""The vocabulary head of the models: logits, next-token loss, entropy and log-probabilities.

Logits are [tokens, V] only for one block of tokens at a time; the op is `kernels/cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.kernels import cross_entropy
from refine_jax.kernels.cross_entropy import (
    TokenStats,
    entropy,
    log_prob,
    logits,
    token_log_probs,
)
from refine_jax.parallel import axis_size, over_shards

__all__ = [
    "TokenStats",
    "entropy",
    "log_prob",
    "logits",
    "next_token_loss",
    "reweighted_loss",
    "token_log_probs",
]


def next_token_loss(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, TokenStats]:
    """Compute `next_token_loss` of the kernels, each device on its rows, tokens and words.

    hidden: [B, T, D]. head: [V, D]. targets, weights: [B, T].
    """

    def loss(*arrays, **options):
        return cross_entropy.next_token_loss(*arrays, implementation=implementation, **options)

    return _over_devices(loss, hidden, head, targets, weights)


def reweighted_loss(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    scales: jax.Array,
    weigh: Callable[[jax.Array, jax.Array], jax.Array],
    reach: int,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, TokenStats]:
    """Compute `reweighted_loss` of the kernels, each device on its rows, tokens and words.

    hidden: [B, T, D]. head: [V, D]. targets, weights: [B, T]. scales: [2].
    """
    if _shares_tokens(targets):
        # What is near a token may be on another device: the losses of all come first.
        options = {"implementation": implementation}
        stats = lax.stop_gradient(next_token_loss(hidden, head, targets, weights, **options)[1])
        token_weights = scales[0] * weights + scales[1] * weigh(stats.nll, weights)
        loss, _ = next_token_loss(hidden, head, targets, token_weights, **options)
        return loss, stats

    def loss(*arrays, **options):
        return cross_entropy.reweighted_loss(
            *arrays, scales, weigh, reach, implementation=implementation, **options
        )

    return _over_devices(loss, hidden, head, targets, weights)


def _shares_tokens(targets: jax.Array) -> bool:
    """Whether devices of the axis `sequence` share the tokens of rows [B, T]."""
    return axis_size("sequence") > 1 and targets.shape[1] % axis_size("sequence") == 0


def _over_devices(loss: Callable, hidden, head, targets, weights):
    """A loss, summed over all devices, and its statistics [B, T]."""
    shared = axis_size("tensor") > 1 and head.shape[0] % axis_size("tensor") == 0
    tokens = ("batch", "tokens" if _shares_tokens(targets) else None)

    def of_device(*arrays):
        total, stats = loss(*arrays, axis_name="tensor" if shared else None)
        return total[None, None], stats

    of_device = over_shards(
        of_device, (tokens, ("vocab" if shared else None,), tokens, tokens), (tokens, tokens)
    )
    totals, stats = of_device(hidden, head, targets, weights)
    return jnp.sum(totals), stats
