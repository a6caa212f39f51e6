"""Orbax's event loops and logs, so that a save or a restore that fails says nothing by itself.

Orbax reads and writes many arrays side by side in an event loop that it closes at the first
failure. The others go on, and the threads of the storage drivers and the garbage collector would
print a traceback for each of them. What failed is raised, and is said once by whoever catches it.
"""

import asyncio
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

SECONDS = 30.0  # within which the tasks that are left when a loop closes have to end


def quiet_orbax() -> None:
    """Let event loops finish their tasks before they close; hide Orbax's warnings and failures.

    Call it before Orbax saves or restores; more than once is as good as once.
    """
    logging.getLogger("absl").addFilter(_is_wanted)
    policy = asyncio.get_event_loop_policy()
    if getattr(policy.new_event_loop, "func", None) is not _new_event_loop:
        policy.new_event_loop = functools.partial(_new_event_loop, policy.new_event_loop)


def _new_event_loop(make: Callable[[], asyncio.AbstractEventLoop]) -> asyncio.AbstractEventLoop:
    loop = make()
    loop.close = functools.partial(_close, loop, loop.close)
    return loop


def _close(loop: asyncio.AbstractEventLoop, close: Callable[[], None]) -> None:
    interrupted = not isinstance(sys.exception(), Exception | None)
    try:
        if not (interrupted or loop.is_closed() or loop.is_running()):
            tasks = asyncio.all_tasks(loop)
            if tasks:
                loop.run_until_complete(asyncio.wait(tasks, timeout=SECONDS))
    finally:
        # What ends later still, or has failed unseen, has nobody left to tell.
        loop.set_exception_handler(_ignore)
        loop.call_soon_threadsafe = _ignore
        close()


def _ignore(*_: Any, **__: Any) -> None:
    pass


def _is_wanted(record: logging.LogRecord) -> bool:
    # Its warnings are advice on how this package uses it, such as after a second's wait.
    unwanted = record.exc_info or record.levelno == logging.WARNING
    return not (unwanted and f"{os.sep}orbax{os.sep}" in record.pathname)
