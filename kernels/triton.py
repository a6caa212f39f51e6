"""What the GPU kernels (Pallas, Triton backend) of both ops share.

jax 0.12 calls this backend deprecated, in favour of Mosaic GPU (Hopper and later only). It is used
here because it serves Ampere as well; both jax 0.10.2 and 0.12.0 compile these kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from refine_jax.kernels.device import backend


def is_interpreted() -> bool:
    """Whether kernels run in interpret mode: on CPUs, for tests."""
    return backend() == "cpu"


def call(
    kernel: Callable,
    name: str,
    grid: tuple[int, ...],
    inputs: Mapping[str, jax.Array],
    outputs: Mapping[str, jnp.dtype],
    *,
    axes: Mapping[str, str],
    sizes: Mapping[str, int],
    blocks: Mapping[str, int | None],
    place: Callable[..., Mapping[str, jax.Array | int]],
    warps: int,
    stages: int,
) -> dict[str, jax.Array]:
    """Call a kernel over a grid, with references as keyword arguments by the names of arrays.

    axes: by name of array, a letter for each of its axes. By letter: sizes of the axes of outputs;
    blocks, how much of an axis a program gets (None: one index, and no axis); and, of the numbers
    of a program, place, which blocks those are.
    stages: of the software pipeline of a kernel's loops.

    Returns the outputs by name.
    """

    def spec(letters):
        shape = tuple(blocks[x] for x in letters)
        return pl.BlockSpec(shape, lambda *program: tuple(place(*program)[x] for x in letters))

    def body(inputs, *out_refs):
        kernel(**inputs, **dict(zip(outputs, out_refs, strict=True)))

    body.__name__ = name  # what profilers show
    arrays = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[{key: spec(axes[key]) for key in inputs}],
        out_shape=[
            jax.ShapeDtypeStruct(tuple(sizes[x] for x in axes[key]), dtype)
            for key, dtype in outputs.items()
        ],
        out_specs=[spec(axes[key]) for key in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=is_interpreted(),
        name=name,
    )(inputs)
    return dict(zip(outputs, arrays, strict=True))


def dot(
    a: jax.Array, b: jax.Array, *, transpose_a: bool = False, transpose_b: bool = False
) -> jax.Array:
    """Multiply two blocks, a [m, n] and b [n, p], each perhaps transposed, with float32 sums.

    float32 operands count in full: as three TF32 products on tensor cores (error about 1e-6). Plain
    float32 arithmetic is several times slower there, spills registers and takes minutes to compile.
    CPUs, where kernels are interpreted, have no TF32.
    """
    precision = lax.Precision.DEFAULT
    if a.dtype == jnp.float32:
        precision = (
            lax.Precision.HIGHEST if is_interpreted() else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        )
    contract = ((0 if transpose_a else 1,), (1 if transpose_b else 0,))
    return lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def mask_dot(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Compute `mask @ x` of a Boolean mask [m, n] and x [n, p] float32, to float32 precision.

    A float32 number is the sum of three bfloat16 numbers, so three products on tensor cores do it.
    Cutting bits off, rather than casts there and back, because compilers take out pairs of casts.
    """
    mask = mask.astype(jnp.bfloat16)
    sums = 0.0
    for _ in range(3):
        bits = lax.bitcast_convert_type(x, jnp.int32) & -65536
        head = lax.bitcast_convert_type(bits, jnp.float32)
        sums += dot(mask, head.astype(jnp.bfloat16))
        x -= head
    return sums


def rounded_size(size: int, largest_block: int) -> int:
    """`size` filled up to a power of two of at least 16, or a multiple of `largest_block`."""
    if size > largest_block:
        return -(-size // largest_block) * largest_block
    return max(16, 1 << (size - 1).bit_length())
