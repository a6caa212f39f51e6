"""The full-attention mixer of hybrid models.

A fork reads the keys and values of its row where they are, up to the slot where it begins, beside
those of its own tokens: the forks of a row share them. What a state holds grows with its tokens, up
to those of the window, if there is one.

Letters: B batch, T tokens, D model dim, G key heads, n queries of a key head, hd head dim, R forks
of a row, S new tokens, C tokens that a cache has room for.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from refine_jax.kernels.sequence import join_softmax
from refine_jax.models.attention import write_layer
from refine_jax.models.causal_attention import (
    attend,
    attend_layer,
    causal_attention,
    join,
    repeat_heads,
    repeats_for,
)
from refine_jax.models.chunks import last_and_seen
from refine_jax.models.layer_config import AttentionConfig
from refine_jax.models.layers import Linear, RMSNorm, rope
from refine_jax.models.layout import Layout
from refine_jax.models.mixer import Mixer
from refine_jax.parallel import axis_size, over_shards, token_axis


class AttentionTrace(NamedTuple):
    """Keys, with positions, and values of rows, [B, G, T, hd] each."""

    k: jax.Array
    v: jax.Array


class SharedRow(NamedTuple):
    """The keys and values of rows that forks begin in.

    k, v: [B, G, T, hd]. last: [B, R] int32, slot of the row's last token before a fork. seen:
    [B, R] int32, tokens that its document has up to there; may be 0. Of all layers: [N, ...] each.
    """

    k: jax.Array
    v: jax.Array
    last: jax.Array
    seen: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionState:
    """A decode state.

    keys, values: [B, R, G, C, hd], of the fork's own tokens, in the first `count` [B, R] slots.
    row: what came before these; None: nothing. dropped: [B, R] int32, own tokens before the first
    slot, which left the window; None: there is no window. fixed: whether C stays as it is when the
    state is extended, and whoever extends it sees to it that there is room; else C grows by each
    extension.
    """

    keys: jax.Array
    values: jax.Array
    count: jax.Array
    row: SharedRow | None
    dropped: jax.Array | None
    fixed: bool = dataclasses.field(metadata={"static": True})

    @property
    def own(self) -> jax.Array:
        """The fork's own tokens so far [B, R]."""
        return self.count if self.dropped is None else self.count + self.dropped

    @property
    def seen(self) -> jax.Array:
        """All tokens so far [B, R]."""
        return self.own if self.row is None else self.own + self.row.seen


class AttentionChange(NamedTuple):
    """What `extend` adds to a state: keys and values of the new tokens, [B, R, G, S, hd] each."""

    keys: jax.Array
    values: jax.Array


