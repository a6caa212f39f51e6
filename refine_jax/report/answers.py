"""The page's sections of evaluations: scores, needles, what adapting cost, and every answer."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from bokeh.palettes import cividis

from refine_jax.evaluation.intervals import compare
from refine_jax.evaluation.report import DepthRecall, recall_by_depth, summarize
from refine_jax.report.markup import number, section, table, text, visible
from refine_jax.report.runs import Run
from refine_jax.report.training import settings

MOST_ANSWERS = 2000
"""Answers that a page shows; all count in its figures."""
_HEAT = cividis(101)  # from dark blue to yellow, which the colour-blind tell apart
_DARK = 47  # colours on which white is more legible than black
_LONG = 600  # characters of an answer that are shown before a click


def sections(runs: Sequence[Run], *, with_settings: bool = True) -> str:
    """Write the sections of one evaluation, or of several side by side.

    with_settings: whether the settings of one are shown.
    """
    (first, *_), several = runs, len(runs) > 1
    intervals = "The bar is the mean score, the line across its end the 95 % interval."
    body = "".join(_scores(run, several) for run in runs)
    needles = "".join(_needles(run, several) for run in runs)
    adaptation = "".join(_adaptation(run, several) for run in runs)
    parts = [section("scores", "Scores", body, intervals)]
    if several:
        parts.append(section("answers-paired", "Paired scores", _paired(runs), _PAIRED))
    parts += [
        section("needles", "Needles", needles, "Share of needles found, by depth and length."),
        section("adaptation", "Test-time training", adaptation),
        section("answers", "Answers", _answers(runs)),
    ]
    if with_settings and not several:
        parts.append(section("settings", "Settings", settings(first)))
    return "".join(parts)


_PAIRED = (
    "Every run answered the same prompts: differences are taken prompt by prompt, which leaves out "
    "that some prompts are harder. p: how often a difference at least as large arises by chance."
)


_PAIRED_HEAD = ("difference", "95 % interval", "p", "better / worse", "prompts")


def _scores(run: Run, several: bool) -> str:
    results = summarize(run.predictions)
    rows = []
    for name, figures in results["sets"].items():
        low, mean, high = (100 * figures[name] for name in ("low", "mean", "high"))
        bar = (
            f'<span class="bar" role="img" aria-label="{mean:.1f} %, from {low:.1f} to {high:.1f}">'
            f'<span style="width:{mean:.2f}%"></span>'
            f'<i style="left:{low:.2f}%;width:{high - low:.2f}%"></i></span>'
        )
        cut = f"{figures['prompts_cut']:,}" if figures["prompts_cut"] else "–"
        interval = f"{low:.1f} – {high:.1f}"
        rows.append(
            [
                text(name),
                number(mean, 1),
                interval,
                bar,
                f"{figures['samples']:,}",
                text(figures["metric"]),
                f"{figures['prompt_tokens']:,.0f}",
                cut,
            ]
        )
    if len(rows) > 1:
        rows.append(
            ["mean", number(100 * results["mean"], 1), "", "", f"{results['samples']:,}"] + [""] * 3
        )
    head = ("Set", "score (%)", "95 % interval", "0 to 100 %", "answers", "metric", "tokens", "cut")
    caption = f"Scores: {run.name}" if several else "Scores"
    kind = "scores" if several else "scores unsaid"
    speed = f"{results['tokens_per_second']:,.0f} tokens a second, prompts included."
    return table(caption, head, rows, kind) + f'<p class="note">{speed}</p>\n'


def _paired(runs: Sequence[Run]) -> str:
    base, *others = runs
    first = {record["id"]: record for record in base.predictions}
    rows = []
    for run in others:
        pairs = [
            (first[record["id"]], record)
            for record in run.predictions
            if _same_question(first.get(record["id"]), record)
        ]
        for name in dict.fromkeys(record["set"] for _, record in pairs):
            row = _difference(name, [pair for pair in pairs if pair[1]["set"] == name])
            rows.append([text(run.name), *row])
    head = ("Run", "set", *_PAIRED_HEAD)
    caption = f"Scores minus those of {base.name}, in points"
    return table(caption, head, rows, "paired") if rows else ""


def _difference(name: str, pairs: Sequence[tuple[Mapping, Mapping]]) -> list[str]:
    """Write the cells of a set: its name, and those of `_PAIRED_HEAD`."""
    before, after = ([pair[i]["score"] for pair in pairs] for i in (0, 1))
    result = compare(before, after)
    better = sum(b > a for a, b in zip(before, after, strict=True))
    worse = sum(b < a for a, b in zip(before, after, strict=True))
    return [
        text(name),
        number(100 * result.difference, 1, sign=True),
        f"{number(100 * result.low, 1, sign=True)} – {number(100 * result.high, 1, sign=True)}",
        f"{result.p_value:.3f}" if result.p_value >= 0.001 else "below 0.001",
        f"{better:,} / {worse:,}",
        f"{result.samples:,}",
    ]


def _same_question(one: Mapping[str, Any] | None, two: Mapping[str, Any]) -> bool:
    return one is not None and all(
        one[name] == two[name] for name in ("set", "prompt_tokens", "answers", "metric")
    )


def _needles(run: Run, several: bool) -> str:
    tasks = dict.fromkeys(record["task"] for record in run.predictions)
    recalls = {task: recall_by_depth(run.predictions, task) for task in tasks}
    label = f", {run.name}" if several else ""
    return "".join(
        _heatmap(f"Needles found (%): {task}{label}", recall)
        for task, recall in recalls.items()
        if recall
    )


def _heatmap(caption: str, recall: DepthRecall) -> str:
    """Draw scores, depth downwards and length across."""
    rows = []
    for place, depth in enumerate(recall.depths):
        low = recall.depths[place - 1] if place else 0
        cells = [f"{low}–{depth} %"]
        for length in range(len(recall.lengths)):
            value, count = recall.recall[length][place], recall.counts[length][place]
            cells.append(_cell(value, count))
        rows.append(cells)
    head = ("depth", *(f"{length:,} tokens" for length in recall.lengths))
    return table(caption, head, rows, "heat")


def _cell(value: float | None, count: int) -> str:
    if value is None:
        return '<span class="none">none there</span>'
    share = round(100 * value)
    colour, ink = _HEAT[share], "#fff" if share < _DARK else "#000"
    style = f"--b:{colour};--t:{ink}"
    return f'<span class="cell" style="{style}">{share} <small>of {count}</small></span>'


def _adaptation(run: Run, several: bool) -> str:
    cost = summarize(run.predictions)["adaptation"]
    if not cost:
        return ""
    rows = [
        ["Seconds, in all", number(cost["seconds"], 1)],
        ["Seconds a prompt, without compilation", number(cost["seconds_per_example"], 2)],
        ["Tokens a prompt", number(cost["tokens_per_example"], 0)],
        ["Rollout tokens a prompt", number(cost["rollout_tokens_per_example"], 0)],
        ["Prompts without rollouts", number(cost["examples_without_rollouts"], 0)],
        ["Prompts not adapted to", number(cost["examples_not_adapted"], 0)],
        ["Prompts with skipped updates", number(cost["examples_with_skipped_updates"], 0)],
    ]
    label = f": {run.name}" if several else ""
    return _gained(run, label) + table(f"What it took{label}", ("Figure", "value"), rows)


def _gained(run: Run, label: str) -> str:
    """Draw scores after training on each prompt against those before, where both exist."""
    pairs = [(record["before"], record) for record in run.predictions if "before" in record]
    sets = dict.fromkeys(record["set"] for _, record in pairs)
    rows = [_difference(name, [pair for pair in pairs if pair[1]["set"] == name]) for name in sets]
    head = ("Set", *_PAIRED_HEAD)
    return table(f"Scores after minus before, in points{label}", head, rows) if rows else ""


def _answers(runs: Sequence[Run]) -> str:
    """List every answer beside its references, with what searches them."""
    others = [(run.name, {r["id"]: r for r in run.predictions}) for run in runs[1:]]
    records = runs[0].predictions
    shown = records[:MOST_ANSWERS]
    sets = dict.fromkeys(record["set"] for record in shown)
    options = "".join(f"<option>{text(name)}</option>" for name in sets)
    several = len(runs) > 1
    changed = '<option value="changed">scores that differ</option>' * several
    controls = f"""<form class="controls" id="a-form" role="search">
