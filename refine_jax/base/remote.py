"""Paths of buckets and other stores that fsspec knows: `gs://bucket/x`, `s3://bucket/x`, `hf://x`.

`RemotePath` offers of pathlib what this package uses. Every scheme of fsspec can be read: `open`
for "r" and "rb", `read_bytes`, `read_text`, `exists`, `is_file`, `is_dir`, `iterdir`, `glob`,
`walk`, `stat`, `download`. Those in `WRITABLE` can be written to: `write_bytes`, `write_over`,
`upload`, `copy`, `unlink`, `rmtree`. What a store raises comes out as an OSError with a reason of
one line, as of a disk. Every look asks the store: nothing is remembered, since other processes
write, too.

An object appears when its last byte has arrived, or not at all. There are no folders, only names
with slashes: one is there as long as something is in it. Nothing can be appended to or renamed;
`base/files.py` and `base/lock.py` say what stands for that.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import io
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from refine_jax.base.errors import ConfigError, UserError
from refine_jax.base.hub import without_tokens

# Orbax reads and writes small files through etils, which prefers TensorFlow where that happens to
# be installed: then two clients, with two ways to sign in, would be at work.
os.environ.setdefault("EPATH_USE_TF", "false")

WRITABLE = ("gs",)
"""Schemes that can be written to: those that arrays can be stored in, too."""
_EXTRAS = {
    "gs": "pip install 'refine-jax[gcs]'",
    "hf": "pip install 'refine-jax[hub]'",
}
_SIGN_IN = {
    "gs": "Sign in with `gcloud auth application-default login`, or name a key's file in "
    "GOOGLE_APPLICATION_CREDENTIALS, and see that the account may use the bucket.",
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
    "hf": "Sign in with `hf auth login`, or set HF_TOKEN.",
}
# Drives of Windows are one letter. pathlib makes gs:/x of gs://x, so one slash is enough.
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):/|\s*[A-Za-z]://")
_OF_DISKS = ("file", "local")
# How stores call what changes with an object's content.
_VERSIONS = ("blob_id", "md5Hash", "etag", "ETag", "generation", "VersionId", "content_md5")


def is_remote(path: str | os.PathLike) -> bool:
    """Tell whether a path is a URL, of whatever scheme."""
    return isinstance(path, RemotePath) or bool(_SCHEME.match(os.fspath(path)))


def remote_path(
    path: str | os.PathLike,
    setting: str,
    error: type[UserError] = ConfigError,
    *,
    write: bool = False,
) -> RemotePath:
    """Make a path of a URL that the user gave; what it names is not looked at.

    setting: what the path was given as, for the error. write: it will be written to, or
    arrays are read from it.
    Raises `error`: the scheme is none of fsspec's, cannot be written to, or its package is missing.
    """
    from fsspec.registry import known_implementations  # most runs read disks alone

    text = os.fspath(path)
    scheme = scheme_of(text)
    if not re.fullmatch(r"[A-Za-z0-9+.-]+://[^/\s\0][^\0]*", text):
        raise error(
            f"{setting} must be a path, or a URL such as gs://bucket/folder. Got: {text!r}."
        )
    known = known_implementations.get(scheme)
    if scheme in _OF_DISKS or known is None:
        raise error(
            f"{setting} must be a path of a file system or of a bucket (gs://, or one of fsspec's "
            f"to read from). Got: {text!r}."
        )
    if write and scheme not in WRITABLE:
        raise error(
            f"{setting} must be a path of a file system or gs://: {scheme}:// gives data alone. "
            f"Got: {text!r}."
        )
    package = known["class"].partition(".")[0]  # to import it takes a second
    if importlib.util.find_spec(package) is None:
        raise error(
            f"{setting}={text}: {scheme}:// needs the package {package}, which is not installed: "
            f"{_EXTRAS.get(scheme, f'pip install {package}')}."
        )
    return RemotePath(text)


def scheme_of(path: str | os.PathLike) -> str:
    """Name the scheme of a URL: "gs" of gs://bucket/x; "" of a path of a disk."""
    found = _SCHEME.match(os.fspath(path))
    return (found[1] or "").lower() if found else ""


