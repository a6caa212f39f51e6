"""Where documents come from: random access to the texts of files and data sets.

`open_source(options)` returns a `TextSource`. Files of a folder are taken in sorted order, so the
order of the documents is the same on every machine. Each failure is one `DataError` that names the
file and what to do.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import json
import os
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from refine_jax.base.errors import DataError
from refine_jax.base.files import local_path, valid_unicode
from refine_jax.data.options import DataOptions

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
KNOWN_FILES = ("*.parquet", *(f"*{suffix}" for suffix in JSON_SUFFIXES), "*.txt", "*.md")
READ_BYTES = 1 << 20
# Folders of the standard library that hold no library code, or code that distributions move about.
STDLIB_EXCLUDED = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
)


class TextSource(Protocol):
    """Documents by index. `fingerprint` changes when their files do (paths, sizes, dates)."""

    fingerprint: str

    def __len__(self) -> int:
        """Return the number of documents."""

    def __getitem__(self, index: int) -> str:
        """Return the text of a document; raises DataError if it cannot be read."""


class FilesSource:
    """One document a file.

    Args:
        files: the files, in order.
        setting: what chooses files, for messages.
        decode: bytes to text; UTF-8 by default, unchanged line ends.
    """

    def __init__(
        self,
        files: Sequence[Path],
        setting: str,
        decode: Callable[[bytes], str] | None = None,
    ) -> None:
        self._files, self._setting = tuple(files), setting
        self._decode = decode or (lambda content: content.decode("utf-8"))
        self.fingerprint = _fingerprint("text", files=self._files)

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._files)

    def __getitem__(self, index: int) -> str:
        """Return the text of a file."""
        path = self._files[index]
        try:
            return self._decode(path.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        except (UnicodeDecodeError, SyntaxError) as error:
            raise DataError(
                f"{path} is not UTF-8 text ({error}); choose text files with {self._setting}"
            ) from error


class ParquetRecords:
    """Rows of parquet files as dicts of some columns.

    One row group at a time is decoded and kept: reading in order is fast and takes little memory.
    """

    def __init__(self, files: Sequence[Path], columns: Mapping[str, str]) -> None:
        """Read the schemas.

        Args:
            files: the files, in order.
            columns: {name of a column: the setting that names it}.

        Raises:
            DataError: a broken file, or a missing column.
        """
        self._columns = tuple(columns)
        self._groups: list[tuple[Path, int]] = []  # (file, row group in it)
        rows: list[int] = []
        for path in files:
            with _open_parquet(path) as file:
                for column, setting in columns.items():
                    _check_column(file.schema_arrow, column, setting, path)
                counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            self._groups += [(path, group) for group in range(len(counts))]
            rows += counts
        self._ends = np.cumsum(rows, dtype=np.int64)
        self._cached: tuple[int, Any] = (-1, None)
        self.fingerprint = _fingerprint("parquet", *self._columns, files=files)

    def __len__(self) -> int:
        """Return the number of rows of all files."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row as {column: value}."""
        group, row = _locate(self._ends, index)
        if self._cached[0] != group:
            path, number = self._groups[group]
            with _open_parquet(path) as file:
                try:
                    table = file.read_row_group(number, columns=list(self._columns))
                except OSError as error:
                    raise DataError(f"cannot read row group {number} of {path}: {error}") from error
            self._cached = (group, table)
        table = self._cached[1]
        return {column: table.column(column)[row].as_py() for column in self._columns}

    def place(self, index: int) -> str:
        """Where a row stands, for messages."""
        group, _ = _locate(self._ends, index)
        return f"row {index} of {self._groups[group][0]}"


