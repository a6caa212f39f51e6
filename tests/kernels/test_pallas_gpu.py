"""GPU kernels without a GPU: their lowering, what they refuse, and sizes of more than one block."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from refine_jax.kernels.delta_rule import delta_rule, specs
from refine_jax.kernels.device import compiled_for
from refine_jax.kernels.lact import Weights, lact
from tests.kernels import test_delta_rule, test_lact


def gradients_of(function, *arrays):
    """Outputs and gradients of everything, as a function of arrays and cotangents."""

    def run(arrays, cotangents):
        outs, pullback = jax.vjp(function, *arrays)
        return outs, pullback(cotangents)

    return run, arrays, jax.eval_shape(function, *arrays)


def kernels_of(function, *arguments):
    """Number of Triton kernels in the program for a GPU of `function`."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("custom_call @__gpu$xla.gpu.triton")


@pytest.fixture
def gpu():
    """Kernels are lowered for this device, not interpreted."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
    mesh = AbstractMesh((), (), abstract_device=device)
    with compiled_for("gpu"), jax.sharding.use_abstract_mesh(mesh):
        yield


@pytest.mark.parametrize(
    ("key_dim", "value_dim", "dtype"),
    [(128, 256, "bfloat16"), (256, 64, "float32")],
)
def test_delta_rule_lowers_for_cuda(gpu, key_dim, value_dim, dtype):
    spec = specs.DeltaSpec(
        "gpu",
        tokens=300,
        batch=1,
        value_heads=4,
        key_dim=key_dim,
        value_dim=value_dim,
        chunk_size=64,
        gated=True,
        initial_state=True,
        documents=3,
        save_every=128,
    )
    arrays, options = spec.arguments(dtype)
    document = arrays.pop("document")

    def run(arrays):
        return delta_rule(**arrays, document=document, **options, implementation="pallas_gpu")

    assert kernels_of(*gradients_of(run, arrays)) == 6
    # A state alone needs no output.
    assert kernels_of(run, arrays | {"q": None}) == 2


@pytest.mark.parametrize(("channels", "dtype"), [(1, "bfloat16"), (384, "float32")])
def test_lact_lowers_for_cuda(gpu, channels, dtype):
    shape = jax.ShapeDtypeStruct
    tokens = shape((1, 3, 2, 256, 384), dtype)
    rates = shape((1, 3, 2, 256, 3, channels), jnp.float32)
    weights = Weights(*(shape((2, 384, 384), jnp.float32),) * 3)
    run = functools.partial(lact, implementation="pallas_gpu")
    arrays = (tokens, tokens, tokens, rates, shape((1, 3, 2, 256), jnp.float32), weights)
    assert kernels_of(*gradients_of(run, *arrays)) == 4


def test_delta_rule_of_several_blocks():
    spec = specs.DeltaSpec(
        "blocks",
        tokens=70,
        batch=1,
        heads=1,
        key_dim=96,
        value_dim=80,
        chunk_size=64,
        gated=True,
        documents=2,
        initial_state=True,
        save_every=64,
    )
    test_delta_rule.test_implementation_equals_reference("pallas_gpu", spec, "float32")


def test_lact_of_several_blocks(monkeypatch):
    spec = test_lact.LaCTSpec(
        "blocks", chunks=2, batch=1, chunk=70, dim=80, hidden=130, masked=True
    )
    monkeypatch.setitem(test_lact.SPECS, "blocks", spec)
    test_lact.test_matches_the_specification("blocks", "pallas_gpu")


def test_unsupported_arguments_are_named():
    arrays, _ = specs.TEST_SPECS[1].arguments()
    call = functools.partial(delta_rule, implementation="pallas_gpu")
    wide = jnp.zeros((*arrays["k"].shape[:3], 320))
    with pytest.raises(ValueError, match=r"more than 256 numbers.*xla.*320"):
        call(**arrays | {"q": wide, "k": wide})
    with pytest.raises(ValueError, match=r"float32 or bfloat16. Got: float16"):
        call(**arrays | {"v": arrays["v"].astype(jnp.float16)})
    with pytest.raises(ValueError, match=r"multiple of 16. Got: save_every=8"):
        call(**arrays, chunk_size=8, save_every=8)
    (q, *rest), _ = test_lact.SPECS["one_chunk"].arguments()
    with pytest.raises(ValueError, match=r"float32 or bfloat16. Got: float16"):
        lact(q.astype(jnp.float16), *rest, implementation="pallas_gpu")
