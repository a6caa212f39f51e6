"""Tables and curves of the study's results, with paired differences and their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arms import ARMS, FINAL, SMALL
from scipy import stats
from signals import at_equal_cost

from refine_jax.base.figures import finish, new_figure, save_figure

TITLES = {"deltanet": "DeltaNet", "lact": "LaCT", "symbols": "symbols"}
TITLES |= {"crowded": "crowded symbols", "half": "half of crowded symbols", "text": "text"}
# Column, figure, factor, digits.
_COLUMNS = (
    ("recall, %", "recall_1", 100, 1),
    ("sampled, %", "sampled_1", 100, 1),
    ("loss, nats", "loss_1", 1, 3),
    ("calibration error, %", "calibration_1", 100, 1),
    ("recall 2T, %", "recall_2", 100, 1),
    ("recall 4T, %", "recall_4", 100, 1),
)
Line = dict[str, Any]


def report(lines: Sequence[Line]) -> str:
    """The tables of all that is done, as Markdown. Raises FileNotFoundError where nothing is."""
    if not lines:
        raise FileNotFoundError("no finished runs: run the study first.")
    parts = []
    pairs = {(line["task"], line["family"]): None for line in lines}
    for task, family in pairs:
        own = [line for line in lines if (line["task"], line["family"]) == (task, family)]
        tables = [_saturation(own), _arms(own), _cooled(own), _signals(own), _answers(own)]
        parts.append(f"### {TITLES[task].capitalize()}, {TITLES[family]}")
        parts += [markdown(table) for table in tables if table]
    return "\n\n".join(parts)


# Arms that differ in their weight alone.
_CURVES = ("exact whole", "published", "oracle", "weight p")


def plot_trade(lines: Sequence[Line], path: Path) -> None:
    """Draw what each weight gains in recall for its loss, as curves over lambda_rl, to a PNG.

    Of tasks and families of which an arm has been run with several weights.
    """
    runs = _of_kind(lines, "final")
    weighed = [line for line in runs if ", lambda_rl=" in line["arm"]]
    found = list(dict.fromkeys((line["task"], line["family"]) for line in weighed))
    if not found:
        return
    figure, axes = new_figure(len(found), 2, (11, 4.2 * len(found)))
    for (task, family), row in zip(found, np.reshape(axes, (len(found), 2)), strict=True):
        own = [line for line in runs if (line["task"], line["family"]) == (task, family)]
        for axis, figure_name in zip(row, ("recall", "sampled"), strict=True):
            for number, name in enumerate(_CURVES):
                points = trade(own, name, f"{figure_name}_1")
                if points:
                    axis.plot(*np.transpose(points)[1:], color=f"C{number}", marker="o", label=name)
                    for weight, *at in points:
                        axis.annotate(f"{weight:g}", at, fontsize=8)
            axis.axhline(0, color="grey", lw=0.8)
            axis.set_xlabel("next-token loss against NTP, nats")
            title = f"{TITLES[family]}, {TITLES[task]}: by lambda_rl"
            finish(axis, title, f"{figure_name} against NTP, points")
    save_figure(figure, path)


def trade(lines: Sequence[Line], name: str, figure: str) -> list[tuple[float, float, float]]:
    """Find (lambda_rl, difference of loss, of `figure` in points) of an arm at each weight."""
    ntp, points = [line for line in lines if line["arm"] == "ntp"], []
    for other, arm in ARMS.items():
        if other != name and not other.startswith(f"{name}, lambda_rl="):
            continue
        pairs = paired(ntp, [line for line in lines if line["arm"] == other])
        if pairs:
            losses, gains = (
                np.mean([b["measured"][key] - a["measured"][key] for a, b in pairs])
                for key in ("loss_1", figure)
            )
            points.append((arm.config({}).lambda_rl, float(losses), float(100 * gains)))
    return sorted(points)


def _of_kind(lines: Iterable[Line], kind: str, **wanted: Any) -> list[Line]:
    return [
        line
        for line in lines
        if line["kind"] == kind and all(line[name] == value for name, value in wanted.items())
    ]


def _saturation(lines: Sequence[Line]) -> list[dict[str, str]]:
    """What further next-token training adds to the base models, at each learning rate."""
    bases = {line["base"]: line for line in _of_kind(lines, "base")}
    runs = _of_kind(lines, "saturation")
    rows = []
    for rate in sorted({line["rate"] for line in runs}):
        of_rate = [line for line in runs if line["rate"] == rate]
        pairs = [(bases[line["base"]], line) for line in of_rate]
        if not rows:
            rows.append({"next-token training": "base models"} | _means([b for b, _ in pairs]))
        row = {"next-token training": f"rate {rate:g}"} | _means(of_rate)
        row |= _differences(pairs, "recall_1", "recall against base, points", 100, 2)
        row |= _differences(pairs, "loss_1", "loss against base, nats", 1, 4)
        rows.append(row)
    return rows


def _cooled(lines: Sequence[Line]) -> list[dict[str, str]]:
    """What a lower temperature alone does to the base models."""
    bases = {line["base"]: line for line in _of_kind(lines, "base")}
    runs, rows = _of_kind(lines, "cooled"), []
    for temperature in dict.fromkeys(line["temperature"] for line in runs):
        of_one = [line for line in runs if line["temperature"] == temperature]
        pairs = [(bases[line["base"]], line) for line in of_one]
        row = {"base models at temperature": f"{temperature:g}", "seeds": str(len(pairs))}
        row |= _differences(pairs, "sampled_1", "sampled against base, points", 100, 2)
        row |= _differences(pairs, "loss_1", "loss against base, nats", 1, 4)
        rows.append(row)
    return rows


def _arms(lines: Sequence[Line]) -> list[dict[str, str]]:
    """Every arm against next-token training, at equal steps and at equal time."""
    runs = {name: _of_kind(lines, "final", arm=name) for name in ARMS}
    costs = {line["arm"]: line["ratio"] for line in _of_kind(lines, "cost")}
    rows = []
    for name, of_arm in runs.items():
        if not of_arm:
            continue
        row = {"arm": name, "seeds": str(len(of_arm)), "rate": f"{of_arm[0]['rate']:g}"}
        row |= _means(of_arm)
        if name != "ntp":
            pairs = paired(runs["ntp"], of_arm)
            row |= _differences(pairs, "recall_1", "recall against NTP, points", 100, 2)
            row |= _differences(pairs, "sampled_1", "sampled against NTP, points", 100, 2)
            row |= _differences(pairs, "loss_1", "loss against NTP, nats", 1, 4)
        if name in costs and not name.startswith("ntp"):
            row["step"] = f"{costs[name]:.2f} x"
            longer = equal_time(costs[name], runs)
            if longer is not None:
                pairs = paired(runs[longer], of_arm)
                row |= _differences(pairs, "recall_1", "at equal time, points", 100, 2)
        rows.append(row)
    return rows


def equal_time(cost: float, runs: Mapping[str, Sequence[Line]]) -> str | None:
    """The shortest next-token training that took at least the time of an arm's; None: none did.

    cost: of the arm's step, as a multiple of next-token training's; 5 % more are taken as equal.
    """
    longer = sorted(
        (ARMS[name].times, name)
        for name, of_arm in runs.items()
        if of_arm and name.startswith("ntp") and ARMS[name].times >= cost / 1.05
    )
    return longer[0][1] if longer else None


def paired(first: Sequence[Line], second: Sequence[Line]) -> list[tuple[Line, Line]]:
    """Runs of both that started from the same base model with the same seed."""
    found = {(line["seed"], line["base"]): line for line in first}
    return [(found[key], line) for line in second if (key := (line["seed"], line["base"])) in found]


def _means(lines: Sequence[Line]) -> dict[str, str]:
    row = {}
    for title, name, factor, digits in _COLUMNS:
        values = [factor * line["measured"][name] for line in lines if name in line["measured"]]
        if values:
            row[title] = f"{np.mean(values):.{digits}f}"
    return row


def _differences(
    pairs: Sequence[tuple[Line, Line]], name: str, title: str, factor: float, digits: int
) -> dict[str, str]:
    values = [[factor * run["measured"][name] for run in side] for side in zip(*pairs, strict=True)]
    return {title: difference(*values, digits=digits)} if pairs else {}


def difference(first: Sequence[float], second: Sequence[float], *, digits: int = 2) -> str:
    """Mean of second - first, paired, with Student's 95 % interval."""
    differences = np.subtract(second, first)
    mean = f"{differences.mean():+.{digits}f}"
    if len(differences) < 2:
        return mean
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return f"{mean} +- {half:.{digits}f}"


