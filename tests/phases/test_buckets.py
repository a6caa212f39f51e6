"""Runs whose folder is in a bucket: the same numbers as on a disk, whatever happens on the way."""

import asyncio
import json
from types import SimpleNamespace

import pytest
import soak
from tiny_runs import comparable, tiny_run, write_documents

from refine_jax import main, report
from refine_jax.base.files import path_of
from refine_jax.config import Config
from refine_jax.data import prepare
from refine_jax.phases import evaluate, midtrain
from refine_jax.report.metrics import read_metrics
from refine_jax.report.monitor import Monitor

STEPS = 4
pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("corpus"))


def tiny(corpus, **sections):
    changes = {
        "data": {"source": str(corpus), "sequence_length": 52, "holdout": 0.2},
        "train": {
            "steps": STEPS,
            "warmup_ntp_steps": STEPS,
            "batch_size": 4,
            "eval_batches": 1,
            "checkpoint_every": 2,
            "log_every": 1,
        },
    }
    return tiny_run("midtrain", changes, sections)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The folder of a run on a disk."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    midtrain.run(Config.from_dict(tiny(corpus)), workdir)
    return workdir


class _CrashError(Exception):
    pass


def test_a_run_that_crashed_goes_on_in_a_bucket(whole, corpus, bucket, monkeypatch, capsys):
    workdir, record, said = bucket / "run", Monitor.record, []
    config = tiny(corpus, train={"trackers": "", "profile": "2:2"})

    def crash(self, step, metrics):
        record(self, step, metrics)
        if step == 3:
            raise _CrashError

    sleep = asyncio.sleep
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=lambda s: sleep(s / 100)))
    faults = bucket.faults.total()
    with monkeypatch.context() as patched, pytest.raises(_CrashError):
        patched.setattr(Monitor, "record", crash)
        midtrain.run(Config.from_dict(config), workdir)
    with bucket.flaky(0.05, seed=1):
        assert main.execute(config, workdir) == 0
    assert bucket.faults.total() - faults > 10
    said = capsys.readouterr().out
    assert "continuing after step 2 of 4" in said and workdir in said
    folder = path_of(workdir)
    assert comparable(folder) == comparable(whole)
    assert (folder / "held_out.jsonl").read_bytes() == (whole / "held_out.jsonl").read_bytes()
    results = json.loads((folder / "results.json").read_bytes())
    assert results["validation_loss_after"] == pytest.approx(
        json.loads((whole / "results.json").read_text())["validation_loss_after"], rel=0
    )
    names = {path.name for path in folder.iterdir()}
    assert names >= {"report.html", "training.png", "rollouts.png", "checkpoints", "profile"}
    assert ".lock" not in names and not {name for name in names if name.endswith(".new")}
    (folder / "report.html").unlink()
    assert report.main([workdir]) == 0
    assert b"<html" in (folder / "report.html").read_bytes()


def test_an_evaluation_and_its_questions_are_in_a_bucket(whole, bucket, tmp_path):
    rows = [{"task": "lcc", "prompt": f"def f{i}(", "answers": [f"x{i}"]} for i in range(4)]
    path_of(bucket / "data/code.jsonl").write_bytes(
        "".join(json.dumps(row) + "\n" for row in rows).encode()
    )
    found = []
    for workdir in (bucket / "evaluated", tmp_path / "evaluated"):
        changes = {
            "model": {"checkpoint": str(whole)},
            "evaluate": {"tasks": "lcc", "data": bucket / "data/code.jsonl", "batch_size": 4},
            "generation": {"max_new_tokens": 2},
        }
        config = Config.from_dict(tiny_run("evaluate", changes))
        results = evaluate.run(config, workdir)
        records = read_metrics(path_of(workdir) / "predictions.jsonl")
        found.append((results["mean_by_task"], [record["response"] for record in records]))
        assert (path_of(workdir) / "report.html").is_file()
        assert evaluate.run(config, workdir)["mean_by_task"] == results["mean_by_task"]
    assert found[0] == found[1] and len(found[0][1]) == 4


def test_tokens_and_records_are_kept_in_a_bucket(corpus, bucket, capsys):
    figures = []
    for _ in range(2):
        options = [f"--source={corpus}", "--tokenizer=bytes", f"--out={bucket / 'prepared'}"]
        assert prepare.main(options) == 0
        figures.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert figures[0] == figures[1] and figures[0]["documents"] == 16
    sources = {"source": figures[0]["folder"]}, {"cache_dir": bucket / "tokens"}
    batches = []
    for data in (*sources, sources[1], {}):
        parts = midtrain.prepare(Config.from_dict(tiny(corpus, data=data)), path_of(bucket / "no"))
        batches.append(next(iter(parts.training))["tokens"].tolist())
    assert batches[0] == batches[1] == batches[2] == batches[3]
    (cache,) = path_of(bucket / "tokens").iterdir()
    assert {path.name for path in cache.iterdir()} == {"tokens.bin", "documents.npz", "meta.json"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_runs_in_a_bucket_end_bit_for_bit(bucket):
    with bucket.flaky(0.02, seed=0):
        kinds = ("midtrain", "midtrain-2", "evaluate")
        done = soak.soak(kills=9, seed=0, kinds=kinds, bucket=bucket)
    assert done["kills"] == 9 and done["SIGKILL"] and done["differences"] == []
