"""Trackers get all of a run, go on where it went on, and never stop it."""

import importlib
import json
import math
import sys
import threading
import types

import numpy as np
import pytest

from refine_jax.base.errors import ConfigError
from refine_jax.report import trackers
from refine_jax.report.monitor import Monitor
from refine_jax.report.trackers import Trackers, check_trackers, flat

CONFIG = {"train": {"steps": 2, "seed": 0}, "phase": "midtrain"}


class Recorder:
    """A tracker that keeps what it gets."""

    opened: list["Recorder"]

    def __init__(self, workdir, project, ids, config):
        self.events = [(project, ids.setdefault("recorder", f"run {len(self.opened)}"), config)]
        self.opened.append(self)

    def log(self, step, figures):
        self.events.append((step, figures))

    def picture(self, step, name, path):
        self.events.append((step, name, path.read_bytes()))

    def close(self):
        self.events.append("closed")


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, "opened", [], raising=False)
    monkeypatch.setitem(trackers.KINDS, "recorder", Recorder)
    return Recorder


def open_all(folder, names, said, **options):
    return Trackers(folder, names, project="p", config=CONFIG, say=said.append, **options)


def test_a_run_that_is_continued_goes_on_in_the_same_place(tmp_path, recorder):
    said: list[str] = []
    picture = tmp_path / "training.png"
    picture.write_bytes(b"drawn")
    with (
        open_all(tmp_path, ["recorder"], said) as tracked,
        Monitor(tmp_path, steps=2, log_every=0) as monitor,
    ):
        monitor.record(1, {"loss": np.float32(2.0), "bad": math.inf})
        tracked.log(1, monitor.history[-1])
    with open_all(tmp_path, ["recorder"], said) as tracked:
        tracked.log(2, {"step": 2, "loss": 1.0})
        tracked.picture(2, "training", picture)
    first, second = recorder.opened
    assert first.events[0] == second.events[0] == ("p", "run 0", CONFIG)
    (step, figures), end = first.events[1:]
    assert (step, figures["loss"], end) == (1, 2.0, "closed")
    assert "bad" not in figures and "step" not in figures
    assert second.events[1:] == [(2, {"loss": 1.0}), (2, "training", b"drawn"), "closed"]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"recorder": "run 0"}
    assert not said


@pytest.mark.parametrize("where", ["__init__", "log", "close"])
@pytest.mark.parametrize("error", [OSError("no route\nto host"), SystemExit(1)])
def test_one_that_fails_is_told_of_once_and_left(tmp_path, recorder, monkeypatch, where, error):
    def fail(*arguments):
        raise error

    monkeypatch.setitem(trackers.KINDS, "broken", type("Broken", (Recorder,), {where: fail}))
    said: list[str] = []
    with open_all(tmp_path, ["broken", "recorder"], said) as tracked:
        tracked.log(1, {"loss": 2.0})
        tracked.log(2, {"loss": 1.0})
    (line,) = said
    assert line.startswith("broken failed") and "\n" not in line
    assert str(error).split()[0] in line
    whole = [made for made in recorder.opened if type(made) is Recorder]
    assert [event[0] for event in whole[0].events[1:3]] == [1, 2]


def test_one_that_hangs_does_not_hold_the_run(tmp_path, recorder, monkeypatch):
    hangs = threading.Event()

    class Hanging(Recorder):
        def log(self, step, figures):
            hangs.wait(30)

    monkeypatch.setitem(trackers.KINDS, "hanging", Hanging)
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    said: list[str] = []
    with open_all(tmp_path, ["hanging"], said) as tracked:
        for step in range(100):
            tracked.log(step, {"loss": 1.0})
    hangs.set()
    (line,) = said
    assert line.startswith("hanging has not taken") and "metrics.jsonl" in line


def test_other_processes_report_nothing(tmp_path, recorder):
    with open_all(tmp_path, ["recorder"], [], write=False) as tracked:
        tracked.log(1, {"loss": 2.0})
    assert not recorder.opened and not list(tmp_path.iterdir())


def test_unknown_and_missing_trackers_are_refused_before_anything_is_built(monkeypatch):
    with pytest.raises(ConfigError, match=r"tensorboard, wandb, mlflow, trackio.*Got: 'wnb'"):
        check_trackers(["wnb"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'refine-jax\[mlflow\]'"):
        check_trackers(["mlflow"])


def test_by_default_tensorboard_gets_the_scalars_where_it_is_installed(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = types.ModuleType("tensorboard.summary")
    module.Writer = Writer
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "tensorboard.summary", module)
    for installed in (False, True):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, there=installed: there or None
        )
        with open_all(tmp_path, None, []) as tracked:
            tracked.log(1, {"loss": 2.0, "bad": None})
    assert written == [str(tmp_path / "tensorboard"), ("loss", 2.0, 1), "closed"]


def test_settings_are_flattened():
    assert flat(CONFIG) == {"train.steps": 2, "train.seed": 0, "phase": "midtrain"}


@pytest.fixture
def picture(tmp_path):
    figure = pytest.importorskip("PIL.Image").new("RGB", (4, 4))
    figure.save(tmp_path / "training.png")
    return tmp_path / "training.png"


def report_twice(folder, name, picture):
    """A run of two steps that was interrupted after the first."""
    said: list[str] = []
    for step, loss in ((1, 2.0), (2, 1.0)):
        with open_all(folder, [name], said) as tracked:
            tracked.log(step, {"eval/loss": loss})
            tracked.picture(step, "training", picture)
    assert not said
    return json.loads((folder / "trackers.json").read_text())[name]


def test_wandb_itself(tmp_path, picture, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra [wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    name = report_twice(tmp_path, "wandb", picture)
    kept = list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(kept) == 2 and all(path.stat().st_size for path in kept)


def test_mlflow_itself(tmp_path, picture, monkeypatch):
    pytest.importorskip("mlflow", reason="needs the extra [mlflow]")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    name = report_twice(tmp_path, "mlflow", picture)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    history = client.get_metric_history(name, "eval/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.0), (2, 1.0)]
    run = client.get_run(name)
    assert run.data.params["train.steps"] == "2" and run.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(name)] == ["training.png"]


def test_trackio_itself(tmp_path, picture, monkeypatch):
    pytest.importorskip("trackio", reason="needs the extra [trackio]")
    import sqlite3

    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path)
    report_twice(tmp_path, "trackio", picture)
    with sqlite3.connect(SQLiteStorage.get_project_db_path("p")) as kept:
        rows = kept.execute("select step, metrics from metrics order by step").fetchall()
    losses = [(step, json.loads(text).get("eval/loss")) for step, text in rows]
    assert [entry for entry in losses if entry[1] is not None] == [(1, 2.0), (2, 1.0)]
