"""Every implementation of the next-token loss against the reference, with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_jax.kernels import tpu
from refine_jax.kernels.cross_entropy import (
    IMPLEMENTATIONS,
    next_token_loss,
    pallas_tpu,
    token_log_probs,
)
from refine_jax.kernels.cross_entropy.specs import TEST_SPECS, CrossEntropySpec

pytestmark = pytest.mark.usefixtures("simulated_tpu")


def relative_rms(got, want):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.sqrt(np.mean((got - want) ** 2) / max(np.mean(want**2), 1e-30))


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(implementation, arguments):
    hidden, head, targets, weights = arguments

    def loss(hidden, head):
        total, stats = next_token_loss(
            hidden, head, targets, weights, implementation=implementation
        )
        return 0.5 * total, stats

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)


@pytest.mark.parametrize("name", sorted(set(IMPLEMENTATIONS) - {"reference"}))
@pytest.mark.parametrize(
    ("spec", "dtype"),
    [(spec, "bfloat16" if spec.confident else "float32") for spec in TEST_SPECS],
    ids=lambda x: getattr(x, "name", x),
)
def test_matches_the_reference(spec, name, dtype):
    arguments = spec.arguments(dtype)
    (loss, stats), gradients = loss_and_gradients(name, arguments)
    # The operands of the products are rounded alike: the reference takes the rounded head.
    exact = (arguments[0], arguments[1].astype(dtype).astype(jnp.float32), *arguments[2:])
    (want_loss, want_stats), want_gradients = loss_and_gradients("reference", exact)
    forward, backward = (1e-5, 1e-5) if dtype == "float32" else (0.006, 0.008)
    assert relative_rms(loss, want_loss) < forward
    np.testing.assert_allclose(stats.nll, want_stats.nll, atol=2e-5)
    np.testing.assert_allclose(stats.entropy, want_stats.entropy, atol=2e-5)
    np.testing.assert_array_equal(stats.correct, want_stats.correct)
    for got, want in zip(gradients, want_gradients, strict=True):
        assert got.shape == want.shape
        assert relative_rms(got, want) < backward
    assert gradients[0].dtype == arguments[0].dtype
    assert gradients[1].dtype == jnp.float32


def test_tpu_kernels_walk_over_blocks_and_spans():
    """Three spans of two blocks of two turns each; three blocks of words, the last one cut.

    The targets are predicted with confidence: of the logits' gradients little is left.
    """
    hidden, head, targets, weights = CrossEntropySpec(
        "", 90, vocabulary=700, confident=True
    ).arguments()
    blocks = pallas_tpu.Blocks(16, 256, 32, 128, rows=8, span=32)
    stats, *gradients = jax.jit(pallas_tpu.loss_gradients, static_argnums=4)(
        hidden[0], head, targets[0], weights[0], blocks
    )
    (_, want_stats), want = loss_and_gradients("reference", (hidden, head, targets, weights))
    for got, expected in zip(stats, want_stats, strict=True):
        np.testing.assert_allclose(got, expected[0], atol=2e-5)
    assert relative_rms(0.5 * gradients[0], want[0][0]) < 1e-5
    assert relative_rms(0.5 * gradients[1], want[1]) < 1e-5
    alone = pallas_tpu.token_stats(hidden[0], head, targets[0], blocks)
    for got, expected in zip(alone, stats, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("vmem", [16, 64, 128])
def test_blocks_divide_one_another(vmem, monkeypatch):
    monkeypatch.setattr(tpu, "vmem_bytes", lambda: vmem * 2**20)
    for tokens in (1, 130, 600, 1024, 5000, 8193, 16384, 100_000):
        for vocabulary in (100, 32000, 32002, 50257, 151936):
            blocks = pallas_tpu.choose_blocks(tokens, 2048, vocabulary, "bfloat16")
            assert blocks.tokens % blocks.rows == 0
            assert blocks.words % blocks.head_words == blocks.head_words % 128 == 0
            assert blocks.span % blocks.tokens == blocks.span % blocks.head_tokens == 0
            assert blocks.head_tokens % blocks.rows == blocks.rows % 128 == 0
            spans = -(-tokens // blocks.span)
            assert (spans * blocks.span - tokens) < max(128, 1024 * spans)


@pytest.mark.parametrize("size", [1024, 2048, 2560, 4096, 5120])
def test_large_vocabularies_keep_a_gibibyte_of_exponentials(size, monkeypatch):
    """Of any width that Qwen 3.5 has, on a v5e or v6e; those of 32,000 words keep longer spans."""
    monkeypatch.setattr(tpu, "vmem_bytes", lambda: 128 * 2**20)
    blocks = pallas_tpu.choose_blocks(16384, size, 248320, "bfloat16")
    assert 2**29 < blocks.span * 248320 * 2 <= 2**30
    assert pallas_tpu.choose_blocks(16384, size, 32000, "bfloat16").span == 8192


def test_token_log_probs():
    hidden, head, tokens, weights = CrossEntropySpec("", 22, batch=2).arguments()

    def plain(hidden, head):
        log_probs = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, head))
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, -1)
        return jnp.take_along_axis(log_probs, tokens[..., None], -1)[..., 0], entropy

    def blocked(hidden, head):
        return token_log_probs(hidden, head, tokens, 16)

    def both(function):
        out, pullback = jax.vjp(function, hidden, head)
        return out, pullback((weights, weights))

    for got, want in zip(
        *(jax.tree.leaves(jax.jit(both, static_argnums=0)(f)) for f in (blocked, plain)),
        strict=True,
    ):
        assert relative_rms(got, want) < 1e-5


def test_errors():
    hidden, head, targets, weights = CrossEntropySpec("", 4).arguments()
    with pytest.raises(ValueError, match=r"implementation must be None or one of .*Got: .*'gpu'"):
        next_token_loss(hidden, head, targets, weights, implementation="gpu")
    with pytest.raises(ValueError, match=r"targets must be \[B, T\]"):
        next_token_loss(hidden, head, targets[0], weights)
    with pytest.raises(ValueError, match="no 'pallas_tpu' form for this call: hidden must be"):
        next_token_loss(
            hidden.astype(jnp.float16), head, targets, weights, implementation="pallas_tpu"
        )
    wide = jax.ShapeDtypeStruct((1, 8, 1 << 17), jnp.float32)
    assert "does not fit" in pallas_tpu.unsupported(
        wide, jax.ShapeDtypeStruct((8, 1 << 17), jnp.float32)
    )
