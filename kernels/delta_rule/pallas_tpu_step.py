"""One token of the delta rule in a Pallas kernel for TPUs: every state is read and written once.

Static estimates of one step for 8 forks of 16 heads, 128 x 128 (16.8 MB of states, in and out;
HBM floor at the published bandwidth / kernel / XLA): see `experiments/tpu_kernels.py`, case
`delta_decode`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from refine_jax.kernels.delta_rule.xla import delta_step_xla

_STATE_BYTES = 2**20  # of one grid step: long enough to hide the start of a transfer


def _kernel(q, k, v, beta, *refs):
    """S states [S, K, V]; q and k [1, K, S], a column a state; the others [S, V], a row a state.

    Columns and rows broadcast over a state as they are; beta and log_decay are equal along a row.
    """
    *log_decay, state, out, new = refs
    values = v[...].astype(jnp.float32)
    decay = [jnp.exp(x[...]) for x in log_decay]
    outs = []
    for i in range(state.shape[0]):
        key, row = k[0, :, i : i + 1], slice(i, i + 1)
        s = state[i]
        for x in decay:
            s = s * x[row]
        error = values[row] - jnp.sum(s * key, axis=0, keepdims=True)
        s = s + key * (beta[row, :] * error)
        new[i] = s
        outs.append(jnp.sum(s * q[0, :, i : i + 1], axis=0, keepdims=True))
    out[...] = jnp.concatenate(outs).astype(out.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _step(q, k, v, beta, log_decay, state, scale):
    group = v.shape[1] // k.shape[1]
    key_dim, value_dim = state.shape[2:]
    num_states = state.shape[0] * state.shape[1]
    count = max(8, _STATE_BYTES // (4 * key_dim * value_dim) // 8 * 8)
    count = min(count, num_states)
    blocks = pl.cdiv(num_states, count)

    def columns(x):  # [B, H, K] -> [blocks, K, count]
        x = jnp.repeat(x.astype(jnp.float32), group, axis=1).reshape(num_states, key_dim)
        x = jnp.pad(x, ((0, blocks * count - num_states), (0, 0)))
        return jnp.swapaxes(x.reshape(blocks, count, key_dim), 1, 2)

    def rows(x):  # [B, Hv] or [B, Hv, V] -> [B * Hv, V]
        x = x.reshape(num_states, -1)
        return jnp.broadcast_to(x, (num_states, value_dim))

    gates = [rows(x.astype(jnp.float32)) for x in (beta, log_decay) if x is not None]
    column = pl.BlockSpec((1, key_dim, count), lambda i: (i, 0, 0))
    row = pl.BlockSpec((count, value_dim), lambda i: (i, 0))
    states = pl.BlockSpec((count, key_dim, value_dim), lambda i: (i, 0, 0))
    out, new = pl.pallas_call(
        _kernel,
        grid=(blocks,),
        in_specs=[column, column, row, *[row] * len(gates), states],
        out_specs=[row, states],
        out_shape=[
            jax.ShapeDtypeStruct((num_states, value_dim), v.dtype),
            jax.ShapeDtypeStruct((num_states, key_dim, value_dim), jnp.float32),
        ],
        input_output_aliases={3 + len(gates): 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=False if jax.default_backend() == "tpu" else pltpu.InterpretParams(),
        name="delta_step",
    )(
        columns(q.astype(jnp.float32) * scale),
        columns(k),
        rows(v),
        *gates,
        state.reshape(num_states, key_dim, value_dim),
    )
    return out.reshape(v.shape), new.reshape(state.shape)


def _step_forward(*args):
    *arrays, scale = args
    return _step(*arrays, scale), arrays


def _step_backward(scale, arrays, cotangents):
    def step(*arrays):
        *tokens, state = arrays
        return delta_step_xla(*tokens, state=state, scale=scale)

    return jax.vjp(step, *arrays)[1](cotangents)


_step.defvjp(_step_forward, _step_backward)


def delta_step_pallas_tpu(q, k, v, beta, log_decay, *, state, scale):
    """`delta_step` of api.py; the gradient is that of XLA's form."""
    return _step(q, k, v, beta, log_decay, state, scale)
