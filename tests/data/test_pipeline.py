"""Laws of the input pipeline: no token lost, any number of processes and workers, exact resume."""

import itertools
import json
import os
from collections import Counter
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
    segments_of,
    write_documents,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_jax.base.errors import ConfigError, DataError
from refine_jax.config import DataConfig
from refine_jax.data import load_corpus
from refine_jax.data.rows import make_rows
from refine_jax.data.tokenizer import ByteTokenizer
from refine_jax.data.tokens import TokenStore
from refine_jax.settings import flags_of

LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS,
    size=st.integers(2, 24),
    chunking=st.sampled_from(["all", "first"]),
    min_remainder=st.integers(1, 24),
    pack=st.booleans(),
    max_documents=st.integers(1, 4),
    limits=st.tuples(st.integers(1, 12), st.none() | st.integers(12, 60)),
)
def test_rows_hold_exactly_the_pieces(
    lengths, size, chunking, min_remainder, pack, max_documents, limits
) -> None:
    documents = numbered(lengths)
    kept = [d for d in documents if limits[0] <= len(d) <= (limits[1] or 1000)]
    corpus = corpus_of(
        documents,
        sequence_length=size,
        chunking=chunking,
        min_remainder=min(size, min_remainder),
        pack=pack,
        max_documents=max_documents,
        min_tokens=limits[0],
        max_tokens=limits[1],
        epochs=1,
    )
    if not kept:
        with pytest.raises(DataError):
            corpus.dataset("train", 3)
        return
    dataset = corpus.dataset("train", 3)
    batches = collect(dataset)
    found = segments_of(batches)
    expected = expected_pieces(kept, size, chunking, min(size, min_remainder))
    assert sorted(found) == sorted(expected)
    assert len(batches) == dataset.batches
    statistics = dataset.statistics
    assert statistics.tokens == sum(lengths)
    assert statistics.row_tokens == sum(map(len, expected))
    assert statistics.row_tokens + sum(statistics.dropped_tokens.values()) == statistics.tokens
    assert statistics.used_documents == len(kept)
    assert statistics.used_documents + sum(statistics.dropped_documents.values()) == len(lengths)
    held = [row.max() for batch in batches for row in batch["segments"] if row.any()]
    assert dataset.rows == len(held)
    assert max(held) <= (max_documents if pack else 1)


def test_every_token_once_an_epoch_and_a_new_order_each() -> None:
    documents = numbered(list(range(1, 60)))
    corpus = corpus_of(documents, sequence_length=16, epochs=3, seed=5)
    rows = corpus.dataset("train", 1).rows
    batches = collect(corpus.dataset("train", 1))
    assert len(batches) == 3 * rows
    epochs = [segments_of(batches[i * rows : (i + 1) * rows]) for i in range(3)]
    for epoch in epochs:
        tokens = Counter(itertools.chain.from_iterable(epoch))
        assert tokens == Counter(itertools.chain.from_iterable(documents))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other_seed = corpus_of(documents, sequence_length=16, epochs=1, seed=6).dataset("train", 1)
    assert segments_of(collect(other_seed)) not in epochs


def test_packing_fills_rows_by_first_fit() -> None:
    lengths = np.array([6, 5, 4, 10, 2, 3, 3, 1])
    options = data_config(sequence_length=10, min_tokens=1, pack=True, max_documents=3)
    table, _ = make_rows(lengths, np.arange(8, dtype=np.uint64), options, "train")
    rows = np.split(table.document, table.ends[:-1])
    # 6 + 4; 5 + 2 + 3; 10; 3 + 1 (rows in the order in which they were begun).
    assert [row.tolist() for row in rows] == [[0, 2], [1, 4, 5], [3], [6, 7]]


def test_packing_many_rows_stays_dense() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 5000)
    options = data_config(sequence_length=1000, min_tokens=1, pack=True, max_documents=50)
    table, statistics = make_rows(lengths, np.arange(5000, dtype=np.uint64), options, "train")
    assert statistics.row_tokens == lengths.sum()
    assert statistics.row_tokens / (1000 * len(table)) > 0.95


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_batch(split: str, processes: int) -> None:
    corpus = corpus_of(
        numbered([7] * 40), sequence_length=8, holdout=0.4, epochs=3 if split == "train" else None
    )
    whole = collect(corpus.dataset(split, 4))
    shares = np.arange(4).reshape(processes, -1)
    parts = [collect(corpus.dataset(split, 4, share)) for share in shares]
    joined = [
        {name: np.concatenate([part[name] for part in batch]) for name in ("tokens", "segments")}
        for batch in zip(*parts, strict=True)
    ]
    assert len(whole) == (18 if split == "train" else 4)
    assert_equal(joined, whole)


