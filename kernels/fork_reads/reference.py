"""What forks read of rows, with masks of all tokens: the specification of the ops of api.py."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.kernels import heads as heads_of

MASKED = -1e30  # finite: the difference of two masked scores must not be NaN


class Reach(NamedTuple):
    """The slots that a query sees: first ... last, [J, B, M] int32; none if first > last."""

    first: jax.Array
    last: jax.Array


class ForkRows(NamedTuple):
    """Where forks read: one layer [] int32 for all, and for each fork [F] int32:

    row: the row that it reads. last: the slot of the row's last token before the fork. seen: the
    number of tokens of the fork's document up to that slot; with 0 the fork sees nothing of the
    row. chunk: the chunk whose fast weights it reads.
    """

    layer: jax.Array
    row: jax.Array
    last: jax.Array
    seen: jax.Array
    chunk: jax.Array


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(spec, a, b, precision=lax.Precision.HIGHEST)


def attend_row_reference(q, k, v, reach: Reach, scale: float, window: int):
    """Run `attend_row` of api.py in float32."""
    del window
    slot = jnp.arange(k.shape[2])
    seen = (slot >= reach.first[..., None]) & (slot <= reach.last[..., None])
    seen = seen[:, :, None]  # [J, B, 1, M, T]
    scores = jnp.where(seen, scale * _product("jbgmh,bgth->jbgmt", q, k), MASKED)
    log_total = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - log_total[..., None]), 0.0)
    return _product("jbgmt,bgth->jbgmh", weights, v), log_total


def attend_windows_reference(new, row_k, row_v, where: ForkRows, own, window: int, heads: int):
    """Run `attend_windows` of api.py, on one device's part of the rows, in float32."""
    q, k, v = new
    forks, groups, count, size = q.shape
    keys, values = (
        jnp.concatenate([x[where.layer, where.row], y], axis=2) for x, y in ((row_k, k), (row_v, v))
    )
    slot, token = jnp.arange(row_k.shape[3]), jnp.arange(count)
    # Token s of a fork has a distance of last - t + 1 + s to slot t.
    distance = where.last[:, None, None] - slot + 1 + token[:, None]  # [F, S, T]
    of_row = (distance < window) & (slot <= where.last[:, None, None])
    of_row &= slot > (where.last - where.seen)[:, None, None]
    back = token[:, None] - token
    of_own = (back >= 0) & (back < window) & own
    of_own = jnp.broadcast_to(of_own, (forks, count, count))
    visible = jnp.concatenate([of_row, of_own], axis=2)[:, None, None]
    queries = heads_of.alone(q, heads).reshape(forks, groups, heads, count, size)
    scores = (size // heads) ** -0.5 * _product("fgnsh,fgth->fgnst", queries, keys)
    scores = jnp.where(visible, scores, MASKED)
    log_total = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(visible, jnp.exp(scores - log_total[..., None]), 0.0)
    out = _product("fgnst,fgth->fgnsh", weights, values)
    return heads_of.together(out.reshape(forks, -1, count, size), heads), log_total


def read_weights_reference(q, weights, where: ForkRows):
    """Run `read_weights` of api.py, on one device's part of the chunks, in float32."""
    w0, w1, w2 = (w[where.layer, where.row, where.chunk] for w in weights)
    gate, up = (_product("fhsd,fhkd->fhsk", q, w) for w in (w0, w2))
    return _product("fhsk,fhdk->fhsd", jax.nn.silu(gate) * up, w1).astype(q.dtype)
