"""Trainings from one start that are asked the same questions: which recalls more, and by how much?

    WORKDIR/report.html  results.json
            ntp/ refine/ ...                          a run of mid-training for each arm
            answers-before/ answers-ntp/ ...          an evaluation of the start, and of each arm
            answers-adapted/                          of the last arm, trained on each prompt

Every part is a run of its own, in a folder of its own: the same command goes on where it was
stopped. Arms differ in the section `refine` alone, and see the same rows in the same order.
"""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from refine_jax import distributed
from refine_jax.base.files import given_path
from refine_jax.config import Config, RefineConfig
from refine_jax.evaluation import intervals
from refine_jax.phases import evaluate, midtrain, testtime
from refine_jax.phases.setup import only_run_in
from refine_jax.presets import PRESETS
from refine_jax.report.metrics import write_results
from refine_jax.report.page import PAGE_FILE, write_page
from refine_jax.report.runs import Run, read_run
from refine_jax.report.trackers import check_trackers

BEFORE, ADAPTED = "answers-before", "answers-adapted"


class Part(NamedTuple):
    """A run of the comparison: its folder's name, the module of its phase, its configuration."""

    name: str
    phase: ModuleType
    config: Config


def list_parts(config: Config, workdir: Path) -> list[Part]:
    """List the runs in their order, each with the configuration of a run of its own."""
    # The rows must not depend on how many tokens an arm's rollouts need.
    methods = {arm: _method(config.refine, arm) for arm in config.compare.arm_names}
    if config.data.min_remainder is None:
        needed = max(method.tokens_needed for method in methods.values())
        rows = min(needed, config.data.sequence_length)
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, min_remainder=rows)
        )
    asked = dataclasses.replace(config, phase="evaluate")
    parts = [Part(BEFORE, evaluate, asked)]
    for arm, method in methods.items():
        trained = dataclasses.replace(config, phase="midtrain", refine=method)
        parts.append(Part(arm, midtrain, trained))
        parts.append(Part(f"answers-{arm}", evaluate, _of(asked, workdir / arm)))
    if config.compare.adapted:
        adapted = dataclasses.replace(
            _of(config, workdir / arm),
            phase="testtime",
            refine=method,
            evaluate=dataclasses.replace(config.evaluate, samples=config.compare.adapted),
            testtime=dataclasses.replace(config.testtime, answer_before=True),
        )
        parts.append(Part(ADAPTED, testtime, adapted))
    return parts


def _method(refine: RefineConfig, arm: str) -> RefineConfig:
    if arm == "ntp":
        return dataclasses.replace(refine, objective="ntp")
    return dataclasses.replace(refine, objective="refine", **PRESETS.get(arm, {}))


def _of(config: Config, run: Path) -> Config:
    """The configuration with the model that a run has trained."""
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, checkpoint=str(run), fresh=None)
    )


def run(config: Config, workdir: str | Path) -> dict:
    """Compare in the folder `workdir`, or go on with it, and report.

    Returns the figures of `summarize`; `seconds` and, of all cores together, `processor_seconds`
    are what this start took. After a signal: {"interrupted": its name, "part": the name of the run
    that was stopped}. Raises ConfigError, ModelConfigError, DataError, CheckpointError: bad input;
    RunError: training cannot go on.
    """
    workdir = given_path(workdir, "workdir", write=True).absolute()
    check_trackers(config.train.tracker_names or [])  # not after the first of the answers
    parts = list_parts(config, workdir)
    begin, spent = time.perf_counter(), time.process_time()
    with only_run_in(workdir), _programs_kept():
        for number, part in enumerate(parts, 1):
            distributed.say(f"\n=== {part.name} ({number} of {len(parts)})")
            results = part.phase.run(part.config, workdir / part.name)
            if "interrupted" in results:
                return {"interrupted": results["interrupted"], "part": part.name}
        runs = {part.name: read_run(workdir / part.name) for part in parts}
        figures = summarize(runs, config.compare.arm_names)
        figures["seconds"] = round(time.perf_counter() - begin, 1)
        figures["processor_seconds"] = round(time.process_time() - spent, 1)
        if distributed.is_writer():
            write_results(workdir, figures)
            write_page(workdir / PAGE_FILE, list(runs.values()))
    distributed.say(f"\n{table(figures)}\n\nPage with all of it: {workdir / PAGE_FILE}")
    return figures


