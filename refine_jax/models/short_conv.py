"""Short depthwise causal convolutions over whole rows, spread over devices or not."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from refine_jax.kernels.numerics import drop_unit_axes
from refine_jax.kernels.sequence import halo
from refine_jax.parallel import over_shards


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
