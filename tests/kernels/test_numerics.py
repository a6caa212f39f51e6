"""What the models' norms and sums stand on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_jax.kernels.device import compiled_for
from refine_jax.kernels.numerics import by_rows, drop_unit_axes, safe_norm
from refine_jax.models import layers
from refine_jax.models.layers import rms_norm


@pytest.mark.parametrize(
    ("shape", "keep", "expected"),
    [
        ((1, 5, 3), 2, (5, 3)),
        ((1, 1, 5, 3), 2, (5, 3)),
        ((1, 2, 1, 5, 3), 2, (2, 1, 5, 3)),
        ((2, 1, 5, 3), 2, (2, 1, 5, 3)),
        ((1, 1, 3), 2, (1, 3)),
        ((1, 3), 1, (3,)),
        ((3,), 2, (3,)),
    ],
)
def test_only_leading_unit_axes_go(shape, keep, expected):
    x = jnp.arange(float(np.prod(shape))).reshape(shape)
    dropped = drop_unit_axes(x, keep)
    assert dropped.shape == expected
    np.testing.assert_array_equal(dropped.ravel(), x.ravel())


@pytest.mark.parametrize("shape", [(3,), (1, 3), (1, 4, 3), (1, 1, 4, 3), (2, 1, 4, 3)])
def test_by_rows_is_the_function_itself(shape):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal(shape, dtype=np.float32)) for _ in range(2))

    def direct(x, y):
        return jnp.sum(x * y, axis=-1, keepdims=True)

    out = by_rows(direct, x, y)
    assert out.shape == (*shape[:-1], 1)
    np.testing.assert_allclose(out, np.sum(np.asarray(x) * y, -1, keepdims=True), rtol=1e-6)
    gradient = jax.grad(lambda x: by_rows(direct, x, y).sum())(x)
    np.testing.assert_allclose(gradient, y, rtol=1e-6)


def test_rms_norm_against_numpy():
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((1, 4, 6)), rng.standard_normal(6)
    expected = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * weight
    got = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), 1e-5)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)


def test_the_norm_of_zero_has_gradient_zero():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(safe_norm(x), [[0.0], [5.0]])
    np.testing.assert_allclose(
        jax.grad(lambda x: safe_norm(x).sum())(x), [[0.0, 0.0], [0.6, 0.8]], rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rope_by_a_product_turns_the_same_numbers(dtype):
    """The form for TPUs moves numbers exactly; of several heads side by side, each by itself."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3 * 8)), dtype)
    expected = layers._turned(x, 8)
    heads = np.asarray(x, np.float32).reshape(2, 5, 3, 2, 4)
    turned = np.stack([-heads[..., 1, :], heads[..., 0, :]], axis=-2).reshape(x.shape)
    np.testing.assert_array_equal(expected, turned)
    with compiled_for("tpu"):
        np.testing.assert_array_equal(layers._turned(x, 8), turned)