@contextlib.contextmanager
def _programs_kept() -> Iterator[None]:
    """Let the parts share what they compile; in a folder of this process if none is named."""
    if jax.config.jax_compilation_cache_dir is not None:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="refine-jax-compiled-") as folder:
        _keep_programs_in(folder)
        try:
            yield
        finally:
            _keep_programs_in(None)


def _keep_programs_in(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # jax looks at the setting once


def summarize(runs: Mapping[str, Run], arms: Sequence[str]) -> dict[str, Any]:
    """Compute the figures of a comparison from its runs, by the names of their folders.

    scores: {set: {"before" or an arm: mean score}}, fractions from 0 to 1; where there are several
    sets, those of all prompts together stand under "all". training: for each arm
    its figures (`refine_jax.report.metrics.summarize`). differences: of every set and arm but the
    first, from the first, paired by question (`refine_jax.evaluation.intervals.compare`). adapted:
    such a difference for each set, of answers after training on the prompt from those before.
    """
    answers = {name: _by_set(runs[f"answers-{name}"].predictions) for name in ("before", *arms)}
    sets = list(answers["before"])
    adapted = _by_set(runs[ADAPTED].predictions) if ADAPTED in runs else {}
    first, *others = arms
    return {
        "scores": {
            name: {arm: _mean(_scores(found[name])) for arm, found in answers.items()}
            for name in sets
        },
        "training": {arm: runs[arm].figures() for arm in arms},
        "differences": [
            {"arm": arm, "from": first, "set": name}
            | _difference(_scores(answers[first][name]), _scores(answers[arm][name]))
            for arm in others
            for name in sets
        ],
        "adapted": [
            {"set": name}
            | _difference(_scores([record["before"] for record in records]), _scores(records))
            for name, records in adapted.items()
        ],
    }


def _by_set(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    sets: dict[str, list[Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["id"]):
        sets.setdefault(record["set"], []).append(record)
    if len(sets) > 1:
        sets["all"] = [record for found in sets.values() for record in found]
    return sets


def _scores(records: Sequence[Mapping[str, Any]]) -> list[float]:
    return [record["score"] for record in records]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _difference(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    return dataclasses.asdict(intervals.compare(before, after))


def table(figures: Mapping[str, Any]) -> str:
    """The closing table: scores and held-out figures of each arm, then the differences."""
    scores, training = figures["scores"], figures["training"]
    columns = ["before", *training]
    width = max(24, *(len(name) + 2 for name in scores))
    lines = [" " * width + "".join(f"{name:>12}" for name in columns)]
    lines.append("-" * len(lines[0]))
    for name, row in scores.items():
        lines.append(
            f"{f'{name} (%)':{width}}" + "".join(f"{100 * row[c]:>12.1f}" for c in columns)
        )
    for label, name, digits in (
        ("held-out loss (nats)", "validation_loss", 4),
        ("held-out reward", "validation_reward", 3),
        ("seconds a step", None, 3),
    ):
        cells = []
        for arm in columns:
            found = training.get(arm, next(iter(training.values())))
            if name:
                value = found[f"{name}_{'before' if arm == 'before' else 'after'}"]
            else:
                steps = (found["step_seconds_refine"], found["step_seconds_ntp"])
                value = None if arm == "before" else next((x for x in steps if x), None)
            cells.append("-" if value is None else f"{value:.{digits}f}")
        lines.append(f"{label:{width}}" + "".join(f"{cell:>12}" for cell in cells))
    lines.append("")
    for found in figures["differences"]:
        lines.append(f"{found['set']}: {found['arm']} - {found['from']} {_points(found)}")
    for found in figures["adapted"]:
        lines.append(f"{found['set']}: trained on the prompt - not {_points(found)}")
    return "\n".join(lines)


def _points(found: Mapping[str, Any]) -> str:
    difference, low, high = (100 * found[name] for name in ("difference", "low", "high"))
    return (
        f"{difference:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}, p "
        f"{found['p_value']:.3f}, {found['samples']:,} prompts)"
    )