class FullAttentionMixer(Mixer):
    """Causal attention with grouped queries."""

    GROWS = True

    def __init__(
        self, config: AttentionConfig, *, implementation: str | None = None, rngs: nnx.Rngs
    ):
        self.config = config
        self.implementation = implementation
        size, queries = config.hidden_size, config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        doubled = queries * (2 if config.gated else 1)
        self.q_proj = Linear(size, doubled, bias=config.qkv_bias, rngs=rngs)
        self.k_proj = Linear(size, keys, bias=config.qkv_bias, rngs=rngs)
        self.v_proj = Linear(size, keys, bias=config.qkv_bias, rngs=rngs)
        self.o_proj = Linear(queries, size, bias=config.out_bias, rngs=rngs)
        widths = {"width": (queries, keys), "head": (config.head_dim,) * 2}.get(config.qk_norm)
        offset = 1.0 if config.zero_centred else 0.0
        self.q_norm, self.k_norm = (
            (None, None)
            if widths is None
            else (RMSNorm(width, config.norm_eps, offset) for width in widths)
        )

    # What all passes share

    def _project(self, x: jax.Array, position: jax.Array):
        """Of tokens x [B, ..., T, D] at `position` [B, ..., T].

        Returns q [B, ..., G, n, T, hd], the gate [B, ..., T, G n hd] or None, and k and v
        [B, ..., G, T, hd].
        """
        config = self.config
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        gate = None
        if config.gated:
            q = q.reshape(*q.shape[:-1], config.num_heads, 2, config.head_dim)
            gate = q[..., 1, :].reshape(*x.shape[:-1], -1)
            q = q[..., 0, :].reshape(*x.shape[:-1], -1)

        def heads(x, norm, count):
            if config.qk_norm == "width":
                x = norm(x)
            x = x.reshape(*x.shape[:-1], count, config.head_dim)
            if config.qk_norm == "head":
                x = norm(x)
            return self._rope(x, position[..., None])

        q = heads(q, self.q_norm, config.num_heads)
        k = heads(k, self.k_norm, config.num_kv_heads)
        v = v.reshape(*v.shape[:-1], config.num_kv_heads, config.head_dim)
        q = q.reshape(*q.shape[:-2], config.num_kv_heads, -1, config.head_dim)
        return jnp.moveaxis(q, -4, -2), gate, jnp.swapaxes(k, -3, -2), jnp.swapaxes(v, -3, -2)

    def _rope(self, x: jax.Array, position: jax.Array) -> jax.Array:
        theta, turned = self.config.rope_theta, self.config.rotary_dim
        if theta is None:
            return x
        if turned == x.shape[-1]:
            return rope(x, position, theta)
        return jnp.concatenate([rope(x[..., :turned], position, theta), x[..., turned:]], axis=-1)

    def _output(self, out: jax.Array, gate: jax.Array | None) -> jax.Array:
        """Gate and output projection of out [B, ..., G, n, T, hd]: [B, ..., T, D]."""
        out = jnp.moveaxis(out, -2, -4)
        out = out.reshape(*out.shape[:-3], -1)
        if gate is not None:
            out = out * jax.nn.sigmoid(gate)
        return self.o_proj(out)

    # The members of `Mixer`

    def forward(
        self,
        x: jax.Array,
        layout: Layout | None,
        plan: None,
        forks: jax.Array | None = None,
    ) -> tuple[jax.Array, AttentionTrace]:
        """Run whole rows x [B, T, D]; returns [B, T, D] (undefined at padding) and the trace.

        forks: Change nothing: they read the trace where it is.
        """
        del plan, forks
        tokens = x.shape[1]
        position = jnp.broadcast_to(jnp.arange(tokens), x.shape[:2])
        if layout is not None:
            position = layout.position
        q, gate, k, v = self._project(x, position)
        axis_name = token_axis(tokens, 1)
        # Other names are those of the kernels of the delta rule.
        name = "xla" if self.implementation == "xla" else None

        def run(q, k, v, layout):
            return causal_attention(
                q, k, v, self.config.window, layout, implementation=name, axis_name=axis_name
            )

        spread = axis_name and "tokens"
        queries, keys = ("batch", "heads", None, spread), ("batch", "heads", spread)
        run = over_shards(run, (queries, keys, keys, ("batch", spread)), queries)
        more = repeats_for(q.shape[1], axis_size("tensor"))
        shared = q.reshape(q.shape[0], q.shape[1] * more, -1, *q.shape[3:])
        out = run(shared, repeat_heads(k, 1, more), repeat_heads(v, 1, more), layout)
        return self._output(out.reshape(q.shape), gate), AttentionTrace(k, v)

    @staticmethod
    def pick(
        config: AttentionConfig,
        trace: AttentionTrace,
        positions: jax.Array,
        layout: Layout | None,
        plan: None,
    ) -> AttentionTrace:
        """What forks need of a trace: all of it, where it is."""
        del config, positions, layout, plan
        return trace

    def resume(
        self,
        picked: AttentionTrace,
        positions: jax.Array,
        layout: Layout | None,
        plan: None,
        horizon: int | None = None,
    ) -> AttentionChange:
        """Make empty caches for the tokens that the forks [B, R] will take: C = horizon, or 0."""
        del layout, plan
        shape = (*positions.shape, picked.k.shape[1], horizon or 0, picked.k.shape[3])
        return AttentionChange(*(jnp.zeros(shape, picked.k.dtype) for _ in range(2)))

    @staticmethod
    def finish(
        config: AttentionConfig,
        picked: AttentionTrace,
        resumed: AttentionChange,
        positions: jax.Array,
        layout: Layout | None,
    ) -> AttentionState:
        """Make decode states, which share the keys and values of their rows.

        The only fork of a row, whose tokens are not known to be few, takes these for its own, or
        those that its window reaches.
        """
        fixed, none = resumed.keys.shape[3] > 0, jnp.zeros_like(positions)
        dropped = None if config.window is None else none
        if positions.shape[1] == 1 and layout is None and not fixed:
            k, v = picked.k[:, None], picked.v[:, None]
            return _trimmed(config, AttentionState(k, v, positions, None, dropped, False))
        row = SharedRow(*picked, *last_and_seen(positions, layout))
        return AttentionState(*resumed, none, row, dropped, fixed)

    def init_state(self, batch: tuple[int, int], dtype: jnp.dtype) -> AttentionState:
        """The state before any token, for `batch` (B, R)."""
        shape = (*batch, self.config.num_kv_heads, 0, self.config.head_dim)
        empty = jnp.zeros(shape, dtype)
        none = jnp.zeros(batch, jnp.int32)
        dropped = None if self.config.window is None else none
        return AttentionState(empty, empty, none, None, dropped, False)

    def extend(self, x: jax.Array, state: AttentionState) -> tuple[jax.Array, AttentionChange]:
        """Continue `state` by x [B, R, S, D]; returns [B, R, S, D] and the new keys and values."""
        q, gate, k, v = self._project(x, state.seen[..., None] + jnp.arange(x.shape[2]))
        cached = (state.keys, state.values) if state.keys.shape[3] else None
        out = self._attend_forks(q, k, v, cached, state.count, state.own, state.row)
        return self._output(out, gate), AttentionChange(k, v)

    def extend_layer(
        self, x: jax.Array, states: AttentionState, layer: jax.Array
    ) -> tuple[jax.Array, AttentionState]:
        """`extend` of one layer: its new keys and values are written, then the cache is read."""
        num_new, capacity = x.shape[2], states.keys.shape[4]
        if num_new > capacity:
            raise ValueError(
                "A state must have room for the tokens that extend it (Model.resize). Got: "
                f"{num_new} tokens, room for {capacity}."
            )
        count, own, row = states.count[layer], states.own[layer], states.row
        if row is not None:
            row = row._replace(last=row.last[layer], seen=row.seen[layer])
        q, gate, k, v = self._project(x, states.seen[layer][..., None] + jnp.arange(num_new))
        keys, values = (
            write_layer(cache, new, layer, count)
            for cache, new in ((states.keys, k), (states.values, v))
        )
        out = self._attend_forks(q, None, None, (keys, values), count, own, row, layer)
        count = states.count.at[layer].add(num_new)
        states = dataclasses.replace(states, keys=keys, values=values, count=count)
        return self._output(out, gate), states

    @staticmethod
    def grown(states: AttentionState, num_new: int) -> AttentionState:
        """States of all layers with room for `num_new` tokens, whose shape is not fixed."""
        if states.fixed:
            return states
        keys, values = (_with_room(x, x.shape[4] + num_new) for x in (states.keys, states.values))
        return dataclasses.replace(states, keys=keys, values=values)

    @staticmethod
    def capacity(state: AttentionState) -> int:
        """C, the tokens that states of all layers have room for."""
        return state.keys.shape[4]

    @staticmethod
    def used(state: AttentionState) -> jax.Array:
        """The tokens [L, B, R] that are in the caches."""
        return state.count

    @staticmethod
    def held(config: AttentionConfig, num_tokens: int) -> int:
        """All tokens, or those that the next one's window reaches; at least one."""
        return num_tokens if config.window is None else min(num_tokens, max(config.window - 1, 1))

    @staticmethod
    def trimmed(config: AttentionConfig, state: AttentionState) -> AttentionState:
        """States of all layers without the tokens that no later one sees."""
        return jax.vmap(lambda layer: _trimmed(config, layer))(state)

    @staticmethod
    def resize(state: AttentionState, capacity: int) -> AttentionState:
        """States of all layers with room for `capacity` tokens, which stays as it is."""
        keys, values = (_with_room(x, capacity) for x in (state.keys, state.values))
        return dataclasses.replace(state, keys=keys, values=values, fixed=True)

    def extend_traced(
        self,
        x: jax.Array,
        trace: AttentionTrace,
        positions: jax.Array,
        layout: Layout | None,
        plan: None,
    ) -> jax.Array:
        """`extend` of x [B, R, S, D] from forks of rows at `positions`: y [B, R, S, D]."""
        del plan
        row = SharedRow(*trace, *last_and_seen(positions, layout))
        q, gate, k, v = self._project(x, row.seen[..., None] + jnp.arange(x.shape[2]))
        none = jnp.zeros_like(positions)
        out = self._attend_forks(q, k, v, None, none, none, row)
        return self._output(out, gate)

    def _attend_forks(
        self, q, k, v, cached, count, own, row: SharedRow | None, layer: jax.Array | None = None
    ) -> jax.Array:
        """Attention of new tokens to themselves, to those of a cache and to those of the row.

        q: [B, R, G, n, S, hd]; k, v: [B, R, G, S, hd]. cached: keys and values [B, R, G, C, hd], of
        which there are `count` [B, R]; None: none. own: [B, R], the forks' tokens before the new
        ones. Returns the shape of q.
        layer: `cached` and the row's keys and values are those of all layers, and `cached` holds
        the new tokens, too; k and v are None.
        """
        window, shape = self.config.window, q.shape
        axis = 0 if layer is None else 1  # behind that of the layers
        axis_name = None if row is None else token_axis(row.k.shape[axis + 2], 1)
        more = repeats_for(shape[2], axis_size("tensor"))
        q = q.reshape(*shape[:2], shape[2] * more, shape[3] // more, *shape[4:])
        k, v = (jax.tree.map(lambda x: repeat_heads(x, 2, more), x) for x in (k, v))
        cached = jax.tree.map(lambda x: repeat_heads(x, axis + 2, more), cached)
        tokens = None
        if row is not None:
            tokens = tuple(repeat_heads(x, axis + 1, more) for x in (row.k, row.v))
        places = None if row is None else (row.last, row.seen, own)

        def run(q, k, v, cached, count, tokens, places, layer):
            new, count = jnp.arange(q.shape[4]), count[..., None]
            # What a window leaves out, counted from the first of the new tokens on.
            begin = jnp.full_like(new, -(2**30)) if window is None else new + 1 - window
            parts = []
            if k is not None:
                parts.append(_attend_own(q, k, v, jnp.maximum(begin, 0), new))
            if cached is not None:
                last = count - 1 if layer is None else count + new
                parts.append(_attend_own(q, *cached, jnp.maximum(count + begin, 0), last, layer))
            if tokens is not None:
                last, seen, own = (x[..., None] for x in places)
                first = last + 1 + jnp.maximum(-seen, own + begin)
                parts.append(_attend_rows(q, *tokens, first, last, axis_name, layer))
            return join(parts).astype(q.dtype)

        layers = (None,) * axis
        forks, batch = ("batch", None, "heads"), ("batch",)
        caches, rows = (*layers, *forks), (*layers, "batch", "heads", axis_name and "tokens")
        axes = (forks, forks, forks, caches, batch, rows, batch, ())
        run = over_shards(run, axes, forks)
        return run(q, k, v, cached, count, tokens, places, layer).reshape(shape)


def _trimmed(config: AttentionConfig, state: AttentionState) -> AttentionState:
    """A state without the tokens that have left the window: later ones move to their slots."""
    kept = FullAttentionMixer.held(config, state.keys.shape[3])
    if kept == state.keys.shape[3]:
        return state
    gone = jnp.maximum(state.count - kept, 0)

    @jax.vmap
    @jax.vmap
    def last(cache, start):  # [G, C, hd], []
        return lax.dynamic_slice_in_dim(cache, start, kept, axis=1)

    return dataclasses.replace(
        state,
        keys=last(state.keys, gone),
        values=last(state.values, gone),
        count=state.count - gone,
        dropped=state.dropped + gone,
    )


def _reach_of_queries(q: jax.Array, first, last):
    """Slots first ... last of tokens [B, R, S], for the queries [B, R, n S] of a key head."""
    shape = (*q.shape[:2], q.shape[4])
    return (jnp.tile(jnp.broadcast_to(x, shape), (1, 1, q.shape[3])) for x in (first, last))


def _attend_own(q, k, v, first, last, layer=None):
    """Attention of q [B, R, G, n, S, hd] to slots of the forks' own k and v [B, R, G, T, hd].

    layer: of k and v [N, ...] of all layers; None: they are of one.
    """
    forks = q.shape[0] * q.shape[1]
    reach = (x.reshape(forks, -1) for x in _reach_of_queries(q, first, last))
    merged = q.reshape(forks, q.shape[2], -1, q.shape[-1])
    if layer is None:
        k, v = (x.reshape(forks, *x.shape[2:]) for x in (k, v))
    out, log_total = _attend(merged, k, v, *reach, layer)
    return out.reshape(q.shape), log_total.reshape(q.shape[:-1])


def _attend_rows(q, k, v, first, last, axis_name, layer):
    """Attention of q [B, R, G, n, S, hd] to slots of the rows' k and v [B, G, T, hd].

    layer: see `_attend_own`.
    """
    rows, groups = q.shape[0], q.shape[2]
    offset = 0 if axis_name is None else lax.axis_index(axis_name) * k.shape[-2]
    reach = (x.reshape(rows, -1) - offset for x in _reach_of_queries(q, first, last))
    queries = jnp.swapaxes(q, 1, 2)  # [B, G, R, n, S, hd]: the forks of a row meet it together
    shape = queries.shape
    found = _attend(queries.reshape(rows, groups, -1, shape[-1]), k, v, *reach, layer)
    out, log_total = found if axis_name is None else join_softmax(*found, axis_name)
    log_total = jnp.swapaxes(log_total.reshape(shape[:-1]), 1, 2)
    return jnp.swapaxes(out.reshape(shape), 1, 2), log_total


def _attend(q, k, v, first, last, layer):
    if layer is None:
        return attend(q, k, v, first, last)
    return attend_layer(q, k, v, layer, first, last)


def _with_room(x: jax.Array, capacity: int) -> jax.Array:
    """Caches [N, B, R, G, C, hd] with room for more tokens, or for fewer."""
    more = capacity - x.shape[4]
    if more <= 0:
        return x[..., :capacity, :]
    return jnp.pad(x, (*[(0, 0)] * 4, (0, more), (0, 0)))
