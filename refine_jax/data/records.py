"""Records of files: the one reader of JSON and parquet that others wrote.

    records = Records(files, {"text": "data.text_field"})
    records[3]        # {"text": ...}
    records.place(3)  # "corpus.jsonl, line 5", for messages

Files hold JSON lines, a JSON array, JSON objects one after the other, or parquet, all of them also
compressed by gzip or zstd. Corpora, prompts, evaluation sets and essays are read by it alike:

* text is valid Unicode without byte order marks, wherever in a record it stands;
* a name that occurs twice in a JSON object has its last value, and NaN is a number, as in Python;
* what cannot be read is one `DataError` that names the file and the line, record or row.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from refine_jax.base.errors import DataError
from refine_jax.base.files import MARK, names_of
from refine_jax.base.hub import without_commit
from refine_jax.data.formats import check_head, kind_of
from refine_jax.data.parquet import Fields, ParquetFile, clean
from refine_jax.data.unpack import Contents, read_head, stem_name

READER = 2  # of the fingerprints; raise it when the same files give other texts
PIECE_BYTES = 1 << 20
LONGEST_BYTES = 1 << 26  # of a record of JSON: what is longer is damaged, or a bomb
_MARK_BYTES = MARK.encode()
_SPACE = re.compile(r"[ \t\n\r]*")


class Records:
    """Records of files by index, as {field: value}.

    Beside the files, JSON takes 8 bytes a record and a constant. Of parquet one row group at a
    time is decoded and kept. Compressed files are unpacked once, into a temporary file without a
    name in TMPDIR.

    Attributes:
        dropped: {"null": number of records left out, as `text_field` is null}.
        fingerprint: changes when the files (paths, sizes, dates) or the fields do.
    """

    def __init__(
        self, files: Sequence[Path], fields: Fields = None, *, text_field: str | None = None
    ) -> None:
        """Index the files.

        files: the files, in order; see `refine_jax.data.formats.files_of`. fields: {name of a field
        or column: the setting that names it, "" where none does}; None reads all. text_field: one
        of `fields` that must hold text; records where it is null are left out.

        Raises DataError: a file that is missing, broken, cut off, or lacks a column.
        """
        contents = Contents()
        kinds = [kind_of(path) for path in files]
        for path, kind in zip(files, kinds, strict=True):
            if kind == "text":
                raise DataError(f"records come from parquet or JSON files. Got: {path}, a text.")
        self._parts = [
            ParquetFile(path, fields, text_field)
            if kind == "parquet"
            else _JsonFile(path, fields, text_field, contents)
            for path, kind in zip(files, kinds, strict=True)
        ]
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        self.dropped = {"null": sum(part.left_out for part in self._parts)}
        self.fingerprint = fingerprint(
            "-".join(sorted(set(kinds))), *(fields or ("*",)), files=files
        )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a record; raises DataError if it is no object with the fields."""
        part, index = self._locate(index)
        return part.read(index)

    def place(self, index: int) -> str:
        """Say where a record stands, for messages."""
        part, index = self._locate(index)
        return part.place(index)

    def _locate(self, index: int) -> tuple[_JsonFile | ParquetFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part], index - (int(self._ends[part - 1]) if part else 0)


def fingerprint(kind: str, *settings: str, files: Sequence[Path] = ()) -> str:
    """Name what files hold by their paths, sizes and dates; raises DataError for a missing file."""
    digest = hashlib.blake2b(json.dumps([READER, kind, *settings]).encode(), digest_size=8)
    for path in files:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}.") from None
        name = f"\n{without_commit(str(path.resolve()))} {status.st_size} {stamp(status)}"
        digest.update(name.encode("utf-8", "surrogateescape"))
    return f"{kind}-{digest.hexdigest()}"


def stamp(status: Any) -> Any:
    """Give what says that a file has changed, of its `stat`: the store's version, else its time."""
    return getattr(status, "version", "") or getattr(status, "st_mtime_ns", "")


