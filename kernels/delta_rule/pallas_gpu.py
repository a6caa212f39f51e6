"""The delta rule on GPUs: Pallas kernels by way of Triton.

The WY form of xla.py, whose letters and formulas hold here, cut as is usual on GPUs:

    _prepare    a program a chunk and head: X = (I + A)^-1 and P
    _walk       a program a head and block of value columns: goes over the chunks with S in
                registers, writes U and the state before every chunk
    _read       a program a chunk, head and block of value columns: O = scale (g q S + P U)
    _walk_back  as _walk, from the last chunk: dS in registers, writes Z = X^T dU and dS
    _inside     a program a chunk and head: gradients by way of P and A, and of v
    _outside    a program a chunk, head and block of K: gradients of q and k by way of the states

A chunk has at most 64 tokens (float32: 32). The walks are the only sequential part and do nothing
that can be done elsewhere: 3 dependent products a chunk. X, P, U and the states of the chunks
(operand dtype, C + C + V + K V / C numbers a token and head) are kept for the backward pass, where
a fresh walk would cost as much as the forward pass; `jax.checkpoint` around a layer limits that to
one layer.

Products of float32 operands, in the triangular inverse and of float32 q, k and v, are three TF32
products each; sums of logarithms of decays are products of masks with three bfloat16 parts.

Tested in interpret mode and compiled ahead of time for H100 and A100; none of it has run on a GPU.
Block sizes come from the compiler's register counts, not from timings: with bfloat16 operands,
K = V = 128 and decays at most 56 bytes a thread spill on H100; on A100 _prepare spills 0.8 kB,
_inside and _outside 0.1 kB or less.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from refine_jax.kernels import triton
from refine_jax.kernels.delta_rule.xla import border_decays
from refine_jax.kernels.numerics import pad_axes
from refine_jax.kernels.triton import dot

_CHUNK = {jnp.dtype("bfloat16"): 64, jnp.dtype("float32"): 32}  # more spills float32 registers
_BLOCK = 64  # columns of K or V in one product
_WALK_BLOCK = 32  # columns of V in the state of one program: [K, 32] float32 in registers
_WARPS = 4
_MAX_KEY_DIM = 256
_STAGED_BYTES = 256  # of a token's key, up to which the loads of a walk run a chunk ahead


class _Plan(NamedTuple):
    """Static sizes: tokens of a chunk, chunks between saved states, saved states, output scale."""

    chunk: int
    per_save: int
    saves: int
    scale: float


def _chunk_of(chunk_size: int | None, v: jax.Array) -> int:
    """Tokens of a chunk: 16 to 64, as matrix units want it; the result does not depend on it."""
    largest = _CHUNK[v.dtype]
    return min(max(chunk_size or largest, 16), largest, triton.rounded_size(v.shape[1], largest))


def delta_rule_pallas_gpu(
    q, k, v, beta, log_decay, *, initial_state, document, scale, chunk_size, save_every
):
    """`delta_rule` of api.py on GPUs; on a CPU the kernels are interpreted.

    Raises:
      ValueError: for arrays and sizes that have no kernel.
    """
    tokens, dtype, value_dim = v.shape[1], v.dtype, v.shape[3]
    reason = None
    if dtype not in (jnp.float32, jnp.bfloat16):
        reason = f"v must be float32 or bfloat16. Got: {dtype}."
    elif k.shape[3] > _MAX_KEY_DIM:
        reason = (
            f"keys of more than {_MAX_KEY_DIM} numbers do not fit the registers; use "
            f"implementation='xla'. Got: k {k.shape}."
        )
    elif save_every is not None and save_every % _chunk_of(chunk_size, v):
        reason = (
            f"save_every must be a multiple of 16. Got: save_every={save_every}, "
            f"chunk_size={chunk_size}."
        )
    if reason is not None:
        raise ValueError(f"delta_rule with implementation='pallas_gpu': {reason}")
    chunk = _chunk_of(chunk_size, v)
    whole = -(-tokens // chunk) * chunk
    block = min(save_every or whole, whole)
    saves = -(-tokens // block)
    plan = _Plan(chunk, block // chunk, saves, float(scale))
    key_size = triton.rounded_size(k.shape[3], _BLOCK)
    value_size = triton.rounded_size(value_dim, _BLOCK)

    def fill(x, size=None, dtype=jnp.float32):
        """Whole blocks of tokens, and of the last axis; what is added changes no state."""
        if x is None:
            return None
        last = 0 if size is None else size - x.shape[-1]
        return pad_axes(x.astype(dtype), {-1: (0, last), 1: (0, saves * block - x.shape[1])})

    segment = None
    if document is not None:
        starts = document[:, 1:] != document[:, :-1]
        starts = fill(pad_axes(starts, {1: (1, 0)}), dtype=jnp.int32)
        chunks = starts.reshape(starts.shape[0], -1, chunk)
        segment = jnp.cumsum(chunks, axis=-1, dtype=jnp.int32).reshape(starts.shape)
    state_pad = {2: (0, key_size - k.shape[3]), 3: (0, value_size - value_dim)}
    arrays = {
        "q": fill(q, key_size, dtype),
        "k": fill(k, key_size, dtype),
        "v": fill(v, value_size, dtype),
        "beta": fill(beta),
        "log_decay": fill(log_decay),
        "segment": segment,
        "state": pad_axes(initial_state, state_pad),
    }
    out, final, saved = _delta_rule(plan, arrays)

    def cut(state):
        return state[..., : k.shape[3], :value_dim]

    out = None if q is None else out[:, :tokens, :, :value_dim]
    return out, cut(final), None if save_every is None else cut(saved)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta_rule(plan, arrays):
    """Output, final state and saved states of arrays whose sizes fit the kernels.

    q, k [B, T, H, K] (q may be None), v [B, T, Hv, V] in one dtype; beta, log_decay (or None)
    [B, T, Hv] float32; segment [B, T] int32 or None, resets since the start of the chunk; state
    [B, Hv, K, V] float32.
    """
    return _forward(plan, arrays, keep=False)[0]


class _Kernel(NamedTuple):
    """What a kernel reads and writes, of what there is, and what a program of it goes over."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    by_chunk: bool = True  # else a program goes over all chunks
    key_block: int | None = None  # columns of K and V of a program, all if None
    value_block: int | None = None


