"""Window attention against dense masks and its own laws."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from refine_jax.kernels.window_attention import pallas_tpu
from refine_jax.models import attention
from refine_jax.models.attention import push_to_ring, ring_attention, window_attention
from refine_jax.models.layout import Layout


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


def visible(segments, window):
    """[B, T, T]: token i sees token j."""
    length = segments.shape[1]
    back = np.arange(length)[:, None] - np.arange(length)
    same = segments[:, :, None] == segments[:, None]
    return (back >= 0) & (back < window) & same & (segments[:, :, None] > 0)


# One block; several, with a window inside one and over several.
@pytest.mark.parametrize(("length", "window"), [(50, 7), (150, 1), (300, 100)])
def test_packed_and_padded_rows_match_dense_masks(length, window):
    rng = np.random.default_rng(0)
    segments = np.zeros((2, length), np.int32)
    cuts = np.sort(rng.choice(np.arange(3, length - 3), 3, replace=False))
    segments[0, cuts[0] : cuts[1]], segments[0, cuts[1] : cuts[2]] = 1, 2  # padding on both sides
    segments[1, : cuts[0]], segments[1, cuts[1] :] = 1, 2  # and between
    layout = Layout.from_segments(jnp.asarray(segments), max_documents=2)
    q, k, v, cotangent = (draw(2, 2, length, 4, seed=i) for i in range(4))
    seen = visible(segments, window)

    def plain(q, k, v):  # dense, for the gradient
        scores = jnp.einsum("bath,bash->bats", q, k) / 2
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
        weights = jnp.where((segments > 0)[:, None, :, None], weights, 0)
        return jnp.einsum("bats,bash->bath", weights, v)

    def blocked(q, k, v):
        return window_attention(q, k, v, window, layout)

    def with_gradient(function):
        out, pullback = jax.vjp(function, q, k, v)
        return out, pullback(cotangent)

    out, gradients = jax.jit(lambda: with_gradient(blocked))()
    np.testing.assert_allclose(out, dense_attention(q, k, v, seen), atol=1e-5)
    # The dense softmax of a row that sees nothing is NaN: give such rows one key.
    seen = seen | (np.eye(length, dtype=bool) & (segments == 0)[:, :, None])
    _, expected = jax.jit(lambda: with_gradient(plain))()
    for name, got, want in zip("qkv", gradients, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5, err_msg=name)
        padding = np.broadcast_to((segments == 0)[:, None, :, None], got.shape)
        assert not np.any(np.asarray(got)[padding]), f"padding got a gradient: {name}"


@pytest.mark.parametrize(
    ("name", "packed", "tokens", "in_group"),
    [
        ("splash", False, None, 1),
        ("splash", True, None, 2),
        ("splash", False, 256, 1),
        ("splash", False, 256, 2),
        ("pallas_tpu", False, 128, 1),
        ("pallas_tpu", True, 128, 2),
        ("pallas_tpu", False, 256, 2),  # blocks in two parts
        ("pallas_tpu", True, 512, 1),  # one block
    ],
)
def test_kernels_equal_the_blocked_form(monkeypatch, name, packed, tokens, in_group):
    """Also where a row is more than one call of splash takes, and for heads side by side.

    tokens: of a call, or of a block.
    """
    length, window = 290, 130  # three blocks of queries, the last one cut; windows over two
    if tokens is not None:
        monkeypatch.setattr(attention, "_SPLASH_TOKENS", tokens)
        monkeypatch.setattr(pallas_tpu, "_BLOCK", tokens)
    layout = None
    if packed:
        segments = np.zeros((2, length), np.int32)
        segments[0, 5:60], segments[0, 60:280] = 1, 2  # padding on both sides
        segments[1, :90], segments[1, 150:] = 1, 2  # and between
        layout = Layout.from_segments(jnp.asarray(segments), max_documents=2)
    q, k, v, cotangent = (draw(2, 2, length, 8, seed=i) for i in range(4))

    def with_gradient(name):
        def attend(q, k, v):
            return window_attention(
                q, k, v, window, layout, implementation=name, heads_per_group=in_group
            )

        with jax.default_matmul_precision("highest"):
            out, pullback = jax.vjp(attend, q, k, v)
            return out, pullback(cotangent)

    run = jax.jit(with_gradient, static_argnums=0)
    got, want = (jax.tree.leaves(run(name)) for name in (name, "xla"))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 100, 129, 256, 300])
def test_the_kernel_takes_every_window(monkeypatch, window):
    """Windows of one token, within a block, of whole blocks, and longer than the row."""
    monkeypatch.setattr(pallas_tpu, "_BLOCK", 128)
    q, k, v, cotangent = (draw(1, 1, 260, 8, seed=i) for i in range(4))

    def with_gradient(name):
        def attend(q, k, v):
            return window_attention(q, k, v, window, implementation=name)

        with jax.default_matmul_precision("highest"):
            out, pullback = jax.vjp(attend, q, k, v)
            return out, pullback(cotangent)

    run = jax.jit(with_gradient, static_argnums=0)
    got, want = (jax.tree.leaves(run(name)) for name in ("pallas_tpu", "xla"))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def side_by_side(x, count):
    """Heads [..., A, T, hd] -> groups [..., A / count, T, count hd]."""
    parts = [x[..., i::count, :, :] for i in range(count)]
    return jnp.concatenate(parts, axis=-1)


def test_heads_side_by_side_are_heads():
    """Window and ring attention of groups of two against those of four heads."""
    q, k, v = (draw(2, 4, 40, 6, seed=i) for i in range(3))
    grouped = [side_by_side(x, 2) for x in (q, k, v)]
    want = window_attention(q, k, v, 9)
    got = window_attention(*grouped, 9, heads_per_group=2)
    np.testing.assert_allclose(got, side_by_side(want, 2), atol=1e-6)

    new = [draw(2, 3, 4, 5, 6, seed=i) for i in range(3)]
    rings = [draw(2, 3, 4, 9, 6, seed=i) for i in (3, 4)]
    cursor = jnp.asarray([[0, 3, 8], [1, 2, 5]])
    position = jnp.asarray([[0, 3, 20], [1, 11, 5]])
    want = ring_attention(*new, *rings, cursor, position)
    arrays = [side_by_side(x, 2) for x in (*new, *rings)]
    got = ring_attention(*arrays, cursor, position, heads_per_group=2)
    np.testing.assert_allclose(got, side_by_side(want, 2), atol=1e-6)


def test_cudnn_lowers_for_gpus(monkeypatch):
    """Lowering only: needs no GPU. The version is asked of a library that is not there."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    x = jax.ShapeDtypeStruct((1, 2, 256, 64), jnp.bfloat16)

    def total(q, k, v):
        out = window_attention(q, k, v, 64, implementation="cudnn")
        return out.astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    text = gradients.trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert re.search(r"sliding_window_length\\22: 64\b", text)  # \22 is a quote


