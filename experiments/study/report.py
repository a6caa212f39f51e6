"""Tables, tests and curves of the study's results."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from sizes import MODELS, StudyPlan

from refine_jax.base.figures import finish, new_figure, save_figure
from refine_jax.evaluation.intervals import compare

TITLES = {"deltanet": "DeltaNet", "lact": "LaCT"}
_COLOURS = {"ntp": "C0", "refine": "C1"}
_NAMES = {
    "ntp": "NTP",
    "refine": "ReFINE",
    "none": "no post-training",
    "sft": "SFT",
    "nested_sft": "nested SFT",
    "nested_refine": "nested ReFINE",
}


def report(
    workdir: Path, plan: StudyPlan, ablations: Iterable[str], estimators: Iterable[str]
) -> str:
    """Write study.md, study.json and study.png of all models that are done; return the text."""
    done = [name for name in MODELS if (workdir / name / "chosen.json").is_file()]
    if not done:
        raise FileNotFoundError(f"no finished runs in {workdir}: run the study first.")
    parts, content = [], {}
    for name in done:
        results = _Results(workdir / name, plan)
        sections = {
            "learning rates": _rates(results),
            "mid-training": _midtraining(results),
            "tests": _tests(results),
            "ablations": _ablations(results, ablations),
            "signal": _signals({TITLES[name]: results.signals(estimators)}),
            "questions": _questions(results),
        }
        content[name] = {"chosen": results.chosen, **sections}
        parts.append(f"### {TITLES[name]}\n\n{_describe(results)}")
        parts += [_markdown(rows) for rows in sections.values() if rows]
    text = "\n\n".join(parts) + "\n"
    (workdir / "study.md").write_text(text, encoding="utf-8")
    (workdir / "study.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _plot(workdir, plan, done)
    return text


def report_signals(workdir: Path, plan: StudyPlan, estimators: Iterable[str]) -> str:
    """A table of how much of the estimators' gradients is signal, then its figures as JSON.

    The JSON, on one line: {model: {"base": last point of the pre-training's curve, "signals":
    {estimator: figures of `Lab.signal`}}}.
    """
    models = {name: _Results(workdir / name, plan) for name in MODELS}
    found = {
        name: {"base": results.read("base")["curve"][-1], "signals": results.signals(estimators)}
        for name, results in models.items()
        if results.signals(estimators)
    }
    if not found:
        raise FileNotFoundError(f"no measured signals in {workdir}: run with --signals first.")
    rows = _signals({TITLES[name]: figures["signals"] for name, figures in found.items()})
    return f"{_markdown(rows)}\n\n{json.dumps(found)}"


class _Results:
    """The records of one model."""

    def __init__(self, folder: Path, plan: StudyPlan):
        self.folder, self.plan = folder, plan
        self.lengths = [shape.length for shape in plan.sizes.measured]

    @functools.cached_property
    def chosen(self) -> dict[str, Any]:
        """Learning rates, and how many steps take how long; of a study that is done."""
        return json.loads((self.folder / "chosen.json").read_text(encoding="utf-8"))

    def read(self, name: str) -> dict[str, Any] | None:
        """What a run gave; None: it is not done."""
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8"))["results"] if file.is_file() else None

    def seeds(self, prefix: str) -> list[dict[str, Any]]:
        """The runs that are done, in order of their seeds."""
        runs = (self.read(f"{prefix}-{seed}") for seed in range(self.plan.seeds))
        return [run for run in runs if run is not None]

    def measured(self, prefix: str, steps: int) -> list[dict[str, Any]]:
        """Figures after so many steps of mid-training, one a seed."""
        return [run["measured"][str(steps)] for run in self.seeds(prefix)]

    def signals(self, estimators: Iterable[str]) -> dict[str, dict[str, float]]:
        """Figures of the estimators that were measured, in their order."""
        shares = {name: self.read(f"share-{name}") for name in estimators}
        return {name: figures for name, figures in shares.items() if figures is not None}


def _describe(results: _Results) -> str:
    chosen = results.chosen
    seconds = chosen["step_seconds"]
    rates = ", ".join(f"{name} {rate:g}" for name, rate in chosen["rates"].items())
    return (
        f"A step of mid-training: NTP {seconds['ntp']:.2f} s, ReFINE {seconds['refine']:.2f} s "
        f"({seconds['refine'] / seconds['ntp']:.2f} x); {chosen['steps']} steps, which in time are "
        f"{chosen['equal_compute_steps']} of NTP. Learning rates: {rates}."
    )


def _rates(results: _Results) -> list[dict[str, str]]:
    """What learning rates were chosen by: one seed, held-out documents of their own."""
    steps, length, rows = str(results.chosen["steps"]), results.lengths[1], []
    for rate in results.plan.rates:
        row = {"one seed, other documents": f"rate {rate:g}"}
        for objective in ("ntp", "refine"):
            run = results.read(f"tune-{objective}-{rate:g}")
            if run is not None:
                figures, name = run["measured"][steps], _NAMES[objective]
                row[f"{name}: loss {length}, nats"] = f"{figures[f'loss_{length}']:.3f}"
                row[f"{name}: recall {length}, %"] = _spread([figures[f"recall_{length}"]], 100)
        if len(row) > 1:
            rows.append(row)
    return rows


def _midtraining(results: _Results) -> list[dict[str, str]]:
    steps, equal = results.chosen["steps"], results.chosen["equal_compute_steps"]
    runs = {
        "before": [results.read("before")],
        f"NTP, {steps} steps": results.measured("mid-ntp", steps),
        f"NTP, {equal} steps (equal time)": results.measured("mid-ntp", equal),
        f"ReFINE, {steps} steps": results.measured("mid-refine", steps),
    }
    columns = _columns(results)
    return [
        {"mid-training": label}
        | {title: _spread([run[name] for run in trials], scale) for title, name, scale in columns}
        for label, trials in runs.items()
    ]


def _columns(results: _Results) -> list[tuple[str, str, float]]:
    lengths = results.lengths
    columns = [(f"recall {length}, %", f"recall_{length}", 100) for length in lengths]
    columns += [(f"loss {length}, nats", f"loss_{length}", 1) for length in lengths[1:]]
    return [*columns, ("reward, %", "reward", 100)]


def _tests(results: _Results) -> list[dict[str, str]]:
    """Differences ReFINE - NTP, paired by seed, and by held-out document."""
    steps, equal = results.chosen["steps"], results.chosen["equal_compute_steps"]
    refine, rows = results.measured("mid-refine", steps), []
    for label, at in (("equal steps", steps), ("equal time", equal)):
        ntp = results.measured("mid-ntp", at)
        for title, name, scale in _columns(results):
            pair = [[scale * run[name] for run in runs] for runs in (ntp, refine)]
            row = {"ReFINE - NTP": f"{label}: {title}"} | _paired(*pair)
            documents = f"recalls_{name.removeprefix('recall_')}"
            if name.startswith("recall_"):
                means = [
                    np.mean([run[documents] for run in runs], axis=0) for runs in (ntp, refine)
                ]
                row["p, by document"] = _p_value(compare(*means).p_value)
            rows.append(row)
    return rows


def _paired(first: Sequence[float], second: Sequence[float]) -> dict[str, str]:
    """Mean difference with its 95 % interval and the p of a paired t-test over seeds."""
    differences = np.subtract(second, first)
    mean = round(differences.mean(), 9) + 0.0  # equal means differ by 0, not by their rounding
    if len(differences) < 2 or differences.std() < 1e-9:
        return {"difference": f"{mean:+.3g}", "95 % interval": "", "p, by seed": ""}
    test = stats.ttest_rel(second, first)
    low, high = test.confidence_interval()
    return {
        "difference": f"{mean:+.3g}",
        "95 % interval": f"{low:+.3g} to {high:+.3g}",
        "p, by seed": _p_value(test.pvalue),
    }


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _ablations(results: _Results, ablations: Iterable[str]) -> list[dict[str, str]]:
    steps, seeds = results.chosen["steps"], results.plan.ablation_seeds
    default = results.measured("mid-refine", steps)[:seeds]
    ntp = results.measured("mid-ntp", steps)[:seeds]
    runs = {"NTP": ntp, "ReFINE (cosine, entropy, k=5, c=8)": default}
    runs |= {name: results.measured(f"ablation-{name}", steps) for name in ablations}
    rows = []
    for label, trials in runs.items():
        if not trials:
            continue
        row = {f"{seeds} seeds": label}
        for title, name, scale in _columns(results):
            row[title] = _spread([run[name] for run in trials], scale)
        length = results.lengths[1]
        if label != "NTP" and len(trials) == len(ntp):
            pair = [[100 * run[f"recall_{length}"] for run in runs] for runs in (ntp, trials)]
            test = _paired(*pair)
            row[f"recall {length} - NTP's, points"] = (
                f"{test['difference']} (p {test['p, by seed']})"
            )
        rows.append(row)
    return rows


def _signals(models: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[dict[str, str]]:
    """How much of a batch's gradient is not noise: a row an estimator, columns for each model."""
    rows: dict[str, dict[str, str]] = {}
    for title, signals in models.items():
        for name, signal in signals.items():
            row = rows.setdefault(name, {"gradient of a batch, base model": name})
            for label, share in (("signal", "signal"), ("same documents", "same_documents")):
                error = signal[f"{share}_error"]
                row[f"{title}: {label}, %"] = f"{100 * signal[share]:.1f} ({100 * error:.1f})"
            row[f"{title}: norm"] = f"{signal['norm_ratio']:.3g}"
            row[f"{title}: cosine"] = f"{signal['cosine']:+.3f}"
    return list(rows.values())


