"""Backward kernel of the LaCT op on TPUs: one pass over all chunks, from the last to the first.

The weights every chunk was read with are an output of the forward pass, and so is the momentum;
everything else of a chunk is computed again, a block of tokens at a time. The cotangents of the
weights, of the momentum and of the accumulator stay in VMEM. A chunk's last block ends with the
backward of the update before that chunk: through the rescaling of the rows to the cotangents of
the update sums, which the tokens of the chunk before then need.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from refine_jax.kernels.lact.pallas_tpu_blocks import (
    LANES,
    apply_block_backward,
    nn,
    update_block_backward,
)
from refine_jax.kernels.lact.pallas_tpu_plan import Plan
from refine_jax.kernels.lact.reference import EPS, FastState, Weights


def _column(row):
    """[1, 128] as [128, 1]."""
    return jnp.broadcast_to(row, (LANES, LANES)).T[:, :1]


def _rescale_backward(cotangent, weights, norm, scale, eps_inside):
    """Cotangents of the base and of the row norms, of `weights = base * scale(base)`, by rows.

    scale: norm / (|base| + EPS), or norm / sqrt(|base|^2 + EPS). Rows of zeros count as constant.
    """
    product = jnp.sum(cotangent * weights, 1, keepdims=True)
    there = (norm > 0) & (scale > 0)
    norm, divisor = jnp.where(there, norm, 1.0), jnp.where(there, scale, 1.0)
    if eps_inside:
        factor = divisor / (norm * norm)
    else:
        length = norm / divisor - EPS
        # Below the rounding of the subtraction nothing of the direction is left.
        factor = jnp.where(length > 0, 1.0 / (norm * jnp.where(length > 0, length, 1.0)), 0.0)
    factor = jnp.where(there, factor, 0.0)
    d_norm = jnp.where(there, product / norm, 0.0)
    return scale * cotangent - weights * (factor * product), d_norm


def _update_backward(cotangents, weights, norm, scale, eps_inside):
    """From the cotangents of some rows of a state to those of the state before its update.

    In place; the cotangents of the momentum are those after the update. Returns the cotangents of
    the step and of the row norms.
    """
    d_base, d_norm = _rescale_backward(cotangents["weights"], weights, norm, scale, eps_inside)
    if "accumulator" in cotangents:
        d_base += cotangents["accumulator"]
        cotangents["accumulator"] = d_base
        cotangents["weights"] = jnp.zeros_like(d_base)
    else:
        cotangents["weights"] = d_base
    if "momentum" in cotangents:
        d_base += cotangents["momentum"]
        cotangents["momentum"] = d_base
    return d_base, d_norm


def _starts(size):
    return range(0, size, LANES)


def _kernel(plan: Plan, names: tuple[str, ...], *refs):
    refs = dict(zip(names, refs, strict=True))
    row, head = pl.program_id(0), pl.program_id(1)
    chunk, block = plan.chunk_index(pl.program_id(2)), pl.program_id(3)
    last, hidden, dim = plan.chunks - 1, plan.hidden, plan.dim
    d02, d1t = refs["weights_d02"], refs["d1t"]
    stack, stack_t, stack1, stack1_t = (refs[f"stack{x}"] for x in ("", "_t", "1", "1_t"))
    semaphores = refs["semaphores"]
    operand = stack.dtype

    def pairs(prefix):
        return refs[f"{prefix}02"], refs[f"{prefix}1"]

    def views(prefix):
        both, flat = pairs(prefix)
        return both.at[:hidden], flat, both.at[hidden:]

    # 128 rows of a matrix at a time: its number, its rows there, and those of its pair in VMEM.
    parts = [
        (2 * half, start, half * hidden + start) for half in (0, 1) for start in _starts(hidden)
    ]
    parts += [(1, start, start) for start in _starts(dim)]

    def fetches(part):
        """Copies of what the end of the chunk needs from HBM, of one part of the rows."""
        matrix, start, _ = parts[part]
        width = hidden if matrix == 1 else dim
        slot = part % plan.fetch_slots
        return [
            pltpu.make_async_copy(
                refs[f"{name}{matrix}"].at[row, chunk, head, pl.ds(start, LANES)],
                refs[f"{name}_in"].at[slot, :, pl.ds(0, width)],
                semaphores.at[source, slot],
            )
            for source, name in enumerate(plan.fetched)
        ]

    def copy_out(scratch, name):
        copies = [
            pltpu.make_async_copy(view, refs[f"{name}{i}"].at[row, head], semaphores.at[0, 0])
            for i, view in enumerate(views(scratch))
        ]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()

    @pl.when((chunk == last) & (block == 0))
    def _clear():
        kept = [f"{name}_d" for name in plan.groups] + (["fresh_d"] if plan.resets else [])
        for prefix in kept:
            for ref in pairs(prefix):
                ref[...] = jnp.zeros_like(ref)
        for i in range(3):
            refs[f"d_norm{i}"][...] = jnp.zeros_like(refs[f"d_norm{i}"])

    @pl.when(block == 0)
    def _begin():
        for part in range(min(plan.fetch_slots, len(parts))):
            for copy in fetches(part):
                copy.start()
        d1t[...] = jnp.zeros_like(d1t)
        for half, name in enumerate(("w0", "w2")):
            rows = slice(half * hidden, (half + 1) * hidden)
            low = refs[name][...].astype(operand)
            stack[rows] = low
            stack_t[:, rows] = low.T
        low = refs["w1"][...].astype(operand)
        stack1[:hidden] = low.T
        stack1_t[:, :hidden] = low

    def apply_backward(tokens):
        dq, z02, h = apply_block_backward(
            refs["q"][tokens],
            refs["d_out"][tokens],
            stack[: 2 * hidden],
            stack1[:hidden],
            stack_t[:, : 2 * hidden],
        )
        refs["dq"][tokens] = dq.astype(operand)
        return z02, h

    slices = [pl.ds(i, plan.sub) for i in range(0, plan.block, plan.sub)]

    @pl.when(chunk == last)
    def _read_only():
        z02, h = (
            jnp.concatenate(x, 1)
            for x in zip(*(apply_backward(tokens) for tokens in slices), strict=True)
        )
        d02[...] += nn(z02, refs["q"][...])
        d1t[...] += nn(h, refs["d_out"][...])
        for name in ("dk", "dv", "d_rates"):
            refs[name][...] = jnp.zeros_like(refs[name])

    def read_and_update():
        parts = []
        for tokens in slices:
            z02, h = apply_backward(tokens)
            dk, dv, d_rates, x02, x1 = update_block_backward(
                refs["k"][tokens],
                refs["v"][tokens],
                refs["rates"][:, tokens],
                stack[...],
                stack1[...],
                stack_t[...],
                stack1_t[...],
            )
            refs["dk"][tokens] = dk.astype(operand)
            refs["dv"][tokens] = dv.astype(operand)
            refs["d_rates"][:, tokens] = d_rates
            parts.append((z02, x02, h, x1))
        z02, x02, h, x1 = (jnp.concatenate(x, 1) for x in zip(*parts, strict=True))
        d02[...] += nn(z02, refs["q"][...]) + nn(x02, refs["k"][...])
        d1t[...] += nn(h, refs["d_out"][...]) + nn(x1, refs["v"][...])

    if last > 0:
        pl.when(chunk < last)(read_and_update)

    def end(is_first: bool):
        """Completes the cotangents of the chunk's state, and takes them back through the update."""
        again = refs["reset"][row * plan.chunks + chunk] != 0 if plan.resets else None
        mean = (
            refs["mean"][(row * plan.chunks + chunk) * plan.heads + head] if plan.momentum else None
        )
        products = jnp.zeros((1, 1), jnp.float32)
        for part, (matrix, start, first_row) in enumerate(parts):
            suffix, width = ("1", hidden) if matrix == 1 else ("02", dim)
            rows, within = slice(first_row, first_row + LANES), slice(start, start + LANES)
            slot = part % plan.fetch_slots
            for copy in fetches(part):
                copy.wait()
            given = {name: refs[f"{name}_in"][slot, :, :width] for name in plan.fetched}
            kept = {name: refs[f"{name}_d{suffix}"] for name in plan.groups}
            cotangents = {name: ref[rows] for name, ref in kept.items()}
            if matrix == 1:
                cotangents["weights"] += d1t[:, rows].T
            if plan.momentum:
                # So far that of the momentum after the update, and of the step.
                step = cotangents["momentum"]
                summed = jnp.sum(step * given["momentum"], 0, keepdims=True)
                products += jnp.sum(summed, 1, keepdims=True)
                cotangents["momentum"] = step * mean
            for name in plan.cotangents:
                cotangents[name] += given[f"ct_{name}"]
            if part + plan.fetch_slots < len(parts):
                for copy in fetches(part + plan.fetch_slots):
                    copy.start()
            if plan.resets:
                # A document begins: the state was the initial one whatever came before.
                fresh = cotangents["weights"] + cotangents.get("accumulator", 0.0)
                refs[f"fresh_d{suffix}"][rows] += jnp.where(again, fresh, 0.0)
                cotangents = {name: jnp.where(again, 0.0, x) for name, x in cotangents.items()}
            if not is_first:
                d_step, d_norm = _update_backward(
                    cotangents,
                    refs[f"w{matrix}"][within],
                    refs[f"norm{matrix}"][within],
                    _column(refs["scales"][matrix : matrix + 1, within]),
                    plan.eps_inside,
                )
                refs[f"d_norm{matrix}"][within] += d_norm
                low = d_step.astype(operand)
                if matrix == 1:
                    stack1_t[within, hidden:] = low
                    stack1[hidden:, within] = low.T
                else:
                    target = slice(2 * hidden + first_row, 2 * hidden + first_row + LANES)
                    stack[target] = low
                    stack_t[:, target] = low.T
            for name, ref in kept.items():
                ref[rows] = cotangents[name]
        if plan.momentum:
            refs["d_mean"][...] = jnp.broadcast_to(products, refs["d_mean"].shape)

    ends = block == plan.blocks - 1

    @pl.when((chunk == 0) & ends)
    def _finish():
        end(is_first=True)
        for name in plan.groups:
            if name != "momentum" or plan.carry:
                copy_out(f"{name}_d", f"d_{name}")
        if plan.resets:
            copy_out("fresh_d", "d_fresh")

    if last > 0:
        pl.when((chunk > 0) & ends)(lambda: end(is_first=False))


