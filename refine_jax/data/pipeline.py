"""The input pipeline: rows of tokens as batches, in an order that only the options decide.

    corpus = load_corpus(options)
    train = corpus.dataset("train", batch_size=128)
    batches = iter(train)
    batch = next(batches)                 # {"tokens": [B, T] int32, "segments": [B, T] int32}
    state = batches.get_state()           # a dict for JSON

Row n of a run is a function of (options, n) alone. Each of several processes reads the rows of the
global batches that it is asked for, and a state is a global row number, so it may be restored with
any number of processes and workers, and with another batch size.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from refine_jax.base.errors import DataError
from refine_jax.base.files import json_field, short
from refine_jax.config import DataConfig
from refine_jax.data.rows import SPLITS, DocumentRows, make_rows
from refine_jax.data.stream import DocumentStream, Place, Window, open_stream
from refine_jax.data.tokenizer import Tokenizer, load_tokenizer
from refine_jax.data.tokens import FORMAT, TokenSource, is_token_folder, open_tokens

READ_THREADS = 2  # a row is a copy from memory or one record: more threads do not help
READ_AHEAD = 4  # batches
ENDLESS = 1 << 62

Batch = dict[str, np.ndarray]


class Corpus:
    """Tokenised documents; makes the data sets of both splits. Made by `load_corpus`."""

    def __init__(
        self,
        options: DataConfig,
        tokens: TokenSource,
        tokenizer: Tokenizer,
        *,
        seed: int = 0,
        validation_rows: int | None = None,
    ) -> None:
        """Take what `load_corpus` takes, and the tokens that it made."""
        self.options, self.tokenizer = options, tokenizer
        self._tokens, self._seed, self._validation_rows = tokens, seed, validation_rows

    def dataset(self, split: str, batch_size: int, share: Sequence[int] | None = None) -> Dataset:
        """Return the batches of a split.

        "train" is shuffled anew each epoch and runs for `options.epochs`; batches go across the
        ends of epochs. "validation" is one pass in fixed order. Where the rows end within a batch,
        it is filled up with rows of padding (all segments 0), so that shapes stay the same and no
        row is dropped.

        split: "train" or "validation". batch_size: B, rows of a global batch. share: the rows of
        each batch that this process reads, ascending; None: all.

        Raises DataError: no rows, or a batch without rows.
        """
        count = self._validation_rows if split == SPLITS[1] else None
        table, statistics = make_rows(
            self._tokens.lengths, self._tokens.hashes, self.options, split, count
        )
        statistics = dataclasses.replace(statistics, unread=dict(self._tokens.dropped))
        rows = DocumentRows(
            self._tokens, table, self.options.sequence_length, self.tokenizer.pad_id
        )
        return Dataset(rows, statistics, self.options, split, batch_size, share, seed=self._seed)


class RowSource(Protocol):
    """The rows of a split by index.

    Attributes:
        identity: JSON values, equal for equal rows in equal order.
        full: whether one document fills each row.
    """

    identity: tuple
    full: bool

    def __len__(self) -> int:
        """Return N, the rows of one epoch."""

    def __getitem__(self, index: int) -> Batch:
        """Return row `index % N` of epoch `index // N` as {name: array}."""

    def empty(self) -> Batch:
        """Return a row of padding alone."""


class Dataset:
    """An iterable of batches of one split; each `iter` starts at the first one.

    Attributes:
        statistics: what became of the documents.
        rows: rows of one epoch.
        batches: global batches until the end; None if it never ends.
        batch_size: B, rows of a global batch.
        share: the rows of each batch that are read here, ascending.
        fingerprint: equal for data sets with equal rows in equal order.
        full_rows: whether one document fills every row of every batch, so that segments say
            nothing.
    """

    def __init__(
        self,
        rows: RowSource,
        statistics: Any,
        options: DataConfig,
        split: str,
        batch_size: int,
        share: Sequence[int] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """Raise DataError for a batch without rows; see `Corpus.dataset`."""
        if batch_size < 1:
            raise DataError(f"a batch must have rows. Got: batch_size={batch_size}.")
        self.statistics, self.rows, self.batch_size = statistics, len(rows), batch_size
        self.share = tuple(range(batch_size) if share is None else share)
        self._rows = rows
        self._train = split == SPLITS[0]
        self._epochs = options.epochs if self._train else 1
        # The last batch of a finite run is filled up with empty rows.
        whole = self._epochs is None or self._epochs * len(rows) % batch_size == 0
        self.full_rows = whole and rows.full
        # Validation is short and starts often: processes would cost more than they read ahead.
        self._workers = options.workers if self._train else 0
        # grain shuffles epoch e with seed + e; hashing keeps neighbouring seeds apart.
        self._seed = int(_digest("shuffle", seed), 16) % 2**32
        order = (self._seed,) if self._train else ()
        self.fingerprint = _digest(FORMAT, *rows.identity, *order)

    @property
    def batches(self) -> int | None:
        """Return how many batches there are; None if they never end."""
        return None if self._epochs is None else -(-self._epochs * self.rows // self.batch_size)

    def __iter__(self) -> BatchIterator:
        """Return an iterator at the first batch."""
        return BatchIterator(self)

    def _read(self, next_row: int) -> Iterator[Batch]:
        """Return grain's iterator over this process's part of the batches from a row on."""
        rows = _Source(self._rows)
        if self._train:
            rows = rows.shuffle(seed=self._seed)
        rows = rows.repeat(self._epochs)
        total = ENDLESS if self._epochs is None else self._epochs * self.rows
        part = _ProcessPart(
            rows,
            self._rows.empty(),
            start=next_row,
            total=total,
            batch_size=self.batch_size,
            share=self.share,
        )
        batches = part.batch(len(self.share), drop_remainder=True).to_iter_dataset(
            grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD)
        )
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain reads flags of its own, also in a notebook
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._workers, per_worker_buffer_size=READ_AHEAD
                )
            )
        return iter(batches)


class BatchIterator(Iterator[Batch]):
    """This process's part of the batches, with a state that any number of processes can restore."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._next_row = 0
        self._reader: Any = None

    def __next__(self) -> Batch:
        """Return {"tokens": [b, T] int32, "segments": [b, T] int32} of the b rows read here."""
        if self._reader is None:
            self._reader = self._dataset._read(self._next_row)
        batch = next(self._reader)
        self._next_row += self._dataset.batch_size
        return batch

    @property
    def epoch(self) -> float:
        """Passes over the rows so far."""
        return self._next_row / self._dataset.rows

    def get_state(self) -> dict[str, Any]:
        """Return the position after the last batch as values for JSON, equal on all processes."""
        return {"next_row": self._next_row, "fingerprint": self._dataset.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to the position of a `get_state`.

        Raises:
            DataError: the state is none, or belongs to other data, or to the same in another order.
        """
        check_state(state, self._dataset.fingerprint)
        next_row = json_field(state, "next_row", int, where=_SAVED, error=DataError)
        last = ENDLESS // 2  # so that rows follow
        if self._dataset.batches is not None:
            # The last batch may have been filled up to a larger size than today's.
            last = 2 * self._dataset.batches * self._dataset.batch_size
        if next_row is None or not 0 <= next_row <= last:
            raise DataError(
                f"the saved position in the data must be a row from 0 to {last}. "
                f"Got: next_row={short(next_row)}."
            )
        self.close()
        self._next_row = next_row

    def close(self) -> None:
        """Stop reading ahead; the next batch starts it again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class StreamedCorpus:
    """Documents that are read while training; made by `load_corpus`."""

    def __init__(self, stream: DocumentStream, validation_rows: int | None) -> None:
        """Take the documents, and how many rows of held-out ones are wanted; None: a few."""
        self._stream, self._validation_rows = stream, validation_rows

    def dataset(
        self, split: str, batch_size: int, share: Sequence[int] | None = None
    ) -> Dataset | StreamedDataset:
        """Return the batches of a split; arguments and errors as of `Corpus.dataset`."""
        if split == SPLITS[0]:
            return StreamedDataset(self._stream, batch_size, share)
        rows, statistics = self._stream.held_out(self._validation_rows)
        return Dataset(rows, statistics, self._stream.options, split, batch_size, share)


class StreamedDataset:
    """An endless iterable of batches of documents that are read on the way.

    Attributes as those of `Dataset`; rows, batches: None, as nobody has counted them. statistics:
    None, as each piece has its own, which is logged.
    """

    rows = batches = statistics = None

    def __init__(
        self, stream: DocumentStream, batch_size: int, share: Sequence[int] | None
    ) -> None:
        """Raise DataError for a batch without rows."""
        if batch_size < 1:
            raise DataError(f"a batch must have rows. Got: batch_size={batch_size}.")
        self.batch_size = batch_size
        self.share = tuple(range(batch_size) if share is None else share)
        self.fingerprint, self.full_rows = stream.fingerprint, stream.full
        self.stream = stream

    def __iter__(self) -> StreamedBatches:
        """Return an iterator at the first batch."""
        return StreamedBatches(self)


class StreamedBatches(Iterator[Batch]):
    """This process's part of the batches; while one piece is trained on, the next one is read.

    Every process reads every piece, and takes its rows: so the order does not depend on how many
    processes there are.
    """

    def __init__(self, dataset: StreamedDataset) -> None:
        self._dataset, self._place, self._row = dataset, Place(), 0
        self._window: Window | None = None
        self._ahead: concurrent.futures.Future[Window] | None = None
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None

    def __next__(self) -> Batch:
        """Return {"tokens": [b, T] int32, "segments": [b, T] int32} of the b rows read here."""
        rows, share = [], set(self._dataset.share)
        for number in range(self._dataset.batch_size):
            window = self._next_window()
            if number in share:
                rows.append(window.rows[int(window.order[self._row])])
            self._row += 1
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _next_window(self) -> Window:
        """Return the piece that the next row is in."""
        while self._window is None or self._row >= len(self._window.order):
            if self._window is not None:
                self._place, self._row = self._window.after, 0
            if self._thread is None:
                self._thread = concurrent.futures.ThreadPoolExecutor(1, "documents")
            read = self._dataset.stream.read
            ahead, self._ahead = self._ahead, None
            self._window = (ahead or self._thread.submit(read, self._place)).result()
            if self._window.place != self._place:  # pieces before it gave no rows
                self._place, self._row = self._window.place, 0
            self._ahead = self._thread.submit(read, self._window.after)
        return self._window

    @property
    def epoch(self) -> float:
        """Passes over the files so far."""
        if self._window is None:
            return float(self._place.epoch)
        return self._place.epoch + self._window.done

    def get_state(self) -> dict[str, Any]:
        """Return the position after the last batch as values for JSON, equal on all processes."""
        return {
            **self._place._asdict(),
            "row": self._row,
            "fingerprint": self._dataset.fingerprint,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to the position of a `get_state`.

        Raises DataError: the state is none, or belongs to other data.
        """
        check_state(state, self._dataset.fingerprint)
        place = {}
        for name in (*Place._fields, "row"):
            value = json_field(state, name, int, where=_SAVED, error=DataError)
            if value is None or not 0 <= value < ENDLESS:
                raise DataError(f"{_SAVED} must give {name}. Got: {short(value)}.")
            place[name] = value
        self.close()
        self._row = place.pop("row")
        self._place = Place(**place)

    def close(self) -> None:
        """Stop reading ahead; the next batch starts it again."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = self._window = self._ahead = None


_SAVED = "the saved position in the data"


def check_state(state: Any, fingerprint: str) -> None:
    """Raise DataError unless a saved position is one in the data of this fingerprint."""
    if not isinstance(state, dict):
        raise DataError(f"{_SAVED} is none. Got: {short(state)}.")
    found = json_field(state, "fingerprint", str, where=_SAVED, error=DataError)
    if found != fingerprint:
        raise DataError(
            "the saved position belongs to other data: the documents, the tokenizer, the seed "
            "or a data option has changed since. Restore them, or start a new run. "
            f"Got: {short(found)}, expected: {fingerprint}."
        )


class _Source(grain.MapDataset):
    """Rows by an index that goes on over the epochs, unlike that of grain's own source."""

    def __init__(self, rows: RowSource) -> None:
        super().__init__()
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice) -> Any:
        return self.slice(index) if isinstance(index, slice) else self._rows[index]


class _ProcessPart(grain.MapDataset):
    """The rows of one process: its share of every global batch, from a global row on."""

    def __init__(
        self,
        rows: grain.MapDataset,
        empty: dict[str, np.ndarray],
        *,
        start: int,
        total: int,
        batch_size: int,
        share: tuple[int, ...],
    ) -> None:
        super().__init__(rows)
        self._empty, self._start, self._total = empty, start, total
        self._batch_size, self._share = batch_size, share

    def __len__(self) -> int:
        batches = -(-max(self._total - self._start, 0) // self._batch_size)
        return batches * len(self._share)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self._share))
        row = self._start + batch * self._batch_size + self._share[row]
        return self._parent[row] if row < self._total else self._empty


