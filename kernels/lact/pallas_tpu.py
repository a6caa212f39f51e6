"""The LaCT fast-weight op as Pallas kernels for TPUs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental.pallas import tpu as pltpu
from refine_jax.kernels.lact import tuning
from refine_jax.kernels.lact.pallas_tpu_backward import backward
from refine_jax.kernels.lact.pallas_tpu_blocks import LANES
from refine_jax.kernels.lact.pallas_tpu_forward import forward
from refine_jax.kernels.lact.pallas_tpu_plan import Plan
from refine_jax.kernels.lact.reference import PLAIN, FastState, Options, Weights
from refine_jax.kernels.lact.xla import row_norms


def interpret_mode() -> pltpu.InterpretParams | bool:
    """How `pallas_call` runs: compiled on TPUs, simulated elsewhere."""
    return False if jax.default_backend() == "tpu" else pltpu.InterpretParams()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_chunks(plan, q, k, v, rates, mean, norms, fresh, carry, reset):
    out, states, _ = forward(plan, q, k, v, rates, mean, norms, fresh, carry, reset)
    return out, states


def _over_chunks_forward(plan, *arguments):
    arguments = jax.tree.map(lambda x: x.value, arguments)
    q, k, v, rates, mean, norms, fresh, carry, reset = arguments
    plan = dataclasses.replace(plan, save_scales=True)
    out, states, scales = forward(plan, *arguments)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (fresh, carry))
    return (out, states), (q, k, v, rates, mean, norms, shapes, reset, states, scales)


def _over_chunks_backward(plan, residuals, cotangents):
    q, k, v, rates, mean, norms, (fresh, carry), reset, states, scales = residuals
    d_out, d_states = cotangents

    def dense(x):
        return jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x

    present = {
        name: Weights(*map(dense, getattr(d_states, name)))
        for name in plan.groups
        if not all(isinstance(x, SymbolicZero) for x in getattr(d_states, name))
    }
    block, sub = tuning.block_sizes("backward", max(plan.dim, plan.hidden), plan.chunk)
    plan = dataclasses.replace(
        plan, reverse=True, cotangents=tuple(present), block=block, sub=sub
    )
    gradients = backward(
        plan, q, k, v, rates, mean, norms, reset, states, scales, dense(d_out), present
    )

    def as_given(gradient, given):
        return gradient if gradient.ndim == len(given.shape) else gradient.sum(0)

    start = {name: gradients[name] for name in plan.groups if name in gradients}
    d_fresh = d_carry = None
    if plan.resets or not plan.carry:
        parts = [gradients["fresh"]] if plan.resets else []
        parts += [] if plan.carry else list(start.values())
        total = jax.tree.map(lambda *x: sum(x), *parts)
        d_fresh = jax.tree.map(as_given, total, fresh)
    if plan.carry:
        d_carry = FastState(**start)
    d_norms = jax.tree.map(as_given, gradients["norms"], norms)
    return (
        *(gradients[name] for name in ("q", "k", "v", "rates")),
        gradients.get("mean"),
        d_norms,
        d_fresh,
        d_carry,
        None,
    )


_over_chunks.defvjp(_over_chunks_forward, _over_chunks_backward, symbolic_zeros=True)


def _pad(x: jax.Array, *axes: int) -> jax.Array:
    """Zeros up to multiples of 128 along these axes (counted from the end)."""
    widths = [(0, 0)] * x.ndim
    for axis in axes:
        widths[axis] = (0, -x.shape[axis] % LANES)
    return jnp.pad(x, widths) if any(high for _, high in widths) else x


def lact_pallas_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rates: jax.Array,
    momentum: jax.Array | None,
    weights: Weights,
    *,
    mask: jax.Array | None = None,
    reset: jax.Array | None = None,
    carry: FastState | None = None,
    options: Options = PLAIN,
) -> tuple[jax.Array, FastState]:
    """`lact` of api.py; on a CPU in interpret mode, for tests."""
    batch, chunks, heads, chunk, dim = q.shape
    hidden = weights.w1.shape[-1]
    mean = None
    if momentum is not None:
        live = jnp.ones((), bool) if mask is None else mask[:, :, None, :]
        count = chunk if mask is None else jnp.maximum(live.sum(-1), 1)
        mean = jnp.where(live, momentum, 0.0).sum(-1) / count
    rates = jnp.swapaxes(rates[..., 0], -1, -2)
    if mask is not None:
        rates = jnp.where(mask[:, :, None, None, :], rates, 0.0)
    weights = jax.tree.map(lambda w: _pad(w.astype(jnp.float32), -1, -2), weights)
    carry = jax.tree.map(lambda w: _pad(w, -1, -2), carry)
    q, k, v = (_pad(x, -1, -2) for x in (q, k, v))
    rates = _pad(rates, -1)
    padded = q.shape[-2]
    size = max(weights.w1.shape[-2:])
    block, sub = tuning.block_sizes("forward", size, padded)
    plan = Plan(
        batch=batch,
        chunks=chunks,
        heads=heads,
        chunk=padded,
        dim=q.shape[-1],
        hidden=weights.w1.shape[-1],
        momentum=momentum is not None,
        prenorm=options.prenorm,
        eps_inside=options.fused and not options.prenorm,
        carry=carry is not None,
        resets=reset is not None,
        fresh_by_row=weights.w0.ndim == 4,
        block=block,
        sub=sub,
        vmem_limit=tuning.vmem_bytes(),
        interpret=interpret_mode(),
    )
    out, states = _over_chunks(
        plan, q, k, v, rates, mean, row_norms(weights), weights, carry, reset
    )

    def cut(states):
        w0, w1, w2 = states
        return Weights(w0[..., :hidden, :dim], w1[..., :dim, :hidden], w2[..., :hidden, :dim])

    states = FastState(*(None if x is None else cut(x) for x in states))
    return out[..., :chunk, :dim], states
