"""Laws of documents that are read while training, on this machine and from a hub."""

import io
import itertools
import json
import random

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from corpora import assert_equal, collect, data_config
from huggingface_hub import constants

from refine_jax.base.errors import DataError
from refine_jax.config import PromptsConfig
from refine_jax.data import load_corpus, stream
from refine_jax.data.prompts import load_prompts
from refine_jax.data.sources import open_texts
from refine_jax.data.tokenizer import ByteTokenizer

LENGTH = 16
BYTES = ByteTokenizer()


def texts(count, seed=0):
    """Texts of one to three rows that all differ in each; every seventh is null."""
    draw = random.Random(seed)
    made = [f"{seed}.{i:02} " * LENGTH for i in range(count)]
    made = [text[: LENGTH * draw.randrange(1, 4)] for text in made]
    return [None if i % 7 == 3 else text for i, text in enumerate(made)]


def parquet(values, group=5):
    table = pyarrow.table({"text": values, "other": [b"?" * 5000] * len(values)})
    out = io.BytesIO()
    pyarrow.parquet.write_table(
        table, out, row_group_size=group, compression="none", use_dictionary=["text"]
    )
    return out.getvalue()


def lines(values):
    return "".join(json.dumps({"text": value}) + "\n" for value in values).encode()


KINDS = {"parquet": parquet, "jsonl": lines, "json": lambda v: json.dumps([{"text": x} for x in v])}


@pytest.fixture(params=["parquet", "jsonl"])
def kind(request):
    return request.param


@pytest.fixture
def files(kind, monkeypatch):
    """Three files of several pieces each, and their texts."""
    monkeypatch.setattr(stream, "PIECE_BYTES", 300)
    values = {f"{n}.{kind}": texts(20, seed=n) for n in range(3)}
    return {name: KINDS[kind](value) for name, value in values.items()}, [
        text for value in values.values() for text in value if text is not None
    ]


@pytest.fixture
def folder(files, tmp_path):
    for name, content in files[0].items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def options(source, **fields):
    return data_config(
        **{"source": str(source), "sequence_length": LENGTH, "stream": True, "min_tokens": 1}
        | {"min_remainder": 1, "add_bos": False, "tokenizer": "bytes"}
        | fields
    )


def train(source, batch_size=4, share=None, seed=0, **fields):
    return load_corpus(options(source, **fields), BYTES, seed=seed).dataset(
        "train", batch_size, share
    )


def take(dataset, count, state=None):
    batches = iter(dataset)
    if state is not None:
        batches.set_state(state)
    taken = list(itertools.islice(batches, count))
    saved = batches.get_state()
    batches.close()
    return taken, json.loads(json.dumps(saved))


def rows_of(batches):
    pairs = (pair for b in batches for pair in zip(b["tokens"], b["segments"], strict=True))
    rows = [tokens[segments > 0] for tokens, segments in pairs]
    return [BYTES.decode(row) for row in rows]


def pieces_of(values):
    """What a text becomes: pieces of `LENGTH` bytes."""
    return [v[i : i + LENGTH] for v in values for i in range(0, len(v), LENGTH)]


def test_an_epoch_has_every_row_once_and_the_next_another_order(folder, files):
    expected = pieces_of(files[1])
    batches, state = take(train(folder, batch_size=1), 2 * len(expected))
    rows = rows_of(batches)
    first, second = rows[: len(expected)], rows[len(expected) :]
    assert sorted(first) == sorted(second) == sorted(expected)
    assert first != second and first != expected
    assert state["epoch"] == 1
    # Files are mixed by their order, which another seed changes.
    assert rows_of(take(train(folder, batch_size=1, seed=1), len(expected))[0]) != first


