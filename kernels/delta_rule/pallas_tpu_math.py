"""What the forward and the backward TPU kernels of the delta rule share: the algebra of a chunk.

Everything here works on values for G heads at once, matrices [G, C, C], token blocks [G, C, K] and
[G, C, V], columns [G, C, 1] and rows [G, 1, C]: a product of one head then covers the latency of
the others'. Letters as in xla.py; the triangular system is kept in the column-scaled form

    (I + B) W = V - f K S,    B_ri = D_ri beta_i k_r.k_i  (i < r),    U = beta W

whose inverse Y = (I + B)^-1 serves the forward pass (W = Y R) and the backward pass (z = Y^T dW),
and whose solution W, unlike U, gives the gradient of beta without a division.

Operands that meet the same matrix are stacked, so that it enters the matrix unit once. (Without
that, libtpu 0.0.42, which belongs to jax 0.10.2, fails to schedule the forward kernel.)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

L2_EPS = 1e-6  # of the fused norm, as in flash-linear-attention


class Scalars(NamedTuple):
    """Per-token numbers of a chunk, as columns [G, C, 1] or rows [G, 1, C].

    from_start: decay since the chunk's start; to_end: decay until its end. None where nothing
    decays or is reset.
    """

    beta: jax.Array
    from_start: jax.Array | None = None
    to_end: jax.Array | None = None
    log_decay: jax.Array | None = None
    document: jax.Array | None = None


def scalar_fields(gated: bool, has_documents: bool) -> tuple[str, ...]:
    """Names of the per-token numbers that a kernel reads."""
    fields = ["beta"]
    if gated or has_documents:
        fields += ["from_start", "to_end"]
    if gated:
        fields.append("log_decay")
    if has_documents:
        fields.append("document")
    return tuple(fields)


def matmul(a: jax.Array, b: jax.Array, dims: str, dtype: jnp.dtype) -> jax.Array:
    """Products of the matrices of [G, ...] arrays, with operands of `dtype` and float32 results.

    dims: "nn" a b, "nt" a b^T, "tn" a^T b.
    """
    left, right = {"nn": (2, 1), "nt": (2, 2), "tn": (1, 1)}[dims]
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((left,), (right,)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def index_matrices(chunk: int) -> tuple[jax.Array, jax.Array]:
    """Row and column numbers [C, C]."""
    row = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    return row, lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)


def decay_matrix(columns: Scalars, rows: Scalars) -> jax.Array | None:
    """D [G, C, C], the decay between tokens i and r >= i; None where it is 1 everywhere.

    Above the diagonal its values are finite and have no meaning. Sums of logs run over the tokens
    in between only: differences of running sums would lose digits after a strong decay. They are
    products with a matrix of ones, whose other operand is cut into three bfloat16 parts: as exact
    as float32, on matrix units.
    """
    between = None
    if columns.log_decay is not None:
        heads, chunk, _ = columns.log_decay.shape
        row, col = index_matrices(chunk)
        lower = jnp.where(row >= col, 1.0, 0.0).astype(jnp.bfloat16)
        lower = jnp.broadcast_to(lower, (heads, chunk, chunk))
        rest = jnp.where(row > col, columns.log_decay, 0.0)
        total = 0.0
        for _ in range(3):
            part = rest.astype(jnp.bfloat16)
            total += matmul(lower, part, "nn", jnp.bfloat16)
            rest = rest - part.astype(jnp.float32)
        between = jnp.exp(total)
    if columns.document is not None:
        same = columns.document == rows.document
        between = jnp.where(same, 1.0 if between is None else between, 0.0)
    return between


def normalize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x / |x| of the rows of x [..., K], and 1 / |x| [..., 1]; float32."""
    x = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + L2_EPS)
    return x * inverse, inverse


def normalize_gradient(gradient: jax.Array, unit: jax.Array, inverse: jax.Array) -> jax.Array:
    """Gradient for x [C, K], given that for `unit`, where `unit, inverse = normalize(x)`."""
    along = jnp.sum(gradient * unit, axis=-1, keepdims=True)
    return (gradient - unit * along) * inverse


def invert_unit_lower(b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`(I + b)^-1` of strictly lower triangular matrices b [G, C, C] float32, C a power of two.

    Blockwise doubling, X <- X - X b_l X with b_l the blocks that join two inverted ones: matrix
    products only, at the scale of the inverse. With bfloat16 operands a correction
    X + X (I - (I + b) X), whose residual is exact to float32, takes the rounding errors back.
    """
    chunk = b.shape[-1]
    row, col = index_matrices(chunk)
    distance = row ^ col  # in [size, 2 size) inside b_l, whose upper part is 0
    eye = jnp.where(row == col, 1.0, 0.0)
    x = eye - jnp.where(distance == 1, b, 0.0)
    size = 2
    while size < chunk:
        joined = jnp.where((distance >= size) & (distance < 2 * size), b, 0.0)
        x = x - matmul(matmul(x, joined, "nn", dtype), x, "nn", dtype)
        size *= 2
    if dtype == jnp.float32:
        return x
    low, high = x.astype(dtype), b.astype(dtype)
    rest = (b - high.astype(jnp.float32)).astype(dtype)
    product = matmul(high, low, "nn", dtype) + matmul(rest, low, "nn", dtype)
    x = low.astype(jnp.float32)
    return x + matmul(low, eye - x - product, "nn", dtype)
