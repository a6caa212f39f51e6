"""What is held out of few documents, of one or of none, and what is said of what is left out."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from corpora import (
    assert_equal,
    collect,
    corpus_of,
    data_config,
    expected_pieces,
    make_dataset,
    numbered,
    tokens_of,
    write_documents,
)
from goldens import require_input
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_jax.base.errors import DataError
from refine_jax.data import load_corpus


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 300),
    copies=st.integers(1, 3),
    size=st.integers(2, 24),
    holdout=st.floats(0.01, 0.5),
    min_remainder=st.integers(1, 24),
    pack=st.booleans(),
)
def test_one_document_is_split_by_rows(length, copies, size, holdout, min_remainder, pack) -> None:
    document = numbered([length])[0]
    options = {"sequence_length": size, "min_remainder": min(size, min_remainder), "pack": pack}
    corpus = corpus_of([document] * copies, holdout=holdout, epochs=1, **options)
    pieces = expected_pieces([document], size, min_remainder=min(size, min_remainder))
    if len(pieces) < 2:
        for split in ("train", "validation"):
            with pytest.raises(DataError, match=r"no document is left .* data\.holdout=0"):
                corpus.dataset(split, 3)
        return
    train, validation = (corpus.dataset(split, 3) for split in ("train", "validation"))
    rows = {s: tokens_of(collect(d)) for s, d in (("train", train), ("validation", validation))}
    count = len(rows["validation"])
    assert 1 <= count <= max(1, round(holdout * len(pieces))) and rows["train"]
    assert rows["validation"] == pieces[len(pieces) - count :]  # the last ones, in order
    assert sorted(rows["train"]) == sorted(pieces[: len(pieces) - count])
    for dataset in (train, validation):
        statistics = dataset.statistics
        assert statistics.split_rows
        assert statistics.row_tokens + sum(statistics.dropped_tokens.values()) == length * copies
        assert statistics.used_documents + sum(statistics.dropped_documents.values()) == copies
        assert "the last rows of the one document are held out" in statistics.summary()
    assert train.statistics.dropped_documents["copies"] == copies - 1


def test_one_document_goes_on_where_it_stopped_with_any_processes() -> None:
    documents = numbered([100])
    corpus = corpus_of(documents, sequence_length=8, holdout=0.2, epochs=3, seed=4)
    whole = collect(corpus.dataset("train", 4))
    iterator = iter(corpus.dataset("train", 4))
    list(itertools.islice(iterator, 3))
    state = iterator.get_state()
    iterator.close()
    resumed = iter(corpus.dataset("train", 4))
    resumed.set_state(state)
    assert_equal(list(resumed), whole[3:])
    parts = [collect(corpus.dataset("train", 4, share)) for share in ([0, 1], [2, 3])]
    for both, batch in zip(zip(*parts, strict=True), whole, strict=True):
        joined = np.concatenate([part["tokens"] for part in both])
        np.testing.assert_array_equal(joined, batch["tokens"])


def test_two_documents_are_split_as_documents() -> None:
    corpus = corpus_of(numbered([40, 50]), sequence_length=8, holdout=0.05, epochs=1)
    train, validation = (corpus.dataset(split, 2).statistics for split in ("train", "validation"))
    assert not train.split_rows and not validation.split_rows
    assert {train.row_tokens, validation.row_tokens} == {40, 50}


@pytest.mark.parametrize("kind", ["one text", "twins"])
def test_few_documents_train(tmp_path: Path, kind: str) -> None:
    if kind == "one text":
        source = require_input("tinyshakespeare.txt")
        text, documents = source, 1
    else:
        source = tmp_path / "twins"
        source.mkdir()
        for name in ("twins_a.txt", "twins_b.txt"):
            (source / name).write_bytes(require_input(name).read_bytes())
        text, documents = source / "twins_a.txt", 2
    tokens = [256, *text.read_bytes()]
    options = data_config(
        source=str(source), tokenizer="bytes", sequence_length=64, holdout=0.05, epochs=1
    )
    corpus = load_corpus(options)
    train, validation = (corpus.dataset(split, 4) for split in ("train", "validation"))
    rows = {split: tokens_of(collect(d)) for split, d in (("t", train), ("v", validation))}
    pieces = expected_pieces([tokens], 64)
    count = max(1, round(0.05 * len(pieces)))
    assert rows["v"] == pieces[-count:]
    assert sorted(rows["t"]) == sorted(pieces[:-count])
    statistics = train.statistics
    assert statistics.documents == documents
    assert statistics.row_tokens + sum(statistics.dropped_tokens.values()) == (
        documents * len(tokens)
    )


def test_without_a_held_out_part_every_row_is_trained_on() -> None:
    for documents in (numbered([5]), numbered([100]), [[1] * 5] * 3, numbered([5] * 9)):
        corpus = corpus_of(documents, sequence_length=8, holdout=0.0, epochs=1)
        found = tokens_of(collect(corpus.dataset("train", 2)))
        assert sorted(found) == sorted(expected_pieces(documents, 8))
        with pytest.raises(DataError, match="holdout"):
            corpus.dataset("validation", 2)


def test_what_is_left_out_is_said_in_a_line(tmp_path: Path) -> None:
    path = write_documents(tmp_path, ["a", "bb" * 30, "c" * 10, "d" * 21, "e", "beyond"])
    options = data_config(
        source=str(path),
        tokenizer="bytes",
        sequence_length=10,
        min_tokens=5,
        max_tokens=40,
        min_remainder=5,
        limit_documents=5,
    )
    statistics = load_corpus(options).dataset("train", 1).statistics
    assert statistics.unread == {"limit_documents": 1}
    # bos counts: "a" and "e" have 2 tokens, 60 characters 61, 11 tokens leave 1 and 22 leave 2.
    assert statistics.summary() == (
        "left out of 5 documents: 2 too short (4 tokens); 1 too long (61 tokens); "
        "3 tokens in last pieces that are too short; 1 beyond the limit of documents"
    )
    everything = data_config(source=str(path), tokenizer="bytes", min_tokens=1, sequence_length=99)
    assert make_dataset(everything, "train", 1).statistics.summary() == ""
