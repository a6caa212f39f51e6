"""What a run reports: progress, `metrics.jsonl`, TensorBoard, the closing table, `results.json`.

`metrics.jsonl` holds one JSON object a step, in order: `step`, the training metrics of that step
and, where the step was evaluated, `eval/...`. Step 0 holds the evaluation before training. Numbers
that are not finite are written as null. The plots are in `refine_jax.plots`.
"""

import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

from refine_jax.base.errors import DataError
from refine_jax.base.files import (
    json_field,
    numbered,
    parse_object,
    read_lines,
    recover_lines,
    replacing,
    short,
    write_text,
)

METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "results.json"
EDGE = 10
"""Steps at either end of ReFINE training whose rewards the results average."""
ANSWER_FIGURES = ("exact", "score", "prompt_loss")
"""Held-out figures that post-training has and mid-training has not."""


class Monitor:
    """Writes the metrics of a run as it goes and remembers them for the closing table.

    Args:
      workdir: Existing folder; `metrics.jsonl` and `tensorboard/` are made in it.
      steps: Steps of the whole run.
      start: Steps already done: records after it, left by a run that went on beyond its last
        checkpoint, are removed, so that the file continues without duplicates. Lines that are no
        records go to `metrics.jsonl.dropped`; that, and steps that are missing, is said.
      log_every: Steps between lines on standard output; 0: none. The progress bar is separate and
        shown on a terminal only.
      write: Whether this process writes and prints; the others of a run only remember.

    Attributes:
      history: The records of the file, oldest first.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        steps: int,
        start: int = 0,
        log_every: int = 10,
        write: bool = True,
    ):
        self._steps, self._log_every = steps, log_every if write else 0
        path = Path(workdir) / METRICS_FILE
        parse = _step_parser()
        if write:
            records = recover_lines(path, parse, self.say)
        else:
            records = read_lines(path, parse)[0] if path.exists() else []
        self.history = [record for record in records if record["step"] <= start]
        self.history.sort(key=lambda record: record["step"])
        self._file = self._tensorboard = None
        if write:
            there = {record["step"] for record in self.history}
            missing = [step for step in range(1, start + 1) if step not in there]
            if missing:
                self.say(f"{path} lacks {numbered('step', missing)} of the {start} done before.")
            with replacing(path) as part, part.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in self.history)
            self._file = path.open("a", encoding="utf-8")
            self._tensorboard = _tensorboard_writer(Path(workdir) / "tensorboard")
        self._before = _total(self.history)
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
        """Seconds of the run so far, those before an interruption included."""
        return self._before + time.perf_counter() - self._started

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of one step, flushed to the file before this returns."""
        record = {"step": step}
        record |= {name: _number(value) for name, value in metrics.items()}
        record["time/total"] = round(self.seconds, 3)
        self.history.append(record)
        if self._file:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        for name, value in record.items():
            if self._tensorboard and name != "step" and value is not None:
                self._tensorboard.add_scalar(name, value, step)
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix_str(_brief(record), refresh=False)
        evaluated = any(name.startswith("eval/") for name in record)
        if self._log_every and (step % self._log_every == 0 or evaluated or step == self._steps):
            self.say(f"step {step}/{self._steps}  {_brief(record)}{self._time_left(step)}")

    def say(self, message: str) -> None:
        """Print a line on standard output without breaking the progress bar."""
        with tqdm.external_write_mode(file=sys.stdout):
            print(message, flush=True)

    def close(self) -> None:
        """Close the files and end the progress bar."""
        self._bar.close()
        if self._file:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()

    def __enter__(self) -> "Monitor":
        return self

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


def read_metrics(path: Path) -> list[dict]:
    """Records of a `metrics.jsonl` or `predictions.jsonl`, oldest first; none if there is no file.

    Lines that are no JSON objects are left out, such as a last one that a crash cut off.
    """
    return read_lines(path, _fields)[0] if path.exists() else []


def _fields(line: bytes) -> dict:
    return parse_object(line, "it", DataError)


def _step_parser() -> Callable[[bytes], dict]:
    """A parser of the lines of one `metrics.jsonl`: numbers and nulls by name, each step once."""
    seen: set[int] = set()

    def parse(line: bytes) -> dict:
        record = _fields(line)
        step = json_field(record, "step", int, where="it", error=DataError)
        if step is None or not 0 <= step < 1 << 53:
            raise DataError(f"it must have a step, a whole number. Got: {short(step)}")
        for name, value in record.items():
            if value is not None and not _is_finite(value):
                raise DataError(f"{name} must be a number. Got: {short(value)}")
        if step in seen:
            raise DataError(f"step {step} is there already")
        seen.add(step)
        return record

    return parse


def _is_finite(value: object) -> bool:
    try:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _total(history: list[dict]) -> float:
    """Seconds of the run up to its last record that says so."""
    totals = (record.get("time/total") for record in reversed(history))
    return next((total for total in totals if total is not None), 0.0)


