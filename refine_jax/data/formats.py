"""Which files a path names, and what kind each of them is.

The kinds are "parquet", "jsonl" (JSON lines, JSON arrays, single JSON objects) and "text" (one
document a file). Each may be compressed. A kind follows from the suffix; where that says nothing,
from the first bytes. Formats that are not read are refused by name.
"""

import collections
import fnmatch
import functools
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import logging

from refine_jax.base.errors import DataError
from refine_jax.base.files import MARK, counted, is_lfs_pointer, local_path, not_fetched
from refine_jax.base.hub import is_hub, pinned, without_tokens
from refine_jax.base.remote import RemotePath, is_remote, remote_path, sign_in
from refine_jax.data.unpack import read_head, stem_name

TFDS_INFO, TFDS_FEATURES = "dataset_info.json", "features.json"
KINDS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".md": "text",
}
KNOWN = f"{', '.join(KINDS)}, each also with .gz or .zst"
_TO_PARQUET = "Write it as parquet or JSON lines first"
_PANDAS = (
    'with pandas, for example: pandas.read_csv("IN.csv").to_json("OUT.jsonl", orient="records", '
    "lines=True)"
)
_ARROW = (
    "what datasets.save_to_disk wrote, a split at a time, by "
    'datasets.load_from_disk("FOLDER").to_parquet("OUT.parquet") or .to_json("OUT.jsonl")'
)
# Formats in which data sets come and that are not read here: {suffix: what to do}.
REFUSED = {
    **dict.fromkeys((".csv", ".tsv"), f"{_TO_PARQUET}, {_PANDAS}"),
    **dict.fromkeys((".arrow", ".feather"), f"{_TO_PARQUET}: {_ARROW}"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".npy", ".npz"), _TO_PARQUET),
    **dict.fromkeys((".avro", ".orc", ".tfrecord", ".tfrecords", ".array_record"), _TO_PARQUET),
    **dict.fromkeys((".xlsx", ".xls", ".sqlite", ".db", ".h5", ".hdf5"), _TO_PARQUET),
    **dict.fromkeys((".pdf", ".docx", ".epub"), "Write it as text first"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".bz2", ".xz", ".lz4", ".7z", ".rar"), "Unpack it"),
}
# The first bytes of formats that are not text: what a file is called that begins with them.
_MAGIC = {
    b"ARROW1": "an arrow file",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"SQLite format 3": "an SQLite data base",
    b"%PDF": "a PDF",
}
_UTF16 = "UTF-16 or of no text at all: convert it with `iconv -f UTF-16 -t UTF-8`"
_OBJECT = re.compile(r'\s*(?:\[\s*)?\{\s*"(?:[^"\\]|\\.)*"\s*:')
# What accompanies data in a folder and is none.
_COMPANIONS = ("readme*", "license*", "licence*", "notice*", "citation*", "dataset_info*.json")
_SAVED = ("dataset_dict.json", "state.json")  # of datasets.save_to_disk
_COMPANIONS += (*_SAVED, "config.json", "generation_config.json")
_COMPANIONS += ("tokenizer*.json", "special_tokens_map.json", "package.json", "package-lock.json")


def is_tfds_folder(path: str | os.PathLike) -> bool:
    """Say whether `path` is a folder that tensorflow-datasets has prepared."""
    # The library `datasets` writes a dataset_info.json as well, but no features.json.
    folder = os.path.expanduser(path)
    return all(os.path.isfile(os.path.join(folder, name)) for name in (TFDS_INFO, TFDS_FEATURES))


def kind_of(path: Path) -> str:
    """Tell the kind of a file: "parquet", "jsonl" or "text".

    Raises DataError: a format that is not read, or an unreadable file.
    """
    suffix = Path(stem_name(path)).suffix
    if suffix in REFUSED:
        raise DataError(f"{path}: {suffix} files are not read. {REFUSED[suffix]}.")
    if suffix in KINDS:
        return KINDS[suffix]
    head = read_head(path)
    if head.startswith(b"PAR1"):
        return "parquet"
    check_head(head, path)
    return "jsonl" if looks_like_records(head.decode("utf-8", "ignore")) else "text"


def check_head(head: bytes, path: Path) -> None:
    """Refuse a file by its first bytes, unpacked, where UTF-8 text is expected.

    Raises DataError: it is another format, a pointer of git-lfs, or in another encoding.
    """
    check_format(head, path)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or 0 in head[:4]:
        raise DataError(f"{path} is not UTF-8 text: its first bytes are those of {_UTF16}.")


def check_format(head: bytes, path: Path) -> None:
    """Refuse a file whose first bytes, unpacked, are those of a format that is not read.

    Raises DataError: it is one of them, or a pointer of git-lfs.
    """
    if is_lfs_pointer(head):
        raise DataError(not_fetched(str(path)))
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}.")


def looks_like_records(text: str) -> bool:
    """Say whether a text begins as JSON objects, or an array of them, do."""
    return _OBJECT.match(text.removeprefix(MARK)) is not None


