"""What the fast weights read, normalised, scaled and added to attention's output, on TPUs.

One pass for each direction over [B, N, H, C, d], chunks of fast-weight heads, and [B, G, T, L],
attention heads side by side in L = 128 numbers (pallas_tpu_inputs.py). Everything is computed in
float32. A token's scale is a number in a row, and a column is what multiplies its vector: rows
become columns, of 128 equal numbers, through the transposition unit.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from refine_jax.kernels import tpu
from refine_jax.kernels.tpu import nt

_LANES, _SUBLANES = 128, 8
_BLOCK = 512  # most tokens of a grid step


@dataclasses.dataclass(frozen=True)
class OutputsPlan:
    """eps: of the root mean square."""

    eps: float


def _columns(row: jax.Array) -> jax.Array:
    """[1, tokens] to [tokens, 128]."""
    return jnp.broadcast_to(row, (_LANES, row.shape[1])).T


def _row_sums(x: jax.Array) -> jax.Array:
    """Sums over the lanes of [tokens, 128] as a row [1, tokens]: by a product, without moves."""
    return nt(jnp.ones((_SUBLANES, _LANES), jnp.float32), x)[:1]


def _parts(x: jax.Array) -> list[jax.Array]:
    """The groups side by side in [tokens, d], float32."""
    return [x[:, i : i + _LANES].astype(jnp.float32) for i in range(0, x.shape[1], _LANES)]


def _normalised(plan: OutputsPlan, ref) -> tuple[list[jax.Array], jax.Array]:
    """The groups with root mean square 1, and what they were multiplied with, [tokens, 1]."""
    parts = _parts(ref[...])
    square = jnp.sum(sum(x * x for x in parts), 1, keepdims=True)
    inverse = lax.rsqrt(square / ref.shape[1] + plan.eps)
    return [x * inverse for x in parts], inverse


def _forward_kernel(plan: OutputsPlan, fast, scale, weight, groups, out):
    weights, scales = _parts(weight[...]), _columns(scale[...])
    for i, x in enumerate(_normalised(plan, fast)[0]):
        y = x * weights[i] * scales + groups[i].astype(jnp.float32)
        out[i] = y.astype(out.dtype)


def _backward_kernel(plan: OutputsPlan, fast, scale, weight, groups, d_fast, d_scale, d_weight):
    weights, scales = _parts(weight[...]), _columns(scale[...])
    parts, inverse = _normalised(plan, fast)
    products = [groups[i].astype(jnp.float32) * x for i, x in enumerate(parts)]
    along = sum(a * b for a, b in zip(products, weights, strict=True))
    d_scale[...] = _row_sums(along)
    mean = scales * (jnp.sum(along, 1, keepdims=True) / fast.shape[1])
    for i, x in enumerate(parts):
        here = slice(i * _LANES, (i + 1) * _LANES)
        d = groups[i].astype(jnp.float32) * weights[i] * scales - x * mean
        d_fast[:, here] = (d * inverse).astype(d_fast.dtype)
        d_weight[:, here] = jnp.sum(products[i] * scales, 0, keepdims=True)


def _call(plan: OutputsPlan, kernel, name: str, fast, scale, weight, groups, outputs):
    """`pallas_call` over rows, blocks of tokens and heads. outputs: names of the results.

    groups: [B, G, T, L], what is added to, or the cotangent of the sum.
    """
    batch, chunks, heads, chunk, width = fast.shape
    joined, block = width // _LANES, math.gcd(chunk, _BLOCK)
    per_chunk, steps = chunk // block, chunks * chunk // block
    by_group = pl.BlockSpec((None, joined, block, _LANES), lambda b, t, h: (b, h, t, 0))
    by_chunk = pl.BlockSpec(
        (None, None, None, block, width), lambda b, t, h: (b, t // per_chunk, h, t % per_chunk, 0)
    )
    by_token = pl.BlockSpec((None, None, 1, block), lambda b, t, h: (b, h, 0, t))
    by_step = pl.BlockSpec((None, None, None, 1, width), lambda b, t, h: (b, t, h, 0, 0))
    inputs = {
        "fast": (fast, by_chunk),
        "scale": (scale, by_token),
        "weight": (weight, pl.BlockSpec((1, width), lambda b, t, h: (0, 0))),
        "groups": (groups, by_group),
    }
    steps_shape = batch, steps, heads, 1, width
    kinds = {
        "out": (groups.shape, groups.dtype, by_group),
        "d_fast": (fast.shape, fast.dtype, by_chunk),
        "d_scale": (scale.shape, jnp.float32, by_token),
        "d_weight": (steps_shape, jnp.float32, by_step),
    }
    found = {name: kinds[name] for name in outputs}
    grid = batch, steps, heads
    return tpu.call_kernel(functools.partial(kernel, plan), name, grid, inputs, found, parallel=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lact_outputs(
    plan: OutputsPlan, fast: jax.Array, scale: jax.Array, weight: jax.Array, other: jax.Array
) -> jax.Array:
    """`other + scale RMSNorm(fast)`, in the layout of `other`.

    fast: [B, N, H, C, d]. scale: [B, H, 1, T] float32. weight: [1, d] float32. other: [B, G, T, L].
    """
    name = "lact_outputs_forward"
    return _call(plan, _forward_kernel, name, fast, scale, weight, other, ("out",))["out"]


def _outputs_forward(plan, fast, scale, weight, other):
    return lact_outputs(plan, fast, scale, weight, other), (fast, scale, weight)


def _outputs_backward(plan, residuals, cotangent):
    fast, scale, weight = residuals
    names = ("d_fast", "d_scale", "d_weight")
    name = "lact_outputs_backward"
    found = _call(plan, _backward_kernel, name, fast, scale, weight, cotangent, names)
    return found["d_fast"], found["d_scale"], found["d_weight"].sum((0, 1, 2)), cotangent


lact_outputs.defvjp(_outputs_forward, _outputs_backward)
