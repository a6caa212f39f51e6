"""Building blocks shared by the models: linear maps, norms, rope, MLP, short convolution.

Parameters keep the layout of the published PyTorch checkpoints: linear weights are [out, in].
Activations come in float32 or bfloat16; parameters are cast to the dtype of the activations.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from refine_jax.kernels.device import backend
from refine_jax.kernels.numerics import by_rows, drop_unit_axes, einsum, safe_norm
from refine_jax.kernels.sequence import halo
from refine_jax.parallel import axis_size, constrain, gather_axes, over_shards

INIT_STD = 0.02


def normal_param(key: jax.Array, shape: tuple[int, ...], std: float = INIT_STD) -> nnx.Param:
    """Draw a float32 parameter [*shape] from N(0, std^2)."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32))


def _product(x: jax.Array, weight: jax.Array, axes: tuple[tuple, tuple]) -> jax.Array:
    """`lax.dot_general` of tokens x [B, ...] and a weight over these axes of both.

    The weight's gradient is summed over the devices that share a batch. Where the tokens are few,
    as those of forks are, it is cheaper to send these, and their cotangents, to all devices, each
    of which makes its part of the gradient of all of them.
    """
    contracted = math.prod(weight.shape[axis] for axis in axes[1])
    kept, tokens = weight.size // contracted, x.size // contracted
    shared = axis_size("data") * axis_size("fsdp") > 1
    # A sum over devices sends every number twice.
    if shared and tokens * (contracted + kept) < 2 * weight.size:
        return _product_of_few(x, weight, axes)
    return lax.dot_general(x, weight, (axes, ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product_of_few(x, weight, axes):
    return lax.dot_general(x, weight, (axes, ((), ())))


def _product_of_few_forward(x, weight, axes):
    return _product_of_few(x, weight, axes), (x, weight)


def _product_of_few_backward(axes, residuals, cotangent):
    x, weight = residuals

    def pull(x, weight, cotangent, index):
        product = functools.partial(lax.dot_general, dimension_numbers=(axes, ((), ())))
        return jax.vjp(product, x, weight)[1](cotangent)[index]

    of_x = pull(x, weight, cotangent, 0)
    tokens = [axis for axis in range(x.ndim) if axis not in axes[0]]
    x, cotangent = gather_axes(x, tokens), gather_axes(cotangent, range(len(tokens)))
    return of_x, pull(x, weight, cotangent, 1)


_product_of_few.defvjp(_product_of_few_forward, _product_of_few_backward)


class LowRankUpdate(nnx.Module):
    """`s B A`, which is added to a linear map [out, in] (lora.py).

    a: A [r, in]. b: B [out, r]. scale: s.
    """

    def __init__(self, a: jax.Array, b: jax.Array, scale: jax.Array):
        self.a, self.b, self.scale = nnx.Param(a), nnx.Param(b), nnx.Param(scale)

    def down(self, x: jax.Array, a: jax.Array, axes: tuple[tuple, tuple]) -> jax.Array:
        """`s A x` [..., r]; a: A, its inputs cut as those of x are. axes: as of `_product`."""
        return _product(x, a.astype(x.dtype), axes) * self.scale[...].astype(x.dtype)

    def up(self, low: jax.Array, b: jax.Array) -> jax.Array:
        """`B low` [..., out], of low [..., r] and B [..., r]."""
        return _product(low, b.astype(low.dtype), ((low.ndim - 1,), (b.ndim - 1,)))


class Linear(nnx.Module):
    """Affine map with `weight` [out, in] and, if asked for, `bias` [out].

    update: added to the weight; None: nothing is.
    """

    def __init__(self, size_in: int, size_out: int, *, bias: bool = False, rngs: nnx.Rngs):
        self.weight = normal_param(rngs.params(), (size_out, size_in))
        self.bias = nnx.Param(jnp.zeros((size_out,), jnp.float32)) if bias else None
        self.update: LowRankUpdate | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        weight = self.weight[...].astype(x.dtype)
        bias = None if self.bias is None else self.bias[...].astype(x.dtype)

        def rows(x):
            axes = (x.ndim - 1,), (1,)
            y = _product(x, weight, axes)
            if update := self.update:
                y = y + update.up(update.down(x, update.a[...], axes), update.b[...])
            return y if bias is None else y + bias

        return by_rows(rows, x)

    def to_groups(self, x: jax.Array, count: int, groups: int) -> list[jax.Array]:
        """The output's `count` equal parts, each cut into groups.

        x: [..., T, in]. Returns arrays [..., groups, T, out / (count groups)].
        """

        def parts(weight):
            # Devices that share heads need some outputs of each part, which no contiguous share of
            # the whole output is.
            return constrain(weight.reshape(count, groups, -1, weight.shape[-1]), None, "heads")

        weight = parts(self.weight[...].astype(x.dtype))
        rows = drop_unit_axes(x, 2)
        if update := self.update:
            low = update.down(rows, update.a[...], ((rows.ndim - 1,), (1,)))
            outputs = parts(update.b[...])
        found = []
        for i in range(count):
            y = _product(rows, weight[i], ((rows.ndim - 1,), (2,)))
            if update:
                y = y + update.up(low, outputs[i])
            if self.bias is not None:
                y = y + self.bias[...].astype(x.dtype).reshape(count, groups, -1)[i]
            y = jnp.moveaxis(y, -2, -3)
            found.append(y.reshape(*x.shape[:-2], *y.shape[-3:]))
        return found

    def from_groups(self, x: jax.Array) -> jax.Array:
        """The map of groups side by side: [..., groups, T, in / groups] -> [..., T, out]."""

        def parts(weight):
            return weight.reshape(weight.shape[0], x.shape[-3], x.shape[-1])

        weight = parts(self.weight[...].astype(x.dtype))
        rows = drop_unit_axes(x, 3)
        axes = (rows.ndim - 3, rows.ndim - 1), (1, 2)
        y = _product(rows, weight, axes)
        if update := self.update:
            y = y + update.up(update.down(rows, parts(update.a[...]), axes), update.b[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        return y.reshape(*x.shape[:-3], *y.shape[-2:])


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """Compute `x / sqrt(mean(x^2) + eps) * (weight + offset)`, x [..., D], weight [D], in float32.

    offset: 1 where weights are those of a zero-centred norm.
    """

    def rows(x):
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
        scale = weight.astype(jnp.float32)
        return (y * (scale + offset if offset else scale)).astype(x.dtype)

    return by_rows(rows, x)


class RMSNorm(nnx.Module):
    """RMSNorm with a learned `weight` [size]; with offset 1 the norm is zero-centred."""

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        self.weight = nnx.Param(jnp.full((size,), 1.0 - offset, jnp.float32))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] -> [..., size]."""
        return rms_norm(x, self.weight[...], self.eps, self.offset)

    def of_groups(self, x: jax.Array) -> jax.Array:
        """The norm of groups side by side: [..., groups, T, size / groups], as x."""
        rows = drop_unit_axes(x, 3)
        y = rows.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=(-3, -1), keepdims=True) + self.eps)
        y = y * self.weight[...].astype(jnp.float32).reshape(x.shape[-3], 1, -1)
        return y.astype(x.dtype).reshape(x.shape)


def l2_norm_lact(x: jax.Array) -> jax.Array:
    """Compute LaCT's `x / (|x| + 1e-5)` of x [..., d]; the norm of a zero vector has gradient 0."""

    def rows(x):
        y = x.astype(jnp.float32)
        return (y / (safe_norm(y) + 1e-5)).astype(x.dtype)

    return by_rows(rows, x)


def rope(
    x: jax.Array, positions: jax.Array, theta: float, head_dim: int | None = None
) -> jax.Array:
    """Rotary embedding on non-interleaved halves (golden README, section 4).

    x: [..., n head_dim], n heads side by side, of even size; None: one head. positions: int32,
    broadcast against [...].
    """
    head_dim = head_dim or x.shape[-1]
    half = head_dim // 2
    # One head's angles for all, or those that fill the lanes of a TPU.
    size = math.gcd(x.shape[-1], math.lcm(head_dim, 128))
    frequency = theta ** (-(jnp.arange(size) % half).astype(jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency
    cos, sin = (jnp.tile(y, x.shape[-1] // size) for y in (jnp.cos(angle), jnp.sin(angle)))
    return (x.astype(jnp.float32) * cos + _turned(x, head_dim) * sin).astype(x.dtype)


def _turned(x: jax.Array, head_dim: int) -> jax.Array:
    """Halves (a, b) of every head to (-b, a), float32."""
    if backend() == "tpu":
        # Lanes move through the matrix unit, exactly: by a product with 1, -1 and 0.
        index = np.arange(x.shape[-1])
        first = index % head_dim < head_dim // 2
        matrix = np.zeros((x.shape[-1],) * 2)
        matrix[index + np.where(first, 1, -1) * (head_dim // 2), index] = np.where(first, -1, 1)
        return einsum("...i,ij->...j", x, jnp.asarray(matrix), x.dtype)
    a, b = jnp.split(x.astype(jnp.float32).reshape(*x.shape[:-1], -1, head_dim), 2, axis=-1)
    return jnp.concatenate([-b, a], axis=-1).reshape(x.shape)


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, size: int, hidden: int, *, rngs: nnx.Rngs):
        self.gate_proj = Linear(size, hidden, rngs=rngs)
        self.up_proj = Linear(size, hidden, rngs=rngs)
        self.down_proj = Linear(hidden, size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class ShortConv(nnx.Module):
    """Depthwise causal convolution with `weight` [channels, 1, W]; the last tap is the present."""

    def __init__(self, channels: int, taps: int, *, rngs: nnx.Rngs):
        # The bound of PyTorch's Conv1d: outputs of the order of the inputs.
        bound, shape = 1 / math.sqrt(taps), (channels, 1, taps)
        self.weight = nnx.Param(
            jax.random.uniform(rngs.params(), shape, jnp.float32, minval=-bound, maxval=bound)
        )


def convolve_rows(
    x: jax.Array, weight: jax.Array, position: jax.Array | None, axis_name: str | None
) -> jax.Array:
    """Convolve whole rows x [B, T, channels] by weight [channels, 1, W]; returns the shape of x.

    position: [B, T] int32, index of the tokens within their document: taps do not reach before
    its start. axis_name: mesh axis over which the tokens are spread.
    """

    def convolve(x, weight, position):
        reach = weight.shape[-1] - 1
        if axis_name is None or reach == 0:
            x = jnp.pad(x, ((0, 0), (reach, 0), (0, 0)))
        else:
            x = jnp.concatenate([halo(x, reach, axis_name), x], axis=1)
        return short_conv(x, weight, position)

    tokens = ("batch", axis_name and "tokens", "heads")
    convolve = over_shards(convolve, (tokens, ("heads",), tokens[:2]), tokens)
    return convolve(x, weight, position)


def short_conv(x: jax.Array, weight: jax.Array, position: jax.Array | None = None) -> jax.Array:
    """Convolve x [..., W - 1 + T, channels] by weight [channels, 1, W]: [..., T, channels].

    The first W - 1 tokens of x come before those of the output.
    """
    taps = weight.shape[-1]
    tokens = x.shape[-2] - (taps - 1)
    shape = (*x.shape[:-2], tokens, x.shape[-1])
    x = drop_unit_axes(x, 2)
    position = None if position is None else drop_unit_axes(position, 1)
    y = 0.0
    for tap in range(taps):
        term = x[..., tap : tap + tokens, :].astype(jnp.float32) * weight[:, 0, tap]
        if position is not None:
            term = jnp.where((position >= taps - 1 - tap)[..., None], term, 0.0)
        y = y + term
    return y.astype(x.dtype).reshape(shape)
