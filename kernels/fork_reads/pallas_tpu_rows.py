"""Attention of the queries of forks to whole rows, with its gradient, as Pallas kernels for TPUs.

Forks have few queries, and each sees a part of its row. Blocks of the row's keys and values pass by
once; the queries of all forks wait in vector memory, and each meets the blocks that one of its
neighbours sees. Backward, the gradients of a block of keys and values are complete when all queries
have met it, and are written once.

Scores are kept transposed, [keys, queries]: what belongs to a query, such as its maximum, is then a
row that broadcasts along sublanes, and sums over keys are sums of registers. The operands of
products have the dtype of the row, everything else is float32.

B rows, G groups of L numbers, T tokens of a row, J blocks of M queries, which begin near each
other.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refine_jax.kernels import tpu
from refine_jax.kernels.device import backend
from refine_jax.kernels.fork_reads.reference import Reach
from refine_jax.kernels.numerics import pad_axes
from refine_jax.kernels.tpu import nn, nt, tn

_LANES = 128
_BLOCK = 512  # most keys of a block
_TOGETHER = 6  # most groups that are worked on at once: the products of one hide another's sums
_MASKED = -1e30  # finite: the difference of two of them must not be NaN


def takes_row(queries: tuple[int, ...], keys: tuple[int, ...]) -> bool:
    """Whether the kernels take queries [J, B, G, M, L] and keys [B, G, T, L] on this device."""
    blocks, *_, count, size = queries
    if backend() != "tpu" or keys[-1] % _LANES or keys[-2] % _LANES:
        return False
    # Of all queries: themselves, what they find and its cotangent, float32.
    groups = _groups_together(keys[1])
    held = 3 * 4 * blocks * groups * (count + -count % _LANES) * size
    return held <= tpu.vmem_bytes() // 4


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_row_tpu(q, k, v, reach: Reach, scale: float, window: int):
    """Run `attend_row` of api.py; on a CPU in interpret mode, for tests."""
    del window
    return _forward(q.astype(k.dtype), k, v, reach, scale)


def _attend_row_forward(q, k, v, reach, scale, window):
    found = attend_row_tpu(q, k, v, reach, scale, window)
    return found, (q, k, v, reach, *found)


def _attend_row_backward(scale, window, residuals, cotangents):
    del window
    q, k, v, reach, out, log_total = residuals
    d_out, d_log = cotangents
    rest = jnp.sum(d_out * out, -1) - d_log
    dq, dk, dv = _backward(q.astype(k.dtype), k, v, reach, scale, log_total, d_out, rest)
    return dq.astype(q.dtype), dk, dv, None


attend_row_tpu.defvjp(_attend_row_forward, _attend_row_backward)


def _forward(q, k, v, reach: Reach, scale: float) -> tuple[jax.Array, jax.Array]:
    """Output [J, B, G, M, L] and log of the denominator [J, B, G, M], float32."""
    call = _Call.of(q, k, scale)
    found = call.run(
        "fork_attention_forward",
        _forward_kernel,
        {"q": call.queries(q), "k": call.keys(k), "v": call.keys(v)},
        {"out": call.per_query(call.size), "log_total": call.per_query(1)},
        {"acc": call.kept(call.size), "top": call.kept(1), "total": call.kept(1)},
        reach,
    )
    return call.transposed(found["out"]), call.transposed(found["log_total"])[..., 0]


def _backward(q, k, v, reach: Reach, scale: float, log_total, d_out, rest):
    """Gradients with respect to q (float32), k and v.

    log_total: as `_forward` returns it. d_out: cotangent of its output. rest: [J, B, G, M] float32,
    the inner product of output and d_out less the cotangent of log_total.
    """
    call = _Call.of(q, k, scale)

    def row(x):
        return call.queries(x[..., None].astype(jnp.float32), rows=True)

    tokens = pltpu.VMEM((call.together, call.block, call.size), jnp.float32)
    found = call.run(
        "fork_attention_backward",
        _backward_kernel,
        {
            "q": call.queries(q),
            "d_out": call.queries(d_out.astype(v.dtype)),
            "log_total": row(log_total),
            "rest": row(rest),
            "k": call.keys(k),
            "v": call.keys(v),
        },
        {"dq": call.per_query(call.size), "dk": call.like_keys(k), "dv": call.like_keys(v)},
        {"acc": call.kept(call.size), "acc_k": tokens, "acc_v": tokens},
        reach,
    )
    return call.transposed(found["dq"]), found["dk"], found["dv"]


def _groups_together(groups: int) -> int:
    return max(n for n in range(1, _TOGETHER + 1) if groups % n == 0)


@dataclasses.dataclass(frozen=True)
class _Call:
    """Sizes of a call: a grid of (B, G / groups together, T / keys of a block, J)."""

    blocks: int
    rows: int
    groups: int
    count: int
    padded: int
    size: int
    tokens: int
    block: int
    together: int
    scale: float

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, scale: float) -> _Call:
        blocks, rows, groups, count, size = q.shape
        tokens = k.shape[2]
        return cls(
            blocks=blocks,
            rows=rows,
            groups=groups,
            count=count,
            padded=count + -count % _LANES,
            size=size,
            tokens=tokens,
            block=math.gcd(tokens, _BLOCK),
            together=_groups_together(groups),
            scale=scale,
        )

    def queries(self, x: jax.Array, *, rows: bool = False):
        """[J, B, G, M, n] with its blocks: of one j; rows: transposed, [J, B, G, n, M]."""
        x = pad_axes(x, {3: (0, self.padded - self.count)})
        x = jnp.swapaxes(x, 3, 4) if rows else x
        block = (None, None, self.together, *x.shape[3:])
        return x, pl.BlockSpec(block, lambda b, g, t, j, needed: (j, b, g, 0, 0))

    def keys(self, x: jax.Array):
        """[B, G, T, L] with its blocks."""
        block = (None, self.together, self.block, x.shape[3])
        return x, pl.BlockSpec(block, lambda b, g, t, j, needed: (b, g, t, 0))

    def like_keys(self, x: jax.Array):
        """A result of the shape of keys [B, G, T, L], with its blocks."""
        return x.shape, x.dtype, self.keys(x)[1]

    def per_query(self, size: int):
        """A float32 result [J, B, G, size, M], with its blocks, each complete at the last keys."""
        last = self.tokens // self.block - 1
        shape = (self.blocks, self.rows, self.groups, size, self.padded)

        def index(b, g, t, j, needed):
            return jnp.where(t == last, j, 0), b, g, 0, 0

        block = (None, None, self.together, size, self.padded)
        return shape, jnp.float32, pl.BlockSpec(block, index)

    def kept(self, size: int):
        """Room for a float32 array [size, M] of each j and group."""
        return pltpu.VMEM((self.blocks, self.together, size, self.padded), jnp.float32)

    def transposed(self, x: jax.Array) -> jax.Array:
        """A result [J, B, G, n, M], padded, as [J, B, G, M, n]."""
        return jnp.swapaxes(x[..., : self.count], 3, 4)

    def run(self, name, kernel, inputs, outputs, scratch, reach: Reach) -> dict[str, jax.Array]:
        """Call the kernel with the reach of queries, and which j need which block of keys."""
        more = ((0, 0), (0, 0), (0, self.padded - self.count))
        first = jnp.pad(reach.first, more, constant_values=1)
        last = jnp.pad(reach.last, more)
        spec = pl.BlockSpec((None, None, 2, self.padded), lambda b, g, t, j, needed: (j, b, 0, 0))
        start = jnp.arange(0, self.tokens, self.block)[:, None, None, None]
        seen = (first <= last) & (first < start + self.block) & (last >= start)
        return tpu.call_kernel(
            functools.partial(kernel, self),
            name,
            (self.rows, self.groups // self.together, self.tokens // self.block, self.blocks),
            {"reach": (jnp.stack([first, last], axis=2), spec), **inputs},
            outputs,
            scratch,
            scalars={"needed": seen.any(-1).swapaxes(1, 2).astype(jnp.int32)},  # [T / block, B, J]
            parallel=2,
        )

    def places(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Numbers of the step's row, block of keys and block of queries."""
        return pl.program_id(0), pl.program_id(2), pl.program_id(3)

    def visible(self, reach, number) -> jax.Array:
        """Which keys of block `number` queries see, [keys, M] bool."""
        slot = jax.lax.broadcasted_iota(jnp.int32, (self.block, self.padded), 0)
        slot += number * self.block
        return (slot >= reach[:1]) & (slot <= reach[1:])


