"""Block sizes of the LaCT op's Pallas TPU kernels, by TPU generation and size."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from refine_jax.kernels.lact.pallas_tpu_parts import Tiles
from refine_jax.kernels.lact.pallas_tpu_plan import Plan

# Tokens of a grid step, and of the parts that its elementwise work is done in.
_DEFAULT = {"forward": (512, 256), "backward": (256, 256)}
_BLOCKS = {}
# What the compiler needs of the vector memory beside the arrays counted here.
_SPARE = 2 << 20


def _generation() -> str | None:
    """Name of the TPU generation that is compiled for, e.g. "TPU_V6E"; None without a TPU."""
    if jax.default_backend() != "tpu":
        return None
    return pltpu.get_tpu_info().chip_version.name


def vmem_bytes() -> int:
    """Bytes of vector memory of a core; those of the largest if there is no TPU."""
    if jax.default_backend() != "tpu":
        return 128 << 20
    return pltpu.get_tpu_info().vmem_capacity_bytes


def _divisor(size: int, most: int) -> int:
    """The largest multiple of 128 that divides `size`, itself one, and is at most `most`."""
    return next(x for x in range(min(size, most), 0, -128) if size % x == 0)


def with_blocks(plan: Plan, direction: str) -> Plan:
    """The plan with its block sizes; direction is "forward" or "backward"."""
    block, sub = _BLOCKS.get(_generation(), _DEFAULT)[direction]
    block = _divisor(plan.chunk, block)
    return dataclasses.replace(plan, block=block, sub=_divisor(block, sub), vmem_limit=vmem_bytes())


def _vmem_estimate(plan: Plan, direction: str, itemsize: int) -> int:
    """Bytes of vector memory that a kernel over chunks needs."""
    area, wide = plan.dim * plan.hidden, max(plan.dim, plan.hidden)
    groups = len(plan.groups)
    if direction == "forward":
        # Weights, momentum, accumulator; sums; operands; tokens, twice; temporaries.
        floats = area * (3 * groups + 3 + plan.momentum) + 5 * plan.block * wide
        operands = 3 * area + 8 * plan.block * plan.dim
    else:
        # Cotangents; what is fetched for the end of a chunk; those of the initial weights; weights,
        # twice; operands and their transposes; tokens, twice; temporaries.
        fetched = groups + plan.momentum
        floats = area * (3 * (groups + fetched + plan.resets + 2) + 1) + 18 * plan.block * wide
        operands = 12 * area + 14 * plan.block * plan.dim
    return 4 * floats + itemsize * operands + _SPARE


def fits(plan: Plan, dtype: jnp.dtype) -> bool:
    """Whether the kernels over chunks have room for the plan's weights."""
    return all(
        _vmem_estimate(with_blocks(plan, direction), direction, dtype.itemsize) <= vmem_bytes()
        for direction in ("forward", "backward")
    )


def tiles(plan: Plan, dtype: jnp.dtype) -> Tiles:
    """Blocks of the kernels in parts: as many hidden features and tokens as there is room for."""
    limit, size = vmem_bytes(), dtype.itemsize
    for tokens, hidden in ((256, plan.hidden), (256, 256), (128, 128)):
        tokens, hidden = _divisor(plan.chunk, tokens), _divisor(plan.hidden, hidden)
        area = plan.dim * hidden
        # Weights, cotangents, gradients, all twice; a sum; operands and transposes; tokens, twice.
        floats = 19 * area + 18 * tokens * max(plan.dim, hidden)
        if 4 * floats + size * (12 * area + 10 * tokens * plan.dim) + _SPARE <= limit:
            break
    return Tiles(tokens, hidden, limit, plan.interpret)
