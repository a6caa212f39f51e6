"""The delta rule on TPU: plans, padding and the derivative around the Pallas kernels.

Tested in interpret mode and compiled ahead of time (libtpu 0.0.42 and 0.0.52) for every generation
below; none of it has run on a TPU. Static estimates of the kernels alone, in milliseconds, for 8192
tokens of 16 heads 128 x 128 in bfloat16, ungated, without the fused norm, 8 heads a program (the
4 that leave room for gates on a v4 are about 10 % slower there):

               v4    v5e    v5p    v6e     7x
    forward   0.45  0.59   0.26   0.35   0.29
    backward  0.43  0.48   0.21   0.38   0.30

On v6e the matrix units need 0.033 ms for the products of the forward pass (2 m n k a product, the
inverse not counted) and the HBM 0.10 ms forward and 0.25 ms backward. What bounds the schedule now:
the inverses. 15 of the 20 products of a chunk and head are theirs, each fills half of a 256-wide
unit, and the intermediate results of 8 heads go through VMEM. The backward kernel has no inverse
and waits 24 % of its time for transpositions and sums over lanes.

Tried, forward on v6e: a loop over 4 heads in the program's order 0.86 ms; heads as a batch axis of
every operation, so that one head's product covers the latency of the others', 0.66; 8 heads 0.38;
operands that meet the same matrix stacked 0.35. Backward, 4 heads: transposed products in the walk
0.81; matrices that lead with the writing token, and the inverse stored transposed, 0.39; 8 heads
0.38.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from refine_jax.kernels import tpu
from refine_jax.kernels.delta_rule import pallas_tpu_backward, pallas_tpu_forward
from refine_jax.kernels.delta_rule.pallas_tpu_forward import DeltaPlan
from refine_jax.kernels.delta_rule.pallas_tpu_math import scalar_fields
from refine_jax.kernels.numerics import pad_axes

_LANES = 128
_MIN_CHUNK = 16  # whole sublane tiles in bfloat16


def delta_rule_pallas_tpu(
    q, k, v, beta, log_decay, *, initial_state, document, scale, chunk_size, save_every, normalize
):
    """`delta_rule` of api.py."""
    batch, tokens, value_heads, value_dim = v.shape
    key_heads, key_dim = k.shape[2:]
    widths = _padded_width(key_dim), _padded_width(value_dim)
    plan = _plan(
        batch=batch,
        tokens=tokens,
        value_heads=value_heads,
        group=value_heads // key_heads,
        widths=widths,
        scale=float(scale),
        dtype=v.dtype,
        fields=scalar_fields(log_decay is not None, document is not None),
        normalize=normalize,
        has_q=q is not None,
        chunk_size=chunk_size,
        save_every=save_every,
    )

    # Behind the last token; with beta, k and log_decay 0 they change nothing.
    more_tokens = 0, plan.tokens - tokens

    def flat(x, width):
        """[B, T, heads, n] -> [B, T', heads * width]."""
        if x is None:
            return None
        x = pad_axes(x.astype(v.dtype), {1: more_tokens, 3: (0, width - x.shape[3])})
        return x.reshape(batch, plan.tokens, -1)

    if document is not None:
        moved = document[:, 1:] != document[:, :-1]
        document = jnp.cumsum(pad_axes(moved, {1: (1, 0)}), axis=1, dtype=jnp.int32)
        document = jnp.pad(document, ((0, 0), more_tokens), mode="edge")
    state_pad = {2: (0, widths[0] - key_dim), 3: (0, widths[1] - value_dim)}
    out, final, states = _delta_rule(
        plan,
        None if save_every is None else save_every // plan.chunk,
        flat(q, widths[0]),
        flat(k, widths[0]),
        flat(v, widths[1]),
        pad_axes(beta, {1: more_tokens}),
        None if log_decay is None else pad_axes(log_decay, {1: more_tokens}),
        document,
        pad_axes(initial_state, state_pad),
    )
    if out is not None:
        out = out.reshape(batch, plan.tokens, value_heads, -1)[:, :tokens, :, :value_dim]
    if states is not None:
        states = states[:, : -(-tokens // save_every), :, :key_dim, :value_dim]
    return out, final[..., :key_dim, :value_dim], states


def _padded_width(size: int) -> int:
    """Head sizes that the kernels take: half a register's lanes, or whole ones."""
    return _LANES // 2 if size <= _LANES // 2 else -(-size // _LANES) * _LANES


def _plan(*, tokens, value_heads, group, widths, chunk_size, save_every, **rest) -> DeltaPlan:
    """How to cut a call into programs."""
    key_dim, value_dim = widths
    heads, chunk, chunks = tpu.blocks("delta_rule", widths)
    if chunk_size is not None:
        chunk = chunk_size
    else:
        while save_every is not None and save_every % chunk:
            chunk //= 2
        while chunk > max(_MIN_CHUNK, tokens):
            chunk //= 2
    if chunk < _MIN_CHUNK:
        raise ValueError(
            f"The TPU kernels need chunks of at least {_MIN_CHUNK} tokens, and save_every a "
            f"multiple of them. Got: chunk_size={chunk_size}, save_every={save_every}. "
            "Use implementation='xla'."
        )
    if tokens <= chunk:
        chunks = 1  # the block is the whole sequence, so it need not fill registers
    else:
        # Interpreted programs are small, as nothing has to fill lanes.
        least = _MIN_CHUNK * 2 if tpu.interpret_mode() else _LANES
        chunks = max(chunks, least // chunk)
    block = chunk * chunks

    def fits(heads):
        whole = heads == value_heads
        aligned = (heads // group * key_dim) % _LANES == 0 and (heads * value_dim) % _LANES == 0
        aligned &= (heads * chunk) % _LANES == 0
        return value_heads % heads == 0 and heads % group == 0 and (whole or aligned)

    possible = [n for n in range(1, value_heads + 1) if fits(n)]
    below = [n for n in possible if n <= heads]
    return DeltaPlan(
        tokens=-(-tokens // block) * block,
        value_heads=value_heads,
        heads=max(below) if below else min(possible),
        group=group,
        chunk=chunk,
        chunks=chunks,
        key_dim=key_dim,
        value_dim=value_dim,
        **rest,
    )


def _forward(plan, save_chunks, arrays, keep):
    """Outputs, and with keep what the backward pass needs; arrays and outputs of `_delta_rule`."""
    q, k, v, beta, log_decay, document, initial = arrays
    rows = pallas_tpu_forward.pack_scalars(plan, beta, log_decay, document)
    wanted = {"with_states": keep or save_chunks is not None, "with_residuals": keep}
    found = pallas_tpu_forward.forward(plan, q, k, v, rows, initial, **wanted)
    saved = None if save_chunks is None else found["states"][:, ::save_chunks]
    outs = found.get("out"), found["final"], saved
    if not keep:
        return outs
    return outs, (q, k, rows, found["states"], found["w"], found["inverse"], document)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _delta_rule(plan: DeltaPlan, save_chunks: int | None, *arrays):
    """Outputs [B, T, Hv V], final state, and the states before every `save_chunks` chunks.

    arrays: q, k, v [B, T, H n], beta, log_decay [B, T, Hv], document [B, T], initial state.
    """
    return _forward(plan, save_chunks, arrays, keep=False)


def _delta_rule_forward(plan, save_chunks, *arrays):
    arrays = [None if x is None else x.value for x in arrays]
    return _forward(plan, save_chunks, arrays, keep=True)


def _delta_rule_backward(plan, save_chunks, residuals, cotangents):
    *arrays, document = residuals
    d_out, d_final, d_saved = (_dense(x) for x in cotangents)
    q, k, rows, states, w, inverse = arrays
    if d_final is None:
        d_final = jnp.zeros((states.shape[0], *states.shape[2:]), jnp.float32)
    if plan.has_q and d_out is None:
        d_out = jnp.zeros_like(w)
    if d_saved is not None and save_chunks > 1:
        count = states.shape[1]
        stretched = jnp.zeros((states.shape[0], count, *states.shape[2:]), jnp.float32)
        d_saved = stretched.at[:, ::save_chunks].set(d_saved)
    found = pallas_tpu_backward.backward(
        plan, q, k, rows, states, w, inverse, d_out, d_final, d_saved
    )
    d_beta, d_log_decay = pallas_tpu_backward.unpack_gradients(plan, found["d_rows"])
    d_document = None if document is None else np.zeros(document.shape, jax.dtypes.float0)
    d_tokens = found.get("d_q"), found["d_k"], found["d_v"], d_beta, d_log_decay
    return *d_tokens, d_document, found["d_initial"]


def _dense(cotangent):
    """None for a cotangent that is zero everywhere: the kernel then reads nothing for it."""
    return None if isinstance(cotangent, SymbolicZero) else cotangent


_delta_rule.defvjp(_delta_rule_forward, _delta_rule_backward, symbolic_zeros=True)
