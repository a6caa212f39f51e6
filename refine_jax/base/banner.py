"""XLA's banner on slow compilation, taken out of standard error.

After two minutes of compilation XLA asks on standard error to file a bug against it. A large model
takes longer than that, and there is nothing to file. The banner comes from C++, so it is caught
where the file descriptor leads to; everything else passes unchanged and at once. A process of its
own passes it on, so that nothing is lost even where this one crashes.

This module imports the standard library alone: the process that filters runs it as a script.
"""

import contextlib
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator

_START = rb"[^\n]*slow_operation_alarm\.cc:\d+\] (?:The operation took [^\n]*\n)?\n\*+\n"
BANNER = re.compile(_START + rb"\[[^\n]*\] Very slow compile\?[^\n]*\n\*+\n")
"""A whole banner: at the alarm, and once more when the compilation ends."""
_HEAD = re.compile(rb"[^\n]*slow_operation_alarm\.cc:\d+\]")
_LINES = 6  # more than a banner has
_WAIT = 1.0  # seconds for the rest of a banner; XLA writes it at once


@contextlib.contextmanager
def without_banner() -> Iterator[None]:
    """Drop the banner, and nothing else, from what anything in this process writes to descriptor 2.

    Does nothing where no process can be started.
    """
    try:
        saved = os.dup(2)
    except OSError:  # closed
        yield
        return
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=saved,
            start_new_session=True,  # Ctrl-C is for us; the child goes when we have closed the pipe
        )
    except (OSError, ValueError, TypeError):
        os.close(saved)
        yield
        return
    os.dup2(child.stdin.fileno(), 2)
    child.stdin.close()
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)


def split(data: bytes) -> tuple[bytes, bytes]:
    """Split bytes into those to pass on, without banners, and those that may become a banner."""
    data = BANNER.sub(b"", data)
    for head in _HEAD.finditer(data):
        rest = data[head.start() :]
        if rest.count(b"\n") < _LINES:
            return data[: head.start()], rest
    return data, b""


def _pass_on(source: int, target: int) -> None:
    kept = b""
    while True:
        if kept and not select.select([source], [], [], _WAIT)[0]:
            _write(target, kept)
            kept = b""
        data = os.read(source, 1 << 16)
        out, kept = split(kept + data)
        _write(target, out if data else out + kept)
        if not data:
            return


def _write(target: int, data: bytes) -> None:
    while data:
        data = data[os.write(target, data) :]


if __name__ == "__main__":
    _pass_on(0, 1)
