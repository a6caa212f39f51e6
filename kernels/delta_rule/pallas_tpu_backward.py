"""The backward pass of the delta rule on TPU: the forward walk in reverse.

With dS the cotangent of the state after a chunk, z that of the error R = V - f K S, and the names
of `pallas_tpu_math`:

    dU = scale P^T dO + (e K) dS          z = Y^T (beta dU)          dV = z
    dS <- f_C dS + scale (f Q)^T dO - (f K)^T z

Only these three products a chunk form a chain. The scores are computed again; W, Y^T and the states
before every chunk come from the forward pass.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refine_jax.kernels.delta_rule import pallas_tpu_math as chunk_math
from refine_jax.kernels.delta_rule.pallas_tpu_forward import (
    DeltaPlan,
    column_spec,
    load_heads,
    per_value_head,
    read_keys,
    read_scalars,
    rows_spec,
    run,
    state_spec,
    states_spec,
    store_heads,
    times,
)
from refine_jax.kernels.delta_rule.pallas_tpu_math import matmul

_LANES = 128


def gradient_fields(plan: DeltaPlan) -> tuple[str, ...]:
    """Names of the per-token gradients that the kernel returns, for `unpack_gradients`.

    cumulative: for the log of the decay since the chunk's start; to_end: for the log of that until
    its end.
    """
    return ("beta", "cumulative", "to_end") if "log_decay" in plan.fields else ("beta",)


def gradient_rows(plan: DeltaPlan) -> int:
    """Rows of the packed per-token gradients of a program."""
    return -(-len(gradient_fields(plan)) * plan.heads // 8) * 8


def _backward_kernel(plan: DeltaPlan, **refs):
    """Walk back over the chunks of a block."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        refs["d_state"][...] = refs["d_final"][0]

    for c in reversed(range(plan.chunks)):
        _backward_chunk(plan, refs, c)

    @pl.when(pl.program_id(2) == plan.grid[2] - 1)
    def _():
        refs["d_initial"][0] = refs["d_state"][...]


