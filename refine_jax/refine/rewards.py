"""Self-supervised rewards: how close a rollout came to the true continuation.

Source: ReFINE (arXiv 2602.16704), section 3. All functions take the final-norm hidden states at
the k rolled-out tokens, those of the first forward at the same slots, and both token sequences.
Leading axes broadcast, so the truth of a position may stand against several rollouts.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

_EPS = 1e-8


def cosine(
    rollout_hidden: jax.Array,
    true_hidden: jax.Array,
    rollout_tokens: jax.Array,
    true_tokens: jax.Array,
) -> jax.Array:
    """Cosine of hidden states [..., k, D] token by token: [..., k] float32 in -1..1.

    A zero vector gives 0. Tokens [..., k] are not used.
    """
    a = rollout_hidden.astype(jnp.float32)
    b = true_hidden.astype(jnp.float32)
    norms = [jnp.sqrt(jnp.sum(x * x, axis=-1)) for x in (a, b)]
    # Elementwise, not a matrix product: accelerators would round that to bfloat16.
    return jnp.sum(a * b, axis=-1) / (jnp.maximum(norms[0], _EPS) * jnp.maximum(norms[1], _EPS))


def binary(
    rollout_hidden: jax.Array,
    true_hidden: jax.Array,
    rollout_tokens: jax.Array,
    true_tokens: jax.Array,
) -> jax.Array:
    """Exact matches of tokens [..., k]: [..., k] float32, 1 or 0. Hidden states are not used."""
    return (rollout_tokens == true_tokens).astype(jnp.float32)


def hybrid(
    rollout_hidden: jax.Array,
    true_hidden: jax.Array,
    rollout_tokens: jax.Array,
    true_tokens: jax.Array,
) -> jax.Array:
    """Sum of `cosine` and `binary`: [..., k] float32 in -1..2."""
    arrays = (rollout_hidden, true_hidden, rollout_tokens, true_tokens)
    return cosine(*arrays) + binary(*arrays)


REWARDS: dict[str, Callable[..., jax.Array]] = {
    "cosine": cosine,
    "binary": binary,
    "hybrid": hybrid,
}


def rollout_rewards(
    kind: str,
    rollout_hidden: jax.Array,
    true_hidden: jax.Array,
    rollout_tokens: jax.Array,
    true_tokens: jax.Array,
) -> jax.Array:
    """Reward of each rollout, [...] float32: the mean over its k tokens of the reward `kind`.

    rollout_hidden, true_hidden: [..., k, D]. rollout_tokens, true_tokens: [..., k] int32.
    Raises ValueError for a name that is not in `REWARDS`.
    """
    if kind not in REWARDS:
        raise ValueError(f"reward must be one of {tuple(REWARDS)}. Got: {kind!r}.")
    per_token = REWARDS[kind](rollout_hidden, true_hidden, rollout_tokens, true_tokens)
    return jnp.mean(per_token, axis=-1)
