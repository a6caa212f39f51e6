"""Products and norms whose rounding and gradients the kernels rely on."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax


def einsum(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """einsum of two operands rounded to `dtype`; sums and result are float32."""
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
    """`einsum` whose own derivative keeps the same rule, and the dtypes of its arguments.

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


def safe_norm(x: jax.Array) -> jax.Array:
    """Euclidean norm over the last axis, kept as size 1; its gradient at zero is 0, not NaN."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    is_zero = square == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square)))
