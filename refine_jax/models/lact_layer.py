"""LaCT's layer over whole rows: window attention plus chunk-wise fast weights (golden README,
section 5).

Everything counts from the start of the token's own document: chunk boundaries, momentum means and
rope positions. A document therefore computes the same numbers wherever it stands in a row.

Letters: B batch, T tokens, D model dim, G groups of L = D / G numbers that hold the attention heads
(attention.py), H fast-weight heads of width d with hidden F, N chunk slots of C tokens, E rate
channels.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from refine_jax.kernels import sequence
from refine_jax.kernels.device import backend
from refine_jax.kernels.heads import from_chunks, regroup, to_chunks
from refine_jax.kernels.lact import Options, Weights, lact
from refine_jax.kernels.lact.pallas_tpu_inputs import InputsPlan, lact_inputs, rope_tables
from refine_jax.kernels.lact.pallas_tpu_inputs import takes as inputs_by_kernel
from refine_jax.kernels.lact.pallas_tpu_outputs import OutputsPlan, lact_outputs
from refine_jax.kernels.window_attention import window_attention
from refine_jax.models.attention import heads_in_group
from refine_jax.models.chunks import ChunkPlan, plan_chunks, to_slots, to_tokens
from refine_jax.models.config import LaCTConfig
from refine_jax.models.lact_forks import fast_input, fast_value
from refine_jax.models.lact_state import LaCTTrace
from refine_jax.models.layers import Linear, RMSNorm, normal_param, rope
from refine_jax.models.layout import Layout
from refine_jax.models.mixer import Mixer
from refine_jax.parallel import axis_size, constrain, over_shards, token_axis

_NORM_EPS = 1e-5  # of ttt_norm, q_norm and k_norm, whatever norm_eps is
_RATE_SHIFT = math.log(math.expm1(0.001))  # softplus of it is a rate of 0.001


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


class LaCTLayer(Mixer):
    """LaCT's parameters and forward pass; `LaCTMixer` adds decode states."""

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

    @property
    def _heads_in_group(self) -> int:
        return heads_in_group(self.config.num_attn_heads, self.config.attn_head_dim)

    def _qkv(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., T, D] -> q, k, v [..., G, T, L]."""
        groups = self.config.num_attn_heads // self._heads_in_group
        q, k, v = self.qkv.to_groups(x, 3, groups)
        if self.config.attn_qk_norm:
            q, k = self.q_norm.of_groups(q), self.k_norm.of_groups(k)
        return q, k, v

    def _rope(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rope on whole attention heads side by side, [..., n hd]; positions broadcast to [...]."""
        return rope(x, positions, self.config.rope_theta, self.config.attn_head_dim)

    def _fast_inputs(self, q, k, v, positions: jax.Array) -> tuple[jax.Array, ...]:
        """What the fast weights take, of [..., H, T, d]; positions broadcast to [..., 1, T]."""
        q, k = self._fast_input(q, 0, positions), self._fast_input(k, 1, positions)
        return q, k, fast_value(self.config, v)

    def _fast_input(self, x: jax.Array, column: int, positions: jax.Array) -> jax.Array:
        """Query (column 0) or key (1)."""
        return fast_input(self.config, x, self._scales(column), positions)

    def _scales(self, column: int) -> tuple[jax.Array, jax.Array]:
        """Scale and offset [D] of the fast weights' queries (column 0) or keys (1)."""
        return self.qk_scale[...][:, column], self.qk_offset[...][:, column]

    def _to_heads(self, *groups: jax.Array) -> list[jax.Array]:
        """Arrays [..., G, T, L] to [..., H, T, d]."""
        return [regroup(x, self.config.num_lact_heads) for x in groups]

    def _rates(self, x: jax.Array) -> jax.Array:
        """Learning rates of W0, W1, W2: [..., T, D] -> [..., H, T, 3, E] float32."""
        rates = jax.nn.softplus(self.lr_proj(x).astype(jnp.float32) + _RATE_SHIFT)
        rates = rates.reshape(*x.shape[:-1], self.config.num_lact_heads, 3, self.config.lr_dim)
        return jnp.swapaxes(rates, -4, -3)

    def _momentum(self, x: jax.Array) -> jax.Array | None:
        """[..., T, D] -> [..., H, T] float32."""
        if self.momentum_proj is None:
            return None
        return jax.nn.sigmoid(jnp.swapaxes(self.momentum_proj(x), -1, -2).astype(jnp.float32))

    def _scale(self, x: jax.Array) -> jax.Array | None:
        """Of the fast weights' output: [..., T, D] -> [..., H, T]."""
        if self.ttt_scale_proj is None:
            return None
        return jax.nn.silu(jnp.swapaxes(self.ttt_scale_proj(x), -1, -2))

    def _fast_output(self, fast: jax.Array, scale: jax.Array | None) -> jax.Array:
        """[..., H, T, d], and the scale [..., H, T]."""
        y = self.ttt_norm(fast)
        return y if scale is None else y * scale[..., None]

    plan = staticmethod(plan_chunks)

    def forward(
        self,
        x: jax.Array,
        layout: Layout | None,
        plan: ChunkPlan | None,
        forks: jax.Array | None = None,
    ) -> tuple[jax.Array, LaCTTrace]:
        """Whole rows x [B, T, D] -> y [B, T, D] (undefined at padding) and the trace for forks.

        forks: [B, R], slots before forks, where these are known. The trace is the same: what
        `extend_traced` reads gets its gradient in place, or by whole chunks.
        """
        del forks
        num_tokens = x.shape[1]
        positions = jnp.arange(num_tokens)[None] if layout is None else layout.position
        positions = positions[:, None]
        q, k, v = self._qkv(x)
        axis_name = self.token_axis(self.config, num_tokens)
        in_chunks = plan is None and axis_name is None
        in_chunks = in_chunks and num_tokens % self.config.lact_chunk_size == 0
        of_attention, inputs = self._inputs(q, k, v, positions, in_chunks, axis_name)
        attention = self._attend(*of_attention, layout, axis_name)

        rates, momentum = self._rates(x), self._momentum(x)
        tokens = *inputs, rates, momentum
        if in_chunks:
            fast, chunks = self._fast_chunks(tokens)
        else:
            fast, chunks = self._run_fast(tokens, plan, axis_name)
        both = self._add_fast(attention, fast, self._scale(x), in_chunks, axis_name)
        y = self.o_proj.from_groups(both)
        return y, LaCTTrace(of_attention[1], v, rates, momentum, chunks)

    # Its parts

    def _attend(self, q, k, v, layout: Layout | None, axis_name: str | None) -> jax.Array:
        """Window attention of q, k, v [B, G, T, L], each device on its rows, heads and tokens."""
        in_group = self._heads_in_group

        def attend(q, k, v, layout):
            # Its other implementations are not those of the kernels: it chooses by itself.
            name = "xla" if self.implementation == "xla" else None
            return window_attention(
                q,
                k,
                v,
                self.config.window_size,
                None if layout is None else jnp.where(layout.mask, layout.document, 0),
                heads_per_group=in_group,
                implementation=name,
                axis_name=axis_name,
            )

        tokens = axis_name and "tokens"
        heads = ("batch", "heads", tokens)
        attend = over_shards(attend, (heads, heads, heads, ("batch", tokens)), heads)
        return attend(q, k, v, layout)

    @staticmethod
    def token_axis(config: LaCTConfig, num_tokens: int) -> str | None:
        """The mesh axis over which tokens are spread: those of rows, and those of every chunk."""
        chunk = config.lact_chunk_size
        return token_axis(num_tokens, chunk) if chunk % axis_size("sequence") == 0 else None

    @staticmethod
    def fast_axes(config: LaCTConfig, axis_name: str | None) -> tuple[str | None, str]:
        """Logical names of the axes of the fast weights' states: of chunks, and of heads.

        Devices that share a row's tokens exchange them for heads if each gets some, and keep what
        these heads have in all chunks. Else they share the tokens of every chunk, and each keeps
        the states of its part of the chunks.
        """
        if axis_name is None:
            return None, "heads"
        divides = config.num_lact_heads % (axis_size("tensor") * axis_size(axis_name)) == 0
        return (None, "fast_heads") if divides else ("tokens", "heads")

    def _here(self, groups: int) -> tuple[int, int]:
        """Fast-weight heads, and of `groups` those, that a device has."""
        devices = axis_size("tensor")
        return self.config.num_lact_heads // devices, groups // devices

    def _inputs(self, q, k, v, positions, in_chunks: bool, axis_name: str | None):
        """Queries, keys and values of attention, and of the fast weights.

        q, k, v, and those of attention: [B, G, T, L]. positions: [1 or B, 1, T]. Those of the fast
        weights are [B, N, H, C, d] where rows are whole chunks of one document, or [B, H, T, d].
        """
        tokens = axis_name and "tokens"
        rows = ("batch", "heads", tokens)
        chunks = ("batch", None, "heads") if in_chunks else rows
        if self._inputs_by_kernel(q, in_chunks, axis_name):
            run = functools.partial(self._inputs_shard, in_chunks=in_chunks)
            batch = None if positions.shape[0] == 1 else "batch"
            run = over_shards(run, (rows, ("heads",), (batch, None, tokens)), (rows, chunks))
            scales = [*self._scales(0), *self._scales(1)]
            scales = [x.reshape(self.config.num_lact_heads, -1) for x in scales]
            return run((q, k, v), jnp.stack(scales, axis=1), positions)

        of_attention = self._rope(q, positions), self._rope(k, positions), v
        heads, chunk = self._here(1)[0], self.config.lact_chunk_size
        if in_chunks:
            split = over_shards(lambda x: to_chunks(x, heads, chunk), (rows,), chunks)
            ((positions,), *_) = to_slots((positions,), None, chunk)
        else:
            split = over_shards(lambda x: regroup(x, heads), (rows,), rows)
        return of_attention, self._fast_inputs(*map(split, (q, k, v)), positions)

    def _inputs_plan(self, groups: int, size: int, chunk: int) -> InputsPlan:
        """Of so many groups of so many numbers, in chunks of so many tokens."""
        config = self.config
        return InputsPlan(
            heads=groups * size // config.lact_head_dim,
            chunk=chunk,
            head_dim=config.attn_head_dim,
            silu=config.qkv_silu,
            silu_values=config.qkv_silu and not config.no_v_silu,
            rope=not config.ttt_nope,
        )

    def _inputs_by_kernel(self, q, in_chunks: bool, axis_name: str | None) -> bool:
        """Whether the kernel for TPUs makes them."""
        if self.implementation is not None or backend() != "tpu":
            return False
        _, groups = self._here(q.shape[1])
        tokens = q.shape[2] // (1 if axis_name is None else axis_size(axis_name))
        chunk = self.config.lact_chunk_size if in_chunks else tokens
        plan = self._inputs_plan(groups, q.shape[3], chunk)
        return inputs_by_kernel(q.shape[3], groups, plan, tokens)

    def _inputs_shard(self, tokens, scales, positions, in_chunks: bool):
        """`_inputs` of a device's rows, heads and tokens, by the kernel."""
        config, (_, groups, count, size) = self.config, tokens[0].shape
        plan = self._inputs_plan(groups, size, config.lact_chunk_size if in_chunks else count)
        tables = rope_tables(positions[:, 0], config.rope_theta, config.attn_head_dim)
        of_attention, inputs = lact_inputs(plan, *tokens, scales.astype(jnp.float32), tables)
        return of_attention, inputs if in_chunks else tuple(x[:, 0] for x in inputs)

    def _fast_chunks(self, tokens):
        """Fast weights over rows that are whole chunks of one document.

        tokens: q, k, v [B, N, H, C, d], and rates and momentum [B, H, T, ...]. Returns their output
        [B, N, H, C, d] and the states [B, N, H, ...].
        """
        chunks = ("batch", None, "heads")

        def run(slots, weights):
            return self._lact(*slots, weights=weights)

        slots, *_ = to_slots(tokens[3:], None, self.config.lact_chunk_size)
        run = over_shards(run, (chunks, ("heads",)), (chunks, chunks))
        return run((*tokens[:3], *slots), self._initial_weights())

    def _add_fast(self, attention, fast, scale, in_chunks: bool, axis_name: str | None):
        """`_fast_output` of fast [B, N, H, C, d] or [B, H, T, d], and attention [B, G, T, L]."""
        tokens = axis_name and "tokens"
        rows = ("batch", "heads", tokens)
        layout = ("batch", None, "heads") if in_chunks else rows
        if self._inputs_by_kernel(attention, in_chunks, axis_name):

            def add(fast, scale, weight, attention):
                if not in_chunks:
                    fast = fast[:, None]
                if scale is None:
                    scale = jnp.ones((fast.shape[0], fast.shape[2], attention.shape[2]))
                scale = scale.astype(jnp.float32)[:, :, None]
                plan = OutputsPlan(self.ttt_norm.eps)
                return lact_outputs(plan, fast, scale, weight[None], attention)

            add = over_shards(add, (layout, rows, (None,), rows), rows)
            return add(fast, scale, self.ttt_norm.weight[...].astype(jnp.float32), attention)

        _, groups = self._here(attention.shape[1])
        if in_chunks:
            join = over_shards(lambda x: from_chunks(x, groups), (layout,), rows)
            if scale is not None:
                ((scale,), *_) = to_slots((scale,), None, self.config.lact_chunk_size)
        else:
            join = over_shards(lambda x: regroup(x, groups), (rows,), rows)
        return attention + join(self._fast_output(fast, scale))

    def _run_fast(self, tokens, plan: ChunkPlan | None, axis_name: str | None):
        """Fast weights over rows: tokens' arrays [B, H, T, ...] to [B, H, T, d] and the states.

        Each device takes its rows and heads; where tokens are spread, as `fast_axes` says.
        """
        chunks, heads = self.fast_axes(self.config, axis_name)
        if chunks is not None:
            return self._share_chunks(tokens, plan, axis_name)

        def run(tokens, weights, plan):
            if axis_name is not None:
                tokens = sequence.exchange(tokens, axis_name, split=1, join=2)
            slots, mask, reset = to_slots(tokens, plan, self.config.lact_chunk_size)
            out, states = self._lact(*slots, weights=weights, mask=mask, reset=reset)
            out = to_tokens(out, plan, tokens[0].shape[2])
            if axis_name is not None:
                out = sequence.exchange(out, axis_name, split=2, join=1)
            return out, states

        arrays = "batch", "heads", axis_name and "tokens"
        run = over_shards(run, (arrays, (heads,), ("batch",)), (arrays, ("batch", None, heads)))
        return run(tokens, self._initial_weights(), plan)

    def _share_chunks(self, tokens, plan: ChunkPlan | None, axis_name: str):
        """`_run_fast` where devices share the tokens of every chunk."""

        def run(slots, weights, mask, reset):
            return self._lact(*slots, weights=weights, mask=mask, reset=reset, axis_name=axis_name)

        # Constrain input and output: else XLA sends the array, or its gradient, unsharded.
        tokens = jax.tree.map(lambda x: constrain(x, "batch", "heads", "tokens"), tokens)
        slots, mask, reset = to_slots(tokens, plan, self.config.lact_chunk_size)
        arrays, states = ("batch", None, "heads", "tokens"), ("batch", "tokens", "heads")
        slots = jax.tree.map(lambda x: constrain(x, *arrays), slots)
        in_axes = (arrays, ("heads",), ("batch", None, "tokens"), ("batch",))
        run = over_shards(run, in_axes, (arrays, states))
        out, chunks = run(slots, self._initial_weights(), mask, reset)
        out = constrain(to_tokens(out, plan, tokens[0].shape[2]), "batch", "heads", "tokens")
        return out, chunks

    def _lact(self, *slots, **arrays):
        return lact(*slots, options=self._options, implementation=self.implementation, **arrays)
