"""Window attention as Pallas kernels for TPUs: one pass forward, one pass backward.

Query i sees the keys i - W + 1 ... i of its own document. Arrays hold n heads side by side,
[B, G, T, L] with L = n hd. Tokens are walked in blocks of b. A block of queries reaches as many
blocks of keys before it as the window is long, so that what both passes work with is the last
r = ceil((W - 1) / b) + 1 blocks: these stay in vector memory as a ring, and every block is read
from HBM once. A row may stand behind a past: whole blocks of keys and values before its first
token.

Scores are kept transposed, [keys, queries]. What belongs to a query (its maximum, its sum, its
inner product with the cotangent) is then a row that broadcasts along sublanes, sums over keys are
sums of registers, and products whose results are as wide as one head, `V^T P` and `K^T dS`, give
the matrix unit hd rows instead of L. Of the products with hd as depth, `K Q^T` and `V dO^T`, the
unit's columns beyond hd idle; the queries of a group's heads stand above each other, each zero
outside its own head, so that a group's keys meet all of them in one product.

The backward pass goes through the blocks of keys. It computes the probabilities of r blocks of
queries again, in their order, and adds to the gradients of the block of keys, and to those of the
queries in the ring, of which the oldest is then complete: five products for each pair of blocks.

The operands of products have the dtype of the arrays, everything else is float32.
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
from refine_jax.kernels.numerics import pad_axes
from refine_jax.kernels.tpu import nn, nt
from refine_jax.kernels.window_attention.xla import behind

_LANES = 128
_BLOCK = 1024  # most tokens of a block: of 256, 512 and 1024 the fastest, by static estimates
_PART = 128  # queries that are worked on at once: their scores with a block stay in registers
_AHEAD = 8  # products of scores that are under way while a softmax is made
_MASKED = -1e30  # finite: the difference of two of them must not be NaN
_LOG2_E = math.log2(math.e)  # the vector unit's own power is that of 2


def takes(group_size: int, heads: int) -> bool:
    """Whether the kernels take groups of `group_size` numbers that hold so many heads."""
    return group_size % _LANES == 0 and group_size // heads % 32 == 0


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes: n heads in a group of L numbers, blocks of b tokens, past and own ones of a row."""

    heads: int
    size: int
    block: int
    window: int
    past: int
    own: int
    by_document: bool

    @property
    def ring(self) -> int:
        """r: the blocks of keys that a block of queries reaches."""
        return -(-(self.window - 1) // self.block) + 1

    @property
    def blocks(self) -> int:
        """Blocks of keys."""
        return self.past + self.own

    @property
    def scale(self) -> float:
        """Of scores."""
        return (self.size // self.heads) ** -0.5

    @property
    def power(self) -> float:
        """Of scores as powers of two."""
        return self.scale * _LOG2_E

    def operations(self, products: int) -> int:
        """Of one group of a row, in so many products of all queries with what they reach."""
        pairs = self.own * self.block * self.ring * self.block
        return 2 * products * self.heads * self.size * pairs

    def of_head(self, head: int) -> slice:
        """The numbers of a head within its group."""
        width = self.size // self.heads
        return slice(head * width, (head + 1) * width)

    @property
    def part(self) -> int:
        """Queries of a part: what is computed for them at once stays in registers."""
        return math.gcd(self.block, _PART)

    def parts(self) -> list[tuple[slice, slice]]:
        """Parts of a block of queries, and where their heads' queries stand in `apart`."""
        size = self.part
        return [
            (slice(i, i + size), slice(self.heads * i, self.heads * (i + size)))
            for i in range(0, self.block, size)
        ]

    def each(self) -> list[tuple[int, slice, slice]]:
        """Parts head by head: the head, its part, and where its queries stand in `apart`."""
        return [
            (head, part, slice(start, start + self.part))
            for part, stacked in self.parts()
            for head, start in enumerate(range(stacked.start, stacked.stop, self.part))
        ]

    def apart(self, x: jax.Array) -> jax.Array:
        """[b, L] to [n b, L]: the heads of each part above each other, each beside zeros."""
        if self.heads == 1:
            return x
        lane = jax.lax.broadcasted_iota(jnp.int32, (self.part, self.size), 1)
        lane = lane // (self.size // self.heads)
        parts = [x[part] for part, _ in self.parts()]
        return jnp.concatenate(
            [jnp.where(lane == i, y, 0) for y in parts for i in range(self.heads)]
        )

    def reach(self, back: int, part: slice) -> slice | None:
        """Of the keys `back` blocks before, those that a part of the queries may see."""
        newest = back * self.block + part.stop - 1  # the furthest key's place is `newest - W`
        first = max(newest - (part.stop - 1 - part.start) - self.window + 1, 0)
        first, last = first // _LANES * _LANES, min(-(-(newest + 1) // _LANES) * _LANES, self.block)
        return slice(first, last) if first < last else None

    def seen(self, back: int, part: slice, keys: slice) -> jax.Array | None:
        """Which queries of a part see which keys `back` blocks before; None where all do."""
        nearest = back * self.block + part.start - (keys.stop - 1)
        furthest = back * self.block + part.stop - 1 - keys.start
        if nearest >= 0 and furthest < self.window:
            return None
        shape = keys.stop - keys.start, part.stop - part.start
        query, key = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 0))
        distance = back * self.block + part.start - keys.start + query - key
        seen = distance >= 0 if nearest < 0 else None
        if furthest >= self.window:
            near = distance < self.window
            seen = near if seen is None else seen & near
        return seen


