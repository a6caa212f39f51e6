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


def _call(kernel, name: str, grid, x, block, shape, out_block) -> jax.Array:
    """Run a kernel of references x and out for an array like x of another shape."""
    outputs = {"out": (shape, x.dtype, out_block)}
    return tpu.call_kernel(kernel, name, grid, {"x": (x, block)}, outputs, vmem=None)["out"]


def alone(x: jax.Array, count: int) -> jax.Array:
    """`api.alone` of [B, G, T, L]."""
    rows, groups, tokens, size = x.shape
    block = _block(tokens)

    def kernel(x, out):
        for i in range(count):
            out[0, i] = jnp.where(_of_head((block, size), count, i), x[0, 0], 0)

    grid, shape = (rows, groups, tokens // block), (rows, groups * count, tokens, size)
    blocks = _spec(1, block, size), _spec(count, block, size)
    return _call(kernel, "heads_alone", grid, x, blocks[0], shape, blocks[1])


def together(x: jax.Array, count: int) -> jax.Array:
    """`api.together` of [B, G count, T, L]."""
    rows, groups, tokens, size = x.shape
    block = _block(tokens)

    def kernel(x, out):
        y = x[0, 0]
        for i in range(1, count):
            y = jnp.where(_of_head((block, size), count, i), x[0, i], y)
        out[0, 0] = y

    shape = rows, groups // count, tokens, size
    grid = *shape[:2], tokens // block
    blocks = _spec(count, block, size), _spec(1, block, size)
    return _call(kernel, "heads_together", grid, x, blocks[0], shape, blocks[1])


def to_chunks(x: jax.Array, groups: int, chunk: int) -> jax.Array:
    """Move heads as `api.to_chunks` does, x [B, G, T, L], into fewer groups."""
    rows, before, tokens, size = x.shape
    block, joined = _block(chunk), before // groups

    def kernel(x, out):
        for i in range(joined):
            out[0, 0, 0, :, i * size : (i + 1) * size] = x[0, i]

    grid = rows, groups, tokens // block
    shape = rows, tokens // chunk, groups, chunk, joined * size
    blocks = _spec(joined, block, size), _chunk_spec(block, chunk, joined * size)
    return _call(kernel, "heads_to_chunks", grid, x, blocks[0], shape, blocks[1])


def from_chunks(x: jax.Array, groups: int) -> jax.Array:
    """Move heads as `api.from_chunks` does, x [B, N, G, C, L], into more groups."""
    rows, num_chunks, before, chunk, joined_size = x.shape
    block, joined = _block(chunk), groups // before
    tokens, size = num_chunks * chunk, joined_size // joined

    def kernel(x, out):
        for i in range(joined):
            out[0, i] = x[0, 0, 0, :, i * size : (i + 1) * size]

    grid, shape = (rows, before, tokens // block), (rows, groups, tokens, size)
    blocks = _chunk_spec(block, chunk, joined_size), _spec(joined, block, size)
    return _call(kernel, "heads_from_chunks", grid, x, blocks[0], shape, blocks[1])
