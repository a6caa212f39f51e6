"""Scans over layers of several kinds: in the order of the layers, in programs of few parts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_jax.models.pattern import Pattern, Segment, segments_of

PATTERNS = {
    "period": "LLLF" * 3,
    "rest": "LLLF" * 2 + "LL",
    "first": "F" + "LLF" * 3,
    "irregular": "LFLLFFL",
    "linear": "LLLLL",
    "full": "F",
    "three": "LGFLGFLG",
}


@pytest.mark.parametrize(
    ("kinds", "want"),
    [
        ("LLLF" * 6, [("LLLF", 6)]),
        ("LLLLL", [("L", 5)]),
        ("LFLLF", [("L", 1), ("F", 1), ("L", 2), ("F", 1)]),
        ("FLLFLLFLL", [("FLL", 3)]),
        ("LLLF" * 2 + "LL", [("LLLF", 2), ("L", 2)]),
        ("F", [("F", 1)]),
    ],
)
def test_segments(kinds, want):
    assert segments_of(kinds) == tuple(Segment(tuple(unit), n) for unit, n in want)


@pytest.mark.parametrize("name", PATTERNS)
def test_any_pattern_is_cut_into_all_of_its_layers(name):
    found = itertools.chain(*(s.unit * s.repeats for s in segments_of(PATTERNS[name])))
    assert "".join(found) == PATTERNS[name]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_scan_is_a_loop_over_the_layers(name, reverse):
    """Each layer is another function of a carry that tells their order."""
    kinds = PATTERNS[name]
    pattern = Pattern(tuple(kinds))
    values = np.random.default_rng(0).standard_normal(len(kinds)).astype(np.float32)

    def layer(kind, carry, x):
        carry = {"L": 0.5 * carry + x, "F": carry * x - 1, "G": carry - x}[kind]
        return carry, (x, carry)

    carry, want = 1.0, np.zeros(len(kinds), np.float32)
    for index in range(len(kinds))[:: -1 if reverse else 1]:
        carry, (_, want[index]) = layer(kinds[index], carry, values[index])
    xs = pattern.by_kind(jnp.asarray(values))
    got, ys = jax.jit(lambda xs: pattern.scan(layer, 1.0, xs, reverse=reverse))(xs)
    taken, outputs = pattern.unzip(ys, 2)
    np.testing.assert_allclose(got, carry, rtol=1e-5)
    np.testing.assert_allclose(pattern.in_order(outputs), want, rtol=1e-5)
    np.testing.assert_array_equal(pattern.in_order(taken), values)


def test_layers_of_one_kind_have_no_name():
    pattern = Pattern(None)
    xs = jnp.arange(3.0)
    assert pattern.by_kind(xs) is xs and pattern.in_order(xs) is xs
    carry, ys = pattern.scan(lambda kind, carry, x: (carry + x, kind), 0.0, xs)
    assert carry == 3 and ys is None