def files_of(
    source: str, pattern: str = "", setting: str = "data.source", pattern_setting: str = ""
) -> tuple[list[Path], str]:
    """Return the files that a path names, sorted, and their kind; see `find_files`.

    What accompanies data is passed over where there is data: a README beside parquet files, and
    plain .json files beside others, which is said unless they are known to be none.

    Raises DataError: nothing is there, several kinds, or a format that is not read.
    """
    by_kind = _by_kind(find_files(source, pattern, setting, pattern_setting), pattern)
    if len(by_kind) > 1:
        choose = (
            f'with {pattern_setting}, e.g. {pattern_setting}="*.parquet"'
            if pattern_setting
            else f'by a glob pattern, e.g. {setting}="{source}/*.parquet"'
        )
        raise DataError(
            f"{source} mixes {' and '.join(sorted(by_kind))} files: choose one kind {choose}"
        )
    ((kind, chosen),) = by_kind.items()
    return chosen, kind


def record_files(source: str, setting: str) -> list[Path]:
    """Return the files of records, parquet or JSON, that a path names, sorted; no texts.

    Raises DataError: there are none, or a format that is not read.
    """
    by_kind = _by_kind(find_files(source, setting=setting))
    texts = by_kind.pop("text", [])
    if not by_kind:
        raise DataError(
            f"{setting}={source!r} must hold parquet or JSON files. Got: {texts[0]}, a text."
        )
    return sorted((path for files in by_kind.values() for path in files), key=Path.as_posix)


def _by_kind(files: Sequence[Path], pattern: str = "") -> dict[str, list[Path]]:
    kinds: dict[str, str] = {}  # of suffixes, by the first file that has it
    by_kind: dict[str, list[Path]] = {}
    for path in files:
        suffix = Path(stem_name(path)).suffix
        if suffix not in kinds:
            kinds[suffix] = kind_of(path)
        by_kind.setdefault(kinds[suffix], []).append(path)
    return by_kind if pattern or len(files) == 1 else _without_companions(by_kind)


def _without_companions(by_kind: dict[str, list[Path]]) -> dict[str, list[Path]]:
    files = [path for group in by_kind.values() for path in group]
    data = {path for path in files if not _is_companion(path)} or set(files)
    records = {p for p in data if KINDS.get(Path(stem_name(p)).suffix) in ("parquet", "jsonl")}
    plain = {path for path in records if path.name.lower().endswith(".json")}
    if plain and plain != records:
        names = ", ".join(path.name for path in sorted(plain)[:5])
        folder = os.path.commonpath([path.parent for path in data])
        _warn(f"{folder}: passed over {len(plain)} .json files beside others: {names}")
        data -= plain
    kept = {kind: [path for path in group if path in data] for kind, group in by_kind.items()}
    return {kind: group for kind, group in kept.items() if group}


def find_files(
    path: str, pattern: str = "", setting: str = "data.source", pattern_setting: str = ""
) -> list[Path]:
    """Return the files that `path` names, sorted; none is hidden.

    path: a file, a folder (searched recursively, also behind links) or a glob pattern; or a URL of
        one. A repository of the Hugging Face hub is taken as its newest commit has it.
    pattern: file name pattern for a folder; "" is every known suffix.
    setting: what the path was given as, for errors.
    pattern_setting: what the pattern is given as; "" where there is nothing to give it with.

    Raises DataError: nothing is there, it cannot be read, a link is broken, or what is there is no
    regular file.
    """
    if is_remote(path):
        there, is_folder = _list_store(path, setting)
        if not is_folder:
            return there
    else:
        root = local_path(path, setting, DataError)
        try:
            status = root.stat()
        except OSError as error:
            if any(sign in path for sign in "*?["):
                return _glob(root, path, setting)
            raise DataError(_unusable(root, error, f"{setting}={path!r}")) from None
        if not stat.S_ISDIR(status.st_mode):
            return [_regular(root)]
        there = sorted(_walk(root, setting), key=lambda file: file.as_posix())
    if not there:
        raise DataError(f"no file at all in {setting}={path!r}: the folder is empty.")
    chosen = [file for file in there if _is_chosen(file, pattern, pattern_setting)]
    others = set(there).difference(chosen)
    if not chosen or (not pattern and others and all(map(_is_companion, chosen))):
        raise DataError(_nothing_chosen(path, pattern, setting, pattern_setting, there))
    unread = [file.name for file in others if Path(stem_name(file)).suffix in REFUSED]
    if unread and not pattern:
        names = ", ".join(sorted(unread)[:5])
        _warn(f"{path}: left out {len(unread)} files that are not read: {names}")
    return [file if is_remote(file) else _regular(file) for file in chosen]


