"""Where documents come from: random access to the texts of files and data sets.

`open_source(options)` returns a `TextSource`. Files of a folder are taken in sorted order, so the
order of the documents is the same on every machine. Each failure is one `DataError` that names the
file and what to do.
"""

import importlib.util
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from absl import logging

from refine_jax.base.errors import DataError
from refine_jax.base.files import clean_text
from refine_jax.config import DataConfig
from refine_jax.data.formats import (
    check_head,
    files_of,
    find_files,
    is_tfds_folder,
    looks_like_records,
)
from refine_jax.data.parquet import check_text
from refine_jax.data.recall import RecallDocuments
from refine_jax.data.records import LONGEST_BYTES, Records
from refine_jax.data.records import fingerprint as _fingerprint
from refine_jax.data.tfds import TfdsSource
from refine_jax.data.unpack import blocks, is_packed

__all__ = ["FilesSource", "RecordsSource", "TextSource", "find_files", "open_source", "open_texts"]

# Folders of the standard library that hold no library code, or code that distributions move about.
STDLIB_EXCLUDED = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
)


class TextSource(Protocol):
    """Documents by index.

    Attributes:
        fingerprint: changes when the files do (paths, sizes, dates).
        dropped: what the files hold and the source leaves out: {"null": records without a text}.
    """

    fingerprint: str
    dropped: Mapping[str, int]

    def __len__(self) -> int:
        """Return the number of documents."""

    def __getitem__(self, index: int) -> str:
        """Return the text of a document; raises DataError if it cannot be read."""


class FilesSource:
    """One document a file, also of compressed ones.

    files: the files, in order. setting: what chooses files, for messages. decode: bytes to text;
    UTF-8 by default, unchanged line ends.
    """

    def __init__(
        self, files: Sequence[Path], setting: str, decode: Callable[[bytes], str] | None = None
    ) -> None:
        self._files, self._setting = tuple(files), setting
        self._decode = decode or (lambda content: content.decode("utf-8"))
        self._warned = False
        self.dropped: Mapping[str, int] = {}
        self.fingerprint = _fingerprint("text", files=self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> str:
        path = self._files[index]
        try:
            content = _unpacked(path) if is_packed(path) else path.read_bytes()
            check_head(content[:64], path)
            text = clean_text(self._decode(content))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}.") from error
        except (UnicodeDecodeError, SyntaxError) as error:
            raise DataError(
                f"{path} is not UTF-8 text ({error}); choose text files with {self._setting}"
            ) from error
        if not self._warned and looks_like_records(text):
            self._warned = True
            logging.warning(
                "%s is read as one text, but it begins as JSON does: name it .jsonl or .json to "
                "read records",
                path,
            )
        return text


def _unpacked(path: Path) -> bytes:
    content = bytearray()
    for block in blocks(path):
        content += block
        if len(content) > LONGEST_BYTES:
            raise DataError(
                f"{path} unpacks to more than {LONGEST_BYTES >> 20} MiB of text: unpack it first."
            )
    return bytes(content)


class RecordsSource:
    """A text field of records: JSON (lines, arrays) or parquet; see `Records`.

    Attributes:
        dropped: {"null": number of records left out, as they have no text}.
    """

    def __init__(self, files: Sequence[Path], field: str, setting: str) -> None:
        """Index the files; raises DataError if they are broken, or the field holds no strings.

        setting: what names the field, for messages.
        """
        self._field = field
        self._records = Records(files, {field: setting}, text_field=field)
        self.fingerprint = self._records.fingerprint
        self.dropped: Mapping[str, int] = self._records.dropped

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        """Return the text of a record; lone surrogates (invalid Unicode) become "?"."""
        return check_text(
            self._records[index][self._field], self._field, self._records.place(index)
        )


def open_source(options: DataConfig) -> TextSource:
    """Return the documents that `options.source` names; it is never empty.

    Raises DataError: the source is missing, unreadable, empty, or mixes kinds of files.
    """
    source, setting = options.source, options.setting
    if source == "stdlib":
        return FilesSource(
            _stdlib_files(setting("source")), setting("files"), importlib.util.decode_source
        )
    if source == "recall":
        return RecallDocuments()
    if source.startswith("tfds:") or is_tfds_folder(source):
        documents: TextSource = TfdsSource(options)
        if len(documents) == 0:
            raise DataError(f"{setting('source')}={source!r} holds no documents")
        return documents
    names = (setting("source"), setting("files"), setting("text_field"))
    return open_texts(source, options.text_field, options.files, *names)


def open_texts(
    path: str,
    field: str = "text",
    pattern: str = "",
    setting: str = "data.source",
    pattern_setting: str = "",
    field_setting: str = "",
) -> TextSource:
    """Return the texts of files: whole text files, or a field of records; it is never empty.

    path: a file, a folder or a glob pattern; see `refine_jax.data.formats.files_of`.
    field: parquet column or JSON field that holds the text.
    pattern: file name pattern for a folder; "" is every known suffix.
    setting: what the path was given as, for errors; `pattern_setting` and `field_setting` likewise,
        "" where there is nothing to set it with.

    Raises DataError: nothing is there, it cannot be read, or there is no text in it.
    """
    files, kind = files_of(path, pattern, setting, pattern_setting)
    if kind == "text":
        return FilesSource(files, pattern_setting or setting)
    documents = RecordsSource(files, field, field_setting)
    nulls = documents.dropped["null"]
    if len(documents) == 0:
        why = f": {field!r} is null in all of its {nulls} records" if nulls else ""
        raise DataError(f"{setting}={path!r} holds no documents{why}")
    if nulls:
        logging.warning(
            "%s: left out %d of %d records, whose %r is null",
            path,
            nulls,
            nulls + len(documents),
            field,
        )
    return documents


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