def backward(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rates: jax.Array,
    mean: jax.Array | None,
    norms: Weights,
    reset: jax.Array | None,
    states: FastState,
    scales: jax.Array,
    d_out: jax.Array,
    d_states: dict[str, Weights],
) -> dict[str, jax.Array | Weights]:
    """Gradients of `forward`, from its residuals and the cotangents of its outputs.

    Arguments as there; states and scales are its results. d_states: cotangents of the fields of
    the states, those named by `plan.cotangents`. Returns, by name: q, k, v; rates [B, N, H, 3, C];
    mean [B, N, H]; norms, [B, H, F, 1] or [B, H, d, 1]; weights, momentum, accumulator [B, H, ...]
    of the state to begin with; fresh [B, H, ...] where documents begin.
    """
    operand = q.dtype
    stacked, flat = (2 * plan.hidden, plan.dim), (plan.dim, plan.hidden)
    square = (plan.hidden, plan.dim)
    shapes = (square, flat, square)
    inputs, specs = {}, {}

    def add(name, array, spec):
        inputs[name], specs[name] = array, spec

    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    add("q", q, plan.token_spec())
    add("d_out", d_out, plan.token_spec())
    add("k", k, plan.token_spec(clip=True))
    add("v", v, plan.token_spec(clip=True))
    add("rates", rates, plan.rates_spec(clip=True))
    for i, norm in enumerate(norms):
        add(f"norm{i}", norm, plan.head_spec(norm))
    for i, shape in enumerate(shapes):
        add(f"w{i}", states.weights[i], plan.chunk_spec(shape, buffers=plan.weight_buffers))
    add("scales", scales, plan.chunk_spec(scales.shape[-2:], shift=-1))
    for name in plan.fetched:
        arrays = d_states[name.removeprefix("ct_")] if name != "momentum" else states.momentum
        for i, array in enumerate(arrays):
            add(f"{name}{i}", array, in_hbm)

    lead = (plan.batch, plan.chunks, plan.heads)
    heads = (plan.batch, plan.heads)
    outputs = {name: (q.shape, operand, plan.token_spec()) for name in ("dq", "dk", "dv")}
    outputs["d_rates"] = (rates.shape, jnp.float32, plan.rates_spec())
    if plan.momentum:
        outputs["d_mean"] = ((*lead, 1, LANES), jnp.float32, plan.chunk_spec((1, LANES)))
    for i, size in enumerate((plan.hidden, plan.dim, plan.hidden)):
        spec = pl.BlockSpec((None, None, size, 1), lambda b, h, *_: (b, h, 0, 0))
        outputs[f"d_norm{i}"] = ((*heads, size, 1), jnp.float32, spec)
    given = [name for name in plan.groups if name != "momentum" or plan.carry]
    given += ["fresh"] if plan.resets else []
    for name in given:
        for i, shape in enumerate(shapes):
            outputs[f"d_{name}{i}"] = ((*heads, *shape), jnp.float32, in_hbm)

    def pair(prefix):
        return {
            f"{prefix}02": pltpu.VMEM(stacked, jnp.float32),
            f"{prefix}1": pltpu.VMEM(flat, jnp.float32),
        }

    scratch = {
        "d1t": pltpu.VMEM(square, jnp.float32),
        "stack": pltpu.VMEM((4 * plan.hidden, plan.dim), operand),
        "stack_t": pltpu.VMEM((plan.dim, 4 * plan.hidden), operand),
        "stack1": pltpu.VMEM((2 * plan.hidden, plan.dim), operand),
        "stack1_t": pltpu.VMEM((plan.dim, 2 * plan.hidden), operand),
        "semaphores": pltpu.SemaphoreType.DMA((max(len(plan.fetched), 1), plan.fetch_slots)),
    }
    for name in plan.groups:
        scratch |= pair(f"{name}_d")
    for name in plan.fetched:
        shape = (plan.fetch_slots, LANES, max(plan.dim, plan.hidden))
        scratch[f"{name}_in"] = pltpu.VMEM(shape, jnp.float32)
    if plan.resets:
        scratch |= pair("fresh_d")
    scalars = plan.scalars(mean, reset)
    names = (*scalars, *inputs, *outputs, *scratch)
    results = pl.pallas_call(
        functools.partial(_kernel, plan, names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(plan.batch, plan.heads, plan.chunks, plan.blocks),
            in_specs=list(specs.values()),
            out_specs=[spec for *_, spec in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs.values()],
        compiler_params=plan.compiler_params(),
        interpret=plan.interpret,
        name="lact_backward",
    )(*scalars.values(), *inputs.values())
    results = dict(zip(outputs, results, strict=True))

    def gather(name):
        return Weights(*(results[f"d_{name}{i}"] for i in range(3)))

    gradients = {"q": results["dq"], "k": results["dk"], "v": results["dv"]}
    gradients |= {"rates": results["d_rates"], "norms": gather("norm")}
    gradients |= {name: gather(name) for name in given}
    if plan.momentum:
        gradients["mean"] = results["d_mean"][..., 0, 0]
    return gradients
