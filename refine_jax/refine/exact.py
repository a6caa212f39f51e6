"""The exact expectation of match rewards over all rollouts, from one forward pass.

A rollout of k tokens from slot t is right up to its l-th token with probability

    P_l(t) = p(x_{t+1} | x_{<=t}) ... p(x_{t+l} | x_{<t+l}),

a product of probabilities that next-token training has already computed, because a rollout that
has been right so far has the true tokens as its context. So P_k is the expectation of the reward
`whole` and the mean of P_1 .. P_k that of `prefix` (`rewards.py`), for rollouts at temperature 1
from every slot, without sampling one. (VeriFree, arXiv 2505.21493, maximises the same probability
of a reference answer.)

The gradient of P_l(t) is P_l(t) times that of the log-probabilities of its l tokens. So the
gradient of -P_k summed over slots is that of next-token training in which the token at slot u
weighs the sum of P_k over the windows that hold it (at most k), constants for the gradient; for
`prefix`, the mean over l of the sums of P_l.
"""

import jax
import jax.numpy as jnp
from jax import lax

MATCH_REWARDS = ("whole", "prefix")


def match_probabilities(
    log_probs: jax.Array, weights: jax.Array, rollout_length: int
) -> tuple[jax.Array, jax.Array]:
    """Compute the probability that a rollout from a slot is right up to its first ... k-th token.

    log_probs: [B, T], in nats, of the true token t + 1 given the tokens up to t; -inf is allowed.
    weights: [B, T], 1 where token t + 1 is real and of the document of token t, else 0. What
    log_probs holds there has no influence, not even NaN. rollout_length: k. The program grows with
    it, and its arrays to [B, T, k].

    Returns `probabilities` [B, T, k] float32, P_1 .. P_k in the order of the last axis, and
    `counted` [B, T] bool, whether the window of slot t, its k tokens t + 1 .. t + k, lies in one
    document. Where it does not, all probabilities are 0 and so are their gradients.
    """
    real = weights != 0
    # A sum of at most k terms for each window: differences of cumulative sums along the row would
    # lose what float32 rounds off a whole row, and -inf - -inf is no number.
    terms = jnp.where(real, log_probs.astype(jnp.float32), 0.0)
    total, counted, totals = jnp.zeros_like(terms), jnp.ones_like(real), []
    for distance in range(rollout_length):
        total = total + _ahead(terms, distance)
        counted &= _ahead(real, distance)
        totals.append(total)
    logs = jnp.where(counted[..., None], jnp.stack(totals, axis=-1), -jnp.inf)
    return jnp.exp(logs), counted


def _ahead(values: jax.Array, distance: int) -> jax.Array:
    """Shift `values` [B, T] forward by `distance` slots; zeros (False) fill the row's end."""
    return jnp.pad(values[:, distance:], ((0, 0), (0, min(distance, values.shape[1]))))


def expected_match(probabilities: jax.Array, reward: str) -> jax.Array:
    """Compute the expected reward [...] float32 of a rollout, from `probabilities` [..., k].

    reward: `whole` (P_k: all k tokens are right) or `prefix` (mean of P_1 .. P_k: the share of
    tokens before the first mistake). Raises ValueError for another name.
    """
    if reward not in MATCH_REWARDS:
        raise ValueError(f"exact rewards are {MATCH_REWARDS}. Got: {reward!r}.")
    return probabilities[..., -1] if reward == "whole" else jnp.mean(probabilities, axis=-1)


def match_weights(
    nll: jax.Array, weights: jax.Array, *, rollout_length: int, reward: str
) -> jax.Array:
    """Compute what the sum of expected rewards adds to each token's weight: [B, T] float32.

    The sum over the windows that count and hold the token of P_k (`whole`), or of the mean of those
    of P_1 .. P_k whose tokens hold it (`prefix`); constants for the gradient.

    nll: [B, T], nats, of the true token t + 1. weights: as `match_probabilities` takes them.
    """

    def total(log_probs):
        probabilities, counted = match_probabilities(log_probs, weights, rollout_length)
        return jnp.sum(jnp.where(counted, expected_match(probabilities, reward), 0.0))

    return lax.stop_gradient(jax.grad(total)(-nll))


def match_count(counted: jax.Array) -> jax.Array:
    """Count the denominator of `expected_match_loss`, a scalar float32 of at least 1.

    counted: bool, of all rows of a mini-batch: [B, T] of `match_probabilities`, or, where the mean
    runs over chosen positions, `valid` [B, R] of these.
    """
    return jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)


def expected_match_loss(
    probabilities: jax.Array,
    counted: jax.Array,
    *,
    reward: str = "whole",
    denominator: jax.Array | None = None,
) -> jax.Array:
    """Average minus the expected reward over the windows that count: scalar float32 in -1..0.

    probabilities, counted: [..., k] and [...], of `match_probabilities` at every slot, or at the
    slots before the first tokens of chosen rollouts; differentiated through. denominator: scalar,
    where the rows are one micro-batch: `match_count` of the whole mini-batch, whose losses then add
    up to the mini-batch's. None: that of these rows. Raises ValueError for a reward that has no
    exact expectation here.
    """
    expected = expected_match(probabilities, reward)
    denominator = match_count(counted) if denominator is None else denominator
    return -jnp.sum(jnp.where(counted, expected, 0.0)) / denominator