<label>Search <input type="search" id="a-search" autocomplete="off"
 placeholder="in answers, references and names"></label>
<label>Set <select id="a-set"><option value="">all</option>{options}</select></label>
<label>Show <select id="a-kind"><option value="">all</option><option value="right">right</option>
<option value="part">partly right</option><option value="wrong">wrong</option>{changed}</select>
</label>
<output id="a-count" aria-live="polite">{len(shown):,} answers</output></form>
"""
    left = len(records) - len(shown)
    note = f'<p class="note">{left:,} further answers are in predictions.jsonl.</p>' if left else ""
    cards = "".join(
        _card(
            record,
            [(name, other.get(record["id"])) for name, other in others],
            runs[0].name if several else "",
        )
        for record in shown
    )
    return f'{controls}{note}<div id="a-list" class="answers">{cards}</div>\n' if shown else ""


def _card(
    record: Mapping[str, Any], others: Sequence[tuple[str, Mapping | None]], name: str
) -> str:
    """Write an answer with its references, and beside it those of other runs to the same prompt."""
    kinds = [_kind(record["score"])]
    responses = [_response(name or "answer", record, record["answers"])]
    for label, other in others:
        if other is not None and _same_question(record, other):
            responses.append(_response(label, other, record["answers"]))
            if other["score"] != record["score"]:
                kinds.append("changed")
    facts = [f"{record['prompt_tokens']:,} tokens"]
    if record["cut_tokens"]:
        facts.append(f"{record['cut_tokens']:,} cut")
    if record["finish_reason"]:
        facts.append(f"ended by {record['finish_reason']}")
    if loss := _losses(record.get("adapt")):
        facts.append(loss)
    references = "".join(
        f"<li><bdi>{text(answer) or '<em>empty</em>'}</bdi></li>" for answer in record["answers"]
    )
    return (
        f'<article class="card" data-set="{text(record["set"])}" data-kind="{" ".join(kinds)}">'
        f"<header><h3><bdi>{text(record['id'])}</bdi></h3> <small>{text(' · '.join(facts))}</small>"
        f"</header><dl>{''.join(responses)}<div><dt>references</dt><dd><ul>{references}</ul></dd>"
        "</div></dl></article>\n"
    )


def _kind(score: float) -> str:
    return "right" if score >= 1 else "wrong" if score <= 0 else "part"


def _losses(costs: Any) -> str:
    """Take the prompt's next-token loss in the last pass over it, before its update."""
    if not isinstance(costs, Mapping) or costs.get("loss") is None:
        return ""
    return f"prompt loss {costs['loss']:.3f}"


