"""Runs on a document or a prompt alone, and runs that hold nothing out."""

import json

import pytest
from goldens import require_input
from tiny_runs import tiny_run

from refine_jax.base.errors import ConfigError, DataError
from refine_jax.config import Config
from refine_jax.phases import midtrain, posttrain
from refine_jax.report.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("compile_once")

TRAIN = {"steps": 2, "batch_size": 2, "eval_every": 1, "eval_batches": 1, "log_every": 1}


def documents_run(source, **data) -> Config:
    data = {"source": str(source), "sequence_length": 52, **data}
    return Config.from_dict(
        tiny_run("midtrain", {"data": data, "train": TRAIN, "refine": {"objective": "ntp"}})
    )


def prompts_run(source, **data) -> Config:
    data = {"source": str(source), "sequence_length": 52, **data}
    sections = {
        "data": data,
        "train": TRAIN,
        "prompts": {"max_answer_tokens": 8},
        "posttrain": {"nested": False},
        "refine": {"objective": "ntp"},
    }
    return Config.from_dict(tiny_run("posttrain", sections))


def evaluations(workdir) -> list[int]:
    records = read_metrics(workdir / "metrics.jsonl")
    return [r["step"] for r in records if any(name.startswith("eval/") for name in r)]


def test_one_document_is_trained_on_and_evaluated(tmp_path, capsys):
    figures = midtrain.run(documents_run(require_input("twins_a.txt"), holdout=0.1), tmp_path)
    assert figures["validation_loss_after"] is not None
    assert evaluations(tmp_path) == [0, 1, 2]
    assert "the last rows of the one document are held out" in capsys.readouterr().out


def test_nothing_is_held_out(tmp_path, capsys):
    source = tmp_path / "one_row.txt"
    source.write_text("a document of a single row of tokens that are trained on")
    figures = midtrain.run(documents_run(source, holdout=0.0), tmp_path / "run")
    assert figures["steps"] == 2
    assert figures["validation_loss_before"] is figures["validation_loss_after"] is None
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == figures
    assert (tmp_path / "run" / "training.png").exists()
    assert evaluations(tmp_path / "run") == []
    printed = capsys.readouterr().out
    assert "nothing is held out (config.data.holdout=0): no evaluation" in printed
    assert "before" not in printed.split("nothing is held out")[1]
    with pytest.raises(DataError, match=r"one row, .* hold nothing out with data\.holdout=0"):
        midtrain.prepare(documents_run(source), tmp_path / "other")


def test_one_prompt_is_trained_on_where_nothing_is_held_out(tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text(json.dumps({"prompt": "The code is ", "answer": "12"}) + "\n")
    figures = posttrain.run(prompts_run(source, holdout=0.0), tmp_path / "run")
    assert figures["posttrain_steps"] == 2
    assert evaluations(tmp_path / "run") == []
    assert not (tmp_path / "run" / "answers.jsonl").exists()
    with pytest.raises(DataError, match=r"hold nothing out with data\.holdout=0"):
        posttrain.prepare(prompts_run(source), tmp_path / "other")


def test_the_best_checkpoint_needs_documents_to_tell_it():
    best = {"train": {"best_metric": "loss", "eval_every": 1}, "data": {"holdout": 0.0}}
    with pytest.raises(ConfigError, match=r"best_metric needs held-out documents"):
        Config.from_dict(tiny_run("midtrain", best))
