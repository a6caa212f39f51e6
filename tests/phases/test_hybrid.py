"""A tiny hybrid model through whole runs: trained, written for PyTorch, generated from, adapted."""

import json

import jax
import numpy as np
import pytest
from tiny import CONFIGS
from tiny_runs import tiny_run, write_documents

from refine_jax.checkpoint import load_model
from refine_jax.convert import to_hf
from refine_jax.generate import main as generate
from refine_jax.main import execute
from refine_jax.models.config import model_config
from refine_jax.models.head import logits
from refine_jax.models.transformer import Model

pytestmark = pytest.mark.usefixtures("compile_once")

FRESH = CONFIGS["qwen"] | {
    "vocab_size": 259,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
STEPS = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run with NTP and ReFINE steps."""
    corpus = write_documents(tmp_path_factory.mktemp("corpus"))
    workdir = tmp_path_factory.mktemp("trained") / "run"
    config = tiny_run(
        "midtrain",
        {
            "data": {
                "source": str(corpus),
                "sequence_length": 52,
                "holdout": 0.2,
                "min_remainder": 52,
            },
            "train": {
                "steps": STEPS,
                "warmup_ntp_steps": 1,
                "batch_size": 4,
                "micro_batch_size": 2,
                "eval_every": STEPS,
                "eval_batches": 2,
                "checkpoint_every": STEPS,
                "log_every": 1,
            },
        },
    )
    config.model.fresh = FRESH
    assert execute(config, workdir) == 0
    return workdir


def test_refine_steps_train_it(trained):
    figures = json.loads((trained / "results.json").read_text())
    assert figures["skipped_updates"] == 0
    assert (figures["ntp_steps"], figures["refine_steps"]) == (1, STEPS - 1)
    assert figures["validation_loss_after"] < figures["validation_loss_before"] - 0.1


def test_what_was_trained_goes_back_to_pytorch(trained, tmp_path):
    to_hf(str(trained), str(tmp_path / "hf"))
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert fields["architectures"] == ["Qwen3_5ForCausalLM"]
    assert fields["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert model_config(fields) == model_config(FRESH)


def test_generation_is_the_argmax_of_whole_forward_passes(trained, capsys):
    options = ["--prompt=the quick brown", "--max_new_tokens=40", "--json"]
    assert generate([f"--checkpoint={trained}", *options]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    loaded = load_model(trained)
    model = Model(model_config(loaded.config))
    prompt = [256, *b"the quick brown"]
    row = np.asarray([prompt + list(result["tokens"])], np.int32)
    hidden, _ = jax.jit(model.forward)(loaded.params, row)
    z = np.asarray(logits(hidden, model.head(loaded.params)))[0, len(prompt) - 1 : -1]
    taken = np.take_along_axis(z, row[0, len(prompt) :, None], axis=-1)[:, 0]
    assert (z.max(-1) - taken <= 1e-4).all()


@pytest.mark.parametrize("reset", ["example", "batch"])
def test_it_adapts_to_prompts_and_answers_them(trained, tmp_path, reset):
    data = tmp_path / "code.jsonl"
    rows = [
        {"task": "lcc", "prompt": f"the lazy dog {word} jumps over a fox", "answers": [word]}
        for word in ("one", "two", "three")
    ]
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = tiny_run(
        "testtime",
        {
            "model": {"checkpoint": str(trained)},
            "refine": {"reward": "binary", "edge_margin": 3, "lambda_rl": 0.4},
            "generation": {"max_new_tokens": 8},
            "testtime": {"steps": 1, "batch_size": 2, "mini_batch_size": 2, "reset": reset},
            "evaluate": {"tasks": "lcc", "data": str(data), "batch_size": 2},
        },
    )
    assert execute(config, tmp_path / "run") == 0
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 3
    assert all(record["adapt"]["steps"] == 1 for record in records)
    assert all(record["adapt"]["skipped"] == 0 for record in records)
