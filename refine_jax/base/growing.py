"""What lies in a bucket and is used on a disk: files that grow, and folders of other libraries.

On a disk a line is appended when it is there, and libraries write and map files where they are
told. An object of a bucket can only be written whole: from time to time it is written anew. What a
library cannot read or write there has a copy in a temporary folder of this machine.
"""

import atexit
import contextlib
import functools
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from refine_jax.base.errors import UserError
from refine_jax.base.files import path_of, write_bytes
from refine_jax.base.remote import RemotePath

FLUSH = 10.0
"""Seconds between two times that a `Journal` in a bucket is written, at least."""


class Journal(contextlib.AbstractContextManager):
    """A text file that grows by lines, each of which counts on its own.

    On a disk every line is in the file when `add` returns. Nothing can be appended to in a bucket:
    there the file is written whole, `FLUSH` seconds after the last time or when `flush` or `close`
    ask for it, and less often where writing takes more than a hundredth of the time. A run that is
    killed loses the lines since.
    """

    def __init__(self, path: str | os.PathLike, lines: Iterable[str] = ()):
        """Write a file anew, with the lines that it begins with."""
        self._path = path_of(path)
        content = "".join(lines).encode("utf-8")
        write_bytes(self._path, content)
        self._file, self._content, self._new = None, bytearray(), False
        self._next = time.monotonic() + FLUSH
        if isinstance(self._path, RemotePath):
            self._content += content
        else:
            self._file = self._path.open("ab")

    def add(self, *lines: str) -> None:
        """Add lines, each with its end."""
        content = "".join(lines).encode("utf-8")
        if self._file is not None:
            self._file.write(content)
            self._file.flush()
            return
        self._content += content
        self._new = True
        if time.monotonic() >= self._next:
            self.flush()

    def flush(self) -> None:
        """Return when all lines are in the file."""
        if not self._new:
            return
        begin = time.monotonic()
        self._path.write_bytes(bytes(self._content))
        self._new = False
        end = time.monotonic()
        self._next = end + max(FLUSH, 100 * (end - begin))

    def close(self) -> None:
        """Write what is left, and close the file."""
        self.flush()
        if self._file is not None:
            self._file.close()

    def __exit__(self, *_: Any) -> None:
        self.close()


class Mirror(contextlib.AbstractContextManager):
    """A folder of this machine for libraries that write to no bucket, and that bucket's copy.

    folder: where the files belong. Of a disk, it is used itself, and nothing else is done.

    Attributes:
      path: Where to write: the folder, or a temporary one of its name.
    """

    def __init__(self, folder: Path | RemotePath):
        self._target = folder if isinstance(folder, RemotePath) else None
        self._temporary, self._seen = None, dict[Path, tuple[int, int]]()
        self.path: Path = folder
        if self._target is not None:
            self._temporary = tempfile.TemporaryDirectory(prefix="refine-jax-")
            self.path = Path(self._temporary.name) / folder.name
            self.path.mkdir()

    def fetch(self, name: str) -> Path:
        """Bring a file of the folder here, if it is there; returns its path."""
        path = self.path / name
        if self._target is not None and (self._target / name).is_file():
            (self._target / name).download(path)
            self._seen[path] = _stamp(path)
        return path

    def upload(self) -> None:
        """Write to the bucket what has changed since the last time."""
        if self._target is None:
            return
        for path in sorted(self.path.rglob("*")):
            if path.is_file() and self._seen.get(path) != (stamp := _stamp(path)):
                (self._target / path.relative_to(self.path).as_posix()).upload(path)
                self._seen[path] = stamp

    def close(self) -> None:
        """Write what has changed, and remove the temporary folder."""
        try:
            self.upload()
        finally:
            if self._temporary is not None:
                self._temporary.cleanup()

    def __exit__(self, *_: Any) -> None:
        self.close()


@functools.cache
def scratch_folder() -> Path:
    """Return an empty folder of this machine, in that of temporary files, until the process ends.

    A process that is killed leaves it there.
    """
    folder = tempfile.mkdtemp(prefix="refine-jax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def fetch_folder(folder: RemotePath, *, deep: bool = True) -> Path:
    """Copy a folder of a store to this machine; returns the copy, which has the folder's name.

    deep: with what is in folders in it.
    """
    copy = scratch_folder() / secrets.token_hex(8) / folder.name
    copy.mkdir(parents=True)
    for file, _ in folder.walk():
        if deep or file.parent == folder:
            path = copy / file.relative_to(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            file.download(path)
    return copy


@contextlib.contextmanager
def as_if_there(folder: Path | RemotePath) -> Iterator[Path]:
    """Give a folder on a disk: the folder itself, or a copy of what a store has directly in it.

    Errors of the user's input name the folder, not the copy.
    """
    if not isinstance(folder, RemotePath):
        yield folder
        return
    copy = fetch_folder(folder, deep=False)
    try:
        yield copy
    except UserError as error:
        raise type(error)(str(error).replace(str(copy), str(folder))) from None


def upload_folder(folder: Path, target: RemotePath, last: str) -> None:
    """Copy a folder of this machine to a bucket; `last` names the file that says it is complete."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in sorted(files, key=lambda file: file.name == last):
        (target / file.relative_to(folder).as_posix()).upload(file)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
