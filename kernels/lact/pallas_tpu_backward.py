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


def _kernel(plan: Plan, names: tuple[str, ...], *refs):
    refs = dict(zip(names, refs, strict=True))
    row, head = pl.program_id(0), pl.program_id(1)
    chunk, block = plan.chunk_index(pl.program_id(2)), pl.program_id(3)
    last, hidden, dim = plan.chunks - 1, plan.hidden, plan.dim
    d02, d1, d1t = refs["weights_d02"], refs["weights_d1"], refs["d1t"]
    stack, stack_t, stack1, stack1_t = (refs[f"stack{x}"] for x in ("", "_t", "1", "1_t"))
    semaphores = refs["semaphores"]
    operand = stack.dtype

    def pairs(prefix):
        return refs[f"{prefix}02"], refs[f"{prefix}1"]

    def views(prefix):
        both, flat = pairs(prefix)
        return both.at[:hidden], flat, both.at[hidden:]

    def copies_in():
        """What the end of the chunk reads: the momentum and the cotangents of the states."""
        sources = ("momentum",) if plan.momentum else ()
        sources += tuple(f"ct_{name}" for name in plan.cotangents)
        return [
            pltpu.make_async_copy(
                refs[f"{name}{i}"].at[row, chunk, head],
                view,
                semaphores.at[3 * source + i],
            )
            for source, name in enumerate(sources)
            for i, view in enumerate(views(f"{name}_in"))
        ]

    def copy_out(scratch, name):
        copies = [
            pltpu.make_async_copy(view, refs[f"{name}{i}"].at[row, head], semaphores.at[i])
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
        for copy in copies_in():
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

    def restart():
        """A document begins with this chunk: all cotangents of its state are the initial ones'."""
        for (fresh02, fresh1), name in (
            (pairs("fresh_d"), name) for name in plan.groups if name != "momentum"
        ):
            both, flat = pairs(f"{name}_d")
            fresh02[...] += both[...]
            fresh1[...] += flat[...]
        for name in plan.groups:
            for ref in pairs(f"{name}_d"):
                ref[...] = jnp.zeros_like(ref)

    def update_rows(rows, suffix, weights, norm, d_norm, scale):
        """The cotangent of rows of the step of the update before the chunk."""
        ref = refs[f"weights_d{suffix}"]
        d_base, d_length = _rescale_backward(ref[rows], weights, norm, scale, plan.eps_inside)
        d_norm[...] += d_length
        if plan.prenorm:
            total = refs[f"accumulator_d{suffix}"]
            d_base += total[rows]
            total[rows] = d_base
            ref[rows] = jnp.zeros_like(d_base)
        else:
            ref[rows] = d_base
        if plan.momentum:
            step = refs[f"momentum_d{suffix}"]
            d_base += step[rows]
            step[rows] = d_base
        return d_base.astype(operand)

    def update():
        for start in range(0, 2 * hidden, LANES):
            half, inside = divmod(start, hidden)
            rows, within = slice(start, start + LANES), slice(inside, inside + LANES)
            low = update_rows(
                rows,
                "02",
                refs[f"w{2 * half}"][within],
                refs[f"norm{2 * half}"][within],
                refs[f"d_norm{2 * half}"].at[within],
                _column(refs["scales"][2 * half : 2 * half + 1, within]),
            )
            target = slice(2 * hidden + start, 2 * hidden + start + LANES)
            stack[target] = low
            stack_t[:, target] = low.T
        for start in range(0, dim, LANES):
            rows = slice(start, start + LANES)
            low = update_rows(
                rows,
                "1",
                refs["w1"][rows],
                refs["norm1"][rows],
                refs["d_norm1"].at[rows],
                _column(refs["scales"][1:2, rows]),
            )
            stack1_t[rows, hidden:] = low
            stack1[hidden:, rows] = low.T

    @pl.when(block == plan.blocks - 1)
    def _end():
        for copy in copies_in():
            copy.wait()
        d1[...] += d1t[...].T
        if plan.momentum:
            # d_momentum is that of the state after the update: of the step, once and for all.
            mean = refs["mean"][(row * plan.chunks + chunk) * plan.heads + head]
            total = jnp.zeros((1, 1), jnp.float32)
            for step, kept in zip(pairs("momentum_d"), pairs("momentum_in"), strict=True):
                product = jnp.sum(step[...] * kept[...], 0, keepdims=True)
                total += jnp.sum(product, 1, keepdims=True)
                step[...] *= mean
            refs["d_mean"][...] = jnp.broadcast_to(total, refs["d_mean"].shape)
        for name in plan.cotangents:
            for ref, given in zip(pairs(f"{name}_d"), pairs(f"ct_{name}_in"), strict=True):
                ref[...] += given[...]
        if plan.resets:
            pl.when(refs["reset"][row * plan.chunks + chunk] != 0)(restart)
        if last > 0:
            pl.when(chunk > 0)(update)

        @pl.when(chunk == 0)
        def _finish():
            for name in plan.groups:
                if name != "momentum" or plan.carry:
                    copy_out(f"{name}_d", f"d_{name}")
            if plan.resets:
                copy_out("fresh_d", "d_fresh")


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
        add(f"w{i}", states.weights[i], plan.chunk_spec(shape))
    add("scales", scales, plan.chunk_spec(scales.shape[-2:], shift=-1))
    fetched = ["momentum"] if plan.momentum else []
    if plan.momentum:
        for i, array in enumerate(states.momentum):
            add(f"momentum{i}", array, in_hbm)
    for name in plan.cotangents:
        fetched.append(f"ct_{name}")
        for i, array in enumerate(d_states[name]):
            add(f"ct_{name}{i}", array, in_hbm)

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
        "semaphores": pltpu.SemaphoreType.DMA((3 * max(len(fetched), 1),)),
    }
    for name in plan.groups:
        scratch |= pair(f"{name}_d")
    for name in fetched:
        scratch |= pair(f"{name}_in")
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
