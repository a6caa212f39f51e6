"""A run that lives on the hub: its model and its data come from there, its result goes there."""

import io

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny_runs import comparable, tiny_run

from refine_jax.checkpoint import load_model
from refine_jax.config import Config
from refine_jax.convert import to_hf
from refine_jax.data import stream
from refine_jax.data.recall import RecallDocuments
from refine_jax.phases import midtrain
from refine_jax.small import folder

pytestmark = pytest.mark.usefixtures("compile_once")


def shard(number, documents=3):
    """A parquet file of texts, beside a column three times as large that nobody reads."""
    source = RecallDocuments()
    texts = [source[number * documents + i] for i in range(documents)]
    table = pyarrow.table({"text": texts, "page": [3 * text for text in texts]})
    out = io.BytesIO()
    pyarrow.parquet.write_table(
        table, out, row_group_size=1, compression="none", use_dictionary=False
    )
    return out.getvalue()


def run(workdir, steps):
    data = {
        "source": "hf://datasets/org/facts/data/*.parquet",
        "tokenizer": "checkpoint",
        "sequence_length": 64,
        "holdout": 0.2,
        "min_tokens": 48,
    }
    train = {"steps": steps, "batch_size": 8, "eval_every": 2, "eval_batches": 1, "log_every": 1}
    train["checkpoint_every"] = 2
    config = tiny_run("midtrain", {"data": data, "train": train, "refine": {"objective": "ntp"}})
    config.model.fresh = None
    config.model.checkpoint = "hf://org/small"
    midtrain.run(Config.from_dict(config), workdir)
    return comparable(workdir)


def test_it_streams_resumes_and_comes_back_bit_for_bit(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stream, "PIECE_BYTES", 1 << 12)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.add_folder("models", "org/small", folder("deltanet"))
    files = {f"data/{n}.parquet": shard(n) for n in range(3)}
    hub.add("datasets", "org/facts", files)
    whole = run(tmp_path / "whole", steps=6)
    assert all(hub.sent[name] for name in files) and "streamed rows" in capsys.readouterr().out
    weights = hub.sent["model.safetensors"]
    run(tmp_path / "parts", steps=2)
    again = run(tmp_path / "parts", steps=6)
    assert again == whole

    to_hf(tmp_path / "parts", tmp_path / "out", push="me/refined")
    assert hub.sent["model.safetensors"] == weights, "the model was fetched a second time"
    mine, theirs = load_model("hf://me/refined"), load_model(tmp_path / "whole")
    for left, right in zip(*map(jax.tree.leaves, (mine.params, theirs.params)), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
    assert (mine.tokenizer / "tokenizer.json").is_file()
    card = hub.files("models", "me/refined")["README.md"].decode()
    assert 'base_model: "org/small"' in card and 'datasets: ["org/facts"]' in card
    assert "| loss |" in card and "6 steps of 8 rows of 64 tokens" in card
    for hidden in (str(tmp_path), hub.token):
        assert hidden not in card
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or hub.token.encode() not in path.read_bytes(), path
