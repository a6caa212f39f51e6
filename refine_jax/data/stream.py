"""Documents that are read while training, of a corpus that is never here as a whole.

    stream = open_stream(options, tokenizer, seed=0)
    window = stream.read(Place())         # rows of the first piece of the first epoch
    following = stream.read(window.after)

A corpus is cut into pieces of about `PIECE_BYTES`: row groups of a parquet file that follow one
another, or lines of a JSON file. Of parquet the column of the texts alone is read. The documents of
a piece become rows as those of a whole corpus do (`rows.make_rows`). In each epoch the files are
taken in another order, and so are the pieces of a file and the rows of a piece. A row's place in a
run depends on the files, the options and the seed alone.

A document is held out by its own content hash, so that a text which occurs twice never stands on
both sides, although nobody has seen all documents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from absl import logging

from refine_jax.base.errors import DataError
from refine_jax.base.remote import is_remote
from refine_jax.config import DataConfig
from refine_jax.data.formats import check_head, files_of, kind_of
from refine_jax.data.parquet import check_text, clean, opened_parquet, text_column
from refine_jax.data.records import LONGEST_BYTES, Records, parse_record, stamp
from refine_jax.data.rows import DocumentRows, RowTable, Statistics, make_rows
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.data.tokens import IndexBuilder, TokenStore, hash_tokens, token_dtype, tokenize
from refine_jax.data.unpack import is_packed, open_file, read_head

FORMAT = 1  # of the order of rows; raise it when it changes
PIECE_BYTES = 1 << 25
HELD_OUT_PIECES = 16  # that are searched for held-out rows, unless there is none in them
_READ_BYTES = 1 << 22  # of a JSON file that are fetched at a time


class Place(NamedTuple):
    """Where a stream is: files and pieces are counted in the order of their epoch."""

    epoch: int = 0
    file: int = 0
    piece: int = 0


class Window(NamedTuple):
    """The rows of a piece, in the order in which they are trained on.

    place: of the piece. after: where to read on. order: indices into `rows`. done: the share of the
    epoch that is over when the piece is. statistics: what became of the piece's documents.
    """

    place: Place
    after: Place
    rows: DocumentRows
    order: np.ndarray
    done: float
    statistics: Statistics


class _Reader(Protocol):
    """A file in pieces: `pieces`, and the texts of one of them."""

    pieces: Sequence[tuple[int, int]]

    def texts(self, piece: tuple[int, int]) -> Iterator[str | None]:
        """Yield the texts of a piece, None for records without one."""


class DocumentStream:
    """The rows of a corpus, piece by piece. Made by `open_stream`.

    Attributes:
        fingerprint: equal for streams with equal rows in equal order.
        full: whether one document fills each row.
    """

    def __init__(
        self, files: Sequence[Path], options: DataConfig, tokenizer: Tokenizer, seed: int
    ) -> None:
        """Take the files in order; raises DataError for options that need all documents."""
        for name, needed in (("epochs", None), ("limit_documents", None), ("cache_dir", "")):
            if getattr(options, name) != needed:
                raise DataError(
                    f"{options.setting(name)} does not go with documents that are read while "
                    f"training: leave it {needed!r}, or set {options.setting('stream')} to False, "
                    f"which reads all of them first. Got: {getattr(options, name)!r}."
                )
        self.options, self.tokenizer, self._seed = options, tokenizer, seed
        self._files = tuple(files)
        # What is held out is decided here: `make_rows` sees the documents of one side.
        self._rest = dataclasses.replace(options, holdout=0.0)
        self._readers: dict[Path, _Reader] = {}
        least = options.min_remainder or 1
        cut = options.chunking == "first" or least >= options.sequence_length
        self.full = cut and options.shortest >= options.sequence_length
        self.fingerprint = self._digest()

    def _digest(self) -> str:
        """Name what decides the rows: the files by name, size and version, and the options."""
        files = []
        for path in self._files:
            try:
                status = path.stat()
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror or error}.") from None
            files.append([path.name, status.st_size, stamp(status) if is_remote(path) else ""])
        options = dataclasses.asdict(self.options)
        for name in ("source", "files", "tokenizer", "workers", "stream", "tfds_data_dir"):
            del options[name]
        parts = [FORMAT, PIECE_BYTES, files, self.tokenizer.fingerprint, options, self._seed]
        return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=8).hexdigest()

    def read(self, place: Place) -> Window:
        """Read the first piece with rows, from a place on; the next epoch follows the last file.

        Raises DataError: a file is missing or damaged, or no document of a whole epoch gives a row.
        """
        empty, longest = 0, 0
        while empty <= len(self._files):
            files = self._order(len(self._files), place.epoch)
            path = self._files[files[place.file]]
            pieces = self._reader(path).pieces
            order = self._order(len(pieces), place.epoch, 1 + int(files[place.file]))
            for piece in range(place.piece, len(pieces)):
                place = place._replace(piece=piece)
                store = self._tokens(path, pieces[order[piece]], held_out=False)
                longest = max(longest, int(store.lengths.max(initial=0)))
                if self._passes(store):
                    return self._window(place, store, len(pieces), int(order[piece]))
            last = place.file + 1 == len(files)
            place = Place(place.epoch + last, 0 if last else place.file + 1)
            empty += 1
        raise DataError(
            f"no document of {self.options.source!r} gives a row: the longest of the last file has "
            f"{longest} tokens, and {self.options.setting('min_tokens')} asks for "
            f"{self.options.shortest}. Lower it, or use longer documents."
        )

    def _window(self, place: Place, store: TokenStore, pieces: int, index: int) -> Window:
        table, statistics = make_rows(store.lengths, store.hashes, self._rest, "train")
        file = int(self._order(len(self._files), place.epoch)[place.file])
        order = self._order(len(table), place.epoch, 1 + file, 1 + index)
        done = (place.file + (place.piece + 1) / pieces) / len(self._files)
        after = place._replace(piece=place.piece + 1)
        if summary := statistics.summary():
            logging.info("%s, piece %d: %s", self._files[file], index, summary)
        return Window(place, after, self._rows(store, table), order, done, statistics)

    def held_out(self, count: int | None) -> tuple[DocumentRows, Statistics]:
        """Make rows of held-out documents: of the first files and pieces that have enough of them.

        count: so many rows, evenly spread; None: as many as the pieces that are searched give.
        Raises DataError: no document is held out.
        """
        stores: list[TokenStore] = []
        searched = rows = 0
        for path in self._files:
            for piece in self._reader(path).pieces:
                store = self._tokens(path, piece, held_out=True)
                searched += 1
                if self._passes(store):
                    stores.append(store)
                    rows += len(make_rows(store.lengths, store.hashes, self._rest, "train")[0])
                if rows and (searched >= HELD_OUT_PIECES or (count is not None and rows >= count)):
                    return self._held_out(stores, count)
        if not rows:
            raise DataError(
                f"no document of {self.options.source!r} that gives a row is held out with "
                f"{self.options.setting('holdout')}={self.options.holdout}: raise it, or hold "
                "nothing out with 0."
            )
        return self._held_out(stores, count)

    def _held_out(
        self, stores: Sequence[TokenStore], count: int | None
    ) -> tuple[DocumentRows, Statistics]:
        documents = [s.read(i, 0, int(n)) for s in stores for i, n in enumerate(s.lengths)]
        store = self._store({token.tobytes(): token for token in documents}.values())
        table, statistics = make_rows(store.lengths, store.hashes, self._rest, "train", count)
        return self._rows(store, table), statistics

    def _rows(self, store: TokenStore, table: RowTable) -> DocumentRows:
        return DocumentRows(store, table, self.options.sequence_length, self.tokenizer.pad_id)

    def _passes(self, store: TokenStore) -> bool:
        """Whether any document is long and short enough."""
        most = self.options.max_tokens or np.iinfo(np.int64).max
        return bool(((store.lengths >= self.options.shortest) & (store.lengths <= most)).any())

    def _tokens(self, path: Path, piece: tuple[int, int], *, held_out: bool) -> TokenStore:
        """Tokenise the documents of a piece that are held out, or those that are not."""
        texts = [text for text in self._reader(path).texts(piece) if text is not None]
        bound = int(self.options.holdout * 2**64)
        documents = []
        for tokens in tokenize(texts, self.tokenizer, self.options) if texts else ():
            if (hash_tokens(tokens) < bound) == held_out:
                documents.append(tokens)
        return self._store(documents)

    def _store(self, documents: Any) -> TokenStore:
        builder, dtype = IndexBuilder(), token_dtype(self.tokenizer)
        kept = [np.zeros(0, dtype)]
        for document in documents:
            builder.add(document)
            kept.append(np.asarray(document).astype(dtype))
        return TokenStore(np.concatenate(kept), builder.finish())

    def _order(self, count: int, *place: int) -> np.ndarray:
        """Return a permutation that the seed and a place decide, [count]."""
        generator = np.random.Generator(np.random.PCG64([self._seed, FORMAT, *place]))
        return np.argsort(generator.random(count), kind="stable")

    def _reader(self, path: Path) -> _Reader:
        """Open a file; at most two are kept: what is trained on, and what is read ahead."""
        if path not in self._readers:
            while len(self._readers) > 1:
                del self._readers[next(iter(self._readers))]
            field = {self.options.text_field: self.options.setting("text_field")}
            self._readers[path] = _open(path, field)
        return self._readers[path]


def open_stream(options: DataConfig, tokenizer: Tokenizer, *, seed: int) -> DocumentStream | None:
    """Open the documents of `options` to be read while training; None if all are read at first.

    `options.stream` decides; where it is None, records of a store are read while training, unless
    other options need all of them.

    Raises DataError: the source is missing, or cannot be read in pieces.
    """
    wanted = options.stream
    whole = options.cache_dir or options.limit_documents or options.epochs
    if wanted is False or (wanted is None and (whole or not is_remote(options.source))):
        return None
    setting = options.setting
    files, kind = files_of(options.source, options.files, setting("source"), setting("files"))
    if kind == "text":
        if wanted is None:
            return None
        raise DataError(
            f"{setting('stream')} is for records (parquet, JSON). Got: {files[0]}, a text."
        )
    return DocumentStream(files, options, tokenizer, seed)


def _open(path: Path, field: Mapping[str, str]) -> _Reader:
    if kind_of(path) == "parquet":
        return _Whole(path, field) if is_packed(path) else _RowGroups(path, field)
    lines = path.name.lower().endswith((".jsonl", ".ndjson")) and not is_packed(path)
    return _Lines(path, field) if lines else _Whole(path, field)


class _Whole:
    """A file that can only be read as one: compressed, or a JSON array."""

    def __init__(self, path: Path, field: Mapping[str, str]) -> None:
        ((self._field, _),) = field.items()
        self._records = Records([path], field, text_field=self._field)
        self.pieces = [(0, len(self._records))] if len(self._records) else []

    def texts(self, piece: tuple[int, int]) -> Iterator[str | None]:
        for index in range(*piece):
            text, place = self._records[index][self._field], self._records.place(index)
            yield check_text(text, self._field, place)


class _RowGroups:
    """A parquet file; a piece is some row groups, first to last + 1."""

    def __init__(self, path: Path, field: Mapping[str, str]) -> None:
        ((self._field, _),) = field.items()
        self._path = path
        with opened_parquet(path) as file:
            column = text_column(file, field, path)
            sizes = [
                file.metadata.row_group(group).column(column).total_uncompressed_size
                for group in range(file.metadata.num_row_groups)
            ]
            rows = [file.metadata.row_group(group).num_rows for group in range(len(sizes))]
            self._metadata = file.metadata
        self._firsts = np.cumsum([0, *rows])
        self.pieces = _joined(sizes)

    def texts(self, piece: tuple[int, int]) -> Iterator[str | None]:
        first = int(self._firsts[piece[0]])
        with opened_parquet(self._path, metadata=self._metadata) as file:
            table = file.read_row_groups(list(range(*piece)), columns=[self._field])
        for row, text in enumerate(table.column(self._field).to_pylist()):
            place = f"row {first + row} of {self._path}"
            yield None if text is None else check_text(clean(text), self._field, place)


def _joined(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Join neighbours to pieces of at least `PIECE_BYTES`: (first, last + 1) of each."""
    pieces, first, held = [], 0, 0
    for index, size in enumerate(sizes):
        held += size
        if held >= PIECE_BYTES or index + 1 == len(sizes):
            pieces.append((first, index + 1))
            first, held = index + 1, 0
    return pieces


