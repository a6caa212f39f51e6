"""Models on the Hugging Face hub: converted from it, started from, pushed to it."""

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from refine_jax import convert
from refine_jax.base.errors import CheckpointError, ConfigError
from refine_jax.checkpoint import load_model, save_model
from refine_jax.checkpoint.card import PRIVATE, model_card
from refine_jax.checkpoint.hub import fetch
from refine_jax.checkpoint.tree import flatten
from refine_jax.compile_only.programs.run import describe_model
from refine_jax.config import Config, ModelConfig, defaults
from refine_jax.convert import from_hf, to_hf
from refine_jax.phases.setup import load_start
from refine_jax.small import folder

SMALL = folder("deltanet")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
MODEL = "hf://org/small"


def same(left, right):
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for name in left:
        a, b = np.asarray(left[name]), np.asarray(right[name])
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), name


@pytest.fixture
def small(hub):
    hub.add_folder("models", "org/small", SMALL)
    return hub


def test_a_model_on_the_hub_converts_as_its_folder_does(small, tmp_path):
    files = small.files("models", "org/small")
    small.add("models", "org/small", files | {"other.bin": b"x" * 99, "onnx/tokenizer.json": b"{}"})
    line = from_hf(MODEL, str(tmp_path / "fetched"))
    assert line.replace("fetched", "local").startswith(from_hf(SMALL, str(tmp_path / "local"))[:60])
    same(load_model(tmp_path / "fetched").params, load_model(tmp_path / "local").params)
    assert set(small.sent) == {"config.json", "model.safetensors", *TOKENIZER}
    assert small.sent["model.safetensors"] == len(files["model.safetensors"])


def test_a_revision_is_that_revision(small, tmp_path):
    files = small.files("models", "org/small")
    old = small.heads["models", "org/small"]["main"]
    small.heads["models", "org/small"]["v1"] = old
    small.add("models", "org/small", files | {"config.json": b"{}"})
    for revision in ("v1", old):
        assert load_model(f"{MODEL}@{revision}").config["hidden_size"] == 64
    with pytest.raises(Exception, match="model_type"):
        load_model(MODEL)


