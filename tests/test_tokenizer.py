"""Tokenizers against the token counts of published data, and against each other's laws."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_jax.base.errors import DataError
from refine_jax.data import Tokenizer, load_tokenizer
from refine_jax.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    _mistral_model,
    encode_continuations,
)

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
FILES = sorted(DATA.glob("*/*.parquet"))
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


@pytest.fixture(scope="module")
def mistral() -> Tokenizer:
    return load_tokenizer("mistral-v1")


def write_tokenizer_json(folder: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers", reason="the optional tokenizers library")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["<s>", "</s>"])
    model.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(not FILES, reason=f"no parquet files in {DATA}")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_mistral_counts_equal_published_prompt_lengths(mistral: Tokenizer, path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(path, columns=["prompt", "prompt_length"]).slice(0, 12)
    prompts = table.column("prompt").to_pylist()
    lengths = [len(ids) for ids in mistral.encode_batch(prompts)]
    assert lengths == table.column("prompt_length").to_pylist()


def test_mistral_ids(mistral: Tokenizer) -> None:
    assert (mistral.vocab_size, mistral.bos_id, mistral.eos_id) == (32000, 1, 2)
    assert 0 <= mistral.pad_id < mistral.vocab_size
    # Ids of the published Mistral 7B v0.1 tokenizer.
    ids = mistral.encode("Hello world", eos=True)
    assert ids.dtype == np.int32
    assert ids.tolist() == [1, 22557, 1526, 2]


@pytest.mark.parametrize("name", ["mistral-v1", "bytes"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("One line.\n", "What is it?"),
        ("One line.", "\nWhat is it?"),
        ("One line.\n", "4071"),
        ("One line.", " Another."),
        ("Eine Zeile.\n", "ünd 語"),
        ("One line.", ""),
    ],
)
def test_a_continuation_has_the_ids_it_has_in_the_whole_text(name, before, after) -> None:
    tokenizer = load_tokenizer(name)
    (ids,) = encode_continuations(tokenizer, [after])
    whole = tokenizer.encode(before + after)
    np.testing.assert_array_equal([*tokenizer.encode(before), *ids], whole)


def test_control_symbols_in_text_are_text(mistral: Tokenizer) -> None:
    ids = mistral.encode("a <s> b </s>", bos=False)
    assert not set(ids.tolist()) & {mistral.bos_id, mistral.eos_id}
    assert mistral.decode(ids) == "a <s> b </s>"


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_bytes_round_trip(text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert len(ids) == len(text.encode()) + 2
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode(np.append(ids, tokenizer.pad_id)) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0▁"), max_size=60))
def test_mistral_round_trip_and_batch(mistral: Tokenizer, text: str) -> None:
    ids = mistral.encode(text, bos=True, eos=True)
    assert mistral.decode(ids) == text
    batch = mistral.encode_batch([text, "x", text], bos=True, eos=True)
    assert [ids.tolist() for ids in batch] == [
        ids.tolist(),
        mistral.encode("x", eos=True).tolist(),
        ids.tolist(),
    ]


def test_folder_with_a_sentencepiece_model(tmp_path: Path, mistral: Tokenizer) -> None:
    for folder in (tmp_path / "hf", tmp_path / "converted" / "tokenizer"):
        folder.mkdir(parents=True)
        (folder / "tokenizer.model").write_bytes(_mistral_model().read_bytes())
        # A model is preferred to a tokenizer.json, which needs another library.
        (folder / "tokenizer.json").write_text("{}")
    for path in (tmp_path / "hf", tmp_path / "converted", tmp_path / "hf" / "tokenizer.model"):
        found = load_tokenizer(path)
        assert isinstance(found, SentencePieceTokenizer)
        assert found.fingerprint == mistral.fingerprint
        assert load_tokenizer(found.name).fingerprint == mistral.fingerprint


def test_tokenizer_json(tmp_path: Path) -> None:
    found = load_tokenizer(write_tokenizer_json(tmp_path))
    assert isinstance(found, HuggingFaceTokenizer)
    assert (found.bos_id, found.eos_id, found.pad_id) == (1, 2, 2)
    assert found.vocab_size == 3 + len(WORDS)
    ids = found.encode(" ".join(WORDS), bos=True, eos=True)
    assert ids.tolist() == [1, *range(3, 3 + len(WORDS)), 2]
    assert found.decode(ids) == " ".join(WORDS)
    assert [i.tolist() for i in found.encode_batch(["dog", "fox"])] == [[1, 11], [1, 6]]


def test_tokenizer_json_without_its_library(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"refine-jax\[tokenizers\]"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_bos(tmp_path: Path) -> None:
    write_tokenizer_json(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    found = load_tokenizer(tmp_path)
    assert found.bos_id is None
    with pytest.raises(DataError, match=r"no bos token: set add_bos=False"):
        found.encode("dog")
    assert found.encode("dog", bos=False).tolist() == [11]


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mistral-v1, bytes"):
        load_tokenizer("mistral-v9")
    with pytest.raises(DataError, match=r"no tokenizer\.model or tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_loading_mistral_does_not_import_its_package() -> None:
    script = (
        "import sys; from refine_jax.data import load_tokenizer; load_tokenizer('mistral-v1');"
        "print(sorted({'mistral_common', 'grain', 'pyarrow', 'jax'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]", result.stderr
