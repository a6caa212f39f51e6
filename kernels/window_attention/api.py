"""Causal softmax attention over a window of tokens, and the choice of an implementation.

Query i sees the keys i - window + 1 ... i of its own document. Where a row is spread over devices,
those before a device's own tokens are its past.

Arrays hold heads in groups of n, side by side: G = A / n groups of L = n hd numbers a token. A TPU
fills the last axis of every array up to 128, so that heads of 64 alone would be twice as large in
memory and in time. Products with the heads of a group are those with their group, where a query is
zero but in its own head. Letters: B batch, A attention heads, T tokens, hd head dim, W window.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.kernels import heads
from refine_jax.kernels.device import backend
from refine_jax.kernels.sequence import halo
from refine_jax.kernels.window_attention import cudnn
from refine_jax.kernels.window_attention.pallas_tpu import takes, window_attention_tpu
from refine_jax.kernels.window_attention.reference import window_attention_reference
from refine_jax.kernels.window_attention.splash import window_attention_splash
from refine_jax.kernels.window_attention.xla import window_attention_xla


def _heads_alone(attend):
    """An implementation for groups of heads, by one for heads alone."""

    def run(q, k, v, ids, past, window, heads_per_group):
        if heads_per_group == 1:
            return attend(q, k, v, ids, past, window)
        num_groups = q.shape[1]
        apart = functools.partial(heads.regroup, groups=num_groups * heads_per_group)
        q, k, v = map(apart, (q, k, v))
        if past is not None:
            past = *map(apart, past[:2]), past[2]
        return heads.regroup(attend(q, k, v, ids, past, window), num_groups)

    return run


IMPLEMENTATIONS = {
    "reference": _heads_alone(window_attention_reference),
    "xla": _heads_alone(window_attention_xla),
    "pallas_tpu": window_attention_tpu,
    "splash": window_attention_splash,
    "cudnn": _heads_alone(cudnn.window_attention_cudnn),
}


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int,
    ids: jax.Array | None = None,
    *,
    heads_per_group: int = 1,
    implementation: str | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Causal attention of whole rows to the last `window` tokens, in memory linear in T.

    q, k, v: [B, G, T, L] in one dtype, heads_per_group heads side by side; scores are scaled by
        hd^-0.5, the softmax is float32.
    ids: [B, T] int32, the number of a token's document in its row, 0 at padding; None for rows of
        one document. Documents do not see each other, and padding is not seen; its own output is 0.
    implementation: "reference", "xla", "pallas_tpu", "splash" (a Pallas kernel of jax, for TPUs),
        "cudnn" (GPUs; full rows in bfloat16 or float16 only) or None for the best one on the
        device; a named one never falls back.
    axis_name: inside `jax.shard_map`, the mesh axis over which rows are spread in blocks of T, in
        their order: all arrays are those of the device's block, and documents have the numbers of
        the whole row. The window may reach over several blocks. Not by "cudnn".

    Returns [B, G, T, L] in the dtype of q.

    Raises:
      ValueError: an implementation that does not exist, or not for these arrays.
    """
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    window, past = min(window, q.shape[2] * devices), None
    if devices > 1 and window > 1:
        # On the first device only the ids, 0 there, tell that nothing is before its tokens.
        ids = jnp.ones((q.shape[0], q.shape[2]), jnp.int32) if ids is None else ids
        before = functools.partial(halo, rows=window - 1, axis_name=axis_name)
        past = before(k, axis=2), before(v, axis=2), before(ids, axis=1)
    name = implementation or _best(q, ids, past, heads_per_group)
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation of window_attention must be None or one of {sorted(IMPLEMENTATIONS)}. "
            f"Got: implementation={name!r}."
        )
    return IMPLEMENTATIONS[name](q, k, v, ids, past, window, heads_per_group)


def _best(q, ids, past, heads_per_group) -> str:
    """The implementation for this device."""
    if backend() == "tpu":
        return "pallas_tpu" if takes(q.shape[-1], heads_per_group) else "splash"
    if backend() == "gpu" and cudnn.unsupported(q, ids, past) is None:
        return "cudnn"
    return "xla"
