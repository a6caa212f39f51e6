"""What the TPU kernels ask of the chip that they are compiled for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refine_jax.kernels import tpu_table
from refine_jax.kernels.device import backend

_DEFAULT = "v6e"


def generation() -> str:
    """The TPU generation, "v4", "v5e", "v5p", "v6e" or "7x"; "v6e" where there is no TPU."""
    if backend() != "tpu":
        return _DEFAULT
    name = str(pltpu.get_tpu_info().chip_version)
    return "7x" if name == "7" else name


def interpret_mode() -> pltpu.InterpretParams | bool:
    """`interpret` of `pallas_call`: kernels are compiled on TPUs and interpreted elsewhere."""
    return backend() != "tpu"


def vmem_bytes() -> int:
    """Vector memory of a core in bytes; that of a v6e where there is no TPU."""
    if backend() != "tpu":
        return 128 << 20
    return pltpu.get_tpu_info().vmem_capacity_bytes


def call_kernel(
    kernel: Callable,
    name: str,
    grid: tuple[int, int, int],
    inputs: Iterable[tuple[jax.Array, pl.BlockSpec]],
    outputs: Iterable[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: Iterable[Any] = (),
    scalars: Iterable[jax.Array] = (),
    moved: int | None = None,
) -> list[jax.Array]:
    """Call a kernel over a grid whose last axis goes in its order, with most of the vector memory.

    kernel: takes references to the scalars, the inputs, the outputs and the scratch, in this order.
    inputs: arrays [...] with their blocks. outputs: shapes with their blocks. scalars: integers [n]
    that are there before the kernel begins, also for the index maps of the blocks. moved: bytes
    that it reads and writes, where these are not those of whole arrays.
    """
    scalars, inputs, outputs = list(scalars), list(inputs), list(outputs)
    cost = None if moved is None else pl.CostEstimate(0, 0, moved)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            scratch_shapes=list(scratch),
        ),
        out_shape=[shape for shape, _ in outputs],
        cost_estimate=cost,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_bytes() * 7 // 8,
        ),
        interpret=interpret_mode(),
        name=name,
    )(*scalars, *(array for array, _ in inputs))


def blocks(op: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Block sizes of `op` for this generation (tpu_table.py), in an order of its own.

    Those of the smallest searched shape that is as large as `sizes` in area; for shapes beyond all
    of them, those of the largest. Generations that were not searched get those of v6e.
    """
    table, name = tpu_table.BLOCKS[op], generation()
    table = table[name if name in table else _DEFAULT]
    larger = [known for known in table if math.prod(known) >= math.prod(sizes)]
    return table[min(larger, key=math.prod) if larger else max(table, key=math.prod)]


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    if backend() != "tpu":
        # As exact, and CPUs lack some products of bfloat16.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def nn(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply a [m, n] by b [n, p]; float32."""
    return _product(a, b, (1, 0))


def nt(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply a [m, n] by the transpose of b [p, n]; float32."""
    return _product(a, b, (1, 1))


def tn(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply the transpose of a [n, m] by b [n, p]; float32."""
    return _product(a, b, (0, 0))


def computed_once(x: jax.Array) -> jax.Array:
    """Keep XLA from computing x [...] again inside of each product that takes it.

    libtpu fuses sums and norms into the operands of products, whose blocks then make them anew.
    """
    return lax.optimization_barrier(x) if backend() == "tpu" else x
