"""Intervals and comparisons against published and hand-computed numbers."""

import itertools
import math

import numpy as np
import pytest

from refine_jax.evaluation.intervals import compare, interval


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # R. G. Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(successes, count, low, high) -> None:
    found = interval([1] * successes + [0] * (count - successes))
    assert (found.method, found.samples) == ("wilson", count)
    assert found.mean == successes / count
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_student() -> None:
    scores = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.0]
    found = interval(scores)
    spread = math.sqrt(sum((x - 0.45) ** 2 for x in scores) / 9 / 10)
    # 2.262157 is the 97.5th percentile of Student's t with 9 degrees of freedom.
    expected = (0.45 - 2.262157 * spread, 0.45 + 2.262157 * spread)
    assert found.method == "t"
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-6)
    assert (interval([0.5]).low, interval([0.5]).high) == (0, 1)  # one score says nothing


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    for draw, truth in (
        (lambda: random.random(60) < 0.9, 0.9),
        (lambda: random.integers(0, 5, 60) / 4, 0.5),
    ):
        found = [interval(draw()) for _ in range(1000)]
        assert 0.93 <= np.mean([each.low <= truth <= each.high for each in found]) <= 0.97


def test_mcnemar() -> None:
    first = [1] * 2 + [0] * 10 + [1] * 30
    second = [0] * 2 + [1] * 10 + [1] * 30
    found = compare(first, second)
    # 2 P(X <= 2) for 12 flips of a coin
    assert (found.method, found.p_value) == ("mcnemar", 2 * (1 + 12 + 66) / 4096)
    assert found.difference == pytest.approx(8 / 42)
    assert found.low < 8 / 42 < found.high
    assert compare(first, first).p_value == 1


def test_sign_flips() -> None:
    first = np.array([0.5, 0.25, 0.1, 0.4, 0.3])
    differences = np.array([0.25, 0.5, -0.05, 0.1, 0.2])
    found = compare(first, first + differences)
    sums = [
        abs(sum(sign * x for sign, x in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=5)
    ]
    assert found.method == "sign-flip"
    assert found.p_value == sum(x >= differences.sum() - 1e-9 for x in sums) / 32
    # Many pairs: random flips, the same for the same seed, near the normal approximation.
    random = np.random.default_rng(1)
    first = random.random(200)
    second = np.clip(first + random.normal(0.02, 0.1, 200), 0, 1)
    z = (second - first).sum() / math.sqrt(((second - first) ** 2).sum())
    found = compare(first, second, seed=3)
    assert found == compare(first, second, seed=3)
    assert found.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.01)


def test_bad_scores_are_named() -> None:
    with pytest.raises(ValueError, match=r"scores must be a list.*shape \(0,\)"):
        interval([])
    with pytest.raises(ValueError, match=r"from 0 to 1. Got: 0.0 to 2.0"):
        interval([0, 2])
    with pytest.raises(ValueError, match="Got: 1 and 2 scores"):
        compare([1], [1, 0])


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_the_interval_of_equal_scores_holds_their_mean(score):
    for count in range(1, 1001):
        found = interval([score] * count)
        assert 0 <= found.low <= found.mean <= found.high <= 1
