"""ReFINE: next-sequence reinforcement learning for fast-weight language models, in JAX."""

import os as _os
import signal as _signal
import sys as _sys


def _end_at_once(number: int, frame: object) -> None:
    _os.write(2, b"interrupted\n")
    _os._exit(130)


_end_at_once.at_start_of_command = True

# `python -m refine_jax.COMMAND` and `refine-jax` import this first. Ctrl-C while the rest is
# imported would be a traceback, or a crash of an extension module
# (`refine_jax.base.errors.run_command`).
_at_start = _sys.argv[:1] == ["-m"] or _os.path.basename((*_sys.argv, "")[0]) == "refine-jax"
if _at_start and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _end_at_once)
