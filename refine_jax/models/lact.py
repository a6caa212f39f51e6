"""The LaCT mixer: its layer (lact_layer.py) with decode states, and forks of rows.

Letters: B batch, T tokens, D model dim, G groups of L = D / G numbers that hold the attention heads
(attention.py), H fast-weight heads of width d with hidden F, N chunk slots of C tokens, E rate
channels, R forks of a sequence, S new tokens, W attention window.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.kernels.heads import regroup
from refine_jax.kernels.lact import (
    Weights,
    apply_fast_weights,
    apply_update,
    fresh_state,
    row_norms,
    update_sums,
)
from refine_jax.kernels.numerics import computed_once
from refine_jax.models.attention import push_to_ring, ring_attention
from refine_jax.models.chunks import (
    ChunkPlan,
    chunk_of,
    first_rows,
    last_and_seen,
    tokens_in_chunk,
)
from refine_jax.models.config import LaCTConfig
from refine_jax.models.fork_attention import fork_attention
from refine_jax.models.lact_forks import (
    fast_value,
    fork_place,
    read_forks,
    read_traced_forks,
)
from refine_jax.models.lact_layer import LaCTLayer
from refine_jax.models.lact_state import LaCTPick, LaCTState, LaCTTrace
from refine_jax.models.layout import Layout
from refine_jax.models.mixer import fork
from refine_jax.models.slabs import RowAxes, take_slabs
from refine_jax.parallel import constrain, over_shards, take_tokens

_EXTEND_BLOCK = 512  # most tokens that `extend` takes at once: bounds its attention scores


class LaCTMixer(LaCTLayer):
    """LaCT's layer between norm and residual."""

    WRITES_MUCH = True

    @staticmethod
    def pick(
        config: LaCTConfig,
        trace: LaCTTrace,
        positions: jax.Array,
        layout: Layout | None,
        plan: ChunkPlan | None,
    ) -> LaCTPick:
        """What `resume` needs of a trace for forks after the first `positions` [B, R] slots."""
        chunk, tokens = config.lact_chunk_size, trace.k.shape[2]
        last, seen = last_and_seen(positions, layout)
        index = chunk_of(last, seen, plan, chunk)
        _, heads = LaCTMixer.fast_axes(config, LaCTMixer.token_axis(config, tokens))

        def cut(x, size):
            start, size = first_rows(last, min(size, tokens)), min(size, tokens)
            return None if x is None else take_slabs(x, start, size, "heads", axis=2, forks=None)

        k, v = (cut(x, config.window_size) for x in (trace.k, trace.v))
        pending = k, v
        if min(chunk, tokens) != k.shape[3]:
            pending = tuple(cut(x, chunk) for x in (trace.k, trace.v))
        pending = *pending, cut(trace.rates, chunk), cut(trace.momentum, chunk)
        # A document's first chunk is read with the initial weights: also right for no token.
        fast = jax.tree.map(lambda x: take_tokens(x, index, heads), trace.chunks)
        fast = jax.tree.map(lambda x: constrain(x, "batch", None, "heads"), fast)
        return LaCTPick(fast, k, v, pending)

    def resume(
        self,
        picked: LaCTPick,
        positions: jax.Array,
        layout: Layout | None,
        plan: ChunkPlan | None,
        horizon: int | None = None,
    ) -> tuple[Weights, jax.Array | None]:
        """Compute the pending update of decode states: sums and momentum_sum [B, R, H, ...]."""
        del plan
        return self._pending(picked, *last_and_seen(positions, layout), horizon)

    @staticmethod
    def finish(
        config: LaCTConfig,
        picked: LaCTPick,
        resumed: tuple[Weights, jax.Array | None],
        positions: jax.Array,
        layout: Layout | None,
    ) -> LaCTState:
        """Make decode states [B, R, ...] of what was picked and what was computed."""
        window = config.window_size
        last, seen = last_and_seen(positions, layout)
        sums, momentum_sum = resumed
        size = picked.k.shape[3]
        keys, values = (
            jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, window - size), (0, 0)))
            for x in (picked.k, picked.v)
        )
        return LaCTState(
            fast=picked.fast,
            sums=sums,
            momentum_sum=momentum_sum,
            keys=keys,
            values=values,
            cursor=(last - first_rows(last, size) + 1) % window,
            position=seen,
        )

    def init_state(self, batch: tuple[int, int], dtype: jnp.dtype) -> LaCTState:
        """Decode states [B, R, ...] before any token; the window's in `dtype`."""
        config = self.config
        weights = self._initial_weights()
        weights = jax.tree.map(lambda w: jnp.broadcast_to(w, (*batch, *w.shape)), weights)
        groups = config.num_attn_heads // self._heads_in_group
        size = config.hidden_size // groups
        zeros = jnp.zeros((*batch, groups, config.window_size, size), dtype)
        count = jnp.zeros(batch, jnp.int32)
        return LaCTState(
            fast=fresh_state(weights, config.use_momentum, self._options),
            sums=jax.tree.map(jnp.zeros_like, weights),
            momentum_sum=(
                jnp.zeros((*batch, config.num_lact_heads)) if config.use_momentum else None
            ),
            keys=zeros,
            values=zeros,
            cursor=count,
            position=count,
        )

    def extend(self, x: jax.Array, state: LaCTState) -> tuple[jax.Array, LaCTState]:
        """Continue states by x [B, R, S, D]; returns y [B, R, S, D] and what `advance` takes."""
        num_new = x.shape[2]
        block = min(num_new, self.config.lact_chunk_size, _EXTEND_BLOCK)
        if block == num_new:
            return self._extend_block(x, state)
        whole = num_new // block * block

        def step(state, x):
            y, change = self._extend_block(x, state)
            return _advance_layer(state, change), (y, change.keys, change.values)

        def side_by_side(x, axis):  # [n, B, R, ...]: blocks along an axis of [B, R, ...]
            x = jnp.moveaxis(x, 0, axis)
            return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

        blocks = x[:, :, :whole].reshape(*x.shape[:2], -1, block, x.shape[-1])
        state, found = lax.scan(step, state, jnp.moveaxis(blocks, 2, 0))
        y, keys, values = map(side_by_side, found, (2, 3, 3))
        if whole < num_new:
            last, state = self._extend_block(x[:, :, whole:], state)
            y = jnp.concatenate([y, last], axis=2)
            keys = jnp.concatenate([keys, state.keys], axis=3)
            values = jnp.concatenate([values, state.values], axis=3)
        kept = -self.config.window_size
        return y, state._replace(keys=keys[..., kept:, :], values=values[..., kept:, :])

    def extend_traced(
        self,
        x: jax.Array,
        trace: LaCTTrace,
        positions: jax.Array,
        layout: Layout | None,
        plan: ChunkPlan | None,
    ) -> jax.Array:
        """`extend` of x [B, R, S, D] from `fork` of a trace at `positions`: y [B, R, S, D].

        For gradients: no state is made. Forks read the window's keys and values and the weights
        of their chunk in the trace; what is pending is cut out for those alone that leave it.
        """
        config, num_tokens, num_new = self.config, trace.k.shape[2], x.shape[2]
        if num_new > min(config.lact_chunk_size, _EXTEND_BLOCK):
            return self.extend(x, fork(self, trace, positions, layout, plan, num_new))[0]
        last, seen = last_and_seen(positions, layout)
        axis_name = self.token_axis(config, num_tokens)
        chunk_name, heads = self.fast_axes(config, axis_name)
        at = (seen[..., None] + jnp.arange(num_new))[:, :, None]
        q, k, v = self._qkv(x)

        inputs = self._fast_inputs(*self._to_heads(q, k, v), at)
        place = fork_place(config, last, seen, plan, num_tokens, num_new)
        axes = RowAxes(axis_name, chunk_name and axis_name)
        read = functools.partial(read_forks, config, self._options, axes)
        forks, batch = ("batch", None, "heads"), ("batch",)
        new_axes, rows = ("batch", None, heads), ("batch", "heads", axis_name and "tokens")
        chunks = ("batch", chunk_name, heads)
        in_axes = (new_axes, rows, chunks, (heads,), (heads,), batch)
        read = over_shards(read, in_axes, (new_axes, rows, chunks))
        new = *inputs, self._rates(x), self._momentum(x)
        # Made apart: libtpu 0.0.52 fails to sum their gradient over as many chips as there are
        # heads and to spread it by rows in one operation.
        norms = jax.tree.map(computed_once, row_norms(self._initial_weights()))
        fast, (row_k, row_v, *_), _ = read(
            new, trace[:4], trace.chunks, self._scales(1), norms, place
        )

        attend = functools.partial(
            fork_attention,
            window=config.window_size,
            heads_per_group=self._heads_in_group,
            axis_name=axis_name,
        )
        attend = over_shards(attend, (forks, forks, forks, rows, rows, batch, batch), forks)
        queries, keys = self._rope(q, at), self._rope(k, at)
        attention = attend(queries, keys, v, row_k, row_v, last, seen)
        fast = regroup(self._fast_output(fast, self._scale(x)), attention.shape[2])
        return self.o_proj.from_groups(attention + fast)

    @staticmethod
    def reads_traces(config: LaCTConfig, num_new: int) -> bool:
        """Whether `extend_in_place` takes that many tokens: they lie in at most two chunks."""
        return num_new <= min(config.lact_chunk_size, _EXTEND_BLOCK)

    def extend_in_place(
        self,
        x: jax.Array,
        traces: LaCTTrace,
        layer: jax.Array,
        positions: jax.Array,
        layout: Layout | None,
        plan: ChunkPlan | None,
    ) -> jax.Array:
        """`extend_traced` in one of the layers [L, B, ...] of traces. Not for gradients.

        Each fork reads its window and its chunk's weights alone: no layer's trace is copied, nor
        is there a state for each fork of each layer. Devices that share a row read what they have
        of it, for all its forks.
        """
        config, num_new = self.config, x.shape[2]
        num_tokens = traces.k.shape[3]
        axis_name = self.token_axis(config, num_tokens)
        chunk_name, heads = self.fast_axes(config, axis_name)
        last, seen = last_and_seen(positions, layout)
        at = (seen[..., None] + jnp.arange(num_new))[:, :, None]
        q, k, v = self._qkv(x)
        fast = *self._fast_inputs(*self._to_heads(q, k, v), at), self._rates(x), self._momentum(x)
        window = self._rope(q, at), self._rope(k, at), v
        place = fork_place(config, last, seen, plan, num_tokens, num_new)
        axes = RowAxes(axis_name, chunk_name and axis_name)
        read = functools.partial(
            read_traced_forks, config, self._options, axes, self._heads_in_group
        )
        forks, batch = ("batch", None, "heads"), ("batch",)
        new, rows = ("batch", None, heads), (None, "batch", "heads", axis_name and "tokens")
        chunks = (None, "batch", chunk_name, heads)
        in_axes = (forks, new, rows, chunks, (heads,), (heads,), batch, batch, ())
        norms = jax.eval_shape(lambda: row_norms(self._initial_weights()))
        norms = lax.cond(
            place.crosses.any(),
            lambda: row_norms(self._initial_weights()),
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), norms),
        )
        attention, out = over_shards(read, in_axes, (forks, new))(
            window, fast, traces[:4], traces.chunks, self._scales(1), norms, place, last, layer
        )
        out = regroup(self._fast_output(out, self._scale(x)), attention.shape[2])
        return self.o_proj.from_groups(attention + out)

    @staticmethod
    def advance(state: LaCTState, change: LaCTState) -> LaCTState:
        """States of all layers [N, B, R, ...] and what `extend` changed in them: the new states.

        Apart from `extend`, which layers go through one after the other: windows are read there,
        and changed here, in place.
        """
        window, num_new = state.keys.shape[4], change.keys.shape[4]
        start = (change.cursor[0] - num_new) % window
        return change._replace(
            keys=push_to_ring(state.keys, change.keys, start),
            values=push_to_ring(state.values, change.values, start),
        )

    def _pending(self, picked: LaCTPick, last, seen, horizon):
        """Update sums [B, R, H, ...] and momentum sums [B, R, H] of the forks' partial chunks."""
        chunk = self.config.lact_chunk_size
        count = tokens_in_chunk(seen, chunk)

        @jax.checkpoint
        def chunk_sums(weights, tokens, ahead, seen, count):
            k, v, rates, momentum = tokens  # [B, G, C, L] twice, [B, H, C, ...]
            # Slab row -> index in its chunk; rows before the chunk or after `last` are left out.
            ahead = ahead[:, None] + jnp.arange(k.shape[2])  # [B, C], 0 at `last`
            live = (ahead <= 0) & (ahead > -count[:, None])
            positions = (seen[:, None] - 1 + ahead)[:, None]
            k, v = self._to_heads(self._rope(k, -positions), v)
            k = self._fast_input(k, 1, positions)
            rates = jnp.where(live[:, None, :, None, None], rates, 0.0)
            sums = update_sums(weights, k, fast_value(self.config, v), rates)
            if momentum is None:
                return sums, None
            return sums, jnp.where(live[:, None], momentum, 0.0).sum(-1)

        def crossing(count):
            return jnp.any((count > 0) & (count + horizon > chunk))

        def where_crossing(function, *inputs):
            if horizon is None:
                return function(*inputs)
            shapes = jax.eval_shape(function, *inputs)
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return lax.cond(crossing(inputs[-1]), function, lambda *_: nothing, *inputs)

        @jax.checkpoint
        def all_sums(*inputs):
            # Fork by fork, so that only those near a boundary cost anything.
            by_fork = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
            sums = lax.map(lambda inputs: where_crossing(chunk_sums, *inputs), by_fork)
            return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), sums)

        ahead = first_rows(last, picked.pending[0].shape[3]) - last
        inputs = picked.fast.weights, picked.pending, ahead, seen, count
        return where_crossing(all_sums, *inputs)

    def _extend_block(self, x: jax.Array, state: LaCTState) -> tuple[jax.Array, LaCTState]:
        """`extend` by at most a chunk of tokens: these lie in at most two chunks."""
        num_new = x.shape[2]
        positions = (state.position[..., None] + jnp.arange(num_new))[:, :, None]
        q, k, v = self._qkv(x)
        queries, keys = self._rope(q, positions), self._rope(k, positions)
        attention = ring_attention(
            queries,
            keys,
            v,
            state.keys,
            state.values,
            state.cursor,
            state.position,
            heads_per_group=self._heads_in_group,
        )
        fast, after = self._extend_fast(
            state,
            *self._fast_inputs(*self._to_heads(q, k, v), positions),
            self._rates(x),
            self._momentum(x),
        )
        change = LaCTState(
            *after,
            keys=keys.astype(state.keys.dtype),
            values=v.astype(state.values.dtype),
            cursor=(state.cursor + num_new) % self.config.window_size,
            position=state.position + num_new,
        )
        fast = regroup(self._fast_output(fast, self._scale(x)), attention.shape[2])
        return self.o_proj.from_groups(attention + fast), change

    def _extend_fast(self, state: LaCTState, q, k, v, rates, momentum):
        """Read S <= C tokens, q, k, v [B, R, H, S, d], with the weights of their chunks.

        Returns the outputs and the new (fast, sums, momentum_sum).

        One token is bound by memory: weights and sums are read and sums written, for 8 forks of the
        760M model 0.10 ms a layer at the published bandwidth of a v6e and 0.21 ms of a v5e. XLA's
        program takes 0.10 and 0.26 ms by static estimates (`experiments/tpu_kernels.py`, case
        lact_decode), so it has no Pallas kernel.
        """
        arrays = ("batch", None, "heads")
        in_axes = (arrays, ("batch",), arrays, ("heads",))
        run = over_shards(self._extend_shard, in_axes, (arrays, arrays))
        kept = state.fast, state.sums, state.momentum_sum
        norms = row_norms(self._initial_weights())
        return run(kept, state.position, (q, k, v, rates, momentum), norms)

    def _extend_shard(self, state, position, tokens, norms):
        """`_extend_fast` of the rows and heads of a device."""
        q, k, v, rates, momentum = tokens
        chunk, num_new = self.config.lact_chunk_size, q.shape[3]
        count = tokens_in_chunk(position, chunk)
        crosses = count + num_new > chunk  # [B, R]; this chunk ends before the last new token
        inside = count[..., None] + jnp.arange(num_new) < chunk  # [B, R, S]

        def add(fast, sums, momentum_sum, live):
            live = live[:, :, None, :, None, None]
            more = update_sums(fast.weights, k, v, jnp.where(live, rates, 0.0))
            sums = jax.tree.map(jnp.add, sums, more)
            if momentum is None:
                return sums, None
            return sums, momentum_sum + jnp.where(live[..., 0, 0], momentum, 0.0).sum(-1)

        def stay(fast, *sums):
            return apply_fast_weights(fast.weights, q), (fast, *add(fast, *sums, inside))

        def cross(fast, *sums):
            out = apply_fast_weights(fast.weights, q)
            old = add(fast, *sums, inside)
            mean = None if momentum is None else old[1] / chunk
            new = apply_update(fast, old[0], mean, norms, self._options)

            def where_crossing(new, old):
                mask = crosses.reshape(*crosses.shape, *[1] * (old.ndim - 2))
                return jnp.where(mask, new, old)

            fast = jax.tree.map(where_crossing, new, fast)
            begun = jax.tree.map(lambda x: where_crossing(jnp.zeros_like(x), x), old)
            later = apply_fast_weights(fast.weights, q)
            out = jnp.where(inside[:, :, None, :, None], out, later)
            return out, (fast, *add(fast, *begun, ~inside))

        return lax.cond(jnp.any(crosses), jax.checkpoint(cross), jax.checkpoint(stay), *state)


def _advance_layer(state: LaCTState, change: LaCTState) -> LaCTState:
    """`LaCTMixer.advance` of one layer."""
    states, changes = (jax.tree.map(lambda x: x[None], tree) for tree in (state, change))
    return jax.tree.map(lambda x: x[0], LaCTMixer.advance(states, changes))
