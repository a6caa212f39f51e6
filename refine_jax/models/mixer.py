"""A mixer: what a layer does between its norm and its residual.

A mixer mixes the tokens of a row, causally and document by document. The model (transformer.py)
scans its layers and calls their mixers by these members alone, so that a new architecture is one
file beside `lact.py`, `deltanet.py` and `full_attention.py`, and an entry in block.py.

Letters: B batch, T tokens, D model dim, R forks of a row, S new tokens of a fork, L layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from refine_jax.models.layout import Layout


class Mixer(nnx.Module):
    """What the model calls, and why each member is there.

    The members that are defined here serve mixers whose layers share no plan, and whose decode
    states have room for any number of tokens and are complete as `resume` and `extend` make them.
    The others raise NotImplementedError.

    Four kinds of values belong to the mixer; the model only hands them on. Their leaves lead with
    the axes given here, and with L before them where they are those of all layers.

    * A plan [B, ...] is what all layers share and the layout decides, such as the places of chunks.
    * A trace [B, ...] is what a forward pass leaves behind for forks.
    * A decode state [B, R, ...] is what is needed to continue a fork. Its size does not depend on
      the tokens that were seen, but for the caches of full attention. What the forks of a row share
      leads with [B, ...].
    * A change [B, R, ...] is what `extend` made of a state, as small as it can be sent from one
      layer of the scan to the next; `advance` makes the new state of it. States that grow are
      written in the scan.

    Static methods need no parameters: the model calls them for all layers at once, outside the
    scan, which would otherwise copy the trace or the states of each layer.
    """

    config: Any
    """The part of the model's configuration that layers of this kind read (`layer_config`)."""

    WRITES_MUCH: bool = False
    """Whether writing a state takes longer than reading a few tokens once more.

    If so, rollouts leave their states as they are and read all of their tokens at each step.
    """

    TRACES_INPUTS: bool = False
    """Whether the trace holds the mixer's input, as its field `x` [B, T, D].

    With remat "full" the backward pass keeps the layers' inputs anyway; forks then read these,
    through `normed`, and the trace's field is left out.
    """

    FORKS_ONCE: bool = False
    """Whether forks that share a position share what is made of the trace for it.

    `fork` then gets P positions, and the model copies the states; `extend_traced` gets
    `positions` [B, P] for R = n P forks. Else each of R forks has a position of its own.
    """

    GROWS: bool = False
    """Whether a state holds what it keeps of each token, so that it grows with them.

    States of all layers then go through the scan, which would otherwise copy each of them: they are
    extended by `extend_layer`, which takes the place of `advance`.
    """

    FORK_AXES: tuple[str, ...] = ("batch",)
    """Logical axes by which new tokens [B, R, S, D] are spread over devices (parallel.py).

    With the name "forks", chips that share a row share out its forks.
    """

    def __init__(self, config: Any, *, implementation: str | None = None, rngs: nnx.Rngs) -> None:
        """Make parameters named and laid out as in the published PyTorch checkpoints.

        implementation: Of the kernels, as `ComputePolicy` has it.
        """
        raise NotImplementedError

    @staticmethod
    def plan(config: Any, layout: Layout | None, shape: tuple[int, int]) -> Any:
        """Plan rows of `shape` (B, T): computed once, not in each layer."""
        del config, layout, shape

    def forward(
        self, x: jax.Array, layout: Layout | None, plan: Any, forks: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Run whole rows x [B, T, D].

        forks: [B, R] int32, slots before forks, where these are known before the pass, as in the
          update. The trace may then hold what these forks need alone, taken out where it is made,
          so that its gradient is added where it belongs instead of as an array as large as the
          rows.

        Returns y [B, T, D], undefined at padding, and the trace. The model calls `extend_traced`
        with the same `forks`.
        """
        raise NotImplementedError

    # From a trace to decode states, in three steps: only the second needs parameters, and runs in
    # the scan over layers, on arrays that are as small as the forks.

    @staticmethod
    def pick(
        config: Any, trace: Any, positions: jax.Array, layout: Layout | None, plan: Any
    ) -> Any:
        """Cut out of a trace what forks after the first `positions` [B, R] slots need."""
        raise NotImplementedError

    def resume(
        self,
        picked: Any,
        positions: jax.Array,
        layout: Layout | None,
        plan: Any,
        horizon: int | None = None,
    ) -> Any:
        """Compute what states [B, R, ...] need of parameters, such as the keys of replayed tokens.

        horizon: The most tokens that the forks will take. What only later tokens need may be left
          out; None: nothing is.
        """
        raise NotImplementedError

    @staticmethod
    def finish(
        config: Any,
        picked: Any,
        resumed: Any,
        positions: jax.Array,
        layout: Layout | None,
    ) -> Any:
        """Make the decode states [B, R, ...] of what was picked and what was resumed."""
        del config, picked, positions, layout
        return resumed

    @staticmethod
    def normed(picked: Any, norm: nnx.Module) -> Any:
        """Apply a layer's norm to the inputs that were picked before it.

        Only mixers that trace their inputs have it.
        """
        raise NotImplementedError

    # Decode states

    def init_state(self, batch: tuple[int, int], dtype: jnp.dtype) -> Any:
        """Make the states of `batch` (B, R) before any token; activations in them have `dtype`."""
        raise NotImplementedError

    def extend(self, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Continue states by x [B, R, S, D]. Returns y [B, R, S, D] and the change."""
        raise NotImplementedError

    @staticmethod
    def advance(state: Any, change: Any) -> Any:
        """Make the new states of all layers, in place where they are large."""
        del state
        return change

    # Decode states, of all layers, that grow with their tokens

    def extend_layer(self, x: jax.Array, states: Any, layer: jax.Array) -> tuple[jax.Array, Any]:
        """`extend` of one `layer` of the states of all, written where they are.

        They have room for the new tokens. Not differentiable. Returns y and all states.
        """
        raise NotImplementedError

    @staticmethod
    def grown(states: Any, num_new: int) -> Any:
        """Make room for `num_new` tokens in states whose shape is not fixed."""
        raise NotImplementedError

    @staticmethod
    def capacity(state: Any) -> int | None:
        """Tell how many tokens of their own the states have room for; None: for any number."""
        del state

    @staticmethod
    def used(state: Any) -> jax.Array | None:
        """Tell how many tokens [L, B, R] that take room the states hold; None: none do."""
        del state

    @staticmethod
    def held(config: Any, num_tokens: int) -> int:
        """Tell how many of a fork's own tokens its state must hold to continue after these."""
        del config, num_tokens
        return 0

    @staticmethod
    def trimmed(config: Any, state: Any) -> Any:
        """Leave out of the states what no later token sees."""
        del config
        return state

    @staticmethod
    def resize(state: Any, capacity: int) -> Any:
        """Make room for as many tokens, or keep as many; the states' shape is then fixed."""
        del capacity
        return state

    # Forks without decode states

    def extend_traced(
        self, x: jax.Array, trace: Any, positions: jax.Array, layout: Layout | None, plan: Any
    ) -> jax.Array:
        """Continue forks at `positions` by x [B, R, S, D], differentiably in the trace.

        positions: [B, R] int32, or [B, P] with `FORKS_ONCE`.

        Equal to `extend` from the forks' states, which a gradient would have to keep or send.
        Returns y [B, R, S, D].
        """
        raise NotImplementedError

    @staticmethod
    def reads_traces(config: Any, num_new: int) -> bool:
        """Say whether `extend_in_place` takes so many tokens, and less memory than states."""
        del config, num_new
        return False

    def extend_in_place(
        self,
        x: jax.Array,
        traces: Any,
        layer: jax.Array,
        positions: jax.Array,
        layout: Layout | None,
        plan: Any,
    ) -> jax.Array:
        """`extend_traced` in one `layer` of the traces [L, B, ...] of all, for rollouts.

        Not differentiable. Only mixers that write much have it.
        """
        raise NotImplementedError


def fork(
    mixer: Mixer,
    trace: Any,
    positions: jax.Array,
    layout: Layout | None,
    plan: Any,
    horizon: int | None = None,
) -> Any:
    """Decode states of one layer after the first `positions` [B, R] slots of the traced rows.

    horizon: As of `Mixer.resume`.
    """
    picked = mixer.pick(mixer.config, trace, positions, layout, plan)
    resumed = mixer.resume(picked, positions, layout, plan, horizon)
    return mixer.finish(mixer.config, picked, resumed, positions, layout)
