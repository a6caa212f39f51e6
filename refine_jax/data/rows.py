"""From documents to rows of T tokens: filter, hold out, chunk, pack. Pure numpy on lengths.

No token is dropped without being counted: the tokens of the source equal the tokens of the rows
plus those of `Statistics.dropped_tokens`, whose keys say why.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np

from refine_jax.base.errors import DataError
from refine_jax.config import DataConfig
from refine_jax.data.tokens import TokenSource

OPEN_ROWS = 256  # rows that packing fills at the same time
SPLITS = ("train", "validation")
REASONS = {
    "too_short": "too short",
    "too_long": "too long",
    "other_split": "held out",
    "copies": "copies of held-out ones",
    "after_first_chunk": "after the first row of their document",
    "remainder": "in last pieces that are too short",
    "surplus_rows": "in rows beyond those asked for",
}
"""Why documents or tokens are in no row of a split, and how a run says it."""
UNREAD = {"null": "without text", "limit_documents": "beyond the limit of documents"}
"""Why documents were not tokenised, and how a run says it."""


@dataclass(frozen=True)
class Statistics:
    """What became of the documents.

    Attributes:
        documents: documents of the source.
        tokens: their tokens.
        longest: tokens of the longest one.
        used_documents: documents of this split.
        rows: rows of this split.
        row_tokens: tokens in these rows; the other rows * T - row_tokens slots are padding.
        dropped_documents: documents not in this split, by reason: "too_short", "too_long",
            "other_split", "copies" (equal to a held-out document).
        dropped_tokens: tokens not in this split, by reason: the same, and "after_first_chunk",
            "remainder", "surplus_rows".
        unread: documents of the source that were left out before they were tokenised, by reason;
            they are none of `documents`. See `refine_jax.data.tokens.TokenSource`.
        split_rows: whether both splits are rows of one document, as there is no other.
    """

    documents: int
    tokens: int
    longest: int
    used_documents: int
    rows: int
    row_tokens: int
    dropped_documents: dict[str, int]
    dropped_tokens: dict[str, int]
    unread: dict[str, int] = field(default_factory=dict)
    split_rows: bool = False

    def summary(self) -> str:
        """Say in a line what was left out of this split and why; "" if nothing was."""
        parts = []
        for reason, words in REASONS.items():
            documents = self.dropped_documents.get(reason, 0)
            tokens = self.dropped_tokens.get(reason, 0)
            if documents:
                parts.append(f"{documents:,} {words} ({tokens:,} tokens)")
            elif tokens:
                parts.append(f"{tokens:,} tokens {words}")
        for reason, count in self.unread.items():
            if count:
                words = UNREAD.get(reason, reason.replace("_", " "))
                parts.append(f"{count:,} {words}")
        left_out = f"left out of {self.documents:,} documents: {'; '.join(parts)}" if parts else ""
        if not self.split_rows:
            return left_out
        split = "the last rows of the one document are held out, as there is no other document"
        return f"{split}; {left_out}" if left_out else split


@dataclass(frozen=True)
class RowTable:
    """Which piece of which document stands in which row. P pieces, N rows.

    Attributes:
        document: of each piece, [P] int64.
        start: first token of each piece within its document, [P] int64.
        length: tokens of each piece, [P] int64.
        ends: pieces ends[i-1] .. ends[i] stand in row i, [N] int64.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def fingerprint(self) -> str:
        """Equal for equal tables."""
        digest = hashlib.blake2b(digest_size=8)
        for array in (self.document, self.start, self.length, self.ends):
            digest.update(np.ascontiguousarray(array, "<i8"))
        return digest.hexdigest()


