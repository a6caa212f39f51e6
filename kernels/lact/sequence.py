"""The LaCT fast-weight op over a sequence whose tokens are spread over devices.

Every device comes with C / S slots of every chunk. Heads do not know of each other, so that as many
devices as divide the heads exchange slots for heads first: devices in groups of G = gcd(S, H) that
follow each other then hold H / G heads of G C / S slots.

M = S / G groups share the slots of a chunk. A device reads its own; the sums of an update are added
up over the groups, and every group makes the same update. That moves two numbers for every weight
and group, and exchanged slots are far fewer numbers than weights.

The states of N chunks are as large as their tokens (one [F, d] a head against C / F times that of
keys), so that no device may keep those of all chunks and heads. A scan over M blocks of N / M
chunks keeps the state before every block, and a group keeps the states of the one block that is its
own. The backward pass makes those of a block once more when it comes to it. In the end the devices
of a group exchange heads for chunks. The update after the last chunk is made for nothing.

A state is the same in all groups, but not its cotangent: each holds the part that its own slots and
its own states make, and the sum over groups is taken where the parts leave the replicated
computation (the transposes of the sums here, and of `shard_map` at the arguments).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.kernels import sequence
from refine_jax.kernels.lact.reference import FastState
from refine_jax.kernels.lact.xla import (
    apply_fast_weights,
    by_heads,
    chunk_updates,
    mask_slots,
    update_sums,
)
from refine_jax.kernels.numerics import pad_axes


def lact_sequence(
    q, k, v, rates, momentum, weights, *, mask, reset, options, axis_name
) -> tuple[jax.Array, FastState]:
    """Run `lact` of api.py over the S devices of the mesh axis `axis_name`.

    Arrays are those of a device: q [B, N, H, C / S, d] and so on, N a multiple of S.
    """
    size, heads = lax.axis_size(axis_name), q.shape[2]
    group = math.gcd(size, heads)
    members = [list(range(first, first + group)) for first in range(0, size, group)]
    exchange = functools.partial(sequence.exchange, axis_name=axis_name, members=members)

    def own_heads(x):
        """Of arrays [H, rows, columns] that are the same on all devices."""
        start = lax.axis_index(axis_name) % group * (heads // group)
        return lax.dynamic_slice_in_dim(x, start, heads // group)

    if group > 1:
        q, k, v, rates, momentum = exchange((q, k, v, rates, momentum), split=2, join=3)
        weights = jax.tree.map(own_heads, weights)
        if mask is not None:
            mask = lax.all_gather(mask, axis_name, axis_index_groups=members, axis=2, tiled=True)
    out, states = _shared_chunks(
        *(q, k, v, rates, momentum, weights),
        mask=mask,
        reset=reset,
        options=options,
        axis_name=axis_name,
        num_groups=size // group,
    )
    if group > 1:
        out = exchange(out, split=3, join=2)
        states = exchange(states, split=1, join=2)
    return out, states


def _shared_chunks(
    q, k, v, rates, momentum, weights, *, mask, reset, options, axis_name, num_groups
):
    """The op on the slots of one of M groups of devices, with the states of its N / M chunks."""
    num_chunks = q.shape[1]
    group = lax.axis_size(axis_name) // num_groups
    own_block = lax.axis_index(axis_name) // group
    # Devices that hold other slots of the same heads.
    same_heads = [list(range(first, num_groups * group, group)) for first in range(group)]
    total = functools.partial(lax.psum, axis_name=axis_name, axis_index_groups=same_heads)
    if mask is None:
        mask = jnp.ones((*q.shape[:2], q.shape[3]), bool)
    rates, mean = mask_slots(rates, momentum, mask, total)
    read, own_sums = (by_heads(f, q, weights) for f in (apply_fast_weights, update_sums))

    def sums(*arrays):
        return total(own_sums(*arrays))

    state, update = chunk_updates(sums, weights, q.shape[0], mean is not None, options)

    def chunk_step(state, chunk):
        q, *tokens = chunk
        return update(state, tokens), (read(state.weights, q), state)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(state, chunks):
        return lax.scan(chunk_step, state, chunks)

    def block_step(carry, inputs):
        state, own = carry
        number, chunks = inputs
        state, (out, states) = block(state, chunks)
        # Outside of what is computed again: nothing of `own` is then kept for every block.
        own = jax.tree.map(lambda a, b: jnp.where(number == own_block, a, b), states, own)
        return (state, own), out

    def cut(x):
        """[B, N, ...] -> [M, N / M, B, ...]."""
        x = jnp.moveaxis(x, 1, 0)
        return x.reshape(num_groups, -1, *x.shape[1:])

    # Whether the next chunk starts a document; nothing follows the last one.
    again = None if reset is None else pad_axes(reset[:, 1:], {1: (0, 1)})
    chunks = jax.tree.map(cut, (q, k, v, rates, mean, again))
    own = jax.tree.map(lambda x: jnp.zeros((num_chunks // num_groups, *x.shape), x.dtype), state)
    (_, own), out = lax.scan(block_step, (state, own), (jnp.arange(num_groups), chunks))
    out = jnp.moveaxis(out.reshape(num_chunks, *out.shape[2:]), 0, 1)
    return out, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), own)
