"""`report.html`: one file about a run, or about several, that needs nothing beside it.

Text of data sets and models is hostile until escaped (`markup.py`). Should that ever fail, the
page's security policy still runs no script but its own two, known by their digests, and loads
nothing from anywhere.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from refine_jax import distributed
from refine_jax.base.files import valid_unicode, write_text
from refine_jax.data.tasks import TASKS
from refine_jax.evaluation.plots import plot_recall, plot_scores
from refine_jax.evaluation.report import recall_by_depth, summarize, table
from refine_jax.report import answers, charts, compare, training
from refine_jax.report.markup import json_block, text
from refine_jax.report.metrics import write_results
from refine_jax.report.runs import Run, named_apart, read_run

PAGE_FILE = "report.html"
_HERE = Path(__file__).parent


def write_run_page(workdir: Path) -> None:
    """Write the page of the run in a folder, WORKDIR/report.html, complete or not at all."""
    write_page(workdir / PAGE_FILE, [read_run(workdir)])


def write_evaluation(records: Sequence[dict], workdir: Path) -> dict:
    """Write plots, results.json and the page of an evaluation, and print the closing table.

    Returns the figures.
    """
    results = summarize(records)
    needles = [task for task in results["mean_by_task"] if TASKS[task].group in ("niah", "recall")]
    recalls = {task: recall_by_depth(records, task) for task in needles}
    recalls = {task: recall for task, recall in recalls.items() if recall is not None}
    if recalls:
        results["recall_by_depth"] = {
            task: dataclasses.asdict(recall) for task, recall in recalls.items()
        }
    if distributed.is_writer():
        write_results(workdir, results)  # first: no picture is worth the figures
        plot_scores(workdir / "scores.png", results["sets"])
        if recalls:
            plot_recall(workdir / "recall.png", recalls)
        write_run_page(workdir)
    distributed.say(f"\n{table(results)}\n\nPredictions, figures and plots: {workdir}")
    return results


def write_page(path: Path, runs: Sequence[Run]) -> None:
    """Write a page about some runs: side by side those of training, and those that answered."""
    write_text(path, page(runs))


def page(runs: Sequence[Run]) -> str:
    """Write the text of a page about some runs."""
    runs = named_apart(runs)
    trained = [run for run in runs if run.trains]
    answered = [run for run in runs if not run.trains]
    body, data = "", ""
    if answered:
        # The settings of one evaluation, but for a page that has those of training.
        body += answers.sections(answered, with_settings=not trained)
    if trained:
        curves = charts.Charts({run.name: run.history for run in trained})
        if len(trained) > 1:
            body += compare.sections(trained, curves)
        else:
            body += training.tiles(trained[0]) + training.sections(trained[0], curves)
        data = json_block("charts-data", curves.data())
        data += json_block("method-data", training.method_data(trained))
    title = " · ".join(run.name for run in runs)
    kind = f"{len(runs)} runs" if len(runs) > 1 else runs[0].phase
    return valid_unicode(_frame(title, kind, body, data, charts=bool(trained)))


def _frame(title: str, kind: str, body: str, data: str, *, charts: bool) -> str:
    script, style = ((_HERE / name).read_text("utf-8") for name in ("page.js", "page.css"))
    allowed, library = [script], ""
    if charts:
        from refine_jax.report.charts import library as plain
        from refine_jax.report.charts import packed_library

        allowed.append(plain())
        library = f'<script type="text/plain" id="library">{packed_library()}</script>\n'
    digests = " ".join(f"'sha256-{_digest(script)}'" for script in allowed)
    policy = (
        f"default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    links = "".join(
        f'<a href="#{name}">{label}</a>'
        for name, label in _NAVIGATION.items()
        if f'<section id="{name}">' in body
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)} – refine-jax</title>
<style>{style}</style>
</head>
<body>
<header class="top"><div><p class="kind">{text(kind)}</p><h1><bdi>{text(title)}</bdi></h1></div>
<label class="theme">Theme <select id="theme"><option value="">as the device</option>
<option value="light">light</option><option value="dark">dark</option></select></label></header>
<nav aria-label="Sections">{links}</nav>
<main>
{body}</main>
<footer>Made by refine-jax; needs no network. Charts: Bokeh (BSD-3-Clause).</footer>
{data}{library}<script>{script}</script>
</body>
</html>
"""


_NAVIGATION = {
    "before-after": "Before and after",
    "ends": "After training",
    "scores": "Scores",
    "answers-paired": "Differences of scores",
    "paired": "Differences",
    "curves": "Curves",
    "method": "Method",
    "needles": "Needles",
    "adaptation": "Test-time training",
    "answers": "Answers",
    "speed": "Speed",
    "settings": "Settings",
}


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
