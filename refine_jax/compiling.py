"""Compilation: said when it takes long, and counted, as nothing else happens while it lasts."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax import monitoring

from refine_jax.base.banner import without_banner
from refine_jax.kernels.device import backend
from refine_jax.parallel import axis_size

# jax reports here when it begins and ends to trace, lower and compile.
_EVENTS = "/jax/core/compile/"
PATIENCE = 2.0
"""Seconds of compilation without a word; most programs take less, as do those from a cache."""
_ALARM = 60.0  # before XLA's, at 120 s


def compiler_options() -> dict[str, bool] | None:
    """Options of `jax.jit` for programs over the ambient mesh; None: those of XLA itself.

    Where chips share rows, they exchange tokens for heads beside what they compute. Not on a v5e,
    for which libtpu 0.0.52 ends itself with the option ("Check failed: T::ClassOf(instr)").
    """
    if backend() != "tpu" or axis_size("sequence") == 1:
        return None
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.device_kind in ("TPU v5 lite", "TPU v5e"):
        return None
    return {"xla_tpu_enable_async_all_to_all": True}


class Compilations:
    """What the thread that enters it compiles.

    say: prints a line; None: nothing is said. Called from another thread.

    Attributes:
      what: Name of what is compiled next, such as "the training step"; "": it is not announced.
      seconds: Of tracing, lowering and compilation so far, without what is under way.
    """

    def __init__(self, say: Callable[[str], None] | None = None):
        self.what, self.seconds = "", 0.0
        self._say = say
        self._thread: int | None = None
        self._depth, self._begin = 0, 0.0  # of what is under way: an inner program is traced within
        self._timers: list[threading.Timer] = []
        self._before, self._announced = 0.0, False  # seconds before what is named now
        self._lock = threading.Lock()
        self._banner = contextlib.ExitStack()

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Name what is compiled inside; if that was announced, say how long it took."""
        self.what, self._before, self._announced = what, self.seconds, False
        try:
            yield
        finally:
            self.what = ""
        if self._announced:
            self._say(f"compiled in {self.seconds - self._before:.0f} s")

    def __enter__(self) -> "Compilations":
        self._thread = threading.get_ident()
        monitoring.register_scalar_listener(self._on_begin)
        monitoring.register_event_duration_secs_listener(self._on_end)
        return self

    def __exit__(self, *exception) -> None:
        monitoring.unregister_scalar_listener(self._on_begin)
        monitoring.unregister_event_duration_listener(self._on_end)
        self._stop_waiting()

    def _on_begin(self, event: str, value: float, **_) -> None:
        if not self._is_mine(event):
            return
        self._depth += 1
        if self._depth > 1:
            return
        self._begin = time.perf_counter()
        left = max(PATIENCE - (self.seconds - self._before), 0.0)
        self._timers = [
            threading.Timer(left, self._announce),
            threading.Timer(_ALARM, self._catch_banner),
        ]
        for timer in self._timers:
            timer.daemon = True
            timer.start()

    def _on_end(self, event: str, value: float, **_) -> None:
        if not self._depth or not self._is_mine(event):
            return
        self._depth -= 1
        if not self._depth:
            self.seconds += time.perf_counter() - self._begin
            self._stop_waiting()

    def _is_mine(self, event: str) -> bool:
        return event.startswith(_EVENTS) and threading.get_ident() == self._thread

    def _announce(self) -> None:
        with self._lock:
            if self._say and self.what and self._depth and not self._announced:
                self._announced = True
                self._say(f"compiling {self.what}; this may take minutes")

    def _catch_banner(self) -> None:
        with self._lock:
            if self._depth:
                self._banner.enter_context(without_banner())

    def _stop_waiting(self) -> None:
        for timer in self._timers:
            timer.cancel()
        with self._lock:
            self._banner.close()


@contextlib.contextmanager
def announced(what: str = "the model's programs") -> Iterator[None]:
    """Say on standard error, once, when what a command compiles takes long; catch the banner."""

    def say(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    with Compilations(say) as compilations:
        compilations.what = what
        yield
