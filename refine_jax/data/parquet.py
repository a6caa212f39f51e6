"""Parquet files as records: a row group at a time is decoded; of a store only what is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from refine_jax.base.errors import DataError
from refine_jax.base.files import clean_text
from refine_jax.base.remote import is_remote
from refine_jax.data.footer import null_counts
from refine_jax.data.formats import check_format
from refine_jax.data.unpack import is_packed, open_file, read_head, temporary_file, unpack

BUFFER_BYTES = 1 << 16
Fields = Mapping[str, str] | None  # names, and the settings that name them


def clean(value: Any) -> Any:
    """Clean every text in a value of JSON or parquet; bytes become text if they are."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return clean_text(value.decode("utf-8"))
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {clean(name): clean(item) for name, item in value.items()}
    return value


def check_text(value: Any, field: str, place: str) -> str:
    """Return the text of a record, cleaned before; raises DataError if it is none."""
    if isinstance(value, bytes):
        raise DataError(
            f"column {field!r} in {place} must hold strings: its bytes are not UTF-8. "
            f"Got: {value[:20]!r}."
        )
    if not isinstance(value, str):
        raise DataError(
            f"field {field!r} in {place} must be a string. Got: {type(value).__name__}."
        )
    return value


class ParquetFile:
    """The rows of a parquet file; a row group at a time is decoded and kept."""

    def __init__(self, path: Path, fields: Fields, text_field: str | None) -> None:
        self._path, self.left_out = path, 0
        check_format(read_head(path), path)
        self._unpacked: BinaryIO | None = None
        if is_packed(path):
            self._unpacked = temporary_file(path)
            unpack(path, self._unpacked)
        with self._opened() as file:
            self._columns = _columns(file, fields, path)
            groups = range(file.metadata.num_row_groups)
            counts = [file.metadata.row_group(group).num_rows for group in groups]
            # The rows that are kept, of groups with nulls.
            self._kept: dict[int, np.ndarray] = {}
            nulls: list[int | None] = [0] * len(counts)
            if text_field:
                _check_strings(file.schema_arrow.field(text_field).type, text_field, path)
                packed = contextlib.nullcontext(self._unpacked) if self._unpacked else None
                with packed or open_file(path, ahead=BUFFER_BYTES) as stream:
                    nulls = null_counts(stream, text_field)
            for group, count in enumerate(counts):
                if count and (group >= len(nulls) or nulls[group] != 0):
                    batches = file.iter_batches(row_groups=[group], columns=[text_field])
                    valid = [batch.column(0).is_valid().to_numpy(False) for batch in batches]
                    kept = np.flatnonzero(np.concatenate(valid))
                    if len(kept) < count:
                        self._kept[group] = kept
        self._firsts = np.cumsum([0, *counts], dtype=np.int64)
        lengths = [len(self._kept.get(group, range(counts[group]))) for group in groups]
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self.left_out = sum(counts) - sum(lengths)
        self._cached: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, index: int) -> dict[str, Any]:
        """Return a record."""
        group, row = self._locate(index)
        if self._cached[0] != group:
            with self._opened() as file:
                self._cached = (group, file.read_row_group(group, columns=self._columns))
        table = self._cached[1]
        with _pyarrow_errors(f"cannot read {self.place(index)}"):
            return {name: clean(table.column(name)[row].as_py()) for name in self._columns}

    def place(self, index: int) -> str:
        """Say where a record stands, for messages."""
        group, row = self._locate(index)
        return f"row {self._firsts[group] + row} of {self._path}"

    def _locate(self, index: int) -> tuple[int, int]:
        """Find the row group of a record, and its row in it."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[group - 1]) if group else 0)
        return group, int(self._kept[group][row]) if group in self._kept else row

    @contextlib.contextmanager
    def _opened(self) -> Iterator:
        with opened_parquet(self._path, self._unpacked) as file:
            yield file


@contextlib.contextmanager
def opened_parquet(path: Path, unpacked: BinaryIO | None = None, metadata: Any = None) -> Iterator:
    """Open a parquet file, or what it was unpacked to; raises DataError where it is damaged.

    metadata: of the file, if its footer was read before.
    """
    import pyarrow.parquet

    with contextlib.ExitStack() as opened:
        opened.enter_context(_pyarrow_errors(f"not a readable parquet file: {path}"))
        source = unpacked or path
        if unpacked is None and is_remote(path):
            source = opened.enter_context(open_file(path))
        yield opened.enter_context(
            pyarrow.parquet.ParquetFile(source, metadata=metadata, buffer_size=BUFFER_BYTES)
        )


def text_column(file: Any, field: Mapping[str, str], path: Path) -> int:
    """Find the number of the column that holds the texts; raises DataError if there is none."""
    (name,) = _columns(file, field, path)
    _check_strings(file.schema_arrow.field(name).type, name, path)
    return [file.schema.column(i).path for i in range(len(file.schema))].index(name)


def _columns(file: Any, fields: Fields, path: Path) -> list[str]:
    """Find the columns of fields; raises DataError for one that is not there, or twice."""
    names = file.schema_arrow.names
    for name in names if fields is None else fields:
        if name not in names:
            setting, there = fields[name], ", ".join(names) or "no column"
            what = f"set {setting} to one of" if setting else "its texts must have it. Got:"
            raise DataError(f"no column {name!r} in {path}: {what} {there:.500}")
        if names.count(name) > 1:
            raise DataError(f"{path} has {names.count(name)} columns of the name {name!r}.")
    return list(names if fields is None else fields)


@contextlib.contextmanager
def _pyarrow_errors(message: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # pyarrow raises many kinds where a file is damaged
        raise DataError(f"{message} ({error})") from error


def _check_strings(kind: Any, column: str, path: Path) -> None:
    """Raise DataError unless a column holds strings, or bytes that may be UTF-8."""
    from pyarrow import types

    inner = getattr(kind, "storage_type", kind)
    inner = inner.value_type if types.is_dictionary(inner) else inner
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    checks += (types.is_binary, types.is_large_binary, types.is_binary_view)
    if not any(check(inner) for check in checks):
        raise DataError(f"column {column!r} of {path} must hold strings. Got: {kind}.")
