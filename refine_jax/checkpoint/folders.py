"""A model as a folder holds it; folders that are there in full or not at all."""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

from refine_jax.base.errors import CheckpointError, UserError, describe
from refine_jax.base.files import (
    check_no_backslash,
    copy_file,
    given_path,
    is_there,
    missing_folders,
    path_of,
    read_json,
    replacing,
    short,
    valid_unicode,
)
from refine_jax.base.growing import scratch_folder, upload_folder
from refine_jax.base.remote import RemotePath

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
RUN = "run.json"
PARAMS = "params"
ADAPTER, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"  # of peft
_MARKS = (CONFIG, ADAPTER)  # without which a folder is no model and no adapter
FROZEN = "frozen"  # of a run: the parameters that it does not train

# These files keep what a published folder holds beside the weights, to write it back
# (published.py).
PUBLISHED, PUBLISHED_TENSORS = "published.json", "published.safetensors"

# Files beside the weights of a Hugging Face folder that are carried through unread: tokenizers,
# generation defaults, and the model code that config.json may point to.
_CODE = "*.py"
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    PUBLISHED,
    PUBLISHED_TENSORS,
    _CODE,
)
TOKENIZERS = ("tokenizer.model", "tokenizer.json")
_WEIGHTS = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
)


# These files are in the work folder of a run from its first step on, or in its checkpoints.
_OF_RUN = (RUN, f"checkpoints/{RUN}", f"checkpoints/{CONFIG}", "metrics.jsonl")


class ModelCheckpoint(NamedTuple):
    """A model from a checkpoint, or the description of one that has none yet.

    config: The fields of config.json. config_json: Its text. params: Nested dict of arrays, layers
    stacked; None: of a run, random or restored with the rest of it. tokenizer: The folder of the
    tokenizer files; None if there are none. files: What travels with the weights, {name: path}, or
    a function that writes the file at a path.

    lora: The low-rank updates (`models.lora.LoRA`) that are among params, or will be trained.
    updates: Their nested dict, where they are to be put to the params.

    Of a training run alone: step; base, the checkpoint that it started from, as it names it. Of a
    Hugging Face folder alone: slots, where each tensor went
    (`names.Slot`); tensors, how many the parameters were made of; left_out, what else the folder
    holds, a line each.
    """

    config: Mapping[str, Any]
    config_json: str
    params: dict | None = None
    tokenizer: Path | None = None
    files: Mapping[str, Any] = MappingProxyType({})
    step: int | None = None
    slots: Mapping[str, Any] = MappingProxyType({})
    tensors: int = 0
    left_out: tuple[str, ...] = ()
    lora: Any = None
    updates: dict | None = None
    base: str = ""


