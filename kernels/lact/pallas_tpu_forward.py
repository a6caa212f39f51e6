"""Forward kernel of the LaCT op on TPUs: one pass over all chunks, the fast weights in VMEM.

A grid step is one block of tokens of a (row, chunk, head); chunks and their blocks run in order.
The weights, their momentum sums and the sums of the pending update never leave VMEM but for the
states that the op returns, which are copied to HBM while their chunk is at work. A chunk's last
block ends with the update.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refine_jax.kernels.lact.pallas_tpu_blocks import LANES, apply_block, nn, update_block
from refine_jax.kernels.lact.pallas_tpu_plan import LaCTPlan, rows
from refine_jax.kernels.lact.reference import EPS, FastState, Weights


def _rescale(base, norm, fused):
    """The factors [rows, 1] that give the rows of `base` the norms `norm` [rows, 1]."""
    square = jnp.sum(base * base, 1, keepdims=True)
    if fused:
        return norm * lax.rsqrt(square + EPS)
    return norm / (jnp.sqrt(square) + EPS)


def _row(column):
    """[128, 1] as [1, 128]."""
    return jnp.broadcast_to(column, (LANES, LANES)).T[:1]


def _kernel(plan: LaCTPlan, **refs):
    row, head, chunk, block = (pl.program_id(i) for i in range(4))
    last = plan.chunks - 1
    w02, w1, low02, low1t, sum1t = (refs[x] for x in ("w02", "w1", "low02", "low1t", "sum1t"))
    # What a chunk reads and what its update makes take turns.
    now, following = lax.rem(chunk, 2), lax.rem(chunk + 1, 2)
    # With momentum the sums of the update are added to the decayed momentum of the chunk before.
    sum02 = refs["sum02"]
    views = [plan.views(w02, w1)]
    if plan.momentum:
        views.append(plan.views(sum02.at[now], refs["m1"]))
    if plan.prenorm:
        views.append(plan.views(refs["a02"], refs["a1"]))
    groups = list(zip(plan.groups, views, strict=True))
    semaphores = refs["semaphores"]

    def copies_out():
        return [
            pltpu.make_async_copy(
                view,
                refs[f"{name}_out{i}"].at[row, chunk, head, there],
                semaphores.at[3 * group + i],
            )
            for group, (name, parts) in enumerate(groups)
            for i, there, view in parts
        ]

    def load_fresh():
        copies = [
            pltpu.make_async_copy(refs[f"fresh{i}"].at[head, there], view, semaphores.at[i])
            for i, there, view in views[0]
        ]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()
        if plan.momentum:
            refs["sum02"][now] = jnp.zeros_like(w02)
            refs["m1"][...] = jnp.zeros_like(w1)
        if plan.prenorm:
            refs["a02"][...] = w02[...]
            refs["a1"][...] = w1[...]

    def pair(tile):
        return rows(tile * 2 * plan.tile, 2 * plan.tile)

    def flat(tile):
        return rows(tile * plan.tile, plan.tile)

    def make_operands(tile):
        low02[now, pair(tile)] = w02[pair(tile)].astype(low02.dtype)
        low1t[now, flat(tile)] = w1[:, flat(tile)].astype(low1t.dtype).T

    @pl.when(block == 0)
    def _begin():
        begins = chunk == 0
        if plan.resets:
            begins |= refs["reset"][row * plan.chunks + chunk] != 0

        @pl.when(begins)
        def _restart():
            load_fresh()
            plan.each(plan.tiles, make_operands)

        for copy in copies_out():
            copy.start()

    def mean():
        return refs["mean"][(row * plan.chunks + chunk) * plan.heads + head]

    slices = [pl.ds(i, plan.sub) for i in range(0, plan.block, plan.sub)]

    def read(tile):
        for tokens in slices:
            q = refs["q"][tokens]
            out = apply_block(q, low02[now, pair(tile)], low1t[now, flat(tile)])
            if plan.tiles > 1:
                out += jnp.where(tile == 0, 0.0, refs["sum_out"][tokens])
                refs["sum_out"][tokens] = out
            refs["out"][tokens] = out.astype(q.dtype)

    def add_to_sums(tile):
        factors = [
            update_block(
                refs["k"][tokens],
                refs["v"][tokens],
                refs["rates"][:, tokens],
                low02[now, pair(tile)],
                low1t[now, flat(tile)],
            )
            for tokens in slices
        ]
        x02, x1 = (jnp.concatenate(x, 1) for x in zip(*factors, strict=True))
        first = block == 0
        add02, add1 = nn(x02, refs["k"][...]), nn(x1, refs["v"][...])
        if plan.momentum:
            decay = jnp.where(first, mean(), 1.0)
            add02 += decay * sum02[jnp.where(first, now, following), pair(tile)]
            sum02[following, pair(tile)] = add02
        else:
            sum02[0, pair(tile)] = add02 + jnp.where(first, 0.0, sum02[0, pair(tile)])
        sum1t[flat(tile)] = add1 + jnp.where(first, 0.0, sum1t[flat(tile)])

    def update_rows(target, total, here, step, matrix, start):
        """One step of 128 rows: their new values as operands."""
        total = refs[total] if plan.prenorm else target
        base = total[here] + step
        if plan.prenorm:
            total[here] = base
        scale = _rescale(base, refs[f"norm{matrix}"][rows(start)], plan.eps_inside)
        if plan.save_scales:
            refs["scales"][matrix : matrix + 1, rows(start)] = _row(scale)
        new = base * scale
        target[here] = new
        return new.astype(low02.dtype)

    def update_pair(half, start):
        here = rows(plan.pair_start(half, start))
        step = sum02[following if plan.momentum else 0, here]
        low02[following, here] = update_rows(w02, "a02", here, step, 2 * half, start)

    def update_flat(start):
        here = rows(start)
        step = sum1t[:, here].T
        if plan.momentum:
            step += mean() * refs["m1"][here]
            refs["m1"][here] = step
        low = update_rows(w1, "a1", here, step, 1, start)
        low1t[following, :, here] = low.T

    # Parts of 128 rows of W1 that are updated with a tile of W0 and W2.
    flat_parts = plan.dim // LANES // plan.tiles

    def update(tile):
        for half in (0, 1):
            for start in range(0, plan.tile, LANES):
                update_pair(half, tile * plan.tile + start)
        for part in range(flat_parts):
            update_flat((tile * flat_parts + part) * LANES)

    def wait():
        for copy in copies_out():
            copy.wait()

    ends = block == plan.blocks - 1

    @pl.when(chunk == last)
    def _last_chunk():
        plan.each(plan.tiles, read)
        pl.when(ends)(wait)

    if last > 0:

        @pl.when((chunk < last) & ends)
        def _last_block():
            # The states on their way out are what the update overwrites.
            wait()
            plan.each(plan.tiles, add_to_sums)

            def update_and_read(tile):
                # Reading is work for the matrix unit while the update occupies the others.
                update(tile)
                read(tile)

            plan.each(plan.tiles, update_and_read)
            for start in range(plan.tiles * flat_parts * LANES, plan.dim, LANES):
                update_flat(start)

    if last > 0 and plan.blocks > 1:

        @pl.when((chunk < last) & ~ends)
        def _block():

            def read_and_add(tile):
                read(tile)
                add_to_sums(tile)

            plan.each(plan.tiles, read_and_add)


def forward(
    plan: LaCTPlan, q, k, v, rates, mean, norms, fresh, reset
) -> tuple[jax.Array, FastState, jax.Array | None]:
    """Out, states, and the factors of the row rescalings [B, N, H, 3, max(F, d)] if asked for.

    q, k, v: [B, N, H, C, d]. rates: [B, N, H, 3, C]. mean: [B, N, H]. norms: [H, F, 1], [H, d, 1],
    [H, F, 1]. fresh: [H, ...]. reset: [B, N] int32.
    """
    operand = q.dtype
    stacked, flat = (2 * plan.hidden, plan.dim), (plan.dim, plan.hidden)
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    inputs = {
        "q": (q, plan.token_spec()),
        "k": (k, plan.token_spec(clip=True)),
        "v": (v, plan.token_spec(clip=True)),
        "rates": (rates, plan.rates_spec(clip=True)),
    }
    inputs |= {f"norm{i}": (norm, plan.head_spec(norm)) for i, norm in enumerate(norms)}
    inputs |= {f"fresh{i}": (w, in_hbm) for i, w in enumerate(fresh)}

    outputs = {"out": (q.shape, operand, plan.token_spec())}
    lead = (plan.batch, plan.chunks, plan.heads)
    square = (plan.hidden, plan.dim)
    for name in plan.groups:
        for i, shape in enumerate((square, flat, square)):
            outputs[f"{name}_out{i}"] = ((*lead, *shape), jnp.float32, in_hbm)
    if plan.save_scales:
        shape = (3, max(plan.hidden, plan.dim))
        outputs["scales"] = (*lead, *shape), jnp.float32, plan.chunk_spec(shape)

    parities = 2 if plan.momentum else 1
    scratch = {
        "w02": pltpu.VMEM(stacked, jnp.float32),
        "w1": pltpu.VMEM(flat, jnp.float32),
        "sum02": pltpu.VMEM((parities, *stacked), jnp.float32),
        "sum1t": pltpu.VMEM(square, jnp.float32),
        "low02": pltpu.VMEM((2, *stacked), operand),
        "low1t": pltpu.VMEM((2, *square), operand),
        "semaphores": pltpu.SemaphoreType.DMA((3 * len(plan.groups),)),
    }
    if plan.tiles > 1:
        scratch["sum_out"] = pltpu.VMEM((plan.block, plan.dim), jnp.float32)
    if plan.momentum:
        scratch["m1"] = pltpu.VMEM(flat, jnp.float32)
    if plan.prenorm:
        scratch |= {
            "a02": pltpu.VMEM(stacked, jnp.float32),
            "a1": pltpu.VMEM(flat, jnp.float32),
        }
    results = plan.call(_kernel, "lact_forward", mean, reset, inputs, outputs, scratch)
    states = {name: Weights(*(results[f"{name}_out{i}"] for i in range(3))) for name in plan.groups}
    return results["out"], FastState(**states), results.get("scales")