def test_resume_anywhere_with_other_processes_and_batch_size() -> None:
    corpus = corpus_of(numbered([5] * 11), sequence_length=8, epochs=4, seed=1)
    whole = collect(corpus.dataset("train", 4))
    for stop in range(len(whole) + 1):
        iterator = iter(corpus.dataset("train", 4, [1]))
        for _ in range(stop):
            next(iterator)
        state = json.loads(json.dumps(iterator.get_state()))
        iterator.close()
        resumed = iter(corpus.dataset("train", 4))
        resumed.set_state(state)
        assert_equal(list(resumed), whole[stop:])
        assert resumed.get_state()["next_row"] == 4 * len(whole)
    # The same rows follow when the batch size changes.
    resumed = iter(corpus.dataset("train", 2))
    resumed.set_state({**state, "next_row": 8})
    halves = list(itertools.islice(resumed, 4))
    rows = np.concatenate([batch["tokens"] for batch in halves])
    np.testing.assert_array_equal(rows, np.concatenate([b["tokens"] for b in whole[2:4]]))


def test_state_goes_back_on_a_running_iterator() -> None:
    corpus = corpus_of(numbered([5] * 9), sequence_length=8)
    iterator = iter(corpus.dataset("train", 2))
    first = list(itertools.islice(iterator, 3))
    state = iterator.get_state()
    second = list(itertools.islice(iterator, 20))
    assert iterator.epoch == 46 / 9
    iterator.set_state(state)
    assert_equal(list(itertools.islice(iterator, 20)), second)
    assert_equal(collect(corpus.dataset("train", 2), 3), first)
    iterator.close()


def test_state_of_other_data_is_refused() -> None:
    state = iter(corpus_of(numbered([5] * 9), sequence_length=8).dataset("train", 2)).get_state()
    same = corpus_of(numbered([5] * 9), sequence_length=8, epochs=7, workers=1)
    iter(same.dataset("train", 6)).set_state(state)
    for other in (
        corpus_of(numbered([5] * 8 + [6]), sequence_length=8),
        corpus_of(numbered([5] * 9), sequence_length=9),
        corpus_of(numbered([5] * 9), sequence_length=8, seed=1),
        corpus_of(numbered([5] * 9), sequence_length=8, holdout=0.2),
    ):
        with pytest.raises(DataError, match="belongs to other data"):
            iter(other.dataset("train", 2)).set_state(state)


def test_workers_do_not_change_the_order(tmp_path: Path) -> None:
    path = write_documents(tmp_path, [chr(97 + i) * (5 + i) for i in range(14)])
    options = {"source": str(path), "tokenizer": "bytes", "sequence_length": 12, "min_tokens": 1}
    expected = collect(make_dataset(data_config(**options), "train", 3), 9)
    # In memory the two workers get a copy of the tokens ...
    dataset = make_dataset(data_config(**options, workers=2), "train", 3)
    assert_equal(collect(dataset, 9), expected)
    # ... with a cache they map its file; here one takes over in the middle.
    iterator = iter(make_dataset(data_config(**options), "train", 3))
    list(itertools.islice(iterator, 2))
    cached = data_config(**options, workers=1, cache_dir=str(tmp_path / "cache"))
    resumed = iter(make_dataset(cached, "train", 3))
    resumed.set_state(iterator.get_state())
    assert_equal(list(itertools.islice(resumed, 5)), expected[2:7])
    resumed.close()
    iterator.close()


@settings(max_examples=40, deadline=None)
@given(
    contents=st.lists(st.integers(0, 30), min_size=2, max_size=50),
    holdout=st.floats(0.01, 0.5),
    seed=st.integers(0, 5),
)
def test_held_out_documents_are_disjoint(contents, holdout, seed) -> None:
    documents = [[content] * 5 for content in contents]  # equal contents are copies
    options = {"sequence_length": 8, "holdout": holdout, "epochs": 1}
    corpus = corpus_of(documents, seed=seed, **options)
    distinct = len(set(contents))
    held_out = max(1, round(holdout * distinct))
    if held_out == distinct:
        with pytest.raises(DataError, match="no document is left for the train split"):
            corpus.dataset("train", 2)
        return
    train = [s[0] for s in segments_of(collect(corpus.dataset("train", 2)))]
    validation = [s[0] for s in segments_of(collect(corpus.dataset("validation", 2)))]
    assert len(validation) == len(set(validation)) == held_out
    assert Counter(train) == Counter(c for c in contents if c not in validation)
    # Which ones are held out depends neither on the seed nor on the documents' order.
    again = corpus_of(documents[::-1], seed=seed + 1, **options).dataset("validation", 2)
    assert {s[0] for s in segments_of(collect(again))} == set(validation)