class _JsonFile:
    """The objects of a file: JSON lines (blank ones are skipped), an array, or a sequence."""

    def __init__(
        self, path: Path, fields: Fields, text_field: str | None, contents: Contents
    ) -> None:
        self._path, self._fields, self._text = path, fields, text_field
        self._contents, self.left_out = contents, 0
        head = read_head(path)  # before a large file is unpacked
        check_head(head, path)
        if head.startswith(b"PAR1"):
            raise DataError(f"{path} is a parquet file: rename it to .parquet.")
        self._start, self._end = contents.add(path)
        is_named_lines = stem_name(path).endswith((".jsonl", ".ndjson"))
        self._is_lines = is_named_lines or self._begins_with_line()
        offsets = array("q")
        # Runs of lines or values that are no records: the record after each, how many up to there.
        after, left_out = array("q"), array("q", [0])
        for offset, skipped in self._line_offsets() if self._is_lines else self._value_offsets():
            if not skipped:
                offsets.append(offset)
            elif after and after[-1] == len(offsets):
                left_out[-1] += skipped
            else:
                after.append(len(offsets))
                left_out.append(left_out[-1] + skipped)
        self._offsets, self._after = np.asarray(offsets), np.asarray(after)
        self._left_out = np.asarray(left_out)

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int) -> dict[str, Any]:
        place = self.place(index)
        start, end = int(self._offsets[index]), self._end
        if not self._is_lines and index + 1 < len(self):
            end = int(self._offsets[index + 1])
        raw = self._read(start, end - start, line=self._is_lines)
        return parse_record(raw, place, self._fields, whole=self._is_lines)

    def place(self, index: int) -> str:
        run = np.searchsorted(self._after, index, side="right")
        number = 1 + index + int(self._left_out[run])
        return f"{self._path}, {'line' if self._is_lines else 'record'} {number}"

    def _read(self, offset: int, size: int, *, line: bool = False) -> bytes:
        """Read a part of the content, of at most `LONGEST_BYTES`; `line`: up to its line's end."""
        stream = self._contents.stream(self._path)
        try:
            stream.seek(offset)
            size = min(size, LONGEST_BYTES, self._end - offset)
            return stream.readline(size) if line else stream.read(size)
        except OSError as error:
            raise DataError(f"cannot read {self._path}: {error.strerror or error}.") from None

    def _begins_with_line(self) -> bool:
        """Say whether the first line is a whole object: then the file holds JSON lines."""
        head = self._read(self._start, PIECE_BYTES).removeprefix(_MARK_BYTES).lstrip()
        if not head.startswith(b"{"):
            return False
        line = head.partition(b"\n")[0]
        if b"\n" not in head and self._end - self._start > PIECE_BYTES:
            # A single object in a single line, or lines so long that they are few.
            line = self._read(self._start, LONGEST_BYTES, line=True)
        try:
            return isinstance(_parse(line, "", whole=True), dict)
        except DataError:
            return False

    def _line_offsets(self) -> Iterator[tuple[int, int]]:
        """Yield where each line begins, and 0 for a record, else how many lines are none."""
        position, number = self._start, 0
        stream = self._contents.stream(self._path)
        stream.seek(position)
        while position < self._end:
            line = piece = stream.readline(min(PIECE_BYTES, self._end - position))
            number, length, blank = number + 1, len(line), _is_blank(line)
            while not piece.endswith(b"\n") and position + length < self._end:
                piece = stream.readline(min(PIECE_BYTES, self._end - position - length))
                if not piece:
                    raise DataError(
                        f"cannot read {self._path}: it became shorter while it was read."
                    )
                length, blank = length + len(piece), blank and _is_blank(piece)
                if length > LONGEST_BYTES:
                    raise DataError(
                        f"{self._path}, line {number} has more than {LONGEST_BYTES >> 20} MiB: a "
                        "record of this length is not read. Cut it into several."
                    )
            if blank:  # many may follow
                buffered = stream.peek()
                more = buffered.rfind(b"\n", 0, len(buffered) - len(buffered.lstrip())) + 1
                more = len(stream.read(min(more, self._end - position - length)))
                lines = buffered.count(b"\n", 0, more)
                number, length = number + lines, length + more
                yield position, 1 + lines
            elif self._text is None or (length == len(line) and b"null" not in line):
                yield position, 0
            else:
                yield position, self._is_null(self._read(position, length))
                stream.seek(position + length)
            position += length

    def _value_offsets(self) -> Iterator[tuple[int, int]]:
        """Yield where each value of an array or a sequence begins, and 1 for one left out."""
        stream = self._contents.stream(self._path)
        for offset, value in _values(_Window(stream, self._start, self._end, self._path)):
            yield offset, self._is_null(value)

    def _is_null(self, value: Any) -> int:
        """Return 1 if the text of a record, or of its line, is null, and count it; else 0."""
        if isinstance(value, bytes):
            try:
                value = _parse(value, "", whole=True)
            except DataError:  # said when it is read
                return 0
        is_null = bool(self._text) and isinstance(value, dict) and value.get(self._text, "") is None
        self.left_out += is_null
        return int(is_null)


def _is_blank(line: bytes) -> bool:
    return not line.removeprefix(_MARK_BYTES).strip()