def _backward_chunk(plan: DeltaPlan, refs, c: int):
    """Gradients of chunk c, and the cotangent of the state before it.

    Matrices [C, C] lead with the writing token i, and have the reading token r >= i along lanes:
    the products of the walk then need no transposition. `turned` marks the others.
    """
    dtype, chunk, own = plan.dtype, plan.chunk, range(c, c + 1)
    writer, reader = chunk_math.index_matrices(chunk)
    columns, rows = read_scalars(plan, refs, own)
    kept, beta = columns.from_start, columns.beta
    last = None if kept is None else kept[:, -1:]
    turned_decay = chunk_math.decay_matrix(columns, rows)
    decay = None if turned_decay is None else jnp.swapaxes(turned_decay, 1, 2)
    keys = read_keys(plan, refs, own)
    operands = keys.operands(plan)
    scores = per_value_head(plan, matmul(keys.k, operands, "nt", dtype))
    operands = per_value_head(plan, operands)
    k = operands[:, :chunk]
    kk = jnp.where(writer < reader, times(scores[..., :chunk], decay), 0.0)
    w = load_heads(plan, refs["w"], plan.value_dim, own)
    turned_inverse = load_heads(plan, refs["inverse"], chunk, own)
    u = (beta * w).astype(dtype)
    state, d_state = refs["states"][0, c], refs["d_state"][...]

    # The walk: dU and dS are sums of two products, where they can be one of joined operands.
    k_end = times(k, columns.to_end).astype(dtype)
    before = times(d_state, last)
    if plan.has_q:
        q = operands[:, chunk:]
        p = jnp.where(writer <= reader, times(scores[..., chunk:], decay), 0.0) * plan.scale
        d_out = load_heads(plan, refs["d_out"], plan.value_dim, own)
        before += plan.scale * matmul(times(q, kept), d_out, "tn", dtype)
        left = jnp.concatenate([p.astype(dtype), k_end], axis=2)
        right = jnp.concatenate([d_out, d_state.astype(dtype)], axis=1)
        d_u = matmul(left, right, "nn", dtype)
    else:
        d_u = matmul(k_end, d_state, "nn", dtype)
    z = matmul(turned_inverse, beta * d_u, "nn", dtype)
    before -= matmul(times(k, kept), z, "tn", dtype)
    if "d_states" in refs:
        before += refs["d_states"][0, c]
    refs["d_state"][...] = before
    z_low = z.astype(dtype)

    # What hangs on it.
    by_beta = jnp.where(writer < reader, -matmul(w, z_low, "nt", dtype), 0.0)
    d_kk = times(by_beta * beta, decay)
    turned_d_kk = jnp.where(writer > reader, -matmul(z_low, u, "nt", dtype), 0.0)
    turned_d_kk = times(turned_d_kk, turned_decay)
    d_scores, sources = (d_kk + turned_d_kk).astype(dtype), k
    errors = jnp.concatenate([z_low, d_out], axis=1) if plan.has_q else z_low
    recalled = matmul(errors, state, "nt", dtype)
    to_k = -times(recalled[:, :chunk], kept)
    written = times(matmul(u, d_state, "nt", dtype), columns.to_end)
    if plan.has_q:
        d_p = jnp.where(writer <= reader, matmul(u, d_out, "nt", dtype), 0.0)
        d_qk = (times(d_p, decay) * plan.scale).astype(dtype)
        turned_d_p = jnp.where(writer >= reader, matmul(d_out, u, "nt", dtype), 0.0)
        turned_d_qk = times(turned_d_p, turned_decay) * plan.scale
        to_q = times(recalled[:, chunk:], kept) * plan.scale
        d_q = per_key_head(plan, to_q + matmul(turned_d_qk, k, "nn", dtype))
        if plan.normalize:
            d_q = chunk_math.normalize_gradient(d_q, keys.q, keys.q_scale)
        store_heads(plan, refs["d_q"], d_q, c)
        d_scores, sources = jnp.concatenate([d_scores, d_qk], axis=2), operands
    d_k = per_key_head(plan, to_k + written + matmul(d_scores, sources, "nn", dtype))
    if plan.normalize:
        d_k = chunk_math.normalize_gradient(d_k, keys.k, keys.k_scale)
    store_heads(plan, refs["d_k"], d_k, c)
    store_heads(plan, refs["d_v"], z, c)

    # Per-token gradients: parts that come as columns [G, C, 1] and parts that come as rows.
    def over_lanes(x):
        return jnp.sum(x, axis=2, keepdims=True)

    of_beta = by_beta * kk
    along, across = [over_lanes(d_u * w) + over_lanes(of_beta)], [None]
    if "log_decay" in plan.fields:
        # For the log of a decay: its gradient times the decay is that of the product it is in.
        between = of_beta * beta
        cumulative = over_lanes(to_k * k)
        if plan.has_q:
            between += d_p * p
            cumulative += over_lanes(to_q * q)
        through = jnp.sum(over_lanes(state * d_state), axis=1, keepdims=True)
        at_end = lax.broadcasted_iota(jnp.int32, cumulative.shape, 1) == chunk - 1
        cumulative += jnp.where(at_end, through * last, 0.0) - over_lanes(between)
        along += [cumulative, over_lanes(written * k)]
        across += [jnp.sum(between, axis=1, keepdims=True), None]
    refs["d_rows"][0, 0, :, plan.token_slice(c)] = _pack_gradients(plan, along, across)


