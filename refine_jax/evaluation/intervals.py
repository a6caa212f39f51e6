"""How sure a mean score is, and whether two models differ.

Means of 0/1 scores (needles found, exact answers) get Wilson's interval: unlike p +- 2 sd it is
right for few samples and for scores near 0 and 1, which is where needle recall lies. Means of
fractional scores (F1, ROUGE) get Student's: they are means of many bounded, independent values, and
resampling them would say nearly the same with random numbers in it.

Two models are compared on the same samples, by their differences: most of the spread of a score
comes from some samples being harder, and cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
# So many differences other than 0 are flipped in all ways; of more, so many random flips are taken.
_EXACT_UP_TO = 14
_RANDOM_FLIPS = 20_000


@dataclass(frozen=True)
class Interval:
    """The mean of `samples` scores, its confidence interval, and the method: "wilson" or "t"."""

    mean: float
    low: float
    high: float
    samples: int
    method: str


@dataclass(frozen=True)
class Comparison:
    """The difference of two models on the same samples.

    difference: mean score of the second minus that of the first. low, high: bounds of its interval
    (Student's, of the paired differences). p_value: how often a difference at least as large arises
    if neither model is better. samples: how many pairs. method: "mcnemar" (0/1 scores, exact) or
    "sign-flip" (permutation of the pairs' signs).
    """

    difference: float
    low: float
    high: float
    p_value: float
    samples: int
    method: str


def interval(scores: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the mean of scores from 0 to 1 and its confidence interval.

    Raises ValueError: there are no scores, or one is not from 0 to 1.
    """
    values = _checked(scores)
    count, mean = len(values), float(values.mean())
    if _is_binary(values):
        test = stats.binomtest(int(values.sum()), count)
        low, high = map(float, test.proportion_ci(level, method="wilson"))
        return Interval(mean, low, high, count, "wilson")
    low, high = _student(values, level)
    return Interval(mean, max(0.0, low), min(1.0, high), count, "t")


def compare(
    first: Sequence[float], second: Sequence[float], *, level: float = LEVEL, seed: int = 0
) -> Comparison:
    """Return whether the second model's scores differ from the first's.

    first: scores from 0 to 1, of the same samples in the same order as `second`.
    second: scores of the other model.
    level: of the interval.
    seed: of the random flips, which are taken where there are too many for all.

    Raises ValueError: there are no scores, one is not from 0 to 1, or their numbers differ.
    """
    one, two = _checked(first), _checked(second)
    if len(one) != len(two):
        raise ValueError(f"both need the same samples. Got: {len(one)} and {len(two)} scores.")
    differences = two - one
    low, high = _student(differences, level)
    if _is_binary(one) and _is_binary(two):
        p_value, method = _mcnemar(differences), "mcnemar"
    else:
        p_value, method = _sign_flip(differences, seed), "sign-flip"
    return Comparison(
        difference=float(differences.mean()),
        low=max(-1.0, low),
        high=min(1.0, high),
        p_value=p_value,
        samples=len(one),
        method=method,
    )


def _checked(scores: Sequence[float]) -> np.ndarray:
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores must be a list of numbers. Got: shape {values.shape}.")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"scores must be from 0 to 1. Got: {values.min()} to {values.max()}.")
    return values


def _is_binary(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _student(values: np.ndarray, level: float) -> tuple[float, float]:
    """Return the interval of a mean; one value alone says nothing about it."""
    if len(values) == 1:
        return -math.inf, math.inf
    half = stats.sem(values) * stats.t.ppf((1 + level) / 2, len(values) - 1)
    return float(values.mean() - half), float(values.mean() + half)


def _mcnemar(differences: np.ndarray) -> float:
    """Return the exact two-sided probability of a split as uneven among the pairs that differ."""
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    pairs = better + worse
    return float(stats.binomtest(better, pairs).pvalue) if pairs else 1.0


def _sign_flip(differences: np.ndarray, seed: int) -> float:
    """Return how often a sum with random signs is as far from 0, by all flips or random ones."""
    values = differences[differences != 0]
    # Sums of equal terms in another order may differ in their last bits.
    observed = abs(values.sum()) - 1e-9
    if len(values) <= _EXACT_UP_TO:
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums - value, sums + value])
        return float((np.abs(sums) >= observed).mean())
    random = np.random.default_rng(seed)
    signs = random.integers(0, 2, (_RANDOM_FLIPS, len(values)), dtype=np.int8) * 2 - 1
    extreme = int((np.abs(signs @ values) >= observed).sum())
    return (1 + extreme) / (1 + _RANDOM_FLIPS)  # the observed signs are one of the flips
