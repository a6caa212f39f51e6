"""Selection by the variance of the whole-match reward; laws of the others are in test_laws."""

import functools

import jax
import numpy as np
import pytest
import scipy.stats
from goldens.refine_rl import select

from refine_jax.refine import selection
from refine_jax.refine.exact import match_probabilities

OPTIONS = {"rollout_length": 3, "method": "variance", "edge_margin": 3}
K = OPTIONS["rollout_length"]


def draw_slots(probabilities, counted, count, c, **options):
    """Chosen slots [count, c] of one row of real tokens, drawn `count` times."""
    keys = jax.random.split(jax.random.key(1), count)
    repeat = functools.partial(np.repeat, repeats=count, axis=0)
    got = select(
        keys,
        np.zeros((count, len(probabilities)), np.float32),
        np.ones((count, len(probabilities)), bool),
        probabilities=repeat(np.float32(probabilities)[None]),
        counted=repeat(np.asarray(counted)[None]),
        num_positions=c,
        **OPTIONS | options,
    )
    return jax.tree.map(np.asarray, got)


def follow(chosen, weights):
    """Whether slots `chosen` [n] of a span are drawn in proportion to `weights` [T]."""
    counts = np.bincount(chosen, minlength=len(weights))
    possible = weights > 0
    expected = weights[possible] / weights.sum() * len(chosen)
    fits = scipy.stats.chisquare(counts[possible], expected).pvalue > 1e-4
    return fits and not counts[~possible].any()


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_slots_are_drawn_in_proportion_to_the_variance(temperature):
    """Two spans of 12 slots; the margins and slots that do not count are never chosen."""
    probabilities = np.random.default_rng(0).uniform(0.1, 0.9, 24)
    counted = np.random.default_rng(1).random(24) < 0.8
    weights = (probabilities * (1 - probabilities)) ** (1 / temperature)
    # A start, one slot later, keeps 3 tokens from either end of the text.
    inside = (np.arange(24) >= 2) & (np.arange(24) <= 20)
    weights = np.where(counted & inside, weights, 0.0)
    got = draw_slots(probabilities, counted, 4000, 2, temperature=temperature)
    spans = np.arange(24) // 12
    assert all(follow(got.chosen[:, j], np.where(spans == j, weights, 0.0)) for j in range(2))
    np.testing.assert_array_equal(got.starts, got.chosen + 1)
    assert got.valid.all()


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-9])
def test_spans_without_variance_are_drawn_from_uniformly(value):
    got = draw_slots(np.full(30, value), np.ones(30, bool), 4000, 3)
    inside = (np.arange(30) >= 2) & (np.arange(30) <= 26)
    spans = np.arange(30) // 10
    assert all(follow(got.chosen[:, j], 1.0 * (inside & (spans == j))) for j in range(3))


def test_one_open_outcome_among_thousands_of_certain_ones_is_chosen():
    probabilities = np.zeros(4000)
    probabilities[2500] = 0.5
    got = draw_slots(probabilities, np.ones(4000, bool), 200, 1)
    assert (got.chosen == 2500).mean() > 0.95


def test_a_span_without_windows_that_count_is_still_drawn_from():
    """Its rollouts may be valid or not; that is for `has_truth` to say."""
    counted = np.ones(30, bool)
    counted[10:20] = False
    got = draw_slots(np.full(30, 0.5), counted, 2000, 3)
    assert follow(got.chosen[:, 1], 1.0 - counted)


def test_the_chosen_rollouts_have_the_probability_they_were_chosen_for():
    """In packed rows: P_k of the chosen slot is the product over the rollout's own k tokens."""
    rng = np.random.default_rng(2)
    segments = np.repeat([[1, 2, 3, 4]], 4, axis=0).repeat([20, 9, 21, 14], axis=1)
    log_probs = -rng.exponential(0.5, segments.shape).astype(np.float32)
    weights = np.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1)))
    probabilities, counted = match_probabilities(log_probs, weights, K)
    got = select(
        jax.random.split(jax.random.key(0), 4),
        np.zeros(segments.shape, np.float32),
        np.ones(segments.shape, bool),
        document=segments,
        probabilities=probabilities[..., -1],
        counted=counted,
        num_positions=4,
        **OPTIONS,
    )
    assert np.asarray(got.valid).all()
    for row, j in np.ndindex(4, 4):
        start = got.starts[row, j]
        product = np.exp(np.float64(log_probs[row, start - 1 : start - 1 + K]).sum())
        found = probabilities[row, got.chosen[row, j], -1]
        np.testing.assert_allclose(found, product, rtol=1e-5)


def test_variance_needs_probabilities():
    with pytest.raises(ValueError, match="'variance' needs probabilities"):
        selection.selection_scores(np.zeros((1, 4), np.float32), 3, "variance")


def test_rollouts_beside_an_objective_without_positions_start_anywhere():
    entropy = np.random.default_rng(0).uniform(0, 5, (2, 40)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    mask = np.ones((2, 40), bool)
    options = {"num_positions": 3, "rollout_length": 3, "edge_margin": 3}
    got = [select(keys, entropy, mask, method=name, **options) for name in ("all", "uniform")]
    jax.tree.map(np.testing.assert_array_equal, *got)
