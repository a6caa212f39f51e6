"""Whole evaluations of files as people have them: every row is answered, and nothing is lost."""

import json
import shutil
from pathlib import Path

import pytest
from goldens import require_input
from tiny_runs import tiny_run

from refine_jax.data import load_tokenizer
from refine_jax.data.tasks import load_examples
from refine_jax.data.tasks.files import write_examples
from refine_jax.main import execute

pytestmark = pytest.mark.usefixtures("compile_once")

FOXES = [
    {"task": "hotpotqa", "prompt": f"Question {i}: who?", "answers": ["fox"]} for i in range(3)
]
DAMAGED = ("", "{", "[]", "null", "[" * 100_000, '{"a": NaN}', "\udcff", None)


def settings(data, **evaluate):
    """An evaluation of two new tokens a prompt."""
    evaluate = {"tasks": "hotpotqa", "data": str(data), "batch_size": 4} | evaluate
    return tiny_run("evaluate", {"generation": {"max_new_tokens": 2}, "evaluate": evaluate})


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "predictions.jsonl").open(encoding="utf-8")]


def run(config, workdir: Path, capsys):
    """(results, standard output) of a run that must end well."""
    assert execute(config, str(workdir)) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    return json.loads(output.splitlines()[-1]), output


def refused(config, workdir: Path, capsys) -> str:
    """The one message of a run that must be refused."""
    assert execute(config, str(workdir)) == 1
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and "Traceback" not in output.err and not output.out
    return output.err


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("eval_int_answers", [["42"]] * 3),
        ("eval_nested_answers", [["fox", "the fox"]] * 3),
        ("eval_answers_null_answer_set", [["fox"]] * 3),
        ("eval_metadata_dict", [["fox"]] * 3),
        ("eval_metadata_text", [["fox"]] * 3),
        ("eval_surrogate", [["fox"]]),
    ],
)
def test_each_row_is_answered_and_scored(name, answers, tmp_path, capsys):
    source = require_input(f"{name}.jsonl")
    results, _ = run(settings(source), tmp_path / "run", capsys)
    found = records(tmp_path / "run")
    assert [record["answers"] for record in found] == answers
    assert results["samples"] == len(answers)
    assert all(0 <= record["score"] <= 1 for record in found)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results


def test_what_is_left_out_is_said_first(tmp_path, capsys):
    rows = [*FOXES, {**FOXES[0], "answers": [""]}, {**FOXES[0], "answers": ["", "dog", None]}]
    rows.append({**FOXES[0], "prompt": "x" * 500})
    data = write(tmp_path / "rows.jsonl", [{**row, "task": "ruler_squadqa"} for row in rows])
    config = settings(data, tasks="ruler_squadqa", lengths="200")
    results, output = run(config, tmp_path / "run", capsys)
    assert results["samples"] == 4
    introduction = output.partition("ruler_squadqa/200:")[0]
    for words in (
        "left out 1 of 6 rows without an answer",
        "left out 1 of 6 rows that need more than 200 tokens",
        "left out 2 empty answers beside others",
    ):
        assert words in introduction


def test_longbench_takes_what_is_there_and_names_the_rest(tmp_path, capsys):
    write(tmp_path / "data" / "hotpotqa.jsonl", FOXES)
    write(tmp_path / "data" / "lcc.jsonl", [{**row, "task": "lcc"} for row in FOXES])
    tasks = "trec,hotpotqa,samsum,lcc"
    results, output = run(settings(tmp_path / "data", tasks=tasks), tmp_path / "run", capsys)
    assert list(results["sets"]) == ["hotpotqa", "lcc"]
    assert "lacks trec, samsum: left out" in output
    message = refused(settings(tmp_path / "data", tasks="trec,samsum"), tmp_path / "no", capsys)
    assert "no examples of trec" in message and "Nor of samsum" in message
    assert not (tmp_path / "no").exists()


