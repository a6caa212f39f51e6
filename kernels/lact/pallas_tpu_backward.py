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
from refine_jax.kernels.lact.pallas_tpu_plan import LaCTPlan, rows
from refine_jax.kernels.lact.reference import EPS, Weights


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


def _kernel(plan: LaCTPlan, **refs):
    row, head = pl.program_id(0), pl.program_id(1)
    chunk, block = plan.chunk_index(pl.program_id(2)), pl.program_id(3)
    last, hidden, dim = plan.chunks - 1, plan.hidden, plan.dim
    d02, d1t = refs["weights_d02"], refs["d1t"]
    stack, stack_t, stack1, stack1_t = (refs[f"stack{x}"] for x in ("", "_t", "1", "1_t"))
    semaphores = refs["semaphores"]
    operand = stack.dtype

    def pairs(prefix):
        return refs[f"{prefix}02"], refs[f"{prefix}1"]

    # Parts of 128 rows of a matrix: the number of the matrix, and the first of its parts.
    starts = {0: 0, 2: hidden // LANES, 1: 2 * hidden // LANES}
    counts = {0: hidden // LANES, 2: hidden // LANES, 1: dim // LANES}

    def fetches(matrix, part):
        """Copies of what the end of the chunk needs from HBM, of one part of the rows."""
        width = hidden if matrix == 1 else dim
        slot = part % plan.fetch_slots
        return [
            pltpu.make_async_copy(
                refs[f"{name}{matrix}"].at[row, chunk, head, rows((part - starts[matrix]) * LANES)],
                refs[f"{name}_in"].at[slot, :, pl.ds(0, width)],
                semaphores.at[source, slot],
            )
            for source, name in enumerate(plan.fetched)
        ]

    def start_fetches(part):
        """Starts the copies of a part, of whichever matrix it is; of none behind the last."""
        for matrix, start in starts.items():

            def go(matrix=matrix):
                for copy in fetches(matrix, part):
                    copy.start()

            within = (start <= part) & (part < start + counts[matrix])
            if not isinstance(part, int):
                pl.when(within)(go)
            elif within:
                go()

    def copy_out(scratch, name):
        copies = [
            pltpu.make_async_copy(
                view, refs[f"{name}{i}"].at[row, head, there], semaphores.at[0, 0]
            )
            for i, there, view in plan.views(*pairs(scratch))
        ]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()

    def clear(ref):
        def part(i):
            ref[rows(i * LANES)] = jnp.zeros((LANES, ref.shape[1]), ref.dtype)

        plan.each(ref.shape[0] // LANES, part)

    @pl.when((chunk == last) & (block == 0))
    def _clear():
        kept = [f"{name}_d" for name in plan.groups] + (["fresh_d"] if plan.resets else [])
        for prefix in kept:
            for ref in pairs(prefix):
                clear(ref)
        for i in range(3):
            refs[f"d_norm{i}"][...] = jnp.zeros_like(refs[f"d_norm{i}"])

    def make_operands(tile):
        here = rows(tile * plan.tile, plan.tile)
        for half, name in enumerate(("w0", "w2")):
            within = slice(half * plan.tile, (half + 1) * plan.tile)
            low = refs[name][here].astype(operand)
            stack[tile, within] = low
            stack_t[tile, :, within] = low.T
        low = refs["w1"][:, here].astype(operand)
        stack1[tile, : plan.tile] = low.T
        stack1_t[tile, :, : plan.tile] = low

    @pl.when(block == 0)
    def _begin():
        for part in range(plan.fetch_slots):
            start_fetches(part)
        clear(d1t)
        plan.each(plan.tiles, make_operands)

    def add(name, tokens, gradient, tile):
        """Adds a tile's share, [features, tokens], to a gradient of tokens."""
        if plan.tiles > 1:
            gradient += jnp.where(tile == 0, 0.0, refs[f"sum_{name}"][:, tokens])
            refs[f"sum_{name}"][:, tokens] = gradient
        else:
            give(name, tokens, gradient)

    def give(name, tokens, gradient):
        if name == "d_rates":
            refs[name][:, tokens] = gradient
        else:
            refs[name][tokens] = gradient.T.astype(operand)

    def give_sums(*names):
        if plan.tiles > 1:
            for name in names:
                for tokens in slices:
                    give(name, tokens, refs[f"sum_{name}"][:, tokens])

    def apply_backward(tile, tokens):
        dq, z02, h = apply_block_backward(
            refs["q"][tokens],
            refs["d_out"][tokens],
            stack[tile, : 2 * plan.tile],
            stack1[tile, : plan.tile],
            stack_t[tile, :, : 2 * plan.tile],
        )
        add("dq", tokens, dq, tile)
        return z02, h

    slices = [pl.ds(i, plan.sub) for i in range(0, plan.block, plan.sub)]

    def add_to_weights(tile, d02_tile, d1t_tile):
        d02[rows(tile * 2 * plan.tile, 2 * plan.tile)] += d02_tile
        d1t[rows(tile * plan.tile, plan.tile)] += d1t_tile

    def read(tile):
        parts = [apply_backward(tile, tokens) for tokens in slices]
        z02, h = (jnp.concatenate(x, 1) for x in zip(*parts, strict=True))
        add_to_weights(tile, nn(z02, refs["q"][...]), nn(h, refs["d_out"][...]))

    @pl.when(chunk == last)
    def _read_only():
        plan.each(plan.tiles, read)
        give_sums("dq")
        for name in ("dk", "dv", "d_rates"):
            refs[name][...] = jnp.zeros_like(refs[name])

    def read_and_update(tile):
        parts = []
        for tokens in slices:
            z02, h = apply_backward(tile, tokens)
            dk, dv, d_rates, x02, x1 = update_block_backward(
                refs["k"][tokens],
                refs["v"][tokens],
                refs["rates"][:, tokens],
                stack[tile],
                stack1[tile],
                stack_t[tile],
                stack1_t[tile],
            )
            add("dk", tokens, dk, tile)
            add("dv", tokens, dv, tile)
            add("d_rates", tokens, d_rates, tile)
            parts.append((z02, x02, h, x1))
        z02, x02, h, x1 = (jnp.concatenate(x, 1) for x in zip(*parts, strict=True))
        add_to_weights(
            tile,
            nn(z02, refs["q"][...]) + nn(x02, refs["k"][...]),
            nn(h, refs["d_out"][...]) + nn(x1, refs["v"][...]),
        )

    if last > 0:

        @pl.when(chunk < last)
        def _read_and_update():
            plan.each(plan.tiles, read_and_update)
            give_sums("dq", "dk", "dv", "d_rates")

    def end(is_first: bool):
        """Completes the cotangents of the chunk's state, and takes them back through the update."""
        again = refs["reset"][row * plan.chunks + chunk] != 0 if plan.resets else None
        mean = (
            refs["mean"][(row * plan.chunks + chunk) * plan.heads + head] if plan.momentum else None
        )

        def end_rows(matrix, index, products):
            suffix, width = ("1", hidden) if matrix == 1 else ("02", dim)
            part, start = starts[matrix] + index, index * LANES
            within = rows(start)
            here = within if matrix == 1 else rows(plan.pair_start(matrix // 2, start))
            slot = part % plan.fetch_slots
            for copy in fetches(matrix, part):
                copy.wait()
            given = {name: refs[f"{name}_in"][slot, :, :width] for name in plan.fetched}
            kept = {name: refs[f"{name}_d{suffix}"] for name in plan.groups}
            cotangents = {name: ref[here] for name, ref in kept.items()}
            if matrix == 1:
                cotangents["weights"] += d1t[:, within].T
            if plan.momentum:
                # So far that of the momentum after the update, and of the step.
                step = cotangents["momentum"]
                summed = jnp.sum(step * given["momentum"], 0, keepdims=True)
                products += jnp.sum(summed, 1, keepdims=True)
                cotangents["momentum"] = step * mean
            for name in plan.cotangents:
                cotangents[name] += given[f"ct_{name}"]
            if plan.fetch_slots < plan.row_parts:
                start_fetches(part + plan.fetch_slots)
            if plan.resets:
                # A document begins: the state was the initial one whatever came before.
                fresh = cotangents["weights"] + cotangents.get("accumulator", 0.0)
                refs[f"fresh_d{suffix}"][here] += jnp.where(again, fresh, 0.0)
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
                keep_operands(matrix, start, d_step.astype(operand))
            for name, ref in kept.items():
                ref[here] = cotangents[name]
            return products

        products = jnp.zeros((1, 1), jnp.float32)
        for matrix in starts:
            products = plan.fold(counts[matrix], functools.partial(end_rows, matrix), products)
        if plan.momentum:
            refs["d_mean"][...] = jnp.broadcast_to(products, refs["d_mean"].shape)

    def keep_operands(matrix, start, low):
        """128 rows of the cotangents of the update sums, for the tokens of the chunk before."""
        if matrix == 1:
            here = rows(start)
            for tile in range(plan.tiles):
                columns = low[:, tile * plan.tile : (tile + 1) * plan.tile]
                stack1_t[tile, here, plan.tile :] = columns
                stack1[tile, plan.tile :, here] = columns.T
        else:
            tile = start // plan.tile
            here = rows((2 + matrix // 2) * plan.tile + start % plan.tile)
            stack[tile, here] = low
            stack_t[tile, :, here] = low.T

    ends = block == plan.blocks - 1

    @pl.when((chunk == 0) & ends)
    def _finish():
        end(is_first=True)
        for name in plan.groups:
            if name != "momentum":
                copy_out(f"{name}_d", f"d_{name}")
        if plan.resets:
            copy_out("fresh_d", "d_fresh")

    if last > 0:
        pl.when((chunk > 0) & ends)(lambda: end(is_first=False))


def backward(
    plan: LaCTPlan, q, k, v, rates, mean, norms, reset, states, scales, d_out, d_states
) -> dict[str, jax.Array | Weights]:
    """Gradients of `forward`, from its residuals and the cotangents of its outputs.

    Arguments as there; states and scales are its results. d_states: cotangents of the fields of
    the states, those named by `plan.cotangents`. Returns, by name: q, k, v; rates [B, N, H, 3, C];
    mean [B, N, H]; norms, [B, H, F, 1] or [B, H, d, 1]; weights, accumulator [B, H, ...] of the
    state to begin with; fresh [B, H, ...] where documents begin.
    """
    operand = q.dtype
    stacked, flat = (2 * plan.hidden, plan.dim), (plan.dim, plan.hidden)
    square = (plan.hidden, plan.dim)
    shapes = (square, flat, square)
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    inputs = {
        "q": (q, plan.token_spec()),
        "d_out": (d_out, plan.token_spec()),
        "k": (k, plan.token_spec(clip=True)),
        "v": (v, plan.token_spec(clip=True)),
        "rates": (rates, plan.rates_spec(clip=True)),
    }
    inputs |= {f"norm{i}": (norm, plan.head_spec(norm)) for i, norm in enumerate(norms)}
    for i, shape in enumerate(shapes):
        spec = plan.chunk_spec(shape, buffers=plan.weight_buffers)
        inputs[f"w{i}"] = states.weights[i], spec
    inputs["scales"] = scales, plan.chunk_spec(scales.shape[-2:], shift=-1)
    for name in plan.fetched:
        arrays = d_states[name.removeprefix("ct_")] if name != "momentum" else states.momentum
        inputs |= {f"{name}{i}": (array, in_hbm) for i, array in enumerate(arrays)}

    lead = (plan.batch, plan.chunks, plan.heads)
    heads = (plan.batch, plan.heads)
    outputs = {name: (q.shape, operand, plan.token_spec()) for name in ("dq", "dk", "dv")}
    outputs["d_rates"] = (rates.shape, jnp.float32, plan.rates_spec())
    if plan.momentum:
        outputs["d_mean"] = ((*lead, 1, LANES), jnp.float32, plan.chunk_spec((1, LANES)))
    for i, size in enumerate((plan.hidden, plan.dim, plan.hidden)):
        spec = pl.BlockSpec((None, None, size, 1), lambda b, h, *_: (b, h, 0, 0))
        outputs[f"d_norm{i}"] = ((*heads, size, 1), jnp.float32, spec)
    given = [name for name in plan.groups if name != "momentum"]
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
        "stack": pltpu.VMEM((plan.tiles, 4 * plan.tile, plan.dim), operand),
        "stack_t": pltpu.VMEM((plan.tiles, plan.dim, 4 * plan.tile), operand),
        "stack1": pltpu.VMEM((plan.tiles, 2 * plan.tile, plan.dim), operand),
        "stack1_t": pltpu.VMEM((plan.tiles, plan.dim, 2 * plan.tile), operand),
        "semaphores": pltpu.SemaphoreType.DMA((max(len(plan.fetched), 1), plan.fetch_slots)),
    }
    if plan.tiles > 1:
        for name, size in (("dq", plan.dim), ("dk", plan.dim), ("dv", plan.dim), ("d_rates", 3)):
            scratch[f"sum_{name}"] = pltpu.VMEM((size, plan.block), jnp.float32)
    for name in plan.groups:
        scratch |= pair(f"{name}_d")
    for name in plan.fetched:
        shape = (plan.fetch_slots, LANES, max(plan.dim, plan.hidden))
        scratch[f"{name}_in"] = pltpu.VMEM(shape, jnp.float32)
    if plan.resets:
        scratch |= pair("fresh_d")
    results = plan.call(_kernel, "lact_backward", mean, reset, inputs, outputs, scratch)

    def gather(name):
        return Weights(*(results[f"d_{name}{i}"] for i in range(3)))

    gradients = {"q": results["dq"], "k": results["dk"], "v": results["dv"]}
    gradients |= {"rates": results["d_rates"], "norms": gather("norm")}
    gradients |= {name: gather(name) for name in given}
    if plan.momentum:
        gradients["mean"] = results["d_mean"][..., 0, 0]
    return gradients
