"""The LaCT op: every implementation against the specification and its own laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from refine_jax.kernels import lact as ops
from refine_jax.kernels import tpu
from refine_jax.kernels.device import compiled_for
from refine_jax.kernels.lact import tuning
from refine_jax.kernels.lact.specs import TEST_SPECS, LaCTSpec

pytestmark = pytest.mark.usefixtures("simulated_tpu")
IMPLEMENTATIONS = [name for name in ops.IMPLEMENTATIONS if name != "reference"]
SPECS = {spec.name: spec for spec in TEST_SPECS}
NOT_ON_GPU = ("reset", "prenorm", "muon", "fused", "fused_muon")


def relative_rms(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.sqrt(np.mean((a - b) ** 2) / max(np.mean(b**2), 1e-30))


def assert_close(got, expected, tolerance):
    """Every leaf within `tolerance` relative RMS."""
    flat, tree = jax.tree_util.tree_flatten_with_path(expected)
    assert jax.tree.structure(got) == tree
    for (path, b), a in zip(flat, jax.tree.leaves(got), strict=True):
        error = relative_rms(a, b)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2e} > {tolerance:.0e}"


def value_and_gradients(arguments, keywords, implementation):
    """Output, trace and the gradients of a fixed random weighting of both."""
    mask = keywords.get("mask")

    def run(arguments):
        out, trace = ops.lact(*arguments, **keywords, implementation=implementation)
        if mask is not None:  # the output of masked slots is undefined
            out = jnp.where(mask[:, :, None, :, None], out, 0)
        return out, trace

    @jax.jit
    def both(cotangents, arguments):
        primal, pullback = jax.vjp(run, arguments)
        return primal, pullback(cotangents)

    rng = np.random.default_rng(1)
    cotangents = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), jax.eval_shape(run, arguments)
    )
    return both(cotangents, arguments)


@functools.cache
def specified(spec, dtype="float32"):
    """What the specification makes of a spec's arguments, of `dtype` but computed in float32."""
    arguments, keywords = spec.arguments(dtype)
    exact = tuple(x.astype(jnp.float32) for x in arguments[:3])
    return jax.device_get(value_and_gradients((*exact, *arguments[3:]), keywords, "reference"))


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        (name, implementation)
        for implementation in IMPLEMENTATIONS
        for name in SPECS
        if implementation != "pallas_gpu" or name not in NOT_ON_GPU
    ],
)
def test_matches_the_specification(name, implementation):
    got = value_and_gradients(*SPECS[name].arguments(), implementation)
    # Newton-Schulz amplifies rounding.
    assert_close(got, specified(SPECS[name]), 1e-4 if SPECS[name].options.muon else 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_operands(implementation):
    heads = 1 if implementation == "pallas_tpu" else 2
    spec = LaCTSpec("", 4, 1, heads, chunk=32, dim=16, hidden=16)
    expected = specified(spec, "bfloat16")
    got = value_and_gradients(*spec.arguments("bfloat16"), implementation)
    (out, trace), gradients = got
    assert out.dtype == gradients[0][0].dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(trace)} == {jnp.dtype("float32")}
    assert_close(got[0], expected[0], 0.006)
    assert_close(got[1], expected[1], 0.008)


@pytest.mark.parametrize("tile", [256, 128])
def test_blocks_of_tokens_and_little_memory(monkeypatch, tile):
    """Several blocks a chunk, weights fetched late and by few rows: as with room, and no race.

    With all hidden features at a time, and in a loop over two tiles of them.
    """
    blocks = {256: ((128, 128, tile, False),)}
    monkeypatch.setattr(tuning, "_FLOAT32", blocks)
    monkeypatch.setattr(tuning, "_FEW_SLOTS", 2)
    params = pltpu.InterpretParams(detect_races=True)
    monkeypatch.setattr(tpu, "interpret_mode", lambda: params)
    spec = LaCTSpec("", 3, heads=1, chunk=200, dim=6, hidden=130, masked=True)
    got = value_and_gradients(*spec.arguments(), "pallas_tpu")
    assert_close(got, specified(spec), 1e-5)
    races = interpret_pallas_call.races
    assert races is None or not races.races_found