class DocumentRows:
    """The rows of a split by index: {"tokens": [T] int32, "segments": [T] int32}.

    Segments count the documents of a row from 1; 0 is padding, which stands at the end. All epochs
    have the same rows.

    Attributes:
        identity: equal for equal rows in equal order.
        full: whether one document fills each row.
    """

    def __init__(self, tokens: TokenSource, table: RowTable, length: int, pad_id: int) -> None:
        self._tokens, self._table = tokens, table
        self._length, self._pad_id = length, pad_id
        self.identity = (tokens.fingerprint, table.fingerprint, length)
        self.full = len(table.length) == len(table) and bool(np.all(table.length == length))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return row `index % N`."""
        table, row = self._table, self.empty()
        index %= len(table)
        slot = 0
        first = table.ends[index - 1] if index else 0
        for segment, piece in enumerate(range(first, table.ends[index]), start=1):
            end = slot + table.length[piece]
            row["tokens"][slot:end] = self._tokens.read(
                int(table.document[piece]), int(table.start[piece]), int(table.length[piece])
            )
            row["segments"][slot:end] = segment
            slot = end
        return row

    def empty(self) -> dict[str, np.ndarray]:
        """Return a row of padding alone: arrays [T] by name."""
        return {
            "tokens": np.full(self._length, self._pad_id, np.int32),
            "segments": np.zeros(self._length, np.int32),
        }


def make_rows(
    lengths: np.ndarray,
    hashes: np.ndarray,
    options: DataConfig,
    split: str,
    count: int | None = None,
) -> tuple[RowTable, Statistics]:
    """Decide the rows of a split.

    Held out are whole documents, or where all documents are equal, the last rows of the first.

    lengths: tokens of each document, [N] int64. hashes: equal for equal documents, [N] uint64.
    options: the filters, the hold-out, the chunking and the packing. split: "train" or
    "validation". count: keep so many rows, evenly spread; None: all.

    Raises DataError: no document passes the filters, or too little to hold some out.
    """
    if split not in SPLITS:
        raise DataError(f"split must be train or validation. Got: {split!r}.")
    dropped_documents: dict[str, int] = {}
    dropped_tokens: dict[str, int] = {}

    def drop(reason: str, mask: np.ndarray) -> None:
        dropped_documents[reason] = int(mask.sum())
        dropped_tokens[reason] = int(lengths[mask].sum())

    short = lengths < options.shortest
    long = np.zeros_like(short) if options.max_tokens is None else lengths > options.max_tokens
    drop("too_short", short)
    drop("too_long", long)
    passed = ~short & ~long
    if not passed.any():
        raise DataError(_nothing_left(lengths, options))
    held_out, copies = _held_out(hashes, passed, options.holdout)
    # With one document there is none to train on besides it: its last rows are held out.
    by_rows = bool(held_out.any()) and not (passed & ~held_out & ~copies).any()
    used = held_out if by_rows or split == "validation" else passed & ~held_out & ~copies
    drop("other_split", passed & ~used & ~copies)
    drop("copies", copies)
    if not used.any():  # of the held-out split alone
        raise DataError(
            f"no document is left for the {split} split, with "
            f"{options.setting('holdout')}={options.holdout}: raise it."
        )

    table, cut = _chunk(np.flatnonzero(used), lengths, options)
    dropped_tokens.update(cut)
    if options.pack:
        table = _pack(table, options.sequence_length, options.max_documents)
    if by_rows:
        if len(table) < 2:
            raise DataError(_one_row(split, lengths, passed, options))
        kept = _last_rows(table, options.holdout) ^ (split == "train")
        table, dropped_tokens["other_split"] = _keep(table, kept)
    if count is not None:
        table, dropped_tokens["surplus_rows"] = _spread(table, count)
    return table, Statistics(
        documents=len(lengths),
        tokens=int(lengths.sum()),
        longest=int(lengths.max(initial=0)),
        used_documents=int(used.sum()),
        rows=len(table),
        row_tokens=int(table.length.sum()),
        dropped_documents=dropped_documents,
        dropped_tokens=dropped_tokens,
        split_rows=by_rows,
    )


def _one_row(split: str, lengths: np.ndarray, passed: np.ndarray, options: DataConfig) -> str:
    return (
        f"no document is left for the {split} split: of {len(lengths)} documents of "
        f"{options.source!r} the filters leave {int(passed.sum())}, with one content that makes "
        "one row, which cannot be both trained on and held out. Use more documents, lower "
        f"{options.setting('sequence_length')}={options.sequence_length}, or hold nothing out with "
        f"{options.setting('holdout')}=0."
    )


def _nothing_left(lengths: np.ndarray, options: DataConfig) -> str:
    longest = int(lengths.max(initial=0))
    if longest < options.shortest:
        least = options.setting("min_tokens")
        wanted = (
            f"{options.setting('sequence_length')}={options.sequence_length} tokens ({least} is "
            "not set)"
            if options.min_tokens is None
            else f"{least}={options.min_tokens} tokens"
        )
        return (
            f"none of the {len(lengths)} documents of {options.source!r} has {wanted}; the longest "
            f"has {longest}. Lower {least}, or use longer documents."
        )
    return (
        f"none of the {len(lengths)} documents of {options.source!r} has between "
        f"{options.setting('min_tokens')}={options.shortest} and "
        f"{options.setting('max_tokens')}={options.max_tokens} tokens; the longest has {longest}, "
        f"the shortest {int(lengths.min())}. Change one of the two."
    )


def _held_out(
    hashes: np.ndarray, passed: np.ndarray, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return masks [N] of the held-out documents and of further copies of them.

    The documents with the smallest content hashes are held out: which ones depends neither on the
    seed nor on their order, and a text that occurs twice never stands on both sides. Where all
    documents are equal, the first is held out and all others are copies.
    """
    held_out, copies = np.zeros_like(passed), np.zeros_like(passed)
    if fraction > 0:
        distinct, first = np.unique(hashes[passed], return_index=True)
        count = max(1, round(fraction * len(distinct)))
        held_out[np.flatnonzero(passed)[first[:count]]] = True
        copies = passed & np.isin(hashes, distinct[:count]) & ~held_out
    return held_out, copies