def test_explicit_implementations_never_fall_back():
    x = draw(1, 1, 32, 8)
    layout = Layout.from_segments(jnp.ones((1, 32), jnp.int32))
    with pytest.raises(ValueError, match=r"implementation of window_attention .*Got: .*'flash'"):
        window_attention(x, x, x, 8, implementation="flash")
    with pytest.raises(ValueError, match=r"'cudnn': arrays must be .*Got: float32. Use 'xla'"):
        window_attention(x, x, x, 8, implementation="cudnn")
    with pytest.raises(ValueError, match=r"'cudnn': documents .*Got: a layout"):
        window_attention(*[x.astype(jnp.bfloat16)] * 3, 8, layout, implementation="cudnn")


def test_bfloat16_is_close_and_keeps_its_dtype():
    q, k, v = (draw(1, 2, 100, 8, seed=i).astype(jnp.bfloat16) for i in range(3))
    out = window_attention(q, k, v, 20)
    assert out.dtype == jnp.bfloat16
    exact = dense_attention(q, k, v, visible(np.ones((1, 100), np.int32), 20))
    assert np.sqrt(np.mean((np.float64(out) - exact) ** 2) / np.mean(exact**2)) < 0.006


@pytest.mark.parametrize("window", [1, 6])
def test_ring_continues_a_row(window):
    """New tokens in groups of 1 and of more than the window, in two phases at once."""
    length = 18
    q, k, v = (draw(2, length, 4, seed=i) for i in range(3))  # [A, T, hd]
    expected = np.asarray(window_attention(q[None], k[None], v[None], window))[0]
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
