"""Tokenizers against the token counts of published data, and against each other's laws."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from goldens import require_input
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

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
FILES = sorted(DATA.glob("*/*.parquet"))
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


@pytest.fixture(scope="module")
def mistral() -> Tokenizer:
    return load_tokenizer("mistral-v1")


def write_tokenizer_json(folder: Path) -> Path:
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


def test_a_piece_that_is_not_text(tmp_path: Path) -> None:
    path = sentencepiece_model(tmp_path) / "tokenizer.model"
    content = path.read_bytes()
    assert b"</s>" in content
    path.write_bytes(content.replace(b"</s>", b"</s\xf2", 1))
    with pytest.raises(DataError, match="is damaged: it holds a piece that is not UTF-8"):
        load_tokenizer(path)


def test_loading_mistral_does_not_import_its_package() -> None:
    script = (
        "import sys; from refine_jax.data import load_tokenizer; load_tokenizer('mistral-v1');"
        "print(sorted({'mistral_common', 'grain', 'pyarrow', 'jax'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]", result.stderr


def tokenizer_json(folder: Path, model, pre_tokenizer=None, **config) -> Path:
    """A folder with a tokenizer.json of a model of the library, and a tokenizer_config.json."""
    made = tokenizers.Tokenizer(model)
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    for token in config.pop("special", ()):
        made.add_special_tokens([token])
    for token in config.pop("added", ()):
        made.add_tokens([token])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def word_level(folder: Path, **config) -> Path:
    """Words between spaces; the special tokens are words of the vocabulary too."""
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    return tokenizer_json(
        folder,
        tokenizers.models.WordLevel(words, unk_token="<unk>"),
        tokenizers.pre_tokenizers.WhitespaceSplit(),
        **{"special": ["<unk>", "<s>", "</s>"], "eos_token": "</s>", "bos_token": "<s>"} | config,
    )


def byte_level(folder: Path, merges=(), dropout=None, **config) -> Path:
    """Bytes, and words of two of them; special tokens are added to these."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *("".join(m) for m in merges)])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, list(merges), dropout=dropout))
    made.decoder = tokenizers.decoders.ByteLevel()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(config.pop("special", ["<s>", "</s>"]))
    made.add_tokens(config.pop("added", []))
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def sentencepiece_model(folder: Path, **options) -> Path:
    """A folder with a tokenizer.model of single characters."""
    import sentencepiece

    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 4),
        model_prefix=str(folder / "tokenizer"),
        model_type="char",
        minloglevel=2,
        **{"vocab_size": 40, "hard_vocab_limit": False} | options,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