def sign_in(scheme: str) -> str:
    """Say how to sign in to a store; "" where this package does not know."""
    return _SIGN_IN.get(scheme, "")


@functools.cache
def _file_system(scheme: str) -> Any:
    # A listing that is kept would hide what other processes have written since.
    import fsspec

    options = fsspec.config.conf.setdefault({"gs": "gcs"}.get(scheme, scheme), {})
    options.setdefault("use_listings_cache", False)
    if scheme == "gs":
        # Its errors are raised; it would also print them, each with a traceback.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return fsspec.filesystem(scheme)


class _Status(NamedTuple):
    """What `RemotePath.stat` says: bytes, and the time of the last change in seconds.

    generation: a number that every write of an object changes; None where a store has none.
    version: what the store says that changes with the content, such as a hash; "" if nothing.
    """

    st_size: int
    st_mtime: float
    generation: int | None = None
    version: str = ""

    @property
    def st_ctime(self) -> float:
        return self.st_mtime


class RemotePath(PurePosixPath):
    """A path in a bucket or another store, as pathlib spells paths; see the module."""

    __slots__ = ()

    def __str__(self) -> str:
        text = super().__str__()
        scheme, colon, rest = text.partition(":/")
        return f"{scheme}://{rest}" if colon and "/" not in scheme else text  # some are relative

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __reduce__(self) -> tuple:
        return RemotePath, (str(self),)

    @property
    def scheme(self) -> str:
        """The scheme, such as gs."""
        return self.parts[0].removesuffix(":").lower()

    @property
    def _store(self) -> Any:
        return _file_system(self.scheme)

    def _failing(self) -> contextlib.AbstractContextManager[None]:
        return _failing_as_a_disk(str(self))

    # What has no meaning in a store, and what pathlib answers there.

    def absolute(self) -> RemotePath:
        """Return the path itself, which is whole."""
        return self

    expanduser = resolve = absolute

    def is_symlink(self) -> bool:
        """No object is a link."""
        return False

    is_mount = is_symlink

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder is there once something is in it."""

    def rmdir(self) -> None:
        """Do nothing: a folder is gone with the last object in it."""

    # Reading.

    def exists(self) -> bool:
        """Tell whether there is such an object or folder."""
        with self._failing():
            return self._store.exists(str(self))

    def is_file(self) -> bool:
        """Tell whether there is such an object."""
        with self._failing():
            return self._store.isfile(str(self))

    def is_dir(self) -> bool:
        """Tell whether there are objects below this name."""
        with self._failing():
            return self._store.isdir(str(self))

    def iterdir(self) -> Iterator[RemotePath]:
        """Find what is in a folder, ascending; FileNotFoundError if there is no such folder."""
        with self._failing():
            found = self._store.ls(str(self), detail=False)
        names = {PurePosixPath(name).name for name in found}
        if names == {self.name} and not self.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self))
        # Consoles mark empty folders by an object of the folder's own name.
        yield from (self / name for name in sorted(names) if name and not self._is_mark(name))

    def _is_mark(self, name: str) -> bool:
        return name == self.name and not (self / name).exists()

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Find what a pattern names below this folder, ascending."""
        with self._failing():
            found = self._store.glob(f"{self}/{pattern}")
        for name in sorted(found):
            yield RemotePath(self._store.unstrip_protocol(name))

    def walk(self) -> Iterator[tuple[RemotePath, int]]:
        """Find all objects below this folder, at any depth, with their bytes; ascending."""
        with self._failing():
            found = self._store.find(str(self), detail=True)
        for name, status in sorted(found.items()):
            if not name.endswith("/"):
                yield RemotePath(self._store.unstrip_protocol(name)), status["size"] or 0

    def stat(self) -> _Status:
        """Look up the size and the time of an object."""
        with self._failing():
            status = self._store.info(str(self))
        time = status.get("mtime") or status.get("LastModified") or status.get("updated")
        generation = status.get("generation")
        return _Status(
            status.get("size") or 0,
            time.timestamp() if hasattr(time, "timestamp") else 0.0,
            None if generation is None else int(generation),
            next((str(v) for name in _VERSIONS if (v := status.get(name))), ""),
        )

    def open(
        self, mode: str = "r", encoding: str = "utf-8", *, buffering: int = 1 << 20, **cache: Any
    ) -> IO:
        """Open an object for reading, with modes "r" and "rb".

        buffering: bytes that are fetched together; 0: what is read is what is fetched. cache: how
        fsspec keeps what it fetches, such as `cache_type`.
        """
        if mode not in ("r", "rt", "rb"):
            raise OSError(errno.EROFS, f"objects are written whole, not opened {mode!r}", str(self))
        with self._failing():
            reader = _Reader(self._store.open(str(self), "rb", **cache), str(self))
        if mode == "rb" and not buffering:
            return reader
        stream = io.BufferedReader(reader, buffering or 1 << 20)
        return stream if mode == "rb" else io.TextIOWrapper(stream, encoding)

    def read_bytes(self) -> bytes:
        """Read a whole object."""
        with self._failing():
            return self._store.cat_file(str(self))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Read a whole object as text."""
        return self.read_bytes().decode(encoding)

    # Writing. Each of these makes whole objects or none.

    def write_bytes(self, content: bytes) -> None:
        """Write an object."""
        with self._failing():
            self._store.pipe_file(str(self), content)

    def write_over(self, content: bytes, generation: int) -> int:
        """Write an object over the one of a generation, in one step; 0: where there is none.

        Returns the new generation. Raises FileExistsError where there is another, as after a
        request that was repeated because its answer was lost. Google's stores alone.
        """
        bucket, _, name = str(self).partition("://")[2].partition("/")
        mark = secrets.token_hex(16)
        parts = [(b"application/json", json.dumps({"name": name}).encode())]
        parts.append((b"application/octet-stream", content))
        line = b"--" + mark.encode()
        body = b"".join(
            line + b"\r\nContent-Type: " + kind + b"\r\n\r\n" + part + b"\r\n"
            for kind, part in parts
        )
        with self._failing():
            answer = self._store.call(
                "POST",
                f"{self._store._location}/upload/storage/v1/b/{{}}/o",
                bucket,
                uploadType="multipart",
                ifGenerationMatch=str(generation),
                headers={"Content-Type": f"multipart/related; boundary={mark}"},
                data=body + line + b"--",
                json_out=True,
            )
            return int(answer["generation"])

    def upload(self, file: Path) -> None:
        """Write an object with the content of a file of this machine."""
        with self._failing():
            self._store.put_file(str(file), str(self))

    def download(self, file: Path) -> None:
        """Write the content of the object to a file of this machine."""
        with self._failing():
            self._store.get_file(str(self), str(file))

    def copy(self, target: RemotePath) -> None:
        """Copy an object within its store, which moves no bytes here."""
        with self._failing():
            self._store.cp_file(str(self), str(target))

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete an object."""
        try:
            with self._failing():
                self._store.rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self) -> None:
        """Delete all objects below this name."""
        with contextlib.suppress(FileNotFoundError), self._failing():
            self._store.rm(str(self), recursive=True)


@contextlib.contextmanager
def _failing_as_a_disk(path: str) -> Iterator[None]:
    """Raise what a store's client raises as an OSError with a reason of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as problem:
        for kind, number in _NUMBERS.items():
            if isinstance(problem, kind):
                raise OSError(number, os.strerror(number), path) from None
        raise OSError(errno.EIO, _reason(problem), path) from problem


_NUMBERS = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    NotADirectoryError: errno.ENOTDIR,
    IsADirectoryError: errno.EISDIR,
}


class _Reader(io.RawIOBase):
    """The bytes of an object, as a stream that fails as one of a disk."""

    def __init__(self, file: Any, path: str):
        self._file, self._path = file, path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def readinto(self, buffer: Any) -> int:
        with _failing_as_a_disk(self._path):
            return self._file.readinto(buffer)

    def readall(self) -> bytes:
        with _failing_as_a_disk(self._path):
            return self._file.read()  # in pieces of a few kB each would be a request

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def _reason(problem: Exception) -> str:
    text = " ".join(str(problem).split()) or type(problem).__name__
    return without_tokens(text)[:300].rstrip(".")
