"""Forward passes with the tokens of rows on several devices: LaCT's equal to one device.

The other models and the objectives are in test_mesh.py; here are the two ways in which devices
share fast weights: by heads or, where there are more devices than heads, by the slots of chunks.
"""

import functools

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType
from sequences import assert_equal

from refine_jax.models.layout import Layout
from refine_jax.models.transformer import ComputePolicy, Model
from refine_jax.parallel import AXES

DEVICES, LENGTH, ROWS = 4, 64, 2


def mesh():
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(
        (1, 1, 1, DEVICES), AXES, axis_types=kinds, devices=jax.devices()[:DEVICES]
    )


@functools.cache
def program(heads: int, packed: bool):
    model, params = tiny.tiny("lact", num_hidden_layers=1, num_lact_heads=heads)
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[0, 37:] = 2
    segments[1, :5], segments[1, 30:40], segments[1, 40:] = 0, 0, 2
    tokens = tiny.tokens(3, ROWS, LENGTH)
    weights = np.random.default_rng(1).standard_normal((ROWS, LENGTH, 16), np.float32)
    weights *= (segments > 0)[..., None] if packed else 1

    def total(params):
        layout = Layout.from_segments(segments, 2) if packed else None
        hidden, trace = model.forward(params, tokens, layout, with_trace=True)
        state = model.fork(params, trace, np.array([[9, 33], [20, 64]]))
        return (hidden * weights).sum() + sum((x * x).sum() for x in jax.tree.leaves(state.sums))

    return jax.jit(jax.value_and_grad(total)), params


@pytest.mark.parametrize(("heads", "packed"), [(4, True), (2, True), (2, False)])
def test_equals_one_device(heads, packed):
    run, params = program(heads, packed)
    want = run(params)
    with jax.set_mesh(mesh()):
        got = run(params)
    # Gradients on the scale of the largest: some parameters have hardly any.
    assert_equal(got, want, 2e-5)


def test_states_at_borders_are_not_sent_again():
    """The backward pass computes layers again, but not what their devices told each other."""
    model, params = tiny.tiny("deltanet_plain")
    tokens, sent = tiny.tokens(3, ROWS, 64 * DEVICES), []
    for remat in ("none", "full"):
        again = Model(model.config, ComputePolicy(remat=remat))
        with jax.set_mesh(mesh()):
            gradient = jax.grad(lambda params, m=again: m.forward(params, tokens)[0].sum())
            sent.append(str(jax.make_jaxpr(gradient)(params)).count("ppermute"))
    assert sent[0] == sent[1] > 0
