"""Products and norms whose rounding and gradients the kernels rely on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.kernels.device import backend


def einsum(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Compute the einsum `spec` of a [...] and b [...] rounded to `dtype`, with float32 sums."""
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(
        spec,
        a.astype(dtype),
        b.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def dot(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Compute `einsum` of a [...] and b [...]; its derivative keeps the same rule and their dtypes.

    Plain autodiff would multiply float32 cotangents with bfloat16 operands, or round the gradient
    of a float32 weight or state to bfloat16.
    """
    return einsum(spec, a, b, dtype)


def _dot_forward(spec, a, b, dtype):
    return einsum(spec, a, b, dtype), (a, b)


def _dot_backward(spec, dtype, operands, cotangent):
    a, b = operands
    inputs, out = spec.split("->")
    left, right = inputs.split(",")
    da = einsum(f"{out},{right}->{left}", cotangent, b, dtype)
    db = einsum(f"{left},{out}->{right}", a, cotangent, dtype)
    return da.astype(a.dtype), db.astype(b.dtype)


dot.defvjp(_dot_forward, _dot_backward)


def pad_axes(x: jax.Array, widths: Mapping[int, tuple[int, int]]) -> jax.Array:
    """Put zeros around x [...]: before and behind it along each axis that is named."""
    by_axis = [(0, 0)] * x.ndim
    for axis, width in widths.items():
        by_axis[axis] = width
    return jnp.pad(x, by_axis) if any(map(any, by_axis)) else x


def drop_unit_axes(x: jax.Array, keep: int) -> jax.Array:
    """Drop leading axes of size 1 of x [1, ..., 1, ...], but none of its last `keep` axes.

    XLA's CPU compiler (jaxlib 0.10.2 to 0.12.0) makes sums of products over an array that starts
    with such an axis, as a batch of one row does, 5 to 25 times slower than without it.
    """
    last = max(x.ndim - keep, 0)
    lead = next((i for i, size in enumerate(x.shape[:last]) if size != 1), last)
    return x.reshape(x.shape[lead:])


def by_rows(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`function` along the last axis of arrays [..., size], by way of `drop_unit_axes`.

    The sizes may differ; the other axes may not.
    """
    out = function(*(drop_unit_axes(x, 2) for x in arrays))
    return out.reshape(*arrays[0].shape[:-1], -1)


def safe_norm(x: jax.Array) -> jax.Array:
    """Compute the Euclidean norm [..., 1] of x [..., d]; its gradient at zero is 0, not NaN."""
    square = by_rows(lambda rows: jnp.sum(rows * rows, axis=-1, keepdims=True), x)
    is_zero = square == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square)))


def l2_norm_fla(x: jax.Array) -> jax.Array:
    """Compute `x * rsqrt(sum x^2 + 1e-6)` of x [..., d] in float32 (flash-linear-attention)."""

    def rows(x):
        y = x.astype(jnp.float32)
        return (y * lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)

    return by_rows(rows, x)


def computed_once(x: jax.Array) -> jax.Array:
    """Keep XLA from computing x [...] again inside of each product that takes it.

    libtpu fuses sums and norms into the operands of products, whose blocks then make them anew.
    """
    return lax.optimization_barrier(x) if backend() == "tpu" else x
