"""Self-supervised rewards: how close a rollout came to the true continuation.

Source: ReFINE (arXiv 2602.16704), section 3. All functions take the final-norm hidden states at
the k rolled-out tokens, those of the first forward at the same slots, and both token sequences.
Leading axes broadcast, so the truth of a position may stand against several rollouts.

Each reward is one of tokens, [..., k]; that of a rollout is the mean over its tokens. `expected`
has another source, the probabilities of the true tokens, which `token_rewards` takes.
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


def prefix(
    rollout_hidden: jax.Array,
    true_hidden: jax.Array,
    rollout_tokens: jax.Array,
    true_tokens: jax.Array,
) -> jax.Array:
    """Whether all tokens up to each one match: [..., k] float32, 1 or 0.

    Its mean is the share of tokens before the first mistake. Hidden states are not used.
    """
    match = (rollout_tokens == true_tokens).astype(jnp.float32)
    return jnp.cumprod(match, axis=-1)


def whole(
    rollout_hidden: jax.Array,
    true_hidden: jax.Array,
    rollout_tokens: jax.Array,
    true_tokens: jax.Array,
) -> jax.Array:
    """Whether all k tokens match: [..., k] float32, k or 0 at the last token, 0 at the others.

    So its mean over tokens is 1 or 0, and every token's reward to go is the whole one. Hidden
    states are not used.
    """
    match = rollout_tokens == true_tokens
    length = match.shape[-1]
    last = jnp.arange(length) == length - 1
    return jnp.where(last & jnp.all(match, axis=-1, keepdims=True), float(length), 0.0)


REWARDS: dict[str, Callable[..., jax.Array]] = {
    "cosine": cosine,
    "binary": binary,
    "hybrid": hybrid,
    "whole": whole,
    "prefix": prefix,
}
EXPECTED = "expected"


def token_rewards(
    kind: str,
    rollout_hidden: jax.Array | None,
    true_hidden: jax.Array | None,
    rollout_tokens: jax.Array,
    true_tokens: jax.Array,
    *,
    true_log_probs: jax.Array | None = None,
) -> jax.Array:
    """Rewards of the tokens of rollouts, [..., k] float32; their mean is the rollout's reward.

    rollout_hidden, true_hidden: [..., k, D]; None where the kind does not compare them (all but
        `cosine` and `hybrid`). rollout_tokens, true_tokens: [..., k] int32.
    true_log_probs: [..., k] for the kind `expected`: log-probability in nats of the true token at
        each of the k places, given the text before the rollout and the *rollout's* tokens before
        that place. The reward is its exponential: the expectation of `binary` over the token at
        that place, so both have one expectation, and this one less noise. It does not depend on
        the token itself, and it has a gradient of its own (`grpo.expected_reward_loss`).

    Raises ValueError for an unknown name, and for `expected` without probabilities.
    """
    if kind == EXPECTED:
        if true_log_probs is None:
            raise ValueError("reward 'expected' needs true_log_probs. Got: None.")
        return jnp.exp(true_log_probs.astype(jnp.float32))
    if kind not in REWARDS:
        raise ValueError(f"reward must be one of {(*REWARDS, EXPECTED)}. Got: {kind!r}.")
    return REWARDS[kind](rollout_hidden, true_hidden, rollout_tokens, true_tokens)


def rollout_rewards(
    kind: str,
    rollout_hidden: jax.Array | None,
    true_hidden: jax.Array | None,
    rollout_tokens: jax.Array,
    true_tokens: jax.Array,
    *,
    true_log_probs: jax.Array | None = None,
) -> jax.Array:
    """Reward of each rollout, [...] float32: the mean over its k tokens of `token_rewards`.

    Takes and raises what `token_rewards` does.
    """
    per_token = token_rewards(
        kind,
        rollout_hidden,
        true_hidden,
        rollout_tokens,
        true_tokens,
        true_log_probs=true_log_probs,
    )
    return jnp.mean(per_token, axis=-1)