def test_lengths_that_written_sets_lack_are_named(tmp_path, capsys):
    made = load_examples("fwe", length=900, samples=2, tokenizer=load_tokenizer("bytes"))
    write_examples(made, tmp_path / "fwe_900.jsonl")
    text = (tmp_path / "fwe_900.jsonl").read_text().replace('"fwe"', '"ruler_squadqa"')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "set.jsonl").write_text(text)
    config = settings(tmp_path / "data", tasks="ruler_squadqa", lengths="900,1200", max_tokens=80)
    results, output = run(config, tmp_path / "run", capsys)
    assert list(results["sets"]) == ["ruler_squadqa/900"]
    assert "lacks ruler_squadqa of length 1200: left out" in output


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A complete evaluation: (its folder, its data)."""
    folder = tmp_path_factory.mktemp("done")
    data = write(folder / "data.jsonl", FOXES)
    assert execute(settings(data), str(folder / "run")) == 0
    return folder / "run", data


@pytest.fixture
def copied(done, tmp_path):
    """The evaluation with its data elsewhere: (folder, data)."""
    shutil.copytree(done[0], tmp_path / "run")
    return tmp_path / "run", Path(shutil.copy(done[1], tmp_path / "moved.jsonl"))


def test_the_content_of_the_data_decides_what_continues(copied, tmp_path, capsys):
    workdir, moved = copied
    before = (workdir / "predictions.jsonl").read_bytes()
    run(settings(moved), workdir, capsys)
    assert (workdir / "predictions.jsonl").read_bytes() == before
    for changed in ({"prompt": "Other?"}, {"answers": ["dog"]}):
        other = write(tmp_path / "other.jsonl", [*FOXES[:2], FOXES[2] | changed])
        assert "questions: was " in refused(settings(other), workdir, capsys)
    assert "questions: was " in refused(settings(write(moved, FOXES[:2])), workdir, capsys)
    assert (workdir / "predictions.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", DAMAGED, ids=lambda text: repr(text)[:12])
def test_a_damaged_record_of_the_evaluation_is_one_message(content, copied, capsys):
    workdir, data = copied
    if content is None:
        (workdir / "evaluation.json").unlink()
    else:
        (workdir / "evaluation.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    message = refused(settings(data), workdir, capsys)
    assert "evaluation.json" in message and "Choose another --workdir" in message
    assert len(message) < 600


@pytest.mark.parametrize(
    "value", [None, 3, [], "text", {"evaluate": 3}, {"evaluate": {"seed": "0"}, "phase": {}}]
)
def test_another_record_is_another_evaluation(value, copied, capsys):
    workdir, data = copied
    kept = json.loads((workdir / "evaluation.json").read_text())
    changed = kept | value if isinstance(value, dict) else kept | {"parameters": value}
    (workdir / "evaluation.json").write_text(json.dumps(changed))
    assert "holds another evaluation" in refused(settings(data), workdir, capsys)


def test_an_evaluation_of_an_earlier_version_is_one_message(copied, capsys):
    """Its record does not say which questions were asked."""
    workdir, data = copied
    record = json.loads((workdir / "evaluation.json").read_text())
    del record["questions"]
    (workdir / "evaluation.json").write_text(json.dumps(record))
    answers = (workdir / "predictions.jsonl").read_bytes()
    message = refused(settings(data), workdir, capsys)
    assert f"{workdir} holds an evaluation that an earlier version began" in message
    assert "Choose another --workdir" in message and "None" not in message
    assert (workdir / "predictions.jsonl").read_bytes() == answers


DAMAGE = {
    "no score": lambda record: record.pop("score"),
    "score of text": lambda record: record.update(score="1"),
    "score above 1": lambda record: record.update(score=7),
    "no id": lambda record: record.pop("id"),
    "metadata of text": lambda record: record.update(metadata="x"),
    "other answers": lambda record: record.update(answers=["dog"]),
    "other set": lambda record: record.update(set="lcc"),
    "other index": lambda record: record.update(index=7),
    "cost of text": lambda record: record.update(adapt="x"),
    "part of a cost": lambda record: record.update(adapt={"seconds": 1.0}),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_records_that_cannot_be_used_are_kept_aside_and_answered_again(case, copied, capsys):
    workdir, data = copied
    whole = records(workdir)
    damaged = [dict(record) for record in whole]
    DAMAGE[case](damaged[1])
    write(workdir / "predictions.jsonl", damaged)
    results, output = run(settings(data), workdir, capsys)
    assert "predictions.jsonl: left out" in output and "predictions.jsonl.dropped" in output
    assert results["samples"] == 3
    assert json.loads((workdir / "predictions.jsonl.dropped").read_text()) == damaged[1]
    assert {r["id"]: r["response"] for r in records(workdir)} == {
        r["id"]: r["response"] for r in whole
    }
    _, output = run(settings(data), workdir, capsys)  # as if nothing had been
    assert "left out" not in output and "3 done before" in output


def test_records_of_other_questions_are_left_out_and_said(copied, capsys):
    workdir, data = copied
    whole = records(workdir)
    other = whole[0] | {"id": "trec/7"}
    write(workdir / "predictions.jsonl", [other, *whole, whole[0] | {"score": 0.5}])
    results, output = run(settings(data), workdir, capsys)
    assert "left out 1 records that are not of this evaluation's questions" in output
    assert "trec/7" in output and "3 done before" in output
    assert results["samples"] == 3 and results["mean"] == pytest.approx(
        sum(record["score"] for record in whole) / 3
    )
    assert [record["id"] for record in records(workdir)] == [record["id"] for record in whole]


def test_metadata_of_ones_own_is_kept_whatever_its_names(tmp_path, capsys):
    """Our own sets have `depths`; rows of others may call something else so."""
    metadata = {"depths": "deep", "length": [1], "when": None}
    data = write(tmp_path / "data.jsonl", [row | {"metadata": metadata} for row in FOXES[:1]])
    for words in ("1 prompts", "1 done before"):
        assert words in run(settings(data), tmp_path / "run", capsys)[1]
    (record,) = records(tmp_path / "run")
    assert record["metadata"] == metadata | {"prompt_tokens": record["prompt_tokens"]}
