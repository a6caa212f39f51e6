"""Window attention by jax's splash attention, a Pallas kernel for TPUs."""

from __future__ import annotations

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from refine_jax.kernels import heads
from refine_jax.kernels.device import backend
from refine_jax.kernels.window_attention.xla import behind, front_pad, pad_tokens

_SPLASH_BLOCK = 1024  # and no larger than the window, as whole blocks are computed
_SPLASH_TOKENS = 16384  # of one call: the host's work for its tables grows with the square


@functools.lru_cache(maxsize=16)
def _splash_kernel(
    num_heads: int, num_tokens: int, num_past: int, window: int, block: int, interpret: bool
):
    shape = num_tokens, num_past + num_tokens
    mask = splash_mask.LocalMask(shape, window_size=(window - 1, 0), offset=num_past)
    return make_kernel(splash.make_splash_mha, mask, num_heads, block, interpret)


def make_kernel(maker, mask: splash_mask.Mask, num_heads: int, block: int, interpret: bool):
    """Make one of jax's kernels with its tables of blocks, as numpy arrays. It takes seconds.

    maker: `make_splash_mha`, or `make_splash_mqa` where all heads have their keys in common.
    """
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")

    def make():
        kernel = maker(
            splash_mask.MultiHeadMask([mask] * num_heads),
            block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)

    # It computes its tables with jax: in another thread neither this one's trace nor its mesh takes
    # part, whose devices may be those of another process, or only be compiled for.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def window_attention_splash(q, k, v, ids, past, window, heads_per_group):
    """Run `window_attention` of api.py; only the blocks that the window reaches are visited.

    The queries of a group's heads have the group's keys and values in common.

    A row is padded to whole blocks: causality keeps real tokens from seeing what stands behind. So
    is its past, at its beginning: out of reach for every window. A long row is cut into pieces,
    each behind its past, that are rows of their own.
    """
    num_rows, num_groups, num_tokens, group_size = q.shape
    num_heads = num_groups * heads_per_group
    block = min(_SPLASH_BLOCK, *(-(-size // 128) * 128 for size in (window, num_tokens)))
    q = (q.astype(jnp.float32) * (group_size / heads_per_group) ** -0.5).astype(q.dtype)
    count = -(-num_tokens // _SPLASH_TOKENS)
    if count > 1 and ids is None:  # nothing else tells that the first piece has no past
        ids = jnp.ones((num_rows, num_tokens), jnp.int32)
    (q, k, v), ids = pad_tokens((q, k, v), ids, count * block)
    q = heads.alone(q, heads_per_group)
    size, num_past, key_ids = q.shape[2] // count, 0, ids
    if count > 1 or past is not None:
        num_past = -(-(window - 1) // block) * block
        if past is None:
            k, v, key_ids = (front_pad(x, num_past) for x in (k, v, ids))
        else:
            past = [front_pad(x, num_past - (window - 1)) for x in past]
            k, v, key_ids = (behind(a, b) for a, b in zip(past, (k, v, ids), strict=True))
    if count > 1:
        q, ids = (_to_pieces(x, size, 0) for x in (q, ids))
        k, v, key_ids = (_to_pieces(x, size, num_past) for x in (k, v, key_ids))
    interpret = backend() != "tpu"
    attend = _splash_kernel(num_heads, size, num_past, window, block, interpret)
    if ids is None:
        out = jax.vmap(attend)(q, k, v)
    else:
        # Padding, id 0, sees padding: nothing is left without a key. Its output is then dropped.
        out = jax.vmap(attend)(q, k, v, splash.SegmentIds(ids, key_ids))
        out = jnp.where((ids > 0)[:, None, :, None], out, 0)
    if count > 1:
        out = jnp.moveaxis(out.reshape(num_rows, count, *out.shape[1:]), 1, 2)
        out = out.reshape(num_rows, num_heads, -1, out.shape[-1])
    return heads.together(out, heads_per_group)[:, :, :num_tokens]


def _to_pieces(x, size: int, past: int):
    """Arrays [B, A, past + n size, hd] or ids [B, past + n size] to n rows of past + size each."""
    axis = x.ndim // 2
    starts = range(0, x.shape[axis] - past, size)
    pieces = [lax.slice_in_dim(x, start, start + past + size, axis=axis) for start in starts]
    return jnp.stack(pieces, axis=1).reshape(-1, *pieces[0].shape[1:])
