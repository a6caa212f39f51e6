"""The LaCT mixer: window attention plus chunk-wise fast weights (golden README, section 5).

Everything counts from the start of the token's own document: chunk boundaries, momentum means and
rope positions. A document therefore computes the same numbers wherever it stands in a row.

Letters: B batch, T tokens, D model dim, A attention heads of width hd, H fast-weight heads of
width d with hidden F, N chunk slots of C tokens, E rate channels, R forks of a sequence, S new
tokens, W attention window.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from refine_jax.kernels import sequence
from refine_jax.kernels.lact import (
    FastState,
    Options,
    Weights,
    apply_fast_weights,
    apply_update,
    fresh_state,
    lact,
    row_norms,
    update_sums,
)
from refine_jax.kernels.numerics import by_rows
from refine_jax.models.attention import push_to_ring, ring_attention, window_attention
from refine_jax.models.config import LaCTConfig
from refine_jax.models.layers import Linear, RMSNorm, l2_norm_lact, normal_param, rope
from refine_jax.models.layout import Layout
from refine_jax.parallel import axis_size, constrain, over_shards, take_tokens, token_axis

_NORM_EPS = 1e-5  # of ttt_norm, q_norm and k_norm, whatever norm_eps is
_RATE_SHIFT = math.log(math.expm1(0.001))  # softplus of it is a rate of 0.001
_EXTEND_BLOCK = 512  # most tokens that `extend` takes at once: bounds its attention scores


class ChunkPlan(NamedTuple):
    """Where the tokens of rows [B, T] stand among N * C chunk slots, documents aligned to chunks.

    slot: [B, T] int32, the slot of a token; 0 at padding. source: [B, N * C] int32, the way back;
    0 at empty slots. live: [B, N * C] bool, slots that hold a token. token: [B, T] bool.
    reset: [B, N] bool, chunks that begin a document.
    """

    slot: jax.Array
    source: jax.Array
    live: jax.Array
    token: jax.Array
    reset: jax.Array


class LaCTTrace(NamedTuple):
    """What forks need of a forward pass.

    keys, values: [B, A, T, hd], of the window attention. rates: [B, T, H, 3, E].
    momentum: [B, T, H] or None. chunks: FastState [B, N, H, ...], read by each chunk.
    """

    keys: jax.Array
    values: jax.Array
    rates: jax.Array
    momentum: jax.Array | None
    chunks: FastState


class LaCTState(NamedTuple):
    """A decode state; its size does not depend on the tokens seen.

    A chunk's update is made when the first token after it arrives.

    fast: FastState [B, R, H, ...] of the current chunk. sums: its pending update [B, R, H, ...].
    momentum_sum: [B, R, H], over the tokens in `sums`; None without momentum.
    keys, values: [B, R, A, W, hd], the last W tokens in ring order. cursor: [B, R] int32, the slot
    that the next token takes. position: [B, R] int32, tokens of the document so far.
    """

    fast: FastState
    sums: Weights
    momentum_sum: jax.Array | None
    keys: jax.Array
    values: jax.Array
    cursor: jax.Array
    position: jax.Array


class LowRank(nnx.Module):
    """Initial fast weights `w_left w_right + I / 2`, of shape [H, out, in]."""

    def __init__(self, heads: int, size_out: int, size_in: int, rank: int, gain: float, key):
        left, right = jax.random.split(key)
        self.w_left = normal_param(left, (heads, size_out, rank), gain / math.sqrt(rank))
        self.w_right = normal_param(right, (heads, rank, size_in), gain / math.sqrt(size_in))

    def __call__(self) -> jax.Array:
        """The composed weights, float32."""
        left, right = self.w_left[...], self.w_right[...]
        product = jnp.matmul(left, right, precision=lax.Precision.HIGHEST)
        return product + 0.5 * jnp.eye(*product.shape[-2:], dtype=product.dtype)


class LaCTMixer(nnx.Module):
    """LaCT's layer between norm and residual; the mixer protocol of transformer.py."""

    def __init__(self, config: LaCTConfig, *, implementation: str | None = None, rngs: nnx.Rngs):
        self.config = config
        self.implementation = implementation
        size, heads, d = config.hidden_size, config.num_lact_heads, config.lact_head_dim
        hidden, rank, gain = config.fast_hidden, config.w0_w2_low_rank, config.fw_init_gain
        self.qkv = Linear(size, 3 * size, bias=config.qkv_bias, rngs=rngs)
        self.o_proj = Linear(size, size, rngs=rngs)
        self.q_norm = RMSNorm(size, _NORM_EPS) if config.attn_qk_norm else None
        self.k_norm = RMSNorm(size, _NORM_EPS) if config.attn_qk_norm else None
        self.qk_scale = nnx.Param(jnp.ones((size, 2), jnp.float32))
        self.qk_offset = nnx.Param(jnp.zeros((size, 2), jnp.float32))
        self.lr_proj = Linear(size, 3 * heads * config.lr_dim, bias=True, rngs=rngs)
        self.momentum_proj = (
            Linear(size, heads, bias=True, rngs=rngs) if config.use_momentum else None
        )
        self.ttt_norm = RMSNorm(d, _NORM_EPS)
        self.ttt_scale_proj = (
            Linear(size, heads, bias=True, rngs=rngs) if config.learnable_ttt_scale else None
        )

        def input_weights():
            if rank > 0:
                return LowRank(heads, hidden, d, rank, gain, rngs.params())
            return normal_param(rngs.params(), (heads, hidden, d), gain / math.sqrt(d))

        self.w0, self.w2 = input_weights(), input_weights()
        self.w1 = normal_param(rngs.params(), (heads, d, hidden), gain / math.sqrt(hidden))

    # What all of forward, fork and extend share

    @property
    def _options(self) -> Options:
        config = self.config
        muon = config.muon_dtype if config.use_muon else None
        return Options(prenorm=config.ttt_prenorm, muon=muon, fused=config.use_fused_kernel)

    def _initial_weights(self) -> Weights:
        """Fast weights at the start of a document, [H, F, d] and [H, d, F] float32."""
        w0, w2 = (w() if isinstance(w, LowRank) else w[...] for w in (self.w0, self.w2))
        return Weights(w0, self.w1[...], w2)

    def _qkv(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., D] -> q, k, v [..., D]."""
        q, k, v = self.qkv.parts(x, 3)
        if self.config.attn_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _rope(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rope on x [..., D] cut into attention heads; returns [..., A, hd]."""
        config = self.config
        x = x.reshape(*x.shape[:-1], config.num_attn_heads, config.attn_head_dim)
        return rope(x, positions, config.rope_theta)

    def _fast_heads(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., H, d]."""
        return x.reshape(*x.shape[:-1], self.config.num_lact_heads, self.config.lact_head_dim)

    def _fast_input(self, x: jax.Array, column: int, positions: jax.Array) -> jax.Array:
        """Query (column 0) or key (1) of the fast weights from q or k [..., D]; [..., H, d]."""
        scale, offset = (p[...][:, column].astype(x.dtype) for p in (self.qk_scale, self.qk_offset))
        x = by_rows(lambda rows: rows * scale + offset, x)
        if self.config.qkv_silu:
            x = jax.nn.silu(x)
        y = l2_norm_lact(self._fast_heads(x))
        return (
            y
            if self.config.ttt_nope
            else self._rope(y.reshape(x.shape), positions).reshape(y.shape)
        )

    def _fast_value(self, v: jax.Array) -> jax.Array:
        if self.config.qkv_silu and not self.config.no_v_silu:
            v = jax.nn.silu(v)
        return self._fast_heads(v)

    def _rates(self, x: jax.Array) -> jax.Array:
        """Learning rates [..., H, 3, E] float32 of W0, W1, W2."""
        rates = jax.nn.softplus(self.lr_proj(x).astype(jnp.float32) + _RATE_SHIFT)
        return rates.reshape(*x.shape[:-1], self.config.num_lact_heads, 3, self.config.lr_dim)

    def _momentum(self, x: jax.Array) -> jax.Array | None:
        """[..., H] float32."""
        if self.momentum_proj is None:
            return None
        return jax.nn.sigmoid(self.momentum_proj(x).astype(jnp.float32))

    def _merge(self, x: jax.Array, attention: jax.Array, fast: jax.Array) -> jax.Array:
        """Both branches, [..., D] and [..., H, d], to the layer's output [..., D]."""
        y = self.ttt_norm(fast)
        if self.ttt_scale_proj is not None:
            y = by_rows(jnp.multiply, y, jax.nn.silu(self.ttt_scale_proj(x))[..., None])
        return self.o_proj(attention + y.reshape(x.shape))

    # The mixer protocol

    @staticmethod
    def plan(config: LaCTConfig, layout: Layout | None, shape: tuple[int, int]) -> ChunkPlan | None:
        """Chunk slots of the tokens of `layout`; None where every row is one full document."""
        if layout is None:
            return None
        chunk, (num_rows, num_tokens) = config.lact_chunk_size, shape
        num_chunks = -(-num_tokens // chunk) + layout.max_documents - 1
        num_chunks += -num_chunks % axis_size("sequence")  # whose devices share them
        num_slots = num_chunks * chunk
        # A chunk begins at every C-th token of a document; its number is their running count.
        begins = layout.mask & (layout.position % chunk == 0)
        index = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
        slot = index * chunk + layout.position % chunk
        row = jnp.arange(num_rows)[:, None]
        kept = jnp.where(layout.mask, slot, num_slots)  # padding falls out of bounds: dropped
        tokens = jnp.broadcast_to(jnp.arange(1, num_tokens + 1, dtype=jnp.int32), shape)
        source = jnp.zeros((num_rows, num_slots), jnp.int32)
        source = source.at[row, kept].set(tokens, mode="drop")
        first = layout.mask & (layout.position == 0)
        reset = jnp.zeros((num_rows, num_chunks), bool)
        reset = reset.at[row, jnp.where(first, index, num_chunks)].set(True, mode="drop")
        return ChunkPlan(
            slot=jnp.where(layout.mask, slot, 0),
            source=jnp.maximum(source - 1, 0),
            live=source > 0,
            token=layout.mask,
            reset=reset,
        )

    def forward(
        self, x: jax.Array, layout: Layout | None, plan: ChunkPlan | None
    ) -> tuple[jax.Array, LaCTTrace]:
        """Whole rows x [B, T, D] -> y [B, T, D] (undefined at padding) and the trace for forks."""
        num_tokens = x.shape[1]
        positions = jnp.arange(num_tokens)[None] if layout is None else layout.position
        q, k, v = self._qkv(x)
        keys, values = (
            jnp.swapaxes(y, 1, 2) for y in (self._rope(k, positions), self._attn_heads(v))
        )
        queries = jnp.swapaxes(self._rope(q, positions), 1, 2)
        axis_name = self._token_axis(num_tokens)
        attention = self._attend(queries, keys, values, layout, axis_name)
        attention = jnp.swapaxes(attention, 1, 2).reshape(x.shape)

        rates, momentum = self._rates(x), self._momentum(x)
        tokens = (
            self._fast_input(q, 0, positions),
            self._fast_input(k, 1, positions),
            self._fast_value(v),
            rates,
            momentum,
        )
        fast, chunks = self._run_fast(tokens, plan, axis_name)
        y = self._merge(x, attention, fast)
        return y, LaCTTrace(keys, values, rates, momentum, chunks)

    @staticmethod
    def pick(
        config: LaCTConfig, trace: LaCTTrace, positions: jax.Array, layout: Layout | None
    ) -> LaCTTrace:
        """What `fork` needs of a trace: all, as parts for each fork would be as large as states."""
        del config, positions, layout
        return trace

    def resume(
        self,
        trace: LaCTTrace,
        positions: jax.Array,
        layout: Layout | None,
        plan: ChunkPlan | None,
        horizon: int | None = None,
    ) -> LaCTState:
        """`fork` of what is picked."""
        return self.fork(trace, positions, layout, plan, horizon)

    def fork(
        self,
        trace: LaCTTrace,
        positions: jax.Array,
        layout: Layout | None,
        plan: ChunkPlan | None,
        horizon: int | None = None,
    ) -> LaCTState:
        """Decode states after the first `positions` [B, R] slots of the traced rows.

        horizon: the most tokens the states will be extended by. The pending update of a chunk that
        they cannot leave is not computed.
        """
        chunk, window = self.config.lact_chunk_size, self.config.window_size
        if layout is None:
            last, seen = positions - 1, positions
            index = jnp.maximum(last, 0) // chunk
        else:
            last, seen = layout.last_real(positions), layout.tokens_before(positions)
            slot = jnp.take_along_axis(plan.slot, jnp.maximum(last, 0), axis=1)
            index = jnp.where(seen > 0, slot // chunk, 0)
        # A document's first chunk is read with the initial weights: also right for no token.
        fast = jax.tree.map(lambda x: take_tokens(x, index), trace.chunks)
        start, ring = _slabs(last, min(window, trace.keys.shape[2]))
        keys, values = (
            jnp.pad(ring(x), ((0, 0), (0, 0), (0, 0), (0, max(window - x.shape[2], 0)), (0, 0)))
            for x in (trace.keys, trace.values)
        )
        sums, momentum_sum = self._pending(trace, fast.weights, last, seen, horizon)
        return LaCTState(
            fast=fast,
            sums=sums,
            momentum_sum=momentum_sum,
            keys=keys,
            values=values,
            cursor=(last - start + 1) % window,
            position=seen,
        )

    def init_state(self, batch: tuple[int, int], dtype: jnp.dtype) -> LaCTState:
        """Decode states [B, R, ...] before any token; the window's in `dtype`."""
        config = self.config
        weights = self._initial_weights()
        weights = jax.tree.map(lambda w: jnp.broadcast_to(w, (*batch, *w.shape)), weights)
        zeros = jnp.zeros(
            (*batch, config.num_attn_heads, config.window_size, config.attn_head_dim), dtype
        )
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
        """Continue states by x [B, R, S, D]; returns y [B, R, S, D] and the new states."""
        num_new = x.shape[2]
        block = min(num_new, self.config.lact_chunk_size, _EXTEND_BLOCK)
        whole = num_new // block * block
        if whole == block:
            y, state = self._extend_block(x[:, :, :block], state)
        else:
            blocks = x[:, :, :whole].reshape(*x.shape[:2], -1, block, x.shape[-1])

            def step(state, x):
                y, state = self._extend_block(x, state)
                return state, y

            state, y = lax.scan(step, state, jnp.moveaxis(blocks, 2, 0))
            y = jnp.moveaxis(y, 0, 2).reshape(*x.shape[:2], whole, -1)
        if whole < num_new:
            rest, state = self._extend_block(x[:, :, whole:], state)
            y = jnp.concatenate([y, rest], axis=2)
        return y, state

    # Their parts

    def _attend(self, q, k, v, layout: Layout | None, axis_name: str | None) -> jax.Array:
        """Window attention of q, k, v [B, A, T, hd], each device on its rows, heads and tokens."""

        def attend(q, k, v, layout):
            # Its other implementations are not those of the kernels: it chooses by itself.
            name = "xla" if self.implementation == "xla" else None
            window = self.config.window_size
            return window_attention(
                q, k, v, window, layout, implementation=name, axis_name=axis_name
            )

        tokens = axis_name and "tokens"
        heads = ("batch", "heads", tokens)
        attend = over_shards(attend, (heads, heads, heads, ("batch", tokens)), heads)
        return attend(q, k, v, layout)

    def _token_axis(self, num_tokens: int) -> str | None:
        """The mesh axis over which tokens are spread: those of rows, and those of every chunk."""
        chunk = self.config.lact_chunk_size
        return token_axis(num_tokens, chunk) if chunk % axis_size("sequence") == 0 else None

    def _run_fast(self, tokens, plan: ChunkPlan | None, axis_name: str | None):
        """Fast weights over rows: tokens' arrays [B, T, H, ...] to [B, T, H, d] and the states.

        Each device takes its rows and heads. Where tokens are spread, devices exchange tokens for
        heads if each gets some; else they share the tokens of every chunk. A device keeps the
        states of its share of the chunks.
        """
        devices = 1 if axis_name is None else axis_size(axis_name)
        if self.config.num_lact_heads // axis_size("tensor") % devices:
            return self._share_chunks(tokens, plan, axis_name)

        def run(tokens, weights, plan):
            if devices > 1:
                tokens = sequence.exchange(tokens, axis_name, split=2, join=1)
                weights = sequence.own_part(weights, axis_name, axis=0)
            slots, mask, reset = self._to_slots(tokens, plan)
            out, states = self._lact(*slots, weights=weights, mask=mask, reset=reset)
            out = _to_tokens(out, plan, tokens[0].shape[1])
            if devices > 1:
                out = sequence.exchange(out, axis_name, split=1, join=2)
                states = sequence.exchange(states, axis_name, split=1, join=2)
            return out, states

        names = axis_name and "tokens"
        arrays = ("batch", names, "heads")
        run = over_shards(run, (arrays, ("heads",), ("batch",)), (arrays, arrays))
        return run(tokens, self._initial_weights(), plan)

    def _share_chunks(self, tokens, plan: ChunkPlan | None, axis_name: str):
        """`_run_fast` where devices share the tokens of every chunk."""

        def run(slots, weights, mask, reset):
            return self._lact(*slots, weights=weights, mask=mask, reset=reset, axis_name=axis_name)

        # Said on both sides, so that neither the one nor its derivative is sent as anything larger.
        tokens = jax.tree.map(lambda x: constrain(x, "batch", "tokens", "heads"), tokens)
        slots, mask, reset = self._to_slots(tokens, plan)
        arrays, states = ("batch", None, "heads", "tokens"), ("batch", "tokens", "heads")
        slots = jax.tree.map(lambda x: constrain(x, *arrays), slots)
        in_axes = (arrays, ("heads",), ("batch", None, "tokens"), ("batch",))
        run = over_shards(run, in_axes, (arrays, states))
        out, chunks = run(slots, self._initial_weights(), mask, reset)
        out = constrain(_to_tokens(out, plan, tokens[0].shape[1]), "batch", "tokens", "heads")
        return out, chunks

    def _lact(self, *slots, **arrays):
        return lact(*slots, options=self._options, implementation=self.implementation, **arrays)

    def _attn_heads(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., A, hd]."""
        return x.reshape(*x.shape[:-1], self.config.num_attn_heads, self.config.attn_head_dim)

    def _to_slots(self, tokens, plan: ChunkPlan | None):
        """Arrays [B, T, H, ...] to chunk slots [B, N, H, C, ...], their mask and the resets."""
        chunk = self.config.lact_chunk_size
        num_tokens = tokens[0].shape[1]
        pad = -num_tokens % chunk

        def cut(x):
            if plan is not None:
                x = _take_rows(x, plan.source, plan.slot, plan.token)
            elif pad:
                x = jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))
            return jnp.swapaxes(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 2, 3)

        slots = jax.tree.map(cut, tokens)
        if plan is not None:
            return slots, plan.live.reshape(*plan.reset.shape, chunk), plan.reset
        if not pad:
            return slots, None, None
        live = jnp.arange(num_tokens + pad) < num_tokens
        return slots, jnp.broadcast_to(live.reshape(-1, chunk), (*slots[0].shape[:2], chunk)), None

    def _pending(self, trace: LaCTTrace, weights: Weights, last, seen, horizon):
        """Update sums [B, R, H, ...] and momentum sums [B, R, H] of the forks' partial chunks."""
        chunk = self.config.lact_chunk_size
        count = _tokens_in_chunk(seen, chunk)
        start, slab = _slabs(last, min(chunk, trace.keys.shape[2]))
        # Cut for all forks at once: in the loop, each would keep the whole trace for its gradient.
        tokens = jax.tree.map(
            slab,
            (
                trace.keys,
                trace.values,
                jnp.moveaxis(trace.rates, 1, 2),
                None if trace.momentum is None else jnp.moveaxis(trace.momentum, 1, 2),
            ),
        )

        @jax.checkpoint
        def chunk_sums(weights, tokens, ahead, seen, count):
            keys, values, rates, momentum = tokens  # [B, A, C, hd] twice, [B, H, C, ...]
            # Slab row -> index in its chunk; rows before the chunk or after `last` are left out.
            ahead = ahead[:, None] + jnp.arange(keys.shape[2])  # [B, C], 0 at `last`
            live = (ahead <= 0) & (ahead > -count[:, None])
            positions = seen[:, None] - 1 + ahead
            # The trace keeps keys after rope; turned back, they are k again.
            k = rope(jnp.swapaxes(keys, 1, 2), -positions, self.config.rope_theta)
            k = self._fast_input(k.reshape(*positions.shape, -1), 1, positions)
            v = self._fast_value(jnp.swapaxes(values, 1, 2).reshape(*positions.shape, -1))
            rates = jnp.where(live[:, None, :, None, None], rates, 0.0)
            sums = update_sums(weights, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), rates)
            if momentum is None:
                return sums, None
            return sums, jnp.where(live[:, None], momentum, 0.0).sum(-1)

        def one_fork(inputs):
            count = inputs[-1]
            if horizon is None:
                return chunk_sums(*inputs)
            nothing = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(chunk_sums, *inputs)
            )
            crosses = jnp.any((count > 0) & (count + horizon > chunk))
            return lax.cond(crosses, chunk_sums, lambda *_: nothing, *inputs)

        # Fork by fork, so that only those near a boundary cost anything.
        by_fork = jax.tree.map(
            lambda x: jnp.moveaxis(x, 1, 0), (weights, tokens, start - last, seen, count)
        )
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), lax.map(one_fork, by_fork))

    def _extend_block(self, x: jax.Array, state: LaCTState) -> tuple[jax.Array, LaCTState]:
        """`extend` by at most a chunk of tokens: these lie in at most two chunks."""
        config, num_new = self.config, x.shape[2]
        positions = state.position[..., None] + jnp.arange(num_new)
        q, k, v = self._qkv(x)
        heads_first = functools.partial(jnp.swapaxes, axis1=2, axis2=3)
        queries, keys = (heads_first(self._rope(y, positions)) for y in (q, k))
        values = heads_first(self._attn_heads(v))
        attention = ring_attention(
            queries, keys, values, state.keys, state.values, state.cursor, state.position
        )
        attention = heads_first(attention).reshape(x.shape)
        fast, after = self._extend_fast(
            state,
            heads_first(self._fast_input(q, 0, positions)),
            heads_first(self._fast_input(k, 1, positions)),
            heads_first(self._fast_value(v)),
            heads_first(self._rates(x)),
            self._momentum(x),
        )
        state = LaCTState(
            *after,
            keys=push_to_ring(state.keys, keys, state.cursor),
            values=push_to_ring(state.values, values, state.cursor),
            cursor=(state.cursor + num_new) % config.window_size,
            position=state.position + num_new,
        )
        return self._merge(x, attention, heads_first(fast)), state

    def _extend_fast(self, state: LaCTState, q, k, v, rates, momentum):
        """Read S <= C tokens, q, k, v [B, R, H, S, d], with the weights of their chunks.

        Returns the outputs and the new (fast, sums, momentum_sum).

        One token is bound by memory: weights and sums are read and sums written, for 8 forks of the
        760M model 0.10 ms a layer at the published bandwidth of a v6e and 0.21 ms of a v5e. XLA's
        program takes 0.10 and 0.26 ms by static estimates (`experiments/tpu_kernels.py`, case
        lact_decode), so it has no Pallas kernel.
        """
        chunk, num_new = self.config.lact_chunk_size, q.shape[3]
        count = _tokens_in_chunk(state.position, chunk)
        crosses = count + num_new > chunk  # [B, R]; this chunk ends before the last new token
        inside = count[..., None] + jnp.arange(num_new) < chunk  # [B, R, S]

        def add(fast, sums, momentum_sum, live):
            live = live[:, :, None, :, None, None]
            more = update_sums(fast.weights, k, v, jnp.where(live, rates, 0.0))
            sums = jax.tree.map(jnp.add, sums, more)
            if momentum is None:
                return sums, None
            return sums, momentum_sum + jnp.where(live[:, :, 0, ..., 0], momentum, 0.0).sum(2)

        def stay(state):
            out = apply_fast_weights(state.fast.weights, q)
            return out, (state.fast, *add(state.fast, state.sums, state.momentum_sum, inside))

        def cross(state):
            out = apply_fast_weights(state.fast.weights, q)
            old = add(state.fast, state.sums, state.momentum_sum, inside)
            mean = None if momentum is None else old[1] / chunk
            norms = row_norms(self._initial_weights())
            fast = apply_update(state.fast, old[0], mean, norms, self._options)

            def where_crossing(new, old):
                mask = crosses.reshape(*crosses.shape, *[1] * (old.ndim - 2))
                return jnp.where(mask, new, old)

            fast = jax.tree.map(where_crossing, fast, state.fast)
            begun = jax.tree.map(lambda x: where_crossing(jnp.zeros_like(x), x), old)
            later = apply_fast_weights(fast.weights, q)
            out = jnp.where(inside[:, :, None, :, None], out, later)
            return out, (fast, *add(fast, *begun, ~inside))

        return lax.cond(jnp.any(crosses), jax.checkpoint(cross), jax.checkpoint(stay), state)