def test_saved_truncation_and_padding_change_nothing() -> None:
    folder = require_input("tok_truncation_padding")
    found = load_tokenizer(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    text = require_input("bom.jsonl").read_text("utf-8-sig")
    documents = [json.loads(line)["text"] for line in text.splitlines()]
    want = [
        [1, *(vocabulary.get(word, 0) for word in document.replace(".", " .").split())]
        for document in documents
    ]
    assert [len(ids) for ids in want] == [64] * 24
    assert [ids.tolist() for ids in found.encode_batch(documents)] == want
    assert [found.encode(document).tolist() for document in documents] == want
    assert [len(ids) for ids in found.encode_batch(documents, eos=True)] == [65] * 24


def test_saved_dropout_segments_nothing_at_random(tmp_path: Path) -> None:
    found = load_tokenizer(byte_level(tmp_path / "t", [("a", "b")], dropout=0.5))
    ids = [found.encode("abab" * 20, bos=False).tolist() for _ in range(3)]
    assert ids == [[256] * 40] * 3


def unigram(folder: Path) -> Path:
    scores = {"<unk>": 0, "<s>": 0, "</s>": 0, "▁": -2} | dict.fromkeys("thefoxdg</s>", -4)
    return tokenizer_json(
        folder,
        tokenizers.models.Unigram([*scores.items()], unk_id=0, byte_fallback=False),
        tokenizers.pre_tokenizers.Metaspace(),
        special=["<unk>", "<s>", "</s>"],
        bos_token="<s>",
        eos_token="</s>",
    )


def with_pieces(folder: Path) -> Path:
    sentencepiece_model(folder, user_defined_symbols=["</end>"], required_chars="</>?")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</end>"}')
    return folder


SPELLING = {
    "words": word_level,
    "unigram": unigram,
    "bytes": lambda folder: byte_level(folder, bos_token="<s>", eos_token="</s>"),
    "added like others": lambda folder: byte_level(
        folder, special=["<s>"], added=["</s>"], bos_token="<s>", eos_token=["</s>", "<s>"]
    ),
    "pieces": with_pieces,
    "input": lambda folder: require_input("tok_plain"),
}


@pytest.mark.parametrize("kind", SPELLING)
def test_special_tokens_in_a_text_are_text(kind: str, tmp_path: Path) -> None:
    found = load_tokenizer(SPELLING[kind](tmp_path / "tokenizer"))
    end = "</end>" if kind == "pieces" else "</s>"
    special = {found.bos_id, *found.end_ids}
    texts = [f"the fox {end} dog", end, f"{end}{end}dog <s>", f"the{end}", "the dog"]
    for text, ids in zip(texts, found.encode_batch(texts, bos=False), strict=True):
        assert len(ids) and not special & {*ids.tolist()}
        assert found.encode(text, bos=False).tolist() == ids.tolist()
        if kind not in ("words", "input", "unigram"):  # which do not know all characters
            # A part that is encoded on its own may get the space before a text.
            cut = (lambda x: x.replace(" ", "")) if kind == "pieces" else str
            assert cut(found.decode(ids)) == cut(text)
    # What is appended is the token, and has no text.
    ids = found.encode("the dog", bos=False, eos=True)
    assert ids[-1] == found.eos_id and end not in found.decode(ids)


def test_added_tokens_that_are_not_special_stay_tokens(tmp_path: Path) -> None:
    found = load_tokenizer(byte_level(tmp_path / "t", special=["</s>"], added=["<code>"]))
    ids = found.encode("a<code>b</s>", bos=False)
    assert found._model.token_to_id("<code>") in ids and found.decode(ids) == "a<code>b</s>"
    pieces = load_tokenizer(sentencepiece_model(tmp_path / "p", user_defined_symbols=["<code>"]))
    assert pieces._model.piece_to_id("<code>") in pieces.encode("a<code>b<s>", bos=False)
    assert pieces.bos_id not in pieces.encode("a<code>b<s>", bos=False)


def test_many_special_tokens_in_a_long_text_take_no_longer_than_text(tmp_path: Path) -> None:
    found = load_tokenizer(word_level(tmp_path / "t"))
    ids = found.encode("dog </s> " * 20_000, bos=False)
    assert np.count_nonzero(ids == 11) == 20_000 and 2 not in ids


def test_all_ends_of_a_list(tmp_path: Path) -> None:
    found = load_tokenizer(require_input("tok_eos_list"))
    assert (found.eos_id, found.end_ids, found.bos_id) == (2, (2, 11), None)
    assert found.encode("the dog", bos=False, eos=True).tolist() == [3, 11, 2]
    assert found.decode([3, 11, 2]) == "the dog"  # a word that also ends a text
    folder = word_level(tmp_path / "t", eos_token=None)
    ends = [{"content": "fox", "lstrip": False}, "</s>", "fox"]
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": ends}))
    found = load_tokenizer(folder)
    assert (found.eos_id, found.end_ids) == (6, (6, 2))
    copied = tmp_path / "copied"
    copied.mkdir()
    for name, path in found.files.items():
        (copied / name).write_bytes(path.read_bytes())
    assert load_tokenizer(copied).end_ids == (6, 2)
    assert load_tokenizer(copied).fingerprint == found.fingerprint
    assert load_tokenizer("bytes").end_ids == (257,) and load_tokenizer("mistral-v1").end_ids == (
        2,
    )


def test_ends_that_the_files_of_a_sentencepiece_model_name(tmp_path: Path, caplog) -> None:
    folder = sentencepiece_model(tmp_path / "t", user_defined_symbols=["<stop>"])
    alone = load_tokenizer(folder)
    pieces = alone._pieces
    (folder / "added_tokens.json").write_text(json.dumps({"<end>": pieces, "<code>": pieces + 1}))
    (folder / "special_tokens_map.json").write_text('{"eos_token": ["</s>", "<end>", "<stop>"]}')
    found = load_tokenizer(folder)
    stop = alone._model.piece_to_id("<stop>")
    assert found.end_ids == (alone.eos_id, pieces, stop) and found.vocab_size == pieces + 1
    assert found.decode([*alone.encode("the fox", bos=False), pieces]) == "the fox"
    assert found.fingerprint != alone.fingerprint and "'<code>'" in caplog.text
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert load_tokenizer(folder).fingerprint == alone.fingerprint
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    caplog.clear()
    assert load_tokenizer(folder).eos_id == stop
    assert "name another eos_token, '<stop>' and '</s>'" in caplog.text
    assert "the model's own is" in caplog.text


def test_the_file_that_holds_all_tokens(tmp_path: Path, caplog) -> None:
    """Of tokenizer.model and tokenizer.json; a line says where they disagree."""
    folder = sentencepiece_model(tmp_path / "t")
    model = load_tokenizer(folder)._model
    pieces = {model.id_to_piece(i): i for i in range(model.get_piece_size())}

    def kind(vocabulary, added=()) -> type:
        caplog.clear()
        made = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
        tokenizer_json(folder, made, added=added)
        return type(load_tokenizer(folder))

    assert kind(pieces) is SentencePieceTokenizer and not caplog.records
    assert kind(pieces, ["<pad>"]) is HuggingFaceTokenizer
    assert (
        len(caplog.records) == 1 and "1 tokens are in tokenizer.json alone ('<pad>')" in caplog.text
    )
    assert load_tokenizer(folder).vocab_size == len(pieces) + 1
    fewer = {piece: index for piece, index in pieces.items() if index < 9}
    assert kind(fewer) is SentencePieceTokenizer and "in tokenizer.model alone" in caplog.text
    moved = pieces | {"t": pieces["h"], "h": pieces["t"]}
    assert kind(moved) is HuggingFaceTokenizer and "2 tokens have other ids" in caplog.text
    (folder / "tokenizer.model").write_bytes(b"")
    assert kind(pieces) is HuggingFaceTokenizer and "tokenizer.model is empty" in caplog.text
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", '{"bos_token": 1}', "bos_token must be a string"),
        ("tokenizer_config.json", '{"bos_token": ["<s>"]}', "bos_token must be a string"),
        ("tokenizer_config.json", '{"bos_token": {"content": 3}}', "bos_token must be a string"),
        ("tokenizer_config.json", '{"eos_token": {"id": 3}}', "eos_token must be a string"),
        ("tokenizer_config.json", '{"eos_token": ["</s>", 2]}', "eos_token must be a string"),
        ("tokenizer_config.json", '{"eos_token": [["</s>"]]}', "eos_token must be a string"),
        ("tokenizer_config.json", '{"eos_token": []}', "eos_token must name a token"),
        ("tokenizer_config.json", '{"eos_token": true}', "eos_token must be a string"),
        ("tokenizer_config.json", '{"eos_token": "<end>"}', "no token '<end>', which .*eos_token"),
        ("tokenizer_config.json", '{"bos_token": "<b>"}', "no token '<b>', which .*bos_token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "must be an object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"0": null}}', "ids and their tokens"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "a"}}', "ids and their tokens"),
        ("tokenizer_config.json", '["<s>"]', "must hold a JSON object"),
        ("tokenizer_config.json", "[" * 100_000, "nested too deeply"),
        ("tokenizer_config.json", b'{"bos_token": "\xff"}', "not UTF-8"),
        ("tokenizer_config.json", '{"a": NaN}', "not valid JSON"),
        ("special_tokens_map.json", '{"pad_token": 0}', "pad_token must be a string"),
        ("special_tokens_map.json", "", "not valid JSON"),
        ("added_tokens.json", '{"<pad>": "3"}', "'<pad>' must have an id"),
        ("added_tokens.json", '{"<pad>": true}', "'<pad>' must have an id"),
        ("tokenizer.json", "", "is empty"),
        ("tokenizer.json", "[1]", "not a tokenizer.json"),
        ("tokenizer.json", b"\xff\x00" * 99, "not a tokenizer.json"),
        ("tokenizer.json", "[" * 100_000, "not a tokenizer.json"),
        (
            "tokenizer.json",
            '{"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}',
            "no tokens",
        ),
        (
            "tokenizer.json",
            '{"model": {"type": "WordLevel", "vocab": {"a": 4000000000}, "unk_token": "a"}}',
            "beyond int32",
        ),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid x\n", "git lfs pull"),
    ],
)
def test_damaged_files_are_named(name: str, content: str | bytes, message: str, tmp_path) -> None:
    word_level(tmp_path)
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        load_tokenizer(tmp_path)
    assert name in str(raised.value) and len(str(raised.value)) < 1000


