"""Trainings from one start, asked the same questions: what they share, and what is reported."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_runs import tiny_run

from refine_jax.base.errors import ConfigError
from refine_jax.config import Config
from refine_jax.phases import compare
from refine_jax.presets import PRESETS
from refine_jax.report import trackers
from refine_jax.report.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("compile_once")


def configured(**changes):
    sections = {
        "data": {"source": "recall", "sequence_length": 64, "limit_documents": 12, "holdout": 0.2},
        # Exact, which compiles soonest, and with a weight that shows after two steps.
        "refine": {"edge_margin": 4, "estimator": "exact", "reward": "whole", "lambda_rl": 100.0},
        "train": {"steps": 2, "batch_size": 4, "eval_batches": 1, "checkpoint_every": 0},
        "evaluate": {"tasks": "recall", "lengths": "192,200", "samples": 3, "batch_size": 4},
        "generation": {"max_new_tokens": 3},
        "compare": {"arms": "ntp,refine"},
    }
    return Config.from_dict(tiny_run("compare", sections, changes))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("compared")
    return workdir, compare.run(configured(), workdir)


def test_the_arms_begin_alike_and_see_the_same_rows(compared):
    workdir, _ = compared
    first, second = (read_metrics(workdir / arm / "metrics.jsonl") for arm in ("ntp", "refine"))
    assert first[0]["eval/loss"] == second[0]["eval/loss"]
    assert first[1]["loss/ntp"] == second[1]["loss/ntp"]  # before an update tells them apart
    assert first[2]["eval/loss"] != second[2]["eval/loss"]
    rows = [
        json.loads((workdir / arm / "checkpoints/run.json").read_text())
        for arm in ("ntp", "refine")
    ]
    assert rows[0]["data"] == rows[1]["data"]
    assert rows[1]["config"]["refine"]["estimator"] == "exact"


def test_each_arm_answers_with_what_it_has_learnt(compared):
    """Of each evaluation the parameters are those of another model."""
    workdir, _ = compared
    records = [json.loads(path.read_text()) for path in sorted(workdir.glob("*/evaluation.json"))]
    assert len(records) == 3 == len({record["parameters"] for record in records})
    assert len({record["questions"] for record in records}) == 1


def test_the_figures_are_those_of_the_parts(compared):
    workdir, figures = compared
    assert json.loads((workdir / "results.json").read_text()) == figures
    assert list(figures["scores"]) == ["recall/192", "recall/200", "all"]
    for arm in ("before", "ntp", "refine"):
        results = json.loads((workdir / f"answers-{arm}" / "results.json").read_text())
        assert figures["scores"]["recall/192"][arm] == results["sets"]["recall/192"]["mean"]
    assert figures["training"]["refine"]["refine_steps"] == 2
    page = (workdir / "report.html").read_text()
    assert all(f'<section id="{name}">' in page for name in ("scores", "curves", "answers-paired"))


def test_the_same_command_goes_on_where_it_was_stopped(compared):
    """Nothing is done again: records hold the times that things took."""
    workdir, figures = compared
    paths = [*workdir.glob("*/predictions.jsonl"), *workdir.glob("*/metrics.jsonl")]
    before = {path: path.read_bytes() for path in paths}
    again = compare.run(configured(), workdir)
    assert len(before) == 5 and {path: path.read_bytes() for path in paths} == before
    times = {"seconds", "processor_seconds"}
    assert again.keys() == figures.keys() and times < again.keys()
    assert all(again[name] == figures[name] for name in again.keys() - times)


def test_a_stopped_part_ends_the_comparison(tmp_path, monkeypatch):
    ran = []

    def stopped(config, workdir):
        ran.append(workdir.name)
        return {"interrupted": "SIGTERM", "step": 1} if config.phase == "midtrain" else {}

    for phase in (compare.evaluate, compare.midtrain):
        monkeypatch.setattr(phase, "run", stopped)
    assert compare.run(configured(), tmp_path) == {"interrupted": "SIGTERM", "part": "ntp"}
    assert ran == ["answers-before", "ntp"]


def test_arms_are_the_section_refine_or_a_preset_of_it(tmp_path):
    config = configured(compare={"arms": "ntp,refine,low_noise", "adapted": 2})
    parts = {part.name: part.config for part in compare.list_parts(config, tmp_path)}
    assert parts["ntp"].refine == dataclasses.replace(config.refine, objective="ntp")
    assert parts["refine"].refine == config.refine
    for name, value in PRESETS["low_noise"].items():
        assert getattr(parts["low_noise"].refine, name) == value
    # Rollouts of 3 tokens need more room than those of 2: rows that hold them are taken by all.
    assert {part.data.min_remainder for part in parts.values()} == {2 * 4 + 2 * 3}
    last = parts["answers-adapted"]
    assert last.model.checkpoint == str(tmp_path / "low_noise")
    assert (last.phase, last.evaluate.samples, last.testtime.answer_before) == ("testtime", 2, True)


@pytest.mark.parametrize("arms", ["", "ntp,exat", "sft"])
def test_unknown_arms_are_refused(arms):
    with pytest.raises(
        ConfigError, match=r"config\.compare\.arms must be names of ntp, refine, paper"
    ):
        configured(compare={"arms": arms})


def test_a_tracker_that_is_not_installed_is_refused_before_any_part(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "_is_installed", lambda name: False)
    config = configured(train={"trackers": "tensorboard"})
    with pytest.raises(ConfigError, match="needs the package tensorboard"):
        compare.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_differences_are_paired_by_question():
    """Of four pairs two are better and none worse, whatever order the records come in."""
    scores = {"before": [0, 0, 1, 0], "ntp": [1, 0, 1, 0], "refine": [1, 1, 1, 1]}

    class Answered:
        def __init__(self, values):
            self.predictions = [
                {"id": f"recall/9/{n}", "set": "recall/9", "score": float(score)}
                for n, score in enumerate(values)
            ]

        def figures(self):
            return {}

    runs = {f"answers-{arm}": Answered(values) for arm, values in scores.items()}
    runs["answers-refine"].predictions.reverse()
    runs |= {"ntp": Answered([]), "refine": Answered([])}
    found = compare.summarize(runs, ["ntp", "refine"])
    assert found["scores"] == {"recall/9": {"before": 0.25, "ntp": 0.5, "refine": 1.0}}
    (difference,) = found["differences"]
    assert (difference["arm"], difference["from"]) == ("refine", "ntp")
    assert difference["difference"] == 0.5 and difference["samples"] == 4
    # Student's interval of (0, 1, 0, 1): 0.5 +- t(3) * sqrt(1/3) / 2, with t(3) = 3.1824.
    half = 3.182446 * np.sqrt(1 / 3) / 2
    assert difference["low"] == pytest.approx(0.5 - half, abs=1e-5)