def _to_tokens(slots: jax.Array, plan: ChunkPlan | None, num_tokens: int) -> jax.Array:
    """The way back from chunk slots, [B, N, H, C, d] -> [B, T, H, d]."""
    x = jnp.swapaxes(slots, 2, 3)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    if plan is None:
        return x[:, :num_tokens]
    return _take_rows(x, plan.slot, plan.source, plan.live)


def _tokens_in_chunk(seen: jax.Array, chunk: int) -> jax.Array:
    """Tokens whose update is pending after `seen` of a document: 0 before any, else 1 ... C."""
    return jnp.where(seen > 0, (seen - 1) % chunk + 1, 0)


def _slabs(last: jax.Array, size: int):
    """Slabs of `size` rows, up to row `last` [B, R] (or the first `size` rows).

    Returns their first rows [B, R] and the function that cuts them, [B, A, T, ...] ->
    [B, R, A, size, ...].
    """
    start = jnp.maximum(last - size + 1, 0)

    def cut_row(x, start):  # [A, T, ...], []
        return lax.dynamic_slice_in_dim(x, start, size, axis=1)

    def cut(x):
        if axis_size("sequence") == 1:
            cut_rows = jax.vmap(jax.vmap(cut_row, (None, 0)))
            return over_shards(cut_rows, (("batch",), ("batch",)), ("batch",))(x, start)
        rows = take_tokens(jnp.moveaxis(x, 2, 1), start[..., None] + jnp.arange(size))
        return jnp.moveaxis(rows, 3, 2)

    return start, cut


@jax.custom_vjp
def _take_rows(x: jax.Array, index: jax.Array, inverse: jax.Array, taken: jax.Array) -> jax.Array:
    """Rows `index` [B, M] of x [B, K, ...], with a gather for its gradient too.

    inverse: [B, K], where in the result a row went; taken: [B, K] bool, whether it did. Rows of the
    result that stand for nothing hold any row, and get no gradient.
    """
    return jax.vmap(lambda row, i: row[i])(x, index)


def _take_rows_forward(x, index, inverse, taken):
    return _take_rows(x, index, inverse, taken), (inverse, taken)


def _take_rows_backward(residuals, cotangent):
    inverse, taken = residuals
    back = jax.vmap(lambda row, i: row[i])(cotangent, inverse)
    return jnp.where(taken.reshape(*taken.shape, *[1] * (back.ndim - 2)), back, 0), None, None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)