@pytest.mark.parametrize("at", [1, 5, 23])
def test_it_resumes_bit_for_bit(folder, at):
    whole, _ = take(train(folder), 30)
    first, state = take(train(folder), at)
    # With another number of processes, and another size of batches.
    again, _ = take(train(folder), 30 - at, state)
    assert_equal(first + again, whole)
    halves = [take(train(folder, share=[n, n + 2]), 30 - at, state)[0] for n in (0, 1)]
    for batch, *parts in zip(whole[at:], *halves, strict=True):
        for name in batch:
            joined = np.stack([parts[0][name], parts[1][name]], 1).reshape(batch[name].shape)
            np.testing.assert_array_equal(joined, batch[name])
    smaller, _ = take(train(folder, batch_size=2), 2 * (30 - at), state)
    assert rows_of(smaller) == rows_of(whole[at:])


def test_no_text_is_on_both_sides(folder, files):
    (folder / "copies").mkdir()
    for path in list(folder.glob("0.*")):  # every text of it occurs twice
        (folder / "copies" / path.name).write_bytes(path.read_bytes())
    corpus = load_corpus(options(folder, holdout=0.3), BYTES)
    held = set(rows_of(corpus.dataset("validation", 2)))
    trained = set(rows_of(take(corpus.dataset("train", 1), 250)[0]))
    assert held and trained and held.isdisjoint(trained)
    assert held | trained == set(pieces_of(files[1]))
    few = load_corpus(options(folder, holdout=0.3), BYTES, validation_rows=4)
    assert len(rows_of(few.dataset("validation", 4))) == 4


def test_texts_are_those_of_the_other_readers(tmp_path):
    values = ["\ufeffbegins with a mark", "ends", "caf\u00e9 \u2028 and more", None] * 5
    (tmp_path / "a.parquet").write_bytes(parquet(values))
    (tmp_path / "b.jsonl").write_bytes(lines(values[:-1]) + b'\n{"text": "lone \\ud800"}\n')
    for path in tmp_path.iterdir():
        source = open_texts(str(path))
        expected = [source[i] for i in range(len(source))]
        batches, _ = take(train(path, batch_size=1, sequence_length=99), len(expected))
        assert sorted(rows_of(batches)) == sorted(expected)


def test_packed_rows_hold_whole_documents(folder, files):
    batches, _ = take(train(folder, batch_size=1, pack=True, sequence_length=64), 40)
    found = [
        BYTES.decode(row["tokens"][0][row["segments"][0] == n])
        for row in batches
        for n in range(1, row["segments"].max() + 1)
    ]
    assert set(found) == set(files[1])


def test_a_hub_streams_the_rows_that_its_files_hold(hub, folder, files, kind):
    content = {f"data/{name}": bytes(data) for name, data in files[0].items()}
    hub.add("datasets", "org/words", content | {"README.md": b"---\n---\n"})
    source = f"hf://datasets/org/words/data/*.{kind}"
    local, _ = take(train(folder), 12)
    dataset = train(source, stream=None)
    streamed, state = take(dataset, 12)
    assert_equal(streamed, local)
    # What is pushed besides does not matter; other content of these files does.
    hub.add("datasets", "org/words", content | {"README.md": b"new"})
    assert_equal(take(train(source), 4, state)[0], take(train(folder), 16)[0][12:])
    hub.add("datasets", "org/words", content | {f"data/0.{kind}": KINDS[kind](texts(20, seed=9))})
    with pytest.raises(DataError, match="belongs to other data"):
        take(train(source), 4, state)
    assert_equal(take(train(f"{source}".replace("words/", f"words@{_first(hub)}/")), 12)[0], local)


def _first(hub):
    return next(iter(hub.commits["datasets", "org/words"]))