def test_tiles_of_the_hidden_axis(monkeypatch):
    """Weights that vector memory has no room for: a tile of them at a time."""
    monkeypatch.setattr(tuning, "vmem_bytes", lambda: 1 << 20)
    arguments, keywords = LaCTSpec("", 2, heads=1, hidden=130, masked=True).arguments()
    expected = value_and_gradients(arguments, keywords, "reference")
    got = value_and_gradients(arguments, keywords, "pallas_tpu")
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS)
def test_tokens_do_not_depend_on_the_slots_behind_them(implementation):
    """T in {1, C-1, C, C+1, 3C+3}: whatever stands in masked slots, the tokens read the same."""
    arguments, _ = LaCTSpec("", 5, heads=1).arguments()
    run = jax.jit(functools.partial(ops.lact, implementation=implementation))
    expected, _ = run(*arguments, mask=jnp.ones((1, 5, 4), bool))
    for length in (1, 3, 4, 5, 15):
        mask = (np.arange(20) < length).reshape(5, 4)

        def spoil(x, mask=mask):
            inside = mask[:, None, :].reshape(5, 1, 4, *[1] * (x.ndim - 4))
            return jnp.asarray(np.where(inside, x, np.float32(7)))

        spoiled = jax.tree.map(spoil, arguments[:5])
        out, _ = run(*spoiled, arguments[5], mask=jnp.asarray(mask[None]))
        for got, want in zip(
            *(np.swapaxes(x, 2, 3)[:, mask] for x in (out, expected)), strict=True
        ):
            np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    ("implementation", "options"),
    [("xla", ops.Options(muon="float32")), ("pallas_tpu", ops.Options())],
)
def test_zero_weights_and_keys_have_finite_gradients(implementation, options):
    (q, k, v, rates, momentum, weights), keywords = LaCTSpec(
        "", heads=1, options=options
    ).arguments()
    zeros = ops.Weights(*map(jnp.zeros_like, weights))
    arguments = q, 0 * k, v, rates, momentum, zeros
    _, gradients = value_and_gradients(arguments, keywords, implementation)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("sizes", "best"),
    [
        ({"chunk": 128, "dim": 128, "hidden": 256}, "pallas_tpu"),
        ({"chunk": 64, "dim": 128, "hidden": 256}, "xla"),
        ({"chunk": 128, "dim": 128, "hidden": 192}, "xla"),
        ({"chunk": 128, "dim": 96, "hidden": 256}, "xla"),
    ],
)
def test_kernels_are_chosen_on_tpus_where_nothing_is_padded(monkeypatch, sizes, best):
    arguments, _ = LaCTSpec("", heads=1, **sizes).arguments()
    for name in ops.IMPLEMENTATIONS:
        monkeypatch.setitem(ops.IMPLEMENTATIONS, name, lambda *_, name=name, **__: name)
    assert ops.lact(*arguments) == "xla"
    with compiled_for("tpu"):
        assert ops.lact(*arguments) == best


def test_bad_arguments_are_named():
    arguments, _ = LaCTSpec("", batch=2).arguments()
    q, k, v, rates, momentum, weights = arguments
    for name in ("pallas", "cuda"):
        with pytest.raises(ValueError, match=name):
            ops.lact(*arguments, implementation=name)
    with pytest.raises(ValueError, match=r"^v must be \[2, 3, 2, 4, 6\]. Got: \[2, 2, 2, 4, 6\]"):
        ops.lact(q, k, v[:, :2], rates, momentum, weights)
    with pytest.raises(ValueError, match="w1 must be"):
        ops.lact(q, k, v, rates, momentum, weights._replace(w1=weights.w1[..., :3, :]))
    with pytest.raises(ValueError, match="E=2"):
        ops.lact(q, k, v, jnp.concatenate([rates, rates], -1), momentum, weights)
    with pytest.raises(ValueError, match="muon must be"):
        ops.Options(muon="bf16")
