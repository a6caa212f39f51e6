"""Self-supervised rewards: how close a rollout came to the true continuation.

Source: ReFINE (arXiv 2602.16704), section 3. All functions take the final-norm hidden states at
the k rolled-out tokens, those of the first forward at the same slots, and both token sequences.
Leading axes broadcast, so the truth of a position may stand against several rollouts.

Each reward is one of tokens, [..., k]; that of a rollout is the mean over its tokens. `expected`
has another source, the probabilities of the true tokens, which `token_rewards` takes. It also
takes which tokens count, where rollouts are shorter than k.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

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


def edit(hidden: Array, true_hidden: Array, tokens: Array, true_tokens: Array) -> Array:
    """Compare by edit distance, which forgives shifts: [..., k] float32, 1 or 0.

    D_j, the least number of insertions, deletions and replacements that turn the first j tokens of
    the rollout into the first j true ones, grows by 0 or 1 with j (Ukkonen, 1985). Token j is
    rewarded with 1 - (D_j - D_{j-1}), so that the mean is 1 - D_k / k, and no reward depends on
    later tokens. The work and the memory of one rollout are k * k and k numbers.
    """
    shape = jnp.broadcast_shapes(tokens.shape, true_tokens.shape)
    tokens, true_tokens = (jnp.broadcast_to(x, shape) for x in (tokens, true_tokens))
    places = jnp.arange(shape[-1] + 1)

    def read(row, inputs):
        """From the distances of j - 1 tokens to the first 0 .. k true tokens, those of j."""
        token, j = inputs
        replaced = row[..., :-1] + (token[..., None] != true_tokens)
        least = jnp.minimum(row[..., 1:] + 1, replaced)
        least = jnp.concatenate([jnp.broadcast_to(j, (*shape[:-1], 1)), least], axis=-1)
        # Insertions of true tokens: the least over l <= i of least_l + i - l.
        row = lax.cummin(least - places, axis=least.ndim - 1) + places
        return row, lax.dynamic_index_in_dim(row, j, axis=-1, keepdims=False)

    none = jnp.broadcast_to(places, (*shape[:-1], shape[-1] + 1))
    _, distances = lax.scan(read, none, (jnp.moveaxis(tokens, -1, 0), places[1:]))
    return 1.0 - jnp.diff(jnp.moveaxis(distances, 0, -1), axis=-1, prepend=0).astype(jnp.float32)


def whole(
    hidden: Array, true_hidden: Array, tokens: Array, true_tokens: Array, counted: Array
) -> Array:
    """Match all tokens that count: [..., k] float32, k or 0 at the last of them, 0 at the others.

    So the mean over tokens is 1 or 0, and every token's reward to go is the whole one.
    """
    match = jnp.all((tokens == true_tokens) | ~counted, axis=-1, keepdims=True)
    return _at_last(match.astype(jnp.float32), counted)


def pooled_cosine(
    hidden: Array, true_hidden: Array, tokens: Array, true_tokens: Array, counted: Array
) -> Array:
    """Compare mean-pooled hidden states, which forgives shifts: [..., k] float32.

    The cosine of the means over the tokens that count, times k at the last of them, 0 at the
    others.
    """
    weights = counted.astype(jnp.float32)[..., None]
    sums = (jnp.sum(x.astype(jnp.float32) * weights, axis=-2) for x in (hidden, true_hidden))
    return _at_last(cosine(*sums, tokens, true_tokens)[..., None], counted)


def _at_last(reward: Array, counted: Array) -> Array:
    """Give a rollout's `reward` [..., 1] to its last token that counts, times k: [..., k]."""
    following = jnp.pad(counted[..., 1:], [(0, 0)] * (counted.ndim - 1) + [(0, 1)])
    return jnp.where(counted & ~following, reward * counted.shape[-1], 0.0)


REWARDS: dict[str, Callable[..., Array]] = {
    "cosine": cosine,
    "binary": binary,
    "hybrid": hybrid,
    "prefix": prefix,
    "edit": edit,
}
# Of rollouts as a whole: these also take which tokens count.
ROLLOUT_REWARDS: dict[str, Callable[..., Array]] = {"whole": whole, "pooled_cosine": pooled_cosine}
EXPECTED = "expected"


def counted_tokens(entropy: Array, budget: float) -> Array:
    """Find how many tokens of a rollout count, by the entropy that follows: [..., k] bool.

    entropy: [..., k], nats, of the predictions of the k true tokens. The first l tokens count, as
    many as have entropies that sum up to `budget` nats at most, but at least one: the exponential
    of minus that sum is about the probability of a typical continuation. Constants.
    """
    within = jnp.cumsum(lax.stop_gradient(entropy).astype(jnp.float32), axis=-1) <= budget
    return within.at[..., 0].set(True)


def token_rewards(
    kind: str,
    hidden: Array | None,
    true_hidden: Array | None,
    tokens: Array,
    true_tokens: Array,
    *,
    true_log_probs: Array | None = None,
    counted: Array | None = None,
) -> Array:
    """Reward the tokens of rollouts: [..., k] float32; their mean is the rollout's reward.

    hidden, true_hidden: [..., k, D]; None where the kind does not compare them (all but `cosine`,
        `hybrid` and `pooled_cosine`). tokens, true_tokens: [..., k] int32.
    true_log_probs: [..., k] for the kind `expected`: log-probability in nats of the true token at
        each of the k places, given the text before the rollout and the *rollout's* tokens before
        that place. The reward is its exponential: the expectation of `binary` over the token at
        that place, so both have one expectation, and this one less noise. It does not depend on
        the token itself, and it has a gradient of its own (`grpo.expected_reward_loss`).
    counted: [..., k] bool, True at the first l tokens of each rollout, l >= 1; None: all count.
        Rewards of tokens that count are k / l times what they were, the others are 0, so that the
        mean over k is that of the first l tokens.

    Raises ValueError for an unknown name, and for `expected` without probabilities.
    """
    if kind == EXPECTED and true_log_probs is None:
        raise ValueError("reward 'expected' needs true_log_probs. Got: None.")
    arrays = (hidden, true_hidden, tokens, true_tokens)
    if kind in ROLLOUT_REWARDS:
        shape = jnp.broadcast_shapes(jnp.shape(tokens), jnp.shape(true_tokens))
        whole_length = jnp.ones(shape, bool)
        return ROLLOUT_REWARDS[kind](*arrays, whole_length if counted is None else counted)
    if kind == EXPECTED:
        rewards = jnp.exp(true_log_probs.astype(jnp.float32))
    elif kind in REWARDS:
        rewards = REWARDS[kind](*arrays)
    else:
        kinds = (*REWARDS, *ROLLOUT_REWARDS, EXPECTED)
        raise ValueError(f"reward must be one of {kinds}. Got: {kind!r}.")
    if counted is None:
        return rewards
    length = jnp.sum(counted, axis=-1, keepdims=True, dtype=jnp.float32)
    return jnp.where(counted, rewards * (counted.shape[-1] / length), 0.0)