def _chunk(
    documents: np.ndarray, lengths: np.ndarray, options: DataConfig
) -> tuple[RowTable, dict[str, int]]:
    """Cut documents [N] into pieces of at most T tokens, each a row; count what is dropped."""
    size = options.sequence_length
    lengths = lengths[documents]
    if options.chunking == "first":
        kept = np.minimum(lengths, size)
        table = RowTable(documents, np.zeros_like(kept), kept, np.arange(1, 1 + len(kept)))
        return table, {"after_first_chunk": int((lengths - kept).sum()), "remainder": 0}
    full, rest = np.divmod(lengths, size)
    # A document shorter than T is whole, not a remainder.
    keep_rest = (rest > 0) & ((full == 0) | (rest >= (options.min_remainder or 1)))
    pieces = full + keep_rest
    last = np.cumsum(pieces) - 1
    start = (np.arange(pieces.sum()) - np.repeat(last - pieces + 1, pieces)) * size
    length = np.full(len(start), size, np.int64)
    length[last[keep_rest]] = rest[keep_rest]
    table = RowTable(np.repeat(documents, pieces), start, length, np.arange(1, 1 + len(start)))
    return table, {"after_first_chunk": 0, "remainder": int(rest[~keep_rest].sum())}


def _pack(table: RowTable, size: int, max_documents: int) -> RowTable:
    """Put pieces into shared rows: first fit, in order, among the OPEN_ROWS latest open rows.

    A row's pieces are of different documents, as at most one piece of a document is below T.
    """
    row_of = np.zeros(len(table.length), np.int64)
    rows = 0
    space = np.zeros(OPEN_ROWS, np.int64)  # free slots of the open rows, oldest first
    number = np.zeros(OPEN_ROWS, np.int64)
    held = np.zeros(OPEN_ROWS, np.int64)
    for piece, length in enumerate(table.length):
        slot = int(np.argmax(space >= length))
        if length == size or space[slot] < length:
            row_of[piece], rows = rows, rows + 1
            if length == size:
                continue
            for array, value in ((space, size - length), (number, rows - 1), (held, 1)):
                array[:-1] = array[1:]
                array[-1] = value
            slot = OPEN_ROWS - 1
        else:
            row_of[piece] = number[slot]
            space[slot] -= length
            held[slot] += 1
        if held[slot] == max_documents:
            space[slot] = 0
    order = np.argsort(row_of, kind="stable")
    ends = np.cumsum(np.bincount(row_of, minlength=rows))
    return RowTable(table.document[order], table.start[order], table.length[order], ends)


def _last_rows(table: RowTable, fraction: float) -> np.ndarray:
    """Mark the last rows [N], at least one of them and at most N - 1."""
    count = min(max(1, round(fraction * len(table))), len(table) - 1)
    return np.arange(len(table)) >= len(table) - count


def _spread(table: RowTable, count: int) -> tuple[RowTable, int]:
    """Keep `count` rows, evenly spread; return them and the number of tokens dropped."""
    if len(table) <= count:
        return table, 0
    chosen = np.zeros(len(table), bool)
    chosen[np.arange(count) * len(table) // count] = True
    return _keep(table, chosen)


def _keep(table: RowTable, chosen: np.ndarray) -> tuple[RowTable, int]:
    """Keep the rows of a mask [N]; return them and the number of tokens dropped."""
    pieces = np.diff(table.ends, prepend=0)
    keep = np.repeat(chosen, pieces)
    kept = RowTable(
        table.document[keep], table.start[keep], table.length[keep], np.cumsum(pieces[chosen])
    )
    return kept, int(table.length[~keep].sum())
