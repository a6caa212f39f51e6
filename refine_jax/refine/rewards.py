"""Self-supervised rewards: how close a rollout came to the true continuation.

Source: ReFINE (arXiv 2602.16704), section 3. All functions take the final-norm hidden states at
the k rolled-out tokens, those of the first forward at the same slots, and both token sequences.
Leading axes broadcast, so the truth of a position may stand against several rollouts.

Each reward is one of tokens, [..., k]; that of a rollout is the mean over its tokens. `expected`
has another source, the probabilities of the true tokens, which `token_rewards` takes.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

_EPS = 1e-8


def cosine(hidden: Array, true_hidden: Array, tokens: Array, true_tokens: Array) -> Array:
    """Compare hidden states [..., k, D]: cosines [..., k] float32 in -1..1, 0 for a zero vector."""
    a = hidden.astype(jnp.float32)
    b = true_hidden.astype(jnp.float32)
    norms = [jnp.sqrt(jnp.sum(x * x, axis=-1)) for x in (a, b)]
    # Elementwise, not a matrix product: accelerators would round that to bfloat16.
    return jnp.sum(a * b, axis=-1) / (jnp.maximum(norms[0], _EPS) * jnp.maximum(norms[1], _EPS))


def binary(hidden: Array, true_hidden: Array, tokens: Array, true_tokens: Array) -> Array:
    """Match tokens [..., k]: [..., k] float32, 1 or 0."""
    return (tokens == true_tokens).astype(jnp.float32)


def hybrid(hidden: Array, true_hidden: Array, tokens: Array, true_tokens: Array) -> Array:
    """Add `cosine` and `binary`: [..., k] float32 in -1..2."""
    arrays = (hidden, true_hidden, tokens, true_tokens)
    return cosine(*arrays) + binary(*arrays)


def prefix(hidden: Array, true_hidden: Array, tokens: Array, true_tokens: Array) -> Array:
    """Match all tokens up to each one: [..., k] float32, 1 or 0.

    The mean is the share of tokens before the first mistake.
    """
    return jnp.cumprod((tokens == true_tokens).astype(jnp.float32), axis=-1)


def whole(hidden: Array, true_hidden: Array, tokens: Array, true_tokens: Array) -> Array:
    """Match all k tokens: [..., k] float32, k or 0 at the last token, 0 at the others.

    So the mean over tokens is 1 or 0, and every token's reward to go is the whole one.
    """
    match = tokens == true_tokens
    length = match.shape[-1]
    last = jnp.arange(length) == length - 1
    return jnp.where(last & jnp.all(match, axis=-1, keepdims=True), float(length), 0.0)


REWARDS: dict[str, Callable[..., Array]] = {
    "cosine": cosine,
    "binary": binary,
    "hybrid": hybrid,
    "whole": whole,
    "prefix": prefix,
}
EXPECTED = "expected"


def token_rewards(
    kind: str,
    hidden: Array | None,
    true_hidden: Array | None,
    tokens: Array,
    true_tokens: Array,
    *,
    true_log_probs: Array | None = None,
) -> Array:
    """Reward the tokens of rollouts: [..., k] float32; their mean is the rollout's reward.

    hidden, true_hidden: [..., k, D]; None where the kind does not compare them (all but `cosine`
        and `hybrid`). tokens, true_tokens: [..., k] int32.
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
    return REWARDS[kind](hidden, true_hidden, tokens, true_tokens)
