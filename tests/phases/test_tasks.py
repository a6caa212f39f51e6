"""Tasks answered while training give what the evaluation of the saved model gives."""

import zlib

import pytest
from tiny_runs import tiny_run, write_documents

from refine_jax.base.errors import ConfigError
from refine_jax.config import Config
from refine_jax.evaluation import by_position
from refine_jax.phases import evaluate, midtrain
from refine_jax.report.metrics import read_metrics

TASKS = {"lengths": "1024", "samples": 3, "batch_size": 2, "essays": "stdlib"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that answered tasks before, in between and after: its folder and configuration."""
    corpus = write_documents(tmp_path_factory.mktemp("corpus"))
    changes = {
        "data": {"source": str(corpus), "sequence_length": 52, "min_remainder": 52, "holdout": 0.2},
        "train": {
            "steps": 3,
            "warmup_ntp_steps": 3,
            "batch_size": 2,
            "eval_batches": 8,
            "evaluate": "niah_single_1,position",
            "evaluate_every": 2,
            "log_every": 0,
        },
        "evaluate": TASKS,
        "generation": {"max_new_tokens": 4},
    }
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refine_jax.evaluation.runner.score", of_text)
        config = Config.from_dict(tiny_run("midtrain", changes))
        midtrain.run(config, workdir)
        yield workdir, config


def of_text(metric, response, references):
    """A score that an untrained model's texts have, too, each another."""
    return zlib.crc32(response.encode()) / 2**32


def test_scores_are_those_of_the_evaluation(trained, tmp_path):
    workdir, config = trained
    sections = config.to_dict() | {"phase": "evaluate", "model": {"checkpoint": str(workdir)}}
    sections["evaluate"]["tasks"] = "niah_single_1"
    results = evaluate.run(Config.from_dict(sections), tmp_path / "evaluation")
    ((name, figures),) = results["sets"].items()
    records = {r["step"]: r for r in read_metrics(workdir / "metrics.jsonl")}
    scores = {step: record.get(f"eval/task/{name}") for step, record in records.items()}
    assert scores[3] == pytest.approx(figures["mean"], abs=1e-12)
    assert scores[1] is None and scores[2] is not None and scores[0] != scores[3]


def test_loss_by_position_is_that_of_the_command(trained):
    workdir, config = trained
    buckets = by_position.evaluate(str(workdir), config.data)["buckets"]
    record = read_metrics(workdir / "metrics.jsonl")[-1]
    found = {name: x for name, x in record.items() if name.startswith("eval/position/")}
    assert list(found) == [f"eval/position/{b['first']}-{b['last']}" for b in buckets]
    assert list(found.values()) == pytest.approx([b["loss"]["mean"] for b in buckets], rel=1e-5)


def test_the_page_and_the_plot_show_them(trained):
    page = (trained[0] / "report.html").read_text(encoding="utf-8")
    assert "Loss by tokens of context" in page and "Tasks" in page
    assert (trained[0] / "training.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"evaluate": "nial_single_1"}}, "Did you mean 'niah_single_1'"),
        ({"train": {"evaluate": "position"}, "data": {"holdout": 0.0}}, "holdout=0.0"),
    ],
)
def test_tasks_that_cannot_be_asked_are_refused_before_anything_is_written(
    trained, tmp_path, changes, said
):
    sections = trained[1].to_dict()
    for section, fields in changes.items():
        sections[section] |= fields
    with pytest.raises(ConfigError, match=said):
        midtrain.run(Config.from_dict(sections), tmp_path / "run")
    assert not list((tmp_path / "run").glob("*"))