class ParquetSource:
    """A string column of parquet files; a null is an empty document."""

    def __init__(self, files: Sequence[Path], column: str, setting: str) -> None:
        """Read the schemas; raises DataError for a broken file, a missing or non-string column.

        setting: what names the column, for messages.
        """
        self._column = column
        self._records = ParquetRecords(files, {column: setting})
        for path in files:
            with _open_parquet(path) as file:
                _check_strings(file.schema_arrow, column, path)
        self.fingerprint = self._records.fingerprint

    def __len__(self) -> int:
        """Return the number of rows of all files."""
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        """Return the text of a row."""
        return self._records[index][self._column] or ""


class JsonRecords:
    """Files with one JSON object a line; blank lines are skipped.

    The byte offset of every line is indexed once (8 bytes a line). The .gz and .zst files are
    unpacked into one unnamed temporary file (in TMPDIR), which goes when the records do.
    """

    def __init__(self, files: Sequence[Path], fields: Mapping[str, str]) -> None:
        """Index the files.

        Args:
            files: the files, in order.
            fields: {name of a field: the setting that names it}.

        Raises:
            DataError: a file that is missing, broken or cut off.
        """
        self._fields = dict(fields)
        self._files = tuple(files)
        self._unpacked: BinaryIO | None = None
        self._starts: list[int] = []  # where a file begins in the stream that holds it
        self._offsets = [self._index(path) for path in self._files]
        self._ends = np.cumsum([len(offsets) for offsets in self._offsets], dtype=np.int64)
        self._open: tuple[int, BinaryIO | None] = (-1, None)
        self.fingerprint = _fingerprint("jsonl", *self._fields, files=self._files)

    def __len__(self) -> int:
        """Return the number of lines that are not blank."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return {field: value} of a line; raises DataError if it is no object with the fields."""
        file, line = _locate(self._ends, index)
        stream = self._stream(file)
        stream.seek(int(self._offsets[file][line]))
        try:
            record = json.loads(stream.readline())
        except ValueError as error:
            raise DataError(f"{self.place(index)} is not JSON: {error}") from error
        for field, setting in self._fields.items():
            if not isinstance(record, dict) or field not in record:
                got = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise DataError(
                    f"no field {field!r} in {self.place(index)}: set {setting}. Got: {got}."
                )
        return {field: record[field] for field in self._fields}

    def place(self, index: int) -> str:
        """Where a line stands, for messages."""
        file, line = _locate(self._ends, index)
        offset = int(self._offsets[file][line])
        stream = self._stream(file)
        stream.seek(self._starts[file])
        number = 1 + stream.read(offset - self._starts[file]).count(b"\n")
        return f"{self._files[file]}, line {number}"

    def _index(self, path: Path) -> np.ndarray:
        """Return where the lines of a file start in the stream that holds it, [N] int64."""
        if path.suffix not in UNPACK:
            self._starts.append(0)
            with _reading(path), path.open("rb") as stream:
                return _line_offsets(stream, 0)
        if self._unpacked is None:
            self._unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as self)
        start = self._unpacked.seek(0, os.SEEK_END)
        self._starts.append(start)
        with _reading(path), path.open("rb") as packed:
            for block in UNPACK[path.suffix](packed):
                self._unpacked.write(block)
        self._unpacked.seek(start)
        offsets = _line_offsets(self._unpacked, start)
        # The next file must not continue the last line of this one.
        self._unpacked.write(b"\n")
        return offsets

    def _stream(self, file: int) -> BinaryIO:
        path = self._files[file]
        if path.suffix in UNPACK:
            return self._unpacked
        if self._open[0] != file:
            if self._open[1] is not None:
                self._open[1].close()
            with _reading(path):
                self._open = (file, path.open("rb"))
        return self._open[1]


class JsonLinesSource:
    """A string field of files with one JSON object a line; see `JsonRecords`."""

    def __init__(self, files: Sequence[Path], field: str, setting: str) -> None:
        """Index the files; raises DataError for a file that is missing, broken or cut off.

        setting: what names the field, for messages.
        """
        self._field = field
        self._records = JsonRecords(files, {field: setting})
        self.fingerprint = self._records.fingerprint

    def __len__(self) -> int:
        """Return the number of lines that are not blank."""
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        """Return the text of a line; lone surrogates (invalid Unicode) become "?"."""
        text = self._records[index][self._field]
        if not isinstance(text, str):
            raise DataError(
                f"field {self._field!r} in {self._records.place(index)} must be a string. "
                f"Got: {type(text).__name__}."
            )
        return valid_unicode(text)


