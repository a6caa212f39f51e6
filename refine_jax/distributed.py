"""Several processes as one run: how they find each other, agree, and end together.

On a TPU pod, under SLURM or Open MPI, the same command on every host is enough: `start` sees it in
the environment. Elsewhere each process is told its number:

    python -m refine_jax.main ... --coordinator=HOST:PORT --num_processes=P --process_id=I

Every process runs the same program in step; whatever is called here by one must be called by all,
in the same order. Process 0 writes, prints and draws. With one process nothing here does anything.
"""

import atexit
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from refine_jax.base import lock
from refine_jax.base.errors import (
    INTERRUPTED,
    OUTPUT_CLOSED,
    ConfigError,
    ProcessError,
    complain,
    describe,
    output_is_closed,
)
from refine_jax.base.files import missing_folders, path_of, write_bytes
from refine_jax.cluster import bind_address, check_address, find_cluster, is_local, resolve

TIMEOUT = 300
"""Seconds that processes wait for each other at the start."""

_FAILURE = "refine_jax/failure"
_POLL = 2.0  # seconds between looks for failures of other processes
_connections = itertools.count()


def start(
    mode: str = "auto",
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = TIMEOUT,
) -> None:
    """Join the processes of a run; before anything else uses jax.

    mode: "auto": where the environment says that there are several processes; "on": always, jax
    finds them (needed on Kubernetes without TPUs); "off": never. coordinator: HOST:PORT that
    process 0 listens on. num_processes: P. process_id: 0 .. P - 1. All three or none. timeout:
    seconds to wait for the others; then this process ends with a message and code 1.

    Raises ConfigError: a part of the three is missing or wrong, or there is nothing to find.
    """
    told = check_address(mode, coordinator, num_processes, process_id)
    bind = None
    if not told and (mode == "off" or (mode == "auto" and find_cluster(os.environ) is None)):
        return
    # The service would take SIGTERM for itself; `Interrupt.agreed` does its work.
    jax.config.update("jax_enable_preemption_service", False)
    where = f"process {process_id} of {num_processes} at {coordinator}" if told else "this process"
    if told:
        addresses = resolve(coordinator)
        if is_local(coordinator):
            _stay_local(addresses[0])
        if process_id == 0:
            bind = bind_address(coordinator, addresses)
    with _time_limit(timeout, where):
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                coordinator_bind_address=bind,
                # jax aborts when its own time is up; our time ends first, with a message.
                initialization_timeout=timeout + 60,
            )
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            raise ConfigError(
                f"The processes of this run could not be joined ({type(error).__name__}: {error}). "
                "Name them: --coordinator=HOST:PORT --num_processes=P --process_id=I on each."
            ) from error
    if jax.process_count() > 1:
        _watcher.start()
        if jax.devices()[0].platform == "cpu":
            _leave_out_gloo_lines()
        connect(Mesh(jax.devices(), ("all",)))


def _stay_local(address: str) -> None:
    """Let the CPU devices' own connections (gloo) listen on a loopback address, too.

    They take the address of the machine's name, of which jax has no setting.
    """
    from jax._src.lib import _jax

    make = getattr(_jax, "make_gloo_tcp_collectives", None)
    if make is not None:
        _jax.make_gloo_tcp_collectives = functools.partial(make, hostname=address)


@contextlib.contextmanager
def _time_limit(seconds: float, where: str) -> Iterator[None]:
    def end():
        proxies = [name for name in os.environ if name.lower().endswith("_proxy")]
        complain(
            f"The other processes were not there within {seconds} s (this is {where}). Start all "
            "of them, with the same --num_processes and --coordinator and each with another "
            "--process_id; the coordinator's host is that of process 0, and its port must be open."
            + (f" Proxies may be in the way: unset {', '.join(proxies)}." if proxies else "")
        )
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def connect(mesh: Mesh) -> None:
    """Open the connections that computations on a mesh of several processes' CPU devices need.

    gloo opens them when a group of devices first computes together, and gives up where one of them
    comes 30 s later than the others, as may be after long compilation. Here all come at once.
    """
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    axes = [name for name, size in mesh.shape.items() if size > 1]
    groups = [group for n in range(len(axes)) for group in itertools.combinations(axes, n + 1)]

    def add(x):
        return [jax.lax.psum(x, group) for group in groups]

    add = jax.shard_map(add, mesh=mesh, in_specs=P(), out_specs=P())
    zero = np.float32(0)
    compiled = jax.jit(add).lower(zero).compile()
    _client().wait_at_barrier(f"refine_jax/connect/{next(_connections)}", 1000 * TIMEOUT)
    jax.block_until_ready(compiled(zero))


# A line of gloo consists of these; lines of two threads may stand in each other.
_GLOO = re.compile(
    rb"\[Gloo\] Rank \d+| is connected to \d+ peer ranks\. "
    rb"|Expected number of connected peer ranks is : \d+"
)


def _leave_out_gloo_lines() -> None:
    """From here on, keep off standard output the lines in which gloo says that it is connected.

    It writes them past Python, at any time, while commands promise JSON as their last line. Python
    goes on with a copy of the output; what else is written past it is passed on.
    """
    try:
        if sys.stdout.fileno() != 1:
            return
    except (AttributeError, OSError, ValueError):  # there is none, or no file, as in a notebook
        return
    sys.stdout.flush()
    output, python = os.dup(1), sys.stdout
    buffering = 1 if python.line_buffering else -1
    sys.stdout = open(output, "w", buffering, python.encoding, python.errors)  # noqa: SIM115
    read, write = os.pipe()
    os.dup2(write, 1)
    os.close(write)

    def pass_on() -> None:
        with open(read, "rb") as lines:
            for line in lines:
                rest = _GLOO.sub(b"", line)
                if rest == line or rest.strip():
                    os.write(output, rest)

    threading.Thread(target=pass_on, daemon=True).start()


