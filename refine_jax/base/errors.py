"""Errors that a user can mend, and how commands print them."""

import errno
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
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


_REASONS = {
    errno.EACCES: "this user may not do that here (permission denied)",
    errno.EPERM: "this user may not do that here (operation not permitted)",
    errno.EROFS: "it is on a file system that can only be read",
    errno.ENOSPC: "no space is left on its disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.ENOTDIR: "a part of this path is a file, no folder",
    errno.EISDIR: "it is a folder, no file",
    errno.EEXIST: "something of this name is there already",
    errno.ENAMETOOLONG: "the name is too long for this file system",
    errno.ELOOP: "its links lead in a circle",
    errno.EMFILE: "too many files are open (raise `ulimit -n`)",
}


def reason(error: OSError) -> str:
    """Say what the system says of a file, as a part of a sentence."""
    return _REASONS.get(error.errno, error.strerror or str(error) or type(error).__name__)


def describe(error: BaseException) -> str:
    """Make the message of an error for a user; for one of the system, name the file."""
    if isinstance(error, OSError) and error.strerror:
        about = "a file" if error.filename is None else error.filename
        return f"cannot use {about}: {reason(error)}."
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


INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells report it (128 + SIGINT)."""

OUTPUT_CLOSED = 141
"""Exit code where nobody reads the output any more, as of `| head` (128 + SIGPIPE)."""


def run_command(
    work: Callable[[], int | None], *, debug: bool = False, imports: bool = False
) -> int:
    """Do the work of a command; returns its exit code, where `work` returns None 0.

    What the user can mend is one message (exit code 1), Ctrl-C one line (130), and an output that
    nobody reads any more nothing (141).

    debug: let errors through, with their traceback. imports: the work begins with imports; until
    it calls `allow_interrupts`, Ctrl-C ends the process at once, as it does from the start of a
    command (`refine_jax/__init__.py`): extension modules crash where an import is interrupted.
    """
    escape_output()
    if not imports:
        allow_interrupts()
    try:
        code = work() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    except USER_ERRORS as error:
        if output_is_closed(error):
            return OUTPUT_CLOSED
        if debug:
            raise
        return complain(error)


def allow_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, as usual, if a command has put that off until now."""
    if threading.current_thread() is threading.main_thread() and hasattr(
        signal.getsignal(signal.SIGINT), "at_start_of_command"
    ):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def output_is_closed(error: BaseException) -> bool:
    """Tell whether an error came of a closed standard output; let it then take anything."""
    if not isinstance(error, BrokenPipeError):
        return False
    try:
        output = sys.stdout.fileno()
        poll = select.poll()
        poll.register(output, 0)
        if not poll.poll(0):  # the pipe of something else
            return False
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    except (OSError, ValueError, AttributeError):
        return False
    return True
