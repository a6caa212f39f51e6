"""Draw the plots of a run again, and print its figures, from the files in its folder.

Works while the run goes on, and after it: of a training run, metrics.jsonl is read; of an
evaluation, predictions.jsonl. The last line on standard output is a JSON object with the figures,
which results.json keeps.

Examples:

    python -m refine_jax.summary --workdir=runs/demo
    python -m refine_jax.summary --workdir=runs/ruler
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from refine_jax.base.errors import DataError
from refine_jax.base.files import check_writable, local_path, read_lines
from refine_jax.commands import Command, Options


def summarize_run(workdir: Path) -> dict:
    """Draw the plots in `workdir`, write its results.json, print its table; returns the figures.

    Raises DataError: the folder holds no records of a run.
    """
    from refine_jax.checkpoint.folders import RUN
    from refine_jax.checkpoint.record import read_config
    from refine_jax.evaluation import runner
    from refine_jax.phases import evaluate
    from refine_jax.phases.setup import CHECKPOINTS
    from refine_jax.report import metrics
    from refine_jax.report.plots import write_report

    predictions = workdir / runner.PREDICTIONS
    if predictions.exists():
        records, _ = read_lines(predictions, runner.record_parser(runner.FIELDS))
        return evaluate.report(records, workdir)
    history = metrics.read_metrics(workdir / metrics.METRICS_FILE)
    if not history:
        files = f"{metrics.METRICS_FILE} or {runner.PREDICTIONS}"
        raise DataError(f"{workdir} holds no records of a run, in {files}.")
    clip_norm = None
    if (workdir / CHECKPOINTS / RUN).exists():
        clip_norm = read_config(workdir / CHECKPOINTS).get("optimizer", {}).get("clip_norm")
    figures = metrics.summarize(history)
    write_report(workdir, history, figures, clip_norm=clip_norm)
    print(f"{metrics.table(figures)}\n\nPlots and figures: {workdir}")
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command().run(run, arguments, imports=("jax", "refine_jax.phases.evaluate"))


def run(options: Options) -> None:
    """Do what the command line asks for; prints the table and the figures."""
    workdir = local_path(options.workdir, "--workdir")
    check_writable(workdir, "--workdir")
    print(json.dumps(summarize_run(workdir)))


def command() -> Command:
    """The command, its flags and its page of help."""
    made = Command("refine_jax.summary", __doc__, "--workdir=DIR")
    made.group("run")
    made.flag("workdir", "folder of the run", metavar="DIR", needed=True)
    return made


if __name__ == "__main__":
    sys.exit(main())
