"""The delta rule on GPUs: Pallas kernels by way of Triton.

The WY form of xla.py, whose letters and formulas hold here, cut as is usual on GPUs. A program
makes what belongs to a chunk and head (and block of columns). In two walks over the chunks, a
program for each head and block of value columns keeps the state S, or its gradient, in registers.

A chunk has at most 64 tokens (float32: 32). The walks are the only sequential part and do nothing
that can be done elsewhere: 3 dependent products a chunk. X, P, U and the states of the chunks
(operand dtype, C + C + V + K V / C numbers a token and head) are kept for the backward pass, where
a fresh walk would cost as much as the forward pass; `jax.checkpoint` limits that to one layer.

Products of float32 operands, in the triangular inverse and of float32 q, k and v, are three TF32
products each; sums of logarithms of decays are products of masks with three bfloat16 parts.

Tested in interpret mode and compiled ahead of time for H100 and A100; none of it has run on a GPU.
Block sizes come from the compiler's register counts, not from timings: with bfloat16 operands,
K = V = 128 and decays at most 56 bytes a thread spill on H100; on A100 _prepare spills 0.8 kB,
_inside and _outside 0.1 kB or less.
"""

from __future__ import annotations

import functools
import inspect
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
_MAX_KEY_DIM = 256
_STAGED_BYTES = 256  # of a token's key, up to which the loads of a walk run a chunk ahead


class _Plan(NamedTuple):
    """Static sizes: tokens of a chunk, chunks between saved states, saved states, output scale."""

    chunk: int
    per_save: int
    saves: int
    scale: float


