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


# The three matrices of the results, and the scratch in which the second one is summed up.
_SUMS = ("o0", "o1", "o2")


def _call(
    tiles: Tiles,
    kernel: Callable[..., None],
    name: str,
    tokens: dict[str, jax.Array],
    weights: dict[str, Weights],
    outputs: tuple[str, ...],
    scratch: tuple[str, ...],
    rates: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Run a kernel of references by name over [L, ...] arrays, tile by tile of F.

    tokens: arrays [L, C, d]. weights: by a prefix of the names of their three matrices. rates:
    [L, 3, C]. outputs: matrices of _SUMS, d_rates, and arrays like the tokens; a tile has a share
    of the latter two, and the shares are added up. scratch: "stack" [2 n F, d] and "stack1"
    [n F, d] for the n weights of a tile, their transposes "stack_t" and "stack1_t", and "sum1t".
    """
    some = next(iter(tokens.values()))
    lead, chunk, dim = some.shape
    hidden, block, num_weights = tiles.hidden, tiles.tokens, len(weights)
    num_tiles = weights["w"].w1.shape[-1] // hidden
    by_token = pl.BlockSpec((None, block, dim), lambda i, f, j: (i, j, 0))
    by_rate = pl.BlockSpec((None, 3, block), lambda i, f, j: (i, 0, j))
    wide = pl.BlockSpec((None, hidden, dim), lambda i, f, j: (i, f, 0))
    tall = pl.BlockSpec((None, dim, hidden), lambda i, f, j: (i, 0, f))
    inputs = {key: (x, by_token) for key, x in tokens.items()}
    if rates is not None:
        inputs["rates"] = rates, by_rate
    for prefix, matrices in weights.items():
        specs = zip(matrices, (wide, tall, wide), strict=True)
        inputs |= {f"{prefix}{i}": found for i, found in enumerate(specs)}

    def output(key):
        if key in _SUMS:
            shape = weights["w"][_SUMS.index(key)].shape
            return shape, jnp.float32, tall if key == "o1" else wide
        # A tile's share is rounded only where it is all.
        whole, dtype = by_token, some.dtype if num_tiles == 1 else jnp.float32
        shape = num_tiles, lead, chunk, dim
        if key == "d_rates":
            whole, dtype, shape = by_rate, jnp.float32, (num_tiles, lead, 3, chunk)
        share = pl.BlockSpec(
            (None, *whole.block_shape), lambda i, f, j: (f, *whole.index_map(i, f, j))
        )
        return shape, dtype, share

    rows = {"stack": 2 * num_weights, "stack1": num_weights, "sum1t": 1}
    shapes = {key: (count * hidden, dim) for key, count in rows.items()}
    shapes |= {f"{key}_t": shape[::-1] for key, shape in shapes.items()}
    results = tpu.call_kernel(
        kernel,
        name,
        (lead, num_tiles, chunk // block),
        inputs,
        {key: output(key) for key in outputs},
        {
            key: pltpu.VMEM(shapes[key], jnp.float32 if key == "sum1t" else some.dtype)
            for key in scratch
        },
        parallel=1,
        vmem=1.0,
    )
    shares = {key: results[key] for key in outputs if key not in _SUMS}
    return results | {key: x[0] if num_tiles == 1 else x.sum(0) for key, x in shares.items()}


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

    def kernel(**refs):
        stack, stack1 = refs["stack"], refs["stack1"]
        pl.when(pl.program_id(2) == 0)(lambda: _load(refs, "w", stack, stack1, 0))
        out = apply_block(refs["q"][...], stack[...], stack1[...])
        refs["out"][...] = out.astype(refs["out"].dtype)

    arrays = {"q": q}, {"w": weights}
    found = _call(tiles, kernel, "lact_apply", *arrays, ("out",), ("stack", "stack1"))
    return found["out"].astype(q.dtype)


def _apply_forward(tiles, weights, q):
    return apply_fast_weights(tiles, weights, q), (weights, q)


def _apply_backward(tiles, residuals, d_out):
    weights, q = residuals

    def kernel(**refs):
        stack, stack1, stack_t = (refs[x] for x in ("stack", "stack1", "stack_t"))
        pl.when(pl.program_id(2) == 0)(lambda: _load(refs, "w", stack, stack1, 0, (stack_t, None)))
        q, d_out = refs["q"][...], refs["d_out"][...]
        dq, z02, h = apply_block_backward(q, d_out, stack[...], stack1[...], stack_t[...])
        refs["dq"][...] = dq.T.astype(refs["dq"].dtype)
        _accumulate(refs, nn(z02, q), nn(h, d_out))

    arrays = {"q": q, "d_out": d_out}, {"w": weights}
    scratch = "stack", "stack1", "stack_t", "sum1t"
    found = _call(tiles, kernel, "lact_apply_backward", *arrays, ("dq", *_SUMS), scratch)
    return Weights(*(found[x] for x in _SUMS)), found["dq"].astype(q.dtype)


apply_fast_weights.defvjp(_apply_forward, _apply_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def update_sums(
    tiles: Tiles, weights: Weights, k: jax.Array, v: jax.Array, rates: jax.Array
) -> Weights:
    """As `update_sums` of xla.py, for k, v [L, C, d], rates [L, 3, C] and weights [L, ...]."""

    def kernel(**refs):
        stack, stack1 = refs["stack"], refs["stack1"]
        pl.when(pl.program_id(2) == 0)(lambda: _load(refs, "w", stack, stack1, 0))
        k, v = refs["k"][...], refs["v"][...]
        x02, x1 = update_block(k, v, refs["rates"][...], stack[...], stack1[...])
        _accumulate(refs, nn(x02, k), nn(x1, v))

    arrays, scratch = ({"k": k, "v": v}, {"w": weights}), ("stack", "stack1", "sum1t")
    found = _call(tiles, kernel, "lact_update_sums", *arrays, _SUMS, scratch, rates)
    return Weights(*(found[x] for x in _SUMS))


def _sums_forward(tiles, weights, k, v, rates):
    return update_sums(tiles, weights, k, v, rates), (weights, k, v, rates)


def _sums_backward(tiles, residuals, cotangents):
    weights, k, v, rates = residuals

    def kernel(**refs):
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

    arrays = {"k": k, "v": v}, {"w": weights, "g": cotangents}
    outputs, scratch = ("dk", "dv", "d_rates", *_SUMS), ("stack", "stack1", "stack_t", "stack1_t")
    name = "lact_update_sums_backward"
    found = _call(tiles, kernel, name, *arrays, outputs, (*scratch, "sum1t"), rates)
    d_weights, d_k, d_v = Weights(*(found[x] for x in _SUMS)), found["dk"], found["dv"]
    return d_weights, d_k.astype(k.dtype), d_v.astype(v.dtype), found["d_rates"]


update_sums.defvjp(_sums_forward, _sums_backward)
