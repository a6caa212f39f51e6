"""Folders that are there in full or not at all, and the files that travel with the weights."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from refine_jax.base.errors import CheckpointError
from refine_jax.base.files import local_path

CONFIG = "config.json"
RUN = "run.json"

# Files beside the weights of a Hugging Face folder that are carried through unread: tokenizers,
# generation defaults, and the model code that config.json may point to.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*.py",
)
TOKENIZERS = ("tokenizer.model", "tokenizer.json")


def companions(folder) -> dict:
    """The files of `folder` (a path) that travel with its weights: {name: path}."""
    found = {path.name: path for pattern in COMPANIONS for path in folder.glob(pattern)}
    return {name: path for name, path in sorted(found.items()) if path.is_file()}


def has_tokenizer(folder) -> bool:
    """Whether `folder` (a path) holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def copy_files(files: Mapping, folder) -> None:
    """Copy files {name: path} into `folder`, bytes unchanged."""
    for name, path in files.items():
        (folder / name).write_bytes(path.read_bytes())


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that gets its name when the block ends without an error.

    overwrite: replace a checkpoint that is there already (a folder with a config.json).
    Raises CheckpointError if `path` exists and must not be replaced.
    """
    path = local_path(path, "the folder to write", CheckpointError).absolute()
    check_free(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    temporary = path.with_name(f".{path.name}.new-{mark}")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            replaced = path.with_name(f".{path.name}.old-{mark}")
            path.rename(replaced)
            temporary.rename(path)
            shutil.rmtree(replaced)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Raise CheckpointError unless a checkpoint may be written to `path`."""
    path = local_path(path, "the folder to write", CheckpointError).absolute()
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise CheckpointError(f"{path} exists. Choose another name, or remove it.")
    if path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: it is not overwritten.")
    if (path / RUN).exists():
        raise CheckpointError(f"{path} holds a training run: it is not overwritten.")
    if any(path.iterdir()) and not (path / CONFIG).is_file():
        raise CheckpointError(
            f"{path} is a folder without {CONFIG}, no checkpoint: it is not overwritten."
        )
