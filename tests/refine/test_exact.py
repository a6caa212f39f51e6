"""Exact expected rewards against enumeration of all rollouts and against float64 numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_jax.kernels.cross_entropy import reweighted_loss
from refine_jax.parallel import take_tokens
from refine_jax.refine.exact import (
    expected_match,
    expected_match_loss,
    match_count,
    match_probabilities,
    match_weights,
)

VOCABULARY = 4
probabilities_of = jax.jit(match_probabilities, static_argnames="rollout_length")


def plain_probabilities(log_probs, weights, k):
    """[B, T, k] float64 and [B, T] bool, window by window."""
    batch, num_tokens = log_probs.shape
    probabilities = np.zeros((batch, num_tokens, k))
    counted = np.zeros((batch, num_tokens), bool)
    for row, slot in np.ndindex(batch, num_tokens):
        window = np.s_[row, slot : slot + k]
        if slot + k <= num_tokens and weights[window].all():
            counted[row, slot] = True
            probabilities[row, slot] = np.cumprod(np.exp(log_probs[window].astype(np.float64)))
    return probabilities, counted


def packed_weights():
    """Rows [3, 24] of documents of several lengths and of padding, as `target_weights` has them."""
    segments = np.zeros((3, 24), int)
    segments[0] = 1
    segments[1] = [0, 0, *[1] * 5, *[2] * 2, 3, *[4] * 9, *[0] * 5]
    segments[2] = [*[1] * 12, *[2] * 12]
    weights = np.zeros(segments.shape, np.float32)
    weights[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return weights


def random_rows(seed=0, scale=2.0):
    weights = packed_weights()
    log_probs = -np.random.default_rng(seed).exponential(scale, weights.shape).astype(np.float32)
    return log_probs, weights


@pytest.mark.parametrize("k", [1, 2, 3, 5, 24, 30])
def test_probabilities_are_products_within_a_document(k):
    log_probs, weights = random_rows()
    expected, counted = plain_probabilities(log_probs, weights, k)
    garbage = np.where(weights == 0, np.float32(np.nan), log_probs)
    got = probabilities_of(garbage, weights, rollout_length=k)
    np.testing.assert_allclose(got[0], expected, rtol=2e-5, atol=0)
    np.testing.assert_array_equal(got[1], counted)
    assert counted.any() == (k < 24)


def test_long_rows_lose_no_precision():
    """Windows of a long row whose log-probabilities sum to -10,000."""
    log_probs = -np.random.default_rng(1).exponential(2, (1, 5000)).astype(np.float32)
    expected, _ = plain_probabilities(log_probs, np.ones((1, 5000)), 64)
    got, _ = probabilities_of(log_probs, np.ones((1, 5000)), rollout_length=64)
    np.testing.assert_allclose(got[..., :8], expected[..., :8], rtol=1e-5)
    logs = np.log(np.maximum(expected, 1e-35))
    np.testing.assert_allclose(np.log(np.maximum(got, 1e-35)), logs, atol=1e-4)


def test_impossible_tokens():
    """A probability of 0 has a window's product 0 and its gradient 0, and spoils no other."""
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.float32([[0.5, 0.25, 0.0, 0.5, 0.5, 0.5]]))
    weights = np.float32([[1, 1, 1, 1, 1, 0]])

    def total(log_probs):
        return jnp.sum(match_probabilities(log_probs, weights, 2)[0][..., -1])

    value, gradient = jax.jit(jax.value_and_grad(total))(log_probs)
    np.testing.assert_allclose(value, 0.125 + 0.25, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0.125, 0.125, 0, 0.25, 0.25, 0]], rtol=1e-6)


@pytest.mark.parametrize("reward", ["whole", "prefix"])
@pytest.mark.parametrize("k", [2, 3])
def test_value_and_gradient_are_those_of_all_rollouts(reward, k):
    """A policy with logits for every context, all of its rollouts, and their mean reward."""
    tables = random_tables(k)
    truth = np.array([2, 0, 3][:k])

    rollouts = np.array(list(itertools.product(range(VOCABULARY), repeat=k)))
    match = np.cumprod(rollouts == truth, axis=-1)
    scores = {"whole": match[:, -1], "prefix": match.mean(axis=-1)}[reward]

    def enumerated(tables):
        log_probs = jax.vmap(lambda rollout: log_probs_of(tables, rollout))(jnp.asarray(rollouts))
        return jnp.sum(scores * jnp.exp(jnp.sum(log_probs, axis=-1)))

    def exact(tables):
        log_probs = jnp.append(log_probs_of(tables, truth), 0.0)[None]
        weights = jnp.array([[*[1.0] * k, 0.0]])
        return -expected_match_loss(*match_probabilities(log_probs, weights, k), reward=reward)

    expected, got = (jax.jit(jax.value_and_grad(f))(tables) for f in (enumerated, exact))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), got, expected)


def random_tables(k, seed=3):
    """Logits of the next token for each of the contexts of 0 .. k - 1 tokens."""
    keys = jax.random.split(jax.random.key(seed), k)
    return [jax.random.normal(key, (VOCABULARY,) * (j + 1)) for j, key in enumerate(keys)]


