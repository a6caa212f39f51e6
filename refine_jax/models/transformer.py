"""The language models: embedding, a scan over pre-norm layers, final norm, head.

A model offers the three functions that everything else is built on (DESIGN, section 2):

    hidden, trace = model.forward(params, tokens, layout)     # whole sequences, once
    state = model.fork(params, trace, positions)              # exact decode states at positions
    hidden, state = model.extend(params, tokens, state)       # continue any state

Parameters are a nested dict of arrays named and laid out as in the published PyTorch checkpoints,
with the layers stacked on a leading axis L.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from refine_jax.kernels import sequence
from refine_jax.kernels.device import backend
from refine_jax.kernels.tpu import computed_once
from refine_jax.models.config import (
    Architecture,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    LaCTConfig,
)
from refine_jax.models.deltanet import DeltaNetMixer, GatedDeltaNetMixer
from refine_jax.models.lact import LaCTMixer
from refine_jax.models.layers import MLP, RMSNorm, normal_param, rms_norm
from refine_jax.models.layout import Layout
from refine_jax.models.mixer import Mixer
from refine_jax.parallel import axis_size, constrain, gather_parameters

Params = dict[str, Any]
State = Any  # pytree of a mixer's decode state; every leaf leads with [L, B, R]

_MIXERS: dict[type[Architecture], type[Mixer]] = {
    LaCTConfig: LaCTMixer,
    DeltaNetConfig: DeltaNetMixer,
    GatedDeltaNetConfig: GatedDeltaNetMixer,
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """What forks need of a forward pass; every leaf of `layers` leads with [L, B].

    inputs: [L, B, T, D], of the layers, where these are kept anyway: they stand for those that the
    mixers' traces would hold.
    """

    layers: Any
    layout: Layout | None
    plan: Any
    inputs: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TracedForks:
    """Forks that are read in the trace of their rows, in place of decode states.

    positions: [B, R] int32, slots before the forks.
    """

    trace: Trace
    positions: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A forward pass over rows that forks can still join, as `Model.backward` takes it.

    hidden: [B, T, D], of the final norm. last: [B, T, D], its input. tokens: [B, T] int32. saved:
    by layer, what the backward pass begins with: the layer's input where it is computed again, else
    its pullback.
    """

    hidden: jax.Array
    last: jax.Array
    trace: Trace
    tokens: jax.Array
    saved: Any


class Block(nnx.Module):
    """`x + attn(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: Architecture, implementation: str | None, *, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = _MIXERS[type(config)](config, implementation=implementation, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config.hidden_size, config.mlp_size, rngs=rngs)

    def add_mlp(self, x: jax.Array) -> jax.Array:
        """Add the MLP of the normed x [..., D] to it: the second half of the block."""
        x = computed_once(x)
        return x + self.mlp(computed_once(self.mlp_norm(x)))


def _exact_float32(method):
    """Run `method` so that float32 products keep float32 accuracy on every device."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with jax.default_matmul_precision(self.matmul_precision):
            return method(self, *args, **kwargs)

    return wrapped