def _side_by_side(x: jax.Array, count: int) -> jax.Array:
    """[..., b] to [..., count b]."""
    return jnp.concatenate([x] * count, axis=1)


def _and(*conditions):
    """Those that are not None, together."""
    given = [x for x in conditions if x is not None]
    return functools.reduce(jnp.logical_and, given) if given else None


def _forward_kernel(plan: _Plan, **refs):
    step = pl.program_id(2)
    slot = jax.lax.rem(step, plan.ring)
    refs["keys"][slot] = refs["k"][...]
    refs["values_t"][slot] = refs["v"][...].T
    if plan.by_document:
        refs["key_ids"][slot] = jnp.broadcast_to(refs["ids"][...], (_LANES, plan.block)).T

    def tile(back: int):
        """All heads of a group attend to the block of keys `back` blocks before their own."""
        there = jax.lax.rem(step - back + plan.ring, plan.ring)
        work = [(*x, plan.reach(back, x[1])) for x in plan.each()]
        work = [x for x in work if x[-1] is not None]

        def score(head, part, here, keys):
            return nt(refs["keys"][there, keys], refs["queries"][here])

        ahead = [score(*x) for x in work[:_AHEAD]]
        for i, (head, part, here, keys) in enumerate(work):
            if i + _AHEAD < len(work):
                ahead.append(score(*work[i + _AHEAD]))
            scores = ahead.pop(0)
            same = None
            if plan.by_document:
                same = refs["key_ids"][there, keys, :1] == refs["ids"][:, part]
            seen = _and(plan.seen(back, part, keys), same)
            if seen is not None:
                scores = jnp.where(seen, scores, _MASKED)
            top = jnp.max(scores, 0, keepdims=True)
            if back > 0:
                old = refs["top"][:, here]
                top = jnp.maximum(old, top)
                decay = jnp.exp2((old - top) * plan.power)
            refs["top"][:, here] = top
            weights = jnp.exp2((scores - top) * plan.power)
            total = jnp.sum(weights, 0, keepdims=True)
            refs["total"][:, here] = total if back == 0 else refs["total"][:, here] * decay + total
            rows = plan.of_head(head)
            out = nn(refs["values_t"][there, rows, keys], weights.astype(refs["k"].dtype))
            refs["sum"][rows, part] = out if back == 0 else refs["sum"][rows, part] * decay + out

    @pl.when(step >= plan.past)
    def _attend():
        refs["queries"][...] = plan.apart(refs["q"][...])
        for back in range(plan.ring):
            if back <= plan.past:
                tile(back)
            else:
                pl.when(step >= back)(functools.partial(tile, back))
        for head, part, here in plan.each():
            total, rows = refs["total"][:, here], plan.of_head(head)
            refs["sum"][rows, part] = refs["sum"][rows, part] / total
            log_total = refs["top"][:, here] * plan.power + jnp.log2(total)
            refs["log_total"][head : head + 1, part] = log_total
        refs["out"][...] = refs["sum"][...].T.astype(refs["out"].dtype)


