"""Compressed files as streams of bytes: gzip and zstd, unpacked in constant memory.

A file is compressed if its first bytes say so; a name that ends in .gz or .zst must keep its word.
"""

import contextlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from absl import logging

from refine_jax.base.errors import DataError
from refine_jax.base.remote import is_remote

PACKED_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd")
READ_BYTES = 1 << 20
# Four bytes can unpack to a block of 128 KiB, and zstandard returns all that its input holds: so
# much of a file at a time makes 16 MiB at most.
ZSTD_BYTES = 512
ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` writes, the most there is
CUT_OFF = "the file ends in the middle (an incomplete download?)"
_GZIP, _ZSTD, _SKIPPABLE = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"


def stem_name(path: Path) -> str:
    """Return the name of a file in lower case, without the suffix of a compression."""
    name = path.name.lower()
    for suffix in PACKED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


@contextlib.contextmanager
def open_file(path: Path, *, ahead: int = 0) -> Iterator[BinaryIO]:
    """Open a file, of this machine or of a store, for reading; errors are those of a disk.

    ahead: bytes that are fetched together from a store; 0: what is read is what is fetched.
    """
    if not is_remote(path):
        with path.open("rb") as file:
            yield file
        return
    cache = {"cache_type": "readahead", "block_size": ahead} if ahead else {"cache_type": "none"}
    with path.open("rb", buffering=0, **cache) as file:
        yield file


def read_head(path: Path, size: int = 4096) -> bytes:
    """Read the first bytes of a file, unpacked; raises DataError if it cannot be read."""
    try:
        with open_file(path) as file:
            head = file.read(size)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None
    if _codec(path, head[:4]) is None:
        return head
    head = b""
    for block in blocks(path):
        head += block[: size - len(head)]
        if len(head) == size:
            break
    return head


def is_packed(path: Path) -> bool:
    """Say whether a file is compressed; raises DataError if its name says so in vain."""
    try:
        with open_file(path) as file:
            return _codec(path, file.read(4)) is not None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None


def blocks(path: Path) -> Iterator[bytes]:
    """Yield the content of a file, unpacked, in blocks of a few megabytes at most.

    Raises DataError: the file is damaged, cut off or unreadable.
    """
    try:
        with open_file(path, ahead=READ_BYTES) as file:
            codec = _codec(path, file.read(4))
            file.seek(0)
            if codec is not None:
                yield from codec(file, path)
            else:
                while block := file.read(READ_BYTES):
                    yield block
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from None


def unpack(path: Path, target: BinaryIO) -> None:
    """Append the content of a file, unpacked, to `target`, a temporary file.

    Raises DataError: the file is damaged, or there is no room for its content.
    """
    for block in blocks(path):
        try:
            target.write(block)
        except OSError as error:
            raise _no_room(path, error) from None


def temporary_file(path: Path) -> BinaryIO:
    """Open a file without a name, for what `path` unpacks to; it goes when it is closed.

    Raises DataError: no folder for temporary files can be written.
    """
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise _no_room(path, error) from None


def _no_room(path: Path, error: OSError) -> DataError:
    try:
        folder = f" into {tempfile.gettempdir()}"
    except OSError:
        folder = ""
    return DataError(
        f"cannot unpack {path}{folder}: {error.strerror or error}. Set the environment variable "
        "TMPDIR to a folder with more room, or unpack the file."
    )


def _codec(path: Path, magic: bytes) -> Callable[[BinaryIO, Path], Iterator[bytes]] | None:
    if magic.startswith(_GZIP):
        return _unpack_gzip
    if magic == _ZSTD or (magic[1:] == _SKIPPABLE and magic[0] >> 4 == 5):
        return _unpack_zstd
    suffix = path.suffix.lower()
    if suffix in PACKED_SUFFIXES:
        kind = "gzip" if suffix in (".gz", ".gzip") else "zstd"
        got = "an empty file" if not magic else f"a file that begins with {magic!r}"
        raise DataError(
            f"cannot read {path}: its name says that it is compressed by {kind}, but it is not. "
            f"Got: {got}. If it was unpacked on its way, rename it."
        )
    return None


def _unpack_gzip(packed: BinaryIO, path: Path) -> Iterator[bytes]:
    pending = packed.read(READ_BYTES)
    while pending:  # a member; several follow one another where files were appended
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            pending = pending or packed.read(READ_BYTES)
            block = member.decompress(pending, READ_BYTES)
            if not pending and not block and not member.eof:
                raise EOFError(CUT_OFF)
            pending = member.unconsumed_tail
            if block:
                yield block
        # Zeros pad a file to whole blocks, and the gzip command ignores whatever else follows.
        pending = member.unused_data.lstrip(b"\0")
        while len(pending) < len(_GZIP) and (block := packed.read(READ_BYTES)):
            pending = (pending + block).lstrip(b"\0")
        if pending and not pending.startswith(_GZIP):
            logging.warning("%s: what follows its last gzip member is not gzip, ignored", path)
            return


def _unpack_zstd(packed: BinaryIO, path: Path) -> Iterator[bytes]:
    import zstandard

    del path
    # zstandard's stream reader takes a cut-off file for a complete one; this object can tell.
    frame = None
    try:
        while block := packed.read(ZSTD_BYTES):
            while block:
                if frame is None or frame.eof:  # a file may hold several frames
                    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
                    frame = decompressor.decompressobj()
                if content := frame.decompress(block):
                    yield content
                block = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if frame is not None and not frame.eof:
        raise EOFError(CUT_OFF)


class Contents:
    """Files as streams, whether or not they are compressed or in a store.

    Those that are either are put, unpacked, into one temporary file without a name, in the folder
    that the environment variable TMPDIR names. It goes when this object does. Of the others one at
    a time is kept open.
    """

    def __init__(self) -> None:
        self._unpacked: BinaryIO | None = None
        self._open: tuple[Path | None, BinaryIO | None] = (None, None)
        self._spans: dict[Path, tuple[int, int]] = {}

    def add(self, path: Path) -> tuple[int, int]:
        """Find where the content of a file begins and ends in `stream(path)`, in bytes.

        Raises DataError: the file is damaged or unreadable, or there is no room to unpack it.
        """
        if is_remote(path) or is_packed(path):
            if self._unpacked is None:
                self._unpacked = temporary_file(path)
                logging.info("files are unpacked into %s", tempfile.gettempdir())
            start = self._unpacked.seek(0, os.SEEK_END)
            unpack(path, self._unpacked)
            self._spans[path] = (start, self._unpacked.tell())
            return self._spans[path]
        return 0, self.stream(path).seek(0, os.SEEK_END)

    def stream(self, path: Path) -> BinaryIO:
        """Open the stream of a file, at any position; raises DataError if it cannot be read."""
        if path in self._spans:
            return self._unpacked
        if self._open[0] != path:
            if self._open[1] is not None:
                self._open[1].close()
            try:
                self._open = (path, path.open("rb"))
            except OSError as error:
                self._open = (None, None)
                raise DataError(f"cannot read {path}: {error.strerror or error}.") from None
        return self._open[1]
