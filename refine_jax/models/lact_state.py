"""What LaCT keeps between its passes: a forward pass's trace, parts of it, decode states.

Letters: B batch, T tokens, G groups of L numbers that hold the attention heads (attention.py), H
fast-weight heads, N chunk slots of C tokens, E rate channels, R forks of a sequence, W attention
window.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from refine_jax.kernels.lact import FastState, Weights


class LaCTTrace(NamedTuple):
    """What forks need of a forward pass.

    k, v: [B, G, T, L], keys with rope, as attention takes them; fast weights, which need the keys
    of few chunks alone, take rope off. rates: [B, H, T, 3, E]. momentum: [B, H, T] or None.
    chunks: FastState [B, N, H, ...], read by each chunk.
    """

    k: jax.Array
    v: jax.Array
    rates: jax.Array
    momentum: jax.Array | None
    chunks: FastState


class LaCTPick(NamedTuple):
    """What forks need of a trace, cut out.

    fast: FastState [B, R, H, ...], with which the fork's chunk is read. k, v: [B, R, G, W, L], the
    last W tokens, or the first, keys with rope; W is here at most T. pending: k and v
    [B, R, G, C, L], rates [B, R, H, C, 3, E] and momentum [B, R, H, C] of the last C tokens.
    """

    fast: FastState
    k: jax.Array
    v: jax.Array
    pending: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]


class LaCTState(NamedTuple):
    """A decode state; its size does not depend on the tokens seen.

    A chunk's update is made when the first token after it arrives.

    fast: FastState [B, R, H, ...] of the current chunk. sums: its pending update [B, R, H, ...].
    momentum_sum: [B, R, H], over the tokens in `sums`; None without momentum.
    keys, values: [B, R, G, W, L], the last W tokens in ring order, keys with rope.
    cursor: [B, R] int32, the slot that the next token takes.
    position: [B, R] int32, tokens of the document so far.

    `extend` gives such states with new tokens' keys and values alone, which `advance` adds.
    """

    fast: FastState
    sums: Weights
    momentum_sum: jax.Array | None
    keys: jax.Array
    values: jax.Array
    cursor: jax.Array
    position: jax.Array
