"""Whole evaluations of a tiny model, plain and with test-time training, and every kind of stop."""

import dataclasses
import functools
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import tiny_run

from refine_jax import report
from refine_jax.config import Config
from refine_jax.evaluation import questions
from refine_jax.evaluation.metrics import score
from refine_jax.evaluation.report import (
    recall_by_depth,
    summarize,
    summarize_adaptation,
    table,
)
from refine_jax.evaluation.runner import Predictions
from refine_jax.main import execute
from refine_jax.phases import evaluate, testtime

pytestmark = pytest.mark.usefixtures("compile_once")

WORDS = ("red", "blue", "seven", "green", "nine", "oak", "elm", "one")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven prompts with answers, two of them of more than 64 bytes."""
    path = tmp_path_factory.mktemp("data") / "code.jsonl"
    random = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for index in range(7):
            words = random.choice(WORDS, 5 if index % 3 else 16)
            row = {"task": "lcc", "prompt": " ".join(words), "answers": [f"{words[0]} {words[1]}"]}
            file.write(json.dumps(row) + "\n")
    return path


def settings(source, phase="evaluate", **sections):
    """An evaluation of eight new tokens a prompt."""
    changes = {
        "refine": {"reward": "binary", "edge_margin": 3, "lambda_rl": 0.4},
        "optimizer": {"learning_rate": 0.03},
        "generation": {"max_new_tokens": 8},
        "testtime": {"steps": 3, "batch_size": 4, "mini_batch_size": 2},
        "evaluate": {"tasks": "lcc", "data": str(source), "batch_size": 4},
    }
    return tiny_run(phase, changes, sections)


def run(config, workdir):
    """(results, {id: record without times}) of a run."""
    config = Config.from_dict(config)
    results = {"evaluate": evaluate, "testtime": testtime}[config.phase].run(config, workdir)
    return results, records(workdir)


def records(workdir):
    found = {}
    for line in (workdir / "predictions.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name in ("seconds_read", "seconds_generate"):
            assert record.pop(name) >= 0
        if "adapt" in record:
            assert record["adapt"].pop("seconds") > 0
            del record["adapt"]["compiled"]
        assert record["id"] not in found
        found[record["id"]] = record
    return found


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("plain") / "run"
    return workdir, *run(settings(data), workdir)


@pytest.fixture(scope="module")
def adapted(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("adapted") / "run"
    return workdir, *run(settings(data, "testtime"), workdir)


@functools.cache
def next_token(model):
    """`f(params, ids [1, T], last)` -> the greedy token after slot `last`."""

    @jax.jit
    def best(params, ids, last):
        hidden, _ = model.forward(params, ids)
        return jnp.argmax(hidden[0, last] @ model.head(params).T)

    return best


def greedy(model, params, prompt, count):
    """Text by running the whole sequence again for each token."""
    row = np.zeros((1, 128), np.int32)
    row[0, : len(prompt)] = prompt
    text = []
    while len(text) < count and 257 not in text:
        last = len(prompt) + len(text) - 1
        text.append(int(next_token(model)(params, row, last)))
        row[0, last + 1] = text[-1]
    return bytes(i for i in text if i < 256).decode("utf-8", errors="replace")


def test_every_prompt_is_answered_greedily_and_scored(plain, data):
    workdir, results, found = plain
    parts = evaluate.prepare(Config.from_dict(settings(data)), workdir)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert len(found) == 7
    for index, row in enumerate(rows):
        record = found[f"lcc/{index}"]
        ids = [256, *row["prompt"].encode()]
        assert record["prompt_tokens"] == len(ids) and record["answers"] == row["answers"]
        assert record["response"] == greedy(parts.model, parts.params, ids, 8)
        assert record["score"] == score("code_similarity", record["response"], row["answers"])
        assert "adapt" not in record
    mean = np.mean([record["score"] for record in found.values()])
    assert results["mean"] == results["sets"]["lcc"]["mean"] == pytest.approx(mean)
    assert results["samples"] == 7 and results["adaptation"] is None
    assert json.loads((workdir / "results.json").read_text()) == results
    assert (workdir / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_each_prompt_is_answered_with_the_parameters_adapted_to_it(adapted, plain, data):
    workdir, results, found = adapted
    parts = evaluate.prepare(Config.from_dict(settings(data, "testtime")), workdir)
    adapter = testtime.make_adapter(parts)
    for question in (parts.questions[0], parts.questions[4]):
        copy = adapter.adapt([question.tokens], [question.name])
        text = greedy(parts.model, copy.params, question.tokens, 8)
        assert found[question.name]["response"] == text
        assert copy.costs[0].loss == pytest.approx(found[question.name]["adapt"]["loss"])
    assert any(found[name]["response"] != plain[2][name]["response"] for name in found)
    for record in found.values():
        cost = record["adapt"]
        assert (cost["steps"], cost["tokens"]) == (3, 3 * record["prompt_tokens"])
        assert cost["rollout_tokens"] == 3 * 2 * 2
    assert results["adaptation"]["seconds_per_example"] > 0
    assert results["adaptation"]["examples_without_rollouts"] == 0


@pytest.mark.parametrize("copies", [1, 2])
def test_prompts_are_answered_before_training_on_them_too(adapted, plain, data, tmp_path, copies):
    options = {"answer_before": True, "copies": copies}
    _, found = run(settings(data, "testtime", testtime=options), tmp_path)
    for name, record in found.items():
        before = record.pop("before")
        assert before == {key: plain[2][name][key] for key in ("response", "score")}
        assert record["response"] == adapted[2][name]["response"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Scores after minus before, in points" in page
    assert page.count("before training <span") == page.count("after training <span") == 7


def run_order(config, workdir, answerer, order_seed=None, longest=1000):
    """As `run`, in an order, by something that is compiled already."""
    config.evaluate.order_seed = order_seed
    config = Config.from_dict(config)
    parts = evaluate.prepare(config, workdir)
    questions = [q for q in parts.questions if len(q.tokens) <= longest]
    parts = dataclasses.replace(parts, questions=questions)
    results = evaluate.run_parts(parts, workdir, answerer)
    return results, records(workdir)


def make_answerer(data, **options):
    config = Config.from_dict(settings(data, "testtime", testtime=options))
    parts = evaluate.prepare(config, Path("nowhere"))
    return evaluate.make_answerer(parts, testtime.make_adapter(parts))


@pytest.fixture(scope="module")
def one_by_one(data):
    return make_answerer(data)


def test_the_order_changes_nothing_with_a_reset(adapted, data, tmp_path, one_by_one):
    _, results, found = adapted
    for seed in (1, 2, 3):
        config = settings(data, "testtime")
        again, shuffled = run_order(config, tmp_path / str(seed), one_by_one, seed)
        assert list(shuffled) != list(found) and shuffled == found
        assert again["sets"]["lcc"]["mean"] == results["sets"]["lcc"]["mean"]


def test_copies_at_once_answer_alike_in_any_order(adapted, data, tmp_path):
    answerer = make_answerer(data, copies=3)
    for seed in (4, 5):
        config = settings(data, "testtime", testtime={"copies": 3})
        _, found = run_order(config, tmp_path / str(seed), answerer, seed, longest=64)
        assert 3 < len(found) < 7  # the last group is smaller
        for name in found:
            alone = adapted[2][name]
            # The loss is rounded otherwise in another program.
            assert found[name]["adapt"].pop("loss") == pytest.approx(alone["adapt"]["loss"])
            cost = {k: v for k, v in alone["adapt"].items() if k != "loss"}
            assert found[name] == alone | {"adapt": cost}


@pytest.fixture(scope="module")
def carried(data, tmp_path_factory):
    """Records of an evaluation without a reset; the last of its two batches has three prompts."""
    config = settings(data, "testtime", testtime={"reset": "never"})
    return run(config, tmp_path_factory.mktemp("carried"))[1]


def test_the_order_changes_scores_without_a_reset(carried, data, tmp_path):
    config = settings(data, "testtime", testtime={"reset": "never"})
    config.evaluate.order_seed = 1
    _, found = run(config, tmp_path)
    scores = [[one[name]["score"] for name in sorted(one)] for one in (carried, found)]
    assert len(scores[0]) == len(scores[1]) == 7
    assert scores[0] != scores[1]


class _CrashError(Exception):
    pass


@pytest.mark.parametrize("reset", ["example", "batch", "never"])
def test_an_interrupted_evaluation_continues(
    reset, data, adapted, carried, one_by_one, tmp_path, monkeypatch
):
    crash = reset != "example"
    config = settings(data, "testtime", testtime={"reset": reset})
    answerer = {"example": one_by_one}.get(reset) or make_answerer(data, reset=reset)
    whole = {"example": adapted[2], "never": carried}.get(reset)
    if whole is None:
        whole = run_order(config, tmp_path / "whole", answerer)[1]
    add, workdir = Predictions.add, tmp_path / "part"

    def interrupt(self, new):
        add(self, new)
        if crash:
            raise _CrashError
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Predictions, "add", interrupt)
        if crash:
            with pytest.raises(_CrashError):
                run_order(config, workdir, answerer)
            with (workdir / "predictions.jsonl").open("a") as file:
                file.write('{"id": "lcc/5", "sco')
        else:
            results, found = run_order(config, workdir, answerer)
            assert results == {"interrupted": "SIGTERM", "done": 1, "samples": 7}
            assert len(found) == 1 and not (workdir / "results.json").exists()
    if reset == "never":
        answerer = make_answerer(data, reset=reset)
    assert run_order(config, workdir, answerer)[1] == whole


def test_a_complete_evaluation_reports_again(plain, data):
    workdir, results, _ = plain
    before = (workdir / "predictions.jsonl").read_bytes()
    again, _ = run(settings(data), workdir)
    assert again == results and (workdir / "predictions.jsonl").read_bytes() == before
    assert report.main([str(workdir)]) == 0
    assert json.loads((workdir / "results.json").read_text()) == results


def test_needles_at_several_lengths(data, tmp_path, capsys):
    config = settings(data, evaluate={"tasks": "niah_single_1,lcc", "lengths": "700,760"})
    config.evaluate.update(samples=2, max_tokens=60, cut="left")
    assert execute(config, str(tmp_path / "run")) == 0
    output = capsys.readouterr().out
    results = json.loads(output.splitlines()[-1])
    assert list(results["sets"]) == ["niah_single_1/700", "niah_single_1/760", "lcc"]
    assert "of them cut (left)" in output
    for figures in results["sets"].values():
        assert figures["low"] <= figures["mean"] <= figures["high"]
    assert results["sets"]["niah_single_1/700"]["prompts_cut"] == 2
    found = records(tmp_path / "run").values()
    assert max(record["prompt_tokens"] for record in found) == 60 - 8
    recall = results["recall_by_depth"]["niah_single_1"]
    assert recall["lengths"] == [700, 760]
    assert [sum(row) for row in recall["counts"]] == [2, 2]
    assert (tmp_path / "run" / "recall.png").read_bytes().startswith(b"\x89PNG")


BAD_INPUT = {
    "unknown task": ({"evaluate": {"tasks": "lcx"}}, "Did you mean 'lcc'?"),
    "no task": ({"evaluate": {"tasks": " , "}}, "names no task"),
    "bad length": ({"evaluate": {"lengths": "4k"}}, "Got: '4k'"),
    "missing data": ({"evaluate": {"data": "/no/such/data.jsonl"}}, "/no/such/data.jsonl"),
    "no samples": ({"evaluate": {"tasks": "niah_single_1", "data": ""}}, "samples"),
    "no room": ({"evaluate": {"max_tokens": 9}}, "max_tokens=9, 8 for the answer"),
    "mini-batches": ({"testtime": {"mini_batch_size": 3}}, "mini_batch_size=3, batch_size=4"),
    "tokenizer too large": ({"data": {"tokenizer": "mistral-v1"}}, "32000, vocab_size=259"),
    "k too large": ({"refine": {"rollout_length": 4}}, "edge_margin"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message_and_nothing_is_written(case, data, tmp_path, capsys):
    changes, words = BAD_INPUT[case]
    assert execute(settings(data, "testtime", **changes), str(tmp_path / "run")) == 1
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and words in output.err
    assert "Traceback" not in output.err and not output.out
    assert not list(tmp_path.iterdir())


def test_what_a_later_task_lacks_is_said_before_the_first_is_made(tmp_path, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(questions, "load_examples", lambda name, **_: made.append(name) or [])
    tasks = {"tasks": "niah_single_1,niah_single_2", "lengths": "700", "samples": 2, "data": ""}
    assert execute(settings("", evaluate=tasks), str(tmp_path / "run")) == 1
    assert "essays" in capsys.readouterr().err and not made


def test_another_evaluation_is_not_continued(plain, data, capsys):
    workdir = plain[0]
    before = {path: path.read_bytes() for path in workdir.iterdir()}
    changed = settings(data, evaluate={"seed": 1}, train={"seed": 5})
    assert execute(changed, str(workdir)) == 1
    message = capsys.readouterr().err
    assert "config.evaluate.seed: was 0, got 1" in message
    assert "parameters" in message  # other random weights
    assert {path: path.read_bytes() for path in workdir.iterdir()} == before


def test_a_training_run_is_left_alone(data, tmp_path, capsys):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    assert execute(settings(data), str(tmp_path)) == 1
    assert "holds a training run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def record(task="niah_multivalue", length=4096, depths=(), answers=(), response="", **fields):
    return {
        "set": f"{task}/{length}" if length else task,
        "task": task,
        "metric": "ruler_recall",
        "response": response,
        "answers": list(answers),
        "metadata": {"depths": list(depths)},
        "score": 1.0,
        "prompt_tokens": 10,
        "cut_tokens": 0,
        "new_tokens": 2,
        "seconds_read": 1.0,
        "seconds_generate": 2.0,
        **fields,
    }


def test_recall_counts_needles_where_they_lie():
    given = [
        record(depths=(0, 100), answers=("AB", "cd"), response="it is ab."),
        record(depths=(5, 50), answers=("x", "y"), response="x y"),
        record(length=8192, depths=(49,), answers=("z",), response=""),
        record(task="vt", depths=(1,), answers=("z",), response="z"),
    ]
    found = recall_by_depth(given, "niah_multivalue", bins=2)
    assert (found.lengths, found.depths) == ([4096, 8192], [50, 100])
    assert found.recall == [[1.0, 0.5], [0.0, None]]
    assert found.counts == [[2, 2], [1, 0]]
    assert recall_by_depth([record(length=None, depths=(1,), answers="z")], "niah") is None


def test_figures_of_records():
    cost = {"steps": 1, "tokens": 10, "rollout_tokens": 8, "loss": 1.0}
    cost |= {"compiled": False, "skipped": 0}
    given = [
        record(score=1.0, adapt=cost | {"seconds": 9.0, "compiled": True}),
        record(score=0.0, adapt=cost | {"seconds": 1.0}),
        record(score=0.0, adapt=cost | {"seconds": 2.0, "rollout_tokens": 0}),
        record(
            task="lcc",
            length=None,
            score=0.5,
            cut_tokens=3,
            adapt=cost | {"seconds": 4.0, "skipped": 1},
        ),
    ]
    results = summarize(given)
    needles = results["sets"]["niah_multivalue/4096"]
    # Wilson's interval of 1 in 3 by its formula.
    z, n, p = 1.959964, 3, 1 / 3
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert needles["mean"] == pytest.approx(p)
    assert needles["low"] == pytest.approx((centre - half) / (1 + z**2 / n), abs=1e-6)
    assert needles["high"] == pytest.approx((centre + half) / (1 + z**2 / n), abs=1e-6)
    assert results["mean"] == pytest.approx((1 / 3 + 0.5) / 2)
    assert results["tokens_per_second"] == pytest.approx(4 * 12 / 12)
    assert results["sets"]["lcc"]["tokens_cut"] == 3
    assert (
        summarize_adaptation(given)
        == results["adaptation"]
        == {
            "seconds": 16.0,
            "seconds_per_example": 2.0,
            "tokens_per_example": 10.0,
            "rollout_tokens_per_example": 6.0,
            "examples_without_rollouts": 1,
            "examples_not_adapted": 0,
            "examples_with_skipped_updates": 1,
        }
    )
    assert "adaptation: 2.00 s an example (median, without compilation), 16.0 s" in table(results)
    results["adaptation"]["seconds_per_example"] = None
    assert "adaptation: 16.0 s in all, compilation included; 10 prompt" in table(results)
