"""Heads of a model's arrays: alone or together, in other groups, in chunks of tokens.

A TPU fills the last axis of every array up to 128 numbers, so that heads of 64 are kept n = 2 in a
group of L = 128: arrays [..., G, T, L]. Nothing here computes; numbers move, and what moves them
back is the derivative. XLA's copies on TPUs take 3 to 15 times as long as the numbers need to be
read and written (static estimates of libtpu 0.0.42), hence the Pallas kernels.
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
    """Each of the `count` heads of a group in a group of its own, beside zeros.

    x: [..., G, T, L]. Returns [..., G count, T, L]; a head stays where it was among the L numbers.
    """
    if _by_kernel(x):
        return pallas_tpu.alone(x, count)
    y = jnp.stack([jnp.where(_of_head(x, count, i), x, 0) for i in range(count)], axis=-3)
    return y.reshape(*x.shape[:-3], -1, *x.shape[-2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def together(x: jax.Array, count: int) -> jax.Array:
    """The way back from `alone`: of `count` groups that follow each other the numbers of each head.

    x: [..., G count, T, L]. Returns [..., G, T, L].
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
    """Tokens in chunks, their numbers in other groups.

    x: [B, G, T, D / G], T a multiple of chunk. Returns [B, T / chunk, groups, chunk, D / groups].
    """
    if _by_kernel(x) and x.shape[1] % groups == 0 and chunk % _LANES == 0:
        return pallas_tpu.to_chunks(x, groups, chunk)
    y = regroup(x, groups)
    return jnp.swapaxes(y.reshape(*y.shape[:2], -1, chunk, y.shape[-1]), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def from_chunks(x: jax.Array, groups: int) -> jax.Array:
    """The way back: [B, N, G, C, D / G] -> [B, groups, N C, D / groups]."""
    _, _, before, chunk, size = x.shape
    in_lanes = (before * size) % (groups * _LANES) == 0 and chunk % _LANES == 0
    if backend() == "tpu" and in_lanes and groups % before == 0:
        return pallas_tpu.from_chunks(x, groups)
    y = jnp.swapaxes(x, 1, 2)
    return regroup(y.reshape(*y.shape[:2], -1, size), groups)


def regroup(x: jax.Array, groups: int) -> jax.Array:
    """A token's numbers in other groups: [..., G, T, D / G] -> [..., groups, T, D / groups]."""
    *lead, before, tokens, size = x.shape
    shared = math.gcd(before, groups)
    x = x.reshape(*lead, shared, before // shared, tokens, size)
    x = jnp.swapaxes(x, -3, -2).reshape(*lead, shared, tokens, groups // shared, -1)
    return jnp.swapaxes(x, -3, -2).reshape(*lead, groups, tokens, -1)


def _by_kernel(x: jax.Array) -> bool:
    """Whether there is a kernel for arrays [B, G, T, L] like x on this device."""
    whole = x.ndim == 4 and x.shape[-2] % _LANES == 0 and x.shape[-1] % _LANES == 0
    return whole and backend() == "tpu"


def _of_head(x: jax.Array, count: int, index: int) -> jax.Array:
    """[L] bool: the numbers of a group that belong to one of its `count` heads."""
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