def test_validation_rows_are_few_fixed_and_spread() -> None:
    documents = numbered([80] * 20)
    corpus = corpus_of(documents, sequence_length=8, holdout=0.5, validation_rows=10, seed=3)
    dataset = corpus.dataset("validation", 4)
    assert (dataset.rows, dataset.batches) == (10, 3)
    batches = collect(dataset)
    assert_equal(collect(dataset), batches)
    assert [int(np.any(b["segments"], axis=1).sum()) for b in batches] == [4, 4, 2]
    found = segments_of(batches)
    assert len({tokens[0] // 80 for tokens in found}) == 10  # one row of each held-out document
    assert dataset.statistics.dropped_tokens["surplus_rows"] == 10 * 80 - 10 * 8


def test_bos_eos_and_limit(tmp_path: Path) -> None:
    path = write_documents(tmp_path, ["abc", "de", "fgh"])
    options = data_config(
        source=str(path),
        tokenizer="bytes",
        sequence_length=4,
        min_tokens=1,
        add_eos=True,
        limit_documents=2,
        epochs=1,
    )
    dataset = load_corpus(options).dataset("train", 1)
    found = sorted(segments_of(collect(dataset)))
    assert found == [[256, *b"abc"], [256, *b"de", 257], [257]]
    assert dataset.statistics.documents == 2


def test_cache_is_complete_or_absent(tmp_path: Path, monkeypatch) -> None:
    path, cache = write_documents(tmp_path, ["abc", "defg"]), tmp_path / "cache"
    options = data_config(
        source=str(path), tokenizer="bytes", sequence_length=8, min_tokens=1, cache_dir=str(cache)
    )
    expected = collect(load_corpus(options).dataset("train", 2), 3)
    (folder,) = cache.iterdir()
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    monkeypatch.setattr(ByteTokenizer, "encode_batch", None)  # must not be needed again
    assert_equal(collect(load_corpus(options).dataset("train", 2), 3), expected)
    assert before == {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    monkeypatch.undo()

    # Other tokens live in another folder, and so do those of a changed file.
    load_corpus(data_config(**{**vars(options), "add_eos": True}))
    write_documents(tmp_path, ["abc", "defg", "h"])
    assert load_corpus(options).dataset("train", 2).statistics.documents == 3
    assert len(list(cache.iterdir())) == 3

    # An interruption leaves nothing behind that looks complete.
    path.write_text('{"text": "abc"}\n{"text": 3}\n')
    with pytest.raises(DataError, match="line 2 must be a string"):
        load_corpus(options)
    assert len(list(cache.iterdir())) == 3
    with (folder / "tokens.bin").open("ab") as file:
        file.write(b"xx")
    with pytest.raises(DataError, match="broken token cache"):
        TokenStore.open(folder)


def test_cache_made_by_another_process_at_the_same_time(tmp_path: Path, monkeypatch) -> None:
    options = data_config(
        source=str(write_documents(tmp_path, ["abc", "defg"])),
        tokenizer="bytes",
        sequence_length=8,
        min_tokens=1,
        cache_dir=str(tmp_path / "cache"),
    )
    replace = os.replace

    def late(partial, folder):
        monkeypatch.undo()
        load_corpus(options)  # the other process, which finishes first
        replace(partial, folder)

    monkeypatch.setattr(os, "replace", late)
    assert load_corpus(options).dataset("train", 2).statistics.tokens == 9
    assert [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()] == ["tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_tokens": 9}, r"none of the 2 documents .* has data\.min_tokens=9 tokens; the longest"
                            r" has 7\. Lower data\.min_tokens"),
        ({"min_tokens": None, "sequence_length": 50}, r"data\.sequence_length=50 .* longest has 7"),
        ({"min_tokens": 6, "max_tokens": 6}, r"max_tokens=6 .* longest has 7, the shortest 3"),
        ({"holdout": 0.5, "max_tokens": 3}, "no document is left for the train split"),
    ],
)  # fmt: skip
def test_documents_that_do_not_fit(options: dict, message: str) -> None:
    corpus = corpus_of(numbered([3, 7]), **{"sequence_length": 8, **options})
    with pytest.raises(DataError, match=message):
        corpus.dataset("train", 2)


