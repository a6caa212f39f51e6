"""Curves of training runs, drawn by Bokeh in the reader's browser.

All curves of a page share the axis of steps: zooming into one zooms into all. Colours of axes and
grids come from the style sheet of the page, so that they follow light and dark.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import gzip
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from refine_jax.report.markup import number, text
from refine_jax.report.metrics import is_refine, task_figures
from refine_jax.report.plots import running_mean

# These colours are legible on white and on near black.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#2f81d6", "#d9730d", "#2e9e5b", "#9a6dd7", "#80868f"
RUN_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#c94f7c", "#2a9aa8", "#a07d1c", GREY)
MOST_POINTS = 1500
"""Points of a curve; of longer runs each is the mean over equally many steps."""
_SMOOTH_FROM = 60


@dataclasses.dataclass(frozen=True)
class Series:
    """One figure of the records: a line over training steps, or points where it was evaluated."""

    name: str
    label: str
    colour: str
    scale: float = 1.0
    points: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """What is drawn in one frame."""

    title: str
    unit: str
    series: Sequence[Series]
    logarithmic: bool = False
    medians: bool = False  # whether its curves are summed up by medians, not by their ends


CHARTS = (
    Chart(
        "Next-token loss",
        "nats a token",
        (
            Series("loss/ntp", "training", BLUE),
            Series("answer/loss", "answers", GREEN),
            Series("eval/prompt_loss", "prompts, held out", GREY, points=True),
            Series("eval/loss", "held out", ORANGE, points=True),
        ),
    ),
    Chart(
        "Accuracy",
        "% right",
        (
            Series("eval/accuracy", "next tokens, held out", ORANGE, 100, points=True),
            Series("eval/exact", "whole answers, held out", BLUE, 100, points=True),
        ),
    ),
    Chart(
        "Reward of the rollouts",
        "reward",
        (
            Series("reward/mean", "training", GREEN),
            Series("policy/expected_match", "expected, training", GREEN),
            Series("answer/score", "score of sampled answers", GREY),
            Series("eval/reward", "held out", ORANGE, points=True),
            Series("eval/score", "score of answers, held out", BLUE, points=True),
        ),
    ),
    Chart(
        "Entropy of the prediction",
        "nats a token",
        (
            Series("entropy/mean", "training", BLUE),
            Series("eval/entropy", "held out", ORANGE, points=True),
        ),
    ),
    Chart(
        "Gradient before clipping",
        "L2 norm, log scale",
        (Series("grad/norm", "all parameters", BLUE),),
        logarithmic=True,
    ),
    Chart("Learning rate", "learning rate", (Series("learning_rate", "of the step", BLUE),)),
)


def task_charts(histories: Iterable[Sequence[Mapping[str, Any]]]) -> list[Chart]:
    """Charts of the tasks that runs answered while training (`train.evaluate`): two at most."""
    charts = []
    for kind, names in task_figures(itertools.chain(*histories)).items():
        series = [
            Series(name, name.removeprefix(kind.prefix), colour, kind.scale, points=True)
            for name, colour in zip(names, itertools.cycle(RUN_COLOURS), strict=False)
        ]
        if series:
            charts.append(Chart(kind.title, kind.unit, series))
    return charts


SPEED = (
    Chart(
        "Time of a step",
        "seconds",
        (
            Series("time/step", "whole step", BLUE),
            Series("time/update", "update", GREEN),
            Series("time/collect", "collecting rollouts", ORANGE),
            Series("time/answers", "answers", PURPLE),
            Series("time/data", "waiting for data", GREY),
        ),
        medians=True,
    ),
    Chart(
        "Tokens a second",
        "tokens a second",
        (Series("tokens_per_second", "of steps", BLUE),),
        medians=True,
    ),
    Chart("Memory of the device", "GiB", (Series("memory/peak", "peak so far", BLUE, 1 / 2**30),)),
)


class Charts:
    """The curves of one or several runs, as parts of one page.

    runs: {name: records of metrics.jsonl}. One run: a colour a figure. Several: a colour a run.
    """

    def __init__(self, runs: Mapping[str, Sequence[Mapping[str, Any]]]):
        from bokeh.models import DataRange1d

        self._runs = runs
        self._several = len(runs) > 1
        self._steps = DataRange1d(range_padding=0.02)
        self._figures: list[Any] = []
        self._places: list[str] = []

    def frames(self, charts: Sequence[Chart]) -> str:
        """Write the HTML of the charts that have anything to show, in a grid."""
        frames = "".join(map(self._frame, charts))
        return f'<div class="charts">{frames}</div>\n' if frames else ""

    def data(self) -> dict[str, Any] | None:
        """Make what `Bokeh.embed.embed_items` takes; None where nothing is drawn."""
        if not self._figures:
            return None
        from bokeh.document import Document
        from bokeh.embed.util import standalone_docs_json_and_render_items

        document = Document()
        document.config.notifications = None
        for figure in self._figures:
            document.add_root(figure)
        documents, (item,) = standalone_docs_json_and_render_items(document)
        roots = dict(zip((figure.id for figure in self._figures), self._places, strict=True))
        return {"documents": documents, "items": [item.to_json() | {"roots": roots}]}

    def _frame(self, chart: Chart) -> str:
        drawn = [
            (series, name, colour, _values(records, series))
            for series in chart.series[: 1 if self._several and chart.medians else None]
            for (name, records), colour in zip(
                self._runs.items(), self._colours(series.colour), strict=True
            )
        ]
        drawn = [curve for curve in drawn if len(curve[3][0])]
        if not drawn:
            return ""
        figure = self._new_figure(chart)
        if not self._several:
            self._shade_warmup(figure)
        legend, said = {}, []
        for series, name, colour, (steps, values) in drawn:
            label = f"{name}, {series.label}" if self._several else series.label
            self._draw(figure, series, label, colour, steps, values)
            kind = "swatch dot" if series.points and not self._several else "swatch"
            legend[name if self._several else label] = (kind, colour)
            if series.points or not any(curve[0].points for curve in drawn):
                said.append(_said(label, steps, values, chart.medians))
        top = max(np.abs(values).max() for *_, (_, values) in drawn)
        if chart.unit == "seconds":
            self._leave_out_compilation(figure, drawn)
        elif not chart.logarithmic:
            figure.y_range.default_span = float(top) or 1.0  # of curves that are flat
        entries = "".join(
            f'<li><span class="{kind}" style="--c:{colour}"></span>{text(label)}</li>'
            for label, (kind, colour) in legend.items()
        )
        place = f"chart-{len(self._figures)}"
        self._figures.append(figure)
        self._places.append(place)
        return (
            f'<figure class="card"><figcaption><h3>{text(chart.title)}</h3>'
            f'<span class="unit">{text(chart.unit)}</span></figcaption>'
            f'<ul class="legend">{entries}</ul>'
            f'<div id="{place}" class="chart" role="img" aria-label="{text(chart.title)}: '
            f'{"; ".join(said)}"></div><p class="said">{"; ".join(said)}</p></figure>\n'
        )

    def _colours(self, own: str) -> list[str]:
        if not self._several:
            return [own]
        return [RUN_COLOURS[index % len(RUN_COLOURS)] for index in range(len(self._runs))]

    def _new_figure(self, chart: Chart):
        from bokeh.models import BoxZoomTool
        from bokeh.plotting import figure

        made = figure(
            height=220,
            sizing_mode="stretch_width",
            x_range=self._steps,
            y_axis_type="log" if chart.logarithmic else "linear",
            tools=[],
            toolbar_location=None,
            window_axis="x",
        )
        zoom = BoxZoomTool(dimensions="width")
        made.add_tools(zoom)
        made.toolbar.active_drag = zoom
        made.xaxis.axis_label = "step"
        made.axis.minor_tick_line_color = None
        made.xgrid.visible = False
        made.outline_line_color = None
        made.min_border_right = 12
        return made

    def _draw(self, figure, series: Series, label: str, colour: str, steps, values) -> None:
        from bokeh.models import ColumnDataSource, HoverTool

        many = not series.points and len(steps) > _SMOOTH_FROM
        columns = {"step": steps.astype(np.int32), "value": values.astype(np.float32)}
        if many:
            columns["mean"] = running_mean(values, len(steps) // 20).astype(np.float32)
        source = ColumnDataSource(columns)
        if many:
            figure.line("step", "value", source=source, color=colour, alpha=0.35, line_width=1)
        line = figure.line(
            "step",
            "mean" if many else "value",
            source=source,
            color=colour,
            line_width=2,
            line_dash="solid" if series.points or not self._several else "dotted",
        )
        drawing = line
        if series.points or len(steps) < 3:
            drawing = figure.scatter("step", "value", source=source, color=colour, size=7)
        # The library replaces what follows @ and $; the rest is HTML.
        tips = f"<b>{text(label).replace('@', '&#64;').replace('$', '&#36;')}</b><br>"
        tips += "step @step{0,0}: @value{0,0.[00000]}"
        if many:
            tips += "<br>running mean @mean{0,0.[00000]}"
        figure.add_tools(
            HoverTool(
                renderers=[drawing],
                tooltips=f"<div>{tips}</div>",
                mode="mouse" if self._several or series.points else "vline",
                line_policy="nearest",
                point_policy="follow_mouse",
                attachment="horizontal",
            )
        )

    def _shade_warmup(self, figure) -> None:
        """Mark the next-token warm-up of a run that has ReFINE steps after it."""
        from bokeh.models import BoxAnnotation

        (records,) = self._runs.values()
        training = [record for record in records if "time/step" in record]
        first = next((record["step"] for record in training if is_refine(record)), None)
        if first is not None and first > training[0]["step"]:
            figure.add_layout(
                BoxAnnotation(
                    left=training[0]["step"],
                    right=first,
                    fill_color=GREY,
                    fill_alpha=0.14,
                    line_color=None,
                    level="underlay",
                )
            )

    def _leave_out_compilation(self, figure, drawn) -> None:
        """Show up to twice the median step: steps that compile would press the rest flat."""
        from bokeh.models import Range1d

        whole = [np.nanmedian(values) for series, _, _, (_, values) in drawn]
        top = max((value for value in whole if np.isfinite(value)), default=0) * 2
        if top > 0:
            figure.y_range = Range1d(0, top)


def _values(records, series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Take steps and values of a figure; of long runs means over equally many steps each."""
    pairs = [(r["step"], r[series.name]) for r in records if r.get(series.name) is not None]
    steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
    if len(steps) > MOST_POINTS:
        width = -(-len(steps) // MOST_POINTS)
        edges = np.arange(0, len(steps), width)
        counts = np.diff([*edges, len(steps)])
        steps, values = (np.add.reduceat(x, edges) / counts for x in (steps, values))
    return steps, values * series.scale


def _said(label: str, steps: np.ndarray, values: np.ndarray, medians: bool) -> str:
    """Say a curve in words: its ends, or its median."""
    if medians:
        middle = float(np.median(values))
        return f"{text(label)}: median {number(middle, 3 if middle < 10 else 0)}"
    digits = 4 if abs(values[-1]) < 10 else 1
    first, last = number(values[0], digits), number(values[-1], digits)
    if values[-1] and abs(values[-1]) < 1e-3:
        first, last = f"{values[0]:.2g}", f"{values[-1]:.2g}"
    return f"{text(label)}: {first} → {last}" if len(steps) > 1 else f"{text(label)}: {last}"


@functools.cache
def library() -> str:
    """Read the text of the library's script."""
    from bokeh.resources import Resources

    inline = Resources(mode="inline", components=["bokeh"], minified=True, log_level="warn")
    return "\n".join(inline.js_raw)


@functools.cache
def packed_library() -> str:
    """Pack the script in gzip and base64, a third of its size; browsers unpack it."""
    return base64.b64encode(gzip.compress(library().encode(), 9, mtime=0)).decode()
