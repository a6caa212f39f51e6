"""The decode step of the delta rule, in every implementation, against the sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_jax.kernels.delta_rule import delta_rule, delta_step, pallas_tpu_step
from refine_jax.kernels.delta_rule.api import STEP_IMPLEMENTATIONS
from refine_jax.kernels.delta_rule.specs import DeltaSpec

pytestmark = pytest.mark.usefixtures("simulated_tpu")


@pytest.mark.parametrize(
    ("name", "gated"), [("xla", True), ("pallas_tpu", True), ("pallas_tpu", False)]
)
def test_steps_and_gradients_equal_the_sequence(name, gated, monkeypatch):
    # The TPU kernel takes 8 states at a time then: 12 states are padded to two blocks.
    monkeypatch.setattr(pallas_tpu_step, "_STATE_BYTES", 0)
    spec = DeltaSpec("", 2 if gated else 1, batch=3, value_heads=4, gated=gated, initial_state=True)
    arrays, options = spec.arguments()
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=arrays["v"].shape), jnp.float32)

    def steps(arrays):
        arrays = dict(arrays)
        state, outs = arrays.pop("initial_state"), []
        for t in range(spec.tokens):
            token = {key: x[:, t] for key, x in arrays.items()}
            out, state = delta_step(**token, state=state, implementation=name)
            outs.append(out)
        return jnp.stack(outs, axis=1), state

    def sequence(arrays):
        return delta_rule(**arrays, **options, implementation="reference")[:2]

    def both(function):
        out, pullback = jax.vjp(function, arrays)
        return out, pullback((cotangent, 0.1 * out[1]))

    got, want = (jax.tree.leaves(jax.jit(both, static_argnums=0)(f)) for f in (steps, sequence))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def test_bfloat16_tokens_keep_a_float32_state():
    arrays, _ = DeltaSpec("", 1, batch=1, initial_state=True).arguments("bfloat16")
    state = arrays.pop("initial_state")
    token = {key: x[:, 0] for key, x in arrays.items()}
    exact = {key: x.astype(jnp.float32) for key, x in token.items()}
    want, want_state = delta_step(**exact, state=state, implementation="xla")
    for name in STEP_IMPLEMENTATIONS:
        out, new = delta_step(**token, state=state, implementation=name)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(out, np.float32), want, rtol=0.005)
        np.testing.assert_allclose(new, want_state, atol=1e-5)


def test_an_unknown_name_raises():
    arrays, _ = DeltaSpec("", 1, initial_state=True).arguments()
    state = arrays.pop("initial_state")
    token = {key: x[:, 0] for key, x in arrays.items()}
    with pytest.raises(ValueError, match=r"implementation of delta_step .*Got: .*'reference'"):
        delta_step(**token, state=state, implementation="reference")