def test_shares_need_not_be_neighbours_and_may_overlap() -> None:
    corpus = corpus_of(numbered([7] * 11), sequence_length=8, epochs=1)
    whole = collect(corpus.dataset("train", 4))
    for share in ([0, 3], [1, 2, 3]):
        part = collect(corpus.dataset("train", 4, share))
        assert_equal(part, [{name: x[share] for name, x in batch.items()} for batch in whole])


def test_bad_batches() -> None:
    corpus = corpus_of(numbered([3, 7]), sequence_length=8)
    with pytest.raises(DataError, match="batch_size=0"):
        corpus.dataset("train", 0)
    with pytest.raises(DataError, match="split must be train or validation"):
        corpus.dataset("test", 2)
    with pytest.raises(DataError, match="no document is left for the validation split"):
        corpus.dataset("validation", 2)


def test_a_moved_corpus_is_the_same_data(tmp_path: Path) -> None:
    """Neither paths nor dates nor the form of the files count: only what they hold."""
    texts = ["abc" * 9, "defg" * 9, "h" * 30]
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        folder.mkdir()
    places = [write_documents(folder, texts) for folder in folders]
    os.utime(places[1], (1, 1))
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    places += [tmp_path / "*.txt"]
    found = set()
    for place in places:
        for cache in ("", str(tmp_path / "cache")):
            options = data_config(
                source=str(place),
                tokenizer="bytes",
                sequence_length=8,
                holdout=0.3,
                cache_dir=cache,
            )
            corpus = load_corpus(options)
            found.add(tuple(corpus.dataset(s, 2).fingerprint for s in ("train", "validation")))
    assert len(found) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"next_row": -1},
        {"next_row": 10**30},
        {"next_row": 2**62},
        {"next_row": 1.5},
        {"next_row": True},
        {"next_row": "4"},
        {"next_row": None},
        {"next_row": [0]},
        {"fingerprint": 3},
        {"fingerprint": None},
    ],
)
@pytest.mark.parametrize("epochs", [None, 3, 2**31 - 1])
def test_states_that_are_none(change: dict, epochs: int | None) -> None:
    iterator = iter(
        corpus_of(numbered([5] * 9), sequence_length=8, epochs=epochs).dataset("train", 2)
    )
    state = iterator.get_state()
    for wrong in (state | change, {k: v for k, v in state.items() if k not in change}, [state]):
        with pytest.raises(DataError, match="saved position"):
            iterator.set_state(wrong)
    iterator.set_state(state)
    assert next(iterator)["tokens"].shape == (2, 8)
    iterator.close()


def test_rows_follow_however_long_a_run_is() -> None:
    dataset = corpus_of(numbered([5] * 9), sequence_length=8).dataset("train", 2)
    iterator = iter(dataset)
    iterator.set_state(iterator.get_state() | {"next_row": 2**61})
    assert len(list(itertools.islice(iterator, 20))) == 20
    iterator.close()
    long = corpus_of(numbered([5] * 9), sequence_length=8, epochs=2**31 - 1).dataset("train", 2)
    assert long.batches == (9 * (2**31 - 1) + 1) // 2
    assert len(collect(long, 3)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 2**31}, r"data\.workers must be at most 256"),
        ({"epochs": 10**30}, r"data\.epochs must be at most"),
        ({"limit_documents": 10**30}, r"data\.limit_documents must be at most"),
        ({"sequence_length": 2**31}, r"data\.sequence_length must be at most 67,108,864"),
        ({"min_tokens": 10**5000}, r"data\.min_tokens must be at most .* very large int"),
        ({"max_documents": "8"}, r"data\.max_documents must be a whole number"),
        ({"sequence_length": 8.0}, r"data\.sequence_length must be a whole number"),
        ({"source": 3}, r"data\.source must be a string\. Got: 3"),
        ({"cache_dir": None}, r"data\.cache_dir must be a string\. Got: None"),
        ({"add_bos": "yes"}, r"data\.add_bos must be True or False"),
        ({"pack": 1}, r"data\.pack must be True or False"),
        ({"holdout": "0.1"}, r"data\.holdout must be a number"),
        ({"holdout": float("nan")}, r"data\.holdout must be finite"),
        ({"holdout": True}, r"data\.holdout must be a number"),
        ({"chunking": ["all"]}, r"data\.chunking must be a string"),
    ],
)
def test_options_of_other_types_and_without_end(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data_config(**options)
    with pytest.raises(ConfigError, match="--" + next(iter(options))):
        flags_of(DataConfig)(**options)
