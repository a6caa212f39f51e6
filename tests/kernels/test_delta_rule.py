"""The delta rule op: every implementation against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax.experimental.pallas import tpu as pltpu

from refine_jax.kernels import tpu
from refine_jax.kernels.delta_rule import (
    IMPLEMENTATIONS,
    delta_rule,
    delta_step,
)
from refine_jax.kernels.delta_rule.specs import TEST_SPECS
from refine_jax.kernels.delta_rule.xla import invert_unit_lower

# Relative RMS error of values and of gradients.
TOLERANCES = {"float32": (1e-5, 1e-5), "bfloat16": (0.006, 0.008)}
# Every path of the code once; the other specs differ in shapes.
BFLOAT16 = ("ungated_55", "negative_eigenvalues", "gated", "value_groups")
# What these options change is not in the kernels, or another spec has it; test_pallas_gpu.py has a
# long chunk. Interpreted kernels take long to compile.
NOT_ON_GPU = ("initial_state", "negative_eigenvalues", "long_chunk")
NOT_IN_BFLOAT16_ON_GPU = (*NOT_ON_GPU, "ungated_55", "value_groups")


def is_tested(implementation, spec, dtype):
    if implementation == "pallas_gpu":
        left_out = NOT_ON_GPU if dtype == "float32" else NOT_IN_BFLOAT16_ON_GPU
        if spec.name in left_out:
            return False
    return dtype == "float32" or spec.name in BFLOAT16


def relative_rms(got, want):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.sqrt(np.mean((got - want) ** 2) / max(np.mean(want**2), 1e-30))


@functools.partial(jax.jit, static_argnames=("implementation", "options"))
def values_and_gradients(arrays, weights, implementation, options):
    """Outputs, and gradients of a random weighted sum of all of them."""
    fixed = {name: x for name, x in arrays.items() if name == "document"}
    moving = {name: x for name, x in arrays.items() if name != "document"}

    def loss(moving):
        outs = delta_rule(**moving, **fixed, **dict(options), implementation=implementation)
        outs = [x.astype(jnp.float32) for x in outs if x is not None]
        return sum(jnp.vdot(x, w) for x, w in zip(outs, weights, strict=False)), outs

    gradients, outs = jax.grad(loss, has_aux=True)(moving)
    return outs, gradients


@pytest.mark.parametrize(
    ("implementation", "spec", "dtype"),
    [
        pytest.param(implementation, spec, dtype, id=f"{implementation}-{spec.name}-{dtype}")
        for implementation in sorted(set(IMPLEMENTATIONS) - {"reference"})
        for spec in TEST_SPECS
        for dtype in ("float32", "bfloat16")
        if is_tested(implementation, spec, dtype)
    ],
)
def test_implementation_equals_reference(implementation, spec, dtype):
    arrays, options = spec.arguments(dtype)
    options = tuple(sorted(options.items()))
    exact = {name: x if name == "document" else x.astype(jnp.float32) for name, x in arrays.items()}
    call = functools.partial(delta_rule, **exact, **dict(options), implementation="reference")
    shapes = [x.shape for x in jax.eval_shape(call) if x is not None]
    keys = jax.random.split(jax.random.key(1), len(shapes))
    weights = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]

    want, want_gradients = values_and_gradients(exact, weights, "reference", options)
    got, gradients = values_and_gradients(arrays, weights, implementation, options)
    value_tolerance, gradient_tolerance = TOLERANCES[dtype]
    assert len(got) == len(want) == (2 if spec.save_every is None else 3)
    for x, y in zip(got, want, strict=True):
        assert relative_rms(x, y) < value_tolerance
    for name, gradient in want_gradients.items():
        assert gradients[name].dtype == arrays[name].dtype
        assert relative_rms(gradients[name], gradient) < gradient_tolerance, name


@pytest.mark.parametrize("name", ["gated", "ungated_17"])
def test_steps_equal_the_sequence(name):
    spec = next(spec for spec in TEST_SPECS if spec.name == name)
    arrays, options = spec.arguments()
    want, final, _ = delta_rule(**arrays, **options, implementation="reference")
    state = arrays.pop("initial_state", jnp.zeros_like(final))
    step = jax.jit(delta_step)
    for t in range(spec.tokens):
        out, state = step(**{key: x[:, t] for key, x in arrays.items()}, state=state)
        np.testing.assert_allclose(out, want[:, t], atol=1e-5)
    np.testing.assert_allclose(state, final, atol=1e-5)


def test_state_alone():
    spec = next(spec for spec in TEST_SPECS if spec.name == "value_groups")
    arrays, options = spec.arguments()
    _, want, _ = delta_rule(**arrays, **options, implementation="reference")
    for implementation in IMPLEMENTATIONS:
        call = functools.partial(delta_rule, **options, implementation=implementation)
        out, final, _ = jax.jit(call)(**arrays | {"q": None})
        assert out is None
        np.testing.assert_allclose(final, want, atol=1e-5)


def test_tpu_kernels_have_no_races(monkeypatch):
    """Scratch starts as NaN, copies finish as late as they may, and nothing is read too early."""
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    monkeypatch.setattr(tpu, "interpret_mode", lambda: params)
    spec = dataclasses.replace(TEST_SPECS[0], name="races", tokens=40, save_every=16, batch=1)
    arrays, options = spec.arguments()
    options = tuple(sorted(options.items()))
    weights = [jnp.ones(x.shape) for x in delta_rule(**arrays, **dict(options))]
    got, gradients = values_and_gradients(arrays, weights, "pallas_tpu", options)
    want, want_gradients = values_and_gradients(arrays, weights, "reference", options)
    jax.block_until_ready(gradients)
    assert not tpu_interpreter.races.races_found
    for x, y in zip(got, want, strict=True):
        assert relative_rms(x, y) < 1e-5
    for name, gradient in want_gradients.items():
        assert relative_rms(gradients[name], gradient) < 1e-5, name


@pytest.mark.parametrize("size", [1, 2, 8, 32, 128])
def test_inverse_of_nearly_singular_systems(size):
    # Equal keys and beta near 2: entries of `a` near 2, whose powers overflow float32 at this size.
    noise = np.random.default_rng(0).standard_normal((3, size, size))
    a = np.tril(1.95 + 0.02 * noise, -1)
    got = np.asarray(invert_unit_lower(jnp.asarray(a, jnp.float32)), np.float64)
    want = np.linalg.inv(np.eye(size) + a)
    assert relative_rms(got, want) < 1e-5


def test_errors_name_what_was_got():
    arrays, _ = TEST_SPECS[0].arguments()
    with pytest.raises(ValueError, match=r"chunks of at least 16 tokens.*chunk_size=8"):
        delta_rule(**arrays, implementation="pallas_tpu", chunk_size=8)
    with pytest.raises(ValueError, match="implementation='fast'"):
        delta_rule(**arrays, implementation="fast")
    with pytest.raises(ValueError, match=r"beta must have shape .* Got: \(2, 1\)"):
        delta_rule(**arrays | {"beta": arrays["beta"][..., 0]})
    with pytest.raises(ValueError, match="multiple of H"):
        delta_rule(**arrays | {"v": arrays["v"][:, :, :1]})
    with pytest.raises(ValueError, match=r"power of two.*48"):
        delta_rule(**arrays, chunk_size=48)
    with pytest.raises(ValueError, match="save_every=40"):
        delta_rule(**arrays, chunk_size=16, save_every=40)
