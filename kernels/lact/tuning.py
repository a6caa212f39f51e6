"""Block sizes of the LaCT op's Pallas TPU kernels.

Those that were searched for the generation and the very shape (tpu_table.py), else the first of an
order of preference that vector memory has room for.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from refine_jax.kernels import tpu_table
from refine_jax.kernels.lact.pallas_tpu_parts import Tiles
from refine_jax.kernels.lact.pallas_tpu_plan import LaCTPlan
from refine_jax.kernels.tpu import generation, vmem_bytes

# For d and F up to a size: tokens of a grid step, tokens of the parts that its elementwise work is
# done in, hidden features of a tile, and whether all that the next chunk needs is fetched early.
# Larger steps and tiles would be a few per cent faster by the static schedule, and programs of many
# MiB that take minutes to compile.
_FORWARD = {
    384: ((1024, 256, 384, True), (512, 256, 384, True), (256, 128, 384, True)),
    1 << 30: ((512, 256, 256, True), (256, 128, 256, True)),
}
_BACKWARD = {
    384: (
        (512, 512, 384, True),
        (256, 256, 384, True),
        (256, 256, 384, False),
        (256, 128, 384, False),
    ),
    1 << 30: ((256, 256, 256, True), (256, 256, 256, False), (256, 128, 256, False)),
}
# A float32 product is six of bfloat16 in the program too.
_FLOAT32 = {
    384: ((256, 128, 128, True), (128, 128, 128, False)),
    1 << 30: ((128, 128, 128, True), (128, 128, 128, False)),
}
_FEW_SLOTS = 3
# What the compiler takes of the vector memory beside the arrays counted here.
_SPARE = 1 << 20


def _divisor(size: int, most: int) -> int:
    """The largest multiple of 128 that divides `size`, itself one, and is at most `most`."""
    return next(x for x in range(min(size, most), 0, -128) if size % x == 0)


def _vmem_estimate(plan: LaCTPlan, itemsize: int) -> int:
    """Bytes of vector memory that a kernel over chunks needs; a fit to what compilers report."""
    area, wide = plan.dim * plan.hidden, max(plan.dim, plan.hidden)
    groups = len(plan.groups)
    if plan.reverse:
        # Cotangents, those of the initial weights, weights, one sum; what is fetched; temporaries.
        floats = area * (3 * (groups + plan.resets + plan.weight_buffers) + 1)
        floats += len(plan.fetched) * plan.fetch_slots * 128 * wide
        floats += (5 * plan.block + 16 * plan.sub) * wide
        # Weights and cotangents with their transposes; tokens, twice.
        operands = 12 * area + 14 * plan.block * plan.dim
    else:
        # Weights, momentum, accumulator, sums; temporaries. Weights, twice; tokens, twice.
        floats = area * (3 * groups + 3 + plan.momentum) + 4 * (plan.block + plan.sub) * wide
        operands = 6 * area + 8 * plan.block * plan.dim
    return 4 * floats + itemsize * operands + _SPARE


def with_blocks(plan: LaCTPlan, dtype: jnp.dtype) -> LaCTPlan | None:
    """The plan with its block sizes; None if vector memory has no room for its weights."""
    table = _BACKWARD if plan.reverse else _FORWARD
    if dtype == jnp.float32:
        table = _FLOAT32
    size = max(plan.dim, plan.hidden)
    choices = next(blocks for most, blocks in table.items() if size <= most)
    op = "lact_backward" if plan.reverse else "lact_forward"
    found = tpu_table.BLOCKS[op].get(generation(), {}).get((plan.dim, plan.hidden))
    if found is not None and dtype == jnp.bfloat16:
        choices = ((*found, True), *choices)
    for block, sub, tile, early in choices:
        block = _divisor(plan.chunk, block)
        sized = dataclasses.replace(
            plan,
            block=block,
            sub=_divisor(block, sub),
            tile=_divisor(plan.hidden, tile),
            fetch_slots=plan.row_parts if early else min(_FEW_SLOTS, plan.row_parts),
            weight_buffers=2 if early else 1,
        )
        if _vmem_estimate(sized, dtype.itemsize) <= vmem_bytes():
            return sized
    return None


def fits(plan: LaCTPlan, dtype: jnp.dtype) -> bool:
    """Whether the kernels over chunks, forward and backward, have room for the plan's weights."""
    backward = dataclasses.replace(plan, reverse=True, cotangents=plan.groups)
    return all(with_blocks(each, dtype) is not None for each in (plan, backward))


def tiles(plan: LaCTPlan, dtype: jnp.dtype) -> Tiles:
    """Blocks of the kernels in parts: as many hidden features and tokens as there is room for."""
    limit, size = vmem_bytes(), dtype.itemsize
    choices = ((256, 384), (256, 256), (128, 128))
    for tokens, hidden in choices if dtype != jnp.float32 else choices[2:]:
        tokens, hidden = _divisor(plan.chunk, tokens), _divisor(plan.hidden, hidden)
        area = plan.dim * hidden
        # Weights, cotangents, gradients, all twice; a sum; operands and transposes; tokens, twice.
        floats = 19 * area + 18 * tokens * max(plan.dim, hidden)
        if 4 * floats + size * (12 * area + 10 * tokens * plan.dim) + _SPARE <= limit:
            break
    return Tiles(tokens, hidden)
