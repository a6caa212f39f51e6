"""Forks in LaCT's gradient pass: equal to decode states that are made and extended."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from refine_jax.kernels.fork_reads import pallas_tpu
from refine_jax.models.config import LaCTConfig
from refine_jax.models.lact import LaCTMixer
from refine_jax.models.layout import Layout
from refine_jax.models.mixer import fork
from refine_jax.parallel import AXES
from tests.models.test_lact import TOKENS, VARIANTS, draw, make


def outputs(way, graph, params, x, forks, positions, segments):
    """Forward's y and the forks' [B, R, S, D], by a trace (in one of three layers) or a state."""
    layout = None if segments is None else Layout.from_segments(segments, max_documents=2)
    mixer = nnx.merge(graph, params)
    plan = LaCTMixer.plan(mixer.config, layout, x.shape[:2])
    known = None if way != "known" else positions
    y, trace = mixer.forward(x, layout, plan, known)
    if layout is not None:
        y = jnp.where(layout.mask[..., None], y, 0)
    if way in ("traced", "known"):
        return y, mixer.extend_traced(forks, trace, positions, layout, plan)
    if way == "in place":
        layers = jax.tree.map(lambda leaf: jnp.stack([leaf + 1, leaf, leaf - 1]), trace)
        return y, mixer.extend_in_place(forks, layers, jnp.int32(1), positions, layout, plan)
    state = fork(mixer, trace, positions, layout, plan, forks.shape[2])
    return y, mixer.extend(forks, state)[0]


def values_and_gradients(way, graph, params, x, forks, positions, segments=None):
    """The outputs, and the gradients of a generic scalar of them."""

    def pull(params, x, forks):
        def run(*arrays):
            return outputs(way, graph, *arrays, positions, segments)

        found, pullback = jax.vjp(run, params, x, forks)
        cotangents = (jnp.asarray(draw(*y.shape, seed=2), y.dtype) for y in found)
        return found, pullback(tuple(cotangents))

    return jax.jit(pull)(params, x, forks)


def assert_read_in_place(want, tolerance, *arguments):
    """Outputs of forks that are read in place against those wanted, of the same arguments.

    By XLA, and by the kernels for TPUs, interpreted.
    """
    for by_kernel in (False, True):
        with (
            mock.patch.object(pallas_tpu, "takes_windows", return_value=by_kernel),
            mock.patch.object(pallas_tpu, "takes_weights", return_value=by_kernel),
        ):
            _, got = jax.jit(functools.partial(outputs, "in place"), static_argnums=0)(*arguments)
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


def assert_equal(got, want, tolerance):
    """Each array by its norm; one that is far smaller than the rest on the scale of a hundredth."""
    flat, tree = jax.tree_util.tree_flatten_with_path(want)
    assert jax.tree.structure(got) == tree
    total = np.sqrt(sum(np.linalg.norm(np.float64(x)) ** 2 for _, x in flat))
    for (path, b), a in zip(flat, jax.tree.leaves(got), strict=True):
        a, b = np.float64(a), np.float64(b)
        assert np.isfinite(a).all()
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-2 * total)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


@pytest.mark.parametrize(
    ("name", "in_group"),
    [*((name, 1) for name in VARIANTS if name != "grouped"), ("released", 3), ("grouped", 2)],
)
def test_equals_states_extended(monkeypatch, name, in_group):
    """Forks before any token, within chunks, at their ends (which they cross), at the row's end."""
    monkeypatch.setattr("refine_jax.models.lact_layer.heads_in_group", lambda *_: in_group)
    config, graph, params = make(name)
    size = min(3, config.lact_chunk_size)
    positions = np.array([[0, 1, 3, 4, 7, 8, 14], [14, 5, 5, 2, 12, 10, 0]])
    x, forks = draw(2, TOKENS, 24), draw(2, 7, size, 24, seed=1)
    traced, known, want = (
        values_and_gradients(way, graph, params, x, forks, positions)
        for way in ("traced", "known", "state")
    )
    tolerance = 1e-4 if config.use_muon else 1e-5
    assert_equal(traced, want, tolerance)
    assert_equal(known, want, tolerance)
    assert_read_in_place(want[0][1], tolerance, graph, params, x, forks, positions, None)


