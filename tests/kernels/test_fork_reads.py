"""Kernels that read traces for forks, interpreted, against loops over queries in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_jax.kernels.fork_reads import ForkRows, attend_windows, read_weights

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
