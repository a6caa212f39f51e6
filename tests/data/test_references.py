"""Prompts and answers in the forms that data sets have: text, numbers, lists, objects, nothing."""

import datetime
import decimal
import json
import math
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from corpora import data_config
from goldens import require_input
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_jax.base.errors import DataError
from refine_jax.config import PromptsConfig
from refine_jax.data import load_tokenizer
from refine_jax.data.prompts import load_prompts
from refine_jax.data.references import json_value, read_prompt, read_references
from refine_jax.data.tasks import load_examples
from refine_jax.data.tasks.files import write_examples

BYTES = load_tokenizer("bytes")

ANSWERS = [
    ("fox", ("fox",)),
    (["a", "b"], ("a", "b")),
    (42, ("42",)),
    (2.5, ("2.5",)),
    (-0.125, ("-0.125",)),
    (10**30, ("1" + "0" * 30,)),
    (True, ("true",)),
    ([1, "one", False], ("1", "one", "false")),
    ([["fox", "the fox"]], ("fox", "the fox")),
    ([["a"], ["b", ["c"]]], ("a", "b", "c")),
    ({"text": ["a", "b"], "answer_start": [0, 9]}, ("a", "b")),
    ({"text": "a", "answer_start": 0}, ("a",)),
    ([{"text": "a", "answer_start": 0}, {"text": "b", "answer_start": 9}], ("a", "b")),
    ("\ufeffcaf\ud83d", ("caf?",)),
    (datetime.date(2024, 2, 29), ("2024-02-29",)),
    (decimal.Decimal("2.50"), ("2.50",)),
    (b"caf\xc3\xa9", ("café",)),
    (np.int64(7), ("7",)),
    (np.array([1.5, 2.0]), ("1.5", "2.0")),
    (pyarrow.scalar("x"), ("x",)),
    (pyarrow.array(["x", None]), ("x", "")),
    (None, ("",)),
    ([], ()),
    ([1, None], ("1", "")),
    (["", " \n", "x"], ("", "", "x")),
    (math.nan, ("",)),
]


@pytest.mark.parametrize(("value", "texts"), ANSWERS, ids=range(len(ANSWERS)))
def test_answers_of_every_form_are_texts(value, texts):
    assert read_references(value, lambda: "here") == texts


@pytest.mark.parametrize(
    "value",
    [{"value": "a"}, math.inf, object(), b"\xff", [[[[[[[[[["deep"]]]]]]]]]]],
    ids=["object of JSON", "infinity", "object of Python", "bytes", "deep"],
)
def test_answers_of_other_forms_are_refused_by_place(value):
    with pytest.raises(DataError, match=r"'answer' in line 3 must be a string.*Got: "):
        read_references(value, lambda: "'answer' in line 3")


def test_names_of_one_answer_are_refused_where_every_answer_counts():
    with pytest.raises(DataError, match=r"here holds a list in a list.*\['fox', 'the fox'\]"):
        read_references(["dog", ["fox", "the fox"]], lambda: "here", alternatives=False)
    assert read_references([["fox"], ["dog"]], lambda: "here", alternatives=False) == ("fox", "dog")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.binary(max_size=4)
    | st.dates()
    | st.decimals(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(value=VALUES)
def test_any_value_is_read_or_refused_and_what_is_kept_is_json(value):
    kept = json_value(value)
    assert json.loads(json.dumps(kept, allow_nan=False).encode()) == kept
    for read in (read_references, read_prompt):
        try:
            found = read(value, lambda: "here")
        except DataError as error:
            assert str(error).startswith("here ")
        else:
            for text in found if isinstance(found, tuple) else [found or ""]:
                text.encode()  # valid Unicode


def test_prompts_are_text():
    assert read_prompt("\ufeffa \ud83d", lambda: "here") == "a ?"
    assert read_prompt(None, lambda: "here") is None
    for value in ([{"role": "user", "content": "hi"}], {"role": "user", "content": "hi"}):
        with pytest.raises(DataError, match=r"here must be a string.*prompts.messages_field"):
            read_prompt(value, lambda: "here")
    for value in (3, ["a"], {}, []):
        with pytest.raises(DataError, match="here must be a string"):
            read_prompt(value, lambda: "here")


# ---- Files of examples ----


def read(path, name="hotpotqa", **options):
    notes = []
    options = {"tokenizer": BYTES, "report": notes.append, **options}
    return load_examples(name, data=str(path), **options), notes


def rows_file(folder: Path, rows: list) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "count", "answers"),
    [
        ("eval_ok", 3, ("fox",)),
        ("eval_int_answers", 3, ("42",)),
        ("eval_nested_answers", 3, ("fox", "the fox")),
        ("eval_answers_null_answer_set", 3, ("fox",)),
        ("eval_metadata_dict", 3, ("fox",)),
        ("eval_metadata_text", 3, ("fox",)),
        ("eval_surrogate", 1, ("fox",)),
    ],
)
def test_evaluation_files_as_people_have_them(name, count, answers):
    examples, notes = read(str(require_input(f"{name}.jsonl")))
    assert [example.answers for example in examples] == [answers] * count and not notes
    metadata = {"eval_metadata_dict": {"source": "x"}}
    metadata |= {"eval_metadata_text": {"metadata": "from wikipedia"}}
    for example in examples:
        assert example.metadata == metadata.get(name, {}) | {
            "prompt_tokens": 1 + len(example.prompt.encode())
        }
    if name == "eval_surrogate":
        assert examples[0].prompt == "emoji ? cut in half. Answer:"


