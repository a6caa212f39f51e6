"""The Gated DeltaNet mixer, and those of hybrid models, which name its parameters otherwise.

Letters as in deltanet.py: B batch, T tokens, D model dim, H key heads, Hv value heads, K key dim,
V value dim, W convolution taps.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from refine_jax.models.config import GatedDeltaNetConfig
from refine_jax.models.deltanet import DeltaNetMixer
from refine_jax.models.layer_config import DeltaLayerConfig
from refine_jax.models.layers import Linear, RMSNorm, ShortConv


class GatedDeltaNetMixer(DeltaNetMixer):
    """Gated DeltaNet's layer: DeltaNet (silu, l2 norm) with a decay per value head and token."""

    def __init__(
        self, config: GatedDeltaNetConfig, *, implementation: str | None = None, rngs: nnx.Rngs
    ):
        super().__init__(config, implementation=implementation, rngs=rngs)
        self.a_proj = Linear(config.hidden_size, config.num_value_heads, rngs=rngs)
        self._init_decay(config.num_value_heads, rngs)

    def _init_decay(self, heads: int, rngs: nnx.Rngs) -> None:
        # Initial values of the Gated DeltaNet code: rates of 0 to 16 times a step of 1e-3 to 0.1.
        rate = jax.random.uniform(rngs.params(), (heads,), jnp.float32, minval=1e-3, maxval=16.0)
        self.A_log = nnx.Param(jnp.log(rate))
        low, high = math.log(1e-3), math.log(0.1)
        step = jnp.exp(jax.random.uniform(rngs.params(), (heads,), minval=low, maxval=high))
        self.dt_bias = nnx.Param(step + jnp.log(-jnp.expm1(-step)))  # softplus of it is step

    def _decay_logits(self, x: jax.Array) -> jax.Array:
        return self.a_proj(x)

    @property
    def _learns_beta(self) -> bool:
        return True

    @property
    def _activation(self) -> str:
        return "silu"

    @property
    def _norm(self) -> str:
        return "l2"

    def _log_decay(self, x: jax.Array) -> jax.Array:
        step = jax.nn.softplus(self._decay_logits(x).astype(jnp.float32) + self.dt_bias[...])
        return -jnp.exp(self.A_log[...]) * step


def _widths(config: DeltaLayerConfig) -> tuple[int, int]:
    """The widths of q and of v, H K and Hv V."""
    return config.num_heads * config.key_dim, config.num_value_heads * config.value_dim


class OlmoDeltaMixer(GatedDeltaNetMixer):
    """Olmo Hybrid's layer: one convolution [2 H K + Hv V, 1, W] for q, k and v side by side."""

    def __init__(
        self, config: DeltaLayerConfig, *, implementation: str | None = None, rngs: nnx.Rngs
    ):
        super().__init__(config, implementation=implementation, rngs=rngs)
        del self.q_conv1d, self.k_conv1d, self.v_conv1d
        keys, values = _widths(config)
        self.conv1d = ShortConv(2 * keys + values, config.conv_size, rngs=rngs)

    @property
    def _taps(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys, weight = _widths(self.config)[0], self.conv1d.weight[...]
        return weight[:keys], weight[keys : 2 * keys], weight[2 * keys :]


class QwenDeltaMixer(OlmoDeltaMixer):
    """Qwen 3.5's layer: one projection for q, k and v as well."""

    def __init__(
        self, config: DeltaLayerConfig, *, implementation: str | None = None, rngs: nnx.Rngs
    ):
        nnx.Module.__init__(self)
        self.config = config
        self.implementation = implementation
        (keys, values), size, heads = _widths(config), config.hidden_size, config.num_value_heads
        self.in_proj_qkv = Linear(size, 2 * keys + values, rngs=rngs)
        self.in_proj_z = Linear(size, values, rngs=rngs)
        self.in_proj_b = Linear(size, heads, rngs=rngs)
        self.in_proj_a = Linear(size, heads, rngs=rngs)
        self.conv1d = ShortConv(2 * keys + values, config.conv_size, rngs=rngs)
        self.norm = RMSNorm(config.value_dim, config.norm_eps)
        self.out_proj = Linear(values, size, rngs=rngs)
        self._init_decay(heads, rngs)

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys, projected = _widths(self.config)[0], self.in_proj_qkv(x)
        return projected[..., :keys], projected[..., keys : 2 * keys], projected[..., 2 * keys :]

    def _project_kv(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self._project(x)[1:]

    def _beta_logits(self, x: jax.Array) -> jax.Array:
        return self.in_proj_b(x)

    def _decay_logits(self, x: jax.Array) -> jax.Array:
        return self.in_proj_a(x)

    def _gate(self, x: jax.Array) -> jax.Array:
        return self.in_proj_z(x)

    def o_norm(self, out: jax.Array) -> jax.Array:
        """The norm of each head's output [..., V]."""
        return self.norm(out)

    def o_proj(self, out: jax.Array) -> jax.Array:
        """The output projection [..., Hv V] -> [..., D]."""
        return self.out_proj(out)
