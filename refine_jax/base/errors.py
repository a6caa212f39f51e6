"""Errors that a user can mend, and how commands print them."""

from __future__ import annotations

import json
import sys
from typing import Any


class UserError(Exception):
    """Something that the user can mend: the message says what is wrong, what was got, what to do.

    Commands print the message alone; anything else that is raised is a fault of this package.
    """


class ConfigError(UserError, ValueError):
    """A setting that cannot work; the message names it and says what is allowed."""


class ModelConfigError(UserError, ValueError):
    """A config.json of a model that asks for something unknown or impossible."""


class DataError(UserError, ValueError):
    """Bad data: a missing file or column, an empty source, a damaged record."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be read or written; the message names it and says what to do."""


class RunError(UserError, RuntimeError):
    """A run that cannot go on; the message says what happened and what to do."""


class ProcessError(UserError, RuntimeError):
    """Processes that did not find each other or do not agree; the message says what to do."""


USER_ERRORS = (UserError, OSError)
"""What a command prints as one message instead of a traceback."""


def describe(error: BaseException) -> str:
    """The message of an error for a user: one of the system says which file it is about."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"cannot use {error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def complain(error: BaseException | str) -> int:
    """Print an error on standard error; returns the exit code of a command that failed, 1."""
    message = error if isinstance(error, str) else describe(error)
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 1


def escape_output() -> None:
    """Let standard output and error escape what their encoding cannot say, instead of failing.

    Every command calls this first: text of models and data sets holds any character, and a
    terminal or a pipe may take ASCII only.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    """Print a JSON value in a line, with characters as they are where the output can say them."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    print(json.dumps(value, ensure_ascii=encoding != "utf8"), flush=True)
