"""Kernels that read traces for forks, interpreted, against loops over queries in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_jax.kernels.fork_reads import (
    ForkRows,
    Reach,
    attend_row,
    attend_row_backward,
    attend_windows,
    read_weights,
)

LAYERS, ROWS = 2, 2


def draw(*shape, seed, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def places(num_tokens):
    """Forks before any token, after few, deep in the row, in a later document, at its end."""
    last = [-1, 0, 5, num_tokens // 2 + 3, num_tokens - 9, num_tokens - 1]
    seen = [0, 1, 6, num_tokens // 2 + 4, 3, num_tokens]
    row, chunk = [0, 1, 1, 0, 1, 0], [0, 0, 2, 1, 1, 2]
    return ForkRows(*(jnp.asarray(x, jnp.int32) for x in (1, row, last, seen, chunk)))


def softmax_of_seen(query, keys, values):
    """Of one query [h], keys and values [n, h]."""
    scores = keys @ query / np.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


@pytest.mark.parametrize(
    ("heads", "num_tokens", "window", "count", "dtype"),
    [
        (2, 1280, 2048, 5, "float32"),
        (2, 1024, 300, 5, "bfloat16"),
        (4, 1280, 300, 1, "float32"),
        (1, 1024, 512, 9, "float32"),
        (2, 256, 2, 5, "float32"),
    ],
)
def test_windows(heads, num_tokens, window, count, dtype):
    where = places(num_tokens)
    forks, groups, size = len(where.row), 3, 128
    q, k, v = (draw(forks, groups, count, size, seed=i, dtype=dtype) for i in range(3))
    row_k, row_v = (
        draw(LAYERS, ROWS, groups, num_tokens, size, seed=i, dtype=dtype) for i in (3, 4)
    )
    got = np.float64(
        jax.jit(attend_windows, static_argnums=(4, 5))(
            (q, k, v), row_k, row_v, where, window, heads
        )
    )
    q, k, v, row_k, row_v = (
        np.float64(x).reshape(*x.shape[:-1], heads, -1) for x in (q, k, v, row_k, row_v)
    )
    want = np.zeros(q.shape)
    for fork, group, new, head in np.ndindex(want.shape[:-1]):
        last, row = int(where.last[fork]), int(where.row[fork])
        before = max(min(window - 1 - new, int(where.seen[fork])), 0)
        seen = slice(last + 1 - before, last + 1)
        own = slice(max(new + 1 - window, 0), new + 1)
        keys, values = (
            np.concatenate([x[1, row, group, seen, head], y[fork, group, own, head]])
            for x, y in ((row_k, k), (row_v, v))
        )
        want[fork, group, new, head] = softmax_of_seen(q[fork, group, new, head], keys, values)
    np.testing.assert_allclose(
        got, want.reshape(got.shape), atol=2e-5 if dtype == "float32" else 2e-2
    )


@pytest.mark.parametrize(("count", "dtype"), [(1, "float32"), (5, "float32"), (5, "bfloat16")])
def test_weights(count, dtype):
    where = places(1280)
    forks, heads, size, hidden, chunks = len(where.row), 2, 128, 256, 3
    q = draw(forks, heads, count, size, seed=0, dtype=dtype)
    shapes = (hidden, size), (size, hidden), (hidden, size)
    weights = [
        draw(LAYERS, ROWS, chunks, heads, *shape, seed=i) / shape[1] ** 0.5
        for i, shape in enumerate(shapes)
    ]
    got = np.float64(jax.jit(read_weights)(q, weights, where))
    for fork in range(forks):
        w0, w1, w2 = (
            np.float64(w[1, where.row[fork], where.chunk[fork]]).swapaxes(-1, -2) for w in weights
        )
        x = np.float64(q[fork])
        gate = x @ w0
        want = gate / (1 + np.exp(-gate)) * (x @ w2) @ w1
        np.testing.assert_allclose(got[fork], want, atol=2e-5 if dtype == "float32" else 3e-2)


def row_attention(q, k, v, seen, scale, d_out, d_log):
    """Output, log of the denominator, and gradients, of one head's queries [M, L] in float64.

    seen: [M, T] bool, a key at least for every query.
    """
    scores = np.where(seen, scale * q @ k.T, -np.inf)
    log_total = np.logaddexp.reduce(scores, axis=1)
    weights = np.exp(scores - log_total[:, None])
    d_weights = d_out @ v.T
    mean = np.sum(weights * d_weights, axis=1, keepdims=True)
    d_scores = scale * weights * (d_weights - mean + d_log[:, None])
    return weights @ v, log_total, d_scores @ k, d_scores.T @ q, weights.T @ d_out


@pytest.mark.parametrize(
    ("blocks", "rows", "count", "num_tokens", "dtype"),
    [(1, 2, 20, 1280, "float32"), (3, 1, 136, 1024, "float32"), (2, 2, 16, 1536, "bfloat16")],
)
def test_rows(blocks, rows, count, num_tokens, dtype):
    """Forward and backward; some queries see nothing, some blocks of keys are seen by none."""
    random, groups, size, scale = np.random.default_rng(0), 3, 128, 0.1
    shape = blocks, rows, groups, count
    last = random.integers(-1, num_tokens - 300, (blocks, rows, count))
    first = last - random.integers(-1, 600, last.shape)
    reach = Reach(*(jnp.asarray(x, jnp.int32) for x in (first, last)))
    q, d_out = (draw(*shape, size, seed=i, dtype=dtype) for i in (0, 1))
    k, v = (draw(rows, groups, num_tokens, size, seed=i, dtype=dtype) for i in (2, 3))
    d_log = draw(*shape, seed=4)
    out, log_total = jax.jit(attend_row, static_argnums=4)(q, k, v, reach, scale)
    rest = jnp.sum(d_out.astype(jnp.float32) * out, -1) - d_log
    gradients = jax.jit(attend_row_backward, static_argnums=4)(
        q, k, v, reach, scale, log_total, d_out.astype(jnp.float32), rest
    )
    assert not gradients[1][:, :, -128:].any()  # no query sees so far

    slot = np.arange(num_tokens)
    want_k, want_v = np.zeros(k.shape), np.zeros(v.shape)
    tolerance = 1e-4 if dtype == "float32" else 4e-2
    for j, b, g in np.ndindex(shape[:3]):
        seen = (slot >= first[j, b, :, None]) & (slot <= last[j, b, :, None])
        some = seen.any(1)
        assert not out[j, b, g][~some].any()
        arrays = [np.float64(x[j, b, g])[some] for x in (q, d_out, d_log)]
        keys, values = np.float64(k[b, g]), np.float64(v[b, g])
        want = row_attention(arrays[0], keys, values, seen[some], scale, *arrays[1:])
        for x, y in zip((out, log_total, gradients[0]), want[:3], strict=True):
            np.testing.assert_allclose(np.asarray(x[j, b, g])[some], y, atol=tolerance)
        want_k[b, g] += want[3]
        want_v[b, g] += want[4]
    for x, y in zip(gradients[1:], (want_k, want_v), strict=True):
        np.testing.assert_allclose(np.float64(x), y, atol=tolerance)
