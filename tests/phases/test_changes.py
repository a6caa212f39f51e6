"""Runs that are continued under another configuration: what changes, how, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from tiny_runs import comparable, tiny_run, write_documents

from refine_jax.base.errors import CheckpointError, ConfigError, DataError
from refine_jax.checkpoint.model import load_model
from refine_jax.config import SECTIONS, Config
from refine_jax.data.tokenizer import load_tokenizer
from refine_jax.main import execute
from refine_jax.phases import midtrain, posttrain
from refine_jax.phases.changes import _matches, allowed_names, check_same_run
from refine_jax.refine.optimizer import make_schedule
from refine_jax.report import plots
from refine_jax.report.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("compile_once")

STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def training_alone():
    """Runs are compared by what they train: evaluations would take most of the time."""
    figures = {"eval/loss": 1.0, "eval/accuracy": 0.0, "eval/entropy": 1.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "plot_training", lambda *_, **__: None)
        for phase_loop in (midtrain.MidtrainLoop, posttrain.PosttrainLoop):
            patch.setattr(phase_loop, "evaluate", lambda *_: dict(figures))
            patch.setattr(phase_loop, "show_examples", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("corpus"))


def settings(corpus, phase="midtrain", **sections):
    """A run of next-token steps on rows of 52 bytes, with a cosine schedule."""
    changes = {
        "data": {"source": str(corpus), "sequence_length": 52, "holdout": 0.2},
        "refine": {"objective": "ntp"},
        "optimizer": {"schedule": "cosine"},
        "train": {"steps": STEPS, "batch_size": 4, "eval_batches": 1, "checkpoint_every": 2},
    }
    return tiny_run(phase, changes, sections)


def config(corpus, **sections):
    return Config.from_dict(settings(corpus, **sections))


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    """The folder of a complete run."""
    workdir = tmp_path_factory.mktemp("done") / "run"
    midtrain.run(config(corpus), workdir)
    return workdir


@pytest.fixture
def workdir(done, tmp_path):
    """A copy of it to go on with."""
    return shutil.copytree(done, tmp_path / "run")


def record(workdir):
    return json.loads((workdir / "checkpoints/run.json").read_text())


def rates(workdir):
    return {r["step"]: r["learning_rate"] for r in read_metrics(workdir / "metrics.jsonl")[1:]}


def next_row(run):
    """The row that a run goes on with."""
    with run.open_checkpoints() as manager:
        return manager.restore_latest(run.abstract_state()).data_state["next_row"]


def refuses(config, workdir, *words, allow_change=()):
    """A start is refused with these words, and changes no file."""
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError) as refusal:
        midtrain.run(config, workdir, allow_change)
    for word in words:
        assert word in str(refusal.value)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    return str(refusal.value)


def test_more_steps_bend_a_cosine_schedule_and_need_permission(corpus, workdir):
    longer = config(corpus, train={"steps": STEPS + 2})
    message = refuses(
        longer, workdir, "config.train.steps: was 4, got 6", "schedule='cosine'", "learning rates"
    )
    assert message.endswith("--allow_change=train.steps")
    before = rates(workdir)
    midtrain.run(longer, workdir, ["train.steps"])
    schedule = make_schedule(longer.optimizer, STEPS + 2)
    expected = before | {step: float(schedule(step - 1)) for step in (5, 6)}
    assert rates(workdir) == expected
    assert record(workdir)["changes"] == [
        {"step": STEPS, "setting": "train.steps", "from": STEPS, "to": STEPS + 2}
    ]


def test_more_steps_of_a_constant_schedule_are_as_if_there_had_always_been_so_many(
    corpus, tmp_path
):
    steady = {"optimizer": {"schedule": "constant"}}
    longer = config(corpus, **steady, train={"steps": STEPS + 2})
    midtrain.run(longer, tmp_path / "whole")
    midtrain.run(config(corpus, **steady), tmp_path / "run")
    midtrain.run(longer, tmp_path / "run")
    losses = [
        {r["step"]: r["loss/ntp"] for r in comparable(tmp_path / name)[1:]}
        for name in ("whole", "run")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS + 2
    assert record(tmp_path / "run")["changes"] == []


def test_more_steps_bend_a_schedule_of_weights_and_need_permission(corpus, tmp_path):
    steady = {"optimizer": {"schedule": "constant"}, "refine": {"lambda_rl_until": 0.5}}
    midtrain.run(config(corpus, **steady), tmp_path / "run")
    longer = config(corpus, **steady, train={"steps": STEPS + 2})
    words = ("config.train.steps: was 4, got 6", "lambda_rl_schedule='constant'", "weights")
    refuses(longer, tmp_path / "run", *words)


def test_runs_of_versions_without_the_setting_rolled_out_from_the_start_of_a_step(corpus, workdir):
    path = workdir / "checkpoints/run.json"
    saved = json.loads(path.read_text())
    del saved["config"]["refine"]["rollouts"], saved["digest"]
    saved["config"]["refine"]["objective"] = "refine"
    saved["config"]["data"]["sequence_length"] = 80
    saved["config"]["train"]["mini_batch_size"] = 2
    path.write_text(json.dumps(saved))
    now = settings(corpus, refine={"objective": "refine"}, data={"sequence_length": 80})
    now.train.mini_batch_size = 2
    refuses(Config.from_dict(now), workdir, "config.refine.rollouts: was 'batch', got 'update'")
    now.refine.rollouts = "batch"
    assert check_same_run(Config.from_dict(now), workdir).made == ()
    # With one update a step, as with next-token training, both are the same.
    saved["config"]["train"]["mini_batch_size"] = None
    path.write_text(json.dumps(saved))
    now.train.mini_batch_size, now.refine.rollouts = None, "update"
    assert check_same_run(Config.from_dict(now), workdir).made == ()


def test_fewer_steps_than_are_done_is_an_error(corpus, workdir):
    for allow_change in ((), ["train.steps"]):
        refuses(
            config(corpus, train={"steps": 3}),
            workdir,
            "config.train.steps",
            "steps=3, done: 4",
            allow_change=allow_change,
        )


def test_a_run_whose_steps_are_done_says_so(corpus, workdir, capsys):
    midtrain.run(config(corpus), workdir)
    assert f"all {STEPS} steps are done" in capsys.readouterr().out


def test_a_changed_learning_rate_is_offered_recorded_and_kept(corpus, workdir, capsys):
    values = settings(corpus, optimizer={"learning_rate": 5e-3}, train={"steps": 6})
    assert execute(values, str(workdir)) == 1
    message = capsys.readouterr().err
    flag = "--allow_change=optimizer.learning_rate,train.steps"
    assert "config.optimizer.learning_rate: was 0.01, got 0.005" in message and flag in message
    # As the message says: names joined by commas; here also repeated, and with `config.`.
    allow = [flag.partition("=")[2], "config.train.steps"]
    assert execute(values, str(workdir), allow_change=allow) == 0
    said = capsys.readouterr().out
    assert "optimizer.learning_rate=0.005 (was 0.01)" in said and "after step 4 of 6" in said
    made = [
        {"step": STEPS, "setting": "optimizer.learning_rate", "from": 0.01, "to": 0.005},
        {"step": STEPS, "setting": "train.steps", "from": STEPS, "to": 6},
    ]
    assert record(workdir)["changes"] == made
    new = Config.from_dict(values)
    assert record(workdir)["config"]["optimizer"]["learning_rate"] == 5e-3
    expected = make_schedule(new.optimizer, 6)
    assert [rates(workdir)[step] for step in (5, 6)] == [float(expected(step)) for step in (4, 5)]
    # The next start with the new values needs no flag and keeps the record; the old ones do.
    midtrain.run(new, workdir)
    assert record(workdir)["changes"] == made
    refuses(config(corpus, train={"steps": 6}), workdir, "was 0.005, got 0.01")
    # A flag that is left in the command changes nothing more.
    midtrain.run(new, workdir, allow)
    assert record(workdir)["changes"] == made


def test_what_was_trained_before_the_change_is_kept(corpus, workdir):
    """The first step after the change starts from the saved parameters and moments."""
    before = load_model(workdir).params
    still = config(corpus, optimizer={"learning_rate": 0.0}, train={"steps": STEPS + 1})
    midtrain.run(still, workdir, ["optimizer.learning_rate", "train.steps"])
    after = load_model(workdir)
    assert after.step == STEPS + 1
    for name in ("embeddings", "lm_head"):
        np.testing.assert_array_equal(after.params[name]["weight"], before[name]["weight"])


FREE = {
    "mesh": {"fsdp": 1},
    "model": {"remat": "full"},
    "data": {"workers": 1},
    "train": {
        "eval_every": 1,
        "eval_batches": 2,
        "log_every": 0,
        "checkpoint_every": 1,
        "keep_checkpoints": 5,
        "max_nonfinite_updates": 3,
    },
    # Not used by mid-training.
    "generation": {"temperature": 0.5},
    "evaluate": {"tasks": "vt"},
    "testtime": {"steps": 2},
    "prompts": {"cut": "left"},
    "posttrain": {"samples": 2},
}


def test_what_computes_the_same_changes_freely(corpus, workdir):
    assert check_same_run(config(corpus, **FREE), workdir).made == ()


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"train": {"seed": 1}}, "random numbers"),
        ({"model": {"param_dtype": "bfloat16"}}, "saved parameters"),
        ({"optimizer": {"first_moment_dtype": "bfloat16"}}, "saved moments"),
        ({"model": {"fresh": {"hidden_size": 16}}}, "it is the model"),
        ({"optimizer": {"clip_norm": None}}, "arrays"),
    ],
)
def test_what_saved_arrays_mean_never_changes(corpus, workdir, sections, why):
    changed = settings(corpus)
    for section, fields in sections.items():
        changed[section].update(fields)
    message = refuses(Config.from_dict(changed), workdir, "cannot change within a run", why)
    assert "--allow_change" not in message
    ((section, fields),) = sections.items()
    name = f"{section}.{next(iter(fields))}"
    refuses(Config.from_dict(changed), workdir, name, allow_change=[name])


def test_a_divergence_needs_the_policy_that_only_such_runs_keep(corpus, workdir):
    changed = config(corpus, refine={"objective": "refine", "kl_coef": 0.1})
    refuses(changed, workdir, "refine.kl_coef", "arrays", allow_change=["refine.objective"])


@pytest.mark.parametrize(
    ("train", "schedule", "allowed"),
    [
        ({"batch_size": 8}, "cosine", True),  # still one update a step
        ({"batch_size": 8, "mini_batch_size": 4}, "cosine", False),
        ({"batch_size": 8, "mini_batch_size": 4}, "constant", True),
    ],
)
def test_the_schedule_counts_updates(corpus, tmp_path, done, train, schedule, allowed):
    """So a run cannot get more of them a step while its learning rate depends on their number."""
    optimizer = {"optimizer": {"schedule": schedule}}
    workdir = tmp_path / "run"
    shutil.copytree(done, workdir)
    names = ["train.batch_size", "train.mini_batch_size", "optimizer.schedule"]
    changed = config(corpus, **optimizer, train=train)
    if allowed:
        assert check_same_run(changed, workdir, names).made
    else:
        refuses(changed, workdir, "a step had 1 and would have 2", allow_change=names)


def test_a_larger_batch_goes_on_at_the_same_row(corpus, workdir):
    changed = config(corpus, train={"batch_size": 8, "steps": STEPS + 1})
    midtrain.run(changed, workdir, ["train.batch_size,train.steps"])
    again = midtrain.MidtrainLoop(midtrain.prepare(changed, workdir), workdir)
    assert next_row(again) == 4 * STEPS + 8


def test_other_documents_are_refused_before_anything_is_written(corpus, workdir, tmp_path):
    other = shutil.copytree(corpus, tmp_path / "other")
    (other / "00.txt").write_text("word " * 40)
    message = refuses(
        config(other, train={"steps": STEPS}), workdir, "config.data", str(other), "fingerprint"
    )
    assert message.endswith("--allow_change=data.source")


def test_other_documents_by_permission_are_read_from_their_first_row(
    corpus, workdir, tmp_path, capsys
):
    other = shutil.copytree(corpus, tmp_path / "other")
    (other / "00.txt").write_text("word " * 40)
    longer = config(other, train={"steps": STEPS + 1})
    midtrain.run(longer, workdir, ["data.source", "train.steps"])
    assert "from the first one on" in capsys.readouterr().out
    changes = {change["setting"]: change for change in record(workdir)["changes"]}
    assert changes["data.source"]["from"] == str(corpus)
    assert changes["data.source"]["to"] == str(other)
    again = midtrain.MidtrainLoop(midtrain.prepare(longer, workdir), workdir)
    assert next_row(again) == longer.train.batch_size
    # A restart from the checkpoint before the change reads them from the first one on, too; one
    # from a later checkpoint goes on where it was.
    assert again.parts.changes.other_rows(STEPS)
    assert not again.parts.changes.other_rows(STEPS + 1)


def test_settings_that_decide_the_rows_start_them_anew(corpus, workdir):
    shorter = config(corpus, data={"sequence_length": 50}, train={"steps": STEPS + 1})
    refuses(shorter, workdir, "data.sequence_length: was 52, got 50")
    midtrain.run(shorter, workdir, ["data.sequence_length", "train.steps"])
    assert len(read_metrics(workdir / "metrics.jsonl")) == STEPS + 2


def test_the_tokenizer_may_lie_elsewhere_but_not_be_another(corpus, workdir):
    """The fingerprint of the rows decides: it knows the tokenizer, not where it lies."""
    values = settings(corpus, data={"sequence_length": 40, "min_tokens": 2})
    values.model.fresh.vocab_size = 32000
    found = []
    for name in ("mistral-v1", load_tokenizer("mistral-v1").files["tokenizer.model"], "bytes"):
        values.data.tokenizer = str(name)
        parts = midtrain.prepare(Config.from_dict(values), workdir.parent / "new")
        found.append(parts.changes.data)
    assert found[0] == found[1] != found[2]
    moved = config(corpus, data={"tokenizer": "somewhere/tokenizer.model"})
    assert check_same_run(moved, workdir).made == ()


def test_names_are_checked():
    assert allowed_names(["optimizer.b1, train.steps", "config.optimizer.b1"]) == (
        "optimizer.b1",
        "train.steps",
    )
    with pytest.raises(ConfigError, match=r"'optimizer.lerning_rate'.*'optimizer.learning_rate'"):
        allowed_names(["optimizer.lerning_rate"])
    with pytest.raises(ConfigError, match="another --workdir"):
        allowed_names(["model.fresh"])


def test_every_setting_in_the_table_is_one():
    from refine_jax.phases import changes

    known = ["phase"] + [
        f"{section}.{field.name}"
        for section, kind in SECTIONS.items()
        for field in dataclasses.fields(kind)
    ]
    tables = (changes._FREELY, changes._BY_CONTENT, changes._NEVER, changes._OF_DATA)
    for pattern in (*(name for table in tables for name in table), *changes._OF_UPDATES):
        assert any(_matches(name, [pattern]) for name in known), pattern


def test_evaluations_take_no_changes(corpus, tmp_path, capsys):
    values = settings(corpus, "evaluate")
    assert execute(values, str(tmp_path / "run"), allow_change=["train.seed"]) == 1
    assert "--allow_change is for runs that train" in capsys.readouterr().err


@pytest.mark.parametrize(
    "broken",
    [
        {"config": []},
        {"config": {"train": 3}},
        {"config": {"train": {"steps": "many"}}},
        {"config": {"phase": 1}},
        {"changes": {}},
        {"changes": [1]},
        {"changes": [{"step": "4", "setting": "a.b", "from": 1, "to": 2}]},
        {"data": 7},
    ],
)
def test_a_damaged_record_is_one_message(corpus, workdir, broken):
    path = workdir / "checkpoints/run.json"
    path.write_text(json.dumps(record(workdir) | broken))
    with pytest.raises(CheckpointError, match=r"run\.json"):
        check_same_run(config(corpus), workdir)


def test_a_lost_record_is_one_message(corpus, workdir):
    (workdir / "checkpoints/run.json").unlink()
    with pytest.raises(CheckpointError, match=r"no run\.json"):
        check_same_run(config(corpus), workdir)


def test_a_run_of_a_version_without_changes_continues(corpus, workdir, tmp_path):
    path = workdir / "checkpoints/run.json"
    saved = record(workdir)
    del saved["changes"], saved["data"], saved["digest"]
    path.write_text(json.dumps(saved))
    other = shutil.copytree(corpus, tmp_path / "other")
    (other / "00.txt").write_text("word " * 40)
    # Such a record does not know its data; the checkpoint does.
    with pytest.raises(DataError, match="other data"):
        midtrain.run(config(other), workdir)
    midtrain.run(config(corpus), workdir)
    assert record(workdir)["changes"] == []


def test_post_training_changes_alike(tmp_path):
    values = tiny_run(
        "posttrain",
        {
            "data": {"source": "recall", "sequence_length": 200, "limit_documents": 16},
            "refine": {"objective": "ntp"},
            "train": {"steps": 1, "batch_size": 2, "eval_batches": 1},
            "posttrain": {"nested": False},
        },
    )
    posttrain.run(Config.from_dict(values), tmp_path / "run")
    values.train.steps = 2
    values.prompts.max_answer_tokens = 30
    values.evaluate.tasks = "vt"
    with pytest.raises(ConfigError, match=r"=prompts\.max_answer_tokens"):
        posttrain.prepare(Config.from_dict(values), tmp_path / "run")
    allowed = ["prompts.max_answer_tokens"]
    parts = posttrain.prepare(Config.from_dict(values), tmp_path / "run", allowed)
    assert [change["setting"] for change in parts.changes.made] == allowed
    assert parts.changes.other_rows(1)  # rows of prompts are cut for their answers