def load_corpus(
    options: DataConfig,
    tokenizer: Tokenizer | None = None,
    *,
    seed: int = 0,
    validation_rows: int | None = None,
) -> Corpus | StreamedCorpus:
    """Read and tokenise the documents of `options`, or get ready to do so while training.

    options: the section `data` of a configuration.
    tokenizer: used instead of `options.tokenizer`.
    seed: decides the order of the training rows (0 <= seed < 2**32).
    validation_rows: use so many rows of the held-out documents, evenly spread; None uses all.

    Raises DataError: the source or the tokenizer is missing, unreadable or empty.
    """
    _check_lengths(options)
    tokenizer = tokenizer or load_tokenizer(options.tokenizer)
    if not is_token_folder(options.source):
        stream = open_stream(options, tokenizer, seed=seed)
        if stream is not None:
            return StreamedCorpus(stream, validation_rows)
    tokens = open_tokens(options, tokenizer)
    return Corpus(options, tokens, tokenizer, seed=seed, validation_rows=validation_rows)


def _check_lengths(options: DataConfig) -> None:
    name = options.setting
    if options.max_tokens is not None and options.max_tokens < options.shortest:
        raise DataError(
            f"{name('max_tokens')} must be at least {name('min_tokens')} (default: "
            f"sequence_length). Got: max_tokens={options.max_tokens}, "
            f"min_tokens={options.shortest}."
        )
    if (options.min_remainder or 1) > options.sequence_length:
        raise DataError(
            f"{name('min_remainder')} must be at most {name('sequence_length')}. Got: "
            f"min_remainder={options.min_remainder}, sequence_length={options.sequence_length}."
        )


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()