class _Lines:
    """A file of JSON lines; a piece is the lines that begin in a range of its bytes."""

    def __init__(self, path: Path, field: Mapping[str, str]) -> None:
        self._path, self._fields = path, field
        ((self._field, _),) = field.items()
        check_head(read_head(path), path)
        with self._opened() as file:
            size = file.seek(0, io.SEEK_END)
        starts = range(0, size, PIECE_BYTES)
        self.pieces = [(start, min(start + PIECE_BYTES, size)) for start in starts]

    def texts(self, piece: tuple[int, int]) -> Iterator[str | None]:
        with self._opened() as file:
            position = max(piece[0] - 1, 0)
            file.seek(position)
            if piece[0]:  # the rest of a line that begins before, or its end
                position += len(self._line(file, position))
            while position < piece[1] and (line := self._line(file, position)):
                if line.strip():
                    place = f"{self._path}, the line at byte {position}"
                    text = parse_record(line, place, self._fields)[self._field]
                    yield None if text is None else check_text(text, self._field, place)
                position += len(line)

    def _line(self, file: Any, position: int) -> bytes:
        line = file.readline(LONGEST_BYTES)
        if len(line) == LONGEST_BYTES:
            raise DataError(
                f"{self._path}, the line at byte {position} has more than {LONGEST_BYTES >> 20} "
                "MiB: a record of this length is not read. Cut it into several."
            )
        return line

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with open_file(self._path, ahead=_READ_BYTES) as file:
                yield io.BufferedReader(file, 1 << 20) if is_remote(self._path) else file
        except OSError as error:
            raise DataError(f"cannot read {self._path}: {error.strerror or error}.") from None