def test_faults_of_a_hub_lose_nothing(hub, folder, files, kind, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.add("datasets", "org/words", files[0])
    hub.every = 3
    streamed, _ = take(train(f"hf://datasets/org/words/*.{kind}"), 30)
    assert_equal(streamed, take(train(folder), 30)[0])
    assert hub.faults > 5


def test_any_store_of_fsspec_is_read(folder, files, kind):
    store = fsspec.filesystem("memory")
    for name, content in files[0].items():
        store.pipe_file(f"/corpus/{name}", content)
    streamed, _ = take(train(f"memory://corpus/*.{kind}", stream=None), 30)
    store.rm("/corpus", recursive=True)
    assert_equal(streamed, take(train(folder), 30)[0])


def test_only_the_column_of_texts_is_fetched(hub, monkeypatch):
    values = texts(60)
    data = parquet(values, group=20)
    hub.add("datasets", "org/words", {"a.parquet": data})
    monkeypatch.setattr(stream, "PIECE_BYTES", 300)
    take(train("hf://datasets/org/words/a.parquet"), 1)
    assert 0 < hub.sent["a.parquet"] < len(data) / 2, len(data)


def test_other_forms_are_read_whole(tmp_path):
    values = texts(20)
    (tmp_path / "a.json").write_text(KINDS["json"](values))
    expected = pieces_of([v for v in values if v is not None])
    batches, _ = take(train(tmp_path / "a.json", batch_size=1), len(expected))
    assert sorted(rows_of(batches)) == sorted(expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 1}, "data.epochs does not go with documents that are read while training"),
        ({"cache_dir": "x"}, "data.cache_dir does not go"),
        ({"min_tokens": 1000}, "no document of .* gives a row: the longest .* has"),
        ({"text_field": "words"}, "'words'.*set data.text_field"),
        ({"holdout": 1e-9}, "no document .* is held out"),
    ],
)
def test_what_cannot_be_streamed_is_said(folder, fields, message):
    with pytest.raises(DataError, match=message):
        corpus = load_corpus(options(folder, **fields), BYTES)
        next(iter(corpus.dataset("validation" if "holdout" in fields else "train", 2)))


def test_broken_lines_are_named_by_their_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a long enough text"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"'text' in .*a.jsonl, the line at byte 31 must be a str"):
        next(iter(train(tmp_path / "a.jsonl", batch_size=1)))
    with pytest.raises(DataError, match=r"data.stream is for records .* Got: .*a.txt, a text"):
        (tmp_path / "a.txt").write_text("text")
        train(tmp_path / "a.txt")


@pytest.mark.parametrize("status", [401, 403, 500])
def test_no_token_is_seen_where_the_hub_refuses(hub, monkeypatch, caplog, status):
    """The hub's own answer repeats the token that it got."""
    secret = "hf_aTokenThatMustNotBeSeen"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.add("datasets", "org/words", {"a.jsonl": lines(texts(8))})
    opened = iter(train("hf://datasets/org/words/a.jsonl"))
    hub.status = status
    for ask in (lambda: next(opened), lambda: train("hf://datasets/org/words/a.jsonl")):
        with pytest.raises(DataError) as error:
            ask()
        assert "hf://datasets/org/words" in str(error.value) and hub.tokens[secret]
        assert secret not in str(error.value) + caplog.text


def test_data_of_a_hub_is_refused_offline(hub, monkeypatch):
    hub.add("datasets", "org/words", {"a.jsonl": lines(texts(8))})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE forbids to read data on the hub"):
        train("hf://datasets/org/words/a.jsonl")
    assert not hub.asked


def test_prompts_and_texts_of_a_hub_are_read_at_first(hub):
    rows = [{"prompt": f"question {i} " * 8, "answer": f"a{i}"} for i in range(20)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    files = {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "a.parquet": out.getvalue(),
        "texts/b.txt": b"another text " * 9,
    }
    hub.add("datasets", "org/words", files)
    source = "hf://datasets/org/words/"
    found = [
        load_prompts(
            options(source + name, stream=None, sequence_length=256, holdout=0.2),
            PromptsConfig(max_answer_tokens=8),
            BYTES,
        )
        for name in ("a.jsonl", "a.parquet")
    ]
    batches = [collect(corpus.dataset("train", 4), 4) for corpus in found]
    for left, right in zip(*batches, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])
    dataset = train(f"{source}texts", stream=None)
    assert dataset.rows == len(pieces_of(["another text " * 9]))
    dataset = train(f"{source}a.jsonl", stream=None, text_field="prompt", limit_documents=5)
    assert dataset.statistics.documents == 5
