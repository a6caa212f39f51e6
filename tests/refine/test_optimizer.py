"""The optimizer's schedule, clipping and weight decay. Golden AdamW steps: tests/goldens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refine_jax.config import OptimizerConfig
from refine_jax.refine.optimizer import clip_by_norm, make_optimizer, make_schedule


@pytest.mark.parametrize(
    ("schedule", "fraction", "expected"),
    [
        ("constant", 0.0, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", 0.0, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("linear", 0.2, [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", 0.0, [0.5, 1.0, 1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0]),
    ],
)
def test_schedules(schedule, fraction, expected):
    config = OptimizerConfig(
        learning_rate=2e-3, schedule=schedule, warmup_steps=2, final_fraction=fraction
    )
    rate = make_schedule(config, steps=7)
    np.testing.assert_allclose([rate(step) for step in range(7)], 2e-3 * np.array(expected), 1e-6)


def test_all_updates_of_a_step_have_its_learning_rate():
    """Adam's first moments cancel out: with one constant gradient an update is the rate."""
    config = OptimizerConfig(
        learning_rate=1.0, schedule="linear", weight_decay=0.0, clip_norm=None, eps=1e-12
    )
    optimizer = make_optimizer(config, steps=3, updates_per_step=2)
    params = {"w": jnp.zeros(3)}
    state, sizes = optimizer.init(params), []
    for _ in range(6):
        updates, state = optimizer.update({"w": jnp.ones(3)}, state, params)
        sizes.append(float(-updates["w"][0]))
    np.testing.assert_allclose(sizes, [1.0, 1.0, 0.5, 0.5, 0.0, 0.0], atol=1e-5)


def test_clipping_is_of_the_global_norm_with_torchs_small_term():
    gradients = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
    clipped, _ = clip_by_norm(0.2).update(gradients, optax.EmptyState())
    scale = 0.2 / (5.0 + 1e-6)
    np.testing.assert_allclose(clipped["a"], [3.0 * scale], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [[4.0 * scale]], rtol=1e-6)
    unchanged, _ = clip_by_norm(6.0).update(gradients, optax.EmptyState())
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), unchanged, gradients))


def test_weight_decay_is_decoupled_and_on_all_parameters():
    config = OptimizerConfig(learning_rate=0.5, weight_decay=0.1)
    optimizer = make_optimizer(config, steps=1)
    params = {"matrix": jnp.full((2, 2), 3.0), "norm": jnp.full((2,), 3.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -0.5 * 0.1 * 3.0, rtol=1e-6)


def test_first_moments_may_be_bfloat16():
    params, gradients = {"w": jnp.full(3, 2.0)}, {"w": jnp.array([0.1, -0.2, 0.3])}
    updates = {}
    for dtype in (None, "bfloat16"):
        config = OptimizerConfig(learning_rate=0.1, first_moment_dtype=dtype, clip_norm=None)
        optimizer = make_optimizer(config, steps=1)
        updates[dtype], state = optimizer.update(gradients, optimizer.init(params), params)
        moments = state[0]
        assert moments.mu["w"].dtype == jnp.dtype(dtype or "float32")
        assert moments.nu["w"].dtype == jnp.float32
    # bfloat16 has 8 bits of precision.
    np.testing.assert_allclose(updates["bfloat16"]["w"], updates[None]["w"], rtol=2**-8)