def _backward_kernel(plan: _Plan, **refs):
    step = pl.program_id(2)
    slot = jax.lax.rem(step, plan.ring)
    first = step - (plan.ring - 1)  # the block of keys
    dtype = refs["q"].dtype

    @pl.when((step >= plan.past) & (step < plan.blocks))
    def _new_queries():
        refs["queries"][slot] = plan.apart(refs["q"][...])
        d_out = refs["d_out"][...]
        refs["d_outs"][slot] = plan.apart(d_out)
        product = (d_out.astype(jnp.float32) * refs["out"][...].astype(jnp.float32)).T
        for head, part, here in plan.each():
            inner = jnp.sum(product[plan.of_head(head), part], 0, keepdims=True)
            refs["inner"][slot, :, here] = inner
            refs["log_totals"][slot, :, here] = refs["log_total"][head : head + 1, part]
        refs["dq_sum"][slot] = jnp.zeros_like(refs["dq_sum"][slot])

    if plan.by_document:

        @pl.when(step < plan.blocks)
        def _new_ids():
            refs["query_ids"][slot] = refs["ids"][...]

    def tile(ahead: int):
        """What the queries `ahead` blocks behind the keys add to all gradients."""
        there = jax.lax.rem(first + ahead, plan.ring)
        for part, here in plan.parts():
            keys = plan.reach(ahead, part)
            if keys is None:
                continue
            queries, d_outs = refs["queries"][there, here], refs["d_outs"][there, here]
            same = None
            if plan.by_document:
                same = refs["key_ids"][keys, :1] == refs["query_ids"][there, :, part]
            seen = _and(plan.seen(ahead, part, keys), same)
            scores = nt(refs["k"][keys], queries)
            weights = jnp.exp2(scores * plan.power - refs["log_totals"][there, :, here])
            if seen is not None:
                weights = jnp.where(_side_by_side(seen, plan.heads), weights, 0.0)
            d_scores = weights * (nt(refs["v"][keys], d_outs) - refs["inner"][there, :, here])
            weights, d_scores = weights.astype(dtype), d_scores.astype(dtype)
            refs["dv_sum"][keys] += nn(weights, d_outs)
            refs["dk_sum"][keys] += nn(d_scores, queries)
            for head in range(plan.heads):
                rows, columns = plan.of_head(head), slice(head * plan.part, (head + 1) * plan.part)
                dq = nn(refs["keys_t"][rows, keys], d_scores[:, columns])
                refs["dq_sum"][there, rows, part] += dq

    @pl.when(first >= 0)
    def _gradients():
        refs["keys_t"][...] = refs["k"][...].T
        if plan.by_document:
            ids = refs["query_ids"][jax.lax.rem(first, plan.ring)]
            refs["key_ids"][...] = jnp.broadcast_to(ids, (_LANES, plan.block)).T
        refs["dk_sum"][...] = jnp.zeros_like(refs["dk_sum"])
        refs["dv_sum"][...] = jnp.zeros_like(refs["dv_sum"])
        for ahead in range(plan.ring):
            there = first + ahead
            inside = (there >= plan.past) & (there < plan.blocks)
            pl.when(inside)(functools.partial(tile, ahead))
        refs["dk"][...] = (refs["dk_sum"][...] * plan.scale).astype(dtype)
        refs["dv"][...] = refs["dv_sum"][...].astype(dtype)

    @pl.when(first >= plan.past)
    def _oldest_queries():
        dq = refs["dq_sum"][jax.lax.rem(first, plan.ring)]
        refs["dq"][...] = (dq * plan.scale).T.astype(dtype)


def _token_spec(plan: _Plan, place) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, plan.block, plan.size), lambda b, g, s: (b, g, place(s), 0))


def _row_spec(plan: _Plan, place) -> pl.BlockSpec:
    """Of [B, G, n, T]."""
    return pl.BlockSpec((None, None, plan.heads, plan.block), lambda b, g, s: (b, g, 0, place(s)))


def _id_spec(plan: _Plan, place) -> pl.BlockSpec:
    return pl.BlockSpec((None, 1, plan.block), lambda b, g, s: (b, 0, place(s)))


def _forward(plan: _Plan, q, k, v, ids):
    """Out [B, G, T, L] and the logarithms of the sums of powers of two, [B, G, n, T] float32."""

    def own(step):
        return jnp.maximum(step - plan.past, 0)

    tokens, keys = _token_spec(plan, own), _token_spec(plan, lambda s: s)
    inputs = {"q": (q, tokens), "k": (k, keys), "v": (v, keys)}
    queries = plan.heads * plan.block
    scratch = {
        "keys": pltpu.VMEM((plan.ring, plan.block, plan.size), k.dtype),
        "values_t": pltpu.VMEM((plan.ring, plan.size, plan.block), k.dtype),
        "queries": pltpu.VMEM((queries, plan.size), q.dtype),
        "top": pltpu.VMEM((1, queries), jnp.float32),
        "total": pltpu.VMEM((1, queries), jnp.float32),
        "sum": pltpu.VMEM((plan.size, plan.block), jnp.float32),
    }
    if plan.by_document:
        inputs["ids"] = ids, _id_spec(plan, lambda s: s)
        scratch["key_ids"] = pltpu.VMEM((plan.ring, plan.block, _LANES), jnp.float32)
    rows = (*q.shape[:2], plan.heads, q.shape[2])
    outputs = {
        "out": (q.shape, q.dtype, tokens),
        "log_total": (rows, jnp.float32, _row_spec(plan, own)),
    }
    results = tpu.call_kernel(
        functools.partial(_forward_kernel, plan),
        "window_attention_forward",
        (*q.shape[:2], plan.blocks),
        inputs,
        outputs,
        scratch,
        parallel=2,
        operations=math.prod(q.shape[:2]) * plan.operations(2),
    )
    return results["out"], results["log_total"]


