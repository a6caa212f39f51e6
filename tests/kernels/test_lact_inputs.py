"""The kernel that makes what attention and fast weights take, against the steps one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from refine_jax.kernels.heads import to_chunks
from refine_jax.kernels.lact.pallas_tpu_inputs import InputsPlan, lact_inputs, rope_tables
from refine_jax.kernels.window_attention import window_attention
from refine_jax.models.config import LaCTConfig
from refine_jax.models.lact import LaCTMixer
from refine_jax.models.lact_forks import fast_input, fast_value
from refine_jax.models.layers import rope

THETA = 10000.0


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("rows_differ", "switches"),
    [
        (False, {}),
        (True, {"no_v_silu": True}),
        (False, {"qkv_silu": False}),
        (False, {"ttt_nope": True}),
    ],
)
def test_equals_the_steps_one_by_one(rows_differ, switches):
    heads, groups, tokens, chunk = 2, 4, 256, 128
    config = LaCTConfig(
        vocab_size=8,
        hidden_size=groups * 128,
        num_hidden_layers=1,
        num_attn_heads=2 * groups,
        num_lact_heads=heads,
        rope_theta=THETA,
        **switches,
    )
    plan = InputsPlan(
        heads=heads,
        chunk=chunk,
        head_dim=64,
        silu=config.qkv_silu,
        silu_values=config.qkv_silu and not config.no_v_silu,
        rope=not config.ttt_nope,
    )
    q, k, v = (draw(2, groups, tokens, 128, seed=i) for i in range(3))
    q = q.at[0, :2, 5].set(0.0)  # with no offset a vector without length
    scales = draw(heads, 4, 256, seed=3).at[0, 1].set(0.0)
    positions = jnp.arange(tokens)[None] + (jnp.asarray([[0], [1000]]) if rows_differ else 0)

    def by_kernel(q, k, v, scales):
        return lact_inputs(plan, q, k, v, scales, rope_tables(positions, THETA, 64))

    def in_steps(q, k, v, scales):
        of_attention = *(rope(x, positions[:, None], THETA, 64) for x in (q, k)), v
        slots = positions.reshape(-1, tokens // chunk, 1, chunk)
        q, k, v = (to_chunks(x, heads, chunk) for x in (q, k, v))
        pairs = ((scales[:, 2 * i].ravel(), scales[:, 2 * i + 1].ravel()) for i in range(2))
        fast = [fast_input(config, x, pair, slots) for x, pair in zip((q, k), pairs, strict=True)]
        return of_attention, (*fast, fast_value(config, v))

    def with_gradients(function):
        with jax.default_matmul_precision("highest"):
            out, pullback = jax.vjp(function, q, k, v, scales)
            cotangents = [draw(*x.shape, seed=9 + i) for i, x in enumerate(jax.tree.leaves(out))]
            return out, pullback(jax.tree.unflatten(jax.tree.structure(out), cotangents))

    got, want = (
        jax.tree.leaves(jax.jit(with_gradients, static_argnums=0)(f)) for f in (by_kernel, in_steps)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * float(jnp.abs(b).max()))


def test_a_layer_with_the_kernels_is_the_same_layer(monkeypatch):
    """Heads of 64 in groups of 128 on a TPU: attention and inputs by kernels, with gradients."""
    config = LaCTConfig(
        hidden_size=256, num_attn_heads=4, num_lact_heads=1, lact_chunk_size=128, window_size=150
    )
    graph, state = nnx.split(LaCTMixer(config, rngs=nnx.Rngs(0)))
    x = draw(2, 256, 256)

    def with_gradients(state, x):
        def run(state, x):
            return nnx.merge(graph, state).forward(x, None, None)[0]

        with jax.default_matmul_precision("highest"):
            out, pullback = jax.vjp(run, state, x)
            return out, pullback(
                jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape))
            )

    want = jax.jit(with_gradients)(state, x)
    monkeypatch.setattr(LaCTMixer, "_heads_in_group", 2)
    monkeypatch.setattr(LaCTMixer, "_inputs_by_kernel", lambda *_: True)
    attend = functools.partial(window_attention, implementation="pallas_tpu", heads_per_group=2)

    def by_kernel(self, q, k, v, layout, axis_name):
        ids = None if layout is None else jnp.where(layout.mask, layout.document, 0)
        return attend(q, k, v, config.window_size, ids)

    monkeypatch.setattr(LaCTMixer, "_attend", by_kernel)
    got = jax.jit(lambda *x: with_gradients(*x))(state, x)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))