def _questions(results: _Results) -> list[dict[str, str]]:
    """Post-training, then test-time training of the last: answers to held-out questions."""
    rows, asked = [], results.plan.sizes.questions_adapted
    names = ("none", "sft", "nested_sft", "nested_refine")
    post = {name: results.seeds(f"post-{name}") for name in names}
    reference = [100 * run["recall"] for run in post["sft"]]
    for name, runs in post.items():
        recalls = [100 * run["recall"] for run in runs]
        row = {"answers right, %": _NAMES[name], "mean (deviation)": _spread(recalls)}
        if name.startswith("nested"):
            row |= {"against": "SFT"} | _paired(reference, recalls)
        rows.append(row)
    before = [100 * statistics.fmean(run["recalls"][:asked]) for run in post["nested_refine"]]
    rows.append(
        {
            "answers right, %": f"nested ReFINE, first {asked} questions",
            "mean (deviation)": _spread(before),
        }
    )
    for name in ("ntp", "refine"):
        runs = results.seeds(f"testtime-{name}")
        recalls = [100 * run["recall"] for run in runs]
        known = [run["seconds"] for run in runs if run["seconds"] is not None]
        time = f"{statistics.median(known):.2f} s a prompt" if known else "-"
        rows.append(
            {
                "answers right, %": f"the same, test-time {_NAMES[name]}, {time}",
                "mean (deviation)": _spread(recalls),
                "against": "no test-time training",
            }
            | _paired(before, recalls)
        )
    return rows