def _backward(plan: _Plan, q, k, v, ids, out, log_total, d_out):
    """Gradients of q, k, v."""

    def own(step):
        return jnp.clip(step - plan.past, 0, plan.own - 1)

    def newest(step):
        return jnp.minimum(step, plan.blocks - 1)

    def oldest(step):
        return jnp.maximum(step - (plan.ring - 1), 0)

    def oldest_own(step):
        return jnp.maximum(step - (plan.ring - 1) - plan.past, 0)

    tokens, keys = _token_spec(plan, own), _token_spec(plan, oldest)
    inputs = {
        "q": (q, tokens),
        "k": (k, keys),
        "v": (v, keys),
        "d_out": (d_out, tokens),
        "out": (out, tokens),
        "log_total": (log_total, _row_spec(plan, own)),
    }
    queries = plan.heads * plan.block
    scratch = {
        "queries": pltpu.VMEM((plan.ring, queries, plan.size), q.dtype),
        "d_outs": pltpu.VMEM((plan.ring, queries, plan.size), q.dtype),
        "inner": pltpu.VMEM((plan.ring, 1, queries), jnp.float32),
        "log_totals": pltpu.VMEM((plan.ring, 1, queries), jnp.float32),
        "dq_sum": pltpu.VMEM((plan.ring, plan.size, plan.block), jnp.float32),
        "dk_sum": pltpu.VMEM((plan.block, plan.size), jnp.float32),
        "dv_sum": pltpu.VMEM((plan.block, plan.size), jnp.float32),
        "keys_t": pltpu.VMEM((plan.size, plan.block), q.dtype),
    }
    if plan.by_document:
        inputs["ids"] = ids, _id_spec(plan, newest)
        scratch["query_ids"] = pltpu.VMEM((plan.ring, 1, plan.block), jnp.float32)
        scratch["key_ids"] = pltpu.VMEM((plan.block, _LANES), jnp.float32)
    outputs = {
        "dq": (q.shape, q.dtype, _token_spec(plan, oldest_own)),
        "dk": (k.shape, k.dtype, keys),
        "dv": (v.shape, v.dtype, keys),
    }
    results = tpu.call_kernel(
        functools.partial(_backward_kernel, plan),
        "window_attention_backward",
        (*q.shape[:2], plan.blocks + plan.ring - 1),
        inputs,
        outputs,
        scratch,
        parallel=2,
        operations=math.prod(q.shape[:2]) * plan.operations(5),
    )
    return results["dq"], results["dk"], results["dv"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, q, k, v, ids):
    return _forward(plan, q, k, v, ids)[0]


def _attend_forward(plan, q, k, v, ids):
    out, log_total = _forward(plan, q, k, v, ids)
    return out, (q, k, v, ids, out, log_total)


def _attend_backward(plan, residuals, d_out):
    q, k, v, ids, out, log_total = residuals
    return *_backward(plan, q, k, v, ids, out, log_total, d_out.astype(q.dtype)), None


_attend.defvjp(_attend_forward, _attend_backward)


def window_attention_tpu(q, k, v, ids, past, window: int, heads: int) -> jax.Array:
    """`window_attention` of api.py; on a CPU in interpret mode, for tests.

    q, k, v: [B, G, T, L] in one dtype, `heads` heads in a group. ids: [B, T] int32, of a token's
    document, 0 at padding; None: one document. past: keys and values [B, G, W - 1, L] and ids
    [B, W - 1] of the tokens before the first; ids must be given then.
    Returns [B, G, T, L], 0 at padding.
    """
    num_tokens = q.shape[2]
    block = min(_BLOCK, *(-(-size // _LANES) * _LANES for size in (window, num_tokens)))
    before = 0 if past is None else -(-(window - 1) // block)
    after = -num_tokens % block
    key_ids = ids
    if past is not None:
        k, v, key_ids = (behind(a, b) for a, b in zip(past, (k, v, ids), strict=True))
    front = before * block - (0 if past is None else window - 1)
    q = pad_axes(q, {2: (0, after)})
    k, v = (pad_axes(x, {2: (front, after)}) for x in (k, v))
    if key_ids is not None:
        # Padding, id 0, sees padding: nothing is left without a key. Its output is then dropped.
        key_ids = pad_axes(key_ids, {1: (front, after)}).astype(jnp.float32)[:, None]
    own = q.shape[2] // block
    plan = _Plan(heads, q.shape[-1], block, window, before, own, by_document=ids is not None)
    out = _attend(plan, q, k, v, key_ids)[:, :, :num_tokens]
    return out if ids is None else jnp.where((ids > 0)[:, None, :, None], out, 0)
