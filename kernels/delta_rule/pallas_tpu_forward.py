"""The delta rule on TPU: a Pallas kernel that walks over the chunks of a few heads.

A program of the grid (batch, heads / G, blocks of chunks) carries the states of G heads in VMEM
through the whole sequence. What does not depend on the state (scores, decays, inverses) is done
for all heads and chunks of a block in step, so that the matrix units always have independent
products to work on; the walk itself is three products deep a chunk. Arrays stay in the layout of
the projections, [B, T, H K]; a head is a slice of lanes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refine_jax.kernels import tpu
from refine_jax.kernels.delta_rule import pallas_tpu_math as chunk_math
from refine_jax.kernels.delta_rule.pallas_tpu_math import Scalars, matmul
from refine_jax.kernels.delta_rule.xla import border_decays
from refine_jax.kernels.numerics import pad_axes


class DeltaPlan(NamedTuple):
    """What a kernel is specialised on.

    heads: value heads a program (G). group: value heads that share a key head. chunk: C tokens.
    chunks: of a grid step. fields: names of the per-token numbers (`Scalars`).
    """

    batch: int
    tokens: int
    value_heads: int
    heads: int
    group: int
    chunk: int
    chunks: int
    key_dim: int
    value_dim: int
    scale: float
    dtype: jnp.dtype
    fields: tuple[str, ...]
    normalize: bool
    has_q: bool

    @property
    def block(self) -> int:
        """Tokens of a grid step."""
        return self.chunk * self.chunks

    @property
    def key_heads(self) -> int:
        """Key heads of a program."""
        return self.heads // self.group

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs: the last axis is walked in order."""
        return self.batch, self.value_heads // self.heads, self.tokens // self.block

    @property
    def row_count(self) -> int:
        """Rows of the packed per-token numbers of a program, whole sublane tiles."""
        return -(-len(self.fields) * self.heads // 8) * 8

    def token_slice(self, c: int) -> slice:
        """Tokens of chunk c of a block."""
        return slice(c * self.chunk, (c + 1) * self.chunk)


def lanes(head: int, width: int) -> slice:
    """Lanes of a head in arrays [..., H * width]."""
    return slice(head * width, (head + 1) * width)


def column_spec(plan: DeltaPlan, width: int, order) -> pl.BlockSpec:
    """Blocks [1, tokens, G * width] of arrays [B, T, H * width]."""
    return pl.BlockSpec((1, plan.block, width), lambda b, h, t: (b, order(t), h))


def state_spec(plan: DeltaPlan) -> pl.BlockSpec:
    """Blocks [1, G, K, V] of arrays [B, H, K, V]."""
    return pl.BlockSpec((1, plan.heads, plan.key_dim, plan.value_dim), lambda b, h, t: (b, h, 0, 0))


def states_spec(plan: DeltaPlan, order) -> pl.BlockSpec:
    """Blocks [1, chunks, G, K, V] of arrays [B, N, H, K, V]."""
    return pl.BlockSpec(
        (1, plan.chunks, plan.heads, plan.key_dim, plan.value_dim),
        lambda b, h, t: (b, order(t), h, 0, 0),
    )


def rows_spec(plan: DeltaPlan, count: int, order) -> pl.BlockSpec:
    """Blocks [1, 1, count, tokens] of arrays [B, H / G, count, T]."""
    return pl.BlockSpec((1, 1, count, plan.block), lambda b, h, t: (b, h, 0, order(t)))


def read_scalars(plan: DeltaPlan, refs, chunks: range) -> tuple[Scalars, Scalars]:
    """Columns and rows of the per-token numbers of some chunks, chunk by chunk head by head."""
    packed = refs["rows"][0, 0]
    turned = packed.T
    columns, rows = {}, {}
    for i, name in enumerate(plan.fields):
        at = [(plan.token_slice(c), i * plan.heads + h) for c in chunks for h in range(plan.heads)]
        columns[name] = jnp.stack([turned[tokens, r : r + 1] for tokens, r in at])
        rows[name] = jnp.stack([packed[r : r + 1, tokens] for tokens, r in at])
    return Scalars(**columns), Scalars(**rows)


def load_heads(plan: DeltaPlan, ref, width: int, chunks: range) -> jax.Array:
    """Token blocks of some chunks, [chunks * heads, C, width], from a block [1, tokens, lanes]."""
    heads = ref.shape[-1] // width
    at = [(plan.token_slice(c), lanes(h, width)) for c in chunks for h in range(heads)]
    return jnp.stack([ref[0, tokens, columns] for tokens, columns in at])


def store_heads(plan: DeltaPlan, ref, x: jax.Array, c: int):
    """Store x [heads, C, width] of chunk c where `load_heads` reads it."""
    for h in range(x.shape[0]):
        ref[0, plan.token_slice(c), lanes(h, x.shape[2])] = x[h].astype(ref.dtype)


class Keys(NamedTuple):
    """Key heads in some chunks, [U, C, K]: float32 after normalisation, else as given.

    Scales are 1 / |q| and 1 / |k| [U, C, 1], with normalisation.
    """

    q: jax.Array | None
    k: jax.Array
    q_scale: jax.Array | None = None
    k_scale: jax.Array | None = None

    def operands(self, plan: DeltaPlan) -> jax.Array:
        """k, and q behind it where there is one: [U, C or 2 C, K]."""
        both = [self.k] if self.q is None else [self.k, self.q]
        return jnp.concatenate([x.astype(plan.dtype) for x in both], axis=1)


def read_keys(plan: DeltaPlan, refs, chunks: range) -> Keys:
    """Load the key heads, and normalise them if asked to."""
    k = load_heads(plan, refs["k"], plan.key_dim, chunks)
    q = load_heads(plan, refs["q"], plan.key_dim, chunks) if plan.has_q else None
    if not plan.normalize:
        return Keys(q, k)
    k, k_scale = chunk_math.normalize(k)
    q, q_scale = chunk_math.normalize(q) if plan.has_q else (None, None)
    return Keys(q, k, q_scale, k_scale)


def per_value_head(plan: DeltaPlan, x: jax.Array) -> jax.Array:
    """[key heads, ...] -> [value heads, ...]."""
    if plan.group == 1:
        return x
    shape = x.shape
    return jnp.broadcast_to(x[:, None], (shape[0], plan.group, *shape[1:])).reshape(-1, *shape[1:])


def times(x: jax.Array, factor: jax.Array | None) -> jax.Array:
    """Multiply x [...] by a factor [...], where there is one."""
    return x if factor is None else x * factor


def _forward_kernel(plan: DeltaPlan, **refs):
    """Walk over the chunks of a block: outputs, and what the backward pass and forks read."""
    state, dtype, chunks = refs["state"], plan.dtype, range(plan.chunks)

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = refs["initial"][0]

    columns, rows = read_scalars(plan, refs, chunks)
    decay = chunk_math.decay_matrix(columns, rows)
    row, col = chunk_math.index_matrices(plan.chunk)
    keys = read_keys(plan, refs, chunks)
    operands = keys.operands(plan)
    scores = matmul(operands, keys.k, "nt", dtype)
    operands, scores = per_value_head(plan, operands), per_value_head(plan, scores)
    system = times(scores[:, : plan.chunk], decay) * rows.beta
    inverse = chunk_math.invert_unit_lower(jnp.where(row > col, system, 0.0), dtype).astype(dtype)
    # What is multiplied with U: it goes into the state, and to the outputs of the chunk.
    writers = [jnp.swapaxes(times(operands[:, : plan.chunk], columns.to_end).astype(dtype), 1, 2)]
    if plan.has_q:
        p = times(scores[:, plan.chunk :], decay)
        writers.append(jnp.where(row >= col, p, 0.0).astype(dtype))
    writers = jnp.concatenate(writers, axis=1)

    for c in chunks:
        own = slice(c * plan.heads, (c + 1) * plan.heads)
        before = state[...]
        if "states" in refs:
            refs["states"][0, c] = before
        kept = None if columns.from_start is None else columns.from_start[own]
        v = load_heads(plan, refs["v"], plan.value_dim, range(c, c + 1)).astype(jnp.float32)
        recalled = matmul(operands[own], before, "nn", dtype)
        error = v - times(recalled[:, : plan.chunk], kept)
        w = matmul(inverse[own], error, "nn", dtype)
        u = columns.beta[own] * w
        written = matmul(writers[own], u, "nn", dtype)
        after = written[:, : plan.key_dim]
        state[...] = after + times(before, None if kept is None else kept[:, -1:])
        if plan.has_q:
            out = times(recalled[:, plan.chunk :], kept) + written[:, plan.key_dim :]
            store_heads(plan, refs["out"], out * plan.scale, c)
        if "w" in refs:
            store_heads(plan, refs["w"], w, c)
            store_heads(plan, refs["inverse"], jnp.swapaxes(inverse[own], 1, 2), c)

    @pl.when(pl.program_id(2) == plan.grid[2] - 1)
    def _():
        refs["final"][0] = state[...]


def forward(plan: DeltaPlan, q, k, v, rows, initial, *, with_states: bool, with_residuals: bool):
    """Run the forward kernel.

    q, k [B, T, H K]; v [B, T, Hv V]; rows: `pack_scalars`; initial [B, Hv, K, V]. Returns a dict of
    out [B, T, Hv V] (with q), final [B, Hv, K, V], and if asked for states [B, T / C, Hv, K, V],
    w [B, T, Hv V] and inverse [B, T, Hv C], of which a head's chunk holds Y^T.
    """
    keys, values = plan.key_heads * plan.key_dim, plan.heads * plan.value_dim

    def in_order(t):
        return t

    by_token = functools.partial(column_spec, plan, order=in_order)
    inputs = {"k": (k, by_token(keys)), "v": (v, by_token(values))}
    if plan.has_q:
        inputs["q"] = (q, by_token(keys))
    inputs["rows"] = (rows, rows_spec(plan, plan.row_count, in_order))
    inputs["initial"] = (initial, state_spec(plan))

    batch, tokens = plan.batch, plan.tokens
    state = plan.value_heads, plan.key_dim, plan.value_dim
    outputs = {}
    if plan.has_q:
        outputs["out"] = (v.shape, v.dtype, by_token(values))
    outputs["final"] = ((batch, *state), jnp.float32, state_spec(plan))
    if with_states:
        shape = (batch, tokens // plan.chunk, *state)
        outputs["states"] = (shape, jnp.float32, states_spec(plan, in_order))
    if with_residuals:
        outputs["w"] = (v.shape, plan.dtype, by_token(values))
        shape = (batch, tokens, plan.value_heads * plan.chunk)
        outputs["inverse"] = (shape, plan.dtype, by_token(plan.heads * plan.chunk))
    scratch = {"state": pltpu.VMEM((plan.heads, plan.key_dim, plan.value_dim), jnp.float32)}
    return run(_forward_kernel, plan, "delta_rule_forward", inputs, outputs, scratch)


def run(kernel, plan: DeltaPlan, name: str, *arrays: dict) -> dict:
    """Call a kernel over the programs of a plan; inputs, outputs, scratch as `call_kernel` does."""
    kernel = functools.partial(kernel, plan)
    return tpu.call_kernel(kernel, name, plan.grid, *arrays, parallel=2, vmem=15 / 16)


def pack_scalars(plan: DeltaPlan, beta, log_decay, document) -> jax.Array:
    """Per-token numbers [B, Hv / G, R, T] float32; row i * G + h is field i of a program's head h.

    beta, log_decay: [B, T, Hv]; document: [B, T], counted up at every reset of the state.
    """
    batch, tokens, heads = beta.shape
    chunks = (batch, heads, tokens // plan.chunk, plan.chunk)

    def per_head(x):
        return jnp.swapaxes(x.astype(jnp.float32), 1, 2).reshape(chunks)

    found = {"beta": per_head(beta)}
    segment = None
    if log_decay is not None:
        found["log_decay"] = per_head(log_decay)
    if document is not None:
        count = document.reshape(batch, 1, -1, plan.chunk)
        before = jnp.pad(document[:, :-1], ((0, 0), (1, 0)), mode="edge")
        segment = count - before.reshape(count.shape)[..., :1]
        found["document"] = jnp.broadcast_to(segment, chunks).astype(jnp.float32)
    decays = border_decays(found.get("log_decay"), segment, chunks, axis=3)
    found["from_start"], found["to_end"] = decays
    rows = jnp.stack([found[name].reshape(batch, heads, tokens) for name in plan.fields], axis=2)
    rows = rows.reshape(batch, heads // plan.heads, plan.heads, len(plan.fields), tokens)
    rows = jnp.swapaxes(rows, 2, 3).reshape(batch, heads // plan.heads, -1, tokens)
    return pad_axes(rows, {2: (0, plan.row_count - rows.shape[2])})
