"""Prompts and answers as rows: cutting, targets, splits, order, resuming, and bad input."""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import data_config
from hypothesis import given
from hypothesis import strategies as st

from refine_jax.base.errors import ConfigError, DataError
from refine_jax.config import PromptsConfig
from refine_jax.data.prompts import (
    cut_prompt,
    load_prompts,
    trim_batch,
    trimmed_width,
)
from refine_jax.data.tokenizer import ByteTokenizer, load_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
BYTES = ByteTokenizer()
RECORDS = [
    {"prompt": "What is one?", "answer": "1"},
    {"prompt": "A long prompt, far too long for a row of so few tokens. Two?", "answer": ["2"]},
    {"prompt": "Three?", "answer": ["drei", "trois", "tre"]},
    {"prompt": "Four?", "answer": "a long answer"},
]


def write(path: Path, records: list[dict]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def load(source: str, length: int = 32, answer: int = 8, **options):
    names = PromptsConfig.__dataclass_fields__
    prompts = {name: options.pop(name) for name in list(options) if name in names}
    seed = options.pop("seed", 0)
    return load_prompts(
        data_config(source=source, sequence_length=length, **options),
        PromptsConfig(max_answer_tokens=answer, **prompts),
        BYTES,
        seed=seed,
    )


def take(dataset, batches: int | None = None) -> dict[str, np.ndarray]:
    """The rows of the first batches, one after the other."""
    iterator = iter(dataset)
    found = list(itertools.islice(iterator, batches))
    iterator.close()
    return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}


