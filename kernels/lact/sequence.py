"""The LaCT fast-weight op over a sequence whose tokens are spread over devices.

Every device holds C / S slots of every chunk. It reads them by itself; the sums of an update are
added up over the devices, and all of them make the same update.

The states of N chunks are as large as their tokens (one [F, d] a head against C / F times that of
keys), so that no device may keep them all. A scan over S blocks of N / S chunks keeps the state
before every block, and a device keeps the states of the one block that is its own. The backward
pass makes those of a block once more when it comes to it: N / S + S states a device.

A state is the same on all devices, but not its cotangent: each holds the part that its own slots
and its own states make, and the sum over devices is taken where the parts leave the replicated
computation (the transposes of the sums here, and of `shard_map` at the arguments).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from refine_jax.kernels.lact.reference import PLAIN, FastState, Options, Weights
from refine_jax.kernels.lact.xla import (
    apply_fast_weights,
    apply_update,
    by_heads,
    fresh_state,
    row_norms,
    update_sums,
)


def lact_sequence(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rates: jax.Array,
    momentum: jax.Array | None,
    weights: Weights,
    *,
    mask: jax.Array | None = None,
    reset: jax.Array | None = None,
    carry: FastState | None = None,
    options: Options = PLAIN,
    axis_name: str,
) -> tuple[jax.Array, FastState]:
    """`lact` of api.py over the S devices of the mesh axis `axis_name`; N a multiple of S."""
    num_batch, num_chunks = q.shape[:2]
    devices, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
    mean = None
    if momentum is not None:
        mean = _mean(momentum, mask, axis_name)
    if mask is not None:
        rates = jnp.where(mask[:, :, None, :, None, None], rates, 0.0)
    norms = row_norms(weights)
    fresh = jax.tree.map(
        lambda w: jnp.broadcast_to(w, (num_batch, *w.shape[-3:])).astype(jnp.float32),
        fresh_state(weights, momentum is not None, options),
    )
    read, sums = (by_heads(f, q, weights) for f in (apply_fast_weights, update_sums))

    # Apart from the sums: its derivative needs their values, and they would be computed again.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def next_state(state, step, mean):
        return apply_update(state, step, mean, norms, options)

    def chunk_step(state, chunk):
        q, k, v, rates, mean, again = chunk
        if again is not None:
            again = again[:, None, None, None]
            state = jax.tree.map(lambda a, b: jnp.where(again, a, b), fresh, state)
        step = lax.psum(sums(state.weights, k, v, rates), axis_name)
        return next_state(state, step, mean), (read(state.weights, q), state)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(state, chunks):
        return lax.scan(chunk_step, state, chunks)

    def block_step(carry, inputs):
        state, own = carry
        number, chunks = inputs
        state, (out, states) = block(state, chunks)
        # Outside of what is computed again: nothing of `own` is then kept for every block.
        own = jax.tree.map(lambda a, b: jnp.where(number == index, a, b), states, own)
        return (state, own), out

    def cut(x):
        """[B, N, ...] -> [S, N / S, B, ...]."""
        x = jnp.moveaxis(x, 1, 0)
        return x.reshape(devices, -1, *x.shape[1:])

    chunks = jax.tree.map(cut, (q, k, v, rates, mean, reset))
    state = fresh if carry is None else carry
    own = jax.tree.map(lambda x: jnp.zeros((num_chunks // devices, *x.shape), x.dtype), state)
    (_, own), out = lax.scan(block_step, (state, own), (jnp.arange(devices), chunks))
    out = jnp.moveaxis(out.reshape(num_chunks, *out.shape[2:]), 0, 1)
    return out, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), own)


def _mean(momentum, mask, axis_name):
    """Mean momentum [B, N, H] of the tokens of every chunk, over all devices."""
    if mask is None:
        return lax.pmean(momentum.mean(-1), axis_name)
    live = mask[:, :, None, :]
    total = jnp.where(live, momentum, 0.0).sum(-1), live.sum(-1)
    total, count = lax.psum(total, axis_name)
    return total / jnp.maximum(count, 1)
