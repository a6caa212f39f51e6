"""Runs that train low-rank updates, or what feeds the fast weights, on top of a model's weights."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file
from tiny_runs import comparable, tiny_run, write_documents

from refine_jax.checkpoint import load_model, read_hf, save_model
from refine_jax.checkpoint.tree import flatten
from refine_jax.convert import main as convert
from refine_jax.generate import main as generate
from refine_jax.main import execute
from refine_jax.models.config import model_config
from refine_jax.models.transformer import Model

pytestmark = pytest.mark.usefixtures("compile_once")

FIELDS = {
    "model_type": "gated_deltanet",
    "vocab_size": 259,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
}
TARGETS = "q_proj,b_proj,*.mlp.down_proj"
RANK, ALPHA = 3, 12.0
# Of runs whose steps are others' matter.
SHORT = {"refine": {"objective": "ntp", "kl_coef": 0.0}, "data": {"holdout": 0.0}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model's folder, which says its tokenizer nowhere."""
    folder = tmp_path_factory.mktemp("base") / "model"
    params = jax.jit(Model(model_config(FIELDS)).init)(jax.random.key(9))
    save_model(folder, jax.tree.map(np.asarray, params), json.dumps(FIELDS))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("corpus"))


def settings(base, corpus, *changes, trainable="lora"):
    lora = {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_targets": TARGETS}
    rows = {"sequence_length": 52, "holdout": 0.2, "min_remainder": 52, "source": str(corpus)}
    sections = {
        "model": {"checkpoint": str(base)} | (lora if trainable == "lora" else {}),
        "data": rows,
        "refine": {"kl_coef": 0.1},
        "train": {
            "steps": 4,
            "batch_size": 4,
            "micro_batch_size": 2,
            "mini_batch_size": 2,
            "checkpoint_every": 2,
            "eval_batches": 1,
            "log_every": 0,
            "trainable": trainable,
        },
    }
    return tiny_run("midtrain", sections, *changes)


def train(workdir, *arguments, **options):
    assert execute(settings(*arguments, **options), workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def trained(base, corpus, tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained") / "run", base, corpus)


def saved_names(folder):
    return set(ocp.PyTreeCheckpointHandler().metadata(folder).tree)


def assert_equal(got, want):
    got, want = flatten(got), flatten(want)
    assert got.keys() == want.keys()
    for name, x in got.items():
        np.testing.assert_array_equal(x, want[name], err_msg=name)


def test_checkpoints_hold_updates_and_their_moments_alone(trained, base):
    names = saved_names(trained / "checkpoints" / "4" / "state")
    arrays = {name for name in names if name.startswith(("params.", "opt_state."))}
    parts = [name for name in arrays if not name.endswith("count")]
    assert {name.rpartition(".")[2] for name in parts} == {"lora_A", "lora_B"}
    assert len([name for name in names if name.startswith("reference_params.")]) == 2 * 3
    assert sum(name.startswith("params.") for name in parts) == 2 * 3
    assert len(parts) == 3 * 2 * 3  # with two moments each
    divergence = [record["loss/kl"] for record in comparable(trained)[1:]]
    assert divergence[0] > 0 and divergence[-1] > divergence[0]  # from the first mini-batch on
    loaded = load_model(trained, merge=False)
    assert (loaded.lora.rank, loaded.lora.alpha) == (RANK, ALPHA)
    params, before = flatten(loaded.params), flatten(load_model(base).params)
    for name, x in before.items():
        np.testing.assert_array_equal(params[name], x)
    assert all(np.any(params[n] != 0) for n in params if n.endswith("lora_B"))


def test_a_run_that_was_continued_is_the_same_bit_for_bit(trained, base, corpus, tmp_path):
    train(tmp_path / "run", base, corpus, {"train": {"steps": 2}})
    train(tmp_path / "run", base, corpus)
    assert_equal(*(load_model(run, merge=False).params for run in (trained, tmp_path / "run")))
    twice = [r for r in comparable(tmp_path / "run") if r["step"] != 2]
    once = [r for r in comparable(trained) if r["step"] != 2]
    for a, b in zip(once, twice, strict=True):
        a.pop("time/compile", None), b.pop("time/compile", None)
        assert a == b


def test_other_updates_are_another_run(trained, base, corpus, capsys):
    rank = {"model": {"lora_rank": 4}}
    assert execute(settings(base, corpus, rank), trained) == 1
    assert "config.model.lora_rank: was 3, got 4 (cannot change" in capsys.readouterr().err


def test_merged_weights_are_those_of_the_formula(trained, base):
    merged, before = flatten(load_model(trained).params), flatten(load_model(base).params)
    apart = flatten(load_model(trained, merge=False).params)
    assert merged.keys() == before.keys()
    for name, x in merged.items():
        want, target = np.asarray(before[name], np.float64), name.removesuffix("weight")
        if f"{target}lora_A" in apart:
            a, b = (np.asarray(apart[target + leaf], np.float64) for leaf in ("lora_A", "lora_B"))
            want = want + ALPHA / RANK * b @ a
        np.testing.assert_allclose(x, want, atol=1e-7)


def test_an_adapter_and_a_merged_model_are_written_and_read(
    trained, base, corpus, tmp_path, capsys
):
    adapter, hf, again = (str(tmp_path / name) for name in ("adapter", "hf", "again"))
    assert convert(["to_hf", str(trained), adapter, "--base=someone/model"]) == 0
    assert "12 tensors of low-rank updates, rank 3" in capsys.readouterr().out
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["r"], fields["lora_alpha"]) == ("LORA", RANK, ALPHA)
    assert fields["target_modules"] == ["b_proj", "down_proj", "q_proj"]
    assert fields["base_model_name_or_path"] == "someone/model"
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    params = load_model(trained, merge=False).params
    for layer in range(2):
        for target, node in (("attn", "q_proj"), ("attn", "b_proj"), ("mlp", "down_proj")):
            for part in ("lora_A", "lora_B"):
                name = f"base_model.model.model.layers.{layer}.{target}.{node}.{part}.weight"
                np.testing.assert_array_equal(
                    tensors.pop(name), params["layers"][target][node][part][layer]
                )
    assert not tensors
    # A merged model, of the run and of base and adapter.
    assert convert(["to_hf", str(trained), hf, "--merge"]) == 0
    merged = load_model(trained).params
    assert_equal(read_hf(hf).params, merged)
    assert convert(["from_hf", adapter, again]) == 1
    assert "--base=DIR" in capsys.readouterr().err
    assert convert(["from_hf", adapter, again, f"--base={base}"]) == 0
    assert_equal(load_model(again).params, merged)
    # Generation from either.
    options = ["--tokenizer=bytes", "--prompt=the quick", "--max_new_tokens=12", "--json"]
    texts = []
    for adapt in ([], ["--adapt_steps=1", "--adapt_objective=ntp", "--adapt_learning_rate=0.1"]):
        for where in (
            [f"--checkpoint={base}", f"--adapter={adapter}"],
            [f"--checkpoint={trained}"],
        ):
            capsys.readouterr()
            assert generate([*where, *options, *adapt]) == 0
            texts.append(json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"])
    assert texts[0] == texts[1] != texts[2] == texts[3]  # prompts train the sum
    # A run that goes on training the adapter begins with it.
    start = {"model": {"adapter": adapter, "lora_rank": None, "lora_alpha": None}}
    start["model"]["lora_targets"] = ""
    still = {"optimizer": {"learning_rate": 0.0}, "train": {"steps": 1}}
    train(tmp_path / "on", base, corpus, start, still, SHORT)
    assert_equal(load_model(tmp_path / "on", merge=False).params, params)
    start["model"]["lora_rank"] = 5
    assert execute(settings(base, corpus, start), tmp_path / "other") == 1
    assert "lora_rank must be that of config.model.adapter" in capsys.readouterr().err
    # Training all parameters begins with the sum.
    start["model"]["lora_rank"] = None
    start["train"] = {"trainable": "all"}
    train(tmp_path / "all", base, corpus, still, SHORT, start)
    assert_equal(load_model(tmp_path / "all").params, merged)


def test_what_feeds_the_fast_weights_is_trained_alone(base, corpus, tmp_path):
    once = {"train": {"steps": 1}}
    train(tmp_path / "run", base, corpus, once, SHORT, trainable="fast")
    params, before = flatten(load_model(tmp_path / "run").params), flatten(load_model(base).params)
    moved = {name for name, x in params.items() if np.any(x != before[name])}
    parts = ("b_proj.weight", "a_proj.weight", "A_log", "dt_bias", "g_proj.weight")
    assert moved == {f"layers.attn.{part}" for part in parts}
    state = saved_names(tmp_path / "run" / "checkpoints" / "1" / "state")
    assert {name for name in state if name.startswith("params.")} == {f"params.{n}" for n in moved}


def test_post_training_on_answers(base, tmp_path):
    config = settings(
        base,
        "recall",
        SHORT,
        {"data": {"sequence_length": 144, "min_remainder": None, "limit_documents": 12}},
        {"posttrain": {"nested": False}, "prompts": {"max_answer_tokens": 6}},
        {"train": {"steps": 1, "batch_size": 2, "mini_batch_size": 2}},
    )
    config.phase = "posttrain"
    assert execute(config, tmp_path / "run") == 0
    names = saved_names(tmp_path / "run" / "checkpoints" / "1" / "state")
    trained = {name for name in names if name.startswith("params.")}
    assert len(trained) == 6 and all("lora" in name for name in trained)
    lora_b = load_model(tmp_path / "run", merge=False).params["layers"]["attn"]["q_proj"]["lora_B"]
    assert np.any(lora_b != 0)


def test_a_mesh_changes_nothing(trained, base, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("refine_jax.parallel.default_devices", lambda: jax.devices()[:4])
    mesh = {"mesh": {"fsdp": 2, "tensor": 2}}
    train(tmp_path / "run", base, corpus, mesh, {"train": {"steps": 2}})
    step = load_model(trained, step=2, merge=False)
    want, got = flatten(step.params), flatten(load_model(tmp_path / "run", merge=False).params)
    for name, x in got.items():
        np.testing.assert_allclose(x, want[name], atol=2e-4, err_msg=name)


def answers(base, tmp_path, name, **changes):
    """Records by question of test-time training on three prompts."""
    data = tmp_path / "code.jsonl"
    rows = [
        {"task": "lcc", "prompt": f"the lazy dog {word} jumps over a fox", "answers": [word]}
        for word in ("one", "two", "six")
    ]
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = tiny_run(
        "testtime",
        {
            "model": {"checkpoint": str(base), "lora_rank": RANK, "lora_targets": TARGETS},
            "refine": {"reward": "binary", "edge_margin": 3, "lambda_rl": 0.4},
            "optimizer": {"learning_rate": 0.5},
            "generation": {"max_new_tokens": 8},
            "testtime": {"steps": 2, "mini_batch_size": 1, "batch_size": 1} | changes,
            "evaluate": {"tasks": "lcc", "data": str(data), "batch_size": 1},
            "train": {"trainable": "lora"},
        },
    )
    assert execute(config, tmp_path / name) == 0
    lines = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
    return {record["id"]: record for record in map(json.loads, lines)}


def test_prompts_adapt_updates_of_their_own_at_once(base, tmp_path):
    """Three over shared weights answer as each does alone, and not as without training."""
    alone = answers(base, tmp_path, "alone", answer_before=True)
    at_once = answers(base, tmp_path, "at_once", copies=3)
    for name, record in alone.items():
        assert at_once[name]["response"] == record["response"]
    assert any(r["response"] != r["before"]["response"] for r in alone.values())
