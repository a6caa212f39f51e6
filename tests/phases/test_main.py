"""Whole runs of a tiny model: training, resuming, being stopped, and every kind of bad input."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import comparable, config_file, tiny_run, write_documents

from refine_jax import report
from refine_jax.base.errors import ConfigError
from refine_jax.checkpoint.model import load_model, save_model
from refine_jax.config import Config
from refine_jax.data.pipeline import load_corpus
from refine_jax.data.tokenizer import load_tokenizer
from refine_jax.kernels.device import compiled_for
from refine_jax.main import execute, keep_programs
from refine_jax.models.config import model_config
from refine_jax.models.transformer import Model
from refine_jax.phases import midtrain
from refine_jax.phases.changes import check_same_run
from refine_jax.phases.setup import data_options
from refine_jax.report.held_out import read_held_out
from refine_jax.report.metrics import read_metrics, table
from refine_jax.report.monitor import Monitor

pytestmark = pytest.mark.usefixtures("compile_once")

ROOT = Path(__file__).parents[2]
STEPS, WARMUP = 6, 2
LENGTH = 52


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("corpus"))


def tiny(corpus, **sections):
    """A run on rows of 52 tokens."""
    changes = {
        "data": {
            "source": str(corpus),
            "sequence_length": LENGTH,
            "holdout": 0.2,
            "min_remainder": LENGTH,
        },
        "train": {
            "steps": STEPS,
            "warmup_ntp_steps": WARMUP,
            "batch_size": 4,
            "micro_batch_size": 2,
            "eval_every": 3,
            "eval_batches": 2,
            "checkpoint_every": 2,
            "log_every": 1,
        },
    }
    return tiny_run("midtrain", changes, sections)


def saved_state(config, workdir, step=STEPS):
    """Every array of a checkpoint (parameters, moments, counters, key), and its data state."""
    loop = midtrain.MidtrainLoop(midtrain.prepare(config, workdir), workdir)
    with loop.open_checkpoints() as manager:
        restored = manager.restore(step, jax.eval_shape(loop.initial_state))
    state = dataclasses.replace(restored.state, key=jax.random.key_data(restored.state.key))
    return jax.tree.leaves(state), restored.data_state


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """(folder, figures) of a run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, midtrain.run(Config.from_dict(tiny(corpus)), workdir)


def test_a_run_learns_and_reports(whole):
    workdir, figures = whole
    assert figures["validation_loss_before"] == pytest.approx(np.log(259), abs=0.1)
    assert figures["validation_loss_after"] < figures["validation_loss_before"] - 0.2
    assert figures["steps"] == STEPS and figures["skipped_updates"] == 0
    assert (figures["ntp_steps"], figures["refine_steps"]) == (WARMUP, STEPS - WARMUP)
    assert -1 <= figures["mean_reward_first_10"] <= 1
    assert json.loads((workdir / "results.json").read_text()) == figures
    for plot in ("training.png", "rollouts.png"):
        assert (workdir / plot).read_bytes().startswith(b"\x89PNG")
    assert "The method in this text" in (workdir / "report.html").read_text(encoding="utf-8")