# Axes of arrays by their names, a letter an axis: rows b, tokens t, chunks n, tokens of a chunk c,
# saved states s, key heads g, value heads h, K, V, and blocks of K i. `d_` is a gradient.
_AXES = {
    "btgK": ("q", "k"),
    "bthK": ("d_q", "d_k"),
    "bthV": ("v", "u", "z", "out", "d_v", "d_out"),
    "bth": ("beta", "log_decay", "from_start", "to_end", "d_beta", "d_log_decay"),
    "bt": ("segment",),
    "bhtc": ("inverse", "p", "d_kk", "d_qk"),
    "bhnKV": ("states", "d_states"),
    "bhKV": ("state", "final", "d_state", "d_final"),
    "bshKV": ("saved", "d_saved"),
    "ibth": ("d_k_seen", "d_start", "d_end"),
    "ibnh": ("d_total",),
}
_AXES_OF = {name: axes for axes, names in _AXES.items() for name in names}
_FLOAT32 = ("bth", "bhKV", "bshKV", "ibth", "ibnh")


def _run(kernel, plan, arrays, without):
    """Call a kernel on those of its inputs that `arrays` has: its outputs by name.

    without: names of outputs that are not needed.
    """
    cut = _KERNELS[kernel]
    batch, tokens, heads, key_dim = arrays["k"].shape
    value_heads, value_dim = arrays["v"].shape[2:]
    dtype, group, chunk = arrays["v"].dtype, value_heads // heads, plan.chunk
    chunks = tokens // chunk
    keys = min(cut.key_block or key_dim, key_dim)
    values = min(cut.value_block or value_dim, value_dim)
    key_blocks, value_blocks = key_dim // keys, value_dim // values
    span, states = (chunk, None) if cut.by_chunk else (tokens, chunks)
    grid = (key_blocks * value_blocks * (chunks if cut.by_chunk else 1), value_heads, batch)
    sizes = {
        **{"b": batch, "t": tokens, "n": chunks, "c": chunk, "s": plan.saves, "g": heads},
        **{"h": value_heads, "K": key_dim, "V": value_dim, "i": key_blocks},
    }
    blocks = dict.fromkeys("bghi") | {"t": span, "n": states, "c": chunk, "s": plan.saves}
    blocks |= {"K": keys, "V": values}

    def spec(axes):
        def place(program, h, b):
            rest, j = program // value_blocks, program % value_blocks
            n, i = rest // key_blocks, rest % key_blocks
            at = {"b": b, "t": n, "n": n, "c": 0, "s": 0, "g": h // group, "h": h}
            at |= {"K": i, "V": j, "i": i}
            return tuple(at[axis] for axis in axes)

        return pl.BlockSpec(tuple(blocks[axis] for axis in axes), place)

    def output(axes):
        # Gradients of the value heads of one key head are added up outside.
        is_wide = axes in _FLOAT32 or (axes == "bthK" and group > 1)
        shape = tuple(sizes[axis] for axis in axes)
        return jax.ShapeDtypeStruct(shape, jnp.float32 if is_wide else dtype)

    inputs = {name: arrays[name] for name in cut.inputs if arrays.get(name) is not None}
    outputs = {name: output(_AXES_OF[name]) for name in cut.outputs if name not in without}
    # The loads of two chunks of a walk at a time would not fit into shared memory.
    stages = 1 if not cut.by_chunk and key_dim * dtype.itemsize > _STAGED_BYTES else 2
    return triton.call(
        functools.partial(kernel, plan),
        grid=grid,
        inputs=inputs,
        outputs=outputs,
        specs={name: spec(_AXES_OF[name]) for name in (*inputs, *outputs)},
        warps=_WARPS,
        stages=stages,
        name=f"delta_rule{kernel.__name__}",
    )


def _decays(plan, arrays):
    """Decays since the start of a chunk and to its end, float32 [B, T, Hv], if there are any."""
    log_decay, segment = arrays["log_decay"], arrays["segment"]
    if log_decay is None and segment is None:
        return {}
    batch, tokens, heads = shape = arrays["beta"].shape
    chunks = batch, tokens // plan.chunk, plan.chunk, heads
    log_decay = None if log_decay is None else log_decay.reshape(chunks)
    segment = None if segment is None else segment.reshape(*chunks[:3], 1)
    decays = border_decays(log_decay, segment, chunks, axis=2)
    return dict(zip(("from_start", "to_end"), (x.reshape(shape) for x in decays), strict=True))


def _forward(plan, arrays, *, keep=True):
    """(output, final state, saved states), and what the backward pass needs."""
    has_q = arrays["q"] is not None
    without = () if has_q else ("p",) if keep else ("p", "u", "states")
    every = arrays | _decays(plan, arrays)
    for kernel in (_prepare, _walk, _read) if has_q else (_prepare, _walk):
        every |= _run(kernel, plan, every, without)
    kept = arrays | {name: every.get(name) for name in ("inverse", "p", "u", "states")}
    return (every.get("out"), every["final"], every["saved"]), kept


def _backward(plan, kept, cotangents):
    """Gradients of the arrays of `_delta_rule`."""
    q, k, log_decay = (kept[name] for name in ("q", "k", "log_decay"))
    without = () if q is not None else ("d_qk", "d_q")
    without += () if log_decay is not None else ("d_log_decay", "d_start", "d_end", "d_total")
    every = kept | _decays(plan, kept)
    every |= zip(("d_out", "d_final", "d_saved"), cotangents, strict=True)
    for kernel in (_walk_back, _inside, _outside):
        every |= _run(kernel, plan, every, without)
    if log_decay is not None:
        # log_decay of a token is part of from_start from there on, of to_end before it, and of the
        # decay of the state over the whole chunk.
        chunks = log_decay.shape[0], -1, plan.chunk, log_decay.shape[2]
        d_start, d_end = (every[name].sum(axis=0).reshape(chunks) for name in ("d_start", "d_end"))
        behind = lax.cumsum(d_start, axis=2, reverse=True)
        before = lax.cumsum(d_end[:, :, :-1], axis=2)
        d_log = behind + pad_axes(before, {2: (1, 0)})
        d_log += every["d_total"].sum(axis=0)[:, :, None]
        every["d_log_decay"] += d_log.reshape(log_decay.shape)

    def per_key_head(x, like):
        if x is None or x.shape == like.shape:
            return x
        return x.reshape(*like.shape[:3], -1, like.shape[3]).sum(axis=3).astype(like.dtype)

    gradients = {name: every.get(f"d_{name}") for name in ("v", "log_decay", "segment", "state")}
    gradients |= {"q": per_key_head(every.get("d_q"), q), "k": per_key_head(every["d_k"], k)}
    gradients["beta"] = every["d_beta"] - every["d_k_seen"].sum(axis=0)
    return (gradients,)


_delta_rule.defvjp(_forward, _backward)


def _indices(chunk):
    """Numbers of the rows and of the columns of a [C, C] block."""
    shape = (chunk, chunk)
    return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)