def _list_store(path: str, setting: str) -> tuple[list[RemotePath], bool]:
    """Find the files of a store that a URL names, sorted, and say whether it names a folder.

    Files on the hub are those of the commit that the branch is at now.
    Raises DataError: there is none, or the store cannot be read.
    """
    named = pinned(path, setting, DataError) if is_hub(path) else path.strip()
    root = remote_path(named, setting, DataError)
    fixed = next((i for i, part in enumerate(root.parts) if any(s in part for s in "*?[")), None)
    try:
        if fixed is not None:
            base, rest = RemotePath(*root.parts[:fixed]), "/".join(root.parts[fixed:])
            found = [file for file in base.glob(rest) if file.is_file()]
            if not found:
                raise DataError(f"no file matches {setting}={path!r}: the pattern matches nothing.")
            return found, False
        if root.is_file():
            return [root], False
        found = [file for file, _ in root.walk()]
        if not found:
            raise DataError(f"no such file or folder: {setting}={path!r}")
    except OSError as error:
        why = without_tokens(error.strerror or str(error))
        raise DataError(
            f"cannot read {setting}={path!r}: {why}. {sign_in(root.scheme)}".rstrip()
        ) from None
    hidden = [any(p.startswith(".") for p in file.relative_to(root).parts) for file in found]
    return [file for file, is_hidden in zip(found, hidden, strict=True) if not is_hidden], True


@functools.lru_cache(maxsize=256)
def _warn(message: str) -> None:
    """Say something once, however often the same files are looked for."""
    logging.warning("%s", message)


def _is_companion(path: Path) -> bool:
    return any(fnmatch.fnmatch(path.name.lower(), name) for name in _COMPANIONS)


def _is_chosen(file: Path, pattern: str, setting: str) -> bool:
    if not pattern:
        return Path(stem_name(file)).suffix in KINDS
    try:
        return file.match(pattern)
    except ValueError as error:
        raise DataError(f"{setting or 'files'}={pattern!r}: {error}.") from None


def _nothing_chosen(
    path: str, pattern: str, setting: str, pattern_setting: str, there: Sequence[Path]
) -> str:
    counts = collections.Counter(Path(stem_name(file)).suffix or "no suffix" for file in there)
    holds = ", ".join(f"{count} of {suffix}" for suffix, count in counts.most_common(6))
    wanted = pattern or f"of a known suffix ({KNOWN})"
    holds = f"It holds {counted(len(there), 'file')}: {holds}"
    message = f"no file {wanted} in {setting}={path!r}. {holds}"
    if pattern:
        return f"{message}. Set {pattern_setting or 'a pattern'} to what is there."
    if ".arrow" in counts and not {file.name for file in there}.isdisjoint(_SAVED):
        return (
            f"{setting}={path!r} was written by datasets.save_to_disk, and arrow files are not "
            f"read. {holds}. {REFUSED['.arrow']}."
        )
    for suffix, _ in counts.most_common():
        if suffix in REFUSED:
            return f"{message}. {suffix} files are not read. {REFUSED[suffix]}."
    if pattern_setting:
        return (
            f'{message}. Choose text files with {pattern_setting}, e.g. {pattern_setting}="*.py".'
        )
    return f"{message}. Name the files by a glob pattern."


def _walk(root: Path, setting: str) -> Iterator[Path]:
    """Yield every file below a folder that is not hidden; each real folder is entered once."""
    if os.path.isdir(root / "blobs") and os.path.isdir(root / "snapshots"):
        revisions = sorted((root / "snapshots").glob("*/"))
        if len(revisions) > 1:
            names = " or ".join(str(revision) for revision in revisions)
            raise DataError(f"{root} holds several revisions: set {setting} to {names}.")
    entered: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        raise DataError(_unusable(Path(error.filename), error)) from None

    for folder, below, names in os.walk(root, onerror=fail, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:  # a link to a folder above, or a second one
            below.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _glob(root: Path, path: str, setting: str) -> list[Path]:
    parts = root.relative_to(root.anchor).parts if root.anchor else root.parts
    fixed = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    base, rest = Path(root.anchor, *parts[:fixed]), Path(*parts[fixed:])
    try:
        matches = sorted(base.glob(str(rest)), key=lambda file: file.as_posix())
    except (ValueError, OSError, NotImplementedError) as error:
        raise DataError(f"{setting}={path!r} is no glob pattern that works: {error}.") from None
    if not any(part.startswith(".") for part in rest.parts):
        hidden = [any(p.startswith(".") for p in f.relative_to(base).parts) for f in matches]
        matches = [file for file, is_hidden in zip(matches, hidden, strict=True) if not is_hidden]
    files = [file for file in matches if not os.path.isdir(file)]
    if not files:
        what = "matches folders alone" if matches else "matches nothing"
        raise DataError(f"no file matches {setting}={path!r}: the pattern {what}.")
    return [_regular(file) for file in files]


def _regular(path: Path) -> Path:
    """Return the path of a regular file: a device or a pipe may never end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(_unusable(path, error)) from None
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is no regular file (a folder, a pipe or a device).")
    return path


def _unusable(path: Path, error: OSError, given: str = "") -> str:
    given = given or str(path)
    if os.path.islink(path):
        return (
            f"cannot read {given}: the link {path} leads to {os.readlink(path)}, "
            f"which cannot be used ({error.strerror})."
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"no such file or folder: {given}"
    return f"cannot read {given}: {error.strerror or error}."
