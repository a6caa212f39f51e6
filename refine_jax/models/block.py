"""A layer of a model, mixer, MLP and their norms; and the stack of all layers.

Letters: B batch, T tokens, D model dim, R forks of a row, S new tokens of a fork, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from refine_jax.kernels import sequence
from refine_jax.kernels.device import backend
from refine_jax.kernels.numerics import computed_once
from refine_jax.models.config import (
    Architecture,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    LaCTConfig,
)
from refine_jax.models.deltanet import DeltaNetMixer
from refine_jax.models.full_attention import FullAttentionMixer
from refine_jax.models.gated_delta import GatedDeltaNetMixer, OlmoDeltaMixer, QwenDeltaMixer
from refine_jax.models.lact import LaCTMixer
from refine_jax.models.layer_config import AttentionConfig, OlmoDeltaConfig, QwenDeltaConfig
from refine_jax.models.layers import MLP, RMSNorm
from refine_jax.models.layout import Layout, round_length
from refine_jax.models.lora import attach, take_updates
from refine_jax.models.mixer import Mixer
from refine_jax.models.pattern import Pattern
from refine_jax.models.trainable import Params
from refine_jax.parallel import constrain, gather_parameters

State = Any  # pytree of a mixer's decode state; every leaf leads with [L, B, R]

MIXERS: dict[type, type[Mixer]] = {
    LaCTConfig: LaCTMixer,
    DeltaNetConfig: DeltaNetMixer,
    GatedDeltaNetConfig: GatedDeltaNetMixer,
    QwenDeltaConfig: QwenDeltaMixer,
    OlmoDeltaConfig: OlmoDeltaMixer,
    AttentionConfig: FullAttentionMixer,
}

_KEPT = jax.checkpoint_policies.save_only_these_names(sequence.KEPT)
_REMAT_POLICIES = {
    "full": _KEPT,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _KEPT
    ),
}


@dataclasses.dataclass(frozen=True)
class ComputePolicy:
    """How a model computes.

    compute_dtype: "float32" or "bfloat16", of activations and matmul operands; None: float32 on
        CPU, bfloat16 on accelerators. Fast-weight states, norms and losses are float32 in both.
    remat: what the backward pass of `forward` computes again: "none", "dots" (everything but
        matmul outputs) or "full" (every layer from its input).
    implementation: of the mixers' kernels; "xla" holds for attention and head too; None picks the
        best for the device.
    """

    compute_dtype: str | None = "float32"
    remat: str = "none"
    implementation: str | None = None

    def __post_init__(self):
        if self.compute_dtype is None:
            default = "float32" if backend() == "cpu" else "bfloat16"
            object.__setattr__(self, "compute_dtype", default)
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                "compute_dtype must be 'float32' or 'bfloat16'. "
                f"Got: compute_dtype={self.compute_dtype!r}."
            )
        if self.remat not in ("none", *_REMAT_POLICIES):
            raise ValueError(f"remat must be 'none', 'dots' or 'full'. Got: remat={self.remat!r}.")

    @property
    def head_implementation(self) -> str | None:
        """Implementation of the head's loss, which has no kernels of the mixers' other names."""
        return "xla" if self.implementation == "xla" else None

    def recomputed(self, function: Callable, static_argnums: int | tuple[int, ...] = ()):
        """`function`, of which the backward pass computes again what `remat` says."""
        if self.remat == "none":
            return function
        policy = _REMAT_POLICIES[self.remat]
        return jax.checkpoint(function, policy=policy, static_argnums=static_argnums)


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


def exact_float32(method):
    """Run `method` so that float32 products keep float32 accuracy on every device."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with jax.default_matmul_precision(self.matmul_precision):
            return method(self, *args, **kwargs)

    return wrapped