def test_rows_without_a_prompt_or_an_answer_are_left_out_and_counted(tmp_path):
    row = {"prompt": "p", "answers": ["a"]}
    empty = [{"answers": x} for x in ([], None, "", [" "], [None], [""])]
    rows = [row, *(row | x for x in empty), row | {"answers": ["", "b"]}, row | {"prompt": None}]
    examples, notes = read(rows_file(tmp_path, rows))
    assert [(example.index, example.answers) for example in examples] == [(0, ("a",)), (7, ("b",))]
    text = "\n".join(notes)
    assert "left out 6 of 9 rows without an answer" in text
    assert "left out 1 of 9 rows without a prompt" in text
    assert "left out 1 empty answers beside others" in text
    with pytest.raises(DataError, match=r"none of the 6 rows of .* 6 without an answer"):
        read(rows_file(tmp_path, [row | x for x in empty]))


BAD_ROWS = {
    "prompt": ([3, ["a"], {"a": 1}, True], "rows.jsonl, line 1 .*'prompt' must be a string"),
    "answers": ([{"value": "x"}, [{"a": 1}]], "rows.jsonl, line 1 .*'answers' must be a string"),
    "max_gen_tokens": (
        [0, -5, 10**18, 2.5, "32", True, [], {}],
        "'max_gen_tokens' in .*rows.jsonl, line 1 must be .* number from 1 to 1,048,576. Got: ",
    ),
    "max_seq_length": (
        [0, -5, 10**18, 2.5, "4096", True, [1], {}],
        "'max_seq_length' in .*rows.jsonl, line 1 must be .* number from 1 to 16,777,216. Got: ",
    ),
    "task": ([3, ["hotpotqa"], {"a": 1}], "'task' in .*rows.jsonl, line 1 must be a string. Got: "),
    "dataset": ([3, ["hotpotqa"]], "'dataset' in .*rows.jsonl, line 1 must be a string. Got: "),
}


@pytest.mark.parametrize("field", BAD_ROWS)
def test_fields_of_other_types_are_refused_with_the_row(tmp_path, field):
    values, message = BAD_ROWS[field]
    for value in values:
        path = rows_file(tmp_path, [{"prompt": "p", "answers": ["a"], field: value}])
        with pytest.raises(DataError, match=message):
            read(path)


def test_numbers_of_tables_with_nulls_are_read(tmp_path):
    """A column of whole numbers and nulls is one of floats in many tables."""
    rows = [{"prompt": "p", "answers": 4, "max_gen_tokens": n} for n in (7.0, None, math.nan)]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    examples, _ = read(path)
    assert [example.max_new_tokens for example in examples] == [7, 32, 32]