def _pieces(size):
    """Slices of at most 64 of an axis, for products that sum over it."""
    block = min(size, _BLOCK)
    return [pl.ds(i, block) for i in range(0, size, block)]


def _load(ref, *at):
    """Pieces [64, V] of the states [K, V] at a place in a reference [..., K, V]."""
    return tuple(ref[(*at, piece, slice(None))] for piece in _pieces(ref.shape[-2]))


def _store(ref, state, *at):
    """Put the pieces of a state where `_load` finds them."""
    for piece, part in zip(_pieces(ref.shape[-2]), state, strict=True):
        ref[(*at, piece, slice(None))] = part


def _recall(ref, at, state):
    """Multiply tokens [C, K] of a reference by a state in pieces: [C, V]."""
    pieces = zip(_pieces(ref.shape[-1]), state, strict=True)
    return functools.reduce(lambda total, x: total + dot(ref[at, x[0]], x[1]), pieces, 0.0)


def _write(state, ref, at, x):
    """Add the product of tokens [C, K] of a reference, transposed, and x [C, V] to a state."""
    return tuple(
        part + dot(ref[at, piece], x, transpose_a=True)
        for piece, part in zip(_pieces(ref.shape[-1]), state, strict=True)
    )


def _forget(plan, inputs, n, state):
    """Decay a state over chunk n."""
    if "from_start" not in inputs:
        return state
    total = inputs["from_start"][n * plan.chunk + plan.chunk - 1]
    return [part * total for part in state]


