"""Ending a run between two steps when the machine or the user asks for it."""

import signal
import threading

from refine_jax import distributed


class Interrupt:
    """Remembers SIGTERM and SIGINT instead of dying of them. Use as a context manager.

    A second signal acts as if this were not there, so that a run that hangs can be ended. Outside
    the main thread, where Python allows no handlers, signals act as usual.

    Attributes:
      signal: Name of the signal that came, None until then.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signal: str | None = None
        self._previous: dict = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def agreed(self) -> bool:
        """Whether a signal came to any process; all ask at the same step.

        `signal` is then set on all of them.
        """
        mine = 0 if self.signal is None else signal.Signals[self.signal].value
        first = max(distributed.gather(mine))
        if first and self.signal is None:
            self.signal = signal.Signals(first).name
        return first != 0

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._remember) for s in self.SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        self._restore()

    def _remember(self, number: int, frame) -> None:
        del frame
        self.signal = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())
