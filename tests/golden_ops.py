"""The golden `ops`: collected by test_golden.py; those of whole ops live beside the ops' tests."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from goldens import load_arrays
from refine_jax.kernels.numerics import l2_norm_fla
from test_attention import test_golden_windows  # noqa: F401
from test_delta_rule import test_golden as test_golden_delta_rule  # noqa: F401
from test_lact_op import test_golden_newton_schulz, test_golden_op  # noqa: F401

from refine_jax.models.deltanet import ShortConv
from refine_jax.models.layers import l2_norm_lact, rms_norm, rope


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_golden_norms():
    arrays = {name: jnp.asarray(x) for name, x in load_arrays("ops", "norms.npz").items()}
    x, weight, gate = arrays["x"], arrays["weight"], arrays["gate"]
    close(l2_norm_lact(x), arrays["l2_lact"])
    close(l2_norm_fla(x), arrays["l2_delta"])
    close(rms_norm(x, weight, 1e-5), arrays["rms_eps1e5"])
    gated = rms_norm(x, weight, 1e-6) * gate / (1 + jnp.exp(-gate))
    close(gated, arrays["rms_gated_eps1e6"])


def test_golden_rope():
    arrays = load_arrays("ops", "attention_rope_conv.npz")
    positions = jnp.arange(arrays["q"].shape[1])[None]
    for name, x, shift in (("q", "q", 0), ("k", "k", 0), ("q_offset5", "q", 5)):
        got = rope(jnp.asarray(arrays[x]), positions + shift, 10000.0)
        close(got, arrays[f"rope_{name}"])


def test_golden_convolution():
    arrays = load_arrays("ops", "attention_rope_conv.npz")
    x, weight = jnp.asarray(arrays["conv/x"]), arrays["conv/weight"]
    convolution = ShortConv(weight.shape[0], weight.shape[-1], rngs=nnx.Rngs(0))
    convolution.weight = nnx.Param(jnp.asarray(weight))
    before = ((0, 0), (weight.shape[-1] - 1, 0), (0, 0))
    got = convolution(jnp.pad(x, before))
    close(got, arrays["conv/out"])
    close(got / (1 + jnp.exp(-got)), arrays["conv/out_silu"])
