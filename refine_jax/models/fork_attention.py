"""Window attention of the tokens of forks, which reads the keys and values of rows where they are.

A fork sees at most W - 1 tokens before it: a copy of them for each of R forks is R W tokens, for 64
forks eight times a row of 16,384. Here the queries of few forks meet all keys of the row, in one
product and under a mask. It takes R S / W of the operations of the row's own attention, and the
gradients with respect to the row's keys and values are one product each. Many forks go in blocks of
neighbours, which begin near each other, or together: each block meets the keys that one of it sees.

Letters as in attention.py: B batch, G groups of n heads side by side with L numbers, R forks of a
row in J blocks, S tokens of a fork, M = n S R / J queries of a group, T tokens of a row, W window.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.kernels import fork_reads, heads, sequence
from refine_jax.kernels.fork_reads import Reach
from refine_jax.models.attention import MASKED, product

_FORKS = 8  # most forks of a block, where there are blocks


def fork_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    row_k: jax.Array,
    row_v: jax.Array,
    last: jax.Array,
    seen: jax.Array,
    window: int,
    *,
    heads_per_group: int = 1,
    axis_name: str | None = None,
) -> jax.Array:
    """Causal attention of the S tokens of each fork to themselves and to the row before them.

    q, k, v: [B, R, G, S, L], of the forks. row_k, row_v: [B, G, T, L]; keys with rope. last:
    [B, R] int32, the slot of the row's last token before a fork; seen: [B, R], how many tokens its
    document has up to there, which may be 0. Scores are scaled by hd^-0.5, the softmax is float32.
    axis_name: inside `jax.shard_map`, the mesh axis over which rows are spread in blocks of T, in
    their order; `last` counts slots of the whole row. All devices return the same.
    Returns [B, R, G, S, L] in the dtype of k.
    """
    rows, forks, groups, num_new, size = q.shape
    scale, tokens = (size / heads_per_group) ** -0.5, row_k.shape[2]
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # [B, G, R, S, L]
    queries = heads.alone(q.reshape(rows, groups, -1, size), heads_per_group)

    # Token s of a fork has a distance of last - t + 1 + s to slot t.
    first = last[..., None] + jnp.maximum(1 - seen[..., None], jnp.arange(num_new) + 2 - window)
    reach = Reach(first, jnp.broadcast_to(last[..., None], first.shape))
    if axis_name is not None:
        offset = lax.axis_index(axis_name) * tokens
        reach = jax.tree.map(lambda slot: slot - offset, reach)
    blocks = _fork_blocks(forks, tokens, window)
    reach = jax.tree.map(lambda x: x.reshape(rows, blocks, -1).swapaxes(0, 1), reach)
    reach = jax.tree.map(lambda x: jnp.tile(x, (1, 1, heads_per_group)), reach)
    by_block = queries.reshape(rows, groups, heads_per_group, blocks, -1, size)
    by_block = jnp.moveaxis(by_block, 3, 0)
    shape = by_block.shape
    by_block = by_block.reshape(*shape[:3], -1, size)  # [J, B, G, M, L]
    out, log_total = fork_reads.attend_row(by_block, row_k, row_v, reach, scale, window)
    if axis_name is not None:
        out, log_total = sequence.join_softmax(out, log_total, axis_name)
    out = jnp.moveaxis(out.reshape(shape), 0, 3)
    log_total = jnp.moveaxis(log_total.reshape(shape[:-1]), 0, 3)

    own = queries.reshape(rows, groups, heads_per_group, forks, num_new, size)
    back = jnp.arange(num_new)[:, None] - jnp.arange(num_new)
    scores = product("bgnrsh,bgrth->bgnrst", own, k) * scale
    scores = jnp.where((back >= 0) & (back < window), scores, MASKED)
    log_own = jax.nn.logsumexp(scores, axis=-1)  # finite: a token sees itself
    own = product("bgnrst,bgrth->bgnrsh", jnp.exp(scores - log_own[..., None]), v)

    share = jax.nn.sigmoid(log_total.reshape(log_own.shape) - log_own)[..., None]
    out = (share * out.reshape(own.shape) + (1 - share) * own).astype(k.dtype)
    out = heads.together(out.reshape(rows, -1, forks * num_new, size), heads_per_group)
    return jnp.swapaxes(out.reshape(rows, groups, forks, num_new, size), 1, 2)


def _fork_blocks(forks: int, num_tokens: int, window: int) -> int:
    """J: 1 for few forks, and for rows not much longer than what a block of forks would see."""
    if forks <= _FORKS or num_tokens <= 4 * window:
        return 1
    return forks // max(n for n in range(1, _FORKS + 1) if forks % n == 0)