def parse_record(raw: bytes, place: str, fields: Fields, *, whole: bool = True) -> dict[str, Any]:
    """Parse the JSON object that bytes begin with; `whole`: nothing may follow it.

    place: says where it stands, for messages. fields: those that are wanted; None: all.
    Raises DataError: it is no object with these fields.
    """
    record = _parse(raw, place, whole=whole)
    if not isinstance(record, dict):
        got = "null" if record is None else type(record).__name__
        raise DataError(f"{place} must be a JSON object. Got: {got}.")
    for field, setting in (fields or {}).items():
        if field not in record:
            what = f"set {setting}" if setting else "its texts must have this name"
            raise DataError(f"no field {field!r} in {place}: {what}. Got: {names_of(record)}.")
    if fields is not None:
        record = {field: record[field] for field in fields}
    try:  # surrogates are spelled \u in UTF-8
        return clean(record) if b"\\u" in raw or _MARK_BYTES in raw else record
    except RecursionError:
        raise DataError(f"{place} is nested too deeply.") from None


def _parse(raw: bytes, place: str, *, whole: bool) -> Any:
    """Parse the JSON value that bytes begin with; `whole`: nothing may follow it."""
    hint = ""
    try:
        text = raw.decode("utf-8").removeprefix(MARK).strip(" \t\r\n")
        if whole:
            hint = " If the file holds one JSON array, call it .json." if text[:1] == "[" else ""
            return json.loads(text)
        return json.JSONDecoder().raw_decode(text)[0]
    except RecursionError:
        raise DataError(f"{place} is not JSON that can be read: it is nested too deeply.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8 text: {error}.") from None
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}.{hint}") from None


class _Window:
    """A part of a JSON file as text, which moves forward and grows as far as a value needs."""

    def __init__(self, stream: BinaryIO, start: int, end: int, path: Path) -> None:
        self.path = path
        self._stream, self._start, self._end = stream, start, end
        self._next = start  # the first byte that is not read yet
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text, self._at = "", 0
        self.offset = start  # where `_text[_at]` stands in the stream
        self._grow()
        if self._text.startswith(MARK):
            self.drop(1)

    def sign(self) -> str:
        """Skip white space; return the next character, "" at the end."""
        while True:
            self.drop(_SPACE.match(self._text, self._at).end() - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._grow():
                return ""

    def drop(self, count: int) -> None:
        """Move forward by some characters of the text."""
        dropped = self._text[self._at : self._at + count]
        self._at += count
        self.offset += count if dropped.isascii() else len(dropped.encode("utf-8"))

    def value(self) -> Any:
        """Parse the value that begins here and pass it; raises DataError if there is none."""
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except RecursionError:
                raise self.error("it is nested too deeply") from None
            except json.JSONDecodeError as error:  # perhaps it goes on behind the window
                if self._next - self.offset >= LONGEST_BYTES:
                    raise self.error(
                        f"a record ends within {LONGEST_BYTES >> 20} MiB, which this one does not"
                    ) from None
                if not self._grow():
                    raise self.error(error.msg) from None
            except ValueError as error:
                raise self.error(str(error)) from None
            else:
                if end < len(self._text) or not self._grow():  # a number may go on
                    self.drop(end - self._at)
                    return value

    def error(self, reason: str, place: int | None = None) -> DataError:
        """Say what is wrong with the value that begins here, or at a place of the stream."""
        self._stream.seek(self._start)
        line, left = 1, (self.offset if place is None else place) - self._start
        while left > 0 and (block := self._stream.read(min(left, PIECE_BYTES))):
            line, left = line + block.count(b"\n"), left - len(block)
        return DataError(f"{self.path} is not JSON, from line {line} on: {reason}.")

    def _grow(self) -> bool:
        """Read on, as much again as the window holds; returns whether there was anything."""
        if self._next >= self._end:
            return False
        self._stream.seek(self._next)
        held = self._next - self.offset
        size = min(max(PIECE_BYTES // 16, held), max(LONGEST_BYTES - held, 1))
        block = self._stream.read(min(size, self._end - self._next))
        self._next += len(block)
        try:
            text = self._decoder.decode(block, self._next >= self._end)
        except UnicodeDecodeError as error:
            place = self._next - len(error.object) + error.start
            raise self.error(f"it is not UTF-8 text ({error.reason})", place) from None
        self._text = self._text[self._at :]  # in two steps: a long value is held fewer times
        self._text, self._at = self._text + text, 0
        return bool(block)


def _values(window: _Window) -> Iterator[tuple[int, Any]]:
    """Yield (offset, value) of the elements of an array, or of values one after the other."""
    is_array = window.sign() == "["
    if is_array:
        window.drop(1)
    first = True
    while (sign := window.sign()) or is_array:
        if is_array and sign == "]":
            window.drop(1)
            if window.sign():
                raise window.error("more follows the end of its array")
            return
        if is_array and not first:
            if sign != ",":
                raise window.error("a comma or the end of the array should stand here")
            window.drop(1)
            window.sign()
        offset = window.offset
        yield offset, window.value()
        first = False
