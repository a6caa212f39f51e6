"""Malformed input of every kind, for tests/test_fuzz.py and from the command line:

    JAX_PLATFORMS=cpu python tests/fuzz.py --minutes=10 [--group=records] [--seed=1]

The law: whatever a file from outside or a setting holds, reading it succeeds, or ends in one of our
errors that names the file or the field, within a second of processor time and 200 MB. Where what is
read was written by us with fingerprints, success means that it is what was written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from refine_jax.base.errors import UserError

SECONDS = 1.0
"""Most processor time of an input, of all threads."""
MEGABYTES = 200
"""Most memory that an input may add at its peak."""
HANG = 30
"""Seconds after which an input counts as hanging."""
LONGEST_MESSAGE = 4000
BATCH = 25  # inputs between two looks at the clock


@dataclasses.dataclass(frozen=True)
class Group:
    """One kind of input.

    prepare: makes what all inputs start from in a folder, once, and returns it.
    attempt: draws an input, writes it into an empty folder and reads it; returns the words of which
        an error must hold one. It raises `Wrong` for an input that was taken for another.
    """

    prepare: Callable[[Path], Any]
    attempt: Callable[[Draw, Any, Path], None]
    names: tuple[str, ...] = ()


class Wrong(AssertionError):
    """Something damaged that was taken for what was written."""


class Hang(BaseException):
    """An input took too long; no handler of errors takes this for one."""


@dataclasses.dataclass
class Tally:
    """What became of the inputs of a group."""

    outcomes: Counter = dataclasses.field(default_factory=Counter)
    seconds: float = 0.0  # the longest of an input
    megabytes: float = 0.0  # the most of an input
    failures: list[str] = dataclasses.field(default_factory=list)


# ---- Drawing ----

_TEXTS = ("", " ", "x", "12", "true", "null", "../x", "/etc/passwd", "gs:/bucket/x", "\ufeffx")
_TEXTS += ("\ud83d", "\x00", "é" * 3, "x" * 3000, "</s>", "²", "1e5", "[1]", "{}", "NaN")
_NUMBERS = (0, 1, -1, 2, 7, 2.5, -0.0, 1e308, 1e-320, math.nan, math.inf, -math.inf)
_NUMBERS += (2**31, 2**32, 2**63, -(2**63) - 1, 10**30, 10**9, 1.0, 64.0)


def values() -> st.SearchStrategy:
    """Any JSON value, odd ones often."""
    leaves = st.one_of(
        st.sampled_from([None, True, False, [], {}, *_TEXTS, *_NUMBERS]),
        st.text(max_size=8),
        st.integers(),
        st.floats(),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
        ),
        max_leaves=5,
    )


class Draw:
    """Draws for one input."""

    def __init__(self, data: st.DataObject):
        self._data = data

    def __call__(self, strategy: st.SearchStrategy) -> Any:
        return self._data.draw(strategy)

    def one_of(self, *choices: Any) -> Any:
        """One of the choices."""
        return self(st.sampled_from(choices))

    def number(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return self(st.integers(low, high))

    def value(self) -> Any:
        """Any JSON value."""
        return self(values())

    def json(self, base: Any) -> Any:
        """A JSON value like `base`, with one to three things wrong."""
        for _ in range(self.number(1, 3)):
            base = self._changed(base)
        return base

    def _changed(self, value: Any) -> Any:
        if isinstance(value, dict) and value and self.number(0, 5):
            key = self(st.sampled_from(sorted(value)))
            if self.number(0, 5) == 0:
                return {name: entry for name, entry in value.items() if name != key}
            return {**value, key: self._changed(value[key])}
        if isinstance(value, list) and value and self.number(0, 4):
            at = self.number(0, len(value) - 1)
            return [*value[:at], self._changed(value[at]), *value[at + 1 :]]
        return self.value()

    def bytes(self, base: bytes) -> bytes:
        """Bytes like `base`, damaged in one of many ways."""
        at = self.number(0, max(len(base) - 1, 0))
        way = self.number(0, 13)
        if way <= 3:  # flipped bytes, anywhere
            damaged = bytearray(base)
            for _ in range(self.number(1, 4)):
                if damaged:
                    damaged[self.number(0, len(damaged) - 1)] ^= self.number(1, 255)
            return bytes(damaged)
        noise = self(st.binary(max_size=40))
        return {
            4: lambda: base[:at],
            5: lambda: base[:at] + noise + base[at:],
            6: lambda: base[:at] + base[at + 1 + len(noise) :],
            7: lambda: noise,
            8: lambda: b"\xef\xbb\xbf" + base,
            9: lambda: base.decode("latin-1").encode("utf-16"),
            10: lambda: base + noise,
            11: lambda: b"[" * self.one_of(10, 1000, 200_000) + noise,
            12: lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n",
            13: lambda: base[:at] + bytes(self.one_of(1, 64, 100_000)) + base[at:],
        }[way]()


def dump(value: Any) -> bytes:
    """JSON as Python writes it, lone surrogates and NaN too."""
    return json.dumps(value).encode()


def write(path: Path, content: bytes) -> Path:
    """Write a file, its folders too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# ---- Running ----


