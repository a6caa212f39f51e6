"""Make the page, the plots and the table of runs again, from the files in their folders.

Works while a run goes on, and after it: of a training run, metrics.jsonl and held_out.jsonl are
read; of an evaluation or test-time training, predictions.jsonl. The page report.html is one file
for a browser. For several runs it shows them side by side, with paired differences from the first:
those of training, and those that answered questions. The folder of a comparison stands for its
runs.
The last line on standard output is a JSON object: the figures, which results.json keeps, or with
several runs the figures of each by its name.

Examples:

    python -m refine_jax.report runs/demo
    python -m refine_jax.report runs/ntp runs/refine --out=compared.html
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from refine_jax.base.errors import ConfigError
from refine_jax.base.files import check_output, check_writable, given_path
from refine_jax.commands import Command, Options


def report_run(workdir: Path) -> dict:
    """Draw the plots in `workdir`, write its results.json and report.html, print its table.

    Returns the figures.

    Raises:
      DataError: The folder holds no records of a run.
      CheckpointError: Its run.json is damaged.
    """
    from refine_jax.report import metrics
    from refine_jax.report.page import write_evaluation, write_run_page
    from refine_jax.report.plots import write_report
    from refine_jax.report.runs import read_run

    run = read_run(workdir)
    if not run.trains:
        return write_evaluation(run.predictions, workdir)
    figures = run.figures()
    clip_norm = run.setting("optimizer", "clip_norm")
    write_report(workdir, run.history, figures, clip_norm=clip_norm)
    write_run_page(workdir)
    print(f"{metrics.table(figures)}\n\nPage, plots and figures: {workdir}")
    return figures


def compare_runs(folders: Sequence[Path], out: Path) -> dict[str, dict]:
    """Write a page about several runs to `out`; returns the figures of each, by its name.

    Raises:
      DataError: A folder holds no records of a run.
      CheckpointError: A run.json is damaged.
    """
    from refine_jax.evaluation.report import summarize
    from refine_jax.report.page import write_page
    from refine_jax.report.runs import named_apart, read_run

    runs = named_apart([read_run(folder) for folder in folders])
    write_page(out, runs)
    return {run.name: run.figures() if run.trains else summarize(run.predictions) for run in runs}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return command().run(run, arguments, imports=("jax", "refine_jax.report.page"))


def run(options: Options) -> None:
    """Do what the command line asks for; prints the table and the figures."""
    from refine_jax.report.page import PAGE_FILE
    from refine_jax.report.runs import parts_of

    folders = [given_path(folder, "RUN") for folder in options.run]
    out = given_path(options.out, "--out", write=True) if options.out else None
    if len(folders) == 1 and (parts := parts_of(folders[0])):
        out, folders = out or folders[0] / PAGE_FILE, parts
    if len(folders) == 1 and out is None:
        check_writable(folders[0], "RUN")
        print(json.dumps(report_run(folders[0])))
        return
    if len({folder.absolute() for folder in folders}) < len(folders):
        raise ConfigError("Each RUN must be another folder. Got: one of them twice.")
    out = out or Path("report.html")
    check_output(out, "--out")
    figures = compare_runs(folders, out)
    print(f"Page: {out}\n{json.dumps(figures)}")


def command() -> Command:
    """Make the command, its flags and its page of help."""
    words = {"RUN ...": "folder of a run, or of several"}
    made = Command("refine_jax.report", __doc__, "RUN [RUN ...]", words=words)
    made.group("what is written")
    made.flag(
        "out",
        "the page; default: report.html in the folder of one run; of several, in this one",
        metavar="FILE",
    )
    return made
