"""The LaCT op on TPUs in parts: kernels for the tokens of a chunk, XLA for the weights between.

For what the kernels over chunks do not do: Muon, a rate for every channel, and weights too large
to stay in vector memory. Reading and the sums of the update are one kernel each, with one for its
backward; both walk tiles of the hidden axis, then blocks of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refine_jax.kernels import tpu
from refine_jax.kernels.lact.pallas_tpu_blocks import (
    apply_block,
    apply_block_backward,
    nn,
    update_block,
    update_block_backward,
)
from refine_jax.kernels.lact.reference import Weights


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the kernels walk a chunk: tokens of a grid step, hidden features of a tile."""

    tokens: int
    hidden: int


class _Call:
    """The arguments of one `pallas_call` over [L, ...] arrays, gathered by name."""

    def __init__(self, tiles: Tiles, weights: Weights, tokens: jax.Array):
        self.tiles = tiles
        self.lead, self.chunk, self.dim = tokens.shape
        self.operand = tokens.dtype
        self.hidden = weights.w1.shape[-1]
        self.parts = self.hidden // tiles.hidden
        self.inputs, self.outputs, self.scratch = {}, {}, {}

    def _specs(self):
        tokens, hidden, dim = self.tiles.tokens, self.tiles.hidden, self.dim
        return {
            "tokens": pl.BlockSpec((None, tokens, dim), lambda i, f, j: (i, j, 0)),
            "rates": pl.BlockSpec((None, 3, tokens), lambda i, f, j: (i, 0, j)),
            "wide": pl.BlockSpec((None, hidden, dim), lambda i, f, j: (i, f, 0)),
            "tall": pl.BlockSpec((None, dim, hidden), lambda i, f, j: (i, 0, f)),
        }

    def give(self, kind: str, **arrays: jax.Array) -> None:
        """Inputs of one kind."""
        for name, array in arrays.items():
            self.inputs[name] = array, self._specs()[kind]

    def give_weights(self, prefix: str, weights: Weights) -> None:
        """The three matrices as inputs prefix0, prefix1, prefix2."""
        for i, kind in enumerate(("wide", "tall", "wide")):
            self.give(kind, **{f"{prefix}{i}": weights[i]})

    def take(self, kind: str, *names: str) -> None:
        """Outputs of one kind, float32; those by tokens are one for every tile of F."""
        shapes = {
            "tokens": (self.parts, self.lead, self.chunk, self.dim),
            "rates": (self.parts, self.lead, 3, self.chunk),
            "wide": (self.lead, self.hidden, self.dim),
            "tall": (self.lead, self.dim, self.hidden),
        }
        spec = self._specs()[kind]
        if kind in ("tokens", "rates"):
            index = spec.index_map
            spec = pl.BlockSpec((None, *spec.block_shape), lambda i, f, j: (f, *index(i, f, j)))
        # A tile's share is rounded only where it is all.
        low = kind == "tokens" and self.parts == 1
        dtype = self.operand if low else jnp.float32
        for name in names:
            self.outputs[name] = jax.ShapeDtypeStruct(shapes[kind], dtype), spec

    def keep(self, dtype: jnp.dtype | None = None, **shapes: tuple[int, int]) -> None:
        """Scratch by name, in units of (hidden tile, d), negative: the other way round."""
        hidden, dim = self.tiles.hidden, self.dim
        for name, (rows, transposed) in shapes.items():
            shape = (dim, rows * hidden) if transposed else (rows * hidden, dim)
            self.scratch[name] = pltpu.VMEM(shape, dtype or self.operand)

    def run(self, kernel: Callable[[dict], None], name: str) -> dict[str, jax.Array]:
        """The outputs by name; those by tokens summed over the tiles."""
        results = tpu.call_kernel(
            lambda **refs: kernel(refs),
            name,
            (self.lead, self.parts, self.chunk // self.tiles.tokens),
            self.inputs,
            self.outputs,
            self.scratch,
            parallel=1,
            vmem=1.0,
        )
        for name, array in results.items():
            if array.ndim == 4:
                results[name] = array[0] if self.parts == 1 else array.sum(0)
        return results


def _load(refs, prefix, stack, stack1, part, transposes=None):
    """Weights of a tile as operands: over each other in `stack` [(0, 2), d] and `stack1`."""
    hidden = refs[f"{prefix}0"].shape[0]
    low = [refs[f"{prefix}{i}"][...].astype(stack.dtype) for i in range(3)]
    for half, w in enumerate((low[0], low[2])):
        rows = slice((2 * part + half) * hidden, (2 * part + half + 1) * hidden)
        stack[rows] = w
        if transposes is not None:
            transposes[0][:, rows] = w.T
    rows = slice(part * hidden, (part + 1) * hidden)
    stack1[rows] = low[1].T
    if transposes is not None and transposes[1] is not None:
        transposes[1][:, rows] = low[1]


def _accumulate(refs, both, flat):
    """Adds to the outputs o0, o2 and, in `sum1t`, to the transpose of o1."""
    block = pl.program_id(2)
    hidden = flat.shape[0]

    @pl.when(block == 0)
    def _first():
        refs["o0"][...] = both[:hidden]
        refs["o2"][...] = both[hidden:]
        refs["sum1t"][...] = flat

    @pl.when(block > 0)
    def _more():
        refs["o0"][...] += both[:hidden]
        refs["o2"][...] += both[hidden:]
        refs["sum1t"][...] += flat

    @pl.when(block == pl.num_programs(2) - 1)
    def _last():
        refs["o1"][...] = refs["sum1t"][...].T


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply_fast_weights(tiles: Tiles, weights: Weights, q: jax.Array) -> jax.Array:
    """`W1 (silu(W0 q) * (W2 q))` for q [L, C, d] and weights [L, ...] float32; as q."""
    call = _Call(tiles, weights, q)
    call.give("tokens", q=q)
    call.give_weights("w", weights)
    call.take("tokens", "out")
    call.keep(stack=(2, False), stack1=(1, False))

    def kernel(refs):
        stack, stack1 = refs["stack"], refs["stack1"]
        pl.when(pl.program_id(2) == 0)(lambda: _load(refs, "w", stack, stack1, 0))
        out = apply_block(refs["q"][...], stack[...], stack1[...])
        refs["out"][...] = out.astype(refs["out"].dtype)

    return call.run(kernel, "lact_apply")["out"].astype(q.dtype)


def _apply_forward(tiles, weights, q):
    return apply_fast_weights(tiles, weights, q), (weights, q)


def _apply_backward(tiles, residuals, d_out):
    weights, q = residuals
    call = _Call(tiles, weights, q)
    call.give("tokens", q=q, d_out=d_out)
    call.give_weights("w", weights)
    call.take("tokens", "dq")
    call.take("wide", "o0", "o2")
    call.take("tall", "o1")
    call.keep(stack=(2, False), stack1=(1, False), stack_t=(2, True))
    call.keep(jnp.float32, sum1t=(1, False))

    def kernel(refs):
        stack, stack1, stack_t = (refs[x] for x in ("stack", "stack1", "stack_t"))
        pl.when(pl.program_id(2) == 0)(lambda: _load(refs, "w", stack, stack1, 0, (stack_t, None)))
        q, d_out = refs["q"][...], refs["d_out"][...]
        dq, z02, h = apply_block_backward(q, d_out, stack[...], stack1[...], stack_t[...])
        refs["dq"][...] = dq.T.astype(refs["dq"].dtype)
        _accumulate(refs, nn(z02, q), nn(h, d_out))

    results = call.run(kernel, "lact_apply_backward")
    return Weights(*(results[f"o{i}"] for i in range(3))), results["dq"].astype(q.dtype)


apply_fast_weights.defvjp(_apply_forward, _apply_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def update_sums(
    tiles: Tiles, weights: Weights, k: jax.Array, v: jax.Array, rates: jax.Array
) -> Weights:
    """As `update_sums` of xla.py, for k, v [L, C, d], rates [L, 3, C] and weights [L, ...]."""
    call = _Call(tiles, weights, k)
    call.give("tokens", k=k, v=v)
    call.give("rates", rates=rates)
    call.give_weights("w", weights)
    call.take("wide", "o0", "o2")
    call.take("tall", "o1")
    call.keep(stack=(2, False), stack1=(1, False))
    call.keep(jnp.float32, sum1t=(1, False))

    def kernel(refs):
        stack, stack1 = refs["stack"], refs["stack1"]
        pl.when(pl.program_id(2) == 0)(lambda: _load(refs, "w", stack, stack1, 0))
        k, v = refs["k"][...], refs["v"][...]
        x02, x1 = update_block(k, v, refs["rates"][...], stack[...], stack1[...])
        _accumulate(refs, nn(x02, k), nn(x1, v))

    results = call.run(kernel, "lact_update_sums")
    return Weights(*(results[f"o{i}"] for i in range(3)))


def _sums_forward(tiles, weights, k, v, rates):
    return update_sums(tiles, weights, k, v, rates), (weights, k, v, rates)


def _sums_backward(tiles, residuals, cotangents):
    weights, k, v, rates = residuals
    call = _Call(tiles, weights, k)
    call.give("tokens", k=k, v=v)
    call.give("rates", rates=rates)
    call.give_weights("w", weights)
    call.give_weights("g", cotangents)
    call.take("tokens", "dk", "dv")
    call.take("rates", "d_rates")
    call.take("wide", "o0", "o2")
    call.take("tall", "o1")
    call.keep(stack=(4, False), stack1=(2, False), stack_t=(4, True), stack1_t=(2, True))
    call.keep(jnp.float32, sum1t=(1, False))

    def kernel(refs):
        stack, stack1, *transposes = (refs[x] for x in ("stack", "stack1", "stack_t", "stack1_t"))

        @pl.when(pl.program_id(2) == 0)
        def _begin():
            for part, prefix in enumerate("wg"):
                _load(refs, prefix, stack, stack1, part, transposes)

        k, v = refs["k"][...], refs["v"][...]
        operands = (x[...] for x in (stack, stack1, *transposes))
        dk, dv, d_rates, z02, z1 = update_block_backward(k, v, refs["rates"][...], *operands)
        refs["dk"][...] = dk.T.astype(refs["dk"].dtype)
        refs["dv"][...] = dv.T.astype(refs["dv"].dtype)
        refs["d_rates"][...] = d_rates
        _accumulate(refs, nn(z02, k), nn(z1, v))

    results = call.run(kernel, "lact_update_sums_backward")
    d_weights = Weights(*(results[f"o{i}"] for i in range(3)))
    return (
        d_weights,
        results["dk"].astype(k.dtype),
        results["dv"].astype(k.dtype),
        results["d_rates"],
    )


update_sums.defvjp(_sums_forward, _sums_backward)
