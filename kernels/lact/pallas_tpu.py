"""The LaCT fast-weight op as Pallas kernels for TPUs.

Without Muon and with one rate a token, a forward and a backward kernel walk over all chunks and
keep the weights in vector memory (pallas_tpu_forward.py, pallas_tpu_backward.py). Everything else,
and weights too large for that (v4), runs in parts (pallas_tpu_parts.py).

Floors at the published size (d = F = 384, 4 heads, 16384 tokens, chunks of 2048, bfloat16) on v6e:
matrix units 0.17 ms forward, 0.62 ms forward + backward (66 and 235 products of 2.4 GFLOP over all
heads: 9 a chunk, 8 + 15 in its backward; the last chunk has no update); HBM 0.19 and 0.48 ms, of
which a third is states in float32. Static estimates of the whole program, forward and forward +
backward (`experiments/tpu_kernels.py`): v6e 0.42 and 1.55 ms, v5e 0.95 and 3.51. Counting a
transpose as libtpu's own static profile does, v6e takes 0.37 and 1.26 ms.

Larger weights are worked on in tiles of the hidden axis, in loops: the compiler unrolls all vector
work of a grid step, and took more than ten minutes for d = F = 768 on v6e. With tiles of 256 it
takes half a minute. Static estimates at d = F = 768, else as above, on v6e with transposes counted
in that way: 1.21 ms in the forward and 2.92 in the backward kernel, 4.24 in all (floors 0.69 and,
with backward, 2.47); searched blocks have since taken off 4 % forward and 11 % of both.

What bounds it now: on v5e and v5p the matrix units (87 to 91 % busy at d = 384); on v6e too, where
384 fills 1.5 of its 256 columns: 36 % more cycles go into them than the floor has. Then the ends of
chunks (5 to 15 %), of which the forward hides half behind the last reads. At d = 768 on v6e, where
all columns are full, the matrix units are busy in 78 % of the forward loop's cycles and in 74 % of
the backward's; ends of chunks take 11 and 9 %, transposes of the sums over tiles that dq, dk, dv
are another 3 %, and the forward waits 11 % for HBM.

Tried, by static schedules on v6e: tokens along sublanes in the update (22 % slower: every sum needs
a transposed operand); reads feature-major (5 % slower: transposed outputs); steps of half the
tokens (6 % slower).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from refine_jax.kernels.lact import pallas_tpu_parts as parts
from refine_jax.kernels.lact import tuning
from refine_jax.kernels.lact.pallas_tpu_backward import backward
from refine_jax.kernels.lact.pallas_tpu_blocks import LANES
from refine_jax.kernels.lact.pallas_tpu_forward import forward
from refine_jax.kernels.lact.pallas_tpu_plan import LaCTPlan
from refine_jax.kernels.lact.reference import PLAIN, FastState, Weights
from refine_jax.kernels.lact.xla import mask_slots, row_norms, scan_chunks, update_sums
from refine_jax.kernels.numerics import pad_axes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_chunks(plan, q, k, v, rates, mean, norms, fresh, reset):
    plan = tuning.with_blocks(plan, q.dtype)
    out, states, _ = forward(plan, q, k, v, rates, mean, norms, fresh, reset)
    return out, states


def _over_chunks_forward(plan, *arguments):
    arguments = jax.tree.map(lambda x: x.value, arguments)
    q, k, v, rates, mean, norms, _, reset = arguments
    plan = dataclasses.replace(tuning.with_blocks(plan, q.dtype), save_scales=True)
    out, states, scales = forward(plan, *arguments)
    return (out, states), (q, k, v, rates, mean, norms, reset, states, scales)


def _over_chunks_backward(plan, residuals, cotangents):
    q, k, v, rates, mean, norms, reset, states, scales = residuals
    d_out, d_states = cotangents

    def dense(x):
        return jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x

    present = {
        name: Weights(*map(dense, getattr(d_states, name)))
        for name in plan.groups
        if not all(isinstance(x, SymbolicZero) for x in getattr(d_states, name))
    }
    plan = dataclasses.replace(plan, reverse=True, cotangents=tuple(present))
    plan = tuning.with_blocks(plan, q.dtype)
    gradients = backward(
        plan, q, k, v, rates, mean, norms, reset, states, scales, dense(d_out), present
    )

    starts = [gradients[x] for x in ("fresh", "weights", "accumulator") if x in gradients]
    d_fresh = jax.tree.map(lambda *x: sum(x).sum(0), *starts)
    d_norms = jax.tree.map(lambda x: x.sum(0), gradients["norms"])
    d_tokens = (gradients[name] for name in ("q", "k", "v", "rates"))
    return *d_tokens, gradients.get("mean"), d_norms, d_fresh, None


_over_chunks.defvjp(_over_chunks_forward, _over_chunks_backward, symbolic_zeros=True)


def _pad(x: jax.Array, *axes: int) -> jax.Array:
    """Zeros up to multiples of 128 along these axes (counted from the end)."""
    return pad_axes(x, {axis: (0, -x.shape[axis] % LANES) for axis in axes})


def _in_parts(q, k, v, rates, mean, weights, reset, options, tiles):
    """`scan_chunks` with kernels that read and sum.

    rates: [B, N, H, 3, C], or [B, N, H, C, 3, E] with a rate for every channel. Tokens are padded,
    the weights are not: Newton-Schulz rounds a padded matrix in another way.
    """
    hidden, dim = weights.w0.shape[-2:]

    def flat(tree, axes):
        """Join the first axes of arrays to one."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), tree)

    def read(weights, q):
        arguments = flat((_pad_weights(weights), q), 3)
        return parts.apply_fast_weights(tiles, *arguments).reshape(q.shape)

    def sums(weights, k, v, rates):
        weights = _pad_weights(weights)
        if rates.ndim == 5:
            total = jax.checkpoint(update_sums)(weights, k, v, rates)
        else:
            total = parts.update_sums(tiles, *flat((weights, k, v, rates), 2))
            total = jax.tree.map(lambda x, w: x.reshape(w.shape), total, weights)
        return _cut_weights(total, hidden, dim)

    tokens = q, k, v, rates, mean
    return scan_chunks(read, sums, *tokens, weights, reset=reset, options=options)


