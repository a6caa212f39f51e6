"""Window attention: every implementation against the specification, dense masks and its laws."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from refine_jax.kernels.window_attention import (
    IMPLEMENTATIONS,
    pallas_tpu,
    splash,
    window_attention,
)
from refine_jax.kernels.window_attention.specs import TEST_SPECS
from tests.models.test_attention import dense_attention, draw

# cuDNN runs on GPUs alone.
TESTED = sorted(set(IMPLEMENTATIONS) - {"reference", "cudnn"})


STATIC = {"static_argnames": ("window", "heads_per_group", "implementation")}


def attend_and_back(arrays, cotangent, **keywords):
    with jax.default_matmul_precision("highest"):
        out, pullback = jax.vjp(lambda *x: window_attention(*x, **keywords), *arrays)
        return out, pullback(cotangent)


value_and_gradients = jax.jit(attend_and_back, **STATIC)


def relative_rms(got, want):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.sqrt(np.mean((got - want) ** 2) / max(np.mean(want**2), 1e-30))


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.parametrize("spec", TEST_SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matches_the_specification(monkeypatch, spec, dtype, name):
    monkeypatch.setattr(pallas_tpu, "_BLOCK", 128)
    arrays, keywords = spec.arguments(dtype)
    cotangent = draw(*arrays[0].shape, seed=9)
    exact = [x.astype(jnp.float32) for x in arrays]
    want = value_and_gradients(exact, cotangent, **keywords, implementation="reference")
    cotangent = cotangent.astype(dtype)
    got = value_and_gradients(arrays, cotangent, **keywords, implementation=name)
    forward, backward = (1e-5, 1e-5) if dtype == "float32" else (0.006, 0.008)
    assert got[0].dtype == arrays[0].dtype
    assert relative_rms(got[0], want[0]) < forward
    for gradient, expected, array in zip(got[1], want[1], arrays, strict=True):
        assert gradient.dtype == array.dtype
        assert relative_rms(gradient, expected) < backward
    if spec.packed:
        padding = np.broadcast_to((keywords["ids"] == 0)[:, None, :, None], got[0].shape)
        for x in (got[0], *got[1]):
            assert not np.any(np.asarray(x)[padding])


def visible(segments, window):
    """[B, T, T]: token i sees token j."""
    length = segments.shape[1]
    back = np.arange(length)[:, None] - np.arange(length)
    same = segments[:, :, None] == segments[:, None]
    return (back >= 0) & (back < window) & same & (segments[:, :, None] > 0)


# One block; several, with a window inside one and over several.
@pytest.mark.parametrize(("length", "window"), [(50, 7), (150, 1), (300, 100)])
@pytest.mark.parametrize("name", ["reference", "xla"])
def test_packed_and_padded_rows_match_dense_masks(name, length, window):
    rng = np.random.default_rng(0)
    segments = np.zeros((2, length), np.int32)
    cuts = np.sort(rng.choice(np.arange(3, length - 3), 3, replace=False))
    segments[0, cuts[0] : cuts[1]], segments[0, cuts[1] : cuts[2]] = 1, 2  # padding on both sides
    segments[1, : cuts[0]], segments[1, cuts[1] :] = 1, 2  # and between
    ids = jnp.asarray(segments)
    q, k, v, cotangent = (draw(2, 2, length, 4, seed=i) for i in range(4))
    seen = visible(segments, window)

    def plain(q, k, v):  # dense, for the gradient
        scores = jnp.einsum("bath,bash->bats", q, k) / 2
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
        weights = jnp.where((segments > 0)[:, None, :, None], weights, 0)
        return jnp.einsum("bats,bash->bath", weights, v)

    def blocked(q, k, v):
        return window_attention(q, k, v, window, ids, implementation=name)

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
        monkeypatch.setattr(splash, "_SPLASH_TOKENS", tokens)
        monkeypatch.setattr(pallas_tpu, "_BLOCK", tokens)
    ids = None
    if packed:
        segments = np.zeros((2, length), np.int32)
        segments[0, 5:60], segments[0, 60:280] = 1, 2  # padding on both sides
        segments[1, :90], segments[1, 150:] = 1, 2  # and between
        ids = jnp.asarray(segments)
    *arrays, cotangent = (draw(2, 2, length, 8, seed=i) for i in range(4))

    def with_gradient(name):
        run = value_and_gradients
        if name != "xla":  # anew: blocks are chosen while a function is traced
            run = jax.jit(lambda *x, **keywords: attend_and_back(*x, **keywords), **STATIC)
        options = {"window": window, "heads_per_group": in_group, "implementation": name}
        return jax.tree.leaves(run(arrays, cotangent, ids=ids, **options))

    for a, b in zip(with_gradient(name), with_gradient("xla"), strict=True):
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
    ids = jnp.ones((1, 32), jnp.int32)
    with pytest.raises(ValueError, match=r"implementation of window_attention .*Got: .*'flash'"):
        window_attention(x, x, x, 8, implementation="flash")
    with pytest.raises(ValueError, match=r"'cudnn': arrays must be .*Got: float32. Use 'xla'"):
        window_attention(x, x, x, 8, implementation="cudnn")
    with pytest.raises(ValueError, match=r"'cudnn': documents .*Got: a layout"):
        window_attention(*[x.astype(jnp.bfloat16)] * 3, 8, ids, implementation="cudnn")


def test_bfloat16_is_close_and_keeps_its_dtype():
    q, k, v = (draw(1, 2, 100, 8, seed=i).astype(jnp.bfloat16) for i in range(3))
    out = window_attention(q, k, v, 20)
    assert out.dtype == jnp.bfloat16
    exact = dense_attention(q, k, v, visible(np.ones((1, 100), np.int32), 20))
    assert np.sqrt(np.mean((np.float64(out) - exact) ** 2) / np.mean(exact**2)) < 0.006