def test_equals_states_extended_of_packed_rows():
    """Padding on the left, in the middle and on the right; forks at documents' starts and ends."""
    _, graph, params = make("prenorm")
    segments = np.zeros((2, 20), np.int32)
    segments[0, 3:9], segments[0, 9:18] = 1, 2
    segments[1, :5], segments[1, 7:20] = 1, 2
    positions = np.array([[0, 2, 3, 5, 9, 13, 18, 20], [0, 1, 4, 6, 7, 8, 11, 20]])
    x, forks = draw(2, 20, 24), draw(2, 8, 3, 24, seed=1)
    got, want = (
        values_and_gradients(way, graph, params, x, forks, positions, segments)
        for way in ("traced", "state")
    )
    assert_equal(got, want, 1e-4)  # with Newton-Schulz, which amplifies rounding
    assert_read_in_place(want[0][1], 1e-4, graph, params, x, forks, positions, segments)


def test_forks_that_cross_nothing_and_that_are_long():
    """No turn of the loop over forks that cross; more tokens than a chunk has."""
    _, graph, params = make("released")
    x = draw(1, TOKENS, 24)
    for positions, size in (([[1, 5, 10]], 2), ([[0, 7, 14]], 9)):
        forks = draw(1, 3, size, 24, seed=1)
        got, want = (
            values_and_gradients(way, graph, params, x, forks, np.array(positions))
            for way in ("traced", "state")
        )
        assert_equal(got, want, 1e-5)


def test_bfloat16_is_as_near_float32_as_states_are():
    _, graph, params = make("released")
    x, forks, positions = draw(1, TOKENS, 24), draw(1, 3, 3, 24, seed=1), np.array([[2, 7, 12]])
    by_state = jax.jit(functools.partial(outputs, "state"), static_argnums=0)
    exact = by_state(graph, params, x, forks, positions, None)[1]
    low = [jnp.asarray(a, jnp.bfloat16) for a in (x, forks)]

    def error(way):
        (_, y), gradients = values_and_gradients(way, graph, params, *low, positions)
        assert {g.dtype for g in jax.tree.leaves(gradients[0])} == {jnp.dtype("float32")}
        return np.linalg.norm(np.float64(y) - exact) / np.linalg.norm(exact)

    assert 1e-5 < error("traced") < 1.5 * error("state")


def mesh_of(sizes):
    """A mesh of four devices."""
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=jax.devices()[:4])


# Tokens and heads on several devices; heads exchanged for tokens, or chunks shared (`_run_fast`).
@pytest.mark.parametrize(
    ("devices", "packed"),
    [((1, 1, 2, 2), True), ((1, 1, 1, 4), False), ((1, 2, 1, 2), True), ((1, 2, 2, 1), False)],
)
def test_equals_one_device(devices, packed):
    config = LaCTConfig(
        hidden_size=32, num_attn_heads=4, num_lact_heads=2, lact_chunk_size=4, window_size=11,
        w0_w2_low_rank=3,
    )  # fmt: skip
    graph, state = nnx.split(LaCTMixer(config, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda w: w + 0.2 * draw(*w.shape), nnx.to_pure_dict(state))
    segments = np.ones((2, 32), np.int32)
    segments[0, 13:], segments[1, :2] = 2, 0
    # Windows and slabs within a device, over a border and over several.
    positions = np.array([[0, 3, 7, 8, 18, 32], [2, 9, 15, 16, 20, 31]])
    arrays = params, draw(2, 32, 32), draw(2, 6, 3, 32, seed=1), positions
    segments = segments if packed else None
    want = values_and_gradients("traced", graph, *arrays, segments)
    with jax.set_mesh(mesh_of(devices)):
        got = values_and_gradients("known", graph, *arrays, segments)
        assert_equal(jax.device_get(got), want, 1e-5)
        assert_read_in_place(want[0][1], 1e-5, graph, *arrays, segments)