def _forward_kernel(call: _Call, needed, reach, q, k, v, out, log_total, acc, top, total):
    row, number, j = call.places()
    groups = range(call.together)

    @pl.when(number == 0)
    def _begin():
        acc[j] = jnp.zeros(acc.shape[1:], jnp.float32)
        top[j] = jnp.full(top.shape[1:], _MASKED)
        total[j] = jnp.zeros(total.shape[1:], jnp.float32)

    @pl.when(needed[number, row, j] == 1)
    def _meet():
        visible = call.visible(reach, number)
        scores = [nt(k[g], q[g]) * call.scale for g in groups]
        scores = [jnp.where(visible, x, _MASKED) for x in scores]
        new_top = [
            jnp.maximum(top[j, g], jnp.max(x, 0, keepdims=True))
            for g, x in zip(groups, scores, strict=True)
        ]
        weights = [
            jnp.where(visible, jnp.exp(x - y), 0.0) for x, y in zip(scores, new_top, strict=True)
        ]
        found = [tn(v[g], x.astype(v.dtype)) for g, x in zip(groups, weights, strict=True)]
        for g in groups:
            decay = jnp.exp(top[j, g] - new_top[g])
            top[j, g] = new_top[g]
            total[j, g] = decay * total[j, g] + jnp.sum(weights[g], 0, keepdims=True)
            acc[j, g] = decay * acc[j, g] + found[g]

    @pl.when(number == pl.num_programs(2) - 1)
    def _end():
        for g in groups:
            denominator = jnp.maximum(total[j, g], 1e-30)
            out[g] = acc[j, g] / denominator
            log_total[g] = top[j, g] + jnp.log(denominator)


