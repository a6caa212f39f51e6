"""Window attention by cuDNN's flash attention, for GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def unsupported(q, ids, past) -> str | None:
    """Say why cuDNN has no form for q [B, A, T, hd], ids and past; None if it has one."""
    if past is not None:
        return "it takes whole rows. Got: rows spread over devices (axis_name)."
    if ids is not None:
        return "documents and padding have no form without a mask of T x T. Got: a layout (ids)."
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"arrays must be bfloat16 or float16. Got: {q.dtype}."
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"the head dim must be a multiple of 8 and at most 128. Got: {q.shape[-1]}."
    return None


def window_attention_cudnn(q, k, v, ids, past, window):
    """Run `window_attention` of api.py for heads alone, [B, A, T, hd], without ids and past."""
    if reason := unsupported(q, ids, past):
        raise ValueError(f"window_attention by 'cudnn': {reason} Use 'xla'.")
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=(window - 1, 0), implementation="cudnn"
    )
    return jnp.swapaxes(out, 1, 2)
