"""Traces of some training steps, by jax.profiler, for TensorBoard's profile page or xprof.

The parts of a step stand in them by name: `selection`, `fork`, `rollout` and `score`, within
`update`, which is all of it.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from refine_jax.base.files import path_of
from refine_jax.base.growing import Mirror

PROFILE = "profile"


class Profile(contextlib.AbstractContextManager):
    """Traces the steps from a first to a last one into `WORKDIR/profile`.

    steps: the two numbers, counted from 1; None: none are traced. write: whether this process
    traces; one of a run does. say: prints a line where that fails, which never stops training.
    """

    def __init__(
        self,
        workdir: Path,
        steps: tuple[int, int] | None,
        say: Callable[[str], None],
        *,
        write: bool = True,
    ):
        self._folder, self._say = path_of(workdir) / PROFILE, say
        self._mirror: Mirror | None = None
        self._first, self._last = steps if steps and write else (1, 0)
        self._running = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Mark step `number`, and trace it if it is one of those."""
        if not self._first <= number <= self._last:
            yield
            return
        if not self._running:
            self._start()
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number == self._last:
            self.close()

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python functions would fill the trace
        try:
            self._mirror = Mirror(self._folder)
            jax.profiler.start_trace(str(self._mirror.path), profiler_options=options)
            self._running = True
        except Exception as error:  # such as another profiler that is at work
            self._first, self._last = 1, 0
            self._say(f"No trace of the steps is written: {error}")

    def close(self) -> None:
        """Write the trace of the steps so far, if one is being made."""
        if not self._running:
            return
        self._running = False
        try:
            with self._mirror:
                jax.profiler.stop_trace()
            self._say(f"Trace of the steps: {self._folder} (tensorboard --logdir, or xprof).")
        except Exception as error:
            self._say(f"The trace of the steps could not be written: {error}")

    def __exit__(self, *exception) -> None:
        self.close()