def delta_rule_pallas_gpu(
    q, k, v, beta, log_decay, *, initial_state, document, scale, chunk_size, save_every
):
    """`delta_rule` of api.py on GPUs; on a CPU the kernels are interpreted.

    Raises:
      ValueError: for arrays and sizes that have no kernel.
    """
    tokens, dtype, value_dim = v.shape[1], v.dtype, v.shape[3]
    op = "delta_rule with implementation='pallas_gpu'"
    if dtype not in _CHUNK:
        raise ValueError(f"{op}: v must be float32 or bfloat16. Got: {dtype}.")
    if k.shape[3] > _MAX_KEY_DIM:
        raise ValueError(
            f"{op}: keys of more than {_MAX_KEY_DIM} numbers do not fit the registers; use "
            f"implementation='xla'. Got: k {k.shape}."
        )
    # 16 to 64 tokens, as matrix units want it; the result does not depend on it.
    largest = _CHUNK[dtype]
    chunk = min(max(chunk_size or largest, 16), largest, triton.rounded_size(tokens, largest))
    if save_every is not None and save_every % chunk:
        raise ValueError(
            f"{op}: save_every must be a multiple of 16. Got: save_every={save_every}, "
            f"chunk_size={chunk_size}."
        )
    whole = -(-tokens // chunk) * chunk
    block = min(save_every or whole, whole)
    saves = -(-tokens // block)
    plan = _Plan(chunk, block // chunk, saves, float(scale))
    key_pad, value_pad = ((0, triton.rounded_size(n, _BLOCK) - n) for n in (k.shape[3], value_dim))

    def fill(x, last=(0, 0), dtype=jnp.float32):
        """Whole blocks of tokens, and of the last axis; what is added changes no state."""
        if x is None:
            return None
        return pad_axes(x.astype(dtype), {-1: last, 1: (0, saves * block - tokens)})

    segment = None
    if document is not None:
        starts = pad_axes(document[:, 1:] != document[:, :-1], {1: (1, 0)})
        chunks = fill(starts, dtype=jnp.int32).reshape(starts.shape[0], -1, chunk)
        segment = jnp.cumsum(chunks, axis=-1, dtype=jnp.int32).reshape(starts.shape[0], -1)
    arrays = {
        "q": fill(q, key_pad, dtype),
        "k": fill(k, key_pad, dtype),
        "v": fill(v, value_pad, dtype),
        "beta": fill(beta),
        "log_decay": fill(log_decay),
        "segment": segment,
        "state": pad_axes(initial_state, {2: key_pad, 3: value_pad}),
    }
    out, *states = _delta_rule(plan, arrays)
    final, saved = (x[..., : k.shape[3], :value_dim] for x in states)
    out = None if q is None else out[:, :tokens, :, :value_dim]
    return out, final, None if save_every is None else saved


class _Kernel(NamedTuple):
    """What a kernel writes, where it is wanted, and what a program of it goes over."""

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
    """Call a kernel on those of `arrays` that its arguments name: its outputs by name.

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
    sizes = {"b": batch, "t": tokens, "n": chunks, "c": chunk, "s": plan.saves, "g": heads}
    sizes |= {"h": value_heads, "K": key_dim, "V": value_dim, "i": key_blocks}
    blocks = sizes | dict.fromkeys("bghi") | {"K": keys, "V": values}
    if cut.by_chunk:
        blocks |= {"t": chunk, "n": None}

    def place(program, h, b):
        rest, j = lax.div(program, value_blocks), lax.rem(program, value_blocks)
        n, i = lax.div(rest, key_blocks), lax.rem(rest, key_blocks)
        at = {"b": b, "t": n, "n": n, "c": 0, "s": 0, "g": lax.div(h, group), "h": h}
        return at | {"K": i, "V": j, "i": i}

    def dtype_of(axes):
        # Gradients of the value heads of one key head are added up outside.
        return jnp.float32 if axes in _FLOAT32 or (axes == "bthK" and group > 1) else dtype

    names = [x for x in inspect.signature(kernel).parameters if x not in cut.outputs]
    # The loads of two chunks of a walk at a time would not fit into shared memory.
    stages = 1 if not cut.by_chunk and key_dim * dtype.itemsize > _STAGED_BYTES else 2
    return triton.call(
        functools.partial(kernel, plan),
        f"delta_rule{kernel.__name__}",
        (key_blocks * value_blocks * (chunks if cut.by_chunk else 1), value_heads, batch),
        {name: arrays[name] for name in names if arrays.get(name) is not None},
        {name: dtype_of(_AXES_OF[name]) for name in cut.outputs if name not in without},
        axes=_AXES_OF,
        sizes=sizes,
        blocks=blocks,
        place=place,
        warps=4,
        stages=stages,
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
    from_start, to_end = border_decays(log_decay, segment, chunks, axis=2)
    return {"from_start": from_start.reshape(shape), "to_end": to_end.reshape(shape)}


def _forward(plan, arrays, *, keep=True):
    """(output, final state, saved states) and, with keep, what the backward pass needs.

    Arrays have the axes above, in sizes that fit the kernels. q, log_decay and segment, the resets
    since the start of a chunk, may be None. q, k, v have one dtype, others but segment float32.
    """
    has_q = arrays["q"] is not None
    without = () if has_q else ("p",) if keep else ("p", "u", "states")
    every = arrays | _decays(plan, arrays)
    for kernel in (_prepare, _walk, _read) if has_q else (_prepare, _walk):
        every |= _run(kernel, plan, every, without)
    outs = every.get("out"), every["final"], every["saved"]
    kept = ("inverse", "p", "u", "states")
    return (outs, arrays | {name: every.get(name) for name in kept}) if keep else outs


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
        # It is part of from_start from its token on, of to_end before, and of the state's decay.
        chunks = log_decay.shape[0], -1, plan.chunk, log_decay.shape[2]
        d_start, d_end = (every[name].sum(axis=0).reshape(chunks) for name in ("d_start", "d_end"))
        before = pad_axes(lax.cumsum(d_end[:, :, :-1], axis=2), {2: (1, 0)})
        d_log = lax.cumsum(d_start, axis=2, reverse=True) + before
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


_delta_rule = jax.custom_vjp(functools.partial(_forward, keep=False), nondiff_argnums=(0,))
_delta_rule.defvjp(_forward, _backward)


def _indices(chunk):
    """Numbers of the rows and of the columns of a [C, C] block."""
    return tuple(lax.broadcasted_iota(jnp.int32, (chunk, chunk), axis) for axis in (0, 1))


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


def _forget(plan, from_start, n, state):
    """Decay a state over chunk n, if there are decays since the start of chunks."""
    if from_start is None:
        return state
    total = from_start[n * plan.chunk + plan.chunk - 1]
    return [part * total for part in state]


def _column(ref, at=...):
    """Numbers of tokens as a column [C, 1], if there are any."""
    return None if ref is None else ref[at][:, None]


def _times(x, factor):
    return x if factor is None else x * factor


def _scores(plan, k, q, log_decay, segment):
    """k k^T, q k^T (None without q) and the decay between the tokens of a chunk (None without any).

    All are [C, C]. The decay has no meaning above the diagonal.
    """
    kk = qk = 0.0
    for piece in _pieces(k.shape[-1]):
        keys = k[:, piece]
        kk += dot(keys, keys, transpose_b=True)
        if q is not None:
            qk += dot(q[:, piece], keys, transpose_b=True)
    decay = None
    if log_decay is not None:
        row, col = _indices(plan.chunk)
        after = jnp.where(row > col, _column(log_decay), 0.0)
        decay = jnp.exp(triton.mask_dot(row >= col, after))
    if segment is not None:
        same = segment[...][:, None] == segment[...][None, :]
        decay = jnp.where(same, 1.0 if decay is None else decay, 0.0)
    return kk, None if q is None else qk, decay


def _sum_over_values(size, products, *shapes):
    """Sums, of these shapes, of what `products` gives for blocks of value columns (slices)."""
    block = min(size, _BLOCK)

    def add(j, sums):
        found = products(pl.ds(j * block, block))
        return tuple(a + b for a, b in zip(sums, found, strict=True))

    return lax.fori_loop(0, size // block, add, tuple(jnp.zeros(x, jnp.float32) for x in shapes))


def _prepare(plan, k, beta, inverse, q=None, p=None, log_decay=None, segment=None):
    """X = (I + A)^-1 and P of one chunk, by doubling the inverted diagonal blocks of A (xla.py)."""
    row, col = _indices(plan.chunk)
    kk, qk, decay = _scores(plan, k, q, log_decay, segment)
    if p is not None:
        p[...] = jnp.where(row >= col, _times(qk, decay), 0.0).astype(p.dtype)
    a = _column(beta) * _times(kk, decay)
    x = (row == col).astype(jnp.float32)
    size = 1
    while size < plan.chunk:
        joined = ((row & -2 * size) == (col & -2 * size)) & ((row & size) > (col & size))
        below = jnp.where(joined, a, 0.0)
        x -= below if size == 1 else dot(dot(x, below), x)
        size *= 2
    inverse[...] = x.astype(inverse.dtype)


def _walk(
    plan, k, v, beta, inverse, state, final, saved, from_start=None, to_end=None, u=None,
    states=None,
):  # fmt: skip
    """U, and the state before every chunk, for one block of value columns."""

    def step(n, state):
        at = pl.ds(n * plan.chunk, plan.chunk)
        low = [part.astype(k.dtype) for part in state]
        if states is not None:
            _store(states, low, n)
        seen = _times(_recall(k, at, low), _column(from_start, at))
        error = _column(beta, at) * (v[at, :].astype(jnp.float32) - seen)
        change = dot(inverse[at, :], error.astype(k.dtype))
        if u is not None:
            u[at, :] = change.astype(k.dtype)
        change = _times(change, _column(to_end, at)).astype(k.dtype)
        return _write(_forget(plan, from_start, n, state), k, at, change)

    def block(m, state):
        _store(saved, state, m)
        return lax.fori_loop(0, plan.per_save, lambda i, x: step(m * plan.per_save + i, x), state)

    _store(final, lax.fori_loop(0, plan.saves, block, _load(state)))


def _read(plan, q, p, u, states, out, from_start=None):
    """O = scale (g q S + P U) of one chunk, for one block of value columns."""
    seen = _times(_recall(q, slice(None), _load(states)), _column(from_start))
    out[...] = (plan.scale * (seen + dot(p[...], u[...]))).astype(out.dtype)


def _walk_back(
    plan, k, beta, inverse, d_final, d_saved, z, d_states, d_state, q=None, p=None, d_out=None,
    from_start=None, to_end=None,
):  # fmt: skip
    """Z, and the gradient of the state behind every chunk, for one block of value columns.

    With dS the gradient of the state behind a chunk, dU = scale P^T dO + D_C k dS, Z = X^T dU (the
    gradient of beta (v - g k S)), and the gradient of the state before it is

        g_C dS + scale (g q)^T dO - (beta g k)^T Z
    """

    def step(n, behind):
        at = pl.ds(n * plan.chunk, plan.chunk)
        low = [part.astype(k.dtype) for part in behind]
        _store(d_states, low, n)
        d_u = _times(_recall(k, at, low), _column(to_end, at))
        before = _forget(plan, from_start, n, behind)
        if q is not None:
            d_u += plan.scale * dot(p[at, :], d_out[at, :], transpose_a=True)
            d_seen = _times(plan.scale, _column(from_start, at)) * d_out[at, :].astype(jnp.float32)
            before = _write(before, q, at, d_seen.astype(k.dtype))
        d_error = dot(inverse[at, :], d_u.astype(k.dtype), transpose_a=True)
        z[at, :] = d_error.astype(k.dtype)
        d_seen = _times(-_column(beta, at), _column(from_start, at)) * d_error
        return _write(before, k, at, d_seen.astype(k.dtype))

    def block(i, behind):
        m = plan.saves - 1 - i
        last = (m + 1) * plan.per_save - 1
        behind = lax.fori_loop(0, plan.per_save, lambda i, d: step(last - i, d), behind)
        return tuple(a + b for a, b in zip(behind, _load(d_saved, m), strict=True))

    _store(d_state, lax.fori_loop(0, plan.saves, block, _load(d_final)))


def _inside(
    plan, k, v, beta, u, z, d_v, d_beta, d_kk, q=None, d_out=None, d_qk=None, log_decay=None,
    segment=None, d_log_decay=None,
):  # fmt: skip
    """Gradients of one chunk from U, Z and dO: of P and A (as those of q k^T and k k^T), of v, and
    what of those of beta and log_decay comes by way of them.
    """
    row, col = _indices(plan.chunk)

    def products(at):
        wide = z[:, at].astype(jnp.float32)
        d_v[:, at] = (_column(beta) * wide).astype(d_v.dtype)
        d_p = 0.0 if q is None else dot(d_out[:, at], u[:, at], transpose_b=True)
        d_a = dot(z[:, at], u[:, at], transpose_b=True)
        return d_p, d_a, jnp.sum(wide * v[:, at].astype(jnp.float32), axis=1)

    d_p, d_a, of_errors = _sum_over_values(v.shape[1], products, *[row.shape] * 2, row.shape[:1])
    kk, qk, decay = _scores(plan, k, q, log_decay, segment)
    d_a = jnp.where(row > col, -_times(d_a, decay), 0.0)
    d_beta[...] = of_errors + jnp.sum(d_a * kk, axis=1)
    of_kk = _column(beta) * d_a
    d_log = of_kk * kk
    if q is not None:
        of_qk = jnp.where(row >= col, plan.scale * _times(d_p, decay), 0.0)
        d_log += of_qk * qk
        d_qk[...] = of_qk.astype(d_qk.dtype)
    # Both of the equal factors of k k^T have a gradient.
    d_kk[...] = (of_kk + of_kk.T).astype(d_kk.dtype)
    if d_log_decay is not None:
        # log_decay of token j is part of D_ri for i < j <= r.
        spans = triton.mask_dot(col >= row, d_log)
        d_log_decay[...] = jnp.sum(jnp.where(row > col, spans, 0.0), axis=1)


def _outside(
    plan, k, beta, u, z, states, d_states, d_kk, d_k, d_k_seen, q=None, d_out=None, d_qk=None,
    d_q=None, from_start=None, to_end=None, d_start=None, d_end=None, d_total=None,
):  # fmt: skip
    """Gradients of 64 columns of q and k of one chunk, from the state before it (which q and k
    read) and the gradient of the state behind it (to which k and U write).

    Of beta (d_k_seen, to be subtracted) and of the logarithms of the decays from_start, to_end and
    of the state it gives what these columns contribute.
    """
    keys, wide = k[...], k[...].astype(jnp.float32)

    def products(at):
        state, d_state = states[:, at], d_states[:, at]
        of_q = 0.0 if q is None else dot(d_out[:, at], state, transpose_b=True)
        seen = dot(z[:, at], state, transpose_b=True)
        end = dot(u[:, at], d_state, transpose_b=True)
        if d_total is None:
            return of_q, seen, end, 0.0
        return of_q, seen, end, jnp.sum(state.astype(jnp.float32) * d_state.astype(jnp.float32), 1)

    of_q, seen, end, total = _sum_over_values(u.shape[1], products, *[k.shape] * 3, k.shape[1:])
    decay = _column(from_start)
    seen, end = _times(seen, decay), _times(end, _column(to_end))
    along = jnp.sum(seen * wide, axis=1)
    d_k_seen[...] = along
    at_start = -beta[...] * along
    of_k = end - _column(beta) * seen + dot(d_kk[...], keys)
    if q is not None:
        of_q *= _times(plan.scale, decay)
        at_start += jnp.sum(of_q * q[...].astype(jnp.float32), axis=1)
        d_q[...] = (of_q + dot(d_qk[...], keys)).astype(d_q.dtype)
        of_k += dot(d_qk[...], q[...], transpose_a=True)
    d_k[...] = of_k.astype(d_k.dtype)
    if d_total is not None:
        d_start[...] = at_start
        d_end[...] = jnp.sum(end * wide, axis=1)
        d_total[...] = from_start[plan.chunk - 1] * jnp.sum(total)


_KERNELS = {
    _prepare: _Kernel(("inverse", "p")),
    _walk: _Kernel(("final", "saved", "u", "states"), by_chunk=False, value_block=_WALK_BLOCK),
    _read: _Kernel(("out",), value_block=_BLOCK),
    _walk_back: _Kernel(("z", "d_states", "d_state"), by_chunk=False, value_block=_WALK_BLOCK),
    _inside: _Kernel(("d_v", "d_beta", "d_kk", "d_qk", "d_log_decay")),
    _outside: _Kernel(("d_k", "d_k_seen", "d_q", "d_start", "d_end", "d_total"), key_block=_BLOCK),
}
