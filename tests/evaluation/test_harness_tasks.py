"""Tasks of lm-eval as people name and write them: what works, and one message for what does not."""

import json
import os
import re

import pytest
from goldens import ROOT
from tiny import tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'refine-jax[eval]'")

from lm_eval.tasks import TaskManager

from refine_jax import lm_harness
from refine_jax.checkpoint import save_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of bytes."""
    model, params = tiny("deltanet", vocab_size=259, num_hidden_layers=1)
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    save_model(folder, params, json.dumps(model.config.to_hf()))
    return folder


@pytest.fixture
def own_tasks_alone(monkeypatch):
    """lm-eval without the tasks that come with it, whose index takes it many seconds."""

    class Quick(TaskManager):
        def __init__(self, include_path=None, include_defaults=True):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Quick)


CHOICE = """
dataset_path: json
test_split: test
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{c}}"
doc_to_target: "{{a}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def named(tmp_path):
    """A folder with two tasks of one tag, a group of both, and some that cannot be read."""
    (tmp_path / "good.jsonl").write_text('{"q": "a", "c": ["x", "y"], "a": 0}\n' * 2)
    (tmp_path / "empty.jsonl").write_text(
        '{"q": "a", "c": ["x", "y"], "a": 0}\n{"q": "b", "c": ["x", ""], "a": 0}\n'
    )
    good = CHOICE.replace("DATA", str(tmp_path / "good.jsonl"))
    for name, text in {
        "one": f"task: my_one\ntag: my_tag\n{good}",
        "two": f"task: my_two\ntag: my_tag\n{good}",
        "group": "group: my_group\ntask: [my_one, my_two]\n",
        "empty": "task: my_empty\n" + CHOICE.replace("DATA", str(tmp_path / "empty.jsonl")),
        "missing": "task: my_missing\n" + CHOICE.replace("DATA", str(tmp_path / "none.jsonl")),
        "broken": f"task: my_broken\n  x: [\n{good}",
        "template": "task: my_template\n" + good.replace("{{q}}", "{{q | nofilter}}"),
        "field": "task: my_field\n" + good.replace("{{q}}", "{{nothing.q}}"),
        "split": "task: my_split\n" + good.replace("test_split: test", "test_split: none"),
        "python": "task: my_python\n" + good.replace('"{{q}}"', "!function nowhere.text"),
        "number": "task: my_number\n"
        + good.replace("multiple_choice", "generate_until")
        + "generation_kwargs: {repetition_penalty: 1.5}\n",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def command(checkpoint, folder, *options) -> int:
    arguments = [f"--checkpoint={checkpoint}", "--tokenizer=bytes", f"--include_path={folder}"]
    return lm_harness.main([*arguments, *options])


@pytest.mark.usefixtures("own_tasks_alone")
def test_names_patterns_groups_tags_and_files(named):
    def names(*tasks):
        loaded = lm_harness._load_tasks(tasks, str(named))
        return [getattr(item, "task_name", None) or item.name for item in loaded]

    both = ["my_one", "my_two"]
    assert names("my_one") == ["my_one"]
    assert names("my_[ot][nw][eo]") == names("my_t*g") == names("my_tag") == both
    assert names("my_group") == ["my_group"]
    assert names(str(named / "one.yaml"), "my_two", "my_two") == both
    assert names(f"{named}/[ot][nw][eo].yaml") == both


@pytest.mark.usefixtures("own_tasks_alone")
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("nothing*", "lm-eval has no task nothing*"),
        ("my_broken", "broken.yaml (mapping values are not allowed"),
        ("my_missing", "lm-eval cannot load the task my_missing: FileNotFoundError"),
        ("my_template", "No filter named 'nofilter'"),
        ("my_field", "'nothing' is undefined"),
        ("my_split", "lm-eval cannot load the task my_split: KeyError: 'none'"),
        ("my_python", "Cannot import module 'nowhere'"),
        ("my_number", "task my_number: generation arguments of this kind are not supported"),
        ("my_group,my_one", "Duplicate task 'my_one'"),
        ("my_empty", "task my_empty, document 1: a continuation to score is empty"),
    ],
)
def test_tasks_that_lm_eval_cannot_use_are_one_message(task, message, checkpoint, named, capsys):
    assert command(checkpoint, named, f"--tasks={task}") == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ") and message in last


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--limit=0", "limit must be a whole number"),
        ("--limit=-1", "limit must be a whole number"),
        ("--limit=nan", "limit must be a whole number"),
        ("--limit=1.5", "limit must be a whole number"),
        ("--limit=1e30", "limit must be a whole number"),
        ("--num_fewshot=-1", "num_fewshot must be from 0"),
        ("--num_fewshot=99999999999", "num_fewshot must be from 0"),
        ("--seed=-1", "seed must be at least 0"),
        ("--seed=9223372036854775808", "seed must be at least 0"),
        ("--batch_size=-3", "batch_size must be a number"),
        ("--max_length=0", "max_length must be at least 2"),
        ("--output=/proc/results.json", "--output='/proc': nothing can be written there"),
        ("--gen_kwargs=repetition_penalty=2", "not supported. Got: {'repetition_penalty': 2}"),
        ("--gen_kwargs=temperature", "temperature must be a number. Got: ''"),
    ],
)
def test_options_are_checked_before_the_model_is_read(option, message, named, capsys):
    assert command("no checkpoint", named, "--tasks=my_one", option) == 1
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("own_tasks_alone")
def test_a_sampled_group_and_too_many_examples(checkpoint, named, capsys):
    assert command(checkpoint, named, "--tasks=my_group", "--limit=0.5") == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert set(results) == {"my_group", "my_one", "my_two"}
    assert results["my_one"]["sample_len"] == 1
    assert command(checkpoint, named, "--tasks=my_one", "--num_fewshot=5") == 1
    assert "error: lm-eval cannot evaluate my_one: ValueError" in capsys.readouterr().err


