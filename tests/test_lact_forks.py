"""Forks in the gradient pass of LaCT: equal to decode states made and extended, in all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_lact import TOKENS, VARIANTS, draw, make

from refine_jax.models import fork_attention
from refine_jax.models.lact import LaCTMixer
from refine_jax.models.layout import Layout


def outputs(way, graph, params, x, forks, positions, segments):
    """Forward's y and the forks' [B, R, S, D], by `extend_traced` or by a state."""
    layout = None if segments is None else Layout.from_segments(segments, max_documents=2)
    mixer = nnx.merge(graph, params)
    plan = LaCTMixer.plan(mixer.config, layout, x.shape[:2])
    y, trace = mixer.forward(x, layout, plan)
    if layout is not None:
        y = jnp.where(layout.mask[..., None], y, 0)
    if way == "traced":
        return y, mixer.extend_traced(forks, trace, positions, layout, plan)
    state = mixer.fork(trace, positions, layout, plan, forks.shape[2])
    return y, mixer.extend(forks, state)[0]


def values_and_gradients(way, graph, params, x, forks, positions, segments=None, seed=2):
    """The outputs, and gradients of a generic scalar of them."""

    def run(params, x, forks):
        return outputs(way, graph, params, x, forks, positions, segments)

    def pull(params, x, forks):
        found, pullback = jax.vjp(run, params, x, forks)
        cotangent = [draw(*y.shape, seed=seed + i).astype(y.dtype) for i, y in enumerate(found)]
        return found, pullback(tuple(jnp.asarray(c, y.dtype) for c, y in zip(cotangent, found)))

    return jax.jit(pull)(params, x, forks)


def assert_equal(got, want, tolerance):
    """Each array by its norm; gradients far smaller than the rest on the scale of a hundredth."""
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
    [*((name, 1) for name in VARIANTS), ("released", 3), ("grouped", 2)],
)
def test_equals_states_extended(monkeypatch, name, in_group):
    """Forks before any token, within chunks, at their ends (which they cross), at the row's end."""
    monkeypatch.setattr("refine_jax.models.lact.heads_in_group", lambda *_: in_group)
    config, graph, params = make(name)
    size = min(3, config.lact_chunk_size)
    positions = np.array([[0, 1, 3, 4, 7, 8, 14], [14, 5, 5, 2, 12, 10, 0]])
    x, forks = draw(2, TOKENS, 24), draw(2, 7, size, 24, seed=1)
    got, want = (
        values_and_gradients(way, graph, params, x, forks, positions) for way in ("traced", "state")
    )
    assert_equal(got, want, 1e-4 if config.use_muon else 1e-5)
