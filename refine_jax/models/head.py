"""The vocabulary head of the models: logits, next-token loss, entropy and log-probabilities.

Logits are [tokens, V] only for one block of tokens at a time; the op is `kernels/cross_entropy`.
"""

from refine_jax.kernels.cross_entropy import (
    TokenStats,
    entropy,
    log_prob,
    logits,
    next_token_loss,
    token_log_probs,
)

__all__ = ["TokenStats", "entropy", "log_prob", "logits", "next_token_loss", "token_log_probs"]
