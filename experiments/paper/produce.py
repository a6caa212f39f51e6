"""Carries out the runs of a table or figure, those not yet done, and presents what they gave."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import present
import small
from absl import logging
from plan import (
    Figure,
    Paper,
    Run,
    Table,
    add_options,
    build_config,
    in_order,
    start_folder,
)

from refine_jax.base.errors import CheckpointError, ConfigError
from refine_jax.base.files import write_text
from refine_jax.config import DataConfig
from refine_jax.data.sources import find_files
from refine_jax.main import USER_ERRORS

RESULTS, DONE = "results.json", "done.json"


def main(
    describe: Callable[[Paper], Table | Figure],
    name: str,
    about: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """The command of a script; returns the exit status.

    describe: the table or figure. name: of the script, and of its results: WORKDIR/NAME.md (tables)
    or NAME.png (figures) and NAME.json. about: its docstring.
    """
    parser = argparse.ArgumentParser(
        prog=f"python experiments/paper/{name}.py",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    options.workdir = options.workdir or ("runs/paper-small" if options.small else "runs/paper")
    logging.set_verbosity(logging.WARNING)
    try:
        paper = Paper(options)
        return _produce(describe(paper), paper.workdir, name, options)
    except (*USER_ERRORS, ImportError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def _produce(
    artifact: Table | Figure, workdir: Path, name: str, options: argparse.Namespace
) -> int:
    runs = in_order(artifact.runs())
    records = {run.name: _record(run, workdir) for run in runs}
    open_runs = [run for run in runs if not is_done(run, workdir, records[run.name])]
    print(f"{artifact.title}: {len(runs)} runs, {len(runs) - len(open_runs)} of them done")
    if options.list:
        print("\n".join(describe_run(run, workdir) for run in runs))
        return 0
    # Programs recur from run to run.
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if options.small:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} {small.XLA_FLAGS}".strip()
        small.write_data(workdir)
    for run in open_runs:
        check_inputs(run)
    for number, run in enumerate(open_runs, 1):
        print(f"\n=== {number} of {len(open_runs)}: {describe_run(run, workdir)}", flush=True)
        results = _KINDS[run.kind](run, workdir)
        if "interrupted" in results:
            print("Interrupted: the same command continues.", flush=True)
            return 0
        write_text(workdir / run.name / DONE, json.dumps(records[run.name], indent=2) + "\n")
    print()
    present.present(artifact, workdir, name, small=options.small)
    return 0


def check_inputs(run: Run) -> None:
    """Say what a run will miss, before hours are spent on those before it.

    Raises:
      CheckpointError: No published model. DataError: No data. ImportError: No lm-eval.
    """
    if isinstance(run.start, str) and not Path(run.start).is_dir():
        raise CheckpointError(
            f"no model in {run.start}: make it with python -m refine_jax.convert, or say where it "
            "is (--lact, --deltanet)."
        )
    for name in ("data.source", "source", "evaluate.data", "evaluate.essays"):
        path = run.settings.get(name)
        if path and path not in ("stdlib", "recall") and not path.startswith("tfds:"):
            find_files(path, setting=name)
    if run.kind == "lm_eval":
        importlib.import_module("refine_jax.evaluation.harness")


def is_done(run: Run, workdir: Path, record: Mapping[str, Any]) -> bool:
    """Whether a run is complete.

    Raises:
      ConfigError: It is, but of other settings.
    """
    done = workdir / run.name / DONE
    if not done.is_file():
        return False
    before = json.loads(done.read_text(encoding="utf-8"))
    if before == record:
        return True
    changed = [name for name in before | record if before.get(name) != record.get(name)]
    raise ConfigError(
        f"{workdir / run.name} holds the results of other settings ({', '.join(changed)}). Choose "
        "another --workdir, or delete that folder and what was started from it."
    )


def describe_run(run: Run, workdir: Path) -> str:
    """The command of a phase; of another run, what it is."""
    start = start_folder(run, workdir)
    if run.kind != "phase":
        arguments = " ".join(f"{name}={value}" for name, value in run.settings.items())
        return f"{run.name} ({run.kind}) of {start}: {arguments}"
    words = [f"--config=configs/{run.config}", f"--workdir={workdir / run.name}"]
    settings = dict(run.settings) | ({"model.checkpoint": start} if start else {})
    words += [f"--config.{name}={value}" for name, value in settings.items()]
    return shlex.join(["python", "-m", "refine_jax.main", *words])


def _record(run: Run, workdir: Path) -> dict[str, Any]:
    """All that a run depends on, as JSON values; a phase's settings are checked by it.

    Paths in the work folder are written as seen from there: it can be moved.
    """
    settings = dict(run.settings)
    if run.kind == "phase":
        nested = build_config(run, workdir).to_dict()
        settings = {"phase": nested.pop("phase")}
        for section, fields in nested.items():
            settings |= {f"{section}.{name}": value for name, value in fields.items()}
    record = {"start": start_folder(run, workdir), **settings}
    record = {
        name: value.removeprefix(f"{workdir}/") if isinstance(value, str) else value
        for name, value in record.items()
    }
    return json.loads(json.dumps(record))


def _run_phase(run: Run, workdir: Path) -> dict[str, Any]:
    config = build_config(run, workdir)
    phase = importlib.import_module(f"refine_jax.phases.{config.phase}")
    return phase.run(config, workdir / run.name)


def _run_position(run: Run, workdir: Path) -> dict[str, Any]:
    from refine_jax.evaluation.by_position import evaluate

    arguments = dict(run.settings)
    options = DataConfig(
        tokenizer="checkpoint",
        chunking="first",
        epochs=1,
        holdout=0.0,
        source=arguments.pop("source"),
        sequence_length=arguments.pop("sequence_length"),
        min_tokens=arguments.pop("min_tokens", None),
        limit_documents=arguments.pop("limit_documents", None),
        cache_dir=arguments.pop("cache_dir"),
    )
    return _write(run, workdir, evaluate(start_folder(run, workdir), options, **arguments))


def _run_entropy(run: Run, workdir: Path) -> dict[str, Any]:
    """Entropies of the first document that is long enough."""
    from refine_jax.data.pipeline import load_corpus
    from refine_jax.generation import load
    from refine_jax.refine.reading import read_rows

    loaded = load(start_folder(run, workdir), step="latest", tokenizer=None, compute_dtype=None)
    model, params, tokenizer = loaded
    options = DataConfig(
        tokenizer=tokenizer.name,
        chunking="first",
        epochs=1,
        holdout=0.0,
        source=run.settings["source"],
        sequence_length=run.settings["sequence_length"],
        limit_documents=run.settings.get("limit_documents"),
        cache_dir=run.settings["cache_dir"],
    )
    batch = next(iter(load_corpus(options, tokenizer).dataset("train", 1)))

    @jax.jit
    def entropies(params, tokens):
        return read_rows(model, params, {"tokens": tokens}, with_trace=False).stats.entropy

    values = np.asarray(entropies(params, batch["tokens"]))[0]
    results = {"entropy": [float(value) for value in values]}
    return _write(run, workdir, results)


def _run_lm_eval(run: Run, workdir: Path) -> dict[str, Any]:
    from refine_jax import lm_harness

    evaluation = lm_harness.evaluate(start_folder(run, workdir), **run.settings)
    figures = {
        task: {name: value for name, value in results.items() if isinstance(value, int | float)}
        for task, results in evaluation["results"].items()
    }
    return _write(run, workdir, {"results": figures})


def _write(run: Run, workdir: Path, results: dict[str, Any]) -> dict[str, Any]:
    (workdir / run.name).mkdir(parents=True, exist_ok=True)
    write_text(workdir / run.name / RESULTS, json.dumps(results, indent=2) + "\n")
    return results


_KINDS = {
    "phase": _run_phase,
    "position": _run_position,
    "entropy": _run_entropy,
    "lm_eval": _run_lm_eval,
}