def summarize(history: list[dict]) -> dict:
    """Figures of a run: before and after, rewards of its first and last ReFINE steps, times.

    Values are None where the run has no such figure; figures of answers are there in post-training
    only. Step times are medians, in seconds, over the steps of one kind, the first (which compiles)
    left out where there are others.
    """
    evaluations = [record for record in history if "eval/loss" in record]
    before = evaluations[0] if evaluations and evaluations[0]["step"] == 0 else {}
    after = evaluations[-1] if evaluations and evaluations[-1]["step"] > 0 else {}
    training = [record for record in history if "time/step" in record]
    rewarded = [record for record in training if "reward/mean" in record]
    answers = [record for record in training if "time/answers" in record]
    others = [record for record in training if "time/answers" not in record]
    refine = [record for record in others if is_refine(record)]
    plain = [record for record in others if not is_refine(record)]
    results: dict = {"steps": history[-1]["step"] if history else 0}
    results["seconds_total"] = _total(history)
    named = {name for record in evaluations for name in record}
    for name in ("loss", "accuracy", "entropy", "reward", *ANSWER_FIGURES):
        if name in ANSWER_FIGURES and f"eval/{name}" not in named:
            continue
        results[f"validation_{name}_before"] = before.get(f"eval/{name}")
        results[f"validation_{name}_after"] = after.get(f"eval/{name}")
    results["mean_reward_first_10"] = _mean(rewarded[:EDGE], "reward/mean")
    results["mean_reward_last_10"] = _mean(rewarded[-EDGE:], "reward/mean")
    results["refine_steps"], results["ntp_steps"] = len(refine), len(plain)
    results["step_seconds_refine"] = _median(refine, "time/step")
    results["step_seconds_collect"] = _median(refine, "time/collect")
    results["step_seconds_ntp"] = _median(plain, "time/step")
    if answers:
        results["posttrain_steps"] = len(answers)
        results["step_seconds_posttrain"] = _median(answers, "time/step")
    results["tokens_per_second"] = _median(answers or refine or plain, "tokens_per_second")
    results["skipped_updates"] = training[-1].get("update/skipped", 0) if training else 0
    return results


def is_refine(record: Mapping) -> bool:
    """Whether the record of a training step is one of ReFINE, with rollouts or without."""
    return "reward/mean" in record or "policy/expected_match" in record


def write_results(workdir: Path, results: Mapping) -> None:
    """Save the figures as `results.json`, replaced whole."""
    write_text(Path(workdir) / RESULTS_FILE, json.dumps(dict(results), indent=2) + "\n")


def table(results: Mapping) -> str:
    """The closing table: before and after on held-out documents, rewards, step times."""
    head = f"{'':28}{'before':>12}{'after':>12}{'change':>12}"
    lines = []
    of = "answers'" if "posttrain_steps" in results else "validation"
    for label, name in (
        (f"{of} loss (nats)", "validation_loss"),
        (f"{of} accuracy", "validation_accuracy"),
        ("validation entropy (nats)", "validation_entropy"),
        ("validation mean reward", "validation_reward"),
        ("exact answers", "validation_exact"),
        ("score of greedy answers", "validation_score"),
        ("prompts' loss (nats)", "validation_prompt_loss"),
    ):
        before, after = (results.get(f"{name}_{when}") for when in ("before", "after"))
        if (before, after) != (None, None):
            lines.append(_row(label, before, after))
    if lines:  # without held-out documents there is nothing to compare
        lines = [head, "-" * len(head), *lines]
    first, last = results["mean_reward_first_10"], results["mean_reward_last_10"]
    if first is not None and results["refine_steps"] + results.get("posttrain_steps", 0) > EDGE:
        lines += ["", f"{'':28}{f'first {EDGE}':>12}{f'last {EDGE}':>12}{'change':>12}"]
        lines.append(_row("reward, ReFINE steps", first, last))
    lines.append("")
    for label, seconds, count in (
        ("next-token step", "step_seconds_ntp", "ntp_steps"),
        ("ReFINE step", "step_seconds_refine", "refine_steps"),
        ("post-training step", "step_seconds_posttrain", "posttrain_steps"),
    ):
        if results.get(seconds) is not None:
            lines.append(f"{label:28}{results[seconds]:>10.3f} s   (median of {results[count]})")
    lines.append(f"{'total':28}{results['seconds_total']:>10.1f} s")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `3 min 20 s` or `2 h 5 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _brief(record: Mapping) -> str:
    """The few numbers of a record worth watching."""
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


def _row(label: str, before: float | None, after: float | None) -> str:
    known = [f"{value:>12.4f}" if value is not None else f"{'-':>12}" for value in (before, after)]
    change = f"{'-':>12}" if None in (before, after) else f"{after - before:>+12.4f}"
    return f"{label:28}{''.join(known)}{change}"


def _values(records: list[dict], name: str) -> list[float]:
    return [record[name] for record in records if record.get(name) is not None]


def _mean(records: list[dict], name: str) -> float | None:
    values = _values(records, name)
    return statistics.fmean(values) if values else None


def _median(records: list[dict], name: str) -> float | None:
    values = _values(records[1:] or records, name)
    return statistics.median(values) if values else None


def _number(value) -> float | int | None:
    value = value.item() if hasattr(value, "item") else value
    return value if math.isfinite(value) else None


def _tensorboard_writer(folder: Path):
    """A writer of TensorBoard scalars, or None where the tensorboard package is not installed."""
    with contextlib.suppress(ImportError):
        from tensorboard.summary import Writer

        return Writer(str(folder))
    return None