def run_group(
    group: Group,
    tally: Tally,
    *,
    seconds: float,
    number: int = 0,
    limit: float = SECONDS,
    stop_at_failure: bool = False,
) -> Tally:
    """Try inputs of a group until the time is up.

    number: the seed. limit: most seconds of processor time of an input; those of the first batch,
    which import what they need, may take any. stop_at_failure: raise the first failure, as small as
    hypothesis can make it.
    """
    with tempfile.TemporaryDirectory() as made:
        base = group.prepare(Path(made) / "base")
        end = time.monotonic() + seconds

        def trial(data: st.DataObject) -> None:
            most = limit if batch else math.inf
            with tempfile.TemporaryDirectory(dir=made) as folder:
                problem = _try(group, Draw(data), base, Path(folder), tally, most)
            if problem:
                tally.failures.append(problem)
                if stop_at_failure:
                    raise AssertionError(problem)

        # hypothesis has no limit of time: it is asked for few examples many times.
        for batch in itertools.count():
            options = settings(
                max_examples=BATCH,
                deadline=None,
                database=None,
                phases=[Phase.generate, *([Phase.shrink] if stop_at_failure else [])],
                suppress_health_check=list(HealthCheck),
            )
            seed(1000 * number + batch)(options(given(st.data())(trial)))()
            if time.monotonic() > end:
                return tally


def _try(
    group: Group, draw: Draw, base: Any, folder: Path, tally: Tally, limit: float
) -> str | None:
    """Try one input; returns what was wrong with how it was taken."""
    problem = None
    with _time_limit(), _peak_memory() as memory, contextlib.redirect_stdout(io.StringIO()):
        begin = time.process_time()
        try:
            group.attempt(draw, base, folder)
            outcome = "accepted"
        except UserError as error:
            outcome, problem = "message", _check_message(str(error), group, folder)
        except Hang:
            outcome, problem = "hang", "".join(traceback.format_exc())
        except Wrong as error:
            outcome, problem = "wrong", str(error)
        except Exception as error:
            if type(error).__module__.startswith("hypothesis"):
                raise
            outcome, problem = "traceback", traceback.format_exc()
        seconds = time.process_time() - begin
    tally.outcomes[outcome] += 1
    if limit < math.inf:
        tally.seconds = max(tally.seconds, seconds)
    tally.megabytes = max(tally.megabytes, memory())
    if problem is None and seconds > limit:
        tally.outcomes["slow"] += 1
        problem = f"{outcome} after {seconds:.1f} s"
    if problem is None and memory() > MEGABYTES and limit < math.inf:
        tally.outcomes["large"] += 1
        problem = f"{outcome} with {memory():.0f} MB"
    return problem and f"{problem}\n{_show(folder)}"


def _check_message(message: str, group: Group, folder: Path) -> str | None:
    """What is wrong with a message."""
    if len(message) > LONGEST_MESSAGE:
        return f"a message of {len(message)} characters: {message[:300]}"
    if not any(name in message for name in (folder.name, *group.names)):
        return f"a message that names neither file nor field: {message}"
    if "Traceback" in message:
        return f"a message that is a traceback: {message}"
    return None


def _show(folder: Path) -> str:
    """The files of an input, for a person."""
    lines = []
    for path in sorted(folder.rglob("*"))[:20]:
        if path.is_file() and path.stat().st_size:
            lines.append(f"{path.relative_to(folder)}: {path.read_bytes()[:600]!r}")
    return "\n".join(lines)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def end(number, frame):
        raise Hang

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _peak_memory() -> Iterator[Callable[[], float]]:
    """Megabytes by which the peak of the memory lies above its start; 0 where Linux is not."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    peak: list[float] = []
    try:
        yield lambda: peak[0] if peak else _resident("VmHWM") - before
    finally:
        peak.append(max(0.0, _resident("VmHWM") - before))


def _resident(name: str) -> float:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 1024
    return 0.0


def _kind(failure: str) -> str:
    """What failures of one cause have in common: where the error was raised."""
    frames = [line for line in failure.splitlines() if line.startswith('  File "')]
    return next((line for line in reversed(frames) if "refine_jax" in line), failure[:60])


def main() -> None:
    """The command line: a table, and one JSON line last."""
    from fuzz_groups import GROUPS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="for all groups together")
    parser.add_argument("--group", choices=GROUPS, action="append", help="only these groups")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    names = options.group or list(GROUPS)
    results = {}
    print(f"seed {options.seed}\n{'group':20}{'tried':>7}{'messages':>9}{'accepted':>9}", end="")
    print(f"{'tracebacks':>11}{'hangs':>6}{'other':>6}{'s':>7}{'MB':>6}")
    for name in names:
        tally = run_group(
            GROUPS[name],
            Tally(),
            seconds=60 * options.minutes / len(names),
            number=options.seed,
        )
        kinds = tally.outcomes
        other = kinds["wrong"] + kinds["slow"] + kinds["large"]
        tried = sum(kinds.values()) - kinds["slow"] - kinds["large"]
        # A message that names nothing is a failure, too.
        unclear = len(tally.failures) - other - kinds["traceback"] - kinds["hang"]
        row = (tried, kinds["message"], kinds["accepted"], kinds["traceback"], kinds["hang"])
        print(f"{name:20}{row[0]:7}{row[1]:9}{row[2]:9}{row[3]:11}{row[4]:6}", end="")
        print(f"{other + unclear:6}{tally.seconds:7.2f}{tally.megabytes:6.0f}", flush=True)
        results[name] = dict(kinds) | {"tried": tried, "failures": len(tally.failures)}
        results[name] |= {"seconds": tally.seconds, "megabytes": tally.megabytes}
        for failure in {_kind(failure): failure for failure in tally.failures}.values():
            print(f"--- {name}: {failure}\n", file=sys.stderr, flush=True)
    print(json.dumps({"seed": options.seed, "groups": results}))
    if any(result["failures"] for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    import fuzz  # not this copy of it: the groups raise its `Wrong`

    fuzz.main()