def is_writer() -> bool:
    """Tell whether this process writes files and prints: process 0."""
    return jax.process_index() == 0


def say(message: str) -> None:
    """Print a line, on process 0."""
    if is_writer():
        print(message, flush=True)


def gather(value: int) -> list[int]:
    """Collect the numbers (32 bits) that the processes call this with, by process."""
    if jax.process_count() == 1:
        return [value]
    return multihost_utils.process_allgather(np.int32(value)).tolist()


def gather_json(value: Any) -> list[Any]:
    """Collect the JSON values that the processes call this with, by process."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = gather(len(text))
    # Pad to few lengths, as each length is another program.
    padded = np.zeros(1 << max(sizes).bit_length(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def fetch(tree: Any) -> Any:
    """Copy the arrays of a tree to numpy arrays, whole, on every process."""

    def whole(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.device_get(jax.tree.map(whole, tree))


def check_same(what: str, value: str) -> None:
    """Raise ProcessError unless all processes call this with the same text."""
    digest = hashlib.blake2b(value.encode(), digest_size=4).digest()
    digests = gather(int.from_bytes(digest, "little", signed=True))
    others = [str(index) for index, number in enumerate(digests) if number != digests[0]]
    if others:
        raise ProcessError(
            f"The processes do not have the same {what}: {', '.join(others)} of {len(digests)} "
            "differ from process 0. Start the same command, version and data on every host."
        )


def check_shared(folder: str | os.PathLike) -> None:
    """Raise ProcessError unless all processes see what process 0 writes to a folder.

    The folder need not be there, and is not afterwards if it was not before.
    """
    if jax.process_count() == 1:
        return
    folder = path_of(folder).expanduser().absolute()
    mark = folder / f".shared-{gather(secrets.randbits(30))[0]}"
    made: list[Path] = []
    if is_writer():
        made = missing_folders(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(mark, b"")
    gather(0)
    seen = gather(mark.exists())
    if is_writer():
        mark.unlink()
        with contextlib.suppress(OSError):  # another process is using it already
            for path in made:
                path.rmdir()
    if not all(seen):
        blind = [str(index) for index, sees in enumerate(seen) if not sees]
        raise ProcessError(
            f"--workdir must be a folder that all processes share. Process {', '.join(blind)} of "
            f"{len(seen)} did not see what process 0 wrote to {folder}."
        )


class _Watcher:
    """Ends this process when another one reports a failure."""

    def __init__(self):
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        return self._thread is not None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # runs before jax's own, which ends the connection

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_POLL):
            failure = self.failure()
            if failure is not None:
                complain(failure)
                sys.stdout.flush()
                lock.release_all()
                os._exit(1)

    def failure(self) -> str | None:
        """Read what the first process that failed said of it."""
        try:
            return _client().key_value_try_get(_FAILURE)
        except RuntimeError:  # there is none
            return None

    def report(self, message: str) -> None:
        with contextlib.suppress(RuntimeError):  # another one was first
            _client().key_value_set(_FAILURE, f"process {jax.process_index()} failed: {message}")


_watcher = _Watcher()


def _client() -> Any:
    # jax has no public access to the store of its coordinator; Orbax goes the same way.
    from jax._src import distributed

    return distributed.global_state.client


def report_failure(error: BaseException) -> None:
    """Tell the other processes why this one is about to end; they end with the message."""
    if _watcher.running:
        _watcher.report(describe(error))


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Where the block fails or exits with another code than 0, all processes end.

    Without this they would wait for each other until jax gives up, minutes later.
    """
    try:
        yield
    except BaseException as error:
        if not _watcher.running or (isinstance(error, SystemExit) and not error.code):
            raise
        _watcher.stop()
        code = 1
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
        elif isinstance(error, KeyboardInterrupt):
            code = INTERRUPTED
            _watcher.report("interrupted")
            print("interrupted", file=sys.stderr)
        elif output_is_closed(error):
            code = OUTPUT_CLOSED
            _watcher.report("nobody reads its output any more")
        else:
            _explain(error)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(2 * _POLL)  # the others learn of failures from this process
        os._exit(code)


def _explain(error: BaseException) -> None:
    """Print why this process ends: the failure of another one, where that broke a connection."""
    # While a result is fetched, jax raises its error as a ValueError.
    shared = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    failure = _watcher.failure()
    if failure is None and shared:
        time.sleep(_POLL)
        failure = _watcher.failure()
    if failure is not None:
        complain(failure)
        return
    _watcher.report(f"{type(error).__name__}: {error}")
    traceback.print_exception(error)
    if shared:
        complain(
            "The processes cannot go on together. If the lines above tell of lost connections, "
            "another process was killed or its host is gone; the same commands continue the run."
        )


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
        """Tell whether a signal came to any process; all ask at the same step.

        `signal` is then set on all of them.
        """
        mine = 0 if self.signal is None else signal.Signals[self.signal].value
        first = max(gather(mine))
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
