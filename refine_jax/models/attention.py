"""Attention of forks and decode states to the window of tokens that they remember.

Whole rows attend by `kernels/window_attention`, whose module says how arrays hold heads in groups.
Letters: B batch, R forks of a sequence, S new tokens, G groups of L = n hd numbers, W window.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.kernels import heads
from refine_jax.kernels.device import backend
from refine_jax.kernels.window_attention import MASKED, product
from refine_jax.parallel import axis_size, over_shards

_TPU_LANES = 128


def heads_in_group(num_heads: int, head_dim: int) -> int:
    """How many heads the model's arrays hold side by side: as many as fit the lanes of a TPU.

    Devices that share heads (mesh axis `tensor`) have whole groups. 1 on other devices.
    """
    lanes = _TPU_LANES if backend() == "tpu" else head_dim
    here = num_heads // axis_size("tensor")
    return max(n for n in range(1, here + 1) if here % n == 0 and (n == 1 or n * head_dim <= lanes))


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


def write_layer(cache: jax.Array, new: jax.Array, layer: jax.Array, cursor: jax.Array) -> jax.Array:
    """Caches [N, B, R, G, C, L] after `new` [B, R, G, S, L] is written in one layer.

    It begins at slot `cursor` [B, R] of each fork, behind which there is room for it.
    """
    heads_axis = None if cache.shape[3] % axis_size("tensor") else "heads"
    forks, arrays = ("batch", None, heads_axis), (None, "batch", None, heads_axis)
    write = over_shards(_write_layer, (arrays, forks, (), ("batch",)), arrays)
    return write(cache, new.astype(cache.dtype), layer, cursor)


def _write_layer(cache, new, layer, cursor):
    """Fork by fork, as in `_push_token`."""
    num_forks = cursor.shape[1]

    def write(index, cache):
        row, fork = index // num_forks, index % num_forks
        tokens = lax.dynamic_slice(new, (row, fork, 0, 0, 0), (1, 1, *new.shape[2:]))
        at = (layer, row, fork, 0, cursor[row, fork], 0)
        return lax.dynamic_update_slice(cache, tokens[None], at)

    return lax.fori_loop(0, cursor.size, write, cache)


def _push_tokens(ring, new, cursor):
    def write(ring, new, cursor):  # [N, G, W, L], [N, G, S, L], []
        slots = (cursor + jnp.arange(new.shape[2])) % ring.shape[2]
        return ring.at[:, :, slots].set(new, unique_indices=True)

    by_fork = jax.vmap(write, in_axes=(1, 1, 0), out_axes=1)
    return jax.vmap(by_fork, in_axes=(1, 1, 0), out_axes=1)(ring, new, cursor)
