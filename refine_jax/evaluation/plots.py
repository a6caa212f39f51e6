"""PNG plots of an evaluation: bars with intervals, recall by length and depth, loss by position."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refine_jax.base.figures import BLUE, GREEN, GREY, ORANGE, finish, new_figure, save_figure
from refine_jax.evaluation.report import DepthRecall

_COLOURS = (BLUE, ORANGE, GREEN, GREY, "#7b4ea3", "#b8860b")


def plot_scores(path: Path, sets: Mapping[str, Mapping[str, Any]]) -> None:
    """Plot mean scores with their intervals, a group of bars a task, one bar a length.

    sets: `results["sets"]` of `refine_jax.evaluation.report.summarize`.
    """
    tasks = list(dict.fromkeys(figures["task"] for figures in sets.values()))
    lengths = sorted({figures["length"] or 0 for figures in sets.values()})
    figure, axes = new_figure(1, 1, (max(6.0, 2 + 1.1 * len(tasks)), 4.5))
    axis, width = axes[0, 0], 0.8 / len(lengths)
    for number, length in enumerate(lengths):
        chosen = [f for f in sets.values() if (f["length"] or 0) == length]
        places = [
            tasks.index(f["task"]) + width * (number - (len(lengths) - 1) / 2) for f in chosen
        ]
        means, low, high = (
            100 * np.array([f[name] for f in chosen]) for name in ("mean", "low", "high")
        )
        label = f"{length:,} tokens" if length else "all lengths"
        colour = _COLOURS[number % len(_COLOURS)]
        axis.bar(places, means, width=0.92 * width, color=colour, label=label)
        reach = [(means - low).tolist(), (high - means).tolist()]
        axis.errorbar(places, means, yerr=reach, fmt="none", ecolor="black", capsize=3)
    axis.set_xticks(range(len(tasks)), tasks, rotation=30 if len(tasks) > 3 else 0, ha="center")
    axis.set_ylim(0, 105)
    finish(axis, "Mean score with 95 % interval", "score (%)")
    save_figure(figure, path)


def plot_recall(path: Path, recalls: Mapping[str, DepthRecall]) -> None:
    """Plot heatmaps of recall, one a task: length across, depth of the needle downwards."""
    figure, axes = new_figure(1, len(recalls), (1.5 + 3.2 * len(recalls), 4.2))
    for axis, (task, recall) in zip(axes[0], recalls.items(), strict=True):
        values = np.array(
            [[np.nan if cell is None else 100 * cell for cell in row] for row in recall.recall]
        ).T
        image = axis.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(recall.lengths)), [f"{n:,}" for n in recall.lengths])
        axis.set_yticks(range(len(recall.depths)), _bins(recall.depths))
        axis.set_xlabel("tokens")
        axis.set_title(task, fontsize=12, loc="left")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "black" if 15 < value < 85 else "white"
                style = {"ha": "center", "va": "center", "fontsize": 8, "color": colour}
                axis.text(column, row, f"{value:.0f}", **style)
    axes[0, 0].set_ylabel("depth of the needle (%)")
    figure.colorbar(image, ax=list(axes[0]), label="recall (%); white: no needle there", shrink=0.9)
    save_figure(figure, path)


def _bins(ends: Sequence[int]) -> list[str]:
    return [f"{low}-{high}" for low, high in zip([0, *ends], ends, strict=False)]


def plot_positions(path: Path, results: Mapping[str, Mapping]) -> None:
    """Plot next-token loss and accuracy over the tokens of context, a curve a model.

    path: PNG file to write.
    results: by a model's name, what `refine_jax.evaluation.by_position.evaluate` returns.
    """
    figure, axes = new_figure(1, 2, (12, 4.5))
    logarithmic = all(result["spacing"] == "log" for result in results.values())
    for axis, name, unit in zip(
        axes[0], ("loss", "accuracy"), ("nats a token", "tokens predicted right (%)"), strict=True
    ):
        scale = 100 if name == "accuracy" else 1
        for number, (label, result) in enumerate(results.items()):
            buckets = result["buckets"]
            first, last = (np.array([b[key] for b in buckets]) for key in ("first", "last"))
            # The middle of a bucket on the axis.
            context = np.sqrt(first * (last + 1.0)) if logarithmic else (first + last) / 2
            mean, low, high = (
                np.array([bucket[name][key] for bucket in buckets], np.float64) * scale
                for key in ("mean", "low", "high")
            )
            axis.plot(context, mean, color=f"C{number}", marker="o", ms=3.5, label=label)
            axis.fill_between(context, low, high, color=f"C{number}", alpha=0.18, linewidth=0)
        if logarithmic:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("tokens of context (band: 95 % interval over documents)")
        finish(axis, f"Next-token {name} by position", unit)
    save_figure(figure, path)
