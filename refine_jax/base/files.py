"""Files: paths as users name them, text and JSON read strictly, writing in full or not at all.

What is written here may be in a bucket (`remote.py`) as well as on a disk. A file of a disk is
written beside its place and renamed; an object of a bucket appears whole.
"""

import argparse
import codecs
import contextlib
import errno
import json
import os
import reprlib
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from refine_jax.base.errors import ConfigError, UserError, reason
from refine_jax.base.remote import RemotePath, is_remote, remote_path, sign_in

_T = TypeVar("_T")

_LONGEST = 3500
"""Bytes of a folder's path that leave room, of the 4096 of Linux, for the files in it."""
MARK = "\ufeff"
"""The byte order mark, which some editors put before a text; it is never part of one."""
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def path_of(path: str | os.PathLike) -> Path | RemotePath:
    """Make the path of a file or folder, on a disk or in a bucket."""
    return RemotePath(os.fspath(path)) if is_remote(path) else Path(path)


def given_path(
    path: str | os.PathLike,
    setting: str,
    error: type[UserError] = ConfigError,
    *,
    write: bool = False,
) -> Path | RemotePath:
    """Make a path of what the user gave: on a disk, with `~` expanded, or a URL.

    setting: what the path was given as, for the error. write: it will be written to.
    Raises `error`: it cannot be one, or a package that reads such URLs is missing.
    """
    if is_remote(path):
        return remote_path(path, setting, error, write=write)
    return local_path(path, setting, error)


def is_there(path: Path | RemotePath) -> bool:
    """Tell whether something has this name, be it a link to nothing."""
    return path.exists() or path.is_symlink()


def local_path(path: str | os.PathLike, setting: str, error: type[UserError] = ConfigError) -> Path:
    """Make a path of what the user gave, with `~` expanded.

    setting: what the path was given as, for the error.
    Raises `error` for a URL: this is what is only looked for on disks; see `given_path`.
    """
    text = os.fspath(path)
    if not text:
        raise error(f"{setting} must not be empty. Got: ''.")
    if is_remote(text):
        raise error(
            f"{setting} must be a path of a file system: buckets and other URLs are not supported "
            f"here. Got: {text!r}. Copy it to this machine, or mount it and name the folder."
        )
    if "\0" in text:
        raise error(f"{setting} must be a path. Got: {text!r}, with a null character.")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = text.partition("/")[0]
        raise error(
            f"{setting}={text!r}: there is no home folder {user} on this machine. A folder of that "
            f"name is ./{text}."
        ) from None


def path_flag(text: str) -> Path:
    """Parse a flag of argparse that is a path: expand `~`, refuse URLs."""
    return local_path(text, "it", argparse.ArgumentTypeError)


def check_no_backslash(path: Path, setting: str, error: type[UserError] = ConfigError) -> None:
    """Raise `error` for a path to write arrays to that holds a backslash.

    The library that stores them reads it as a slash, and would write them elsewhere.
    """
    if "\\" in str(path):
        raise error(f"{setting}={str(path)!r} must not hold a backslash. Choose another name.")