def _response(label: str, record: Mapping[str, Any], answers: Sequence[Any]) -> str:
    kind = _kind(record["score"])
    before = record.get("before")
    rows = [(label, record["response"], record["score"], kind)]
    if isinstance(before, Mapping):
        of = "" if label == "answer" else f"{label}, "
        rows[0] = (f"{of}after training", *rows[0][1:])
        earlier = before["score"]
        rows.insert(0, (f"{of}before training", before["response"], earlier, _kind(earlier)))
    return "".join(
        f'<div><dt>{text(name)} <span class="score {kind}">{100 * score:.0f} %</span></dt>'
        f"<dd>{_long(_marked(response, answers))}</dd></div>"
        for name, response, score, kind in rows
    )


def _long(marked: tuple[str, str]) -> str:
    whole, plain = marked
    if len(plain) <= _LONG:
        return f'<bdi class="said">{whole or "<em>empty</em>"}</bdi>'
    return (
        f'<details><summary><bdi class="said">{text(plain[:200])} …</bdi></summary>'
        f'<bdi class="said">{whole}</bdi></details>'
    )


def _marked(response: str, answers: Sequence[Any]) -> tuple[str, str]:
    """Write the response as HTML in which references stand out, and as text."""
    plain = visible(response)
    lower = plain.lower()
    matches = []
    for answer in answers if len(lower) == len(plain) else ():
        wanted = visible(str(answer)).lower().strip()
        at = lower.find(wanted) if wanted else -1
        if at >= 0:
            matches.append((at, at + len(wanted)))
    parts, done = [], 0
    for a, b in sorted(matches):
        if a >= done:
            parts += [html.escape(plain[done:a]), f"<mark>{html.escape(plain[a:b])}</mark>"]
            done = b
    return "".join([*parts, html.escape(plain[done:])]), plain