class Model:
    """A fast-weight language model: static configuration, and pure functions of its parameters."""

    def __init__(self, config: Architecture, policy: ComputePolicy | None = None):
        self.config = config
        self.policy = policy or ComputePolicy()
        self._mixer = _MIXERS[type(config)]
        block = nnx.eval_shape(lambda: self._new_block(jax.random.key(0)))
        self._block_graph, _ = nnx.split(block)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of activations."""
        return jnp.dtype(self.policy.compute_dtype)

    @property
    def writes_much(self) -> bool:
        """Whether writing a decode state takes longer than reading a few tokens once more."""
        return self._mixer.WRITES_MUCH

    @property
    def matmul_precision(self) -> str:
        """Precision under which the model's products run."""
        return "highest" if self.policy.compute_dtype == "float32" else "default"

    def _new_block(self, key: jax.Array) -> Block:
        return Block(self.config, self.policy.implementation, rngs=nnx.Rngs(key))

    def _block(self, layer_params: Params) -> Block:
        return nnx.merge(self._block_graph, gather_parameters(layer_params, self.dtype))

    def init(self, key: jax.Array) -> Params:
        """Draw random float32 parameters, those of the layers stacked [L, ...]."""
        config = self.config
        embedding_key, layers_key, head_key = jax.random.split(key, 3)
        shape = (config.vocab_size, config.hidden_size)
        std = config.initializer_range

        def layer(layer_key):
            return nnx.to_pure_dict(nnx.split(self._new_block(layer_key))[1])

        params = {
            "embeddings": {"weight": normal_param(embedding_key, shape, std)[...]},
            "layers": jax.vmap(layer)(jax.random.split(layers_key, config.num_hidden_layers)),
            "norm": {"weight": jnp.ones((config.hidden_size,), jnp.float32)},
        }
        if not config.tie_word_embeddings:
            params["lm_head"] = {"weight": normal_param(head_key, shape, std)[...]}
        return params

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def head_params(self, params: Params) -> Params:
        """Those of the parameters that `head` reads."""
        name = "embeddings" if self.config.tie_word_embeddings else "lm_head"
        return {name: params[name]}

    def head(self, params: Params) -> jax.Array:
        """The output embedding [V, D]."""
        ((_, gathered),) = gather_parameters(self.head_params(params)).items()
        return gathered["weight"]

    def gather(self, params: Params) -> Params:
        """The parameters whole on every device, linear maps in the activations' dtype: sent and
        converted once, for many passes over few tokens, which wait for them to be read. Not for the
        gradient.
        """

        def convert(path, x):
            is_linear = path[-1].key == "weight" and x.ndim > 1
            return computed_once(x.astype(self.dtype)) if is_linear else x

        whole = {name: gather_parameters({name: x}, self.dtype)[name] for name, x in params.items()}
        return jax.tree_util.tree_map_with_path(convert, whole)

    def _embed(self, params: Params, tokens: jax.Array) -> jax.Array:
        table = gather_parameters({"embeddings": params["embeddings"]})["embeddings"]["weight"]
        return table[tokens].astype(self.dtype)

    def _final_norm(self, params: Params, x: jax.Array) -> jax.Array:
        return rms_norm(x, params["norm"]["weight"], self.config.norm_eps)

    @_exact_float32
    def forward(
        self,
        params: Params,
        tokens: jax.Array,
        layout: Layout | None = None,
        *,
        with_trace: bool = False,
    ) -> tuple[jax.Array, Trace | None]:
        """Run whole rows.

        tokens: [B, T] int32. layout: where the real tokens are; None for full rows of one document.
        Returns the final norm's output [B, T, D] (undefined at padding) and, if asked for, the
        Trace that `fork` needs.
        """
        plan = self._mixer.plan(self.config, layout, tokens.shape)

        def layer(x, layer_params):
            x, trace = _run_rows(self._block(layer_params), x, layout, plan)
            return x, trace if with_trace else None

        if self.policy.remat != "none":
            layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[self.policy.remat])
        x = constrain(self._embed(params, tokens), "batch", "tokens")
        x, layers = lax.scan(layer, x, params["layers"])
        trace = Trace(layers, layout, plan) if with_trace else None
        return self._final_norm(params, x), trace

    @_exact_float32
    def fork(
        self, params: Params, trace: Trace, positions: jax.Array, *, horizon: int | None = None
    ) -> State:
        """Decode states after the first `positions` [B, R] slots of the traced rows.

        horizon: the most tokens by which the states will be extended, if known: lets LaCT leave
        out what only a crossing of a chunk boundary needs.
        """

        def pick(layer_trace, inputs):
            if inputs is not None:
                layer_trace = layer_trace._replace(x=inputs)
            return self._mixer.pick(self.config, layer_trace, positions, trace.layout, trace.plan)

        def layer(_, inputs):
            layer_params, picked = inputs
            block = self._block(layer_params)
            if trace.inputs is not None:
                picked = self._mixer.normed(picked, block.attn_norm)
            return None, block.attn.resume(picked, positions, trace.layout, trace.plan, horizon)

        def finish(picked, resumed):
            return self._mixer.finish(self.config, picked, resumed, positions, trace.layout)

        # For all layers at once: the loop would copy each layer's whole trace, and what is picked.
        picked = jax.vmap(pick)(trace.layers, trace.inputs)
        resumed = lax.scan(layer, None, (params["layers"], picked))[1]
        return jax.vmap(finish)(picked, resumed)

    @_exact_float32
    def extend(self, params: Params, tokens: jax.Array, state: State) -> tuple[jax.Array, State]:
        """Continue decode states by `tokens` [B, R, S].

        Returns the final norm's output [B, R, S, D] and the new state.
        """

        def layer(x, inputs):
            layer_params, layer_state = inputs
            block = self._block(layer_params)
            y, change = block.attn.extend(block.attn_norm(x), layer_state)
            return block.add_mlp(x + y), change

        x, changes = lax.scan(layer, self._embed(params, tokens), (params["layers"], state))
        return self._final_norm(params, x), self._mixer.advance(state, changes)

    @_exact_float32
    def forward_forks(
        self, params: Params, trace: Trace, positions: jax.Array, tokens: jax.Array
    ) -> jax.Array:
        """Hidden states [B, R, S, D] of `tokens` [B, R, S] continuing the rows at `positions`.

        Equal to `extend(params, tokens, fork(params, trace, positions))`, but each layer's states
        live only while that layer runs. Differentiable in params and in trace; with the trace of
        a differentiated `forward` the gradient is that of running every prefix on its own.
        """

        # Recomputed in the backward pass: few tokens, but states far larger than them.
        @jax.checkpoint
        def layer(x, inputs):
            layer_params, layer_trace = inputs
            block = self._block(layer_params)
            return _extend_forks(block, x, layer_trace, positions, trace.layout, trace.plan), None

        inputs = (params["layers"], trace.layers)
        x, _ = lax.scan(layer, self._embed(params, tokens), inputs)
        return self._final_norm(params, x)

    @_exact_float32
    def forward_with_forks(
        self,
        params: Params,
        tokens: jax.Array,
        layout: Layout | None,
        positions: jax.Array,
        continuations: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Run whole rows, and `continuations` [B, R, S] of them at `positions` [B, R].

        Equal to `forward` followed by `forward_forks`, as is the gradient, but rows and forks go
        through a layer together: a trace lives only while its layer runs.
        Returns hidden states of the rows [B, T, D] and of the continuations [B, R, S, D].
        """
        plan, whole = self._mixer.plan(self.config, layout, tokens.shape), self.policy.remat
        # Where the whole layer is computed again, so are its forks.
        extend = _extend_forks if whole == "full" else _recomputed_extend_forks

        def layer(carry, layer_params):
            x, forks = carry
            block = self._block(layer_params)
            x, trace = _run_rows(block, x, layout, plan, positions)
            return (x, extend(block, forks, trace, positions, layout, plan)), None

        if whole != "none":
            layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[whole])
        x = constrain(self._embed(params, tokens), "batch", "tokens")
        forks = constrain(self._embed(params, continuations), *self._mixer.FORK_AXES)
        (x, forks), _ = lax.scan(layer, (x, forks), params["layers"])
        return self._final_norm(params, x), self._final_norm(params, forks)

    # One forward pass that forks join: their tokens are known when it has ended only

    @_exact_float32
    def run_rows(self, params: Params, tokens: jax.Array, layout: Layout | None) -> Rows:
        """Run whole rows `tokens` [B, T], for forks and a `backward` pass.

        Nothing here is for autodiff.
        """
        plan = self._mixer.plan(self.config, layout, tokens.shape)
        recompute = self.policy.remat == "full"

        def run(layer_params, x):
            return _run_rows(self._block(layer_params), x, layout, plan)

        if self.policy.remat == "dots":
            run = jax.checkpoint(run, policy=_REMAT_POLICIES["dots"])

        def layer(x, layer_params):
            if recompute:
                new, trace = run(layer_params, x)
                return new, (trace._replace(x=None) if self._mixer.TRACES_INPUTS else trace, x)
            (new, trace), pullback = jax.vjp(run, layer_params, x)
            # The parameters are there in the backward pass: no copies of them.
            pullback.args_res[0] = None
            return new, (trace, pullback)

        x = constrain(self._embed(params, tokens), "batch", "tokens")
        x, (layers, saved) = lax.scan(layer, x, params["layers"])
        inputs = saved if recompute and self._mixer.TRACES_INPUTS else None
        trace = Trace(layers, layout, plan, inputs)
        return Rows(self._final_norm(params, x), x, trace, tokens, saved)

    def reads_traces(self, num_new: int) -> bool:
        """Whether `run_forks` takes `TracedForks` for that many tokens, with less memory than
        decode states need.
        """
        return axis_size("sequence") == 1 and self._mixer.reads_traces(self.config, num_new)

    @_exact_float32
    def run_forks(
        self, params: Params, tokens: jax.Array, state: State | TracedForks
    ) -> tuple[jax.Array, jax.Array]:
        """Continue decode states, which stay as they are, by `tokens` [B, R, S].

        Returns the final norm's output [B, R, S, D], and the inputs [L + 1, B, R, S, D] of all
        layers and of that norm, for a `backward` pass.
        """
        traced = isinstance(state, TracedForks)

        def layer(x, inputs):
            layer_params, layer_state = inputs
            block = self._block(layer_params)
            normed = block.attn_norm(x)
            if traced:
                trace, positions, number = state.trace, state.positions, layer_state
                where = trace.layers, number, positions, trace.layout, trace.plan
                y = block.attn.extend_in_place(normed, *where)
            else:
                y, _ = block.attn.extend(normed, layer_state)
            return block.add_mlp(x + y), x

        x = constrain(self._embed(params, tokens), *self._mixer.FORK_AXES)
        states = jnp.arange(self.config.num_hidden_layers) if traced else state
        x, inputs = lax.scan(layer, x, (params["layers"], states))
        return self._final_norm(params, x), jnp.concatenate([inputs, x[None]])

    @_exact_float32
    def backward(
        self,
        params: Params,
        rows: Rows,
        positions: jax.Array,
        continuations: jax.Array,
        fork_inputs: jax.Array,
        cotangents: tuple[jax.Array, jax.Array],
    ) -> Params:
        """Gradient of rows and of forks that continue them, layer by layer in reverse.

        Equal to the pullback of `run_with_forks`, without a second forward pass: with remat "full"
        each layer is computed again, once, with its forks; else its forks are, from its trace.

        Args:
          rows: As `run_rows` gives them.
          positions: [B, R] int32, slots before the forks.
          continuations: [B, R, S] int32, tokens of the forks.
          fork_inputs: [L + 1, B, R, S, D], as `run_forks` gives them.
          cotangents: Of the hidden states of the rows [B, T, D] and of the forks [B, R, S, D].

        Returns the gradient with respect to all parameters but those of the head alone.
        """
        layout, plan = rows.trace.layout, rows.trace.plan
        recompute = self.policy.remat == "full"

        def both(layer_params, x, forks):
            block = self._block(layer_params)
            x, trace = _run_rows(block, x, layout, plan, positions)
            return x, _extend_forks(block, forks, trace, positions, layout, plan)

        def extend(layer_params, forks, trace):
            return _extend_forks(self._block(layer_params), forks, trace, positions, layout, plan)

        def layer(cotangents, inputs):
            layer_params, saved, forks, trace = inputs
            if recompute:
                _, pullback = jax.vjp(both, layer_params, saved, forks)
                gradient, *cotangents = pullback(cotangents)
                return tuple(cotangents), gradient
            of_x, of_forks = cotangents
            _, pullback = jax.vjp(extend, layer_params, forks, trace)
            from_forks, of_forks, of_trace = pullback(of_forks)
            saved.args_res[0] = layer_params
            gradient, of_x = saved((of_x, of_trace))
            return (of_x, of_forks), jax.tree.map(jnp.add, gradient, from_forks)

        def norm(weight, *inputs):
            return tuple(self._final_norm({"norm": weight}, x) for x in inputs)

        _, pullback = jax.vjp(norm, params["norm"], rows.last, fork_inputs[-1])
        norm_gradient, *cotangents = pullback(cotangents)
        cotangents = tuple(cotangents)
        trace = None if recompute else rows.trace.layers
        inputs = (params["layers"], rows.saved, fork_inputs[:-1], trace)
        cotangents, layers = lax.scan(layer, cotangents, inputs, reverse=True)

        def embed(table):
            embedded = {"embeddings": table}
            return self._embed(embedded, rows.tokens), self._embed(embedded, continuations)

        _, pullback = jax.vjp(embed, params["embeddings"])
        (embeddings,) = pullback(cotangents)
        return {"embeddings": embeddings, "layers": layers, "norm": norm_gradient}

    def init_state(self, params: Params, batch: tuple[int, int]) -> State:
        """Decode states [L, B, R, ...] before any token; `batch` is (B, R)."""

        def layer(_, layer_params):
            return None, self._block(layer_params).attn.init_state(batch, self.dtype)

        return lax.scan(layer, None, params["layers"])[1]


def _run_rows(
    block: Block, x: jax.Array, layout: Layout | None, plan, forks: jax.Array | None = None
) -> tuple[jax.Array, Any]:
    """A layer's output for whole rows x [B, T, D], and its trace, or what `forks` need of it."""
    y, trace = block.attn.forward(block.attn_norm(x), layout, plan, forks)
    return constrain(block.add_mlp(x + y), "batch", "tokens"), trace


def _extend_forks(block: Block, x: jax.Array, trace, positions, layout, plan) -> jax.Array:
    """A layer's output for tokens x [B, R, S, D] that continue its traced rows at `positions`."""
    y = block.attn.extend_traced(block.attn_norm(x), trace, positions, layout, plan)
    return block.add_mlp(x + y)


def _recomputed_extend_forks(block: Block, x, trace, positions, layout, plan) -> jax.Array:
    graph, params = nnx.split(block)

    @jax.checkpoint
    def extend(params, x, trace):
        return _extend_forks(nnx.merge(graph, params), x, trace, positions, layout, plan)

    return extend(params, x, trace)
