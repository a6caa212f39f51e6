"""A layer of a model: mixer, MLP and their norms, with what forks need of it.

Letters: B batch, T tokens, D model dim, R forks of a row, S new tokens of a fork.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from refine_jax.kernels.tpu import computed_once
from refine_jax.models.config import (
    Architecture,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    LaCTConfig,
)
from refine_jax.models.deltanet import DeltaNetMixer, GatedDeltaNetMixer
from refine_jax.models.full_attention import FullAttentionMixer
from refine_jax.models.hybrid_delta import OlmoDeltaMixer, QwenDeltaMixer
from refine_jax.models.lact import LaCTMixer
from refine_jax.models.layer_config import AttentionConfig, OlmoDeltaConfig, QwenDeltaConfig
from refine_jax.models.layers import MLP, RMSNorm
from refine_jax.models.layout import Layout
from refine_jax.models.mixer import Mixer
from refine_jax.parallel import constrain

MIXERS: dict[type, type[Mixer]] = {
    LaCTConfig: LaCTMixer,
    DeltaNetConfig: DeltaNetMixer,
    GatedDeltaNetConfig: GatedDeltaNetMixer,
    QwenDeltaConfig: QwenDeltaMixer,
    OlmoDeltaConfig: OlmoDeltaMixer,
    AttentionConfig: FullAttentionMixer,
}


class Block(nnx.Module):
    """`x + attn(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(
        self,
        config: Architecture,
        kind: str | None,
        implementation: str | None,
        *,
        rngs: nnx.Rngs,
    ):
        part, offset = config.layer_config(kind), config.norm_offset
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps, offset)
        self.attn = MIXERS[type(part)](part, implementation=implementation, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, offset)
        self.mlp = MLP(config.hidden_size, config.mlp_size, rngs=rngs)

    def read(self, x: jax.Array) -> jax.Array:
        """The mixer's input, of the block's input x [..., D]."""
        return self.attn_norm(x)

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The block's output, of its input x [..., D] and the mixer's output y [..., D]."""
        x = computed_once(x + y)
        return x + self.mlp(computed_once(self.mlp_norm(x)))


class PostNormBlock(Block):
    """`x + norm(attn(x))`, then `x + norm(mlp(x))`."""

    def read(self, x: jax.Array) -> jax.Array:
        """See `Block`."""
        return x

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """See `Block`."""
        x = computed_once(x + self.attn_norm(y))
        return x + self.mlp_norm(self.mlp(x))


def run_block(
    block: Block, x: jax.Array, layout: Layout | None, plan, forks: jax.Array | None = None
) -> tuple[jax.Array, Any]:
    """A layer's output for whole rows x [B, T, D], and its trace, or what `forks` need of it."""
    y, trace = block.attn.forward(block.read(x), layout, plan, forks)
    return constrain(block.add(x, y), "batch", "tokens"), trace


def places_of(mixer: type[Mixer] | Mixer, positions: jax.Array, copies: int) -> jax.Array:
    """The positions that a mixer takes for `copies` forks of each of `positions` [B, P]."""
    return positions if mixer.FORKS_ONCE else copied(positions, copies, 1)


def copied(tree: Any, copies: int, axis: int) -> Any:
    """Each entry of an axis `copies` times, one after the other."""
    return tree if copies == 1 else jax.tree.map(lambda x: jnp.repeat(x, copies, axis), tree)


def extend_forks(block: Block, x: jax.Array, trace, positions, layout, plan) -> jax.Array:
    """A layer's output for tokens x [B, R, S, D] that continue its traced rows.

    positions: [B, P]; R / P forks that follow each other have the same.
    """
    positions = places_of(block.attn, positions, x.shape[1] // positions.shape[1])
    y = block.attn.extend_traced(block.read(x), trace, positions, layout, plan)
    return block.add(x, y)


def recomputed_extend_forks(block: Block, x, trace, positions, layout, plan) -> jax.Array:
    """`extend_forks`, computed again in the backward pass."""
    graph, params = nnx.split(block)

    @jax.checkpoint
    def extend(params, x, trace):
        return extend_forks(nnx.merge(graph, params), x, trace, positions, layout, plan)

    return extend(params, x, trace)
