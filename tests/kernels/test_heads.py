"""Moves of heads between layouts: their definition, the TPU's kernels, and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_jax.kernels import heads
from refine_jax.kernels.heads import pallas_tpu

pytestmark = pytest.mark.usefixtures("simulated_tpu")


def draw(*shape, dtype=jnp.float32, seed=0):
    """Small integers: sums of their products are exact."""
    numbers = np.random.default_rng(seed).integers(-8, 9, size=shape)
    return jnp.asarray(numbers, dtype)


def per_token(x):
    """[B, G, T, L] -> [B, T, D], as a linear map gives it."""
    return np.moveaxis(np.asarray(x, np.float32), 1, 2).reshape(x.shape[0], x.shape[2], -1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("count", "tokens"), [(2, 384), (4, 128), (1, 256)])
def test_heads_alone_and_together(count, tokens, dtype):
    x = draw(2, 3, tokens, 128, dtype=dtype)
    expected = np.zeros((2, 3, count, tokens, 128), np.float32)
    width = 128 // count
    for i in range(count):
        part = slice(i * width, (i + 1) * width)
        expected[:, :, i, :, part] = np.asarray(x, np.float32)[..., part]
    expected = expected.reshape(2, 3 * count, tokens, 128)
    for alone, together in (
        (heads.alone, heads.together),
        (pallas_tpu.alone, pallas_tpu.together),
    ):
        apart = alone(x, count)
        np.testing.assert_array_equal(np.asarray(apart, np.float32), expected)
        # What stands beside a head is not looked at.
        beside = jnp.where(apart == 0, 7, apart)
        np.testing.assert_array_equal(
            np.asarray(together(beside, count), np.float32),
            np.where(np.asarray(x) == 0, 7, np.asarray(x, np.float32)),
        )


@pytest.mark.parametrize(("before", "groups"), [(6, 2), (4, 4), (3, 1)])
def test_chunks(before, groups):
    rows, num_chunks, chunk = 2, 3, 256
    x = draw(rows, before, num_chunks * chunk, 128)
    flat = per_token(x).reshape(rows, num_chunks, chunk, groups, -1)
    expected = np.moveaxis(flat, 3, 2)
    for to_chunks, from_chunks in (
        (heads.to_chunks, heads.from_chunks),
        (pallas_tpu.to_chunks, pallas_tpu.from_chunks),
    ):
        np.testing.assert_array_equal(to_chunks(x, groups, chunk), expected)
        np.testing.assert_array_equal(from_chunks(jnp.asarray(expected), before), x)


@pytest.mark.parametrize(("before", "groups"), [(6, 4), (2, 6), (3, 2)])
def test_regrouping_keeps_the_numbers_of_a_token(before, groups):
    x = draw(2, before, 5, 12 // before)
    np.testing.assert_array_equal(per_token(heads.regroup(x, groups)), per_token(x))


@pytest.mark.parametrize(
    "move",
    [
        lambda x: heads.alone(x, 2),
        lambda x: heads.together(x, 3),
        lambda x: heads.to_chunks(x, 2, 8),
        lambda x: heads.from_chunks(x.reshape(2, 2, 3, 12, 6), 2),
    ],
    ids=["alone", "together", "to_chunks", "from_chunks"],
)
def test_derivatives_are_transposes(move):
    """<move(x), y> = <x, y pulled back>, exactly."""
    x = draw(2, 3, 24, 6)
    out, pullback = jax.vjp(move, x)
    y = draw(*out.shape, seed=1)
    assert jnp.sum(out * y) == jnp.sum(x * pullback(y)[0]) != 0
