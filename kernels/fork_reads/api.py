"""What forks read of the traces of rows: attention and LaCT's fast weights.

A fork sees at most W - 1 tokens before it: a copy of them for each of R forks is R W tokens, for 64
forks eight times a row of 16,384. These ops read rows where they are: `attend_row` for gradients,
all forks of a row at once and those of one layer, `attend_windows` and `read_weights` for rollouts,
fork by fork in the traces of all layers.

Letters: B rows, G groups of n heads side by side with L numbers, T tokens of a row, W window; J
blocks of M queries, which begin near each other; N layers, F forks of S new tokens, H fast-weight
heads of width d with hidden size D.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.kernels import sequence
from refine_jax.kernels.fork_reads import pallas_tpu, pallas_tpu_rows, xla
from refine_jax.kernels.fork_reads.reference import (
    ForkRows,
    Reach,
    attend_row_reference,
    attend_windows_reference,
    read_weights_reference,
)

ROW_IMPLEMENTATIONS = {
    "reference": attend_row_reference,
    "xla": xla.attend_row_xla,
    "pallas_tpu": pallas_tpu_rows.attend_row_tpu,
}
WINDOW_IMPLEMENTATIONS = {
    "reference": attend_windows_reference,
    "xla": xla.attend_windows_xla,
    "pallas_tpu": pallas_tpu.attend_windows_tpu,
}
WEIGHT_IMPLEMENTATIONS = {
    "reference": read_weights_reference,
    "xla": xla.read_weights_xla,
    "pallas_tpu": pallas_tpu.read_weights_tpu,
}


def _chosen(op: str, table: Mapping[str, Any], name: str | None, *, by_kernel: bool):
    name = name or ("pallas_tpu" if by_kernel else "xla")
    if name not in table:
        raise ValueError(
            f"implementation of {op} must be None or one of {sorted(table)}. "
            f"Got: implementation={name!r}."
        )
    return table[name]


def attend_row(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    reach: Reach,
    scale: float,
    window: int,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of q [J, B, G, M, L] to a row's k and v [B, G, T, L]; differentiable.

    reach: the slots that queries see. scale: of scores. window: about how many slots a query sees,
    for the size of blocks.
    implementation: "reference", "xla", "pallas_tpu" (T and L multiples of 128) or None for the best
        one on the device; a named one never falls back.

    Returns the output [J, B, G, M, L] and the log of the softmax's denominator [J, B, G, M], both
    float32; queries that see nothing get 0 and about -1e30.

    Raises:
      ValueError: an implementation that does not exist.
    """
    by_kernel = pallas_tpu_rows.takes_row(q.shape, k.shape)
    run = _chosen("attend_row", ROW_IMPLEMENTATIONS, implementation, by_kernel=by_kernel)
    return run(q, k, v, reach, scale, window)


def attend_row_of_layer(
    q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, reach: Reach, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Run `attend_row` of q [B, G, M, L] to one `layer` of k and v [N, ..., G, T, L].

    ...: axes that are B together. Returns [B, G, M, L] and [B, G, M], float32. Not for gradients.
    """
    rows, tokens = q.shape[0], k.shape[-2]
    if not pallas_tpu_rows.takes_row((1, *q.shape), (rows, *k.shape[-3:])):
        return xla.attend_blocks_of_layer(q, k, v, layer, reach, scale)
    reach = jax.tree.map(lambda x: x[None], reach)
    k, v = (xla.cut_layer(x, layer, rows, 0, tokens) for x in (k, v))
    out, log_total = attend_row(q[None], k, v, reach, scale, tokens)
    return out[0], log_total[0]


def attend_windows(
    new: tuple[jax.Array, jax.Array, jax.Array],
    row_k: jax.Array,
    row_v: jax.Array,
    where: ForkRows,
    window: int,
    heads: int,
    *,
    implementation: str | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Causal attention of the S tokens of each fork to themselves and to the row before them.

    new: q, k, v [F, G, S, L] of the forks, with rope. row_k, row_v: [N, B, G, T, L], keys with
        rope. heads: n. Scores are scaled by (L / n)^-0.5, tokens see W - 1 before them.
    implementation: "reference", "xla", "pallas_tpu" (T and L multiples of 128) or None for the best
        one on the device; a named one never falls back.
    axis_name: inside `jax.shard_map`, the mesh axis over which rows are spread in blocks of T, in
        their order; `where` counts slots of the whole row. All devices return the same.

    Returns [F, G, S, L] in the dtype of k. Not for gradients.

    Raises:
      ValueError: an implementation that does not exist.
    """
    by_kernel = pallas_tpu.takes_windows(row_k.shape, new[0].shape[2])
    run = _chosen("attend_windows", WINDOW_IMPLEMENTATIONS, implementation, by_kernel=by_kernel)
    own = True
    if axis_name is not None:
        device = lax.axis_index(axis_name)
        where = where._replace(last=where.last - device * row_k.shape[3])
        own = device == 0  # one device counts the forks' own tokens
    out, log_total = run(new, row_k, row_v, where, own, window, heads)
    if axis_name is not None:
        forks, groups, count, size = out.shape
        by_head = jnp.moveaxis(out.reshape(forks, groups, count, heads, -1), 3, 2)
        out, _ = sequence.join_softmax(by_head, log_total, axis_name)
        out = jnp.moveaxis(out, 2, 3).reshape(forks, groups, count, size)
    return out.astype(new[1].dtype)


def read_weights(
    q: jax.Array,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    where: ForkRows,
    *,
    implementation: str | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Apply to q [F, H, S, d] of each fork the fast weights of its chunk (`apply_fast_weights`).

    weights: W0 [N, B, chunks, H, D, d], W1 [..., d, D] and W2 [..., D, d].
    implementation: "reference", "xla", "pallas_tpu" (D and d multiples of 128) or None for the best
        one on the device; a named one never falls back.
    axis_name: inside `jax.shard_map`, the mesh axis over which chunks are spread in blocks, in
        their order; `where` counts those of the whole row. All devices return the same.

    Returns [F, H, S, d] in the dtype of q. Not for gradients.

    Raises:
      ValueError: an implementation that does not exist.
    """
    by_kernel = pallas_tpu.takes_weights(weights[0].shape, q.shape[2])
    run = _chosen("read_weights", WEIGHT_IMPLEMENTATIONS, implementation, by_kernel=by_kernel)
    if axis_name is None:
        return run(q, weights, where)
    chunks = weights[0].shape[2]
    chunk = where.chunk - lax.axis_index(axis_name) * chunks
    nearest = jnp.clip(chunk, 0, chunks - 1)
    found = run(q, weights, where._replace(chunk=nearest))
    found = jnp.where((chunk == nearest)[:, None, None, None], found, 0)
    return lax.psum(found, axis_name)
