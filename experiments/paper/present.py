"""Tables as Markdown, figures as PNG, both as JSON, beside what the paper reports."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from plan import Figure, Series, Source, Table

from refine_jax.base.figures import finish, new_figure, save_figure
from refine_jax.base.files import write_text

SMALL = "Small form: tiny models and made-up data. It shows that everything runs, and no result."


def present(artifact: Table | Figure, workdir: Path, name: str, *, small: bool) -> None:
    """Write WORKDIR/NAME.json and NAME.md or NAME.png, and print the numbers."""
    # Figures of other sizes than the paper's are not put beside its own.
    if isinstance(artifact, Table):
        content = table_content(artifact, workdir, published=not small)
        text = markdown(content)
        note = SMALL if small else "In brackets: the paper."
        text = f"{artifact.title}\n\n{text}\n\n{note}\n"
        write_text(workdir / f"{name}.md", text)
        print(text)
        shown = workdir / f"{name}.md"
    else:
        content = figure_content(artifact, workdir, published=not small)
        shown = workdir / f"{name}.png"
        plot(artifact, content, shown)
        print(f"{artifact.title}\n" + (SMALL + "\n" if small else "") + summary(content))
    write_text(workdir / f"{name}.json", json.dumps(content | {"small": small}, indent=2) + "\n")
    print(f"\n{shown}\n{workdir / f'{name}.json'}", flush=True)


def read(source: Source, workdir: Path) -> float:
    """The figure that a run has written."""
    figure = json.loads((workdir / source.run.name / "results.json").read_text(encoding="utf-8"))
    for key in source.path:
        figure = figure[key]
    return source.scale * figure


def table_content(table: Table, workdir: Path, *, published: bool) -> dict[str, Any]:
    """{"title", "rows", "columns", "cells": {row: {column: {"value", "published"}}}}."""
    cells: dict[str, dict[str, Any]] = {}
    columns: dict[str, None] = {}
    for value in table.values:
        columns.setdefault(value.column)
        trials = [read(source, workdir) for source in value.sources]
        cells.setdefault(value.row, {})[value.column] = {
            "value": statistics.fmean(trials),
            "published": value.published if published else None,
        }
    return {"title": table.title, "rows": list(cells), "columns": list(columns), "cells": cells}


def markdown(content: dict[str, Any]) -> str:
    """A line for each row, what the paper has in brackets."""
    lines = ["| | " + " | ".join(content["columns"]) + " |"]
    lines.append("|---" * (len(content["columns"]) + 1) + "|")
    for row in content["rows"]:
        words = []
        for column in content["columns"]:
            cell = content["cells"][row].get(column)
            known = cell is not None and cell["published"] is not None
            word = "" if cell is None else _number(cell["value"])
            words.append(f"{word} ({cell['published']:.1f})" if known else word)
        lines.append(f"| {row} | " + " | ".join(words) + " |")
    return "\n".join(lines)


def _number(value: float) -> str:
    """As the paper writes it; perplexities of models that have learnt little are huge."""
    return f"{value:.1f}" if abs(value) < 1e5 else f"{value:.2g}"


def figure_content(figure: Figure, workdir: Path, *, published: bool) -> dict[str, Any]:
    """{"title", "curves": [{"panel", "label", "points": [{"x", "y", "low", "high", ...}]}]}.

    low and high: the smallest and largest of the trials.
    """
    curves = []
    for curve in figure.curves:
        if isinstance(curve, Series):
            points = []
            for point in curve.points:
                trials = [read(source, workdir) for source in point.sources]
                y = {"y": statistics.fmean(trials), "low": min(trials), "high": max(trials)}
                theirs = point.published if published else None
                points.append({"x": point.x, **y, "published": theirs})
        else:
            read_points = curve.read(workdir / curve.run.name)
            points = [{"x": x, "y": y, "low": y, "high": y} for x, y in read_points]
        curves.append({"panel": curve.panel, "label": curve.label, "points": points})
    return {"title": figure.title, "curves": curves}


def plot(figure: Figure, content: dict[str, Any], path: Path) -> None:
    """One panel beside the other, at most two a row; curves of one label have one colour."""
    across = min(2, len(figure.axes))
    down = math.ceil(len(figure.axes) / across)
    drawing, axes = new_figure(down, across, (6.5 * across, 4.2 * down))
    panels = dict(zip(figure.axes, axes.flat, strict=False))
    labels = list(dict.fromkeys(curve["label"] for curve in content["curves"]))
    for curve in content["curves"]:
        axis, points = panels[curve["panel"]], curve["points"]
        x, y = [p["x"] for p in points], [p["y"] for p in points]
        colour = f"C{labels.index(curve['label'])}"
        dense = len(points) > 200
        axis.plot(x, y, color=colour, label=curve["label"], lw=0.5 if dense else 1.5)
        low, high = [p["low"] for p in points], [p["high"] for p in points]
        if low != high:
            spread = [[b - a for a, b in zip(low, y, strict=True)]]
            spread.append([b - a for a, b in zip(y, high, strict=True)])
            axis.errorbar(x, y, yerr=spread, fmt="none", ecolor=colour, capsize=3)
        theirs = [(p["x"], p["published"]) for p in points if p.get("published") is not None]
        if theirs:
            label = f"{curve['label']}, paper"
            axis.plot(*zip(*theirs, strict=True), "x", color=colour, label=label)
    for panel, axis in panels.items():
        across_label, upwards = figure.axes[panel]
        axis.set_xlabel(across_label)
        axis.xaxis.get_major_locator().set_params(integer=True)  # steps, tokens, positions
        finish(axis, panel, upwards)
    save_figure(drawing, path)


def summary(content: dict[str, Any]) -> str:
    """The ends of every curve."""
    lines = []
    for curve in content["curves"]:
        points = curve["points"]
        if not points:
            lines.append(f"{curve['panel']}, {curve['label']}: no points")
            continue
        first, last = points[0], points[-1]
        lines.append(
            f"{curve['panel']}, {curve['label']}: {first['y']:.4g} at {first['x']:g}, "
            f"{last['y']:.4g} at {last['x']:g}"
        )
    return "\n".join(lines)
