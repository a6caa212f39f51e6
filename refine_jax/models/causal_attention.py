"""Causal softmax attention of rows to all of their earlier tokens, or to a window of them.

Keys and values have G heads, and n queries share each (grouped-query attention). Memory is linear
in T: blocks of queries meet blocks of keys that they see. Letters: B batch, G key heads, n queries
of a key head, T tokens, hd head dim, M queries that meet a row in one product.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from refine_jax.kernels.device import backend
from refine_jax.kernels.fork_reads import Reach, attend_row, attend_row_of_layer
from refine_jax.kernels.window_attention.splash import make_kernel
from refine_jax.models.layout import Layout

_QUERY_BLOCK = 128
_KEY_BLOCK = 512
_SPLASH_BLOCK = 512
_LANES = 128
_CUDNN_WIDEST = 128  # numbers of a head


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | None = None,
    layout: Layout | None = None,
    *,
    implementation: str | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Attention of whole rows, exact.

    q: [B, G, n, T, hd]; k, v: [B, G, T, hd], in one dtype. Scores are scaled by hd^-0.5, the
    softmax is float32. window: how many tokens a query sees, itself among them; None: all.
    layout: documents do not see each other, and padding is not seen; its own output is 0.
    implementation: "xla", "splash" (a Pallas kernel of jax, for TPUs), "cudnn" (GPUs; full rows in
    bfloat16 or float16 only) or None for the best one on the device; a named one never falls back.
    axis_name: inside `jax.shard_map`, the mesh axis over which rows are spread in blocks of T, in
    their order. Keys and values are then gathered, which are few next to what a layer computes of
    them; by "xla" alone.
    Returns [B, G, n, T, hd] in the dtype of q.

    Raises:
      ValueError: an implementation that does not exist, or not for these arrays.
    """
    spread = axis_name is not None and lax.axis_size(axis_name) > 1
    if implementation is None:
        kind = backend()
        if kind == "tpu" and not spread:
            implementation = "splash"
        elif kind == "gpu" and _no_cudnn(q, layout, spread) is None:
            implementation = "cudnn"
        else:
            implementation = "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation of causal_attention must be None or one of {sorted(IMPLEMENTATIONS)}. "
            f"Got: implementation={implementation!r}."
        )
    if implementation == "xla":
        return _blocked(q, k, v, window, layout, axis_name if spread else None)
    if implementation == "cudnn" and (reason := _no_cudnn(q, layout, spread)):
        raise ValueError(f"causal_attention by 'cudnn': {reason} Use 'xla'.")
    if spread:
        raise ValueError(
            f"causal_attention by {implementation!r} takes whole rows. Got: rows spread over "
            f"devices (axis_name={axis_name!r}). Use 'xla'."
        )
    return IMPLEMENTATIONS[implementation](q, k, v, window, layout)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, last: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention of queries to the slots first ... last of a row's keys and values.

    q: [B, G, M, hd]; k, v: [B, G, T, hd]; first, last: [B, M] int32, none if first > last.
    Returns the output [B, G, M, hd] and the log of the softmax's denominator [B, G, M], float32;
    queries that see nothing get 0 and about -1e30.
    """
    reach = Reach(first[None], last[None])
    out, log_total = attend_row(q[None], k, v, reach, q.shape[-1] ** -0.5, k.shape[2])
    return out[0], log_total[0]


def attend_layer(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array,
    first: jax.Array,
    last: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`attend` to one `layer` of keys and values [N, B, G, T, hd]. Not differentiable."""
    return attend_row_of_layer(q, k, v, layer, Reach(first, last), q.shape[-1] ** -0.5)


