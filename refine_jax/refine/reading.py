"""What one forward pass says of whole rows: hidden states, next-token loss, entropies.

A `Batch` of rows is {"tokens": [B, T] int32, "segments": [B, T] int32}; segment 0 is padding, each
other number a document. Without "segments" every row is one document that fills it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from refine_jax.models.head import TokenStats, next_token_loss
from refine_jax.models.layout import Layout
from refine_jax.models.transformer import Model, Params, Trace

Batch = dict[str, jax.Array]


class Reading(NamedTuple):
    """Results of a forward pass over whole rows."""

    hidden: jax.Array  # [B, T, D]
    trace: Trace | None
    layout: Layout | None
    nll_sum: jax.Array  # scalar, over the predicted tokens
    stats: TokenStats  # [B, T] each
    weights: jax.Array  # [B, T] float32, 1 where the next token is predicted


def layout_of(batch: Batch, max_documents: int) -> Layout | None:
    """Lay out rows by their segments; None where every row is one document that fills it."""
    segments = batch.get("segments")
    return None if segments is None else Layout.from_segments(segments, max_documents)


def target_weights(tokens: jax.Array, layout: Layout | None) -> jax.Array:
    """Give weight 1 to real slots with a next token in their document: [B, T] float32."""
    if layout is None:
        return jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0.0)
    same = layout.document[:, 1:] == layout.document[:, :-1]
    has_target = layout.mask[:, 1:] & layout.mask[:, :-1] & same
    return jnp.pad(has_target, ((0, 0), (0, 1))).astype(jnp.float32)


def read_hidden(
    model: Model, params: Params, batch: Batch, layout: Layout | None, hidden: jax.Array
) -> tuple[jax.Array, tuple[TokenStats, jax.Array]]:
    """Sum the next-token losses (nats) of rows with the hidden states [B, T, D].

    Returns the sum, and `stats` and `weights` as `Reading` has them.
    """
    tokens = batch["tokens"]
    weights = target_weights(tokens, layout)
    nll_sum, stats = next_token_loss(
        hidden,
        model.head(params),
        jnp.roll(tokens, -1, axis=1),
        weights,
        implementation=model.policy.head_implementation,
    )
    return nll_sum, (stats, weights)


def read_rows(
    model: Model, params: Params, batch: Batch, *, with_trace: bool, max_documents: int = 1
) -> Reading:
    """Run the forward pass over rows, with their next-token loss and entropies."""
    layout = layout_of(batch, max_documents)
    hidden, trace = model.forward(params, batch["tokens"], layout, with_trace=with_trace)
    nll_sum, (stats, weights) = read_hidden(model, params, batch, layout, hidden)
    return Reading(hidden, trace, layout, nll_sum, stats, weights)
