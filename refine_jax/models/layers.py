"""Building blocks shared by the models: linear maps, norms, rope, MLP, short convolution.

Parameters keep the layout of the published PyTorch checkpoints: linear weights are [out, in].
Activations come in float32 or bfloat16; parameters are cast to the dtype of the activations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from refine_jax.kernels.numerics import by_rows, drop_unit_axes, safe_norm
from refine_jax.parallel import constrain

INIT_STD = 0.02


def normal_param(key: jax.Array, shape: tuple[int, ...], std: float = INIT_STD) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2)."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32))


class Linear(nnx.Module):
    """Affine map with `weight` [out, in] and, if asked for, `bias` [out]."""

    def __init__(self, size_in: int, size_out: int, *, bias: bool = False, rngs: nnx.Rngs):
        self.weight = normal_param(rngs.params(), (size_out, size_in))
        self.bias = nnx.Param(jnp.zeros((size_out,), jnp.float32)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        weight = self.weight[...].astype(x.dtype)
        bias = None if self.bias is None else self.bias[...].astype(x.dtype)

        def rows(x):
            y = lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))
            return y if bias is None else y + bias

        return by_rows(rows, x)

    def parts(self, x: jax.Array, count: int) -> list[jax.Array]:
        """The output's `count` equal parts, [..., in] -> [..., out / count] each.

        Devices that share the heads of q, k and v need some outputs of each part, which no
        contiguous share of the whole output is.
        """
        weight = self.weight[...].astype(x.dtype)
        weight = constrain(weight.reshape(count, -1, weight.shape[-1]), None, "heads")
        bias = None if self.bias is None else self.bias[...].astype(x.dtype).reshape(count, -1)

        def rows(x):
            y = lax.dot_general(x, weight, (((x.ndim - 1,), (2,)), ((), ())))
            return y if bias is None else y + bias

        y = rows(drop_unit_axes(x, 2))
        return [y[..., i, :].reshape(*x.shape[:-1], -1) for i in range(count)]


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis; computed in float32."""

    def rows(x):
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
        return (y * weight.astype(jnp.float32)).astype(x.dtype)

    return by_rows(rows, x)


class RMSNorm(nnx.Module):
    """RMSNorm with a learned `weight` [size]."""

    def __init__(self, size: int, eps: float):
        self.weight = nnx.Param(jnp.ones((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] -> [..., size]."""
        return rms_norm(x, self.weight[...], self.eps)


def l2_norm_lact(x: jax.Array) -> jax.Array:
    """`x / (|x| + 1e-5)` over the last axis (LaCT); the norm of a zero vector has gradient 0."""

    def rows(x):
        y = x.astype(jnp.float32)
        return (y / (safe_norm(y) + 1e-5)).astype(x.dtype)

    return by_rows(rows, x)


def rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding on non-interleaved halves (golden README, section 4).

    x: [..., h, hd] with even hd; positions: [...] int32, one for all heads of a token.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, size: int, hidden: int, *, rngs: nnx.Rngs):
        self.gate_proj = Linear(size, hidden, rngs=rngs)
        self.up_proj = Linear(size, hidden, rngs=rngs)
        self.down_proj = Linear(hidden, size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
