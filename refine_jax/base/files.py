"""Files: paths as users name them, text and JSON read strictly, writing in full or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from refine_jax.base.errors import ConfigError, UserError

_T = TypeVar("_T")

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
MARK = "\ufeff"
"""The byte order mark, which some editors put before a text; it is never part of one."""


def local_path(path: str | os.PathLike, setting: str, error: type[UserError] = ConfigError) -> Path:
    """A path as the user gave it, with `~` expanded.

    setting: what the path was given as, for the error.
    Raises `error` for a URL: buckets and hubs are not read or written by this version.
    """
    text = os.fspath(path)
    if _SCHEME.match(text):
        raise error(
            f"{setting} must be a path of a file system: buckets and other URLs are not supported. "
            f"Got: {text!r}. Copy it to this machine, or mount it and name the folder."
        )
    if "\0" in text:
        raise error(f"{setting} must be a path. Got: {text!r}, with a null character.")
    try:
        return Path(text).expanduser()
    except RuntimeError as reason:  # "~name" of a user that is not there
        raise error(f"{setting}={text!r}: {reason}") from None


def valid_unicode(text: str) -> str:
    """The text with lone surrogates, which JSON and shells can hold and UTF-8 cannot, as "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def clean_text(text: str) -> str:
    """Text as it may enter: valid Unicode, without a byte order mark at its start."""
    return valid_unicode(text).removeprefix(MARK)


def read_text(path: str | os.PathLike, error: type[UserError]) -> str:
    """The text of a UTF-8 file, line ends as they are, without a byte order mark.

    Raises `error` if the file cannot be read or is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8").removeprefix(MARK)
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror or reason}.") from None
    except UnicodeDecodeError as reason:
        raise error(f"{path} is not UTF-8 text: {reason}.") from None


def parse_json(
    text: str | bytes, where: Any, error: type[UserError], *, strict: bool = True
) -> Any:
    """The value of a JSON text.

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
    except ValueError as reason:
        raise error(f"{where} is not valid JSON: {reason}.") from None


def read_json(path: str | os.PathLike, error: type[UserError]) -> dict[str, Any]:
    """The fields of a file that holds one JSON object; raises `error` if it does not."""
    return parse_object(read_text(path, error), path, error)


def parse_object(text: str | bytes, where: Any, error: type[UserError]) -> dict[str, Any]:
    """The fields of a JSON object; raises `error`, which names `where`, if the text is none."""
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
    """A field of a JSON object that others wrote; null and absent are the default.

    kind: what it must be, of int, float, str, bool, list, dict. An int is a float, a bool is none.
    Raises `error`, which names the file and the field, for a value of another type.
    """
    value = fields.get(name)
    if value is None:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if not fits or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(_KINDS[each] for each in kinds)
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
    """The records of a file with one a line, in order, and the lines that are none.

    parse: makes a record of a line, and raises a UserError for what is none. Empty lines are
        passed over. longest: bytes of a line that are read; a longer one is no record.
    """
    records: list[_T] = []
    bad: list[BadLine] = []
    number = start = 0
    with Path(path).open("rb") as file:
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
    """The records of a file that this package appends to; none if there is no file.

    Lines that are none (`read_lines`) are appended to PATH.dropped and said: whoever calls this is
    about to write the file anew without them.
    """
    path = Path(path)
    if not path.exists():
        return []
    records, bad = read_lines(path, parse)
    if bad:
        aside = path.with_name(path.name + ".dropped")
        flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
        with path.open("rb") as source, os.fdopen(os.open(aside, flags, 0o666), "wb") as copy:
            for line in bad:
                source.seek(line.start)
                left = line.size
                while left and (part := source.read(min(left, 1 << 20))):
                    copy.write(part)
                    left -= len(part)
                if not part.endswith(b"\n"):
                    copy.write(b"\n")
        said = [f"line {line.number} ({short(line.reason, 120)[1:-1]})" for line in bad[:3]]
        if len(bad) > 3:
            said.append(f"lines {spans([line.number for line in bad[3:]])}")
        say(f"{path}: left out {', '.join(said)}, no records. They are kept in {aside.name}.")
    return records


def spans(numbers: Sequence[int], most: int = 8) -> str:
    """Ascending numbers in words: "3, 5 to 9"; no more than `most` spans of them."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    texts = [str(a) if a == b else f"{a} to {b}" for a, b in found[:most]]
    return ", ".join(texts) + (f" and others up to {numbers[-1]}" if len(found) > most else "")


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def short(value: Any, limit: int = 80) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A new file beside `path` that takes its name when the block ends without an error.

    So a file is there in full or not at all, and a reader never sees a part. The name of the new
    file cannot be guessed, and it is never a link that somebody else put there.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    os.close(
        os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o666)
    )
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
