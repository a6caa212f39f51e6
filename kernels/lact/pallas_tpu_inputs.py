"""What attention and fast weights take of queries, keys and values, in one pass on TPUs.

Attention takes queries and keys under rope; fast weights take them scaled, through silu, with
unit length and then under rope, in heads of their own and in chunks, and values through silu.
Every array is read once and written once, where XLA makes a pass of each of these steps.
Everything is computed in float32.

Arrays of attention heads are [B, G, T, L], n heads of hd side by side in L = 128 numbers. Those of
fast-weight heads are [B, N, H, C, d], m = d / L groups side by side. Rope moves the halves of a
head along the lanes, through the matrix unit, which has nothing else to do; the sign of the half
that turns negative stands in the table of sines.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from refine_jax.kernels import tpu
from refine_jax.kernels.tpu import nn

_LANES, _SUBLANES = 128, 8
_BLOCK = 512  # most tokens of a grid step
_ROWS = 128  # tokens that are worked on at once
_EPS = 1e-5  # of the length


@dataclasses.dataclass(frozen=True)
class InputsPlan:
    """heads: H. chunk: C. head_dim: of an attention head. silu, silu_values, rope: what is done."""

    heads: int
    chunk: int
    head_dim: int
    silu: bool
    silu_values: bool
    rope: bool


def takes(group_size: int, groups: int, plan: InputsPlan, tokens: int) -> bool:
    """Whether the kernels take arrays [B, groups, tokens, group_size]."""
    whole = group_size == _LANES and groups % plan.heads == 0 and _LANES % plan.head_dim == 0
    return whole and plan.chunk % _LANES == 0 and tokens % plan.chunk == 0


def rope_tables(positions: jax.Array, theta: float, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and signed sines [B, T, 128] float32 of positions [B, T]."""
    half = head_dim // 2
    lane = jnp.arange(_LANES) % head_dim
    frequency = theta ** (-(lane % half).astype(jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.where(lane < half, -jnp.sin(angle), jnp.sin(angle))


def _turn_matrix(head_dim: int) -> np.ndarray:
    """[128, 128]: a row of numbers times it has the halves (a, b) of every head as (b, a)."""
    lane = np.arange(_LANES)
    return (lane[:, None] == lane ^ (head_dim // 2)).astype(np.float32)


def wide(parts: list[jax.Array]) -> list[jax.Array]:
    """Widen parts [T, L] each to float32."""
    return [x.astype(jnp.float32) for x in parts]


def _sigmoid(x):
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


class _Block:
    """A grid step: tokens of one fast-weight head."""

    def __init__(self, plan: InputsPlan, refs):
        self.plan, self.refs = plan, refs
        self.joined, self.tokens = self.refs["q"].shape[:2]

    def each_rows(self, function) -> None:
        """`function` of slices of _ROWS tokens."""
        rows = math.gcd(self.tokens, _ROWS)

        def step(i, carry):
            return function(pl.ds(pl.multiple_of(i * rows, rows), rows), carry)

        return functools.partial(lax.fori_loop, 0, self.tokens // rows, step)

    def load(self, name: str, rows) -> list[jax.Array]:
        """The m groups of an array of attention heads, [rows, L]."""
        return [self.refs[name][i, rows] for i in range(self.joined)]

    def load_chunk(self, name: str, rows) -> list[jax.Array]:
        """The m groups of an array of fast-weight heads."""
        ref = self.refs[name]
        return [ref[rows, self.lanes(i)] for i in range(self.joined)]

    def store(self, name: str, rows, parts) -> None:
        ref = self.refs[name]
        for i, x in enumerate(parts):
            ref[i, rows] = x.astype(ref.dtype)

    def store_chunk(self, name: str, rows, parts) -> None:
        ref = self.refs[name]
        for i, x in enumerate(parts):
            ref[rows, self.lanes(i)] = x.astype(ref.dtype)

    @staticmethod
    def lanes(i: int) -> slice:
        """Of the numbers of a fast-weight head, those of a group."""
        return slice(i * _LANES, (i + 1) * _LANES)

    def turn(self, parts, rows, sign: float = 1.0):
        """Rope on parts in the dtype of the arrays; with sign -1 its inverse, its transpose too."""
        cos, sin = self.refs["cos"][rows], sign * self.refs["sin"][rows]
        matrix = self.refs["turn"][...]
        return [x.astype(jnp.float32) * cos + nn(x, matrix) * sin for x in parts]

    def scaled(self, x, column: int):
        """The groups of queries (column 0) or keys (1) scaled: [rows, L] each."""
        scale, offset = (self.refs["scales"][2 * column + i : 2 * column + i + 1] for i in (0, 1))
        return [y * scale[:, self.lanes(i)] + offset[:, self.lanes(i)] for i, y in enumerate(x)]

    def length(self, parts):
        """[rows, 1]: of the vectors that the groups are together."""
        return jnp.sqrt(jnp.sum(sum(x * x for x in parts), 1, keepdims=True))


def _forward_kernel(plan: InputsPlan, **refs):
    block = _Block(plan, refs)

    def step(rows, carry):
        for column, name in enumerate("qk"):
            x = block.load(name, rows)
            block.store(f"{name}_out", rows, block.turn(x, rows))
            y = block.scaled(wide(x), column)
            if plan.silu:
                y = [z * _sigmoid(z) for z in y]
            inverse = 1.0 / (block.length(y) + _EPS)
            y = [(z * inverse).astype(x[0].dtype) for z in y]
            block.store_chunk(f"{name}_fast", rows, block.turn(y, rows) if plan.rope else y)
        v = wide(block.load("v", rows))
        block.store_chunk("v_fast", rows, [x * _sigmoid(x) for x in v] if plan.silu_values else v)
        return carry

    block.each_rows(step)(0)


def _backward_kernel(plan: InputsPlan, **refs):
    block = _Block(plan, refs)

    def step(rows, sums):
        found = []
        for column, name in enumerate("qk"):
            x = wide(block.load(name, rows))
            z = block.scaled(x, column)
            sigmoid = [_sigmoid(y) for y in z]
            y = [a * b for a, b in zip(z, sigmoid, strict=True)] if plan.silu else z
            dy = block.load_chunk(f"d_{name}_fast", rows)
            dy = block.turn(dy, rows, -1.0) if plan.rope else wide(dy)
            length = block.length(y)
            inverse = 1.0 / (length + _EPS)
            along = sum(a * b for a, b in zip(y, dy, strict=True))
            along = jnp.sum(along, 1, keepdims=True) * inverse * inverse
            along = jnp.where(length > 0, along / jnp.where(length > 0, length, 1.0), 0.0)
            dz = [inverse * a - along * b for a, b in zip(dy, y, strict=True)]
            if plan.silu:
                slopes = [s * (1 + a * (1 - s)) for a, s in zip(z, sigmoid, strict=True)]
                dz = [a * b for a, b in zip(dz, slopes, strict=True)]
            scale = block.refs["scales"][2 * column : 2 * column + 1]
            dx = block.turn(block.load(f"d_{name}_out", rows), rows, -1.0)
            dx = [
                a + b * scale[:, block.lanes(i)]
                for i, (a, b) in enumerate(zip(dx, dz, strict=True))
            ]
            block.store(f"d_{name}", rows, dx)
            for parts in ([a * b for a, b in zip(dz, x, strict=True)], dz):
                whole = jnp.concatenate(parts, axis=1)
                found.append(jnp.sum(whole.reshape(-1, _SUBLANES, whole.shape[1]), 0))
        v, dv = wide(block.load("v", rows)), wide(block.load_chunk("d_v_fast", rows))
        if plan.silu_values:
            sigmoid = [_sigmoid(x) for x in v]
            slopes = [s * (1 + a * (1 - s)) for a, s in zip(v, sigmoid, strict=True)]
            dv = [a * b for a, b in zip(dv, slopes, strict=True)]
        others = wide(block.load("d_v_out", rows))
        block.store("d_v", rows, [a + b for a, b in zip(dv, others, strict=True)])
        return [a + b for a, b in zip(sums, found, strict=True)]

    zero = jnp.zeros((_SUBLANES, block.joined * _LANES), jnp.float32)
    sums = block.each_rows(step)([zero] * 4)
    block.refs["d_scales"][...] = jnp.concatenate([jnp.sum(x, 0, keepdims=True) for x in sums])


def _call(plan: InputsPlan, kernel, name: str, q, groups, chunks, scales, tables, outputs):
    """`pallas_call` over rows, blocks of tokens and fast-weight heads.

    groups, chunks: {name: array} of both layouts. outputs: names by kind.
    """
    batch, _, tokens, size = q.shape
    joined, block = q.shape[1] // plan.heads, math.gcd(plan.chunk, _BLOCK)
    per_chunk, steps = plan.chunk // block, tokens // block
    width = joined * size
    by_group = pl.BlockSpec((None, joined, block, size), lambda b, t, h: (b, h, t, 0))
    by_chunk = pl.BlockSpec(
        (None, None, None, block, width), lambda b, t, h: (b, t // per_chunk, h, t % per_chunk, 0)
    )
    turn = jnp.asarray(_turn_matrix(plan.head_dim), q.dtype)
    shared = tables[0].shape[0] == 1
    table = pl.BlockSpec((None, block, size), lambda b, t, h: (0 if shared else b, t, 0))
    inputs = {name: (x, by_group) for name, x in groups.items()}
    inputs |= {name: (x, by_chunk) for name, x in chunks.items()}
    inputs["turn"] = turn, pl.BlockSpec((size, size), lambda b, t, h: (0, 0))
    inputs["scales"] = scales, pl.BlockSpec((None, 4, width), lambda b, t, h: (h, 0, 0))
    inputs |= {name: (x, table) for name, x in zip(("cos", "sin"), tables, strict=True)}
    slots = batch, tokens // plan.chunk, plan.heads, plan.chunk, width
    kinds = {
        "groups": (q.shape, q.dtype, by_group),
        "chunks": (slots, q.dtype, by_chunk),
        "scales": (
            (batch, steps, plan.heads, 4, width),
            jnp.float32,
            pl.BlockSpec((None, None, None, 4, width), lambda b, t, h: (b, t, h, 0, 0)),
        ),
    }
    found = {name: kinds[kind] for kind, names in outputs.items() for name in names}
    grid = batch, steps, plan.heads
    return tpu.call_kernel(functools.partial(kernel, plan), name, grid, inputs, found, parallel=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lact_inputs(
    plan: InputsPlan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scales: jax.Array,
    tables: tuple[jax.Array, jax.Array],
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Queries, keys and values of attention [B, G, T, L], and of fast weights [B, N, H, C, d].

    q, k, v: [B, G, T, L]. scales: [H, 4, d] float32, scale and offset of queries and of keys.
    tables: `rope_tables`, of all rows or of one for all. Attention's values are v: passed through,
    so that the gradients of both uses are added here.
    """
    groups = {"q": q, "k": k, "v": v}
    outputs = {"groups": ("q_out", "k_out"), "chunks": ("q_fast", "k_fast", "v_fast")}
    name = "lact_inputs_forward"
    found = _call(plan, _forward_kernel, name, q, groups, {}, scales, tables, outputs)
    return (found["q_out"], found["k_out"], v), tuple(found[f"{x}_fast"] for x in "qkv")


def _inputs_forward(plan, q, k, v, scales, tables):
    return lact_inputs(plan, q, k, v, scales, tables), (q, k, v, scales, tables)


def _inputs_backward(plan, residuals, cotangents):
    q, k, v, scales, tables = residuals
    of_attention, of_fast = cotangents
    groups = {"q": q, "k": k, "v": v}
    groups |= {f"d_{name}_out": x for name, x in zip("qkv", of_attention, strict=True)}
    chunks = {f"d_{name}_fast": x for name, x in zip("qkv", of_fast, strict=True)}
    outputs = {"groups": ("d_q", "d_k", "d_v"), "scales": ("d_scales",)}
    name = "lact_inputs_backward"
    found = _call(plan, _backward_kernel, name, q, groups, chunks, scales, tables, outputs)
    return found["d_q"], found["d_k"], found["d_v"], found["d_scales"].sum((0, 1)), None


lact_inputs.defvjp(_inputs_forward, _inputs_backward)