class TfdsSource:
    """The text feature of a tensorflow-datasets data set, read without TensorFlow."""

    def __init__(self, options: DataOptions) -> None:
        """Open it, preparing it first if need be; raises DataError where tfds cannot."""
        import tensorflow_datasets as tfds

        name, split = options.source.removeprefix("tfds:"), options.tfds_split
        data_dir, feature = options.tfds_data_dir, options.text_field
        try:
            if Path(name).is_dir():
                builder = tfds.builder_from_directory(name)
            else:
                builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
                builder.download_and_prepare()
            self._records = builder.as_data_source(split=split)
        except Exception as error:  # builders are third-party code and raise anything
            raise DataError(
                f"tensorflow-datasets cannot read {name!r}, split {split!r}: {error}"
            ) from error
        features = sorted(builder.info.features or ())  # tfds gives them in any order
        if feature not in features:
            raise DataError(
                f"no feature {feature!r} in {builder.info.full_name}: set "
                f"{options.setting('text_field')} to one of {', '.join(features)}"
            )
        self._feature = feature
        self._name = builder.info.full_name
        self.fingerprint = _fingerprint(
            "tfds", self._name, split, feature, str(builder.info.splits[split].shard_lengths)
        )

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        """Return the text of an example."""
        text = self._records[index][self._feature]
        try:
            return text.decode("utf-8")
        except (AttributeError, UnicodeDecodeError) as error:
            raise DataError(
                f"feature {self._feature!r} of {self._name}, example {index}, is not UTF-8 text: "
                f"{error}"
            ) from error


def open_source(options: DataOptions) -> TextSource:
    """Return the documents that `options.source` names; it is never empty.

    Raises:
        DataError: the source is missing, unreadable, empty, or mixes kinds of files.
    """
    source, setting = options.source, options.setting
    if source == "stdlib":
        found: TextSource = FilesSource(
            _stdlib_files(setting("source")), setting("files"), importlib.util.decode_source
        )
    elif source.startswith("tfds:") or is_tfds_folder(source):
        found = TfdsSource(options)
    else:
        files, kind = files_of(options)
        if kind == "parquet":
            found = ParquetSource(files, options.text_field, setting("text_field"))
        elif kind == "jsonl":
            found = JsonLinesSource(files, options.text_field, setting("text_field"))
        else:
            found = FilesSource(files, setting("files"))
    if len(found) == 0:
        raise DataError(f"{setting('source')}={source!r} holds no documents")
    return found


def files_of(options: DataOptions) -> tuple[list[Path], str]:
    """The files that `options.source` names, sorted, and their kind: parquet, jsonl or text.

    Raises:
        DataError: nothing is there, or several kinds.
    """
    setting = options.setting("files")
    files = find_files(options.source, options.files, options.setting("source"), setting)
    kinds = sorted({_kind(path) for path in files})
    if len(kinds) > 1:
        raise DataError(
            f"{options.source} mixes {' and '.join(kinds)} files: choose one kind with {setting}, "
            f'e.g. {setting}="{KNOWN_FILES[0]}"'
        )
    return files, kinds[0]


def is_tfds_folder(path: str) -> bool:
    """Say whether `path` is a folder that tensorflow-datasets has prepared."""
    return os.path.isfile(os.path.join(path, "dataset_info.json"))