def test_metadata_is_kept_as_json(tmp_path):
    when = datetime.datetime(2024, 2, 29, 12, 30)
    metadata = {"when": when, "raw": b"\xff", "score": math.nan, "price": decimal.Decimal("1.50")}
    path = tmp_path / "rows.parquet"
    rows = [{"prompt": "p", "answers": ["a"], "metadata": metadata}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    examples, _ = read(path)
    kept = dict(examples[0].metadata)
    assert kept == {
        "when": "2024-02-29T12:30:00",
        "raw": "b'\\xff'",
        "score": None,
        "price": "1.50",
        "prompt_tokens": 2,
    }
    write_examples(examples, tmp_path / "again.jsonl")
    again, _ = read(tmp_path / "again.jsonl")
    assert again[0].metadata == kept


@pytest.mark.parametrize(
    ("metadata", "kept"),
    [
        ('{"a": 1}', {"a": 1}),
        ("{broken", {"metadata": "{broken"}),
        ("[1, 2]", {"metadata": "[1, 2]"}),
        ("3", {"metadata": "3"}),
        (3, {"metadata": 3}),
        ([1, None], {"metadata": [1, None]}),
        ("", {}),
        (None, {}),
        (
            {"depths": "deep", "length": [1], "prompt_tokens": "x"},
            {"depths": "deep", "length": [1]},
        ),
        ("[" * 100_000, None),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_metadata_of_every_form_is_read(tmp_path, metadata, kept):
    path = rows_file(tmp_path, [{"prompt": "p", "answers": ["a"], "metadata": metadata}])
    examples, _ = read(path)
    if kept is not None:
        assert examples[0].metadata == kept | {"prompt_tokens": 2}
    write_examples(examples, tmp_path / "set.parquet")
    assert read(tmp_path / "set.parquet")[0][0].prompt == "p"


def test_names_of_one_answer_need_a_score_of_the_best(tmp_path):
    nested = {"prompt": "p", "answers": [["fox", "the fox"]]}
    path = rows_file(tmp_path, [nested])
    for name, metric in (
        ("vt", None),
        ("niah_single_1", None),
        ("ruler_squadqa", "ruler_qa_lm_eval"),
    ):
        with pytest.raises(DataError, match=r"line 1 .* list in a list.*fraction of all answers"):
            read(path, name, metric=metric)
    assert read(path, "ruler_squadqa")[0][0].answers == ("fox", "the fox")


@pytest.mark.parametrize("samples", [0, -1, 2.0, True, "3"])
def test_samples_are_a_whole_number(samples):
    for name, options in (("lcc", {"data": __file__}), ("fwe", {"length": 900})):
        with pytest.raises(DataError, match=f"samples of {name} must be a whole number"):
            load_examples(name, samples=samples, tokenizer=BYTES, **options)


def test_sizes_that_cannot_be_built_are_refused_at_once():
    for options, message in (
        ({"length": 10**18, "samples": 1}, "length of fwe .* at most 16,777,216"),
        ({"length": -900, "samples": 1}, "length of fwe must be a whole number"),
        ({"length": 900, "samples": 10**18}, "samples of fwe .* at most 1,000,000"),
    ):
        with pytest.raises(DataError, match=message):
            load_examples("fwe", tokenizer=BYTES, **options)
    big = [load_examples("fwe", length=900, samples=1, seed=n, tokenizer=BYTES) for n in (2**63, 1)]
    assert big[0] != big[1]


# ---- Prompts of post-training ----


def prompts_of(source: str, **options):
    options = {"source": source, "sequence_length": 64, "epochs": 1} | options
    return load_prompts(data_config(**options), PromptsConfig(max_answer_tokens=8), BYTES)


def test_prompt_files_as_people_have_them(tmp_path):
    numbers = prompts_of(str(require_input("prompts_int_answer.jsonl")))
    assert numbers.answers == [(str(n),) for n in range(2, 10)]
    squad = prompts_of(str(require_input("prompts_squad_answer.jsonl")))
    assert squad.answers == [("a",)] * 8
    with pytest.raises(DataError, match=r"'prompt' in .*line 1 .*prompts.messages_field"):
        prompts_of(str(require_input("prompts_messages.jsonl")))
    rows = [{"prompt": f"p {n}", "answer": answer} for n, answer in enumerate(([None, 1], "", "b"))]
    corpus = prompts_of(str(rows_file(tmp_path, rows)))
    assert corpus.answers == [("1",), ("b",)]
    statistics = corpus.dataset("train", 1).statistics
    assert (statistics.without_answer, statistics.answers_left_out) == (1, 1)
    assert "1 empty answers left out" in statistics.summary()
    nested = data_config(source=str(rows_file(tmp_path, [{"prompt": "p", "answer": [["a", "b"]]}])))
    with pytest.raises(DataError, match=r"'answer' in .*line 1 holds a list in a list"):
        load_prompts(nested, PromptsConfig(), BYTES, alternatives=False)
