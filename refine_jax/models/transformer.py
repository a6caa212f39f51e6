"""The language models: embedding, a scan over layers, final norm, head.

A model offers the three functions that everything else is built on (DESIGN, section 2):

    hidden, trace = model.forward(params, tokens, layout)     # whole sequences, once
    state = model.fork(params, trace, positions)              # exact decode states at positions
    hidden, state = model.extend(params, tokens, state)       # continue any state

Parameters are a nested dict of arrays named and laid out as in the published PyTorch checkpoints,
with the layers stacked on a leading axis L; those of a hybrid model in one stack for each kind of
layer (pattern.py), as are its traces and states.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from refine_jax.kernels.numerics import computed_once
from refine_jax.models.block import (
    ComputePolicy,
    LayerStack,
    State,
    copied,
    exact_float32,
    extend_forks,
    places_of,
    recomputed_extend_forks,
    run_block,
)
from refine_jax.models.layers import normal_param, rms_norm
from refine_jax.models.layout import Layout
from refine_jax.models.trainable import Params, join, select
from refine_jax.parallel import constrain, gather_parameters

__all__ = ["ComputePolicy", "Model", "Params", "Rows", "State", "Trace", "TracedForks"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """What forks need of a forward pass; every leaf of `layers` leads with [L, B].

    inputs: [L, B, T, D], of the layers, where these are kept anyway: they stand for those that the
    mixers' traces would hold. layers, plan and inputs are by kinds where there are several.
    """

    layers: Any
    layout: Layout | None
    plan: Any
    inputs: Any = None


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Pullbacks:
    """Pullbacks of the layers of a kind: what is in them, stacked, and what they compute of it.

    Layers of a kind are traced once in each segment of the pattern, and have equal pullbacks.
    """

    leaves: list[jax.Array]
    structure: Any = dataclasses.field(metadata={"static": True})


class Model(LayerStack):
    """A fast-weight language model: static configuration, and pure functions of its parameters."""

    def init(self, key: jax.Array) -> Params:
        """Draw random float32 parameters, those of the layers stacked [L, ...]."""
        config = self.config
        embedding_key, layers_key, head_key = jax.random.split(key, 3)
        shape = (config.vocab_size, config.hidden_size)
        std = config.initializer_range

        norm = jnp.full((config.hidden_size,), 1.0 - config.norm_offset, jnp.float32)
        params = {
            "embeddings": {"weight": normal_param(embedding_key, shape, std)[...]},
            "layers": self.init_layers(layers_key),
            "norm": {"weight": norm},
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
            # [L, in, out] in layers, [V, D] elsewhere; norms and convolutions have other axes.
            is_linear = path[-1].key == "weight" and x.ndim == (3 if path[0].key == "layers" else 2)
            return computed_once(x.astype(self.dtype)) if is_linear else x

        whole = {name: gather_parameters({name: x}, self.dtype)[name] for name, x in params.items()}
        return jax.tree_util.tree_map_with_path(convert, whole)

    def _embed(self, params: Params, tokens: jax.Array) -> jax.Array:
        table = gather_parameters({"embeddings": params["embeddings"]})["embeddings"]["weight"]
        return table[tokens].astype(self.dtype)

    def _final_norm(self, params: Params, x: jax.Array) -> jax.Array:
        config = self.config
        return rms_norm(x, params["norm"]["weight"], config.norm_eps, config.norm_offset)

    @exact_float32
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
        plan = self._plan(layout, tokens.shape)

        def layer(kind, x, layer_params):
            block = self._block(kind, layer_params)
            x, trace = run_block(block, x, layout, self._pattern.of_kind(plan, kind))
            return x, trace if with_trace else None

        layer = self.policy.recomputed(layer, static_argnums=0)
        x = constrain(self._embed(params, tokens), "batch", "tokens")
        x, layers = self._pattern.scan(layer, x, params["layers"])
        trace = Trace(layers, layout, plan) if with_trace else None
        return self._final_norm(params, x), trace

    @exact_float32
    def fork(
        self,
        params: Params,
        trace: Trace,
        positions: jax.Array,
        *,
        horizon: int | None = None,
        copies: int = 1,
    ) -> State:
        """Decode states after the first `positions` [B, P] slots of the traced rows.

        horizon: the most tokens by which the states will be extended, if known: lets LaCT leave
        out what only a crossing of a chunk boundary needs. copies: how many states each position
        gets, one after the other: R = P copies.
        """

        pattern, layout = self._pattern, trace.layout
        places = {kind: places_of(mixer, positions, copies) for kind, mixer in self._mixers.items()}

        def pick(kind, layers, inputs):
            mixer, plan = self._mixers[kind], pattern.of_kind(trace.plan, kind)

            def layer(layer_trace, inputs):
                if inputs is not None:
                    layer_trace = layer_trace._replace(x=inputs)
                return mixer.pick(self._parts[kind], layer_trace, places[kind], layout, plan)

            return jax.vmap(layer)(layers, inputs)

        def layer(kind, _, inputs):
            layer_params, picked = inputs
            block, plan = self._block(kind, layer_params), pattern.of_kind(trace.plan, kind)
            if pattern.of_kind(trace.inputs, kind) is not None:
                picked = self._mixers[kind].normed(picked, block.attn_norm)
            return None, block.attn.resume(picked, places[kind], layout, plan, horizon)

        def finish(kind, picked, resumed):
            mixer, part = self._mixers[kind], self._parts[kind]
            states = jax.vmap(lambda *parts: mixer.finish(part, *parts, places[kind], layout))(
                picked, resumed
            )
            return copied(states, copies, 2) if mixer.FORKS_ONCE else states

        # For all layers at once: the loop would copy each layer's whole trace, and what is picked.
        picked = pattern.map(pick, trace.layers, trace.inputs)
        resumed = pattern.scan(layer, None, pattern.zip(params["layers"], picked))[1]
        return pattern.map(finish, picked, resumed)

    @exact_float32
    def extend(self, params: Params, tokens: jax.Array, state: State) -> tuple[jax.Array, State]:
        """Continue decode states by `tokens` [B, R, S].

        Returns the final norm's output [B, R, S, D] and the new state. Differentiable but for
        models with full attention.
        """
        pattern = self._pattern
        grown = {
            kind: mixer.grown(pattern.of_kind(state, kind), tokens.shape[2])
            for kind, mixer in self._mixers.items()
            if mixer.GROWS
        }

        def layer(kind, carry, inputs):
            x, grown = carry
            layer_params, layer_state = inputs
            block = self._block(kind, layer_params)
            if kind in grown:
                y, states = block.attn.extend_layer(block.read(x), grown[kind], layer_state)
                return (block.add(x, y), grown | {kind: states}), None
            y, change = block.attn.extend(block.read(x), layer_state)
            return (block.add(x, y), grown), change

        states = pattern.map(
            lambda kind, x: jnp.arange(len(jax.tree.leaves(x)[0])) if kind in grown else x, state
        )
        carry = self._embed(params, tokens), grown
        inputs = pattern.zip(params["layers"], states)
        (x, grown), changes = pattern.scan(layer, carry, inputs)
        state = pattern.map(
            lambda kind, *x: grown[kind] if kind in grown else self._mixers[kind].advance(*x),
            state,
            changes,
        )
        return self._final_norm(params, x), state

    @exact_float32
    def forward_forks(
        self, params: Params, trace: Trace, positions: jax.Array, tokens: jax.Array
    ) -> jax.Array:
        """Hidden states [B, R, S, D] of `tokens` [B, R, S] continuing rows at `positions` [B, P].

        R / P forks that follow each other have the same position.

        Equal to `extend(params, tokens, fork(params, trace, positions))`, but each layer's states
        live only while that layer runs. Differentiable in params and in trace; with the trace of
        a differentiated `forward` the gradient is that of running every prefix on its own.
        """

        # Recomputed in the backward pass: few tokens, but states far larger than them.
        @functools.partial(jax.checkpoint, static_argnums=0)
        def layer(kind, x, inputs):
            layer_params, layer_trace = inputs
            block, plan = self._block(kind, layer_params), self._pattern.of_kind(trace.plan, kind)
            return extend_forks(block, x, layer_trace, positions, trace.layout, plan), None

        inputs = self._pattern.zip(params["layers"], trace.layers)
        x, _ = self._pattern.scan(layer, self._embed(params, tokens), inputs)
        return self._final_norm(params, x)

    @exact_float32
    def forward_with_forks(
        self,
        params: Params,
        tokens: jax.Array,
        layout: Layout | None,
        positions: jax.Array,
        continuations: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Run whole rows, and `continuations` [B, R, S] of them at `positions` [B, P].

        R / P continuations that follow each other begin at the same position.

        Equal to `forward` followed by `forward_forks`, as is the gradient, but rows and forks go
        through a layer together: a trace lives only while its layer runs.
        Returns hidden states of the rows [B, T, D] and of the continuations [B, R, S, D].
        """
        plans = self._plan(layout, tokens.shape)
        # Where the whole layer is computed again, so are its forks.
        extend = extend_forks if self.policy.remat == "full" else recomputed_extend_forks

        def layer(kind, carry, layer_params):
            x, forks = carry
            block, plan = self._block(kind, layer_params), self._pattern.of_kind(plans, kind)
            x, trace = run_block(block, x, layout, plan, positions)
            return (x, extend(block, forks, trace, positions, layout, plan)), None

        layer = self.policy.recomputed(layer, static_argnums=0)
        x = constrain(self._embed(params, tokens), "batch", "tokens")
        forks = constrain(self._embed(params, continuations), *self._fork_axes)
        (x, forks), _ = self._pattern.scan(layer, (x, forks), params["layers"])
        return self._final_norm(params, x), self._final_norm(params, forks)

    # One forward pass that forks join: their tokens are known when it has ended only

    @exact_float32
    def run_rows(self, params: Params, tokens: jax.Array, layout: Layout | None) -> Rows:
        """Run whole rows `tokens` [B, T], for forks and a `backward` pass.

        Nothing here is for autodiff.
        """
        plan = self._plan(layout, tokens.shape)
        recompute, pattern = self.policy.remat == "full", self._pattern

        def layer(kind, x, layer_params):
            def run(layer_params, x):
                block = self._block(kind, layer_params)
                return run_block(block, x, layout, pattern.of_kind(plan, kind))

            if self.policy.remat == "dots":
                run = self.policy.recomputed(run)
            if recompute:
                new, trace = run(layer_params, x)
                inputs_kept = self._mixers[kind].TRACES_INPUTS
                return new, (trace._replace(x=None) if inputs_kept else trace, x)
            (new, trace), pullback = jax.vjp(run, layer_params, x)
            # The parameters are there in the backward pass: no copies of them.
            pullback.args_res[0] = None
            if kind is None:
                return new, (trace, pullback)
            leaves, structure = jax.tree.flatten(pullback)
            structures.setdefault(kind, structure)
            return new, (trace, leaves)

        structures: dict[str | None, Any] = {}
        x = constrain(self._embed(params, tokens), "batch", "tokens")
        x, found = pattern.scan(layer, x, params["layers"])
        layers, saved = pattern.unzip(found, 2)
        inputs = None
        if recompute:
            if any(mixer.TRACES_INPUTS for mixer in self._mixers.values()):
                inputs = pattern.map(
                    lambda kind, x: x if self._mixers[kind].TRACES_INPUTS else None, saved
                )
        elif structures:
            saved = pattern.map(lambda kind, leaves: _Pullbacks(leaves, structures[kind]), saved)
        trace = Trace(layers, layout, plan, inputs)
        return Rows(self._final_norm(params, x), x, trace, tokens, saved)

    @exact_float32
    def run_forks(
        self, params: Params, tokens: jax.Array, state: State | TracedForks
    ) -> tuple[jax.Array, jax.Array]:
        """Continue decode states, which stay as they are, by `tokens` [B, R, S].

        Returns the final norm's output [B, R, S, D], and the inputs [L + 1, B, R, S, D] of all
        layers and of that norm, for a `backward` pass.
        """
        traced = isinstance(state, TracedForks)

        pattern = self._pattern

        def layer(kind, x, inputs):
            layer_params, layer_state = inputs
            block = self._block(kind, layer_params)
            normed = block.read(x)
            if traced:
                layers, plan = (
                    pattern.of_kind(y, kind) for y in (state.trace.layers, state.trace.plan)
                )
                where = layers, layer_state, state.positions, state.trace.layout, plan
                y = block.attn.extend_in_place(normed, *where)
            else:
                y, _ = block.attn.extend(normed, layer_state)
            return block.add(x, y), x

        x = constrain(self._embed(params, tokens), *self._fork_axes)
        states = state
        if traced:
            states = pattern.map(
                lambda _, x: jnp.arange(len(jax.tree.leaves(x)[0])), params["layers"]
            )
        x, inputs = pattern.scan(layer, x, pattern.zip(params["layers"], states))
        return self._final_norm(params, x), jnp.concatenate([pattern.in_order(inputs), x[None]])

    @exact_float32
    def backward(
        self,
        params: Params,
        rows: Rows,
        positions: jax.Array,
        continuations: jax.Array,
        fork_inputs: jax.Array,
        cotangents: tuple[jax.Array, jax.Array],
        trained: Params | None = None,
    ) -> Params:
        """Gradient of rows and of forks that continue them, layer by layer in reverse.

        Equal to the pullback of `forward_with_forks`, without a second forward pass: with remat
        "full" each layer is computed again, once, with its forks; else its forks are, from its
        trace.

        Args:
          rows: As `run_rows` gives them.
          positions: [B, P] int32, slots before forks, of which R / P that follow each other have
            the same.
          continuations: [B, R, S] int32, tokens of the forks.
          fork_inputs: [L + 1, B, R, S, D], as `run_forks` gives them.
          cotangents: Of the hidden states of the rows [B, T, D] and of the forks [B, R, S, D].
          trained: Nested dict with the names of the parameters that are trained; None: all are.

        Returns the gradient with respect to the parameters that are trained, but for those of the
        head alone.
        """
        layout, pattern = rows.trace.layout, self._pattern
        trained = params if trained is None else trained
        recompute = self.policy.remat == "full"

        def of_trained(kind, layer_params):
            layers = trained.get("layers", {})
            return select(layer_params, layers if kind is None else layers.get(kind, {}))

        def layer(kind, cotangents, inputs):
            layer_params, saved, forks, trace = inputs
            plan, own = pattern.of_kind(rows.trace.plan, kind), of_trained(kind, layer_params)

            def both(own, x, forks):
                block = self._block(kind, join(layer_params, own))
                x, trace = run_block(block, x, layout, plan, positions)
                return x, extend_forks(block, forks, trace, positions, layout, plan)

            def extend(own, forks, trace):
                block = self._block(kind, join(layer_params, own))
                return extend_forks(block, forks, trace, positions, layout, plan)

            if recompute:
                _, pullback = jax.vjp(both, own, saved, forks)
                gradient, *cotangents = pullback(cotangents)
                return tuple(cotangents), gradient
            of_x, of_forks = cotangents
            _, pullback = jax.vjp(extend, own, forks, trace)
            from_forks, of_forks, of_trace = pullback(of_forks)
            if kind is not None:
                saved = jax.tree.unflatten(saved.structure, saved.leaves)
            saved.args_res[0] = layer_params
            gradient, of_x = saved((of_x, of_trace))
            gradient = jax.tree.map(jnp.add, of_trained(kind, gradient), from_forks)
            return (of_x, of_forks), gradient

        def norm(weight, *inputs):
            return tuple(self._final_norm({"norm": weight}, x) for x in inputs)

        _, pullback = jax.vjp(norm, params["norm"], rows.last, fork_inputs[-1])
        norm_gradient, *cotangents = pullback(cotangents)
        cotangents = tuple(cotangents)
        trace = None if recompute else rows.trace.layers
        inputs = params["layers"], rows.saved, pattern.by_kind(fork_inputs[:-1]), trace
        cotangents, layers = pattern.scan(layer, cotangents, pattern.zip(*inputs), reverse=True)

        def embed(table):
            embedded = {"embeddings": table}
            return self._embed(embedded, rows.tokens), self._embed(embedded, continuations)

        _, pullback = jax.vjp(embed, params["embeddings"])
        (embeddings,) = pullback(cotangents)
        gradient = {"embeddings": embeddings, "layers": layers, "norm": norm_gradient}
        return select(gradient, trained)
