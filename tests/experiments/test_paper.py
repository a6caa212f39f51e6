"""Scripts of the paper's tables and figures: their plans are valid, and a small one runs whole."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments" / "paper"))

import plan
import present
import produce

SCRIPTS = sorted(path.stem for path in Path(plan.__file__).parent.glob("[tf]*_*.py"))


def paper(*arguments):
    parser = argparse.ArgumentParser()
    plan.add_options(parser)
    return plan.Paper(parser.parse_args(["--workdir=runs/x", *arguments]))


@pytest.fixture(autouse=True)
def restore_settings(monkeypatch, programs_kept_elsewhere):
    """A script sets flags of XLA, and a folder for compiled programs."""
    monkeypatch.setenv("XLA_FLAGS", "")


def test_there_is_a_script_for_every_table_and_figure_of_the_paper():
    tables = [f"table_{name}" for name in ("3", "4", "5", "6", "7", "e1", "e2")]
    figures = [f"figure_{name}" for name in ("4", "5", "e1", "e2", "e3")]
    assert sorted(tables + figures) == SCRIPTS


@pytest.mark.parametrize("form", [(), ("--small",)], ids=["full", "small"])
def test_every_plan_is_of_valid_configurations(form):
    """All runs of all scripts build; runs of one name are the same run."""
    seen = {}
    for script in SCRIPTS:
        made = paper(*form)
        for run in plan.in_order(importlib.import_module(script).describe(made).runs()):
            record = produce._record(run, made.workdir) if run.name not in seen else None
            described = produce.describe_run(run, made.workdir)
            assert seen.setdefault(run.name, described) == described
            if record is not None and run.kind == "phase":
                evaluates = record["phase"] in ("evaluate", "testtime")
                assert evaluates == ("/evaluations/" in run.name)


def test_published_means_are_those_of_the_published_numbers():
    """Typed off rightly: each mean is that of its numbers, within the paper's own rounding."""
    rows = list(importlib.import_module("table_3").PUBLISHED.values())
    rows += [row[-1] for part in importlib.import_module("table_4").ROWS.values() for row in part]
    groups = [row[start : start + 4] for row in rows for start in range(0, len(row), 4)]
    rows = importlib.import_module("table_5").ROWS.values()
    groups += [numbers for part in rows for *_, numbers in part]
    for *numbers, mean in groups:
        assert len(numbers) in (3, 12)
        # 0.2 off: LaCT's base row of MK-NIAH, 46.2 of 70.2, 44.8 and 24.2.
        assert abs(sum(numbers) / len(numbers) - mean) < 0.25, (numbers, mean)


def test_a_table_holds_means_beside_published_numbers(tmp_path):
    run = plan.Run("m/run", "phase", None, {}, "demo.py")
    folder = tmp_path / run.name
    folder.mkdir(parents=True)
    sets = {"a/1": {"mean": 0.25}, "a/2": {"mean": 0.5}}
    (folder / "results.json").write_text(json.dumps({"sets": sets}))
    sources = {n: plan.set_score(run, "a", n) for n in (1, 2)}
    table = plan.Table("T", tuple(plan.by_length("row", "a", sources, iter((24.0, 51.0, 37.4)))))
    present.present(table, tmp_path, "table", small=False)
    assert (
        "| row | 25.0 (24.0) | 50.0 (51.0) | 37.5 (37.4) |" in (tmp_path / "table.md").read_text()
    )
    cells = json.loads((tmp_path / "table.json").read_text())["cells"]["row"]
    assert cells["a mean"] == {"value": 37.5, "published": 37.4}
    present.present(table, tmp_path, "small", small=True)
    assert "24.0" not in (tmp_path / "small.md").read_text()


def test_a_small_figure_is_made_and_not_made_again(tmp_path, capsys):
    """One training run, one measurement, a plot; elsewhere too. Other settings are refused."""
    import figure_e2

    def start(workdir):
        arguments = ["--small", "--models", "deltanet", f"--workdir={workdir}"]
        return produce.main(figure_e2.describe, "figure_e2", figure_e2.__doc__, arguments)

    first, moved = tmp_path / "first", tmp_path / "moved"
    assert start(first) == 0
    content = json.loads((first / "figure_e2.json").read_text())
    (curve,) = content["curves"]
    assert content["small"] and len(curve["points"]) == 256
    # The model knows little: the entropy is near that of 32,000 equal tokens.
    assert all(5 < point["y"] <= 10.38 for point in curve["points"])
    assert (first / "figure_e2.png").stat().st_size > 1000
    capsys.readouterr()
    first.rename(moved)
    assert start(moved) == 0
    assert "2 runs, 2 of them done" in capsys.readouterr().out

    done = moved / "deltanet/base/done.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"train.steps": 3}))
    assert start(moved) == 1
    assert "other settings (train.steps)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "missing", "message"),
    [
        ("table_6", "lact", "no model in"),
        ("table_6", "documents", "no such file or folder: data.source="),
        ("table_6", "longbench", "no such file or folder: evaluate.data="),
        ("table_3", "essays", "no such file or folder: evaluate.essays="),
        ("figure_4", "booksum", "no such file or folder: source="),
        ("table_e1", "lm_eval", "pip install 'refine-jax[eval]'"),
    ],
)
def test_what_is_missing_is_said_before_the_first_run(
    script, missing, message, tmp_path, monkeypatch, capsys
):
    """Even if the last run alone needs it."""
    (tmp_path / "there.jsonl").write_text("{}")
    monkeypatch.delitem(sys.modules, "refine_jax.evaluation.harness", raising=False)
    if missing == "lm_eval":
        monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    arguments = ["--models", "lact", f"--workdir={tmp_path / 'runs'}"]
    for name in ("lact", "documents", "longbench", "essays", "booksum"):
        folder = tmp_path / "nothing" if name == missing else tmp_path
        arguments.append(f"--{name}={folder}")
    module = importlib.import_module(script)
    assert produce.main(module.describe, script, module.__doc__, arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
