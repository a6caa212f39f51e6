"""Figures as PNG files, all in one style.

matplotlib is imported when a figure is made, and draws to files only (no display is needed).
"""

import warnings
from pathlib import Path

from refine_jax.base.files import replacing

BLUE, ORANGE, GREEN, GREY = "#1f77b4", "#d9630b", "#2a9d4b", "#8a8a8a"


def new_figure(rows: int, columns: int, size: tuple[float, float], **options):
    """Make a figure of `size` inches without a display; returns it and axes [rows, columns]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save_figure(figure, path: Path) -> None:
    """Write a PNG, complete or not at all."""
    with replacing(path) as part, warnings.catch_warnings():
        # Texts of any language are drawn; a box stands for what the font lacks.
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from font")
        figure.savefig(part, format="png")


def finish(axis, title: str, ylabel: str, pad: float | None = None) -> None:
    """Add title, label, grid and legend to an axis, or say that it has nothing to show."""
    axis.set_title(title, fontsize=12, loc="left", pad=pad)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=9)
    elif not axis.has_data():
        axis.text(0.5, 0.5, "none in this run", ha="center", color=GREY, transform=axis.transAxes)