def test_a_model_is_converted_once_and_serves_offline(small, monkeypatch):
    model = load_model(MODEL)
    sent = small.sent.copy()
    same(load_model(MODEL).params, model.params)
    assert small.sent == sent, "fetched twice"
    asked = len(small.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    same(load_model(MODEL).params, model.params)
    (tokenizer,) = {model.tokenizer, load_model(MODEL).tokenizer}
    assert (tokenizer / "tokenizer.json").is_file()
    assert len(small.asked) == asked
    with pytest.raises(
        CheckpointError, match=r"hf://org/small@v2 is not in the cache .* HF_HUB_OFF"
    ):
        load_model(MODEL + "@v2")


def test_a_part_of_a_model_is_not_taken_for_the_model(small, monkeypatch):
    assert fetch(MODEL, only=("config.json",)).is_dir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not in the cache of huggingface_hub as a whole"):
        load_model(MODEL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    same(load_model(MODEL).params, load_model(SMALL).params)


def test_a_hub_that_does_not_answer_is_replaced_by_the_cache(small, monkeypatch):
    model = load_model(MODEL)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    small.status = 503
    same(load_model(MODEL).params, model.params)
    with pytest.raises(CheckpointError, match=r"hf://org/other: http://127.*answered 503"):
        load_model("hf://org/other")


def test_several_ask_at_once_and_one_converts(small, monkeypatch):
    made, results = [], []
    monkeypatch.setattr(
        "refine_jax.checkpoint.model.save_model",
        lambda *args: (made.append(args[0]), save_model(*args)),
    )
    threads = [
        threading.Thread(target=lambda: results.append(load_model(MODEL).params)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(results) == 4
    same(results[0], results[3])


def push(capsys, *arguments):
    assert convert.main(["to_hf", *map(str, arguments)]) == 0
    return capsys.readouterr()


@pytest.fixture
def checkpoint(tmp_path):
    from_hf(SMALL, str(tmp_path / "checkpoint"))
    return tmp_path / "checkpoint"


def test_what_is_pushed_reads_back_bit_for_bit(hub, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    said = push(capsys, checkpoint, tmp_path / "out", "--push=me/model")
    written = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    files = hub.files("models", "me/model")
    card = files.pop("README.md").decode()
    assert files.pop(".gitattributes") and files == written
    assert f"pushed: {hub.endpoint}/me/model/commit/" in said.out and hub.private["me/model"]
    same(load_model("hf://me/model").params, load_model(checkpoint).params)
    assert "arxiv.org/abs/2602.16704" in card and "`delta_net` with 144,992 parameters" in card

    # A second push replaces weights and our card, and keeps what others put there.
    old = dict(hub.files("models", "me/model"), **{"model-00001-of-00002.safetensors": b"old"})
    hub.add("models", "me/model", old | {"notes.txt": b"mine"})
    push(capsys, checkpoint, tmp_path / "two", "--push=me/model", "--dtype=float32")
    assert "in float32" in hub.files("models", "me/model")["README.md"].decode()
    hub.add("models", "me/model", hub.files("models", "me/model") | {"README.md": b"my own words"})
    push(capsys, checkpoint, tmp_path / "three", "--push=me/model")
    files = hub.files("models", "me/model")
    assert files["README.md"] == b"my own words" and files["notes.txt"] == b"mine"
    assert "model-00001-of-00002.safetensors" not in files


def run_folder(checkpoint, folder):
    """The work folder of a run, as far as a card tells of it."""
    made = folder / "run"
    model = load_model(checkpoint)
    config = {
        "phase": "midtrain",
        "model": {"checkpoint": "hf://org/small@v1", "adapter": "/home/me/secret/adapter"},
        "data": {
            "source": "hf://datasets/org/words@v2/data/*.parquet",
            "cache_dir": "cache/of/mine",
            "tokenizer": "checkpoint",
            "sequence_length": 256,
        },
        "train": {"batch_size": 8, "seed": 3, "project": "~/secret/project"},
        "optimizer": {"learning_rate": 1e-5},
        "refine": {"objective": "refine"},
    }
    made.mkdir()
    lines = [{"step": 0, "eval/loss": 2.5, "loss": 9}, {"step": 4, "eval/loss": 1.25, "time/x": 1}]
    (made / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (made / "checkpoints").mkdir()
    (made / "checkpoints" / "run.json").write_text(json.dumps({"config": config}))
    return made, model._replace(step=4)


def test_a_card_says_how_a_run_was_trained_and_nothing_of_the_machine(checkpoint, tmp_path):
    folder, model = run_folder(checkpoint, tmp_path)
    card = model_card("me/model", folder, model, "bfloat16", 144_992)
    head = dict(line.split(": ", 1) for line in card.split("---\n")[1].splitlines())
    assert json.loads(head["base_model"]) == "org/small"
    assert json.loads(head["datasets"]) == ["org/words"]
    assert "midtrain, objective `refine`, 4 steps of 8 rows of 256 tokens" in card
    assert "| loss | 2.5 | 1.25 | 4 |" in card and "time/x" not in card
    assert '"learning_rate": 1e-05' in card and "from `hf://org/small@v1`" in card
    for hidden in ("secret", "cache/of/mine", str(tmp_path)):
        assert hidden not in card
    assert card.count(PRIVATE) == 3


SECRET = "hf_aTokenThatMustNotBeSeen"


@pytest.mark.parametrize("status", [401, 403, 500])
def test_no_token_is_seen_where_the_hub_refuses(
    small, checkpoint, tmp_path, capfd, monkeypatch, caplog, status
):
    """The hub's own answer repeats the token that it got."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    small.status = status
    for line in (
        ["from_hf", MODEL, tmp_path / "new"],
        ["to_hf", checkpoint, tmp_path / "out", "--push=me/model"],
    ):
        assert convert.main([str(part) for part in line]) == 1
        said = capfd.readouterr()
        assert (said.err.count("\n") == 1 and str(status) in said.err) or "private" in said.err
        assert SECRET not in said.out + said.err + caplog.text
        assert small.tokens[SECRET], "the token was not used"
        assert not (tmp_path / "new").exists() and not (tmp_path / "out").exists()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_refused_commit_leaves_the_folder(hub, checkpoint, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr("refine_jax.checkpoint.hub.prepare_push", lambda name: None)
    out = tmp_path / "out"
    assert convert.main(["to_hf", str(checkpoint), str(out), "--push=me/none"]) == 1
    said = capfd.readouterr().err
    assert f"The model is in {out} whole" in said and hub.token not in said
    assert load_model(out).config["model_type"] == "delta_net"


def message(function, *arguments):
    with pytest.raises(CheckpointError) as error:
        function(*arguments)
    assert error.value.__cause__ is None
    return str(error.value)


def test_each_refusal_is_one_message(small, tmp_path, monkeypatch):
    new = str(tmp_path / "new")
    assert "there is no such repository" in message(from_hf, "hf://org/none", new)
    assert "there is no such revision" in message(from_hf, MODEL + "@v9", new)
    small.gated.add("org/small")
    assert "is gated: ask for access" in message(from_hf, MODEL, new)
    assert "is gated" in message(load_model, MODEL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids" in message(from_hf, MODEL, new)
    asked = len(small.asked)
    for wrong in ("hf://small", "hf://datasets/org/x", "hf://org/small/config.json", "hf://a/b@"):
        assert "must name a model on the hub" in message(from_hf, wrong, new)
    for name in ("model", "datasets/org", "a/b/c"):
        assert "--push must be ORG/NAME" in message(lambda n: to_hf(SMALL, new, push=n), name)
    said = message(lambda: to_hf(SMALL, "gs://bucket/new", push="a/b"))
    assert "DST, which --push sends on, must be a path" in said
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'refine-jax[hub]'" in message(from_hf, MODEL, new)
    assert len(small.asked) == asked


def test_a_push_without_a_token_is_refused_before_anything(hub, checkpoint, tmp_path):
    said = message(lambda: to_hf(checkpoint, tmp_path / "out", push="me/model"))
    assert "log in by `hf auth login`" in said and not hub.asked
    assert not (tmp_path / "out").exists()


def test_settings_take_a_model_on_the_hub(small):
    config = defaults()
    config.model.checkpoint = f" {MODEL}@main"
    config = Config.from_dict(config)
    assert config.model.checkpoint == MODEL
    described = describe_model(config)
    assert described.config["hidden_size"] == 64
    assert set(small.sent) == {"config.json"}, "weights are not needed to compile"
    same(load_start(config.model, Path("/dev/null")).params, load_model(SMALL).params)
    with pytest.raises(ConfigError, match=r"config.model.checkpoint must name a model on the hub"):
        ModelConfig(checkpoint="hf://datasets/org/small")
