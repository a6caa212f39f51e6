"""Loss and accuracy by position, against sums of the golden logits written out."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from goldens import load_arrays, require
from plain_deltanet import PlainDeltaNet
from pyarrow import parquet
from scipy import stats
from tiny import tiny

from refine_jax.base.errors import DataError
from refine_jax.checkpoint import save_model
from refine_jax.checkpoint.hf import read_hf
from refine_jax.convert import from_hf
from refine_jax.evaluation import position
from refine_jax.evaluation.by_position import measure, position_edges
from refine_jax.models.config import model_config
from refine_jax.models.transformer import Model
from tests.data.test_tokenizer import write_tokenizer_json


@pytest.fixture(scope="module")
def golden():
    """(Model, params, documents): those of the golden data, with their nll and hits."""
    loaded = read_hf(require("lact_base"))
    arrays = load_arrays("lact_base", "expected.npz")
    documents = []
    for length in (5, 17, 33, 64, 77):
        for tokens, z in zip(
            arrays[f"L{length}/input_ids"],
            arrays[f"L{length}/logits"].astype(np.float64),
            strict=True,
        ):
            log_probs = z - np.log(np.exp(z).sum(-1, keepdims=True))
            nll = -log_probs[np.arange(length - 1), tokens[1:]]
            documents.append((tokens, nll, z[:-1].argmax(-1) == tokens[1:]))
    model = Model(model_config(loaded.config))
    return model, jax.tree.map(jnp.asarray, loaded.params), documents


def rows(documents, layout, length: int):
    """Batches of rows: `layout` names the documents of each row of each batch."""
    for batch in layout:
        tokens, segments = np.zeros((2, len(batch), length), np.int32)
        for row, members in enumerate(batch):
            slot = 0
            for segment, number in enumerate(members, start=1):
                ids = documents[number][0]
                tokens[row, slot : slot + len(ids)] = ids
                segments[row, slot : slot + len(ids)] = segment
                slot += len(ids)
        yield {"tokens": tokens, "segments": segments}


def test_losses_are_those_of_the_golden_logits(golden):
    """Unequal rows, packed ones, a last batch that is not full; each document counts once."""
    model, params, documents = golden
    edges = position_edges(77)
    alone = [[[0], [9]], [[1], [8]], [[7], [2]], [[3], [6]], [[4], [5]], [[], []]]
    packed = [[[0, 4, 2], [9, 1]], [[8, 5], [7, 3]], [[6], []]]
    for layout, length, most in ((alone, 77, 1), (packed, 110, 3)):
        whole, buckets = measure(
            model, params, rows(documents, layout, length), edges, max_documents=most
        )
        nll = np.concatenate([nll for _, nll, _ in documents])
        hit = np.concatenate([hit for _, _, hit in documents])
        context = np.concatenate([1 + np.arange(len(nll)) for _, nll, _ in documents])
        assert (whole.tokens, whole.documents) == (len(nll), len(documents))
        np.testing.assert_allclose(whole.loss.mean, nll.mean(), atol=2e-5)
        np.testing.assert_allclose(whole.accuracy.mean, hit.mean(), atol=1e-12)
        assert sum(b.tokens for b in buckets) == len(nll)
        for bucket in buckets:
            inside = (context >= bucket.first) & (context <= bucket.last)
            assert bucket.tokens == inside.sum()
            assert bucket.documents == sum(len(d[1]) >= bucket.first for d in documents)
            np.testing.assert_allclose(bucket.loss.mean, nll[inside].mean(), atol=5e-5)
            np.testing.assert_allclose(bucket.accuracy.mean, hit[inside].mean(), atol=1e-12)


def test_intervals_are_students_where_documents_are_equally_long(golden):
    model, params, documents = golden
    equal = [(tokens[:33], nll[:32], hit[:32]) for tokens, nll, hit in documents[4:]]
    layout = [[[0], [1]], [[2], [3]], [[4], [5]]]
    whole, _ = measure(model, params, rows(equal, layout, 33), position_edges(33))
    for got, column in ((whole.loss, 1), (whole.accuracy, 2)):
        means = np.array([document[column].mean() for document in equal])
        assert means.std() > 0
        low, high = stats.t.interval(0.95, len(means) - 1, means.mean(), stats.sem(means))
        # No loss and no accuracy is below 0.
        np.testing.assert_allclose([got.low, got.high], [max(low, 0), high], atol=1e-4)
    assert low < 0
    alone, _ = measure(model, params, rows(equal, [[[0], []]], 33), position_edges(33))
    assert (alone.documents, alone.loss.low, alone.loss.high) == (1, None, None)


def test_edges():
    assert position_edges(16).tolist() == [1, 2, 4, 8, 16]
    assert position_edges(17, "linear", 4).tolist() == [1, 5, 9, 13, 17]
    assert position_edges(4, "linear").tolist() == [1, 2, 3, 4]
    for length, spacing, count in ((100, "log", 3), (1000, "log", None), (999, "linear", None)):
        edges = position_edges(length, spacing, count)
        assert edges[0] == 1 and edges[-1] == length and (np.diff(edges) > 0).all()
    for arguments in ((1,), (16, "cubic"), (16, "log", 0)):
        with pytest.raises(DataError, match="Got"):
            position_edges(*arguments)


def test_longer_documents_than_the_edges_are_refused(golden):
    model, params, documents = golden
    with pytest.raises(ValueError, match="predicts from 32 tokens, the last edge is 32"):
        measure(model, params, rows(documents, [[[4], [5]]], 33), position_edges(32))
    with pytest.raises(DataError, match="no token to predict"):
        measure(model, params, rows(documents, [[[], []]], 33), position_edges(32))


def test_command(tmp_path, capsys):
    """From texts to results; the tokens of a text are its bytes, cut to what the model knows."""
    sentencepiece = pytest.importorskip("sentencepiece")
    source = tmp_path / "hf"
    shutil.copytree(require("deltanet_base"), source)
    texts = [text * 3 for text in ("one two three ", "two one ", "three three one two ", "one ")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(source / "tokenizer"),
        vocab_size=18,
        model_type="bpe",
        minloglevel=2,
    )
    from_hf(str(source), str(tmp_path / "jax"))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines)
    arguments = [
        f"--checkpoint={tmp_path / 'jax'}",
        f"--source={tmp_path / 'texts.jsonl'}",
        "--sequence_length=16",
        "--min_tokens=1",
        "--batch_size=3",
        f"--output={tmp_path / 'out'}",
    ]
    assert position.main(arguments) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results == json.loads((tmp_path / "out" / "position.json").read_text())
    assert (tmp_path / "out" / "position.png").stat().st_size > 5000

    reference = PlainDeltaNet(source)
    pieces = sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model"))
    total = count = 0
    for text in texts:
        tokens = [pieces.bos_id(), *pieces.encode(text)][:16]
        total += reference.score(tokens, 1)[0]
        count += len(tokens) - 1
    assert results["all"]["tokens"] == count
    np.testing.assert_allclose(results["all"]["loss"]["mean"], -total / count, atol=2e-5)
    assert results["data"]["dropped_tokens"]["after_first_chunk"] > 0

    assert position.main(arguments) == 1
    assert "has a position.json" in capsys.readouterr().err
    assert position.main([*arguments[:-1], "--limit_documents=0"]) == 1
    assert "limit_documents must be at least 1" in capsys.readouterr().err


def test_errors_of_the_command_name_its_flags(tmp_path, capsys):
    model, params = tiny("deltanet", vocab_size=259, num_hidden_layers=1)
    checkpoint = tmp_path / "model"
    save_model(checkpoint, params, json.dumps(model.config.to_hf()), {})

    def message(source, *arguments):
        given = [f"--checkpoint={checkpoint}", f"--source={source}", "--tokenizer=bytes"]
        assert position.main([*given, *arguments]) == 1
        found = capsys.readouterr().err
        assert "data." not in found.replace(str(tmp_path), "")
        return found

    lines = tmp_path / "a.jsonl"
    lines.write_text('{"body": "one", "title": "two"}\n')
    assert "set --text_field. Got: body, title." in message(lines)
    table = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["one"], "title": ["two"]}), table)
    assert "set --text_field to one of body, title" in message(table)
    assert "choose one kind with --files" in message(tmp_path)
    assert "no file *.csv in" in message(tmp_path, "--files=*.csv")
    assert "Lower --min_tokens" in message(lines, "--text_field=body")
    assert "no such file or folder: --source='nowhere'" in message("nowhere")
    assert "--sequence_length must be at least 2" in message(lines, "--sequence_length=1")


def test_a_tokenizer_without_bos_reads_texts_as_they_are(tmp_path, capsys):
    tokenizer = write_tokenizer_json(tmp_path)
    (tokenizer / "tokenizer_config.json").write_text("{}")
    model, params = tiny("deltanet", vocab_size=259, num_hidden_layers=1)
    save_model(tmp_path / "model", params, json.dumps(model.config.to_hf()), {})
    (tmp_path / "a.txt").write_text("the dog and the fox")
    given = [f"--checkpoint={tmp_path / 'model'}", f"--source={tmp_path / 'a.txt'}"]
    given += [f"--tokenizer={tokenizer}", "--sequence_length=16", "--min_tokens=1"]
    assert position.main(given) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["all"]["tokens"] == 5 - 1  # all words but the first are predicted