def _backward_kernel(
    call: _Call, needed, reach, q, d_out, log_total, rest, k, v, dq, dk, dv, acc, acc_k, acc_v
):
    row, number, j = call.places()
    groups = range(call.together)

    @pl.when(number == 0)
    def _begin():
        acc[j] = jnp.zeros(acc.shape[1:], jnp.float32)

    @pl.when(j == 0)
    def _begin_keys():
        acc_k[...] = jnp.zeros(acc_k.shape, jnp.float32)
        acc_v[...] = jnp.zeros(acc_v.shape, jnp.float32)

    @pl.when(needed[number, row, j] == 1)
    def _meet():
        visible = call.visible(reach, number)
        scores = [nt(k[g], q[g]) * call.scale for g in groups]
        d_weights = [nt(v[g], d_out[g]) for g in groups]
        weights = [
            jnp.where(visible, jnp.exp(x - log_total[g]), 0.0)
            for g, x in zip(groups, scores, strict=True)
        ]
        d_scores = [
            (call.scale * weights[g] * (d_weights[g] - rest[g])).astype(k.dtype) for g in groups
        ]
        for g in groups:
            acc_v[g] += nn(weights[g].astype(v.dtype), d_out[g])
            acc_k[g] += nn(d_scores[g], q[g])
            acc[j, g] += tn(k[g], d_scores[g])

    @pl.when(j == pl.num_programs(3) - 1)
    def _end_keys():
        dk[...] = acc_k[...].astype(dk.dtype)
        dv[...] = acc_v[...].astype(dv.dtype)

    @pl.when(number == pl.num_programs(2) - 1)
    def _end():
        for g in groups:
            dq[g] = acc[j, g]