@pytest.mark.usefixtures("own_tasks_alone")
@pytest.mark.parametrize("named_output", [True, False])
def test_responses_are_kept_when_a_metric_fails(
    named_output, checkpoint, named, tmp_path, monkeypatch, capsys
):
    """The metric is Python of the task; two tasks, the other one could be scored."""
    (named / "metric.py").write_text(
        "def fail(doc, results):\n    raise ZeroDivisionError('no words in ' + doc['q'])\n"
    )
    text = "task: my_fail\n" + (named / "one.yaml").read_text().partition("\n")[2]
    text = text.replace("multiple_choice", "generate_until").replace("tag: my_tag\n", "")
    text += "process_results: !function metric.fail\ngeneration_kwargs: {max_gen_toks: 3}\n"
    (named / "fail.yaml").write_text(text)
    folder = tmp_path / "kept"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    options = ["--tasks=my_one,my_fail"]
    options += [f"--output={folder / 'results.json'}"] if named_output else []
    for attempt in (1, 2):
        assert command(checkpoint, named, *options) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert "my_fail: ZeroDivisionError: no words in a. The model's responses to" in last
        number, path = re.search(r"to (\d+) requests are kept in (.*)\.$", last).groups()
        with open(path, encoding="utf-8") as file:
            kept = [json.loads(line) for line in file]
        assert len(list(folder.iterdir())) == attempt
        assert len(kept) == int(number) == 2 * 2 + 2  # two choices, or a text, a document
        assert {record["task"] for record in kept} == {"my_one", "my_fail"}
        assert all(len(record["resps"]) == 1 for record in kept)
        texts = [each for each in kept if each["request_type"] == "generate_until"]
        assert [(each["doc_id"], each["arguments"][0]) for each in texts] == [(0, "a"), (1, "a")]
        assert all(isinstance(each["resps"][0], str) for each in texts)


LMTASKS = ROOT.parent / "shared" / "inputs" / "lmtasks"


@pytest.mark.skipif(not LMTASKS.is_dir(), reason=f"inputs not found: {LMTASKS}")
@pytest.mark.usefixtures("own_tasks_alone")
@pytest.mark.parametrize(
    ("pattern", "tasks", "message"),
    [
        ("local_roll2*,local_penalty,local_ifeval*", "roll2 penalty ifeval_like", ""),
        # datasets itself refuses half an emoji, and lm-eval an empty first choice.
        ("local_roll*", "", "cannot load the task local_roll: .*surrogate pair in string is inv"),
        ("local_emptychoice", "", "cannot load the task local_emptychoice: .*a choice"),
    ],
)
def test_the_tasks_of_bug_reports(pattern, tasks, message, checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)  # where the files say that their data is
    assert command(checkpoint, LMTASKS, f"--tasks={pattern}") == (1 if message else 0)
    output = capsys.readouterr()
    if message:
        assert re.search(message, output.err.splitlines()[-1])
        if pattern == "local_roll*":  # found while loading: no bars, no lines of the libraries
            assert str(LMTASKS / "roll.jsonl") in output.err.replace(
                f"{ROOT}/../", f"{ROOT.parent}/"
            )
            assert re.fullmatch("error: .*\n", output.err)
    else:
        results = json.loads(output.out.splitlines()[-1])["results"]
        assert set(results) == {f"local_{name}" for name in tasks.split()}
