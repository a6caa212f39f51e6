"""The page's sections of one training run, and the method made visible in held-out text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from refine_jax.report.charts import CHARTS, SPEED, Charts, task_charts
from refine_jax.report.held_out import differences, thinned
from refine_jax.report.markup import number, section, table, text, visible
from refine_jax.report.monitor import duration
from refine_jax.report.runs import Run, changed_settings

MOST_EVALUATIONS = 24
"""Evaluations of a run whose held-out text a page keeps."""
FIGURES = (
    ("loss", "Loss", "nats a token", 1, ("nll", "tokens"), -1),
    ("accuracy", "Accuracy", "%", 100, ("correct", "tokens"), 1),
    ("exact", "Whole answers right", "%", 100, None, 1),
    ("score", "Score of greedy answers", "%", 100, ("score", "real"), 1),
    ("reward", "Reward of the rollouts", "", 1, ("reward", "rollouts"), 1),
    ("entropy", "Entropy", "nats a token", 1, None, 0),
    ("prompt_loss", "Loss on prompts", "nats a token", 1, ("nll", "tokens"), -1),
)
"""Held-out figures: name, label, unit, scale, sums over rows they are ratios of, and which
direction is better (0: neither)."""


def of_answers(run: Run) -> bool:
    """Tell whether held-out figures are of answers to prompts, as in post-training."""
    return any("eval/exact" in record for record in run.history)


def row_sums(run: Run, name: str, sums: tuple[str, str] | None) -> tuple[str, str] | None:
    """Name the row sums whose ratio a figure of this run is; None where rows do not have it."""
    # Records of rows have sums over tokens of prompts or documents, and none over those of answers.
    others = ("loss", "accuracy") if of_answers(run) else ("prompt_loss", "score")
    return None if name in others else sums


def evaluations(run: Run) -> list[dict[str, Any]]:
    """Take the records of evaluations, in order."""
    return [record for record in run.history if "eval/loss" in record]


def tiles(run: Run) -> str:
    """Write the figures to see first."""
    figures = run.figures()
    total = run.setting("train", "steps", figures["steps"])
    done = figures["steps"] >= total
    shown = [
        ("Steps", f"{figures['steps']:,} of {total:,}", "complete" if done else "not complete")
    ]
    of = "answers" if of_answers(run) else "held out"
    for label, name, scale, digits, unit in (
        (f"Loss, {of}", "loss", 1, 3, ""),
        (f"Accuracy, {of}", "accuracy", 100, 1, " %"),
        ("Score of answers", "score", 100, 1, " %"),
        ("Reward, held out", "reward", 1, 3, ""),
    ):
        before, after = (figures.get(f"validation_{name}_{when}") for when in ("before", "after"))
        if after is not None:
            value = number(after * scale, digits, unit)
            was = number(before * scale, digits, unit) if before is not None else "unknown"
            shown.append((label, value, f"before: {was}"))
    speed = figures["tokens_per_second"]
    if speed is not None:
        shown.append(("Speed", f"{speed:,.0f} tokens/s", duration(figures["seconds_total"])))
    cells = "".join(
        f"<li><span>{text(label)}</span><strong>{text(value)}</strong><em>{text(note)}</em></li>"
        for label, value, note in shown
    )
    return f'<ul class="tiles">{cells}</ul>\n'


def before_and_after(run: Run) -> str:
    """Write held-out figures at both ends of the run, with intervals of their change."""
    records = evaluations(run)
    if not records:
        return ""
    first, last = records[0], records[-1]
    seen = {record["step"]: record for record in run.held_out}
    rows = []
    for name, label, unit, scale, sums, better in FIGURES:
        before, after = (record.get(f"eval/{name}") for record in (first, last))
        if before is None and after is None:
            continue
        change, reach = "–", ""
        if None not in (before, after) and first is not last:
            difference = (after - before) * scale
            change = _change(difference, better)
            both = [seen.get(record["step"]) for record in (first, last)]
            used = row_sums(run, name, sums)
            if None not in both and used:
                _, half, count = differences(*both, *used) or (None, None, None)
                if half is not None:
                    reach = f"± {number(half * scale)} over {count:,} rows"
        cells = [number(None if x is None else x * scale) for x in (before, after)]
        rows.append([f"{text(label)} <small>{unit}</small>", *cells, change, reach])
    head = (
        "Held out",
        f"step {first['step']:,}",
        f"step {last['step']:,}",
        "change",
        "95 % interval",
    )
    return table("Before and after", head, rows, "unsaid")


def _change(difference: float, better: int) -> str:
    kind = "" if not better or not difference else "good" if difference * better > 0 else "bad"
    word = {"good": "better", "bad": "worse"}.get(kind, "")
    said = f' <small class="{kind}">{word}</small>' if word else ""
    return number(difference, sign=True) + said


def speed(run: Run) -> str:
    """Write a table of what steps took."""
    figures = run.figures()
    rows = [
        [label, number(figures.get(seconds), 3, " s"), f"{figures.get(count) or 0:,}"]
        for label, seconds, count in (
            ("Next-token step", "step_seconds_ntp", "ntp_steps"),
            ("ReFINE step", "step_seconds_refine", "refine_steps"),
            ("of it, rollouts", "step_seconds_collect", "refine_steps"),
            ("Post-training step", "step_seconds_posttrain", "posttrain_steps"),
        )
        if figures.get(seconds) is not None
    ]
    for label, name in (("Compilation", "time/compile"), ("Evaluations", "time/eval")):
        values = [r[name] for r in run.history if r.get(name) is not None]
        if values:
            rows.append([f"{label}, in all", number(sum(values), 1, " s"), f"{len(values):,}"])
    return table("Seconds", ("Part", "median, or sum", "how many"), rows) if rows else ""


def settings(run: Run) -> str:
    """Write a table of the settings that differ from their defaults."""
    changed = changed_settings(run.config)
    rows = [
        [f"<code>{text(name)}</code>", _value(value), _value(default), _codes(meaning)]
        for name, (value, default, meaning) in changed.items()
    ]
    head = ("Setting", "here", "default", "meaning")
    return table("Settings that differ from the defaults", head, rows, "settings") if rows else ""


def _codes(meaning: str) -> str:
    """Write a docstring's text as HTML, what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text(meaning))