def texts(rows: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """(prompt, answer) of every row that is not padding, without special tokens."""
    found = []
    for tokens, segments, mask in zip(
        rows["tokens"], rows["segments"], rows["answer_mask"], strict=True
    ):
        if segments.any():
            prompt = tokens[(segments == 1) & (mask == 0)]
            found.append((BYTES.decode(prompt), BYTES.decode(tokens[mask == 1])))
    return found


@given(
    ids=st.lists(st.integers(0, 9), max_size=40),
    room=st.integers(2, 30),
    how=st.sampled_from(["middle", "left"]),
)
def test_cut_prompts_have_the_exact_length_and_keep_their_ends(ids, room, how):
    ids = np.array([256, *ids], np.int32)
    cut = cut_prompt(ids, room, how, bos_id=256)
    assert len(cut) == min(len(ids), room)
    assert cut[0] == 256
    if len(ids) <= room:
        assert cut.tolist() == ids.tolist()
    elif how == "left":
        assert cut[1:].tolist() == ids[len(ids) - room + 1 :].tolist()
    else:
        head, tail = room // 2, room - room // 2
        assert cut.tolist() == [*ids[:head], *ids[len(ids) - tail :]]


def test_cutting_without_a_first_token_and_to_little_room():
    ids = np.arange(7)
    assert cut_prompt(ids, 3, "left").tolist() == [4, 5, 6]
    assert cut_prompt(ids, 1, "middle").tolist() == [6]
    for room, how in ((0, "left"), (0, "middle"), (3, "right")):
        with pytest.raises(ValueError, match="Got:"):
            cut_prompt(ids, room, how)
    with pytest.raises(ValueError, match="at least 2"):
        cut_prompt(ids, 1, "left", bos_id=0)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
@pytest.mark.parametrize("cut", ["middle", "left"])
def test_rows_hold_prompt_then_answer_then_padding(tmp_path, name, cut):
    records = RECORDS if name.endswith("jsonl") else _lists(RECORDS)
    dataset = load(write(tmp_path / name, records), cut=cut).dataset("train", 4)
    rows = take(dataset, 1)
    order = np.argsort(rows["example"])
    assert rows["example"][order].tolist() == [0, 1, 2, 3]
    prompt, long = "What is one?", RECORDS[1]["prompt"]
    expected = {
        # 24 tokens of prompt, bos among them: 11 and 12 of the text, or its last 23.
        "middle": long[:11] + long[-12:],
        "left": long[-23:],
    }[cut]
    got = [texts(rows)[index] for index in order]
    assert got == [(prompt, "1"), (expected, "2"), ("Three?", "drei"), ("Four?", "a long a")]
    row = {field: rows[field][order[0]] for field in rows}
    ids = [256, *prompt.encode(), *b"1", 257]
    assert row["tokens"].tolist() == ids + [258] * (32 - len(ids))
    assert row["segments"].tolist() == [1] * len(ids) + [0] * (32 - len(ids))
    assert np.flatnonzero(row["answer_mask"]).tolist() == [13, 14]
    statistics = dataset.statistics
    assert (statistics.prompts_cut, statistics.prompt_tokens_cut) == (1, 1 + len(long) - 24)
    assert (statistics.answers_cut, statistics.longest_answer) == (1, 1 + len("a long answer"))
    assert "1 cut by" in statistics.summary() and "1 answers cut" in statistics.summary()


def _lists(records):
    """Parquet columns have one type."""
    answers = [[r["answer"]] if isinstance(r["answer"], str) else r["answer"] for r in records]
    return [r | {"answer": a} for r, a in zip(records, answers, strict=True)]


def test_names_of_fields_and_records_without_text(tmp_path):
    records = [{"q": "one", "a": "1"}, {"q": " ", "a": "2"}, {"q": "three", "a": []}]
    records += [{"q": "four", "a": ["", "4"]}, {"q": "five", "a": None}, {"q": None, "a": "6"}]
    source = write(tmp_path / "a.jsonl", records)
    corpus = load(source, prompt_field="q", answer_field="a")
    dataset = corpus.dataset("train", 2)
    assert sorted(texts(take(dataset, 1))) == [("four", "4"), ("one", "1")]
    statistics = dataset.statistics
    assert (statistics.records, statistics.prompts) == (6, 2)
    assert (statistics.without_prompt, statistics.without_answer) == (2, 2)
    assert corpus.answers == [("1",), ("4",)]


def test_random_targets_depend_on_seed_epoch_and_prompt_alone(tmp_path):
    answers = ["a", "b", "c", "d"]
    records = [{"prompt": f"prompt {i}", "answer": answers} for i in range(8)]
    source = write(tmp_path / "a.jsonl", records)

    def epochs(batch, seed=0):
        rows = take(load(source, target="random", epochs=8, seed=seed).dataset("train", batch))
        found = texts(rows)
        return [sorted(found[8 * e : 8 * e + 8]) for e in range(8)]

    by_epoch = epochs(32)
    assert epochs(16) == by_epoch != epochs(32, seed=1)
    assert by_epoch[0] != by_epoch[1]
    counts = np.unique([answer for epoch in by_epoch for _, answer in epoch], return_counts=True)
    assert counts[0].tolist() == answers and counts[1].min() >= 8  # 16 expected of each
    first = take(load(source, epochs=2).dataset("train", 8))
    assert {answer for _, answer in texts(first)} == {"a"}


def test_epochs_hold_every_prompt_once_and_runs_continue_exactly(tmp_path):
    records = [{"prompt": f"prompt {i}", "answer": ["x", "y", "z"]} for i in range(10)]
    source = write(tmp_path / "a.jsonl", records)
    options = {"target": "random", "epochs": 3, "holdout": 0.2}
    dataset = load(source, **options).dataset("train", 4)
    rows = take(dataset)
    real = rows["example"][rows["example"] >= 0].reshape(3, 8)
    assert all(len(set(epoch)) == 8 for epoch in real.tolist())
    assert len({tuple(epoch) for epoch in real.tolist()}) == 3  # each in another order
    held_out = take(load(source, **options).dataset("validation", 4))
    assert set(held_out["example"]) == {-1, *(set(range(10)) - set(real[0].tolist()))}

    iterator = iter(dataset)
    before = [next(iterator) for _ in range(3)]
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    again = iter(load(source, **options).dataset("train", 4))
    again.set_state(state)
    continued = [*before, *again]
    for name in rows:
        joined = np.concatenate([batch[name] for batch in continued])
        np.testing.assert_array_equal(joined, rows[name])
    other = load(source, **(options | {"target": "first"})).dataset("train", 4)
    with pytest.raises(DataError, match="other data"):
        iter(other).set_state(state)


def test_a_prompt_that_occurs_twice_stands_on_one_side(tmp_path):
    records = [{"prompt": f"prompt {i % 5}", "answer": str(i)} for i in range(20)]
    corpus = load(write(tmp_path / "a.jsonl", records), holdout=0.3, epochs=1)
    sides = [
        {prompt for prompt, _ in texts(take(corpus.dataset(split, 4)))}
        for split in ("train", "validation")
    ]
    assert all(sides) and not sides[0] & sides[1]
    # Of five prompts, four times each, two are held out, once each.
    statistics = corpus.dataset("train", 4).statistics
    assert statistics.copies == 6 and "6 copies of held-out ones left out" in statistics.summary()


def test_few_prompts_and_what_is_left_out_of_more(tmp_path):
    """Equal prompts are never split: both sides would hold the same."""
    source = write(tmp_path / "a.jsonl", [{"prompt": "one", "answer": str(i)} for i in range(3)])
    with pytest.raises(DataError, match=r"no document is left .* data\.holdout=0"):
        load(source, holdout=0.3).dataset("train", 2)
    rows = take(load(source, holdout=0.0, epochs=1).dataset("train", 2))
    assert sorted(answer for _, answer in texts(rows)) == ["0", "1", "2"]
    limited = load(source, limit_documents=1).dataset("train", 2).statistics
    assert limited.unread == {"limit_documents": 2}
    assert "2 records beyond the limit of documents left out" in limited.summary()


def test_moved_prompts_are_the_same_data(tmp_path):
    records = [{"prompt": f"prompt {i}", "answer": ["x", "y"]} for i in range(10)]
    places = [tmp_path / "a.jsonl", tmp_path / "there" / "b.jsonl", tmp_path / "c.parquet"]
    places[1].parent.mkdir()
    found = {
        load(write(place, records), holdout=0.2).dataset("train", 2).fingerprint for place in places
    }
    assert len(found) == 1


def test_batches_are_trimmed_to_quarters():
    row = np.zeros((2, 30), np.int32)
    for used, width in ((0, 8), (8, 8), (9, 16), (24, 24), (25, 30), (30, 30)):
        segments = row.copy()
        segments[1, :used] = 1
        batch = {"tokens": row, "segments": segments, "example": np.zeros(2)}
        batch = trim_batch(batch, trimmed_width(batch))
        assert batch["tokens"].shape == batch["segments"].shape == (2, width)
        assert batch["example"].shape == (2,)


def test_recall_prompts_can_be_answered_from_themselves():
    corpus = load("recall", length=400, answer=8, epochs=1, limit_documents=50)
    dataset = corpus.dataset("train", 50)
    found = texts(take(dataset))
    assert dataset.statistics.prompts_cut == dataset.statistics.answers_cut == 0
    for prompt, answer in found:
        question = prompt.splitlines()[-1]
        name = question.removeprefix("What is the number of ").removesuffix("? Answer:")
        facts = [line for line in prompt.splitlines() if f"The number of {name} is" in line]
        assert facts == [f"The number of {name} is {answer}."]
    assert found == texts(
        take(load("recall", length=400, epochs=1, limit_documents=50).dataset("train", 50))
    )
    with pytest.raises(DataError, match=r"two facts.*Got: 92"):
        load("recall", length=100)


@pytest.mark.parametrize(
    ("file", "field", "count"),
    [
        ("ruler/ruler_hotpotqa_lact_4096_200_test.parquet", "answer", 40),
        ("longbench/qasper_16384.parquet", "answers", 40),
    ],
)
def test_published_files_are_read(file, field, count):
    path = SHARED / file
    if not path.exists():
        pytest.skip(f"no {path}")
    tokenizer = load_tokenizer("mistral-v1")
    corpus = load_prompts(
        data_config(source=str(path), sequence_length=4096, epochs=1, limit_documents=count),
        PromptsConfig(answer_field=field),
        tokenizer,
    )
    table = pq.read_table(path, columns=["prompt", field, "prompt_length"]).to_pylist()[:count]
    dataset = corpus.dataset("train", count)
    rows = take(dataset)
    lengths = np.array([row["prompt_length"] for row in table])
    assert len(rows["example"]) == count
    room = 4096 - 32
    assert dataset.statistics.prompts_cut == np.sum(lengths > room)
    assert dataset.statistics.prompt_tokens_cut == np.sum(np.maximum(lengths - room, 0))
    prompt_tokens = (rows["segments"] - rows["answer_mask"]).sum(axis=1)
    np.testing.assert_array_equal(prompt_tokens, np.minimum(lengths, room)[rows["example"]])
    for row in range(5):
        answer = tokenizer.decode(rows["tokens"][row][rows["answer_mask"][row] == 1])
        full = table[rows["example"][row]][field][0].strip()
        assert answer and full.startswith(answer.strip())


BAD = {
    "missing file": ("nowhere.jsonl", [], {}, "no such file or folder"),
    "text": ("a.txt", [], {}, "parquet or jsonl"),
    "no column": ("a.parquet", RECORDS[:1], {"answer_field": "a"}, "prompts.answer_field to one"),
    "no field": ("a.jsonl", RECORDS, {"prompt_field": "q"}, "line 1: set prompts.prompt_field"),
    "object": ("a.jsonl", [{"prompt": "a", "answer": {"b": 3}}], {}, "strings or .*Got: {'b': 3}"),
    "objects": ("a.jsonl", [{"prompt": "a", "answer": [{}]}], {}, "'answer' in .*Got: {}"),
    "prompt": ("a.parquet", [{"prompt": 1, "answer": "1"}], {}, "'prompt' in row 0 .*Got: int"),
    "empty": ("a.jsonl", [], {}, "holds no records"),
    "no answers": ("a.jsonl", [{"prompt": "a", "answer": ""}] * 2, {}, "0 of 2 .* 2 no answer"),
    "no room": ("a.jsonl", RECORDS, {"answer": 31}, "max_answer_tokens=31, sequence_length=32"),
    "cut": ("a.jsonl", RECORDS, {"cut": "right"}, "'middle', 'left'. Got: 'right'"),
    "target": ("a.jsonl", RECORDS, {"target": "last"}, "'first', 'random'. Got: 'last'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, case):
    name, records, options, message = BAD[case]
    if not name.startswith("nowhere"):
        write(tmp_path / name, records)
    with pytest.raises((ConfigError, DataError), match=message):
        load(str(tmp_path / name), **options)


def test_sources_without_prompts():
    for source in ("stdlib", "tfds:wiki40b/en"):
        with pytest.raises(DataError, match="has no prompts"):
            load(source)
