"""The page's sections of several training runs side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence

from refine_jax.report.charts import CHARTS, SPEED, Charts, task_charts
from refine_jax.report.held_out import differences
from refine_jax.report.markup import number, section, table, text
from refine_jax.report.runs import Run, changed_settings
from refine_jax.report.training import FIGURES, evaluations, method, row_sums


def sections(runs: Sequence[Run], charts: Charts) -> str:
    """Write the sections of several runs: ends, paired differences, curves, text and settings."""
    drawn = [*CHARTS, *task_charts(run.history for run in runs)]
    return (
        section("ends", "After training", _ends(runs), "Held-out figures of the last evaluation.")
        + section("paired", "Paired differences", _paired(runs), _note(runs))
        + section("curves", "Curves", charts.frames(drawn), _ZOOM)
        + method(runs)
        + section("speed", "Speed", charts.frames(SPEED))
        + section("settings", "Settings that differ between the runs", _settings(runs))
    )


_ZOOM = (
    "Drag over a curve to zoom, point at it for values. Dotted: figures of training steps. "
    '<button type="button" class="drag" aria-pressed="true">Drag to zoom</button> '
    '<button type="button" class="reset">Show all steps</button>'
)


def _ends(runs: Sequence[Run]) -> str:
    last = {run.name: (evaluations(run) or [{}])[-1] for run in runs}
    shown = [f for f in FIGURES if any(f"eval/{f[0]}" in record for record in last.values())]
    rows = []
    for run in runs:
        record, figures = last[run.name], run.figures()
        cells = [
            number(None if (x := record.get(f"eval/{name}")) is None else x * scale)
            for name, _, _, scale, _, _ in shown
        ]
        speed = figures["tokens_per_second"]
        step = f"{record['step']:,}" if record else "–"
        rows.append([text(run.name), step, *cells, number(speed, 0)])
    units = [f"{label} <small>{unit}</small>" for _, label, unit, *_ in shown]
    return table("After training", ("Run", "step", *units, "tokens/s"), rows, "unsaid")


def _note(runs: Sequence[Run]) -> str:
    return (
        f"Each run minus {text(runs[0].name)}, at the last step at which both were evaluated, "
        "paired by held-out row. Intervals of 95 % are over rows: they say what other rows of the "
        "kind would give, not what another seed would."
    )


def _paired(runs: Sequence[Run]) -> str:
    base, *others = runs
    first = {record["step"]: record for record in base.held_out}
    rows = []
    for run in others:
        common = [record for record in run.held_out if record["step"] in first]
        if not common:
            continue
        record = common[-1]
        for name, label, unit, scale, sums, better in FIGURES:
            used = row_sums(run, name, sums)
            difference = used and differences(first[record["step"]], record, *used)
            if not difference:
                continue
            mean, half, count = difference
            interval, verdict = "–", ""
            if half is not None:
                low, high = (mean - half) * scale, (mean + half) * scale
                interval = f"{number(low, sign=True)} – {number(high, sign=True)}"
                if better and low * high > 0:
                    kind = "good" if mean * better > 0 else "bad"
                    word = "better" if kind == "good" else "worse"
                    verdict = f' <small class="{kind}">{word}</small>'
            cells = [f"{label} <small>{unit}</small>", f"{record['step']:,}"]
            cells += [number(mean * scale, sign=True) + verdict, interval, f"{count:,}"]
            rows.append([text(run.name), *cells])
    head = ("Run", "figure", "step", "difference", "95 % interval", "rows")
    return table(f"Differences from {base.name}", head, rows, "paired") if rows else ""


def _settings(runs: Sequence[Run]) -> str:
    changed = [changed_settings(run.config) for run in runs]
    names = dict.fromkeys(name for settings in changed for name in settings)
    rows = []
    for name in names:
        section_name, field = name.split(".")
        values = [
            json.dumps(run.setting(section_name, field), ensure_ascii=False, default=str)
            for run in runs
        ]
        if len(set(values)) > 1:
            cells = [f"<code><bdi>{text(value)}</bdi></code>" for value in values]
            rows.append([f"<code>{text(name)}</code>", *cells])
    head = ("Setting", *(text(run.name) for run in runs))
    return table("Settings that differ between the runs", head, rows, "settings") if rows else ""
