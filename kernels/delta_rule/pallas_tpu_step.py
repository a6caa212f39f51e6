"""One token of the delta rule in a Pallas kernel for TPUs: every state is read and written once.

Static estimates of one step, 16 heads of 128 x 128 (`experiments/tpu_kernels.py`, cases
delta_decode and delta_decode_64), in microseconds; the floor is states in and out at the published
bandwidth.

    forks  chip  floor  kernel  XLA
    8      v6e      10      15   47
    64     v6e      82     105  291
    8      v5e      21      26   66
    64     v5e     165     190  432

Tried: q and k transposed before the kernel, 2 us more for 8 forks; blocks of half or twice the
states, within 6 %.

It has not run on a TPU: it is tested in interpret mode and compiled ahead of time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from refine_jax.kernels import tpu
from refine_jax.kernels.delta_rule.xla import delta_step_xla
from refine_jax.kernels.numerics import pad_axes

_STATE_BYTES = 2**20  # of one grid step: long enough to hide the start of a transfer


def _kernel(scale, *, q, k, v, beta, state, out, new, log_decay=None):
    """S states [S, K, V]; q and k [S, K], the others [S, V], a row a state.

    beta and log_decay are equal along a row.
    """
    # Columns [K, 1] and rows [1, V] broadcast over a state as they are.
    queries = (q[...].astype(jnp.float32) * scale).T
    keys = k[...].astype(jnp.float32).T
    values = v[...].astype(jnp.float32)
    decay = None if log_decay is None else jnp.exp(log_decay[...])
    outs = []
    for i in range(state.shape[0]):
        key, row = keys[:, i : i + 1], slice(i, i + 1)
        s = state[i]
        if decay is not None:
            s = s * decay[row]
        error = values[row] - jnp.sum(s * key, axis=0, keepdims=True)
        s = s + key * (beta[row, :] * error)
        new[i] = s
        outs.append(jnp.sum(s * queries[:, i : i + 1], axis=0, keepdims=True))
    out[...] = jnp.concatenate(outs).astype(out.dtype)


def _block_count(num_states: int, state_bytes: int) -> tuple[int, int]:
    """States of one grid step, and the number of states padded to a multiple of it."""
    most = max(8, _STATE_BYTES // state_bytes // 8 * 8)
    if num_states <= most:
        return num_states, num_states
    padded = -(-num_states // 8) * 8
    return next(n for n in range(most, 0, -8) if padded % n == 0), padded


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _step(q, k, v, beta, log_decay, state, scale):
    group = v.shape[1] // k.shape[1]
    num_states, key_dim, value_dim = state.shape[0] * state.shape[1], *state.shape[2:]
    count, padded = _block_count(num_states, 4 * key_dim * value_dim)

    def flat(x, *shape):  # [B, Hv, ...] -> [padded, ...]
        return pad_axes(x.reshape(num_states, *shape), {0: (0, padded - num_states)})

    def lanes(x):  # [B, Hv] -> [padded, V]
        return jnp.broadcast_to(flat(x.astype(jnp.float32), 1), (padded, value_dim))

    key, row = (pl.BlockSpec((count, size), lambda i: (i, 0)) for size in (key_dim, value_dim))
    states = pl.BlockSpec((count, key_dim, value_dim), lambda i: (i, 0, 0))
    q, k = (flat(jnp.repeat(x, group, axis=1), key_dim) for x in (q, k))
    inputs = {"q": (q, key), "k": (k, key), "v": (flat(v, value_dim), row)}
    gates = {"beta": beta, "log_decay": log_decay}
    inputs |= {name: (lanes(x), row) for name, x in gates.items() if x is not None}
    inputs["state"] = flat(state, key_dim, value_dim), states
    outputs = {
        "out": ((padded, value_dim), v.dtype, row),
        "new": ((padded, key_dim, value_dim), jnp.float32, states),
    }
    found = tpu.call_kernel(
        functools.partial(_kernel, scale),
        "delta_step",
        (padded // count,),
        inputs,
        outputs,
        parallel=1,
        vmem=None,
        in_place={"state": "new"},
    )
    out, new = found["out"], found["new"]
    return out[:num_states].reshape(v.shape), new[:num_states].reshape(state.shape)


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
