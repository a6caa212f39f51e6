"""The DeltaNet mixer (golden README, section 6), on which gated_delta.py builds.

Letters: B batch, T tokens, D model dim, H key heads, Hv value heads, K key dim, V value dim,
W convolution taps, R forks of a sequence, S new tokens, N tokens between two saved states.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from refine_jax.kernels.delta_rule import STEP_IMPLEMENTATIONS, delta_rule, delta_step
from refine_jax.kernels.numerics import by_rows, l2_norm_fla
from refine_jax.models.config import DeltaNetConfig, GatedDeltaNetConfig
from refine_jax.models.layers import Linear, RMSNorm, ShortConv, convolve_rows, short_conv
from refine_jax.models.layout import Layout
from refine_jax.models.mixer import Mixer, fork
from refine_jax.models.slabs import take_slabs, tap_slabs
from refine_jax.parallel import over_shards, take_tokens, token_axis

_HEADS = ("heads",)


class DeltaTrace(NamedTuple):
    """What forks need of a forward pass.

    x: [B, T, D], the mixer's input: a fork needs the keys and values of at most N tokens, which it
    computes again. states: [B, ceil(T / N), Hv, K, V] float32, before every N-th token.
    """

    x: jax.Array
    states: jax.Array


class DeltaPick(NamedTuple):
    """What R forks of a row need of a trace.

    memory: [B, R, Hv, K, V] float32, the states saved before the blocks of N tokens that the forks
    lie in. start: [B, R] int32, where N tokens begin that hold what of the block the row has. x:
    [B, R, N, D], the mixer's inputs there. before, tails: [B, R, W - 1, D], its inputs before
    these, and before the forks; None without convolutions.
    """

    memory: jax.Array
    start: jax.Array
    x: jax.Array
    before: jax.Array | None
    tails: jax.Array | None


class DeltaTaps(NamedTuple):
    """What R forks need of a forward pass that knows where they are.

    memory, start, tails: as of `DeltaPick`. k, v: [B, R, N, channels], the outputs of the
    convolutions there. beta, log_decay: [B, R, N, Hv] float32.
    """

    memory: jax.Array
    start: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array
    log_decay: jax.Array | None
    tails: jax.Array | None


class DeltaState(NamedTuple):
    """A decode state; its size does not depend on the tokens seen.

    memory: [B, R, Hv, K, V] float32. tails: the last W - 1 inputs of the convolutions of q, k and
    v, [B, R, W - 1, channels] each; None without convolutions.
    """

    memory: jax.Array
    tails: tuple[jax.Array, jax.Array, jax.Array] | None


class DeltaNetMixer(Mixer):
    """DeltaNet's layer between norm and residual."""

    TRACES_INPUTS = True
    FORKS_ONCE = True
    FORK_AXES = ("batch", "forks")

    def __init__(
        self,
        config: DeltaNetConfig | GatedDeltaNetConfig,
        *,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.implementation = implementation
        size, value_heads = config.hidden_size, config.num_value_heads
        keys, values = config.num_heads * config.key_dim, value_heads * config.value_dim
        self.q_proj = Linear(size, keys, rngs=rngs)
        self.k_proj = Linear(size, keys, rngs=rngs)
        self.v_proj = Linear(size, values, rngs=rngs)
        if config.use_short_conv:
            self.q_conv1d = ShortConv(keys, config.conv_size, rngs=rngs)
            self.k_conv1d = ShortConv(keys, config.conv_size, rngs=rngs)
            self.v_conv1d = ShortConv(values, config.conv_size, rngs=rngs)
        self.b_proj = Linear(size, value_heads, rngs=rngs) if self._learns_beta else None
        self.g_proj = Linear(size, values, rngs=rngs) if config.use_gate else None
        self.o_norm = RMSNorm(config.value_dim, config.norm_eps)
        self.o_proj = Linear(values, size, rngs=rngs)

    # What the two mixers do differently

    @property
    def _learns_beta(self) -> bool:
        return self.config.use_beta

    @property
    def _activation(self) -> str:
        return self.config.qk_activation

    @property
    def _norm(self) -> str:
        return self.config.qk_norm

    def _log_decay(self, x: jax.Array) -> jax.Array | None:
        """Log of the decay [..., Hv] float32; None where nothing decays."""
        del x

    # What forward and extend share

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _project_kv(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.k_proj(x), self.v_proj(x)

    @property
    def _taps(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The convolutions' weights [channels, 1, W], of q, k and v."""
        return tuple(c.weight[...] for c in (self.q_conv1d, self.k_conv1d, self.v_conv1d))

    def _beta_logits(self, x: jax.Array) -> jax.Array:
        return self.b_proj(x)

    def _gate(self, x: jax.Array) -> jax.Array | None:
        return None if self.g_proj is None else self.g_proj(x)

    def _heads(self, q, k, v):
        """Activations and heads: q, k [..., H, K] and v [..., Hv, V].

        The l2 norm is left to the delta rule.
        """
        config = self.config

        def key_heads(x):
            if self._activation == "silu":
                x = jax.nn.silu(x)
            elif self._activation == "relu":
                x = jax.nn.relu(x)
            elif self._activation == "elu":
                x = jax.nn.elu(x) + 1
            x = x.reshape(*x.shape[:-1], config.num_heads, config.key_dim)
            return _sum_norm(x) if self._norm == "sum" else x

        v = jax.nn.silu(v).reshape(*v.shape[:-1], config.num_value_heads, config.value_dim)
        return key_heads(q), key_heads(k), v

    def _beta(self, x: jax.Array) -> jax.Array:
        """Writing strengths [..., Hv] float32."""
        if not self._learns_beta:
            beta = jnp.ones((*x.shape[:-1], self.config.num_value_heads), jnp.float32)
        else:
            beta = jax.nn.sigmoid(self._beta_logits(x).astype(jnp.float32))
        return 2 * beta if self.config.allow_neg_eigval else beta

    def _output(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """Norm per head, gate and output projection of out [..., Hv, V]."""
        out = self.o_norm(out)
        gate = self._gate(x)
        if gate is not None:
            out = out * jax.nn.silu(gate).reshape(out.shape)
        return self.o_proj(out.reshape(*out.shape[:-2], -1))

    # The members of `Mixer`

    def forward(
        self,
        x: jax.Array,
        layout: Layout | None,
        plan: None,
        forks: jax.Array | None = None,
    ) -> tuple[jax.Array, DeltaTrace | DeltaTaps]:
        """Run whole rows x [B, T, D]; returns [B, T, D] (undefined at padding) and the trace.

        forks: [B, R] int32, slots before forks, where these are known: what they need instead of
        the trace, whose gradient then costs no more than it is large.
        """
        del plan
        tokens, block_size = x.shape[1], self.config.token_multiple
        axis_name = token_axis(tokens, block_size)
        tails = None
        if forks is not None:
            start, size = _block_start(forks, block_size, tokens)
            if self.config.use_short_conv:
                x, tails = self._tap_tails(x, forks, layout)
        projected = self._project(x)
        if self.config.use_short_conv:
            position = None if layout is None else layout.position
            projected = [
                convolve_rows(p, taps, position, axis_name)
                for taps, p in zip(self._taps, projected, strict=True)
            ]
        q, k, v = projected
        beta, log_decay = self._beta(x), self._log_decay(x)
        if forks is not None:
            arrays = k, v, beta, log_decay
            (k, v, beta, log_decay), blocks = zip(
                *((None, None) if x is None else tap_slabs(x, start, size, _HEADS) for x in arrays),
                strict=True,
            )
        q, k, v = self._heads(q, k, v)
        if layout is not None:
            k, beta, log_decay = _keep(layout.mask, k, beta, log_decay)
        document = None if layout is None else layout.document
        out, _, states = self._run_rule(
            q,
            k,
            v,
            beta,
            log_decay,
            document=document,
            save_every=block_size,
            axis_name=axis_name,
        )
        y = self._output(x, out)
        if forks is None:
            return y, DeltaTrace(x, states)
        _, memory = tap_slabs(states, _fork_block(forks, block_size), 1, _HEADS)
        return y, DeltaTaps(memory[:, :, 0], start, *blocks, tails)

    def _tap_tails(self, x: jax.Array, forks: jax.Array, layout: Layout | None):
        """The inputs x [B, T, D] of rows, tapped, and the last W - 1 of them before forks."""
        tokens, reach = x.shape[1], self.config.conv_size - 1
        last, count = forks - 1, forks
        if layout is not None:
            last, count = layout.last_real(forks), layout.tokens_before(forks)
        size = min(reach, tokens)
        start = jnp.clip(last - size + 1, 0, tokens - size)
        x, slabs = tap_slabs(x, start, size)
        back = jnp.arange(reach - 1, -1, -1)
        index = jnp.clip(last[..., None] - back - start[..., None], 0, size - 1)
        tails = jnp.take_along_axis(slabs, index[..., None], axis=2)
        return x, jnp.where((back < count[..., None])[..., None], tails, 0)

    @staticmethod
    def pick(
        config: DeltaNetConfig | GatedDeltaNetConfig,
        trace: DeltaTrace,
        positions: jax.Array,
        layout: Layout | None,
        plan: None,
    ) -> DeltaPick:
        """What `resume` needs of a trace for forks after the first `positions` [B, R] slots."""
        del plan
        start, size = _block_start(positions, config.token_multiple, trace.x.shape[1])
        before = tails = None
        if config.use_short_conv:
            last = positions - 1 if layout is None else layout.last_real(positions)
            back = jnp.arange(config.conv_size - 2, -1, -1)
            before, tails = (
                take_tokens(trace.x, jnp.maximum(end[..., None] - back, 0))
                for end in (start - 1, last)
            )
        memory = take_slabs(trace.states, _fork_block(positions, config.token_multiple), 1, "heads")
        return DeltaPick(memory[:, :, 0], start, take_slabs(trace.x, start, size), before, tails)

    def resume(
        self,
        picked: DeltaPick,
        positions: jax.Array,
        layout: Layout | None,
        plan: None,
        horizon: int | None = None,
    ) -> DeltaState:
        """Decode states after the first `positions` [B, R] slots of the rows."""
        del plan, horizon
        beta, log_decay = self._beta(picked.x), self._log_decay(picked.x)
        k, v = self._project_kv(picked.x)
        tails = None
        if self.config.use_short_conv:
            position = slot = _slots(picked.start, k)
            count = positions
            if layout is not None:
                count = layout.tokens_before(positions)
                position = take_tokens(layout.position, slot)
            before = self._project_kv(picked.before)
            k, v = (
                short_conv(jnp.concatenate(tokens, axis=2), taps, position)
                for tokens, taps in zip(
                    zip(before, (k, v), strict=True), self._taps[1:], strict=True
                )
            )
            back = jnp.arange(self.config.conv_size - 2, -1, -1)
            tails = jnp.where((back < count[..., None])[..., None], picked.tails, 0)
            tails = self._project(tails)
        taps = DeltaTaps(picked.memory, picked.start, k, v, beta, log_decay, None)
        return DeltaState(self._replay(taps, positions, layout), tails)

    def _replay(self, taps: DeltaTaps, positions: jax.Array, layout: Layout | None) -> jax.Array:
        """Memories [B, R, Hv, K, V] after the first `positions` [B, R] slots of the rows.

        Takes the state saved before the block of N tokens that a position lies in, and replays the
        tokens of that block that belong to the position's document, for all forks at once.
        """
        memory = taps.memory
        slot = _slots(taps.start, taps.k)
        first = _fork_block(positions, self.config.token_multiple) * self.config.token_multiple
        replayed = (slot >= first[..., None]) & (slot < positions[..., None])
        if layout is not None:
            document = take_tokens(layout.document, jnp.maximum(positions - 1, 0))
            of_slot = take_tokens(layout.document, slot)
            replayed &= (of_slot == document[..., None]) & take_tokens(layout.mask, slot)
            of_memory = take_tokens(layout.document, jnp.maximum(first - 1, 0))
            memory = jnp.where((of_memory == document)[..., None, None, None], memory, 0.0)
        _, k, v = self._heads(taps.k, taps.k, taps.v)
        k, beta, log_decay = _keep(replayed, k, taps.beta, taps.log_decay)
        return self._delta_rule(None, k, v, beta, log_decay, memory)[1]

    def init_state(self, batch: tuple[int, int], dtype: jnp.dtype) -> DeltaState:
        """The state before any token, for `batch` (B, R)."""
        config = self.config
        shape = (config.num_value_heads, config.key_dim, config.value_dim)
        memory = jnp.zeros((*batch, *shape), jnp.float32)
        if not config.use_short_conv:
            return DeltaState(memory, None)
        x = jnp.zeros((*batch, config.conv_size - 1, config.hidden_size), dtype)
        return DeltaState(memory, self._project(x))

    def extend(self, x: jax.Array, state: DeltaState) -> tuple[jax.Array, DeltaState]:
        """Continue `state` by x [B, R, S, D]; returns [B, R, S, D] and the new state."""
        projected, tails = self._project(x), None
        if self.config.use_short_conv:
            projected = [
                jnp.concatenate([tail, p], axis=2)
                for tail, p in zip(state.tails, projected, strict=True)
            ]
            tails = tuple(p[:, :, x.shape[2] :] for p in projected)
        y, memory = self._extend_projected(x, projected, state.memory)
        return y, DeltaState(memory, tails)

    def _extend_projected(self, x: jax.Array, projected, memory: jax.Array):
        """`extend` from what the convolutions take, [B, R, W - 1 + S, channels] each; y and the new
        memory.
        """
        if self.config.use_short_conv:
            projected = [short_conv(p, taps) for taps, p in zip(self._taps, projected, strict=True)]
        q, k, v = self._heads(*projected)
        out, memory = self._delta_rule(q, k, v, self._beta(x), self._log_decay(x), memory)
        return self._output(x, out), memory

    def extend_traced(
        self,
        x: jax.Array,
        trace: DeltaTrace | DeltaTaps,
        positions: jax.Array,
        layout: Layout | None,
        plan: None,
    ) -> jax.Array:
        """`extend` of x [B, R, S, D] from forks of rows at `positions` [B, P]: y [B, R, S, D].

        trace: What `forward` gave, with or without the forks. R / P forks that follow each other
        have the same position.
        """
        copies = x.shape[1] // positions.shape[1]

        def of_forks(tree):
            return jax.tree.map(lambda x: jnp.repeat(x, copies, axis=1), tree)

        if not isinstance(trace, DeltaTaps):
            state = fork(self, trace, positions, layout, plan, x.shape[2])
            return self.extend(x, of_forks(state))[0]
        memory, tails = of_forks((self._replay(trace, positions, layout), trace.tails))
        inputs = x if tails is None else jnp.concatenate([tails, x], axis=2)
        return self._extend_projected(x, self._project(inputs), memory)[0]

    @staticmethod
    def normed(picked: DeltaPick, norm) -> DeltaPick:
        """What was picked of inputs before the norm, after it."""
        before, tails = (x if x is None else norm(x) for x in (picked.before, picked.tails))
        return picked._replace(x=norm(picked.x), before=before, tails=tails)

    def _delta_rule(self, q, k, v, beta, log_decay, memory):
        """The delta rule on arrays [B, R, S, ...] from memory [B, R, ...]; (out, new memory)."""

        def rule(q, k, v, beta, log_decay, memory):
            def merged(x):
                return None if x is None else x.reshape(-1, *x.shape[2:])

            arrays = [merged(x) for x in (q, k, v, beta, log_decay)]
            if q is not None and v.shape[2] == 1:
                arrays = [None if x is None else x[:, 0] for x in arrays]
                if self._norm == "l2":
                    arrays[:2] = map(l2_norm_fla, arrays[:2])
                # The step has no form for some names of the sequence: it is chosen by itself then.
                name = self.implementation if self.implementation in STEP_IMPLEMENTATIONS else None
                out, new = delta_step(*arrays, state=merged(memory), implementation=name)
            else:
                out, new, _ = self._run_rule(*arrays, initial_state=merged(memory))
            return None if out is None else out.reshape(v.shape), new.reshape(memory.shape)

        arrays, state = ("batch", "forks", None, "heads"), ("batch", "forks", "heads")
        return over_shards(rule, (*(arrays,) * 5, state), (arrays, state))(
            q, k, v, beta, log_decay, memory
        )

    def _run_rule(
        self,
        q,
        k,
        v,
        beta,
        log_decay,
        *,
        initial_state=None,
        document=None,
        save_every=None,
        axis_name=None,
    ):
        """`delta_rule` with the model's options, each device on its rows, heads and tokens."""

        def rule(q, k, v, beta, log_decay, initial_state, document):
            return delta_rule(
                q,
                k,
                v,
                beta,
                log_decay,
                initial_state=initial_state,
                document=document,
                normalize=self._norm == "l2",
                save_every=save_every,
                axis_name=axis_name,
                implementation=self.implementation,
            )

        tokens, state = ("batch", axis_name and "tokens", "heads"), ("batch", "heads")
        rule = over_shards(rule, (*(tokens,) * 5, state, tokens[:2]), (tokens, state, tokens))
        return rule(q, k, v, beta, log_decay, initial_state, document)


def _sum_norm(x):
    """`x / sum(x)` over the last axis; zeros where the sum is 0, as at padding."""

    def rows(x):
        total = jnp.sum(x.astype(jnp.float32), axis=-1, keepdims=True)
        return jnp.where(total == 0, 0.0, x / jnp.where(total == 0, 1.0, total)).astype(x.dtype)

    return by_rows(rows, x)


def _fork_block(positions: jax.Array, block_size: int) -> jax.Array:
    """The block of `block_size` tokens that the last of the first `positions` tokens lies in."""
    return (jnp.maximum(positions, 1) - 1) // block_size


def _block_start(positions: jax.Array, block_size: int, tokens: int) -> tuple[jax.Array, int]:
    """Where as many tokens begin as a block has, or the row, that hold the fork's block."""
    size = min(block_size, tokens)
    return jnp.minimum(_fork_block(positions, block_size) * block_size, tokens - size), size


def _slots(start: jax.Array, x: jax.Array) -> jax.Array:
    """Slots [B, R, N] of tokens x [B, R, N, ...] that begin at `start` [B, R]."""
    return start[..., None] + jnp.arange(x.shape[2])


def _keep(mask, k, beta, log_decay):
    """Zeros for tokens outside `mask`, which then change nothing."""
    k = jnp.where(mask[..., None, None], k, 0)
    beta = jnp.where(mask[..., None], beta, 0)
    return k, beta, None if log_decay is None else jnp.where(mask[..., None], log_decay, 0)