def companions(folder) -> dict:
    """Find the files of `folder` (a path) that travel with its weights: {name: path}.

    Raises CheckpointError for a link that leaves the folder.
    """
    folder = path_of(folder)
    names = {path.name for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return {name: contained(folder, name) for name in sorted(names)}


def has_tokenizer(folder) -> bool:
    """Tell whether `folder` (a path) holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def contained(folder: Path, name: str) -> Path:
    """Make the path of the file `name` in `folder`, which may be a link to another file in it.

    huggingface_hub's cache keeps what a model's folder links to in a folder above, its blobs: they
    are taken for files in it. Whether the file is there is not looked at.

    Raises CheckpointError for a name or a link that leaves the folder: following it would copy, and
    so publish, whatever it points to.
    """
    parts = PurePosixPath(name).parts
    plain = "\0" not in name and valid_unicode(name) == name
    if not (plain and parts) or parts[0] == "/" or ".." in parts:
        raise CheckpointError(f"{folder}: {short(name)} is no name of a file in this folder.")
    if isinstance(folder, RemotePath):
        return folder / name
    path, roots = folder / name, [Path(os.path.realpath(folder))]
    repository = roots[0].parent.parent
    if roots[0].parent.name == "snapshots" and (repository / "blobs").is_dir():
        roots.append(repository)
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{path} is a link that leaves its folder, to {real}: it is not followed. Put the file "
            "itself into the folder."
        )
    return path


def copy_files(files: Mapping, folder) -> None:
    """Copy files {name: path} into `folder`, bytes unchanged; links there are replaced.

    In the place of a path may be a function that writes the file at a path.
    """
    for name, source in files.items():
        with replacing(folder / name) as part:
            if callable(source):
                source(part)
            else:
                copy_file(source, part)


@contextlib.contextmanager
def new_folder(
    path: str | os.PathLike, *, overwrite: bool = False, size: int = 0, staged: bool = False
) -> Iterator[Path]:
    """Make a temporary folder that is named `path` when the block ends without an error.

    Parent folders are made, and removed with the temporary one if there is an error. In a bucket
    the objects are copied there, within the bucket, config.json as the last: without it a folder is
    no model, so that a process that is killed leaves the model that was there or none.
    overwrite: replace a model that is there already; see `check_free`. size: bytes that will be
    written, if known. staged: for a bucket, the temporary folder is one of this machine.
    Raises CheckpointError if `path` exists and must not be replaced, or cannot be written.
    """
    path = _target(path)
    check_free(path, overwrite=overwrite)
    mark = secrets.token_hex(8)  # so that nobody can put a link there beforehand
    temporary = path.with_name(f".{path.name}.new-{mark}")
    made = missing_folders(path.parent)
    if staged and isinstance(path, RemotePath):
        temporary = scratch_folder() / f"{path.name}.new-{mark}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        if isinstance(temporary, Path) and size > (free := shutil.disk_usage(temporary).free):
            raise CheckpointError(
                f"{path} takes {size / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free there."
            )
        yield temporary
        if isinstance(path, RemotePath):
            if staged:
                temporary = _upload(temporary, path.with_name(f".{path.name}.new-{mark}"))
        elif overwrite and path.exists():
            _exchange(temporary, path, path.with_name(f".{path.name}.old-{mark}"))
        else:
            temporary.rename(path)
    except BaseException as error:
        _clear(temporary, made)
        # Orbax raises all of these, for example on a full disk.
        if isinstance(error, UserError) or not isinstance(
            error, (OSError, RuntimeError, ValueError)
        ):
            raise
        reason = describe(error).rstrip(".")
        raise CheckpointError(f"{path} could not be written: {reason}.") from error
    if isinstance(path, RemotePath):
        _move_objects(temporary, path)


def _clear(folder: Path, parents: list[Path]) -> None:
    """Remove a folder, and those of its parents that are then empty."""
    if isinstance(folder, RemotePath):
        with contextlib.suppress(OSError):
            folder.rmtree()
        return
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)  # Orbax's other writers do not stop at once when one has failed
        if not os.path.lexists(folder):
            break
    for parent in parents:
        with contextlib.suppress(OSError):
            parent.rmdir()


def _move_objects(new: RemotePath, path: RemotePath) -> None:
    """Put the objects of `new` in the place of those of `path`; what marks a model comes last.

    Raises CheckpointError: it failed on the way; all objects are then in `new`.
    """
    try:
        _remove_model(path)
        names = [str(file.relative_to(new)) for file, _ in new.walk()]
        for name in sorted(names, key=lambda name: (name in _MARKS, "/" not in name)):
            (new / name).copy(path / name)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written: {describe(error).rstrip('.')}. All of it is in {new}: "
            "copy it from there."
        ) from error
    with contextlib.suppress(OSError):  # it is a copy by now
        new.rmtree()


def _upload(folder: Path, target: RemotePath) -> RemotePath:
    """Move a folder of this machine to a bucket; returns where it is."""
    try:
        upload_folder(folder, target, CONFIG)
    except BaseException:
        _clear(target, [])
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return target


def _remove_model(path: RemotePath) -> None:
    """Delete what is in a folder, first what marks it as a model."""
    there = [file for file, _ in path.walk()] if path.exists() else []
    for file in sorted(there, key=lambda file: str(file.relative_to(path)) not in _MARKS):
        file.unlink(missing_ok=True)


def _exchange(new: Path, path: Path, old: Path) -> None:
    """Put `new` in the place of `path`, which is removed: first renamed to `old`."""
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)


def check_free(path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Raise CheckpointError unless a model may be written to `path`.

    overwrite: it may hold a model, of ours or in the form of Hugging Face, or an adapter, and
    nothing else.
    """
    path = _target(path)
    if not is_there(path):
        return
    if not overwrite:
        raise CheckpointError(f"{path} exists. Choose another name, or remove it.")
    if path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: it is not overwritten.")
    disk = isinstance(path, Path)
    for place, what in ((Path.cwd(), "the current folder"), (Path.home(), "your home folder")):
        if disk and Path(os.path.realpath(place)).is_relative_to(path):
            raise CheckpointError(f"{path} is {what}, or holds it: it is not overwritten.")
    if path.is_mount():
        raise CheckpointError(f"{path} is a mount point: it is not overwritten.")
    files = [name for name in _OF_RUN if is_there(path / name)]
    if files:
        raise CheckpointError(
            f"{path} holds a training run ({', '.join(files)}): it is not overwritten. Choose "
            "another name."
        )
    entries = sorted(path.iterdir())
    if [entry.name for entry in entries] == [ADAPTER, ADAPTER_TENSORS]:
        return
    if entries and not (path / CONFIG).is_file():
        raise CheckpointError(
            f"{path} is a folder without {CONFIG}, no checkpoint: it is not overwritten."
        )
    if entries:
        _check_only_model(path, entries)


def _check_only_model(path: Path, entries: list[Path]) -> None:
    """Raise CheckpointError unless a folder with these entries is a model and nothing else."""
    fields = read_json(path / CONFIG, CheckpointError)
    weights = [entry for entry in entries if _is_weights(entry)]
    if not weights or not isinstance(fields.get("model_type"), str):
        raise CheckpointError(
            f"{path} holds a {CONFIG}, but no model that it describes: it is not overwritten."
        )
    # Code is a part of a model only where config.json points to it.
    patterns = [name for name in COMPANIONS if name != _CODE or "auto_map" in fields]
    others = [
        entry.name
        for entry in entries
        if entry.name != CONFIG
        and entry not in weights
        and not (entry.is_file() and any(entry.match(pattern) for pattern in patterns))
    ]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise CheckpointError(
            f"{path} holds more than a model: {', '.join(others[:5])}{more}. It is not "
            "overwritten: move that away, or choose another name."
        )


def _is_weights(entry: Path) -> bool:
    if entry.name == PARAMS:  # of ours, with what Orbax writes beside the arrays
        return not entry.is_symlink() and (entry / "_METADATA").is_file()
    return entry.is_file() and any(entry.match(pattern) for pattern in _WEIGHTS)


def _target(path: str | os.PathLike) -> Path:
    """Make the absolute path of a folder to write; only its own name may be a link."""
    path = given_path(path, "the folder to write", CheckpointError, write=True).absolute()
    check_no_backslash(path, "the folder to write", CheckpointError)
    if isinstance(path, RemotePath):
        return path
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent)) / path.name