def test_names_that_nothing_depends_on(tmp_path: Path, caplog) -> None:
    folder = word_level(tmp_path / "t", pad_token="<pad>", unk_token="")
    assert load_tokenizer(folder).pad_id == 2
    assert len(caplog.records) == 1 and "no token '<pad>'" in caplog.text
    caplog.clear()
    found = load_tokenizer(require_input("tok_bom"))
    assert (found.bos_id, found.eos_id) == (1, 2) and not caplog.records
    marked = (folder / "tokenizer.json").read_text()
    plain = load_tokenizer(folder).fingerprint
    (folder / "tokenizer.json").write_text("\ufeff" + marked)
    assert load_tokenizer(folder).fingerprint == plain


def test_files_that_are_no_tokenizers(tmp_path: Path, monkeypatch) -> None:
    def refused(path, message: str) -> None:
        begin = time.perf_counter()
        with pytest.raises(DataError, match=message):
            load_tokenizer(path)
        assert time.perf_counter() - begin < 5

    refused(require_input("tok_lfs"), "is a pointer of git-lfs, not the file itself: run git lfs")
    refused(require_input("tok_tekken"), r"tekken\.json is not supported")
    refused(require_input("tok_tekken", "tekken.json"), r"tekken\.json is not supported")
    refused(tmp_path / "tokenizer.model", "no tokenizer")
    os.mkfifo(tmp_path / "tokenizer.model")
    refused(tmp_path / "tokenizer.model", "neither a file or folder")
    refused(tmp_path, "no tokenizer.model or tokenizer.json")
    (tmp_path / "tokenizer.model").unlink()
    for content, message in ((b"", "is empty"), (os.urandom(9999), "not a SentencePiece model")):
        (tmp_path / "tokenizer.model").write_bytes(content)
        refused(tmp_path, message)
    with (tmp_path / "tokenizer.model").open("wb") as file:
        file.truncate(10 << 30)
    refused(tmp_path, "more than any tokenizer")
    refused("gs:/bucket/tokenizer", "must be a path, or a URL such as gs://bucket/folder")
    refused("x" * 5000, "cannot read the tokenizer")
    refused("a\0b", "null character")
    monkeypatch.setenv("HOME", str(tmp_path))
    refused("~", "more than any tokenizer")


def test_lone_surrogates_are_replaced_wherever_they_come_from(tmp_path: Path) -> None:
    for name in ("bytes", "mistral-v1", sentencepiece_model(tmp_path / "p")):
        found = load_tokenizer(name)
        want = found.encode("a ? b").tolist()
        assert found.encode("a \ud83d b").tolist() == want
        assert [ids.tolist() for ids in found.encode_batch(["a \ud83d b"] * 2)] == [want] * 2
    found = load_tokenizer(byte_level(tmp_path / "t"))
    assert found.decode(found.encode("a \ud83d b", bos=False)) == "a ? b"


def test_texts_that_a_vocabulary_cannot_say_end_in_one_message(tmp_path: Path) -> None:
    model = tokenizers.models.WordLevel({"a": 0}, unk_token="<unk>")
    found = load_tokenizer(tokenizer_json(tmp_path / "t", model))
    with pytest.raises(DataError, match=r"tokenizer\.json cannot encode a text"):
        found.encode("b", bos=False)