def test_a_report_is_made_again_from_the_files_of_the_run(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    files = ("results.json", "training.png")
    before = [(folder / name).read_bytes() for name in files]
    for name in files:
        (folder / name).unlink()
    assert report.main([str(folder)]) == 0
    assert [(folder / name).read_bytes() for name in files] == before
    out = capsys.readouterr().out
    assert table(json.loads(before[0])) in out
    assert json.loads(out.splitlines()[-1]) == json.loads(before[0])
    (tmp_path / "empty").mkdir()
    assert report.main([str(tmp_path / "empty")]) == 1
    assert "holds no records of a run" in capsys.readouterr().err


def test_metrics_have_one_record_a_step_with_all_names(whole):
    records = read_metrics(whole[0] / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    both = ("loss/total", "loss/ntp", "entropy/mean", "grad/norm", "update/skipped")
    both += ("learning_rate", "tokens_per_second", "time/data", "time/update", "time/step")
    refine = ("loss/policy", "reward/mean", "reward/std", "advantage/mean", "advantage/std")
    refine += ("policy/clip_fraction", "policy/clip_fraction_lower", "policy/ppo_kl")
    refine += ("policy/entropy",)
    evaluation = ("eval/loss", "eval/accuracy", "eval/entropy", "eval/reward")
    for record in records:
        step = record["step"]
        for names, expected in (
            (both, step > 0),
            (refine, step > WARMUP),
            (evaluation, step in (0, 3, STEPS)),
        ):
            assert [name in record for name in names] == [expected] * len(names), (step, names)
    # Each kind of step is one program, compiled when it first runs.
    assert [r["step"] for r in records if "time/compile" in r] == [1, WARMUP + 1]


def test_the_held_out_loss_is_that_of_the_held_out_documents(whole, corpus):
    """Computed again from the final parameters, row by row, with plain logits."""
    workdir, figures = whole
    config = Config.from_dict(tiny(corpus))
    loaded = load_model(workdir)
    model = Model(model_config(loaded.config))
    options = data_options(config, load_tokenizer("bytes"))
    logits_of = jax.jit(lambda params, ids: model.forward(params, ids)[0] @ model.head(params).T)
    total, count, right = 0.0, 0, 0
    for batch in load_corpus(**options).dataset("validation", 1):
        real = batch["segments"][0] > 0
        tokens = batch["tokens"][0][real]
        row = np.pad(tokens, (0, LENGTH - len(tokens)))  # what fills it comes after the text
        logits = np.float64(logits_of(loaded.params, row[None])[0, : len(tokens) - 1])
        truth = logits[np.arange(len(tokens) - 1), tokens[1:]]
        total += np.sum(np.log(np.exp(logits).sum(-1)) - truth)
        right += np.sum(logits.argmax(-1) == tokens[1:])
        count += len(tokens) - 1
    assert figures["validation_loss_after"] == pytest.approx(total / count, rel=1e-5)
    kept = read_held_out(workdir / "held_out.jsonl")[-1]["rows"]
    assert sum(kept["nll"]) == pytest.approx(total, rel=1e-5) and sum(kept["tokens"]) == count
    assert figures["validation_accuracy_after"] == pytest.approx(right / count, abs=1e-9)


class _CrashError(Exception):
    pass


@pytest.mark.parametrize("how", ["SIGINT", "crash"])  # SIGTERM ends the command further down
def test_an_interrupted_run_continues_bit_for_bit(whole, corpus, tmp_path, monkeypatch, how):
    config = Config.from_dict(tiny(corpus))
    record = Monitor.record

    def interrupt(self, step, metrics):
        record(self, step, metrics)
        if step == 3 and how == "crash":
            raise _CrashError
        if step == 3:
            os.kill(os.getpid(), getattr(signal, how))

    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "record", interrupt)
        if how == "crash":
            with pytest.raises(_CrashError):
                midtrain.run(config, tmp_path)
            # The last checkpoint is step 2: what was written of step 3 is written anew.
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write('{"step": 4, "loss/tot')
        else:
            assert midtrain.run(config, tmp_path) == {"interrupted": how, "step": 3}
            assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    midtrain.run(config, tmp_path)
    assert comparable(tmp_path) == comparable(whole[0])
    held_out = [(folder / "held_out.jsonl").read_bytes() for folder in (tmp_path, whole[0])]
    assert held_out[0] == held_out[1] and held_out[0].count(b"\n") == 3
    arrays, data = saved_state(config, tmp_path)
    expected_arrays, expected_data = saved_state(config, whole[0])
    for got, want in zip(arrays, expected_arrays, strict=True):
        np.testing.assert_array_equal(got, want)
    assert data == expected_data


def test_a_complete_run_reports_again_and_a_longer_one_goes_on(whole, corpus, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    before = comparable(workdir)
    again = midtrain.run(Config.from_dict(tiny(corpus)), workdir)
    assert again["validation_loss_after"] == whole[1]["validation_loss_after"]
    assert comparable(workdir) == before
    longer = midtrain.run(Config.from_dict(tiny(corpus, train={"steps": STEPS + 1})), workdir)
    assert longer["steps"] == STEPS + 1
    assert comparable(workdir)[: STEPS + 1] == before


def test_another_configuration_does_not_continue_the_run(whole, corpus, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    changed = Config.from_dict(tiny(corpus, refine={"reward": "binary"}))
    with pytest.raises(ConfigError, match=r"refine.reward: was 'cosine', got 'binary'"):
        midtrain.run(changed, workdir)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_a_run_of_a_version_with_fewer_settings_is_continued(whole, corpus, tmp_path):
    record = tmp_path / "checkpoints/run.json"
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    saved = json.loads(record.read_text())
    del saved["config"]["phase"], saved["config"]["testtime"], saved["config"]["refine"]["reward"]
    del saved["digest"]  # such a version wrote none
    record.write_text(json.dumps(saved))
    check_same_run(Config.from_dict(tiny(corpus)), tmp_path)
    with pytest.raises(ConfigError, match=r"refine.reward: was 'cosine', got 'binary'"):
        check_same_run(Config.from_dict(tiny(corpus, refine={"reward": "binary"})), tmp_path)


def test_a_model_without_a_tokenizer_gets_that_of_its_run(corpus, tmp_path):
    config = tiny(corpus, data={"tokenizer": "mistral-v1", "sequence_length": 44})
    config.model.fresh.vocab_size = 32000
    config.data.min_remainder = None
    parts = midtrain.prepare(Config.from_dict(config), tmp_path / "run")
    (name,) = parts.start.files
    assert name == "tokenizer.model"
    shutil.copy(parts.start.files[name], tmp_path / name)
    copied = load_tokenizer(tmp_path)
    assert copied.fingerprint == parts.tokenizer.fingerprint
    assert copied.vocab_size == 32000


@pytest.mark.parametrize(("objective", "length", "expected"), [("ntp", 52, 44), ("refine", 44, 44)])
def test_pieces_of_documents_hold_the_rollouts(corpus, objective, length, expected):
    config = tiny(corpus, refine={"objective": objective}, data={"sequence_length": length})
    config.data.min_remainder = None
    options = data_options(Config.from_dict(config), load_tokenizer("bytes"))
    assert options["options"].min_remainder == expected == 2 * 20 + 2 * 2


def test_the_best_checkpoint_is_kept(corpus, tmp_path):
    train = {"best_metric": "accuracy", "eval_every": 1, "checkpoint_every": 0, "steps": 3}
    train |= {"keep_checkpoints": 1, "warmup_ntp_steps": 0}
    midtrain.run(Config.from_dict(tiny(corpus, train=train, refine={"objective": "ntp"})), tmp_path)
    accuracy = {r["step"]: r["eval/accuracy"] for r in read_metrics(tmp_path / "metrics.jsonl")}
    best = max((value, step) for step, value in accuracy.items() if step > 0)[0]
    assert accuracy[load_model(tmp_path, step="best").step] == best
    assert load_model(tmp_path).step == 3


def poisoned(corpus, folder, tokens):
    """A checkpoint whose embeddings of some tokens are NaN."""
    fields = tiny(corpus).model.fresh.to_dict()
    model = Model(model_config(fields))
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    params["embeddings"]["weight"] = np.array(params["embeddings"]["weight"])
    params["embeddings"]["weight"][tokens] = np.nan
    save_model(folder, params, json.dumps(fields))
    return {"checkpoint": str(folder), "fresh": {}}


def test_non_finite_gradients_skip_the_update_and_are_counted(corpus, tmp_path):
    # No document of the corpus has a "#" but one.
    source = shutil.copytree(corpus, tmp_path / "corpus")
    (source / "special.txt").write_text("# " * LENGTH, encoding="utf-8")
    model = poisoned(corpus, tmp_path / "model", [ord("#")])
    train = {"steps": 40, "warmup_ntp_steps": 40, "eval_every": 0, "checkpoint_every": 0}
    config = Config.from_dict(
        tiny(source, model=model, train=train | {"max_nonfinite_updates": 41})
    )
    figures = midtrain.run(config, tmp_path / "run")
    batches = iter(load_corpus(**data_options(config, load_tokenizer("bytes"))).dataset("train", 4))
    bad = [bool((next(batches)["tokens"] == ord("#")).any()) for _ in range(40)]
    assert 0 < sum(bad) < 40
    assert figures["skipped_updates"] == sum(bad)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]
    assert [record["loss/total"] is None for record in records] == bad
    others = np.delete(load_model(tmp_path / "run").params["embeddings"]["weight"], ord("#"), 0)
    assert np.isfinite(others).all()


def test_non_finite_gradients_in_a_row_stop_the_run(corpus, tmp_path, capsys):
    model = poisoned(corpus, tmp_path / "model", slice(None))
    config = tiny(corpus, model=model, train={"max_nonfinite_updates": 2, "checkpoint_every": 1})
    assert execute(config, str(tmp_path / "run")) == 1
    message = capsys.readouterr().err
    assert "max_nonfinite_updates" in message and "step 2" in message
    assert message.count("\n") == 1
    # The step that failed is not saved; the one before has the initial parameters.
    saved = load_model(tmp_path / "run")
    assert saved.step == 1
    np.testing.assert_array_equal(
        saved.params["lm_head"]["weight"],
        load_model(tmp_path / "model").params["lm_head"]["weight"],
    )


def corrupt(folder):
    """Cut off the largest file of a checkpoint."""
    data = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


BAD_INPUT = {
    "unknown field": ({"refine": {"rolout_length": 2}}, "Did you mean 'rollout_length'?"),
    "unknown model field": ({"model": {"fresh": {"model_type": "delta_net", "hidden": 8}}}, "hidd"),
    "missing data": ({"data": {"source": "/no/such/corpus.jsonl"}}, "/no/such/corpus.jsonl"),
    "missing checkpoint": ({"model": {"checkpoint": "/no/such/model"}}, "/no/such/model"),
    "missing tokenizer": ({"data": {"tokenizer": "/no/such/tokenizer"}}, "/no/such/tokenizer"),
    "documents too short": ({"data": {"min_tokens": 100000}}, "min_tokens=100000"),
    "k too large": ({"refine": {"rollout_length": 21}}, "edge_margin"),
    "c too large": ({"refine": {"num_positions": 30}}, "num_positions * rollout_length <= 12"),
    "tokenizer too large": ({"data": {"tokenizer": "mistral-v1"}}, "32000, vocab_size=259"),
    "absent kernels": ({"model": {"implementation": "cuda"}}, "'pallas_gpu'. Got: 'cuda'"),
    "too few epochs": ({"data": {"epochs": 1}, "train": {"steps": 10000}}, "epochs=1"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message_and_nothing_is_written(case, corpus, tmp_path, capsys):
    changes, words = BAD_INPUT[case]
    assert execute(tiny(corpus, **changes), str(tmp_path / "run")) == 1
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and words in output.err
    assert "Traceback" not in output.err and not output.out
    assert not list(tmp_path.iterdir())


def test_a_corrupt_model_checkpoint_is_one_message_and_nothing_is_written(corpus, tmp_path, capsys):
    model = poisoned(corpus, tmp_path / "model", [])
    corrupt(tmp_path / "model")
    assert execute(tiny(corpus, model=model), str(tmp_path / "run")) == 1
    assert str(tmp_path / "model") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_corrupt_run_is_one_message_and_nothing_is_lost(whole, corpus, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    corrupt(workdir / "checkpoints" / str(STEPS))
    metrics = (workdir / "metrics.jsonl").read_bytes()
    assert execute(tiny(corpus, train={"steps": STEPS + 1}), str(workdir)) == 1
    message = capsys.readouterr().err
    assert f"checkpoints/{STEPS}" in message and "continue from step 4" in message
    assert (workdir / "metrics.jsonl").read_bytes() == metrics


def test_rows_that_no_memory_holds_are_refused_before_anything_starts(corpus, tmp_path, capsys):
    train = {"batch_size": 2**20, "micro_batch_size": 2**20}
    data = {"sequence_length": 2048, "source": "/no/such/corpus"}
    wide = {"fresh": {"hidden_size": 2**16, "num_heads": 2**10, "num_hidden_layers": 100}}
    assert execute(tiny(corpus, train=train, data=data, model=wide), str(tmp_path / "run")) == 1
    message = capsys.readouterr().err
    # Float32: 100 layers x 2^20 rows x 2^11 tokens x 2^16 numbers x 4 bytes / 2^30.
    assert "take 52,428,800.0 GiB" in message and "config.train.micro_batch_size" in message
    assert message.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_device_out_of_memory_is_one_message(corpus, tmp_path, capsys, monkeypatch):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.\nx")

    monkeypatch.setattr(midtrain, "run", fail)
    assert execute(tiny(corpus), str(tmp_path / "run")) == 1
    message = capsys.readouterr().err
    assert message.startswith(
        "error: The memory of a device is not enough (RESOURCE_EXHAUSTED: Out"
    )
    assert "Lower config.train.micro_batch_size" in message and message.count("\n") == 1


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "refine_jax.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        **options,
    )


@pytest.fixture
def endless(corpus, tmp_path):
    """A configuration file of a run that does not end by itself."""
    train = {"steps": 100000, "checkpoint_every": 0, "eval_every": 0}
    return config_file(tmp_path / "tiny.py", tiny(corpus, train=train))


def test_the_command_saves_and_exits_cleanly_on_sigterm(endless, tmp_path):
    workdir = tmp_path / "run"
    process = command(f"--config={endless}", f"--workdir={workdir}", "--config.train.seed=3")
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    last = json.loads(out.splitlines()[-1])
    assert last["interrupted"] == "SIGTERM"
    assert load_model(workdir).step == last["step"] >= 1
    assert (
        json.loads((workdir / "checkpoints/run.json").read_text())["config"]["train"]["seed"] == 3
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.refine.rolout_length=3"], "Did you mean 'rollout_length'"),
        (["--config.train.steps=many"], "--config.train.steps=many"),
        (["--config=nowhere.py"], "no configuration file 'nowhere.py'"),
    ],
)
def test_wrong_flags_are_one_message(endless, tmp_path, arguments, words):
    workdir = tmp_path / "run"
    process = command(f"--config={endless}", f"--workdir={workdir}", *arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.match("error: .*", err) and words in err
    assert "Traceback" not in err and not out
    assert not workdir.exists()


@pytest.mark.usefixtures("programs_kept_elsewhere")
def test_programs_for_accelerators_are_kept_with_the_run(tmp_path):
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs(tmp_path)
    assert jax.config.jax_compilation_cache_dir is None  # this is a CPU
    with compiled_for("tpu"):
        keep_programs(tmp_path / "run")
        keep_programs(tmp_path / "named already")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: 3 * x + 1)(np.arange(5.0))
    assert any((tmp_path / "run" / "compiled").iterdir())
    assert not (tmp_path / "named already").exists()