def _column(inputs, name, at=...):
    """Numbers of tokens as a column [C, 1]; None where there are none of this name."""
    return inputs[name][at][:, None] if name in inputs else None


def _times(x, factor):
    return x if factor is None else x * factor


def _scores(plan, inputs):
    """k k^T, q k^T (None without q) and the decay between the tokens of a chunk (None without any).

    All are [C, C]. The decay has no meaning above the diagonal.
    """
    kk = qk = 0.0
    for piece in _pieces(inputs["k"].shape[-1]):
        k = inputs["k"][:, piece]
        kk += dot(k, k, transpose_b=True)
        if "q" in inputs:
            qk += dot(inputs["q"][:, piece], k, transpose_b=True)
    decay = None
    if "log_decay" in inputs:
        row, col = _indices(plan.chunk)
        after = jnp.where(row > col, _column(inputs, "log_decay"), 0.0)
        decay = jnp.exp(triton.mask_dot(row >= col, after))
    if "segment" in inputs:
        segment = inputs["segment"][...]
        same = segment[:, None] == segment[None, :]
        decay = jnp.where(same, 1.0 if decay is None else decay, 0.0)
    return kk, qk if "q" in inputs else None, decay


def _sum_over_values(inputs, products, *shapes):
    """Sums, of these shapes, of what `products` gives for blocks of value columns (slices)."""
    size = inputs["u"].shape[1]
    block = min(size, _BLOCK)

    def add(j, sums):
        found = products(pl.ds(j * block, block))
        return tuple(a + b for a, b in zip(sums, found, strict=True))

    zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    return lax.fori_loop(0, size // block, add, zeros)


def _prepare(plan, inputs, outputs):
    """X = (I + A)^-1 and P of one chunk, by doubling the inverted diagonal blocks of A (xla.py)."""
    dtype = inputs["k"].dtype
    row, col = _indices(plan.chunk)
    kk, qk, decay = _scores(plan, inputs)
    if qk is not None:
        outputs["p"][...] = jnp.where(row >= col, _times(qk, decay), 0.0).astype(dtype)
    a = _column(inputs, "beta") * _times(kk, decay)
    x = (row == col).astype(jnp.float32)
    size = 1
    while size < plan.chunk:
        joined = ((row & -2 * size) == (col & -2 * size)) & ((row & size) > (col & size))
        below = jnp.where(joined, a, 0.0)
        x -= below if size == 1 else dot(dot(x, below), x)
        size *= 2
    outputs["inverse"][...] = x.astype(dtype)


def _walk(plan, inputs, outputs):
    """The state over all chunks, for one block of value columns."""
    k, dtype = inputs["k"], inputs["k"].dtype

    def step(n, state):
        at = pl.ds(n * plan.chunk, plan.chunk)
        low = [part.astype(dtype) for part in state]
        if "u" in outputs:
            _store(outputs["states"], low, n)
        seen = _times(_recall(k, at, low), _column(inputs, "from_start", at))
        error = _column(inputs, "beta", at) * (inputs["v"][at, :].astype(jnp.float32) - seen)
        u = dot(inputs["inverse"][at, :], error.astype(dtype))
        if "u" in outputs:
            outputs["u"][at, :] = u.astype(dtype)
        u = _times(u, _column(inputs, "to_end", at)).astype(dtype)
        return _write(_forget(plan, inputs, n, state), k, at, u)

    def block(m, state):
        _store(outputs["saved"], state, m)
        first = m * plan.per_save
        return lax.fori_loop(0, plan.per_save, lambda i, state: step(first + i, state), state)

    _store(outputs["final"], lax.fori_loop(0, plan.saves, block, _load(inputs["state"])))


def _read(plan, inputs, outputs):
    """The output of one chunk and block of value columns."""
    seen = _recall(inputs["q"], slice(None), _load(inputs["states"]))
    seen = _times(seen, _column(inputs, "from_start"))
    out = plan.scale * (seen + dot(inputs["p"][...], inputs["u"][...]))
    outputs["out"][...] = out.astype(outputs["out"].dtype)


def _walk_back(plan, inputs, outputs):
    """The gradient of the state over all chunks, backwards, for one block of value columns.

    With dS the gradient of the state behind a chunk, dU = scale P^T dO + D_C k dS, Z = X^T dU (the
    gradient of beta (v - g k S)), and the gradient of the state before it is

        g_C dS + scale (g q)^T dO - (beta g k)^T Z
    """
    k, dtype = inputs["k"], inputs["k"].dtype

    def step(n, d_state):
        at = pl.ds(n * plan.chunk, plan.chunk)
        low = [part.astype(dtype) for part in d_state]
        _store(outputs["d_states"], low, n)
        d_u = _times(_recall(k, at, low), _column(inputs, "to_end", at))
        from_start = _column(inputs, "from_start", at)
        d_state = _forget(plan, inputs, n, d_state)
        if "q" in inputs:
            d_out = inputs["d_out"][at, :]
            d_u += plan.scale * dot(inputs["p"][at, :], d_out, transpose_a=True)
            d_seen = _times(plan.scale, from_start) * d_out.astype(jnp.float32)
            d_state = _write(d_state, inputs["q"], at, d_seen.astype(dtype))
        z = dot(inputs["inverse"][at, :], d_u.astype(dtype), transpose_a=True)
        outputs["z"][at, :] = z.astype(dtype)
        d_seen = _times(-_column(inputs, "beta", at), from_start) * z
        return _write(d_state, k, at, d_seen.astype(dtype))

    def block(i, d_state):
        m = plan.saves - 1 - i
        last = (m + 1) * plan.per_save - 1
        d_state = lax.fori_loop(0, plan.per_save, lambda i, d: step(last - i, d), d_state)
        return tuple(a + b for a, b in zip(d_state, _load(inputs["d_saved"], m), strict=True))

    _store(outputs["d_state"], lax.fori_loop(0, plan.saves, block, _load(inputs["d_final"])))


def _inside(plan, inputs, outputs):
    """Gradients of one chunk from U, Z and dO: of P and A (as those of q k^T and k k^T), of v, and
    what of those of beta and log_decay comes by way of them.
    """
    dtype, square = inputs["k"].dtype, (plan.chunk, plan.chunk)
    has_q = "q" in inputs
    row, col = _indices(plan.chunk)
    beta = _column(inputs, "beta")

    def products(at):
        z, u = inputs["z"][:, at], inputs["u"][:, at]
        wide = z.astype(jnp.float32)
        outputs["d_v"][:, at] = (beta * wide).astype(dtype)
        d_beta = jnp.sum(wide * inputs["v"][:, at].astype(jnp.float32), axis=1)
        d_a = dot(z, u, transpose_b=True)
        d_p = dot(inputs["d_out"][:, at], u, transpose_b=True) if has_q else 0.0
        return d_p, d_a, d_beta

    d_p, d_a, d_beta = _sum_over_values(inputs, products, square, square, square[:1])
    kk, qk, decay = _scores(plan, inputs)
    d_a = jnp.where(row > col, -_times(d_a, decay), 0.0)
    outputs["d_beta"][...] = d_beta + jnp.sum(d_a * kk, axis=1)
    d_kk = beta * d_a
    d_log = d_kk * kk
    if has_q:
        d_qk = jnp.where(row >= col, plan.scale * _times(d_p, decay), 0.0)
        d_log += d_qk * qk
        outputs["d_qk"][...] = d_qk.astype(dtype)
    # Both of the equal factors of k k^T have a gradient.
    outputs["d_kk"][...] = (d_kk + d_kk.T).astype(dtype)
    if "d_log_decay" in outputs:
        # log_decay of token j is part of D_ri for i < j <= r.
        spans = triton.mask_dot(col >= row, d_log)
        outputs["d_log_decay"][...] = jnp.sum(jnp.where(row > col, spans, 0.0), axis=1)


def _outside(plan, inputs, outputs):
    """Gradients of 64 columns of q and k of one chunk, from the state before it (which q and k
    read) and the gradient of the state behind it (to which k and U write).

    Of beta (d_k_seen, to be subtracted) and of the logarithms of the decays from_start, to_end and
    of the state it gives what these columns contribute.
    """
    has_q, is_gated = "q" in inputs, "d_total" in outputs
    k = inputs["k"][...]

    def products(at):
        state, d_state = inputs["states"][:, at], inputs["d_states"][:, at]
        d_q = dot(inputs["d_out"][:, at], state, transpose_b=True) if has_q else 0.0
        d_seen = dot(inputs["z"][:, at], state, transpose_b=True)
        d_k_end = dot(inputs["u"][:, at], d_state, transpose_b=True)
        product = state.astype(jnp.float32) * d_state.astype(jnp.float32) if is_gated else None
        return d_q, d_seen, d_k_end, jnp.sum(product, axis=1) if is_gated else 0.0

    sums = _sum_over_values(inputs, products, *[k.shape] * 3, k.shape[1:])
    d_q, d_seen, d_k_end, d_total = sums
    from_start = _column(inputs, "from_start")
    d_seen = _times(d_seen, from_start)
    d_k_end = _times(d_k_end, _column(inputs, "to_end"))
    beta, wide = inputs["beta"][...], k.astype(jnp.float32)
    d_k_seen = jnp.sum(d_seen * wide, axis=1)
    outputs["d_k_seen"][...] = d_k_seen
    d_start = -beta * d_k_seen
    d_k = d_k_end - beta[:, None] * d_seen + dot(inputs["d_kk"][...], k)
    if has_q:
        q, d_qk = inputs["q"][...], inputs["d_qk"][...]
        d_q *= _times(plan.scale, from_start)
        d_start += jnp.sum(d_q * q.astype(jnp.float32), axis=1)
        outputs["d_q"][...] = (d_q + dot(d_qk, k)).astype(outputs["d_q"].dtype)
        d_k += dot(d_qk, q, transpose_a=True)
    outputs["d_k"][...] = d_k.astype(outputs["d_k"].dtype)
    if is_gated:
        outputs["d_start"][...] = d_start
        outputs["d_end"][...] = jnp.sum(d_k_end * wide, axis=1)
        outputs["d_total"][...] = inputs["from_start"][plan.chunk - 1] * jnp.sum(d_total)


_DECAYS = ("beta", "from_start", "to_end")
_KERNELS = {
    _prepare: _Kernel(("q", "k", "beta", "log_decay", "segment"), ("inverse", "p")),
    _walk: _Kernel(
        ("k", "v", *_DECAYS, "inverse", "state"),
        ("final", "saved", "u", "states"),
        by_chunk=False,
        value_block=_WALK_BLOCK,
    ),
    _read: _Kernel(("q", "p", "u", "from_start", "states"), ("out",), value_block=_BLOCK),
    _walk_back: _Kernel(
        ("q", "k", "d_out", *_DECAYS, "inverse", "p", "d_final", "d_saved"),
        ("z", "d_states", "d_state"),
        by_chunk=False,
        value_block=_WALK_BLOCK,
    ),
    _inside: _Kernel(
        ("q", "k", "v", "beta", "log_decay", "segment", "d_out", "u", "z"),
        ("d_v", "d_beta", "d_kk", "d_qk", "d_log_decay"),
    ),
    _outside: _Kernel(
        ("q", "k", *_DECAYS, "d_out", "u", "z", "states", "d_states", "d_kk", "d_qk"),
        ("d_k", "d_k_seen", "d_q", "d_start", "d_end", "d_total"),
        key_block=_BLOCK,
    ),
}