def _value(value: Any) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return f"<code><bdi>{text(shown)}</bdi></code>" if shown != "" else "<em>empty</em>"


def sections(run: Run, charts: Charts) -> str:
    """Write the sections of one training run but for the method."""
    intervals = (
        "Intervals are of the difference, paired by held-out row: they say what other rows of the "
        "kind would give, not what another seed would."
    )
    zoom = (
        "Drag over a curve to zoom, point at it for values. Shaded: next-token warm-up. "
        '<button type="button" class="drag" aria-pressed="true">Drag to zoom</button> '
        '<button type="button" class="reset">Show all steps</button>'
    )
    return (
        section("before-after", "Before and after", before_and_after(run), intervals)
        + section("curves", "Curves", charts.frames([*CHARTS, *task_charts([run.history])]), zoom)
        + method([run])
        + section("speed", "Speed", speed(run) + charts.frames(SPEED), _speed_note(run))
        + section("settings", "Settings", settings(run))
    )


def _speed_note(run: Run) -> str:
    if any("memory/peak" in record for record in run.history):
        return ""
    return "The device reported no memory (a CPU reports none)."


# The method


def method(runs: Sequence[Run]) -> str:
    """Write the place for the method's text, if a run kept any; the page's script fills it."""
    runs = [run for run in runs if any(record["shown"] for record in run.held_out)]
    if not runs:
        return ""
    names = "".join(f'<option value="{i}">{text(run.name)}</option>' for i, run in enumerate(runs))
    chosen = f'<label>Run <select id="m-run">{names}</select></label>'
    body = f"""<div class="card method">
<div class="controls">
{chosen if len(runs) > 1 else ""}<label>Text <select id="m-row"></select></label>
<fieldset><legend>Colour by</legend>
<label><input type="radio" name="m-by" value="entropy" checked> entropy</label>
<label><input type="radio" name="m-by" value="match"> P<sub>k</sub></label></fieldset>
<label class="slide">Evaluation after step <output id="m-step" for="m-at"></output>
<input type="range" id="m-at" min="0" step="1" value="0"></label>
</div>
<p class="scale"><span id="m-low"></span><span class="ramp" aria-hidden="true"></span>
<span id="m-high"></span></p>
<p id="m-text" class="tokens" tabindex="0" role="region" aria-label="Held-out text"></p>
<p id="m-token" class="note" aria-live="polite">Point at a token, or tap it, for its figures.</p>
<h3 id="m-title">Chosen positions and their rollouts</h3>
<div id="m-positions" class="positions"></div>
</div>
"""
    note = (
        "Held-out text, each token coloured by how unsure the model was before it (entropy), or by "
        "P<sub>k</sub>, the probability that a rollout of k tokens from there on would be right as "
        "a whole. Underlined and numbered: where rollouts were made. Beneath, the true tokens and "
        "each rollout. ✓ marks a token that is the true one; the reward says how near the rollout "
        "came, the advantage how much better than those it is compared with. Move the slider to "
        "see how they change while the model trains."
    )
    return section("method", "The method in this text", body, note)


def method_data(runs: Sequence[Run]) -> dict[str, Any]:
    """Make what the page's script shows of the method.

    Of each run its evaluations, with signs in place of characters that would not be seen.
    """
    texts: dict[tuple[str, ...], int] = {}
    runs = [run for run in runs if any(record["shown"] for record in run.held_out)]
    kept = [
        {
            "name": visible(run.name),
            "evaluations": [
                {"step": record["step"], "rows": _without_copies(_signed(record["shown"]), texts)}
                for record in thinned([r for r in run.held_out if r["shown"]], MOST_EVALUATIONS)
            ],
        }
        for run in runs
    ]
    return {"runs": kept, "texts": list(map(list, texts))}


def _without_copies(rows: list[dict], texts: dict[tuple[str, ...], int]) -> list[dict]:
    """Put numbers in place of the texts of segments, which most evaluations share.

    texts: the number of each, which grows.
    """
    for row in rows:
        for segment in row["segments"]:
            segment["texts"] = texts.setdefault(tuple(segment["texts"]), len(texts))
    return rows


def _signed(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {name: _signed(part) for name, part in value.items()}
    return [_signed(part) for part in value] if isinstance(value, list) else value