class LayerStack:
    """The layers of a model, kind by kind: their mixers, parameters, states and scans."""

    def __init__(self, config: Architecture, policy: ComputePolicy | None = None):
        self.config = config
        self.policy = policy or ComputePolicy()
        self._pattern = Pattern(config.layer_kinds)
        self._parts = {kind: config.layer_config(kind) for kind in self._pattern.kinds}
        self._mixers = {kind: MIXERS[type(part)] for kind, part in self._parts.items()}
        axes = {mixer.FORK_AXES for mixer in self._mixers.values()}
        self._fork_axes = axes.pop() if len(axes) == 1 else ("batch",)
        self._block_graphs = {}
        for kind in self._pattern.kinds:
            block = nnx.eval_shape(lambda kind=kind: self._new_block(kind, jax.random.key(0)))
            self._block_graphs[kind], _ = nnx.split(block)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of activations."""
        return jnp.dtype(self.policy.compute_dtype)

    @property
    def matmul_precision(self) -> str:
        """Precision under which the model's products run."""
        return "highest" if self.policy.compute_dtype == "float32" else "default"

    @property
    def writes_much(self) -> bool:
        """Whether writing a decode state takes longer than reading a few tokens once more."""
        return any(mixer.WRITES_MUCH for mixer in self._mixers.values())

    def reads_traces(self, num_new: int) -> bool:
        """Whether `run_forks` takes `TracedForks` for that many tokens, with less memory than
        decode states need.
        """
        return all(
            mixer.reads_traces(self._parts[kind], num_new) for kind, mixer in self._mixers.items()
        )

    def init_layers(self, key: jax.Array) -> Params:
        """Draw random float32 parameters of the layers, stacked [L, ...]."""

        def layers(kind, keys):
            def layer(layer_key):
                return nnx.to_pure_dict(nnx.split(self._new_block(kind, layer_key))[1])

            return jax.vmap(layer)(keys)

        keys = jax.random.split(key, self.config.num_hidden_layers)
        return self._pattern.map(layers, self._pattern.by_kind(keys))

    def init_state(self, params: Params, batch: tuple[int, int]) -> State:
        """Decode states [L, B, R, ...] before any token; `batch` is (B, R)."""

        def layer(kind, _, layer_params):
            return None, self._block(kind, layer_params).attn.init_state(batch, self.dtype)

        return self._pattern.scan(layer, None, params["layers"])[1]

    def capacity(self, state: State) -> int | None:
        """Tokens of their own that decode states have room for; None: for any number."""
        found = self._pattern.map(lambda kind, x: self._mixers[kind].capacity(x), state)
        return max(jax.tree.leaves(found), default=None)

    def resize(self, state: State, capacity: int) -> State:
        """Decode states with room for `capacity` tokens of their own, where they grow with these.

        Their shapes then stay as they are, and whoever extends them keeps to the room. Others get
        larger by each extension. States of layers that do not grow are as they were.
        """
        return self._pattern.map(lambda kind, x: self._mixers[kind].resize(x, capacity), state)

    def with_room(self, state: State, num_new: int) -> State:
        """Decode states with room for `num_new` more tokens; of few sizes. Not inside `jax.jit`.

        Tokens that windows have left behind make room first.
        """
        capacity = self.capacity(state)
        if capacity is None:
            return state
        needed = self._used(state) + num_new
        if needed > capacity:
            state = self._trim(state)
            needed = self._used(state) + num_new
        return self.resize(state, capacity if needed <= capacity else round_length(needed))

    def room_after(self, num_tokens: int, num_new: int) -> int:
        """Tell how much room `with_room` makes for `num_new` tokens after so many own ones."""
        mixers, parts = self._mixers, self._parts
        held = max(mixer.held(parts[kind], num_tokens) for kind, mixer in mixers.items())
        return round_length(held + num_new)

    @functools.partial(jax.jit, static_argnums=0)
    def _trim(self, state: State) -> State:
        parts = self._parts
        return self._pattern.map(lambda kind, x: self._mixers[kind].trimmed(parts[kind], x), state)

    def _used(self, state: State) -> int:
        used = self._pattern.map(lambda kind, x: self._mixers[kind].used(x), state)
        return max(int(x.max()) for x in jax.tree.leaves(used))

    def _new_block(self, kind: str | None, key: jax.Array) -> Block:
        form = PostNormBlock if self.config.is_post_norm(kind) else Block
        return form(self.config, kind, self.policy.implementation, rngs=nnx.Rngs(key))

    def _block(self, kind: str | None, layer_params: Params) -> Block:
        params, updates = take_updates(gather_parameters(layer_params, self.dtype))
        block = nnx.merge(self._block_graphs[kind], params)
        attach(block, updates)
        return block

    def _plan(self, layout: Layout | None, shape: tuple[int, int]) -> Any:
        """The mixers' plans of rows of `shape` (B, T), by kinds."""
        return self._pattern.map(
            lambda kind: self._mixers[kind].plan(self._parts[kind], layout, shape)
        )
