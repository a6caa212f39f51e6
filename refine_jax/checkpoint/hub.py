"""Models on the Hugging Face hub: fetched once, converted once, and pushed.

huggingface_hub fetches what a conversion needs into its own cache. What it becomes is kept beside
it, in HF_HOME/refine_jax, by the hash of the commit: a model is converted once, whoever asks.
"""

import fnmatch
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import logging

from refine_jax.base.errors import CheckpointError, UserError
from refine_jax.base.hub import MARK, Repository, hub_errors, model_repository
from refine_jax.checkpoint.folders import ADAPTER, ADAPTER_TENSORS, COMPANIONS, CONFIG
from refine_jax.checkpoint.weights import INDEX, SAFETENSORS, TORCH

FORMAT = 1  # of what is converted into the cache; raise it when the same model gives another folder
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = ("model*.safetensors", SAFETENSORS + INDEX)
_TORCH_WEIGHTS = ("pytorch_model*.bin", TORCH + INDEX)


def fetch(
    path: str | os.PathLike,
    setting: str = "the checkpoint",
    error: type[UserError] = CheckpointError,
    *,
    only: Sequence[str] = (),
) -> Path:
    """Fetch of a model on the hub what a conversion needs; returns the folder in the cache.

    path: hf://ORG/NAME[@REVISION]. only: patterns of the files that are wanted; (): weights,
    config.json and what travels with them. What the cache has is not fetched again, and serves
    where the hub cannot be reached.

    Raises `error`: there is no such repository or revision, it may not be read, or it is neither on
    the hub nor in the cache.
    """
    repository = model_repository(path, setting, error)
    patterns = tuple(only)
    with hub_errors(str(repository), error) as library:
        if not patterns:
            patterns = _needed(_names(repository, library))
        folder = library.HfApi().snapshot_download(
            repository.name,
            revision=repository.revision,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],  # none of the model's is in a folder of its own
        )
    return Path(folder)


def cached(path: str | os.PathLike, convert: Callable[[Path, Path], None]) -> Path:
    """Find the checkpoint made of a model on the hub; fetch and convert it the first time.

    convert: makes a checkpoint in a new folder (second) of a Hugging Face folder (first). Several
    processes may ask at once: one converts, the others wait for it.

    Raises CheckpointError as `fetch` and `convert` do.
    """
    repository = model_repository(path, "the checkpoint", CheckpointError)
    with hub_errors(str(repository), CheckpointError) as library:
        from filelock import FileLock

        home = Path(library.constants.HF_HOME) / "refine_jax"
        commit = _commit(repository, library)
        folder = home / repository.name.replace("/", "--") / f"{commit}-{FORMAT}"
        if (folder / CONFIG).is_file():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
    with lock:
        if not (folder / CONFIG).is_file():
            source = fetch(path)
            if source.name != commit:  # somebody has pushed to the branch since
                folder = folder.with_name(f"{source.name}-{FORMAT}")
            logging.info("converting %s, once, into %s", repository, folder)
            if not (folder / CONFIG).is_file():
                convert(source, folder)
    return folder


def push(folder: Path, name: str, card: str) -> str:
    """Put a Hugging Face folder and its model card into a repository, in one commit.

    name: ORG/NAME; `prepare_push` has made it. Weights there that are not among the folder's are
    removed; a README.md that somebody else wrote is kept. Returns the commit's address.

    Raises CheckpointError: it cannot be written there.
    """
    hint = f"The model is in {folder} whole: the same command with --overwrite tries again."
    with hub_errors(f"hf://{name}", CheckpointError, hint) as library:
        api = library.HfApi()
        there = api.list_repo_files(name)
        paths = sorted(path for path in folder.iterdir() if path.is_file())
        operations = [library.CommitOperationAdd(path.name, path) for path in paths]
        new = {path.name for path in paths}
        stale = [file for file in there if _is_weights(file) and file not in new]
        operations += [library.CommitOperationDelete(file) for file in stale]
        if "README.md" not in there or MARK in _read(api, name, "README.md"):
            operations.append(library.CommitOperationAdd("README.md", card.encode("utf-8")))
        commit = api.create_commit(name, operations, commit_message="Model written by refine_jax")
    return str(commit.commit_url)


def prepare_push(name: str) -> None:
    """Make the repository ORG/NAME, private, unless it is there; nothing is written yet.

    Raises CheckpointError: there is no token, or it may not write there.
    """
    with hub_errors(f"hf://{name}", CheckpointError) as library:
        if library.get_token() is None:
            raise CheckpointError(
                f"hf://{name} is written with a token: log in by `hf auth login`, or set HF_TOKEN."
            )
        library.HfApi().create_repo(name, private=True, exist_ok=True)


def _read(api, name: str, file: str) -> str:
    return Path(api.hf_hub_download(name, file)).read_text("utf-8", "replace")


def _is_weights(name: str) -> bool:
    patterns = (*_WEIGHTS, *_TORCH_WEIGHTS, ADAPTER, ADAPTER_TENSORS)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _needed(names: Sequence[str] | None) -> tuple[str, ...]:
    """Choose the files of a repository that a conversion reads; None: names are not known."""
    patterns = (CONFIG, *COMPANIONS, ADAPTER, ADAPTER_TENSORS, *_WEIGHTS)
    if names is None:
        return patterns
    if not any(_is_safetensors(name) for name in names):
        patterns += _TORCH_WEIGHTS
    return patterns


def _is_safetensors(name: str) -> bool:
    return name == ADAPTER_TENSORS or fnmatch.fnmatchcase(name, "model*.safetensors")


def _names(repository: Repository, library) -> list[str] | None:
    """List the files of a repository; None where the hub cannot be asked."""
    info = _info(repository, library)
    return None if info is None else [file.rfilename for file in info.siblings]


def _commit(repository: Repository, library) -> str:
    """Find the hash of the commit that a revision names, on the hub, else in the cache."""
    if _COMMIT.fullmatch(repository.revision):
        return repository.revision
    info = _info(repository, library)
    if info is not None:
        return info.sha
    cache = Path(library.constants.HF_HUB_CACHE) / f"models--{repository.name.replace('/', '--')}"
    reference = cache / "refs" / repository.revision
    if reference.is_file():
        return reference.read_text("utf-8").strip()
    library.HfApi().model_info(repository.name, revision=repository.revision)  # says what is wrong
    raise CheckpointError(f"{repository} has no commit.")


def _info(repository: Repository, library):
    """Ask the hub about a revision; None where it cannot be reached or does not work."""
    try:
        return library.HfApi().model_info(repository.name, revision=repository.revision)
    except (library.errors.RepositoryNotFoundError, library.errors.RevisionNotFoundError):
        raise
    except Exception as error:  # of huggingface_hub, and of its client of HTTP
        logging.info("%s is looked for in the cache: %s", repository, type(error).__name__)
        return None
