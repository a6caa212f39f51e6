"""The vocabulary head in blocks: next-token loss, entropy and log-probabilities."""

from refine_jax.kernels.cross_entropy.api import (
    IMPLEMENTATIONS,
    next_token_loss,
    reweighted_loss,
    token_log_probs,
)
from refine_jax.kernels.cross_entropy.reference import TokenStats
from refine_jax.kernels.cross_entropy.xla import entropy, log_prob, logits

__all__ = [
    "IMPLEMENTATIONS",
    "TokenStats",
    "entropy",
    "log_prob",
    "logits",
    "next_token_loss",
    "reweighted_loss",
    "token_log_probs",
]
