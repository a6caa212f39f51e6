"""What forks read of rows, each implementation against loops over queries in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_jax.kernels.fork_reads import (
    ROW_IMPLEMENTATIONS,
    WEIGHT_IMPLEMENTATIONS,
    WINDOW_IMPLEMENTATIONS,
    attend_row,
    attend_windows,
    read_weights,
)
from refine_jax.kernels.fork_reads.specs import ROW_SPECS, TRACE_SPECS


def low(spec):
    """Whether a spec is tried in bfloat16."""
    return spec.name in ("blocks", "two_heads")


def softmax_of_seen(query, keys, values):
    """Of one query [h], keys and values [n, h]."""
    scores = keys @ query / np.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


@pytest.mark.parametrize("spec", TRACE_SPECS, ids=lambda spec: spec.name)
def test_windows(spec):
    dtype = "bfloat16" if low(spec) else "float32"
    arguments = spec.window_arguments(dtype)
    found = {
        name: np.float64(
            jax.jit(functools.partial(attend_windows, implementation=name), static_argnums=(4, 5))(
                *arguments
            )
        )
        for name in WINDOW_IMPLEMENTATIONS
    }
    new, row_k, row_v, where, window, heads = arguments
    q, k, v, row_k, row_v = (
        np.float64(x).reshape(*x.shape[:-1], heads, -1) for x in (*new, row_k, row_v)
    )
    want = np.zeros(q.shape)
    for fork, group, token, head in np.ndindex(want.shape[:-1]):
        last, row = int(where.last[fork]), int(where.row[fork])
        before = max(min(window - 1 - token, int(where.seen[fork])), 0)
        seen = slice(last + 1 - before, last + 1)
        own = slice(max(token + 1 - window, 0), token + 1)
        keys, values = (
            np.concatenate([x[1, row, group, seen, head], y[fork, group, own, head]])
            for x, y in ((row_k, k), (row_v, v))
        )
        want[fork, group, token, head] = softmax_of_seen(q[fork, group, token, head], keys, values)
    for name, got in found.items():
        tolerance = 2e-2 if low(spec) else 2e-5
        np.testing.assert_allclose(got, want.reshape(got.shape), atol=tolerance, err_msg=name)


@pytest.mark.parametrize("spec", TRACE_SPECS[1:3], ids=lambda spec: spec.name)
def test_weights(spec):
    q, weights, where = spec.weight_arguments("bfloat16" if low(spec) else "float32")
    found = {
        name: np.float64(
            jax.jit(functools.partial(read_weights, implementation=name))(q, weights, where)
        )
        for name in WEIGHT_IMPLEMENTATIONS
    }
    for fork in range(len(q)):
        w0, w1, w2 = (
            np.float64(w[1, where.row[fork], where.chunk[fork]]).swapaxes(-1, -2) for w in weights
        )
        x = np.float64(q[fork])
        gate = x @ w0
        want = gate / (1 + np.exp(-gate)) * (x @ w2) @ w1
        for name, got in found.items():
            tolerance = 3e-2 if low(spec) else 2e-5
            np.testing.assert_allclose(got[fork], want, atol=tolerance, err_msg=name)


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


@pytest.mark.parametrize("spec", ROW_SPECS, ids=lambda spec: spec.name)
def test_rows(spec):
    """Forward and backward; some queries see nothing, some blocks of keys are seen by none."""
    dtype = "bfloat16" if low(spec) else "float32"
    arrays, reach = spec.arguments(dtype)
    q, k, v = arrays
    random = np.random.default_rng(4)
    d_out = jnp.asarray(random.standard_normal(q.shape), dtype)
    d_log = jnp.asarray(random.standard_normal(q.shape[:-1]), jnp.float32)

    def run(name, arrays, reach):
        def attend(*arrays):
            return attend_row(*arrays, reach, spec.scale, 600, implementation=name)

        out, pullback = jax.vjp(attend, *arrays)
        return *out, *pullback((d_out.astype(jnp.float32), d_log))

    found = {
        name: jax.jit(run, static_argnums=0)(name, arrays, reach) for name in ROW_IMPLEMENTATIONS
    }
    slot = np.arange(k.shape[2])
    want_k, want_v = np.zeros(k.shape), np.zeros(v.shape)
    tolerance = 4e-2 if low(spec) else 1e-4
    for j, b, g in np.ndindex(q.shape[:3]):
        seen = (slot >= reach.first[j, b, :, None]) & (slot <= reach.last[j, b, :, None])
        some = seen.any(1)
        query, cotangent, of_log = (np.float64(x[j, b, g])[some] for x in (q, d_out, d_log))
        keys, values = np.float64(k[b, g]), np.float64(v[b, g])
        *want, d_k, d_v = row_attention(
            query, keys, values, seen[some], spec.scale, cotangent, of_log
        )
        for name, got in found.items():
            assert not got[0][j, b, g][~some].any()
            for x, y in zip(got[:3], want, strict=True):
                x = np.float64(x[j, b, g])[some]
                np.testing.assert_allclose(x, y, atol=tolerance, err_msg=name)
        want_k[b, g] += d_k
        want_v[b, g] += d_v
    for name, (*_, d_k, d_v) in found.items():
        assert not d_k[:, :, -128:].any()  # no query sees so far
        for x, y in ((d_k, want_k), (d_v, want_v)):
            np.testing.assert_allclose(np.float64(x), y, atol=tolerance, err_msg=name)


def test_errors_name_what_was_got():
    spec = TRACE_SPECS[0]
    with pytest.raises(ValueError, match=r"attend_windows must be None or one of .*'nothing'"):
        attend_windows(*spec.window_arguments(), implementation="nothing")