def _signals(lines: Sequence[Line]) -> list[dict[str, str]]:
    costs = {line["arm"]: line["ratio"] for line in _of_kind(lines, "cost")}
    rows = []
    for line in _of_kind(lines, "signal"):
        row = {"gradient of a batch": line["arm"]}
        for title, name in (("signal, %", "signal"), ("same rows, %", "same_rows")):
            row[title] = f"{100 * line[name]:.1f} ({100 * line[f'{name}_error']:.1f})"
        if cost := costs.get(line["arm"]):
            row["step"] = f"{cost:.2f} x"
            row["signal at the cost of NTP, %"] = f"{100 * at_equal_cost(line['signal'], cost):.1f}"
        rows.append(row | {"norm": f"{line['norm_ratio']:.3g}", "cosine": f"{line['cosine']:+.3f}"})
    return rows


def _answers(lines: Sequence[Line]) -> list[dict[str, str]]:
    """Post-training against answers only, and test-time training against none."""
    seeds, rows = {*FINAL.final, *SMALL.final}, []
    runs = [line for line in _of_kind(lines, "posttrain") if line["seed"] in seeds]
    by_arm = {line["arm"]: [] for line in runs}
    for line in runs:
        by_arm[line["arm"]].append(line)
    for name, of_arm in by_arm.items():
        values = [100 * line["recall"] for line in of_arm]
        row = {"answers right, %": f"post-training: {name}", "mean": f"{np.mean(values):.1f}"}
        if name != "answers only":
            pairs = paired(by_arm["answers only"], of_arm)
            both = [[100 * run["recall"] for run in side] for side in zip(*pairs, strict=True)]
            row["difference, points"] = difference(*both)
        rows.append(row | {"seeds": str(len(of_arm))})
    adapted = [line for line in _of_kind(lines, "testtime") if line["seed"] in seeds]
    for name in dict.fromkeys(line["arm"] for line in adapted):
        of_arm = [line for line in adapted if line["arm"] == name]
        both = [[100 * line[key] for line in of_arm] for key in ("recall_before", "recall")]
        rows.append(
            {
                "answers right, %": f"test time, after answers only: {name}",
                "mean": f"{np.mean(both[1]):.1f}",
                "difference, points": difference(*both),
                "seeds": str(len(of_arm)),
            }
        )
    return rows


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table; columns in the order in which rows first have them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(row.get(name, "") for name in columns) + " |" for row in rows]
    return "\n".join(lines)
