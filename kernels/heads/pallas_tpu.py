"""The moves of api.py as Pallas kernels for TPUs: each block is read, and written where it belongs.

L is a multiple of 128; T and chunks are, too.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from refine_jax.kernels import tpu

_BLOCK = 1024  # most tokens of a block: of 256 to 2048 as fast as any, by static estimates


def _block(tokens: int) -> int:
    """Tokens of a block, which must divide those of an array or a chunk."""
    return math.gcd(tokens, _BLOCK)


def _spec(heads: int, block: int, size: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, heads, block, size), lambda b, h, t: (b, h, t, 0))


def _chunk_spec(block: int, chunk: int, size: int) -> pl.BlockSpec:
    """Blocks of one head of arrays [B, N, H, C, d], as the tokens follow each other."""
    count = chunk // block
    return pl.BlockSpec((1, 1, 1, block, size), lambda b, h, t: (b, t // count, h, t % count, 0))


def _of_head(shape: tuple[int, int], count: int, index: int) -> jax.Array:
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    return lane // (shape[1] // count) == index


def alone(x: jax.Array, count: int) -> jax.Array:
    """`api.alone` of [B, G, T, L]."""
    rows, groups, tokens, size = x.shape
    block = _block(tokens)

    def kernel(x_ref, out_ref):
        for i in range(count):
            out_ref[0, i] = jnp.where(_of_head((block, size), count, i), x_ref[0, 0], 0)

    return pl.pallas_call(
        kernel,
        grid=(rows, groups, tokens // block),
        in_specs=[_spec(1, block, size)],
        out_specs=_spec(count, block, size),
        out_shape=jax.ShapeDtypeStruct((rows, groups * count, tokens, size), x.dtype),
        interpret=tpu.interpret_mode(),
        name="heads_alone",
    )(x)


def together(x: jax.Array, count: int) -> jax.Array:
    """`api.together` of [B, G count, T, L]."""
    rows, groups, tokens, size = x.shape
    block = _block(tokens)

    def kernel(x_ref, out_ref):
        y = x_ref[0, 0]
        for i in range(1, count):
            y = jnp.where(_of_head((block, size), count, i), x_ref[0, i], y)
        out_ref[0, 0] = y

    return pl.pallas_call(
        kernel,
        grid=(rows, groups // count, tokens // block),
        in_specs=[_spec(count, block, size)],
        out_specs=_spec(1, block, size),
        out_shape=jax.ShapeDtypeStruct((rows, groups // count, tokens, size), x.dtype),
        interpret=tpu.interpret_mode(),
        name="heads_together",
    )(x)


def to_chunks(x: jax.Array, groups: int, chunk: int) -> jax.Array:
    """Move heads as `api.to_chunks` does, x [B, G, T, L], into fewer groups."""
    rows, before, tokens, size = x.shape
    block, joined = _block(chunk), before // groups

    def kernel(x_ref, out_ref):
        for i in range(joined):
            out_ref[0, 0, 0, :, i * size : (i + 1) * size] = x_ref[0, i]

    shape = rows, tokens // chunk, groups, chunk, joined * size
    return pl.pallas_call(
        kernel,
        grid=(rows, groups, tokens // block),
        in_specs=[_spec(joined, block, size)],
        out_specs=_chunk_spec(block, chunk, joined * size),
        out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
        interpret=tpu.interpret_mode(),
        name="heads_to_chunks",
    )(x)


def from_chunks(x: jax.Array, groups: int) -> jax.Array:
    """Move heads as `api.from_chunks` does, x [B, N, G, C, L], into more groups."""
    rows, num_chunks, before, chunk, joined_size = x.shape
    block, joined = _block(chunk), groups // before
    tokens, size = num_chunks * chunk, joined_size // joined

    def kernel(x_ref, out_ref):
        for i in range(joined):
            out_ref[0, i] = x_ref[0, 0, 0, :, i * size : (i + 1) * size]

    return pl.pallas_call(
        kernel,
        grid=(rows, before, tokens // block),
        in_specs=[_chunk_spec(block, chunk, joined_size)],
        out_specs=_spec(joined, block, size),
        out_shape=jax.ShapeDtypeStruct((rows, groups, tokens, size), x.dtype),
        interpret=tpu.interpret_mode(),
        name="heads_from_chunks",
    )(x)
