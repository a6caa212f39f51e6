"""Figures of an evaluation: means with 95 % intervals, speed, what adaptation cost; as a table."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from refine_jax.evaluation.intervals import interval
from refine_jax.evaluation.metrics import contains

Record = Mapping[str, Any]


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Compute the content of `results.json` from the records of `predictions.jsonl`.

    sets: for each task and length its figures (`summarize_set`). mean: of the sets' means.
    mean_by_task: over the lengths of a task. seconds, new_tokens, tokens_per_second: of
    generation, prompts read in full included. adaptation: `summarize_adaptation`, or None.
    Scores are fractions from 0 to 1, times seconds.
    """
    by_set: dict[str, list[Record]] = {}
    for record in records:
        by_set.setdefault(record["set"], []).append(record)
    sets = {name: summarize_set(part) for name, part in by_set.items()}
    by_task: dict[str, list[float]] = {}
    for figures in sets.values():
        by_task.setdefault(figures["task"], []).append(figures["mean"])
    seconds = math.fsum(r["seconds_read"] + r["seconds_generate"] for r in records)
    new_tokens = sum(r["new_tokens"] for r in records)
    return {
        "samples": len(records),
        "mean": statistics.fmean(figures["mean"] for figures in sets.values()),
        "mean_by_task": {task: statistics.fmean(means) for task, means in by_task.items()},
        "sets": sets,
        "seconds": seconds,
        "new_tokens": new_tokens,
        "tokens_per_second": sum(r["prompt_tokens"] + r["new_tokens"] for r in records)
        / max(seconds, 1e-6),
        "adaptation": summarize_adaptation(records),
    }


def summarize_set(records: Sequence[Record]) -> dict[str, Any]:
    """Average the scores of one task and length, with interval, and describe the prompts."""
    first = records[0]
    score = interval([record["score"] for record in records])
    return {
        "task": first["task"],
        "length": _length(first),
        "metric": first["metric"],
        "mean": score.mean,
        "low": score.low,
        "high": score.high,
        "interval": score.method,
        "samples": score.samples,
        "prompt_tokens": statistics.fmean(record["prompt_tokens"] for record in records),
        "prompts_cut": sum(record["cut_tokens"] > 0 for record in records),
        "tokens_cut": sum(record["cut_tokens"] for record in records),
    }


def summarize_adaptation(records: Sequence[Record]) -> dict[str, Any] | None:
    """Sum what adapting to the prompts cost, and count those too short for all of it.

    seconds_per_example is the median over examples whose time includes no compilation, None where
    there are none; seconds is the sum over all.
    """
    costs = [record["adapt"] for record in records if "adapt" in record]
    if not costs:
        return None
    warm = [cost["seconds"] for cost in costs if not cost["compiled"]]
    return {
        "seconds": math.fsum(cost["seconds"] for cost in costs),
        "seconds_per_example": statistics.median(warm) if warm else None,
        "tokens_per_example": statistics.fmean(cost["tokens"] for cost in costs),
        "rollout_tokens_per_example": statistics.fmean(cost["rollout_tokens"] for cost in costs),
        "examples_without_rollouts": sum(not cost["rollout_tokens"] for cost in costs),
        "examples_not_adapted": sum(not cost["steps"] for cost in costs),
        "examples_with_skipped_updates": sum(cost["skipped"] > 0 for cost in costs),
    }


def table(results: Mapping[str, Any]) -> str:
    """Format the closing table, with a line for each task and length."""
    sets = results["sets"]
    width = max(12, *map(len, sets)) + 2
    head = f"{'':{width}}{'score (%)':>10}{'95 % interval':>18}{'samples':>9}  metric"
    lines = [head, "-" * len(head)]
    for name, figures in sets.items():
        bounds = f"{100 * figures['low']:.1f} - {100 * figures['high']:.1f}"
        lines.append(
            f"{name:{width}}{100 * figures['mean']:>10.1f}{bounds:>18}{figures['samples']:>9}  "
            f"{figures['metric']}"
        )
        if figures["prompts_cut"]:
            lines.append(
                f"{'':{width}}{figures['prompts_cut']:,} prompts cut by {figures['tokens_cut']:,} "
                "tokens in all"
            )
    if len(sets) > 1:
        lines.append(f"{'mean':{width}}{100 * results['mean']:>10.1f}")
    lines += ["", f"{results['tokens_per_second']:,.0f} tokens a second, prompts included"]
    if cost := results["adaptation"]:
        median, total = cost["seconds_per_example"], f"{cost['seconds']:.1f} s in all"
        seconds = f"{total}, compilation included"
        if median is not None:
            seconds = f"{median:.2f} s an example (median, without compilation), {total}"
        lines.append(
            f"adaptation: {seconds}; {cost['tokens_per_example']:,.0f} prompt and "
            f"{cost['rollout_tokens_per_example']:,.0f} rollout tokens an example"
        )
        for count, what in (
            (cost["examples_without_rollouts"], "without rollouts (next-token loss alone)"),
            (cost["examples_not_adapted"], "not adapted, as their prompt has no next token"),
            (cost["examples_with_skipped_updates"], "with updates left out: gradients not finite"),
        ):
            if count:
                lines.append(f"  {count:,} of {results['samples']:,} {what}")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class DepthRecall:
    """Recall of one needle task by length and depth.

    lengths: [N] tokens. depths: [M] upper ends of the bins, per cent of the context.
    recall, counts: N lists of M: fraction of the needles found (None where there are none), and
    number of needles.
    """

    lengths: list[int]
    depths: list[int]
    recall: list[list[float | None]]
    counts: list[list[int]]


def recall_by_depth(records: Sequence[Record], task: str, bins: int = 10) -> DepthRecall | None:
    """Count how often needles at each depth were found; None for a task without depths or lengths.

    A needle counts as found if its own answer is part of the response (case aside).
    """
    hits: dict[tuple[int, int], list[bool]] = {}
    for record in records:
        depths, length = _depths(record), _length(record)
        if record["task"] != task or length is None:
            continue
        for depth, answer in zip(depths, record["answers"], strict=False):
            place = min(int(depth * bins / 100), bins - 1)
            hits.setdefault((length, place), []).append(contains(record["response"], answer))
    if not hits:
        return None
    lengths = sorted({length for length, _ in hits})
    cells = [[hits.get((length, place), []) for place in range(bins)] for length in lengths]
    return DepthRecall(
        lengths,
        [100 * (place + 1) // bins for place in range(bins)],
        [[statistics.fmean(cell) if cell else None for cell in row] for row in cells],
        [[len(cell) for cell in row] for row in cells],
    )


def _depths(record: Record) -> Sequence[float]:
    """Find where in the context each answer's needle lies, in per cent; empty if unknown.

    What files hold under this name may be something else.
    """
    depths = record["metadata"].get("depths")
    if not isinstance(depths, list | tuple) or len(depths) != len(record["answers"]):
        return ()
    known = all(type(depth) in (int, float) and 0 <= depth <= 100 for depth in depths)
    return depths if known else ()


def _length(record: Record) -> int | None:
    """Return the length that a set was asked for, as its name says."""
    task, _, length = record["set"].partition("/")
    del task
    return int(length) if length else None
