"""Causal softmax attention over a window of tokens: for whole rows, and for continued states.

Query i sees the keys i - window + 1 ... i of its own document. Where a row is spread over devices,
those before a device's own tokens are its past.

Arrays hold heads in groups of n, side by side: G = A / n groups of L = n hd numbers a token. A TPU
fills the last axis of every array up to 128, so that heads of 64 alone would be twice as large in
memory and in time. Products with the heads of a group are those with their group, where a query is
zero but in its own head. Letters: B batch, A attention heads, T tokens, hd head dim, R forks of a
sequence, S new tokens, W window.
"""

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
from refine_jax.kernels.sequence import halo
from refine_jax.kernels.window_attention import takes, window_attention_tpu
from refine_jax.models.layout import Layout
from refine_jax.parallel import axis_size, over_shards

MASKED = -1e30  # finite: a row that sees nothing must not become NaN
_QUERY_BLOCK = 128  # of 64, 128 and 256 the fastest on CPU at window 512
_SPLASH_BLOCK = 1024  # and no larger than the window, as whole blocks are computed
_SPLASH_TOKENS = 16384  # of one call: the host's work for its tables grows with the square
_TPU_LANES = 128


def heads_in_group(num_heads: int, head_dim: int) -> int:
    """How many heads the model's arrays hold side by side: as many as fit the lanes of a TPU.

    Devices that share heads (mesh axis `tensor`) have whole groups. 1 on other devices.
    """
    lanes = _TPU_LANES if backend() == "tpu" else head_dim
    here = num_heads // axis_size("tensor")
    return max(n for n in range(1, here + 1) if here % n == 0 and (n == 1 or n * head_dim <= lanes))


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int,
    layout: Layout | None = None,
    *,
    heads_per_group: int = 1,
    implementation: str | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Causal attention of whole rows, exact, in time and memory linear in T.

    q, k, v: [B, G, T, L] in one dtype, heads_per_group heads side by side; scores are scaled by
    hd^-0.5, the softmax is float32.
    layout: documents do not see each other, and padding is not seen; its own output is 0.
    implementation: "xla", "splash" (a Pallas kernel of jax, for TPUs), "cudnn" (GPUs; full rows in
    bfloat16 or float16 only) or None for the best one on the device; a named one never falls back.
    axis_name: inside `jax.shard_map`, the mesh axis over which rows are spread in blocks of T, in
    their order: all arrays, also those of `layout`, are those of the device's block, and documents
    have the numbers of the whole row. The window may reach over several blocks. Not by "cudnn".
    Returns [B, G, T, L] in the dtype of q.

    Raises:
      ValueError: an implementation that does not exist, or not for these arrays.
    """
    ids = None if layout is None else jnp.where(layout.mask, layout.document, 0)
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    window, past = min(window, q.shape[2] * devices), None
    if devices > 1 and window > 1:
        # On the first device only the ids, 0 there, tell that nothing is before its tokens.
        ids = jnp.ones((q.shape[0], q.shape[2]), jnp.int32) if ids is None else ids
        before = functools.partial(halo, rows=window - 1, axis_name=axis_name)
        past = before(k, axis=2), before(v, axis=2), before(ids, axis=1)
    if implementation is None:
        kind = backend()
        if kind == "tpu":
            implementation = "pallas_tpu" if takes(q.shape[-1], heads_per_group) else "splash"
        elif kind == "gpu" and _no_cudnn(q, ids, past) is None:
            implementation = "cudnn"
        else:
            implementation = "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation of window_attention must be None or one of {sorted(IMPLEMENTATIONS)}. "
            f"Got: implementation={implementation!r}."
        )
    if implementation == "pallas_tpu":
        return window_attention_tpu(q, k, v, ids, past, window, heads_per_group)
    if implementation == "splash":
        return _splash(q, k, v, ids, past, window, heads_per_group)
    if heads_per_group == 1:
        return IMPLEMENTATIONS[implementation](q, k, v, ids, past, window)
    num_groups = q.shape[1]
    q, k, v = (heads.regroup(x, num_groups * heads_per_group) for x in (q, k, v))
    if past is not None:
        past = *(heads.regroup(x, q.shape[1]) for x in past[:2]), past[2]
    return heads.regroup(IMPLEMENTATIONS[implementation](q, k, v, ids, past, window), num_groups)


def _pad_tokens(arrays, ids, multiple: int):
    """Arrays [B, A, T, hd] and ids [B, T] (or None) with T padded at its end."""
    pad = -arrays[0].shape[2] % multiple
    if not pad:
        return arrays, ids
    arrays = [jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) for x in arrays]
    return arrays, None if ids is None else jnp.pad(ids, ((0, 0), (0, pad)))


@functools.lru_cache(maxsize=16)
def _splash_kernel(
    num_heads: int, num_tokens: int, num_past: int, window: int, block: int, interpret: bool
):
    """jax's kernel with its tables of blocks, which take seconds to make: kept as numpy arrays."""
    shape = num_tokens, num_past + num_tokens
    mask = splash_mask.LocalMask(shape, window_size=(window - 1, 0), offset=num_past)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")

    def make():
        kernel = splash.make_splash_mha(
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


def _splash(q, k, v, ids, past, window, heads_per_group):
    """jax's splash attention, which visits only the blocks that the window reaches.

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
    (q, k, v), ids = _pad_tokens((q, k, v), ids, count * block)
    q = heads.alone(q, heads_per_group)
    size, num_past, key_ids = q.shape[2] // count, 0, ids
    if count > 1 or past is not None:
        num_past = -(-(window - 1) // block) * block
        if past is None:
            k, v, key_ids = (_front_pad(x, num_past, x.ndim // 2) for x in (k, v, ids))
        else:
            past = [_front_pad(x, num_past - (window - 1), x.ndim // 2) for x in past]
            k, v, key_ids = (_after(a, b) for a, b in zip(past, (k, v, ids), strict=True))
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


def _no_cudnn(q, ids, past) -> str | None:
    """Why cuDNN cannot do it; None if it can."""
    if past is not None:
        return "it takes whole rows. Got: rows spread over devices (axis_name)."
    if ids is not None:
        return "documents and padding have no form without a mask of T x T. Got: a layout."
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"arrays must be bfloat16 or float16. Got: {q.dtype}."
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"the head dim must be a multiple of 8 and at most 128. Got: {q.shape[-1]}."
    return None


def _cudnn(q, k, v, ids, past, window):
    """cuDNN's flash attention, on arrays [B, T, A, hd]."""
    if reason := _no_cudnn(q, ids, past):
        raise ValueError(f"window_attention by 'cudnn': {reason} Use 'xla'.")
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=(window - 1, 0), implementation="cudnn"
    )
    return jnp.swapaxes(out, 1, 2)


