"""What a run has written: the records of `metrics.jsonl`, the figures and the table made of them.

`metrics.jsonl` holds one JSON object a step, in order: `step`, the training metrics of that step
and, where the step was evaluated, `eval/...`. Step 0 holds the evaluation before training. Numbers
that are not finite are written as null.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from refine_jax.base.errors import DataError
from refine_jax.base.files import json_field, parse_object, path_of, read_lines, short, write_text

METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "results.json"
EDGE = 10
"""Steps at either end of ReFINE training whose rewards the results average."""
ANSWER_FIGURES = ("exact", "score", "prompt_loss")
"""Held-out figures that post-training has and mid-training has not."""


def read_metrics(path: Path) -> list[dict]:
    """Read a `metrics.jsonl` or `predictions.jsonl`, oldest record first; none without a file.

    Lines that are no JSON objects are left out, such as a last one that a crash cut off.
    """
    return read_lines(path, _fields)[0] if path.exists() else []


def _fields(line: bytes) -> dict:
    return parse_object(line, "it", DataError)


def step_parser() -> Callable[[bytes], dict]:
    """Make a parser of one `metrics.jsonl`: numbers and nulls by name, each step once."""
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


def total_seconds(history: list[dict]) -> float:
    """Find the seconds of the run up to its last record that says so."""
    totals = (record.get("time/total") for record in reversed(history))
    return next((total for total in totals if total is not None), 0.0)


def summarize(history: list[dict]) -> dict:
    """Compute a run's figures: before, after, rewards of first and last ReFINE steps, times.

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
    results["seconds_total"] = total_seconds(history)
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


class TaskKind(NamedTuple):
    """A kind of figures of tasks answered while training, and how it is drawn.

    prefix: of the figures' names. scale: factor to `unit`.
    """

    prefix: str
    title: str
    unit: str
    scale: float


TASK_KINDS = (
    TaskKind("eval/task/", "Tasks", "score, %", 100.0),
    TaskKind("eval/position/", "Loss by tokens of context", "nats a token", 1.0),
)


def task_figures(records: Iterable[Mapping]) -> dict[TaskKind, list[str]]:
    """Find the names of figures of tasks answered while training, by their kind, in order."""
    names = dict.fromkeys(name for record in records for name in record)
    return {kind: [n for n in names if n.startswith(kind.prefix)] for kind in TASK_KINDS}


def is_refine(record: Mapping) -> bool:
    """Tell whether a training step's record is one of ReFINE, with rollouts or without."""
    return "reward/mean" in record or "policy/expected_match" in record


def write_results(workdir: Path, results: Mapping) -> None:
    """Save the figures as `results.json`, replaced whole."""
    write_text(path_of(workdir) / RESULTS_FILE, json.dumps(dict(results), indent=2) + "\n")


def table(results: Mapping) -> str:
    """Write the closing table: before and after on held-out documents, rewards, step times."""
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
