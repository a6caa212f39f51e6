"""Attention of decode states against that of whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_jax.kernels.window_attention import window_attention
from refine_jax.models.attention import push_to_ring, ring_attention


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dense_attention(q, k, v, seen):
    """float64, one query at a time; seen [B, T, T]. Rows that see nothing are 0."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(v)
    for b, a, t in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(seen[b, t])
        if keys.size:
            scores = k[b, a, keys] @ q[b, a, t] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[b, a, t] = weights @ v[b, a, keys] / weights.sum()
    return out


def side_by_side(x, count):
    """Heads [..., A, T, hd] -> groups [..., A / count, T, count hd]."""
    parts = [np.asarray(x)[..., i::count, :, :] for i in range(count)]
    return np.concatenate(parts, axis=-1)


def test_heads_side_by_side_are_heads():
    """Window and ring attention of groups of two against those of four heads."""
    q, k, v = (draw(2, 4, 40, 6, seed=i) for i in range(3))
    grouped = [side_by_side(x, 2) for x in (q, k, v)]
    attend = jax.jit(window_attention, static_argnums=3, static_argnames="heads_per_group")
    want = attend(q, k, v, 9)
    got = attend(*grouped, 9, heads_per_group=2)
    np.testing.assert_allclose(got, side_by_side(want, 2), atol=1e-6)

    new = [draw(2, 3, 4, 5, 6, seed=i) for i in range(3)]
    rings = [draw(2, 3, 4, 9, 6, seed=i) for i in (3, 4)]
    cursor = jnp.asarray([[0, 3, 8], [1, 2, 5]])
    position = jnp.asarray([[0, 3, 20], [1, 11, 5]])
    attend = jax.jit(ring_attention, static_argnames="heads_per_group")
    want = attend(*new, *rings, cursor, position)
    arrays = [side_by_side(x, 2) for x in (*new, *rings)]
    got = attend(*arrays, cursor, position, heads_per_group=2)
    np.testing.assert_allclose(got, side_by_side(want, 2), atol=1e-6)


@pytest.mark.parametrize("window", [1, 6])
def test_ring_continues_a_row(window):
    """New tokens in groups of 1 and of more than the window, in two phases at once."""
    length = 18
    q, k, v = (draw(2, length, 4, seed=i) for i in range(3))  # [A, T, hd]
    whole = jax.jit(window_attention, static_argnums=3)
    expected = np.asarray(whole(*(np.asarray(x)[None] for x in (q, k, v)), window))[0]
    # Fork 0 begins before any token; fork 1 after 5, with the ring turned by 3.
    cursor, position = np.array([[0, 3 % window]]), np.array([[0, 5]])

    def remembered(x):
        ring = np.full((1, 2, 2, window, 4), 1e3, np.float32)  # garbage where nothing is
        for age in range(min(5, window)):
            ring[0, 1, :, (3 % window - 1 - age) % window] = x[:, 4 - age]
        return ring

    @jax.jit
    def step(new, rings, cursor, position):
        out = ring_attention(*new, *rings, cursor, position)
        rings = [
            push_to_ring(ring[None], x[None], cursor)[0]
            for ring, x in zip(rings, new[1:], strict=True)
        ]
        return out, rings

    rings = [remembered(x) for x in (k, v)]
    for size in (1, window + 2, 1, window + 2, 1):
        rows = position[0][:, None] + np.arange(size)
        new = [np.moveaxis(np.asarray(x)[:, rows], 1, 0)[None] for x in (q, k, v)]
        out, rings = step(new, rings, cursor, position)
        np.testing.assert_allclose(out, np.moveaxis(expected[:, rows], 1, 0)[None], atol=1e-5)
        cursor, position = (cursor + size) % window, position + size
        if position.max() + window + 2 > length:
            break