def _pad_weights(weights: Weights) -> Weights:
    return Weights(*(_pad(w, -1, -2) for w in weights))


def _cut_weights(weights: Weights, hidden: int, dim: int) -> Weights:
    w0, w1, w2 = weights
    return Weights(w0[..., :hidden, :dim], w1[..., :dim, :hidden], w2[..., :hidden, :dim])


def lact_pallas_tpu(
    q, k, v, rates, momentum, weights, *, mask=None, reset=None, options=PLAIN
) -> tuple[jax.Array, FastState]:
    """Run `lact` of api.py, with its shapes: q [B, N, H, C, d]; interpreted on a CPU, for tests."""
    batch, chunks, heads, chunk, dim = q.shape
    hidden = weights.w1.shape[-1]
    rates, mean = mask_slots(rates, momentum, mask)
    weights = jax.tree.map(lambda w: w.astype(jnp.float32), weights)
    q, k, v = (_pad(x, -1, -2) for x in (q, k, v))
    by_channel = rates.shape[-1] > 1
    rates = _pad(rates, -1, -3) if by_channel else _pad(jnp.moveaxis(rates, -3, -1)[..., 0, :], -1)
    padded = _pad_weights(weights)
    plan = LaCTPlan(
        batch=batch,
        chunks=chunks,
        heads=heads,
        chunk=q.shape[-2],
        dim=padded.w1.shape[-2],
        hidden=padded.w1.shape[-1],
        momentum=momentum is not None,
        prenorm=options.prenorm,
        eps_inside=options.fused and not options.prenorm,
        resets=reset is not None,
    )
    if options.muon is None and not by_channel and tuning.fits(plan, q.dtype):
        out, states = _over_chunks(plan, q, k, v, rates, mean, row_norms(padded), padded, reset)
        cut = (None if x is None else _cut_weights(x, hidden, dim) for x in states)
        states = FastState(*cut)
    else:
        tiles = tuning.tiles(plan, q.dtype)
        out, states = _in_parts(q, k, v, rates, mean, weights, reset, options, tiles)
    return out[..., :chunk, :dim], states