def log_probs_of(tables, rollout):
    return jnp.stack(
        [
            jax.nn.log_softmax(table[tuple(rollout[:j])])[rollout[j]]
            for j, table in enumerate(tables)
        ]
    )


@pytest.mark.parametrize("reward", ["whole", "prefix"])
@pytest.mark.parametrize("chosen", [False, True])
def test_the_gradient_is_that_of_weighted_next_token_training(reward, chosen):
    """d loss / d log p of a token is minus the sum of P over the windows that hold it."""
    k = 3
    log_probs, weights = random_rows(scale=0.5)
    starts = np.array([[1, 5, 5, 14], [3, 7, 11, 16], [2, 11, 13, 20]])
    probabilities, counted = plain_probabilities(log_probs, weights, k)
    token_weights = np.zeros(log_probs.shape)
    windows = [(row, slot) for row, slot in np.argwhere(counted)]
    valid = np.take_along_axis(counted, starts - 1, axis=1)
    if chosen:
        windows = [(row, slot - 1) for row in range(3) for slot in starts[row][valid[row]]]
    for row, slot in windows:
        for length in [k] if reward == "whole" else range(1, k + 1):
            share = 1.0 if reward == "whole" else 1 / k
            held = token_weights[row, slot : slot + length]
            held += share * probabilities[row, slot, length - 1]

    def loss(log_probs):
        probabilities, counted = match_probabilities(log_probs, weights, k)
        if chosen:
            probabilities, counted = take_tokens(probabilities, starts - 1), valid
        return expected_match_loss(probabilities, counted, reward=reward)

    value, gradient = jax.jit(jax.value_and_grad(loss))(log_probs)
    np.testing.assert_allclose(gradient, -token_weights / len(windows), rtol=1e-5, atol=1e-9)
    terms = probabilities[..., -1] if reward == "whole" else probabilities.mean(axis=-1)
    expected = -np.mean([terms[window] for window in windows])
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("chosen", [False, True])
def test_micro_batches_add_up(chosen):
    log_probs, weights = random_rows()
    probabilities, counted = jax.device_get(probabilities_of(log_probs, weights, rollout_length=3))
    starts = np.array([[1, 5], [3, 7], [2, 11]])
    valid = np.array([[True, True], [False, False], [True, False]])
    if chosen:
        probabilities = np.take_along_axis(probabilities, starts[..., None] - 1, axis=1)
        counted = valid
    loss = jax.jit(expected_match_loss)
    whole = loss(probabilities, counted)
    denominator = jax.jit(match_count)(counted)
    parts = [
        loss(probabilities[row : row + 1], counted[row : row + 1], denominator=denominator)
        for row in range(3)
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)


def test_rows_without_windows_give_zero():
    log_probs = np.full((2, 5), np.nan, np.float32)

    def loss(log_probs):
        return expected_match_loss(*match_probabilities(log_probs, jnp.zeros((2, 5)), 3))

    value, gradient = jax.jit(jax.value_and_grad(loss))(log_probs)
    assert value == 0 and not gradient.any()


def test_rewards_without_an_exact_expectation_are_refused():
    with pytest.raises(ValueError, match="Got: 'cosine'"):
        expected_match(jnp.zeros((2, 5, 3)), "cosine")


# With the vocabulary head: the losses of tokens weigh tokens near them


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(
    ("shape", "k", "block_tokens", "reward"),
    [
        ((3, 37), 3, 30, "whole"),
        ((2, 64), 5, 16, "prefix"),
        ((1, 9), 4, 512, "whole"),
        ((2, 3), 5, 512, "whole"),  # no window fits
        ((4, 50), 1, 20, "whole"),
    ],
)
def test_reweighted_losses_have_the_gradient_of_the_expected_match(
    shape, k, block_tokens, reward, implementation
):
    """Against autodiff through all logits at once, whatever the blocks."""
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((*shape, 8)), rng.standard_normal((17, 8))
    targets = rng.integers(0, 17, shape, np.int32)
    weights = np.float32(rng.random(shape) > 0.1)
    weights[:, -1] = 0
    scales = np.float32([0.3, 0.7])

    def by_logits(hidden, head):
        log_probs = jax.nn.log_softmax(jnp.matmul(hidden, head.T, precision="highest"))
        log_probs = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        probabilities, counted = match_probabilities(log_probs, weights, k)
        match = jnp.where(counted, expected_match(probabilities, reward), 0.0)
        return -scales[0] * jnp.sum(log_probs * weights) - scales[1] * jnp.sum(match), -log_probs

    def in_blocks(hidden, head):
        weigh = functools.partial(match_weights, rollout_length=k, reward=reward)
        loss, stats = reweighted_loss(
            hidden,
            head,
            jnp.asarray(targets),
            jnp.asarray(weights),
            jnp.asarray(scales),
            weigh,
            max(k - 1, 1),
            block_tokens,
            implementation=implementation,
        )
        return loss, stats.nll

    arguments = np.float32(hidden), np.float32(head)
    (want, nll), (got, found) = (
        jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(*arguments)
        for f in (by_logits, in_blocks)
    )
    np.testing.assert_allclose(found, nll, atol=1e-5)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)