def join(parts: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """The attention to several sets of keys together, of what `attend` found in each.

    parts: outputs [..., hd] and logs [...], of which each query sees something in one at least.
    """
    # Two by two: of a softmax over a stack XLA:CPU makes a fusion that crashes (jaxlib 0.10.2).
    out, log_total = parts[0]
    for other, log_other in parts[1:]:
        share = jax.nn.sigmoid(log_total - log_other)[..., None]
        out = share * out + (1 - share) * other
        log_total = jnp.logaddexp(log_total, log_other)
    return out


def _blocked(q, k, v, window, layout, axis_name=None):
    """Blocks of queries, each with the blocks of keys that one of it sees, for every device."""
    rows, groups, sharing, tokens, width = q.shape
    slot = jnp.arange(tokens, dtype=jnp.int32)
    if axis_name is not None:
        k, v = (lax.all_gather(x, axis_name, axis=2, tiled=True) for x in (k, v))
        slot = slot + lax.axis_index(axis_name) * tokens
    slot = jnp.broadcast_to(slot, (rows, tokens))
    first, last = jnp.zeros_like(slot), slot
    if layout is not None:
        first = slot - layout.position
        last = jnp.where(layout.mask, slot, -1)
    if window is not None:
        first = jnp.maximum(first, slot - window + 1)
    block = min(_QUERY_BLOCK, tokens)
    pad = -tokens % block
    if pad:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, pad), (0, 0)))
        first, last = (
            jnp.pad(x, ((0, 0), (0, pad)), constant_values=value)
            for x, value in ((first, 0), (last, -1))
        )
    blocks = (tokens + pad) // block
    q = jnp.moveaxis(q.reshape(rows, groups, sharing, blocks, block, width), 3, 0)
    q = q.reshape(blocks, rows, groups, sharing * block, width)

    def by_block(x):
        x = jnp.moveaxis(x.reshape(rows, blocks, block), 1, 0)
        return jnp.tile(x, (1, 1, sharing))

    reach = Reach(by_block(first), by_block(last))
    out, _ = attend_row(q, k, v, reach, width**-0.5, _KEY_BLOCK)
    out = jnp.moveaxis(out.reshape(blocks, rows, groups, sharing, block, width), 0, 3)
    out = out.reshape(rows, groups, sharing, tokens + pad, width)
    return out[:, :, :, :tokens].astype(q.dtype)


@functools.lru_cache(maxsize=16)
def _splash_kernel(sharing: int, tokens: int, window: int | None, block: int, interpret: bool):
    shape = tokens, tokens
    mask = splash_mask.CausalMask(shape)
    if window is not None and window < tokens:
        mask = splash_mask.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    return make_kernel(splash.make_splash_mqa, mask, sharing, block, interpret)


def _splash(q, k, v, window, layout):
    """jax's splash attention, which visits only the blocks that causality and window leave.

    A row is padded to whole blocks, and heads to whole lanes, with zeros.
    """
    sharing, tokens, width = q.shape[2:]
    block = min(_SPLASH_BLOCK, -(-tokens // _LANES) * _LANES)
    pad, wide = -tokens % block, -width % _LANES
    q = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)
    q, k, v = (jnp.pad(x, (*[(0, 0)] * (x.ndim - 2), (0, pad), (0, wide))) for x in (q, k, v))
    attend = _splash_kernel(sharing, tokens + pad, window, block, backend() != "tpu")
    by_group = jax.vmap(attend, in_axes=(0, 0, 0, None))
    if layout is None:
        out = jax.vmap(jax.vmap(attend))(q, k, v)
    else:
        # Padding, id 0, sees padding: nothing is left without a key. Its output is then dropped.
        ids = jnp.pad(jnp.where(layout.mask, layout.document, 0), ((0, 0), (0, pad)))
        out = jax.vmap(by_group)(q, k, v, splash.SegmentIds(ids, ids))
        out = jnp.where((ids > 0)[:, None, None, :, None], out, 0)
    return out[..., :tokens, :width]


def _no_cudnn(q, layout, spread: bool) -> str | None:
    """Why cuDNN cannot do it; None if it can."""
    if spread:
        return "it takes whole rows. Got: rows spread over devices (axis_name)."
    if layout is not None:
        return "documents and padding have no form without a mask of T x T. Got: a layout."
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"arrays must be bfloat16 or float16. Got: {q.dtype}."
    if q.shape[-1] % 8 or q.shape[-1] > _CUDNN_WIDEST:
        allowed = f"a multiple of 8 and at most {_CUDNN_WIDEST}"
        return f"the head dim must be {allowed}. Got: {q.shape[-1]}."
    return None


def _cudnn(q, k, v, window, layout):
    """cuDNN's flash attention, on arrays [B, T, heads, hd]."""
    del layout
    shape = q.shape
    heads_last = (jnp.swapaxes(x, 1, 2) for x in (q.reshape(shape[0], -1, *shape[3:]), k, v))
    out = jax.nn.dot_product_attention(
        *heads_last,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return jnp.swapaxes(out, 1, 2).reshape(shape)


IMPLEMENTATIONS = {"xla": _blocked, "splash": _splash, "cudnn": _cudnn}


def repeats_for(groups: int, devices: int) -> int:
    """How often each of G key heads is needed for devices to share the queries' heads evenly."""
    return devices // math.gcd(groups, devices)


def repeat_heads(x: jax.Array, axis: int, repeats: int) -> jax.Array:
    """Key heads along `axis`, each as often as `repeats_for` says."""
    return x if repeats == 1 else jnp.repeat(x, repeats, axis=axis)
