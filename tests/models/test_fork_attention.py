"""Attention of forks to a row in place, against dense masks in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_jax.kernels.fork_reads import Reach, attend_row_of_layer, xla
from refine_jax.models import fork_attention as module
from refine_jax.models.fork_attention import fork_attention
from tests.models.test_attention import dense_attention, draw, side_by_side

TOKENS, NEW = 300, 3
# Before any token; at a document's start, within a window of it and of the row's end.
LAST = np.array([[-1, 0, 40, 130, 299], [99, 100, 128, 255, 256]])
SEEN = np.array([[0, 1, 41, 30, 200], [100, 1, 29, 156, 157]])


def arrays(heads, size, forks):
    new = [draw(2, forks, heads, NEW, size, seed=i) for i in range(3)]
    return (*new, *(draw(2, heads, TOKENS, size, seed=i) for i in (3, 4)))


def visible(window):
    """[B, R, S, T + S]: which of a row's tokens, and of its own, a token of a fork sees."""
    seen = np.zeros((*LAST.shape, NEW, TOKENS + NEW), bool)
    for b, r, s in np.ndindex(seen.shape[:3]):
        document = list(range(LAST[b, r] - SEEN[b, r] + 1, LAST[b, r] + 1))
        own = list(range(TOKENS, TOKENS + s + 1))
        seen[b, r, s, (document + own)[-window:]] = True
    return seen


@pytest.mark.parametrize(
    ("window", "key_blocks", "forks"),
    [(1, False, 8), (64, True, 8), (500, True, 8), (120, False, 8), (1, True, 1), (64, False, 3)],
)
def test_matches_dense_masks(monkeypatch, window, key_blocks, forks):
    """Values and gradients; also where keys go by blocks, the last of which is cut, and forks."""
    if key_blocks:
        monkeypatch.setattr(xla, "_SCORE_BYTES", 1)
    monkeypatch.setattr(module, "_FORKS", forks)
    inputs, seen = arrays(2, 4, LAST.shape[1]), visible(window)

    def plain(q, k, v, row_k, row_v):
        def behind(row, own):
            rows = jnp.broadcast_to(row[:, None], (*own.shape[:3], *row.shape[2:]))
            return jnp.concatenate([rows, own], axis=3)

        scores = jnp.einsum("brash,brath->brast", q, behind(row_k, k)) / 2
        weights = jax.nn.softmax(jnp.where(seen[:, :, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("brast,brath->brash", weights, behind(row_v, v))

    def in_place(*inputs):
        return fork_attention(*inputs, jnp.asarray(LAST), jnp.asarray(SEEN), window)

    def with_gradients(function):
        out, pullback = jax.vjp(function, *inputs)
        return out, pullback(draw(*out.shape, seed=5))

    out, gradients = jax.jit(lambda: with_gradients(in_place))()
    _, expected = jax.jit(lambda: with_gradients(plain))()
    for b, r in np.ndindex(LAST.shape):
        q, k, v, row_k, row_v = inputs
        keys, values = (
            np.concatenate([row[b], own[b, r]], axis=1) for row, own in ((row_k, k), (row_v, v))
        )
        # Queries stand at the end of the row; what is before them is not asked.
        queries = np.concatenate([np.zeros_like(row_k[b]), q[b, r]], axis=1)
        mask = np.concatenate([np.zeros((TOKENS, TOKENS + NEW), bool), seen[b, r]])
        want = dense_attention(queries[None], keys[None], values[None], mask[None])[0, :, TOKENS:]
        np.testing.assert_allclose(out[b, r], want, atol=1e-5)
    for name, got, want in zip(("q", "k", "v", "row_k", "row_v"), gradients, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5, err_msg=name)


def test_heads_side_by_side_are_heads():
    inputs = arrays(4, 6, LAST.shape[1])
    place = jnp.asarray(LAST), jnp.asarray(SEEN), 50
    attend = jax.jit(fork_attention, static_argnums=7, static_argnames="heads_per_group")
    want = attend(*inputs, *place)
    got = attend(*(side_by_side(x, 2) for x in inputs), *place, heads_per_group=2)
    np.testing.assert_allclose(got, side_by_side(want, 2), atol=1e-6)


def test_blocks_of_one_layer_are_read_as_a_whole_row_is(monkeypatch):
    """Five reaches of 11 keys in blocks of 4, and one that sees nothing; against numpy."""
    monkeypatch.setattr("refine_jax.kernels.fork_reads.xla._LAYER_BLOCK", 4)
    rng = np.random.default_rng(0)
    q = rng.standard_normal((6, 2, 3, 8), np.float32)
    k, v = rng.standard_normal((2, 2, 3, 2, 2, 11, 8), np.float32)
    first = np.array([[0, 0, 0], [2, 3, 4], [0, 0, 0], [5, 5, 5], [10, 10, 10], [1, 1, 9]])
    last = np.array([[0, 1, 2], [5, 6, 7], [10, 10, 10], [4, 5, 6], [10, 10, 10], [3, 1, 9]])
    reach = Reach(jnp.asarray(first), jnp.asarray(last))
    arrays = (jnp.asarray(x) for x in (q, k, v))
    out, _ = attend_row_of_layer(*arrays, jnp.int32(1), reach, 8**-0.5)
    keys, values = (x[1].reshape(6, 2, 11, 8) for x in (k, v))
    seen = (np.arange(11) >= first[..., None]) & (np.arange(11) <= last[..., None])
    weights = np.exp(np.einsum("bgmh,bgth->bgmt", q, keys) * 8**-0.5) * seen[:, None]
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    np.testing.assert_allclose(out, np.einsum("bgmt,bgth->bgmh", weights, values), atol=1e-5)