def _blocked(q, k, v, ids, past, window):
    """A scan over blocks of queries, for every device."""
    num_tokens = q.shape[2]
    block = min(_QUERY_BLOCK, max(window, 64), num_tokens)
    (q, k, v), ids = _pad_tokens((q, k, v), ids, block)
    return _attend(q, k, v, ids, past, window, block)[:, :, :num_tokens]


IMPLEMENTATIONS = {
    "xla": _blocked,
    "pallas_tpu": window_attention_tpu,
    "splash": _splash,
    "cudnn": _cudnn,
}


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Compute the einsum `spec` of a [...] and b [...] in the dtype of b, with float32 sums."""
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _visible(start, size: int, window: int, ids) -> jax.Array:
    """Which keys, from start - window + 1 on, the queries of a block see; [1 or B, 1, q, k]."""
    query = jnp.arange(size)[:, None]
    key = jnp.arange(size + window - 1)[None] - (window - 1)  # both relative to the block's start
    seen = (key <= query) & (query - key < window)
    if ids is None:
        return (seen & (start + key >= 0))[None, None]
    at_query = lax.dynamic_slice_in_dim(ids, start + window - 1, size, axis=1)[:, :, None]
    at_key = lax.dynamic_slice_in_dim(ids, start, size + window - 1, axis=1)[:, None]
    return (seen & (at_query == at_key) & (at_query > 0))[:, None]


def _front_pad(x, rows: int, axis: int):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (rows, 0)
    return jnp.pad(x, widths)


def _after(past, x):
    """Arrays [B, A, T, hd] or ids [B, T], tokens along their middle axis, behind their past."""
    return jnp.concatenate([past, x], axis=x.ndim // 2)


def _reachable(k, v, ids, past, window: int):
    """k, v and ids (or None) behind the window - 1 rows before them: zeros without a past."""
    if past is not None:
        return [_after(a, b) for a, b in zip(past, (k, v, ids), strict=True)]
    return [None if x is None else _front_pad(x, window - 1, x.ndim // 2) for x in (k, v, ids)]


def _to_blocks(x, block: int):
    """[B, A, T, ...] -> [T / block, B, A, block, ...]."""
    blocks = x.reshape(*x.shape[:2], -1, block, *x.shape[3:])
    return jnp.moveaxis(blocks, 2, 0)


def _from_blocks(x):
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, ids, past, window: int, block: int):
    return _attend_forward(q, k, v, ids, past, window, block)[0]


def _attend_forward(q, k, v, ids, past, window, block):
    """A scan over blocks of queries; each looks at the slab of keys that its window can reach."""
    before = window - 1
    keys, values, padded_ids = _reachable(k, v, ids, past, window)
    scale = q.shape[-1] ** -0.5

    def attend_block(start, queries):
        slab = [lax.dynamic_slice_in_dim(x, start, block + before, axis=2) for x in (keys, values)]
        seen = _visible(start, block, window, padded_ids)
        scores = jnp.where(seen, scale * product("baqh,bakh->baqk", queries, slab[0]), MASKED)
        top = scores.max(-1, keepdims=True)
        weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
        total = jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
        out = product("baqk,bakh->baqh", weights, slab[1]) / total
        return start + block, (out.astype(q.dtype), (top + jnp.log(total))[..., 0])

    _, (out, log_total) = lax.scan(attend_block, 0, _to_blocks(q, block))
    out = _from_blocks(out)
    return out, (q, k, v, ids, past, out, _from_blocks(log_total))


def _attend_backward(window, block, residuals, cotangent):
    """Recomputes the probabilities of a block from its log normaliser."""
    q, k, v, ids, past, out, log_total = residuals
    before = window - 1
    keys, values, padded_ids = _reachable(k, v, ids, past, window)
    scale = q.shape[-1] ** -0.5
    cotangent = cotangent.astype(q.dtype)
    delta = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), -1)

    def add_slab(total, part, start):
        old = lax.dynamic_slice_in_dim(total, start, block + before, axis=2)
        return lax.dynamic_update_slice_in_dim(total, old + part, start, axis=2)

    def block_gradients(carry, inputs):
        start, dk, dv = carry
        queries, d_out, delta, log_total = inputs
        slab_k, slab_v = (
            lax.dynamic_slice_in_dim(x, start, block + before, axis=2) for x in (keys, values)
        )
        seen = _visible(start, block, window, padded_ids)
        scores = scale * product("baqh,bakh->baqk", queries, slab_k)
        weights = jnp.where(seen, jnp.exp(scores - log_total[..., None]), 0.0)
        d_weights = product("baqh,bakh->baqk", d_out, slab_v)
        d_scores = scale * weights * (d_weights - delta[..., None])
        dq = product("baqk,bakh->baqh", d_scores, slab_k)
        dk = add_slab(dk, product("baqk,baqh->bakh", d_scores, queries), start)
        dv = add_slab(dv, product("baqk,baqh->bakh", weights, d_out), start)
        return (start + block, dk, dv), dq.astype(q.dtype)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    inputs = tuple(_to_blocks(x, block) for x in (q, cotangent, delta, log_total))
    (_, dk, dv), dq = lax.scan(block_gradients, (0, zeros, zeros), inputs)
    dk, dv = (x.astype(k.dtype) for x in (dk, dv))
    d_past = None if past is None else (dk[:, :, :before], dv[:, :, :before], None)
    return _from_blocks(dq), dk[:, :, before:], dv[:, :, before:], None, d_past


_attend.defvjp(_attend_forward, _attend_backward)


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ring_k: jax.Array,
    ring_v: jax.Array,
    cursor: jax.Array,
    position: jax.Array,
    *,
    heads_per_group: int = 1,
) -> jax.Array:
    """Attention of S new tokens to themselves and to the tokens that a decode state remembers.

    q, k, v: [B, R, G, S, L], the new tokens. ring_k, ring_v: [B, R, G, W, L], the last W tokens
    of the document in ring order; the newest stands before slot `cursor` [B, R]. position: [B, R],
    tokens of the document so far; slots that hold none of them are not seen. W is the window.
    Returns [B, R, G, S, L] in the dtype of q.
    """
    shape, num_new, window = q.shape, q.shape[3], ring_k.shape[3]
    scale = (q.shape[-1] / heads_per_group) ** -0.5
    if heads_per_group > 1:
        q = heads.alone(q, heads_per_group).reshape(*shape[:3], -1, shape[-1])
    index = jnp.arange(num_new)
    age = (cursor[..., None] - 1 - jnp.arange(window)) % window  # [B, R, W]; 0 is the newest
    distance = index[:, None] + 1 + age[..., None, :]  # [B, R, S, W]
    in_ring = (age < position[..., None])[..., None, :] & (distance < window)
    back = index[:, None] - index[None]
    in_new = (back >= 0) & (back < window)
    in_ring = jnp.tile(in_ring, (heads_per_group, 1))
    in_new = jnp.tile(in_new, (heads_per_group, 1))
    scores = jnp.concatenate(
        [
            jnp.where(
                in_ring[:, :, None], product("brash,brawh->brasw", q, ring_k) * scale, MASKED
            ),
            jnp.where(in_new, product("brash,brath->brast", q, k) * scale, MASKED),
        ],
        axis=-1,
    )
    weights = jax.nn.softmax(scores, axis=-1)
    out = product("brasw,brawh->brash", weights[..., :window], ring_v)
    out = (out + product("brast,brath->brash", weights[..., window:], v)).astype(k.dtype)
    if heads_per_group > 1:
        out = heads.together(out.reshape(*shape[:2], -1, *shape[3:]), heads_per_group)
    return out


def push_to_ring(ring: jax.Array, new: jax.Array, cursor: jax.Array) -> jax.Array:
    """Rings after new tokens are written from slot `cursor` [B, R] on.

    ring: [N, B, R, G, W, L], of N layers. new: [N, B, R, G, S, L]. The next cursor is
    (cursor + S) % W, also where S > W and only the last W tokens stay.
    """
    window, num_new = ring.shape[4], new.shape[4]
    if num_new > window:
        cursor = (cursor + num_new - window) % window
        new = new[..., -window:, :]
    # There may be fewer heads of keys than devices for heads: each device then holds all.
    heads_axis = None if ring.shape[3] % axis_size("tensor") else "heads"
    arrays = (None, "batch", None, heads_axis)
    push = _push_token if num_new == 1 else _push_tokens
    push = over_shards(push, (arrays, arrays, ("batch",)), arrays)
    return push(ring, new.astype(ring.dtype), cursor)


def _push_token(ring, new, cursor):
    """Fork by fork: all at once would be a scatter, for which a TPU copies the ring."""
    num_forks = cursor.shape[1]

    def write(index, ring):
        row, fork = index // num_forks, index % num_forks
        token = lax.dynamic_slice(
            new, (0, row, fork, 0, 0, 0), (new.shape[0], 1, 1, *new.shape[3:])
        )
        return lax.dynamic_update_slice(ring, token, (0, row, fork, 0, cursor[row, fork], 0))

    return lax.fori_loop(0, cursor.size, write, ring)


def _push_tokens(ring, new, cursor):
    def write(ring, new, cursor):  # [N, G, W, L], [N, G, S, L], []
        slots = (cursor + jnp.arange(new.shape[2])) % ring.shape[2]
        return ring.at[:, :, slots].set(new, unique_indices=True)

    by_fork = jax.vmap(write, in_axes=(1, 1, 0), out_axes=1)
    return jax.vmap(by_fork, in_axes=(1, 1, 0), out_axes=1)(ring, new, cursor)