def _pack_gradients(plan: DeltaPlan, along: list[jax.Array], across: list[jax.Array | None]):
    """Sums [R, C] of columns [G, C, 1] and rows [G, 1, C] (None: nothing), a pair a field."""
    lane = lax.broadcasted_iota(jnp.int32, (plan.chunk, _LANES), 1)
    columns = jnp.zeros((plan.chunk, _LANES), jnp.float32)
    for field, column in enumerate(along):
        for head in range(plan.heads):
            columns = jnp.where(lane == field * plan.heads + head, column[head], columns)
    packed = columns.T[: gradient_rows(plan)]
    if all(row is None for row in across):
        return packed
    nothing = jnp.zeros((1, plan.chunk), jnp.float32)
    lines = [nothing if row is None else row[h] for row in across for h in range(plan.heads)]
    lines += [nothing] * (packed.shape[0] - len(lines))
    return packed + jnp.concatenate(lines, axis=0)


def per_key_head(plan: DeltaPlan, x: jax.Array) -> jax.Array:
    """Sums over the value heads of every key head: [value heads, ...] -> [key heads, ...]."""
    return x.reshape(-1, plan.group, *x.shape[1:]).sum(1) if plan.group > 1 else x


def backward(plan: DeltaPlan, q, k, rows, states, w, inverse, d_out, d_final, d_states) -> dict:
    """Run the backward kernel.

    Arguments as in `pallas_tpu_forward.forward`, with its w, inverse and states; cotangents d_out
    [B, T, Hv V] (with q), d_final [B, Hv, K, V] and d_states [B, T / C, Hv, K, V] or None. Returns
    a dict of d_q, d_k, d_v, d_initial like their primals, and d_rows [B, Hv / G, R, T] of
    `gradient_fields`.
    """
    keys, values = plan.key_heads * plan.key_dim, plan.heads * plan.value_dim
    steps = plan.grid[2]

    def reverse(t):
        return steps - 1 - t

    by_token = functools.partial(column_spec, plan, order=reverse)
    inputs = {"k": (k, by_token(keys))}
    if plan.has_q:
        inputs |= {"q": (q, by_token(keys)), "d_out": (d_out, by_token(values))}
    inputs |= {
        "rows": (rows, rows_spec(plan, plan.row_count, reverse)),
        "states": (states, states_spec(plan, reverse)),
        "w": (w, by_token(values)),
        "inverse": (inverse, by_token(plan.heads * plan.chunk)),
        "d_final": (d_final, state_spec(plan)),
    }
    if d_states is not None:
        inputs["d_states"] = (d_states, states_spec(plan, reverse))

    outputs = {}
    if plan.has_q:
        outputs["d_q"] = (q.shape, q.dtype, by_token(keys))
    outputs |= {
        "d_k": (k.shape, k.dtype, by_token(keys)),
        "d_v": (w.shape, w.dtype, by_token(values)),
        "d_rows": (
            (plan.batch, plan.grid[1], gradient_rows(plan), plan.tokens),
            jnp.float32,
            rows_spec(plan, gradient_rows(plan), reverse),
        ),
        "d_initial": (d_final.shape, jnp.float32, state_spec(plan)),
    }
    scratch = {"d_state": pltpu.VMEM((plan.heads, plan.key_dim, plan.value_dim), jnp.float32)}
    return run(_backward_kernel, plan, "delta_rule_backward", inputs, outputs, scratch)


def unpack_gradients(plan: DeltaPlan, d_rows: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Gradients of beta and log_decay, [B, T, Hv], from the kernel's d_rows."""
    fields = gradient_fields(plan)
    batch, groups, _, tokens = d_rows.shape
    d_rows = d_rows[:, :, : len(fields) * plan.heads]
    d_rows = d_rows.reshape(batch, groups, len(fields), plan.heads, -1, plan.chunk)
    found = {name: d_rows[:, :, i] for i, name in enumerate(fields)}

    def per_token(x):
        return jnp.swapaxes(x.reshape(batch, plan.value_heads, tokens), 1, 2)

    d_log = None
    if "cumulative" in found:
        axis = found["cumulative"].ndim - 1
        since = lax.cumsum(found["cumulative"], axis=axis, reverse=True)
        until = lax.cumsum(found["to_end"], axis=axis) - found["to_end"]
        d_log = per_token(since + until)
    return per_token(found["beta"]), d_log
