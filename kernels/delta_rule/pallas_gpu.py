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


def unsupported(
    k: jax.Array, v: jax.Array, chunk_size: int | None, save_every: int | None
) -> str | None:
    """Say why k [B, T, H, K] and v [B, T, Hv, V] of `delta_rule` have no kernel here, or None."""
    if v.dtype not in (jnp.float32, jnp.bfloat16):
        return f"v must be float32 or bfloat16. Got: {v.dtype}."
    if k.shape[3] > _MAX_KEY_DIM:
        return (
            f"keys of more than {_MAX_KEY_DIM} numbers do not fit the registers; use "
            f"implementation='xla'. Got: k {k.shape}."
        )
    if save_every is not None and save_every % _chunk_of(chunk_size, v):
        return (
            f"save_every must be a multiple of 16. Got: save_every={save_every}, "
            f"chunk_size={chunk_size}."
        )
    return None


def _chunk_of(chunk_size: int | None, v: jax.Array) -> int:
    """Tokens of a chunk: 16 to 64, as matrix units want it; the result does not depend on it."""
    largest = _CHUNK[v.dtype]
    return min(max(chunk_size or largest, 16), largest, triton.rounded_size(v.shape[1], largest))


def delta_rule_pallas_gpu(
    q, k, v, beta, log_decay, *, initial_state, document, scale, chunk_size, save_every
):
    """`delta_rule` of api.py on GPUs; on a CPU the kernels are interpreted.

    Raises:
      ValueError: for what `unsupported` names.
    """
    reason = unsupported(k, v, chunk_size, save_every)
    if reason is not None:
        raise ValueError(f"delta_rule with implementation='pallas_gpu': {reason}")
    tokens, dtype, value_dim = v.shape[1], v.dtype, v.shape[3]
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
        x = triton.pad_axis(x.astype(dtype), 1, saves * block)
        return x if size is None else triton.pad_axis(x, x.ndim - 1, size)

    segment = None
    if document is not None:
        starts = document[:, 1:] != document[:, :-1]
        starts = fill(jnp.pad(starts, ((0, 0), (1, 0))), dtype=jnp.int32)
        chunks = starts.reshape(starts.shape[0], -1, chunk)
        segment = jnp.cumsum(chunks, axis=-1, dtype=jnp.int32).reshape(starts.shape)
    state = triton.pad_axis(triton.pad_axis(initial_state, 2, key_size), 3, value_size)
    arrays = {
        "q": fill(q, key_size, dtype),
        "k": fill(k, key_size, dtype),
        "v": fill(v, value_size, dtype),
        "beta": fill(beta),
        "log_decay": fill(log_decay),
        "segment": segment,
        "state": state,
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


def _delta_rule_forward(plan, arrays):
    outs, kept = _forward(plan, arrays, keep=True)
    return outs, (arrays, kept)


def _delta_rule_backward(plan, residuals, cotangents):
    arrays, kept = residuals
    return (_backward(plan, arrays, kept, *cotangents),)


_delta_rule.defvjp(_delta_rule_forward, _delta_rule_backward)


class _Kernel(NamedTuple):
    """What a program of a kernel goes over."""

    by_chunk: bool  # else a program goes over all chunks
    key_block: int | None = None  # columns of K and V of a program, all if None
    value_block: int | None = None


# By the names of arrays: `d_` is a gradient; d_kk, d_qk and below belong to the backward kernels.
_KINDS = {
    "keys": ("q", "k"),
    "key_gradients": ("d_q", "d_k"),
    "values": ("v", "u", "z", "out", "d_v", "d_out"),
    "scalars": ("beta", "log_decay", "from_start", "to_end", "d_beta", "d_log_decay"),
    "segment": ("segment",),
    "squares": ("inverse", "p", "d_kk", "d_qk"),
    "states": ("states", "d_states"),
    "state": ("state", "final", "d_state", "d_final"),
    "saved": ("saved", "d_saved"),
    "key_sums": ("d_k_seen", "d_start", "d_end"),
    "chunk_sums": ("d_total",),
}
_KIND = {name: kind for kind, names in _KINDS.items() for name in names}


def _run(kernel, *, plan, arrays, inputs, outputs):
    """Calls a kernel on those of the `inputs` that `arrays` has; {name: array} of `outputs`."""
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

    def spec(block, index):
        def at(i, h, b):
            """Chunk, block of K, block of V, head and row of a program."""
            rest, j = i // value_blocks, i % value_blocks
            return index(rest // key_blocks, rest % key_blocks, j, h, b)

        return pl.BlockSpec(block, at)

    specs = {
        "keys": spec((None, span, None, keys), lambda n, i, j, h, b: (b, n, h // group, i)),
        "key_gradients": spec((None, span, None, keys), lambda n, i, j, h, b: (b, n, h, i)),
        "values": spec((None, span, None, values), lambda n, i, j, h, b: (b, n, h, j)),
        "scalars": spec((None, span, None), lambda n, i, j, h, b: (b, n, h)),
        "segment": spec((None, span), lambda n, i, j, h, b: (b, n)),
        "squares": spec((None, None, span, chunk), lambda n, i, j, h, b: (b, h, n, 0)),
        "states": spec((None, None, states, keys, values), lambda n, i, j, h, b: (b, h, n, i, j)),
        "state": spec((None, None, keys, values), lambda n, i, j, h, b: (b, h, i, j)),
        "saved": spec(
            (None, plan.saves, None, keys, values), lambda n, i, j, h, b: (b, 0, h, i, j)
        ),
        "key_sums": spec((None, None, span, None), lambda n, i, j, h, b: (i, b, n, h)),
        "chunk_sums": spec((None, None, None, None), lambda n, i, j, h, b: (i, b, n, h)),
    }
    rows = (batch, tokens, value_heads)
    # Gradients of the value heads of one key head are added up outside.
    gradient_dtype = dtype if group == 1 else jnp.float32
    shapes = {
        "key_gradients": ((*rows, key_dim), gradient_dtype),
        "values": ((*rows, value_dim), dtype),
        "scalars": (rows, jnp.float32),
        "squares": ((batch, value_heads, tokens, chunk), dtype),
        "states": ((batch, value_heads, chunks, key_dim, value_dim), dtype),
        "state": ((batch, value_heads, key_dim, value_dim), jnp.float32),
        "saved": ((batch, plan.saves, value_heads, key_dim, value_dim), jnp.float32),
        "key_sums": ((key_blocks, *rows), jnp.float32),
        "chunk_sums": ((key_blocks, batch, chunks, value_heads), jnp.float32),
    }
    inputs = {name: arrays[name] for name in inputs if arrays.get(name) is not None}
    # The loads of two chunks of a walk at a time would not fit into shared memory.
    stages = 1 if not cut.by_chunk and key_dim * dtype.itemsize > _STAGED_BYTES else 2
    return triton.call(
        functools.partial(kernel, plan),
        grid=grid,
        inputs=inputs,
        outputs={name: jax.ShapeDtypeStruct(*shapes[_KIND[name]]) for name in outputs},
        specs={name: specs[_KIND[name]] for name in (*inputs, *outputs)},
        warps=_WARPS,
        stages=stages,
        name=f"delta_rule{kernel.__name__}",
    )


def _decays(plan, arrays):
    """Decays since the start of a chunk and to its end, float32 [B, T, Hv], if there are any.

    Sums of logarithms over the tokens in between only, as everywhere here: differences of running
    sums would lose digits after a strong decay.
    """
    log_decay, segment = arrays["log_decay"], arrays["segment"]
    if log_decay is None and segment is None:
        return {}
    rows = arrays["beta"].shape

    def chunks(x):
        return x.reshape(rows[0], -1, plan.chunk, *x.shape[2:])

    from_start = to_end = jnp.ones(chunks(arrays["beta"]).shape, jnp.float32)
    if log_decay is not None:
        log_decay = chunks(log_decay)
        behind = jnp.pad(log_decay[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))
        from_start = jnp.exp(lax.cumsum(log_decay, axis=2))
        to_end = jnp.exp(lax.cumsum(behind, axis=2, reverse=True))
    if segment is not None:
        segment = chunks(segment)[..., None]
        from_start = jnp.where(segment == 0, from_start, 0.0)
        to_end = jnp.where(segment == segment[:, :, -1:], to_end, 0.0)
    return {"from_start": from_start.reshape(rows), "to_end": to_end.reshape(rows)}


def _forward(plan, arrays, *, keep):
    """(output, final state, saved states), and what the backward pass needs beside `arrays`."""
    has_q = arrays["q"] is not None
    every = arrays | _decays(plan, arrays)
    run = functools.partial(_run, plan=plan, arrays=every)
    every |= run(
        _prepare,
        inputs=("q", "k", "beta", "log_decay", "segment"),
        outputs=("inverse", "p") if has_q else ("inverse",),
    )
    every |= run(
        _walk,
        inputs=("k", "v", "beta", "from_start", "to_end", "inverse", "state"),
        outputs=("final", "saved", *(("u", "states") if keep or has_q else ())),
    )
    if has_q:
        every |= run(_read, inputs=("q", "p", "u", "from_start", "states"), outputs=("out",))
    kept = {name: every.get(name) for name in ("inverse", "p", "u", "states")}
    return (every.get("out"), every["final"], every["saved"]), kept


def _backward(plan, arrays, kept, d_out, d_final, d_saved):
    """Gradients of `arrays`."""
    has_q, is_gated = arrays["q"] is not None, arrays["log_decay"] is not None
    every = arrays | _decays(plan, arrays) | kept
    every |= {"d_out": d_out if has_q else None, "d_final": d_final, "d_saved": d_saved}
    run = functools.partial(_run, plan=plan, arrays=every)
    decays = ("beta", "from_start", "to_end")
    every |= run(
        _walk_back,
        inputs=("q", "k", "d_out", *decays, "inverse", "p", "d_final", "d_saved"),
        outputs=("z", "d_states", "d_state"),
    )
    every |= run(
        _inside,
        inputs=("q", "k", "v", "beta", "log_decay", "segment", "d_out", "u", "z"),
        outputs=(
            *("d_v", "d_beta", "d_kk"),
            *(("d_qk",) if has_q else ()),
            *(("d_log_decay",) if is_gated else ()),
        ),
    )
    every |= run(
        _outside,
        inputs=("q", "k", *decays, "d_out", "u", "z", "states", "d_states", "d_kk", "d_qk"),
        outputs=(
            *("d_k", "d_k_seen"),
            *(("d_q",) if has_q else ()),
            *(("d_start", "d_end", "d_total") if is_gated else ()),
        ),
    )
    d_log_decay = None
    if is_gated:
        # log_decay of a token is part of from_start from there on, of to_end before it, and of the
        # decay of the state over the whole chunk.
        def chunks(x):
            x = x.sum(axis=0)
            return x.reshape(x.shape[0], -1, plan.chunk, x.shape[2])

        d_start, d_end = chunks(every["d_start"]), chunks(every["d_end"])
        behind = lax.cumsum(d_start, axis=2, reverse=True)
        before = lax.cumsum(d_end[:, :, :-1], axis=2)
        d_log = behind + jnp.pad(before, ((0, 0), (0, 0), (1, 0), (0, 0)))
        d_log += every["d_total"].sum(axis=0)[:, :, None]
        d_log_decay = every["d_log_decay"] + d_log.reshape(arrays["log_decay"].shape)

    def per_key_head(x, like):
        if x is None or x.shape == like.shape:
            return x
        return x.reshape(*like.shape[:3], -1, like.shape[3]).sum(axis=3).astype(like.dtype)

    return {
        "q": per_key_head(every.get("d_q"), arrays["q"]),
        "k": per_key_head(every["d_k"], arrays["k"]),
        "v": every["d_v"],
        "beta": every["d_beta"] - every["d_k_seen"].sum(axis=0),
        "log_decay": d_log_decay,
        "segment": None,
        "state": every["d_state"],
    }


def _indices(chunk):
    """Numbers of the rows and of the columns of a [C, C] block."""
    shape = (chunk, chunk)
    return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)


def _pieces(ref):
    """Slices of at most 64 of the last axis of a reference, for products that sum over it."""
    size = ref.shape[-1]
    block = min(size, _BLOCK)
    return [pl.ds(i, block) for i in range(0, size, block)]


def _masked_sums(mask, x):
    """`mask @ x` for a Boolean mask [C, C] and float32 x [C, C], to float32 precision.

    A float32 number is the sum of three bfloat16 numbers, so three products on tensor cores do it.
    Cutting bits off, rather than casts there and back, because compilers take out pairs of casts.
    """
    mask = mask.astype(jnp.bfloat16)
    sums = 0.0
    for _ in range(3):
        bits = lax.bitcast_convert_type(x, jnp.int32) & -65536
        head = lax.bitcast_convert_type(bits, jnp.float32)
        sums += dot(mask, head.astype(jnp.bfloat16))
        x -= head
    return sums


def _between(plan, inputs):
    """Decay D [C, C] between the tokens of a chunk, of no meaning above the diagonal, or None."""
    decay = None
    if "log_decay" in inputs:
        row, col = _indices(plan.chunk)
        after = jnp.where(row > col, inputs["log_decay"][...][:, None], 0.0)
        decay = jnp.exp(_masked_sums(row >= col, after))
    if "segment" in inputs:
        segment = inputs["segment"][...]
        same = segment[:, None] == segment[None, :]
        decay = jnp.where(same, 1.0 if decay is None else decay, 0.0)
    return decay


def _scores(inputs):
    """k k^T and q k^T (None without q) [C, C] of a chunk."""
    kk = qk = 0.0
    for piece in _pieces(inputs["k"]):
        k = inputs["k"][:, piece]
        kk += dot(k, k, transpose_b=True)
        if "q" in inputs:
            qk += dot(inputs["q"][:, piece], k, transpose_b=True)
    return kk, qk if "q" in inputs else None


def _times(x, decay):
    return x if decay is None else x * decay


def _prepare(plan, inputs, outputs):
    """X = (I + A)^-1 and P of one chunk, by doubling the inverted diagonal blocks of A (xla.py)."""
    dtype = inputs["k"].dtype
    row, col = _indices(plan.chunk)
    kk, qk = _scores(inputs)
    decay = _between(plan, inputs)
    if qk is not None:
        outputs["p"][...] = jnp.where(row >= col, _times(qk, decay), 0.0).astype(dtype)
    a = inputs["beta"][...][:, None] * _times(kk, decay)
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
    k_ref, dtype = inputs["k"], inputs["k"].dtype
    pieces = _pieces(k_ref)
    keep = "u" in outputs

    def step(n, state):
        tokens = pl.ds(n * plan.chunk, plan.chunk)
        beta = inputs["beta"][tokens][:, None]
        low = [s.astype(dtype) for s in state]
        seen = 0.0
        for piece, s in zip(pieces, low, strict=True):
            seen += dot(k_ref[tokens, piece], s)
            if keep:
                outputs["states"][n, piece, :] = s
        if "from_start" in inputs:
            seen *= inputs["from_start"][tokens][:, None]
        error = beta * (inputs["v"][tokens, :].astype(jnp.float32) - seen)
        u = dot(inputs["inverse"][tokens, :], error.astype(dtype))
        if keep:
            outputs["u"][tokens, :] = u.astype(dtype)
        if "from_start" in inputs:
            u *= inputs["to_end"][tokens][:, None]
            total = inputs["from_start"][n * plan.chunk + plan.chunk - 1]
            state = [s * total for s in state]
        u = u.astype(dtype)
        return tuple(
            s + dot(k_ref[tokens, piece], u, transpose_a=True)
            for piece, s in zip(pieces, state, strict=True)
        )

    def block(m, state):
        for piece, s in zip(pieces, state, strict=True):
            outputs["saved"][m, piece, :] = s
        first = m * plan.per_save
        return lax.fori_loop(0, plan.per_save, lambda i, state: step(first + i, state), state)

    state = tuple(inputs["state"][piece, :] for piece in pieces)
    state = lax.fori_loop(0, plan.saves, block, state)
    for piece, s in zip(pieces, state, strict=True):
        outputs["final"][piece, :] = s


def _read(plan, inputs, outputs):
    """The output of one chunk and block of value columns."""
    seen = 0.0
    for piece in _pieces(inputs["q"]):
        seen += dot(inputs["q"][:, piece], inputs["states"][piece, :])
    if "from_start" in inputs:
        seen *= inputs["from_start"][...][:, None]
    out = plan.scale * (seen + dot(inputs["p"][...], inputs["u"][...]))
    outputs["out"][...] = out.astype(outputs["out"].dtype)


def _walk_back(plan, inputs, outputs):
    """The gradient of the state over all chunks, backwards, for one block of value columns.

    With dS the gradient of the state behind a chunk, dU = scale P^T dO + D_C k dS, Z = X^T dU (the
    gradient of beta (v - g k S)), and the gradient of the state before it is

        g_C dS + scale (g q)^T dO - (beta g k)^T Z
    """
    k_ref, dtype = inputs["k"], inputs["k"].dtype
    pieces = _pieces(k_ref)

    def step(n, d_state):
        tokens = pl.ds(n * plan.chunk, plan.chunk)
        d_u = 0.0
        for piece, d in zip(pieces, d_state, strict=True):
            low = d.astype(dtype)
            outputs["d_states"][n, piece, :] = low
            d_u += dot(k_ref[tokens, piece], low)
        scale = plan.scale
        read = -inputs["beta"][tokens][:, None]
        if "from_start" in inputs:
            d_u *= inputs["to_end"][tokens][:, None]
            from_start = inputs["from_start"][tokens][:, None]
            scale, read = scale * from_start, read * from_start
            total = inputs["from_start"][n * plan.chunk + plan.chunk - 1]
            d_state = [d * total for d in d_state]
        if "q" in inputs:
            d_out = inputs["d_out"][tokens, :]
            d_u += plan.scale * dot(inputs["p"][tokens, :], d_out, transpose_a=True)
            d_seen = (scale * d_out.astype(jnp.float32)).astype(dtype)
            d_state = [
                d + dot(inputs["q"][tokens, piece], d_seen, transpose_a=True)
                for piece, d in zip(pieces, d_state, strict=True)
            ]
        z = dot(inputs["inverse"][tokens, :], d_u.astype(dtype), transpose_a=True)
        outputs["z"][tokens, :] = z.astype(dtype)
        d_seen = (read * z).astype(dtype)
        return tuple(
            d + dot(k_ref[tokens, piece], d_seen, transpose_a=True)
            for piece, d in zip(pieces, d_state, strict=True)
        )

    def block(i, d_state):
        m = plan.saves - 1 - i
        last = (m + 1) * plan.per_save - 1
        d_state = lax.fori_loop(0, plan.per_save, lambda i, d: step(last - i, d), d_state)
        return tuple(
            d + inputs["d_saved"][m, piece, :] for piece, d in zip(pieces, d_state, strict=True)
        )

    d_state = tuple(inputs["d_final"][piece, :] for piece in pieces)
    d_state = lax.fori_loop(0, plan.saves, block, d_state)
    for piece, d in zip(pieces, d_state, strict=True):
        outputs["d_state"][piece, :] = d


def _inside(plan, inputs, outputs):
    """Gradients of one chunk from U, Z and dO: of P and A (as those of q k^T and k k^T), of v, and
    what of those of beta and log_decay comes by way of them.
    """
    dtype, chunk = inputs["k"].dtype, plan.chunk
    has_q = "q" in inputs
    row, col = _indices(chunk)
    beta = inputs["beta"][...][:, None]
    values = min(_BLOCK, inputs["v"].shape[1])

    def block(j, carry):
        d_p, d_a, d_beta = carry
        at = pl.ds(j * values, values)
        z, u = inputs["z"][:, at], inputs["u"][:, at]
        wide = z.astype(jnp.float32)
        outputs["d_v"][:, at] = (beta * wide).astype(dtype)
        d_beta += jnp.sum(wide * inputs["v"][:, at].astype(jnp.float32), axis=1)
        d_a += dot(z, u, transpose_b=True)
        if has_q:
            d_p += dot(inputs["d_out"][:, at], u, transpose_b=True)
        return d_p, d_a, d_beta

    zeros = jnp.zeros((chunk, chunk), jnp.float32)
    carry = (zeros, zeros, jnp.zeros((chunk,), jnp.float32))
    d_p, d_a, d_beta = lax.fori_loop(0, inputs["v"].shape[1] // values, block, carry)
    decay = _between(plan, inputs)
    kk, qk = _scores(inputs)
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
        spans = _masked_sums(col >= row, d_log)
        outputs["d_log_decay"][...] = jnp.sum(jnp.where(row > col, spans, 0.0), axis=1)


def _outside(plan, inputs, outputs):
    """Gradients of 64 columns of q and k of one chunk, from the state before it (which q and k
    read) and the gradient of the state behind it (to which k and U write).

    Of beta (d_k_seen, to be subtracted) and of the logarithms of the decays from_start, to_end and
    of the state it gives what these columns contribute.
    """
    has_q, is_gated = "q" in inputs, "d_total" in outputs
    k = inputs["k"][...]
    values = min(_BLOCK, inputs["u"].shape[1])

    def block(j, carry):
        d_q, d_seen, d_k_end, d_total = carry
        at = pl.ds(j * values, values)
        state, d_state = inputs["states"][:, at], inputs["d_states"][:, at]
        if has_q:
            d_q += dot(inputs["d_out"][:, at], state, transpose_b=True)
        d_seen += dot(inputs["z"][:, at], state, transpose_b=True)
        d_k_end += dot(inputs["u"][:, at], d_state, transpose_b=True)
        if is_gated:
            product = state.astype(jnp.float32) * d_state.astype(jnp.float32)
            d_total += jnp.sum(product, axis=1)
        return d_q, d_seen, d_k_end, d_total

    zeros = jnp.zeros(k.shape, jnp.float32)
    carry = (zeros, zeros, zeros, jnp.zeros(k.shape[1], jnp.float32))
    blocks = inputs["u"].shape[1] // values
    d_q, d_seen, d_k_end, d_total = lax.fori_loop(0, blocks, block, carry)
    read = plan.scale
    if "from_start" in inputs:
        from_start = inputs["from_start"][...][:, None]
        read = read * from_start
        d_seen *= from_start
        d_k_end *= inputs["to_end"][...][:, None]
    beta, wide = inputs["beta"][...], k.astype(jnp.float32)
    d_k_seen = jnp.sum(d_seen * wide, axis=1)
    outputs["d_k_seen"][...] = d_k_seen
    d_start = -beta * d_k_seen
    d_k = d_k_end - beta[:, None] * d_seen + dot(inputs["d_kk"][...], k)
    if has_q:
        q, d_qk = inputs["q"][...], inputs["d_qk"][...]
        d_q *= read
        d_start += jnp.sum(d_q * q.astype(jnp.float32), axis=1)
        outputs["d_q"][...] = (d_q + dot(d_qk, k)).astype(outputs["d_q"].dtype)
        d_k += dot(d_qk, q, transpose_a=True)
    outputs["d_k"][...] = d_k.astype(outputs["d_k"].dtype)
    if is_gated:
        outputs["d_start"][...] = d_start
        outputs["d_end"][...] = jnp.sum(d_k_end * wide, axis=1)
        outputs["d_total"][...] = inputs["from_start"][plan.chunk - 1] * jnp.sum(d_total)


_KERNELS = {
    _prepare: _Kernel(by_chunk=True),
    _walk: _Kernel(by_chunk=False, value_block=_WALK_BLOCK),
    _read: _Kernel(by_chunk=True, value_block=_BLOCK),
    _walk_back: _Kernel(by_chunk=False, value_block=_WALK_BLOCK),
    _inside: _Kernel(by_chunk=True),
    _outside: _Kernel(by_chunk=True, key_block=_BLOCK),
}