def _spread(values: Sequence[float], scale: float = 1) -> str:
    values = [scale * value for value in values]
    digits = 1 if scale == 100 or max(map(abs, values)) >= 10 else 3
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ({statistics.stdev(values):.{digits}f})"


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(row.get(name, "") for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _plot(workdir: Path, plan: StudyPlan, models: Sequence[str]) -> None:
    figure, axes = new_figure(len(models), 4, (19, 4.2 * len(models)))
    for name, (base, loss, recall, reward) in zip(models, axes, strict=True):
        results = _Results(workdir / name, plan)
        points = results.read("base")["curve"]
        tokens = [point["tokens"] / 1e6 for point in points]
        base.plot(tokens, [100 * point["recall"] for point in points], color="C2", marker=".")
        base.set_xlabel("million tokens")
        finish(base, f"{TITLES[name]}: pre-training", "values recalled (%)")
        for objective, colour in _COLOURS.items():
            seconds = results.chosen["step_seconds"][objective]
            curves = [run["curve"] for run in results.seeds(f"mid-{objective}")]
            steps = [point["step"] for point in curves[0]]
            for axis, field, scale in ((loss, "loss", 1), (recall, "recall", 100)):
                values = scale * np.array([[p[field] for p in curve] for curve in curves])
                x = steps if axis is loss else [seconds * step for step in steps]
                mean, half = values.mean(axis=0), _half_width(values)
                axis.plot(x, mean, color=colour, label=_NAMES[objective], marker=".")
                axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.2, lw=0)
        loss.set_xlabel("training step")
        finish(loss, "Mid-training: held-out loss", "nats a token")
        recall.set_xlabel("seconds of training")
        finish(recall, "Held-out recall (bands: 95 % over seeds)", "values recalled (%)")
        rewards = np.array([run["rewards"] for run in results.seeds("mid-refine")])
        steps = np.arange(1, rewards.shape[1] + 1)
        reward.plot(steps, rewards.T, color="C1", alpha=0.25, lw=0.8)
        reward.plot(steps, rewards.mean(axis=0), color="C1", label="mean of the seeds")
        reward.set_xlabel("training step")
        finish(reward, "Reward of the training rollouts", "cosine")
    save_figure(figure, workdir / "study.png")


def _half_width(values: np.ndarray) -> np.ndarray:
    """Half of Student's 95 % interval of the mean of values [seeds, points]."""
    seeds = len(values)
    if seeds < 2:
        return np.zeros(values.shape[1])
    return stats.t.ppf(0.975, seeds - 1) * values.std(axis=0, ddof=1) / math.sqrt(seeds)
