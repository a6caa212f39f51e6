"""What a run reports as it goes: progress and `metrics.jsonl`."""

import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from refine_jax.base.files import numbered, path_of, read_lines, recover_lines
from refine_jax.base.growing import Journal
from refine_jax.report.metrics import EDGE, METRICS_FILE, step_parser, total_seconds


class Monitor(contextlib.AbstractContextManager):
    """Writes the metrics of a run as it goes and remembers them for the closing table.

    workdir: existing folder; `metrics.jsonl` is made in it.
    steps: steps of the whole run.
    start: steps already done: records after it, left by a run that went on beyond its last
        checkpoint, are removed, so that the file continues without duplicates. Lines that are no
        records go to `metrics.jsonl.dropped`; that, and steps that are missing, is said.
    log_every: steps between lines on standard output; 0: none. The progress bar is separate and
        shown on a terminal only.
    write: whether this process writes and prints; the others of a run only remember.

    Attributes:
      history: The records of the file, oldest first.
    """

    def __init__(
        self, workdir: Path, *, steps: int, start: int = 0, log_every: int = 10, write: bool = True
    ):
        self._steps, self._log_every = steps, log_every if write else 0
        path = path_of(workdir) / METRICS_FILE
        parse = step_parser()
        if write:
            records = recover_lines(path, parse, self.say)
        else:
            records = read_lines(path, parse)[0] if path.exists() else []
        self.history = [record for record in records if record["step"] <= start]
        self.history.sort(key=lambda record: record["step"])
        self._file = None
        if write:
            there = {record["step"] for record in self.history}
            missing = [step for step in range(1, start + 1) if step not in there]
            if missing:
                self.say(f"{path} lacks {numbered('step', missing)} of the {start} done before.")
            self._file = Journal(path, (json.dumps(record) + "\n" for record in self.history))
        self._before = total_seconds(self.history)
        self._started = time.perf_counter()
        # disable=None: no bar where standard error is not a terminal; the lines remain.
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=None if write else True,
            dynamic_ncols=True,
            smoothing=0.1,
        )

    @property
    def seconds(self) -> float:
        """Count the seconds of the run so far, those before an interruption included."""
        return self._before + time.perf_counter() - self._started

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of one step; they are in the file when this, or `flush`, returns."""
        record = {"step": step}
        record |= {name: _number(value) for name, value in metrics.items()}
        record["time/total"] = round(self.seconds, 3)
        self.history.append(record)
        if self._file:
            self._file.add(json.dumps(record) + "\n")
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix_str(_brief(record), refresh=False)
        evaluated = any(name.startswith("eval/") for name in record)
        if self._log_every and (step % self._log_every == 0 or evaluated or step == self._steps):
            self.say(f"step {step}/{self._steps}  {_brief(record)}{self._time_left(step)}")

    def flush(self) -> None:
        """Return when the metrics of all steps are in the file, also where that is in a bucket."""
        if self._file:
            self._file.flush()

    def say(self, message: str) -> None:
        """Print a line on standard output without breaking the progress bar."""
        with tqdm.external_write_mode(file=sys.stdout):
            print(message, flush=True)

    def close(self) -> None:
        """Close the files and end the progress bar."""
        self._bar.close()
        if self._file:
            self._file.close()

    def __exit__(self, *exception) -> None:
        self.close()

    def _time_left(self, step: int) -> str:
        """Estimate from the last steps, without the time in which they were compiled."""
        recent = [
            record["time/step"] - record.get("time/compile", 0.0)
            for record in self.history[-EDGE:]
            if "time/step" in record
        ]
        if not recent or step == self._steps:
            return ""
        return f"  {duration(statistics.median(recent) * (self._steps - step))} left"


def duration(seconds: float) -> str:
    """Write seconds as `42 s`, `3 min 20 s` or `2 h 5 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _brief(record: Mapping) -> str:
    """Choose the few numbers of a record worth watching."""
    parts = []
    of = "answer " if "eval/exact" in record else ""
    for label, name, form in (
        ("prompt loss" if "time/answers" in record else "loss", "loss/ntp", ".3f"),
        ("reward", "reward/mean", ".3f"),
        ("match", "policy/expected_match", ".3f"),
        ("answer loss", "answer/loss", ".3f"),
        ("score", "answer/score", ".3f"),
        ("grad", "grad/norm", ".2f"),
        ("tok/s", "tokens_per_second", ",.0f"),
        (f"val {of}loss", "eval/loss", ".3f"),
        (f"val {of}acc", "eval/accuracy", ".1%"),
        ("val reward", "eval/reward", ".3f"),
        ("val score", "eval/score", ".3f"),
    ):
        if record.get(name) is not None:
            parts.append(f"{label} {record[name]:{form}}")
    if record.get("update/skipped_in_a_row"):
        parts.append(f"update skipped: gradient not finite ({record['update/skipped']} so far)")
    return "  ".join(parts)


def _number(value) -> float | int | None:
    value = value.item() if hasattr(value, "item") else value
    return value if math.isfinite(value) else None
