"""Moves of attention heads between the layouts of a model's arrays.

A TPU fills the last axis of every array up to 128 numbers. Heads of 64 are therefore kept in groups
of n = 2, side by side in L = 128 numbers: arrays [..., G, T, L]. The functions here only move
numbers, and the derivative of a move is the move back. XLA's copies on TPUs take 3 to 15 times as
long as the numbers need to be read and written (static estimates of libtpu 0.0.42), which is why
there are Pallas kernels.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from refine_jax.kernels.device import backend
from refine_jax.kernels.heads import pallas_tpu

_LANES = 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def alone(x: jax.Array, count: int) -> jax.Array:
    """Give each head a group of its own, filled with zeros where the other heads were.

    A product with such a group is a product with its one head.

    x: [..., G, T, L], groups of `count` heads, each L / count numbers wide.
    Returns [..., G count, T, L]. Head i of group g is in group g count + i, and keeps its place
    among the L numbers.
    """
    if _by_kernel(x):
        return pallas_tpu.alone(x, count)
    y = jnp.stack([jnp.where(_of_head(x, count, i), x, 0) for i in range(count)], axis=-3)
    return y.reshape(*x.shape[:-3], -1, *x.shape[-2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def together(x: jax.Array, count: int) -> jax.Array:
    """Join heads that have groups of their own to groups of `count`: the inverse of `alone`.

    x: [..., G count, T, L], laid out as `alone` returns it. Numbers outside a group's own head are
    ignored: they need not be zero.
    Returns [..., G, T, L].
    """
    if _by_kernel(x):
        return pallas_tpu.together(x, count)
    x = x.reshape(*x.shape[:-3], -1, count, *x.shape[-2:])
    y = x[..., 0, :, :]
    for i in range(1, count):
        y = jnp.where(_of_head(y, count, i), x[..., i, :, :], y)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def to_chunks(x: jax.Array, groups: int, chunk: int) -> jax.Array:
    """Cut tokens into chunks, and the D numbers of each token into other groups.

    x: [B, G, T, D / G], T a multiple of chunk. Returns [B, T / chunk, groups, chunk, D / groups].
    """
    if _by_kernel(x) and x.shape[1] % groups == 0 and chunk % _LANES == 0:
        return pallas_tpu.to_chunks(x, groups, chunk)
    y = regroup(x, groups)
    return jnp.swapaxes(y.reshape(*y.shape[:2], -1, chunk, y.shape[-1]), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def from_chunks(x: jax.Array, groups: int) -> jax.Array:
    """Join N chunks of C tokens to rows: the inverse of `to_chunks`.

    x: [B, N, G, C, D / G]. Returns [B, groups, N C, D / groups].
    """
    _, _, before, chunk, size = x.shape
    in_lanes = (before * size) % (groups * _LANES) == 0 and chunk % _LANES == 0
    if backend() == "tpu" and in_lanes and groups % before == 0:
        return pallas_tpu.from_chunks(x, groups)
    y = jnp.swapaxes(x, 1, 2)
    return regroup(y.reshape(*y.shape[:2], -1, size), groups)


def regroup(x: jax.Array, groups: int) -> jax.Array:
    """Cut the D numbers of each token into other groups, in the same order.

    x: [..., G, T, D / G]. Returns [..., groups, T, D / groups].
    """
    *lead, before, tokens, size = x.shape
    shared = math.gcd(before, groups)
    x = x.reshape(*lead, shared, before // shared, tokens, size)
    x = jnp.swapaxes(x, -3, -2).reshape(*lead, shared, tokens, groups // shared, -1)
    return jnp.swapaxes(x, -3, -2).reshape(*lead, groups, tokens, -1)


def _by_kernel(x: jax.Array) -> bool:
    """Say whether this device has a kernel for arrays of the shape [B, G, T, L] of x."""
    whole = x.ndim == 4 and x.shape[-2] % _LANES == 0 and x.shape[-1] % _LANES == 0
    return whole and backend() == "tpu"


def _of_head(x: jax.Array, count: int, index: int) -> jax.Array:
    """Mark the numbers of a group that belong to head `index` of its `count` heads: [L] bool."""
    return jnp.arange(x.shape[-1]) // (x.shape[-1] // count) == index


alone.defvjp(lambda x, count: (alone(x, count), None), lambda count, _, y: (together(y, count),))
together.defvjp(lambda x, count: (together(x, count), None), lambda count, _, y: (alone(y, count),))
to_chunks.defvjp(
    lambda x, groups, chunk: (to_chunks(x, groups, chunk), x.shape[1]),
    lambda groups, chunk, before, y: (from_chunks(y, before),),
)
from_chunks.defvjp(
    lambda x, groups: (from_chunks(x, groups), x.shape[2:4]),
    lambda groups, before, y: (to_chunks(y, *before),),
)
