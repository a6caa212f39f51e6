"""What the TPU kernels ask of the chip that they are compiled for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
    grid: tuple[int, ...],
    inputs: Mapping[str, tuple[jax.Array, pl.BlockSpec]],
    outputs: Mapping[str, tuple[tuple[int, ...], jnp.dtype, pl.BlockSpec]],
    scratch: Mapping[str, Any] | None = None,
    *,
    scalars: Mapping[str, jax.Array] | None = None,
    parallel: int = 0,
    vmem: float | None = 7 / 8,
    moved: int | None = None,
    operations: int = 0,
    in_place: Mapping[str, str] | None = None,
) -> dict[str, jax.Array]:
    """Call a kernel over a grid on a TPU; elsewhere it is interpreted.

    kernel: takes references as keyword arguments, by the names of scalars, inputs, outputs and
        scratch.
    inputs: arrays [...] with their blocks. outputs: shapes and dtypes with their blocks.
    scalars: integers [n] that are there before the kernel begins; index maps of blocks get them
        behind the place in the grid.
    parallel: leading axes of the grid that cores may share; the others go in their order.
    vmem: share of the vector memory that the kernel may use; None leaves it to the compiler.
    moved: bytes that the kernel reads and writes, where these are not those of whole arrays.
    operations: by which the compiler chooses what is sent beside the kernel.
    in_place: outputs that take the memory of an input, as {input: output}.

    Returns the outputs by name.
    """
    scratch, scalars, in_place = scratch or {}, scalars or {}, in_place or {}
    names = (*scalars, *inputs, *outputs, *scratch)
    taken, written = (*scalars, *inputs), tuple(outputs)

    def body(*refs):
        kernel(**dict(zip(names, refs, strict=True)))

    run = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for *_, spec in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs.values()],
        input_output_aliases={taken.index(x): written.index(y) for x, y in in_place.items()},
        cost_estimate=pl.CostEstimate(operations, 0, moved or 0) if operations or moved else None,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel),
            vmem_limit_bytes=None if vmem is None else int(vmem_bytes() * vmem),
        ),
        interpret=interpret_mode(),
        name=name,
    )
    # Arrays that stay where they are get no further axis: vmap runs the kernel once for each entry.
    if any(spec.memory_space is pl.ANY for _, spec in inputs.values()):
        run = jax.custom_batching.sequential_vmap(run)
    results = run(*scalars.values(), *(array for array, _ in inputs.values()))
    return dict(zip(outputs, results, strict=True))


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