def check_writable(folder: Path, setting: str, error: type[UserError] = ConfigError) -> None:
    """Raise `error` unless files can be made in a folder, which need not be there.

    It is tried out, since rights alone do not say it, and what that made is removed.
    """
    made: list[Path] = []
    check_no_backslash(folder, setting, error)
    if isinstance(folder, RemotePath):
        _check_bucket(folder, setting, error)
        return
    try:
        if len(os.fsencode(folder.absolute())) > _LONGEST:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if folder.is_symlink() and not folder.exists():
            raise error(f"{setting}={str(folder)!r} is a link to a folder that is not there.")
        if folder.exists() and not folder.is_dir():
            raise error(f"{setting}={str(folder)!r} must be a folder. It is a file.")
        made = missing_folders(folder)
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".{secrets.token_hex(8)}.new"
        os.close(os.open(trial, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        trial.unlink()
    except OSError as problem:
        text = short(str(folder), 200)
        raise error(f"{setting}={text}: nothing can be written there: {reason(problem)}.") from None
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # another process is using it already
                path.rmdir()


def _check_bucket(folder: RemotePath, setting: str, error: type[UserError]) -> None:
    trial = folder / f".{secrets.token_hex(8)}.new"
    try:
        if folder.is_file():
            raise error(f"{setting}={str(folder)!r} must be a folder. It is a file.")
        trial.write_bytes(b"")
        trial.unlink(missing_ok=True)
    except OSError as problem:
        missing = isinstance(problem, FileNotFoundError)
        why = f"there is no bucket {folder.parts[1]}" if missing else reason(problem)
        raise error(
            f"{setting}={short(str(folder), 200)}: nothing can be written there: {why}. "
            f"{sign_in(folder.scheme)}"
        ) from None


def missing_folders(folder: Path) -> list[Path]:
    """Find which of a folder and those it is in are not there, the innermost first.

    In a bucket none is missing: nobody makes folders there.
    """
    if isinstance(folder, RemotePath):
        return []
    return [path for path in (folder, *folder.parents) if not path.exists()]


def check_output(path: Path, setting: str, error: type[UserError] = ConfigError) -> None:
    """Raise `error` unless a file can be written in full or not at all (`replacing`)."""
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise error(f"{setting}={str(path)!r} must name a file. It is {kind}.")
        if isinstance(path, Path) and not path.parent.is_dir():
            raise error(
                f"There is no folder {str(path.parent)!r}: {setting}={str(path)!r} is in one that "
                "does not exist."
            )
        with contextlib.suppress(FileNotFoundError):
            path.stat()  # says so where the name is too long
    except OSError as problem:
        raise error(f"{setting}={short(str(path), 200)}: {reason(problem)}.") from None
    check_writable(path.parent, setting, error)


def valid_unicode(text: str) -> str:
    """Replace lone surrogates, which JSON and shells can hold and UTF-8 cannot, by "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def clean_text(text: str) -> str:
    """Make a text fit to enter: valid Unicode, without a byte order mark at its start."""
    return valid_unicode(text).removeprefix(MARK)


def read_text(path: str | os.PathLike, error: type[UserError]) -> str:
    """Read a UTF-8 file as it is, but for a byte order mark at its start.

    Raises `error` if the file cannot be read or is not UTF-8.
    """
    try:
        content = path_of(path).read_bytes()
    except OSError as problem:
        raise error(f"cannot read {path}: {reason(problem)}.") from None
    return decode_text(content, path, error)


def decode_text(content: bytes, where: Any, error: type[UserError]) -> str:
    """Decode UTF-8 bytes, without a byte order mark; raise `error` if they are no UTF-8."""
    try:
        return content.decode("utf-8").removeprefix(MARK)
    except UnicodeDecodeError as problem:
        marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        hint = " It begins with the mark of UTF-16: save it as UTF-8." if marked else ""
        raise error(f"{where} is not UTF-8 text: {problem}.{hint}") from None


def parse_json(
    text: str | bytes, where: Any, error: type[UserError], *, strict: bool = True
) -> Any:
    """Parse a JSON text.

    where: names the text in the error. strict: refuse NaN and Infinity, which JSON does not have.
    Raises `error` for anything that is no JSON, also where Python gives up (nesting, huge numbers).
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON value")

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        text = text.removeprefix(MARK)
        return json.loads(text, parse_constant=refuse if strict else None)
    except RecursionError:
        raise error(f"{where} is not valid JSON: it is nested too deeply.") from None
    except ValueError as problem:
        raise error(f"{where} is not valid JSON: {problem}.") from None


def read_json(path: str | os.PathLike, error: type[UserError]) -> dict[str, Any]:
    """Read the fields of a file that holds one JSON object; raise `error` if the file does not."""
    return parse_object(read_text(path, error), path, error)


def parse_object(text: str | bytes, where: Any, error: type[UserError]) -> dict[str, Any]:
    """Parse the fields of a JSON object; raise `error`, naming `where`, if it is none."""
    fields = parse_json(text, where, error)
    if not isinstance(fields, dict):
        raise error(f"{where} must hold a JSON object. Got: {kind_of(fields)}.")
    return fields


def json_field(
    fields: Mapping[str, Any],
    name: str,
    kind: type | tuple[type, ...],
    *,
    where: Any,
    error: type[UserError],
    default: Any = None,
) -> Any:
    """Read a field of a JSON object that others wrote; null and absent give the default.

    kind: what it must be, of int, float, str, bool, list, dict. An int is a float, a bool is none.
    Raises `error`, which names the file and the field, for a value of another type.
    """
    value = fields.get(name)
    if value is None:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if not fits or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(_KINDS[kind] for kind in kinds)
        raise error(f"{where}: {name} must be {wanted}. Got: {short(value)}.")
    return value


_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


class BadLine(NamedTuple):
    """A line that is no record: its number from 1, where its bytes are, and what is wrong."""

    number: int
    start: int
    size: int
    reason: str


def read_lines(
    path: str | os.PathLike, parse: Callable[[bytes], _T], *, longest: int = 1 << 26
) -> tuple[list[_T], list[BadLine]]:
    """Read the records of a file with one a line, in order, and the lines that are no records.

    parse: makes a record of a line, and raises a UserError for what is none. Empty lines are
        passed over. longest: bytes of a line that are read; a longer one is no record.
    """
    records: list[_T] = []
    bad: list[BadLine] = []
    number = start = 0
    with path_of(path).open("rb") as file:
        while line := file.readline(longest):
            number, size, whole = number + 1, len(line), True
            while len(line) == longest and not line.endswith(b"\n"):
                whole = False
                line = file.readline(longest)
                size += len(line)
            try:
                if not whole:
                    raise UserError(f"it is longer than {longest:,} bytes")
                if line.strip():
                    records.append(parse(line))
            except UserError as error:
                bad.append(BadLine(number, start, size, str(error).rstrip(".")))
            start += size
    return records, bad


def recover_lines(
    path: str | os.PathLike, parse: Callable[[bytes], _T], say: Callable[[str], None]
) -> list[_T]:
    """Read the records of a file that this package appends to; none if there is no file.

    Lines that are none (`read_lines`) are appended to PATH.dropped and said: whoever calls this is
    about to write the file anew without them.
    """
    path = path_of(path)
    if not path.exists():
        return []
    records, bad = read_lines(path, parse)
    if bad:
        aside = path.with_name(path.name + ".dropped")
        with path.open("rb") as source:
            for line in bad:
                source.seek(line.start)
                left = line.size
                while left and (part := source.read(min(left, 1 << 20))):
                    append(aside, part)
                    left -= len(part)
                if not part.endswith(b"\n"):
                    append(aside, b"\n")
        said = [f"line {line.number} ({short(line.reason, 120)[1:-1]})" for line in bad[:3]]
        if len(bad) > 3:
            said.append(numbered("line", [line.number for line in bad[3:]]))
        what = "no record. It is" if len(bad) == 1 else "no records. They are"
        say(f"{path}: left out {', '.join(said)}, {what} kept in {aside.name}.")
    return records


def counted(count: int, noun: str) -> str:
    """Say how many there are of a noun: "1 row", "2,000 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def numbered(noun: str, numbers: Sequence[int]) -> str:
    """Name a noun with ascending numbers: "step 3", "steps 3, 5 to 9" (`spans`)."""
    return f"{noun}{'' if len(numbers) == 1 else 's'} {spans(numbers)}"


def spans(numbers: Sequence[int], most: int = 8) -> str:
    """Say ascending numbers in words: "3, 5 to 9"; no more than `most` spans of them."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(a) if a == b else f"{a} to {b}" for a, b in runs[:most]]
    return ", ".join(texts) + (f" and others up to {numbers[-1]}" if len(runs) > most else "")


def names_of(fields: Iterable[str]) -> str:
    """List the names of the fields of an object, for a message."""
    return f"{', '.join(fields):.200}" or "an object without fields"


def kind_of(value: Any) -> str:
    """Say in words what a JSON value is."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def short(value: Any, limit: int = 80) -> str:
    """Write a value for a message, cut where it is long or nested deeply."""
    brief = reprlib.Repr()  # a plain repr is as large as the value, and fails on deep nesting
    brief.maxstring = brief.maxlong = brief.maxother = limit
    try:
        text = brief.repr(value)
    except ValueError:  # a number of more digits than Python writes
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


_POINTERS = (
    b"version https://git-lfs.github.com/spec/",
    b"version https://hawser.github.com/spec/",
)


def is_lfs_pointer(file: bytes | str | os.PathLike) -> bool:
    """Tell whether a file is a pointer of git-lfs in place of the content, which was not fetched.

    file: its path, or its first bytes.
    """
    if not isinstance(file, bytes):
        with path_of(file).open("rb") as stream:
            file = stream.read(len(_POINTERS[0]))
    return file.startswith(_POINTERS)


def not_fetched(files: str, *, several: bool = False) -> str:
    """Say what to do about a pointer of git-lfs that `files` names, or about several."""
    what = (
        ": pointers of git-lfs, not the files themselves"
        if several
        else " is a pointer of git-lfs, not the file itself"
    )
    return f"{files}{what}: run git lfs pull where it was cloned, or copy what is missing."


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Open a new file beside `path` that takes its name when the block ends without an error.

    So a file is there in full or not at all, and a reader never sees a part. The name of the new
    file cannot be guessed, and it is never a link that somebody else put there. What goes to a
    bucket is made in a temporary folder of this machine.
    """
    path = path_of(path)
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / path.name
            part.touch()
            yield part
            path.upload(part)
        return
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _NO_LINK, 0o666))
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())  # or a crash of the machine may leave an empty file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file in full or not at all."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write text as UTF-8, its line ends as they are, in full or not at all."""
    write_bytes(path, text.encode("utf-8"))


def append(path: Path | RemotePath, content: bytes) -> None:
    """Add to the end of a file, which is made if it is not there; never to what a link names."""
    if isinstance(path, RemotePath):
        before = path.read_bytes() if path.exists() else b""
        path.write_bytes(before + content)
        return
    flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY | _NO_LINK
    with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
        file.write(content)


def copy_file(source: str | os.PathLike, target: Path) -> None:
    """Copy a file, of a disk or a bucket, to one of this machine."""
    source = path_of(source)
    if isinstance(source, RemotePath):
        source.download(target)
    else:
        shutil.copyfile(source, target)
