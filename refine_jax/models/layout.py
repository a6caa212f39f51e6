"""Where the real tokens of a batch are: padding and packed documents; few sizes to pad to."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Layout:
    """Documents and padding of rows [B, T].

    The tokens of a document are contiguous; padding may stand before, between and after documents.
    Everything recurrent (fast weights, convolution, attention window, rope) counts from the start
    of the token's own document, so neither padding nor neighbours change a document's numbers.

    mask: [B, T] bool, True at real tokens.
    document: [B, T] int32, 1, 2, ... in order of appearance; padding inherits the document before
        it (0 before the first).
    position: [B, T] int32, index within the document; 0 at padding.
    max_documents: static upper bound of the documents in a row.
    """

    mask: jax.Array
    document: jax.Array
    position: jax.Array
    max_documents: int = 1

    @classmethod
    def from_segments(cls, segments: jax.Array, max_documents: int = 1) -> Layout:
        """Layout of `segments` [B, T] int32: 0 is padding, each run of another number a document.

        Rows with more than `max_documents` documents are not supported: what comes after them is
        undefined (the count is static because it sizes arrays; the data pipeline keeps to it).
        """
        mask = segments != 0
        before = jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
        starts = mask & (segments != before)
        slot = lax.broadcasted_iota(jnp.int32, segments.shape, 1)
        start_slot = lax.cummax(jnp.where(starts, slot, 0), axis=1)
        return cls(
            mask=mask,
            document=jnp.cumsum(starts, axis=1, dtype=jnp.int32),
            position=jnp.where(mask, slot - start_slot, 0),
            max_documents=max_documents,
        )

    def last_real(self, positions: jax.Array) -> jax.Array:
        """Slot of the last real token among the first `positions` [B, R] slots; -1 if none."""
        slot = lax.broadcasted_iota(jnp.int32, self.mask.shape, 1)
        last = lax.cummax(jnp.where(self.mask, slot, -1), axis=1)
        at = jnp.take_along_axis(last, jnp.maximum(positions - 1, 0), axis=1)
        return jnp.where(positions > 0, at, -1)

    def tokens_before(self, positions: jax.Array) -> jax.Array:
        """Tokens of the current document among the first `positions` [B, R] slots; 0 if none."""
        last = self.last_real(positions)
        index = jnp.take_along_axis(self.position, jnp.maximum(last, 0), axis=1)
        return jnp.where(last >= 0, index + 1, 0)


jax.tree_util.register_dataclass(
    Layout, data_fields=["mask", "document", "position"], meta_fields=["max_documents"]
)


def round_rows(count: int) -> int:
    """Round a number of rows up by a third at most: 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    power = 1 << max(count - 1, 0).bit_length()
    return 3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power


def round_length(length: int) -> int:
    """Round a row's length up by a quarter (at least 64) at most: 64, 128, 192, 256, 320, 384, ...

    Four sizes an octave.
    """
    step = max(64, 1 << max(int(length).bit_length() - 3, 0))
    return -(-int(length) // step) * step


def row_length(tokens: int) -> int:
    """Choose the slots of the row that a prompt is padded to, by its own length alone.

    Prompts of fewer than two tokens have no next token to train on. They get a row length of their
    own, so that no other prompt is padded to it.
    """
    return 1 if tokens < 2 else round_length(tokens)
