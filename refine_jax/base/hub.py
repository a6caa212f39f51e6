"""The Hugging Face hub: names of repositories, and what goes wrong there in one message.

Everything that is said on the way to the hub and back goes through `hub_errors`, which never
repeats a token: neither that of huggingface_hub nor whatever an answer holds that looks like one.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from refine_jax.base.errors import UserError

PREFIX = "hf://"
MARK = "<!-- Written by refine_jax, which replaces this file; keep it by removing this line. -->"
"""A line of the model cards that this package may replace."""
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_MODEL = re.compile(rf"(?:models/)?({_REPOSITORY.pattern})(?:@([\w./-]+))?", re.ASCII)
_DATA = re.compile(
    rf"hf://(datasets/|models/)?({_REPOSITORY.pattern})(?:@([\w.-]+))?(/.*)?", re.ASCII
)
_COMMIT = re.compile(r"@[0-9a-f]{40}(?=/|$)")
_TOKEN = re.compile(r"hf_\w+|(?<=//)[^/@\s]+@")
_LONGEST = 200  # characters of what the hub answers
# Parts of repositories' names that stand for other things than models.
_OTHERS = ("datasets", "spaces", "buckets", "kernels", "models")


class Repository(NamedTuple):
    """A model on the hub, "ORG/NAME", and the branch, tag or commit that is meant."""

    name: str
    revision: str

    def __str__(self) -> str:
        """As a user writes it."""
        at = "" if self.revision == "main" else f"@{self.revision}"
        return f"{PREFIX}{self.name}{at}"


def is_hub(path: str | os.PathLike) -> bool:
    """Whether a path names something on the hub."""
    return os.fspath(path).strip().startswith(PREFIX)


def model_repository(path: str | os.PathLike, setting: str, error: type[UserError]) -> Repository:
    """Parse `hf://ORG/NAME[@REVISION]`; raise `error` for anything else.

    setting: what the path was given as, for the message.
    """
    text = os.fspath(path).strip()
    match = _MODEL.fullmatch(text.removeprefix(PREFIX))
    if not text.startswith(PREFIX) or not match or match[1].partition("/")[0] in _OTHERS:
        raise error(
            f"{setting} must name a model on the hub as hf://ORG/NAME or hf://ORG/NAME@REVISION. "
            f"Got: {without_tokens(text)!r}."
        )
    return Repository(match[1], match[2] or "main")


def repository_name(text: str, setting: str, error: type[UserError]) -> str:
    """Check the name of a repository to write, ORG/NAME; raise `error` if it is none."""
    name = text.strip().removeprefix(PREFIX)
    if not _REPOSITORY.fullmatch(name) or name.partition("/")[0] in _OTHERS:
        raise error(f"{setting} must be ORG/NAME. Got: {without_tokens(text)!r}.")
    return name


def pinned(path: str, setting: str, error: type[UserError]) -> str:
    """Name the commit in a path on the hub: hf://datasets/ORG/NAME@COMMIT/... of what is there now.

    path: hf://[datasets/]ORG/NAME[@REVISION][/PATH]. So files that are pushed later change nothing.
    Raises `error`: it is no such path, or the repository or revision cannot be read.
    """
    text = os.fspath(path).strip()
    match = _DATA.fullmatch(text)
    if not match or match[2].partition("/")[0] in _OTHERS:
        raise error(
            f"{setting} must be hf://datasets/ORG/NAME[@REVISION]/PATH on the hub. Got: "
            f"{without_tokens(text)!r}."
        )
    kind, name, revision, rest = match[1] or "", match[2], match[3], match[4] or ""
    with hub_errors(text, error) as library:
        if _offline():
            raise error(
                f"{setting}={text}: HF_HUB_OFFLINE forbids to read data on the hub, of which "
                "nothing is kept here. Name files of this machine, or unset HF_HUB_OFFLINE."
            )
        info = library.HfApi().repo_info(
            name, revision=revision, repo_type="dataset" if kind == "datasets/" else "model"
        )
    return f"{PREFIX}{kind}{name}@{info.sha}{rest}"


def without_commit(path: str) -> str:
    """A path of `pinned` without its commit: the name of a file, whatever else was pushed."""
    return _COMMIT.sub("", path, count=1) if is_hub(path) else path


def without_tokens(text: str) -> str:
    """Put "***" in the place of tokens: what looks like one, and the one that is in use."""
    token = None
    with contextlib.suppress(ImportError):
        from huggingface_hub import get_token

        token = get_token()
    if token:
        text = text.replace(token, "***")
    return _TOKEN.sub("***", text)


@contextlib.contextmanager
def hub_errors(what: str, error: type[UserError], hint: str = "") -> Iterator[Any]:
    """Give huggingface_hub; turn whatever it raises into one `error` without tokens.

    what: a path on the hub, for messages. hint: a sentence that says what can be done at last.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise error(
            f"{what} is on the Hugging Face hub, for which the package huggingface_hub is missing: "
            "pip install 'refine-jax[hub]'."
        ) from None
    try:
        yield huggingface_hub
    except UserError:
        raise
    except Exception as problem:  # of huggingface_hub, its client of HTTP, fsspec
        said = _say(what, problem, errors, without_tokens(constants.ENDPOINT))
    else:
        return
    # Outside of the handler: the first error, which may hold the token, is not chained.
    raise error(f"{said} {hint}".rstrip())


def _say(what: str, problem: Exception, errors: Any, endpoint: str) -> str:
    chain, cause = [problem], problem
    while (cause := cause.__cause__ or cause.__context__) is not None and len(chain) < 10:
        chain.append(cause)
    log_in = "log in by `hf auth login`, or set HF_TOKEN"

    def found(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in chain)

    if found(errors.GatedRepoError):
        return (
            f"{what} is gated: ask for access on {endpoint}, and {log_in} to the token of an "
            "account that has it."
        )
    if found(errors.RevisionNotFoundError):
        return f"{what}: there is no such revision on {endpoint}."
    if _offline() and found(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        return (
            f"{what} is not in the cache of huggingface_hub as a whole, and HF_HUB_OFFLINE forbids "
            "to fetch it. Fetch it once without HF_HUB_OFFLINE."
        )
    status = next((s for each in chain if (s := _status(each))), None)
    if found(errors.RepositoryNotFoundError):
        return (
            f"{what}: there is no such repository on {endpoint}, or it is private: check the name; "
            f"if it is right, {log_in}."
        )
    if status in (401, 403):
        return f"{what}: {endpoint} refused it ({status}): {log_in} to a token that may do this."
    if found(errors.EntryNotFoundError) and status == 404:
        return f"{what}: there is no such file on {endpoint}."
    if status is not None:
        return f"{what}: {endpoint} answered {status}. Try again later.{_answer(chain)}"
    if found(ConnectionError, TimeoutError) or any("Connect" in type(e).__name__ for e in chain):
        return f"{what}: {endpoint} cannot be reached, and the cache does not hold it as a whole."
    text = without_tokens(" ".join(str(problem).split()))[:_LONGEST]
    return f"{what}: {type(problem).__name__}: {text}"


def _offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids requests."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _status(problem: BaseException) -> int | None:
    return getattr(getattr(problem, "response", None), "status_code", None)


def _answer(chain: list[BaseException]) -> str:
    """What the hub said besides the status, if anything."""
    said = next((m for each in chain if (m := getattr(each, "server_message", None))), "")
    return f" It said: {without_tokens(said)[:_LONGEST]}" if said else ""