def find_files(
    path: str, pattern: str = "", setting: str = "data.source", pattern_setting: str = ""
) -> list[Path]:
    """Return the files that `path` names, sorted.

    Args:
        path: a file, a folder (searched recursively; hidden files are left out) or a glob pattern.
        pattern: file name pattern for a folder; "" is every known suffix.
        setting: what the path was given as, for errors.
        pattern_setting: what the pattern is given as; "" where there is nothing to give it with.

    Raises:
        DataError: nothing is there.
    """
    root = local_path(path, setting, DataError)
    path = str(root)
    if root.is_file():
        return [root]
    if root.is_dir():
        patterns = (pattern,) if pattern else KNOWN_FILES
        found = {file for each in patterns for file in root.rglob(each) if file.is_file()}
        found = {
            file
            for file in found
            if not any(part.startswith(".") for part in file.relative_to(root).parts)
        }
        if not found:
            hint = f": set {pattern_setting}" if pattern_setting else ""
            raise DataError(f"no file {' or '.join(patterns)} in {path}{hint}")
    elif any(sign in path for sign in "*?["):
        base = Path(root.anchor or ".")
        relative = root.relative_to(root.anchor) if root.anchor else root
        found = {file for file in base.glob(str(relative)) if file.is_file()}
        if not found:
            raise DataError(f"no file matches {setting}={path!r}")
    else:
        raise DataError(f"no such file or folder: {setting}={path!r}")
    return sorted(found, key=lambda file: file.as_posix())


def _stdlib_files(setting: str) -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        file
        for file in root.rglob("*.py")
        if STDLIB_EXCLUDED.isdisjoint(file.relative_to(root).parts)
    ]
    if not files:
        raise DataError(
            f"this Python has no source files in {root}: set {setting} to a file or folder"
        )
    return sorted(files, key=lambda file: file.as_posix())


def _kind(path: Path) -> str:
    if path.name.endswith(".parquet"):
        return "parquet"
    return "jsonl" if path.name.endswith(JSON_SUFFIXES) else "text"


def _fingerprint(kind: str, *settings: str, files: Sequence[Path] = ()) -> str:
    digest = hashlib.blake2b(json.dumps([kind, *settings]).encode(), digest_size=8)
    for path in files:
        status = path.stat()
        digest.update(f"\n{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    return f"{kind}-{digest.hexdigest()}"


def _locate(ends: np.ndarray, index: int) -> tuple[int, int]:
    """Return (part, index within the part) of a document, given where the parts end."""
    if not 0 <= index < ends[-1]:
        raise IndexError(f"document {index} of {ends[-1]}")
    part = int(np.searchsorted(ends, index, side="right"))
    return part, index - (int(ends[part - 1]) if part else 0)


@contextlib.contextmanager
def _open_parquet(path: Path) -> Iterator:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"not a readable parquet file: {path} ({error})") from error
    with file:
        yield file


def _check_column(schema, column: str, setting: str, path: Path) -> None:
    if column not in schema.names:
        raise DataError(
            f"no column {column!r} in {path}: set {setting} to one of {', '.join(schema.names)}"
        )


def _check_strings(schema, column: str, path: Path) -> None:
    import pyarrow

    kind = schema.field(column).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"column {column!r} of {path} must hold strings. Got: {kind}.")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _line_offsets(stream: BinaryIO, position: int) -> np.ndarray:
    """Return where each line that is not blank starts, [N] int64; the stream is at `position`."""
    offsets = []
    for line in stream:
        if line.strip():
            offsets.append(position)
        position += len(line)
    return np.array(offsets, np.int64)


def _unpack_gzip(packed: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=packed) as stream:
        while block := stream.read(READ_BYTES):
            yield block


def _unpack_zstd(packed: BinaryIO) -> Iterator[bytes]:
    import zstandard

    # zstandard's stream reader takes a cut-off file for a complete one; this object can tell.
    frame = None
    try:
        while block := packed.read(READ_BYTES):
            while block:
                if frame is None or frame.eof:  # a file may hold several frames
                    frame = zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if frame is not None and not frame.eof:
        raise EOFError("the file ends in the middle (an incomplete download?)")


UNPACK: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {
    ".gz": _unpack_gzip,
    ".zst": _unpack_zstd,
}
