"""Text sources: each kind gives back the texts written; each bad input is one DataError."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from corpora import data_config
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_jax.base.errors import ConfigError, DataError
from refine_jax.data import TextSource, load_corpus, open_source
from refine_jax.data.sources import find_files

TEXTS = ["first\ndocument", "", "zweites Dokument, ünïcode \u2028 here", "line\r\nends", "x" * 5000]
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def texts_of(source: TextSource) -> list[str]:
    return [source[i] for i in range(len(source))]


def open_at(path: Path | str, **options) -> TextSource:
    return open_source(data_config(source=str(path), **options))


def write_parquet(path: Path, texts: list, **options) -> Path:
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, **options)
    return path


def write_jsonl(path: Path, lines: list[str]) -> Path:
    content = "".join(line + "\n" for line in lines).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        half = len(content) // 2  # two frames, as parallel compressors write them
        packer = zstandard.ZstdCompressor()
        content = packer.compress(content[:half]) + packer.compress(content[half:])
    path.write_bytes(content)
    return path


def records(texts: list[str]) -> list[str]:
    return [json.dumps({"text": text, "n": i}) for i, text in enumerate(texts)]


def test_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", [*TEXTS, None], row_group_size=2)
    write_parquet(tmp_path / "a.parquet", ["of a"])
    source = open_at(tmp_path)
    expected = ["of a", *TEXTS]  # a null is no document
    assert source.dropped == {"null": 1}
    assert texts_of(source) == expected
    order = np.random.default_rng(0).permutation(len(expected))
    assert [source[int(i)] for i in order] == [expected[i] for i in order]


def test_parquet_dictionary_column(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "d.parquet")
    assert texts_of(open_at(tmp_path)) == ["a", "b", "a"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_jsonl(tmp_path: Path, suffix: str) -> None:
    write_jsonl(tmp_path / f"b{suffix}", ["", *records(TEXTS), "   "])
    content = write_jsonl(tmp_path / f"a{suffix}", records(["of a"]))
    if suffix == ".jsonl":  # no newline at the end of a file
        content.write_bytes(content.read_bytes().rstrip(b"\n"))
    source = open_at(tmp_path)
    expected = ["of a", *TEXTS]
    assert texts_of(source) == expected
    assert [source[i] for i in (4, 0, 2)] == [expected[i] for i in (4, 0, 2)]


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), min_size=1, max_size=8))
def test_jsonl_kinds_agree(tmp_path_factory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("jsonl")
    for suffix in SUFFIXES:
        path = write_jsonl(folder / f"file{suffix}", records(texts))
        assert texts_of(open_at(path)) == texts


def test_jsonl_lone_surrogate(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ['{"text": "a\\ud800b"}'])
    assert texts_of(open_at(path)) == ["a?b"]


def test_text_folder_glob_and_order(tmp_path: Path) -> None:
    for name, text in (
        ("b.txt", "B"),
        ("sub/a.md", "A"),
        ("a.txt", "A\r\n"),
        (".hidden/c.txt", "C"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "code.py").write_text("print()")
    assert texts_of(open_at(tmp_path)) == ["A\r\n", "B", "A"]
    assert texts_of(open_at(tmp_path, files="*.py")) == ["print()"]
    assert texts_of(open_at(tmp_path / "code.py")) == ["print()"]
    assert texts_of(open_at(f"{tmp_path}/**/*.md")) == ["A"]
    assert [file.name for file in find_files(f"{tmp_path}/*.txt")] == ["a.txt", "b.txt"]


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", records(["a"]))
    before = open_at(path).fingerprint
    assert open_at(path).fingerprint == before
    assert open_at(path, text_field="n").fingerprint != before
    write_jsonl(path, records(["a", "b"]))
    assert open_at(path).fingerprint != before


def test_stdlib_is_real_code_in_fixed_order() -> None:
    source, again = open_at("stdlib"), open_at("stdlib")
    assert source.fingerprint == again.fingerprint
    assert len(source) == len(again) > 300
    texts = texts_of(source)
    assert sum(map(len, texts)) > 5_000_000
    assert Path(json.__file__).read_text("utf-8") in texts
    assert not any("import pytest" in text for text in texts)  # no site-packages


BAD = {
    "missing": (lambda d: "nowhere.parquet", {}, "no such file or folder"),
    "no match": (lambda d: "*.jsonl", {}, "no file matches"),
    "empty folder": (lambda d: "", {}, "no file .* in"),
    "empty jsonl": (lambda d: write_jsonl(d / "a.jsonl", []).name, {}, "holds no documents"),
    "empty parquet": (
        lambda d: write_parquet(d / "a.parquet", pa.array([], pa.string())).name,
        {},
        "holds no documents",
    ),
    "no column": (
        lambda d: write_parquet(d / "a.parquet", ["a"]).name,
        {"text_field": "content"},
        r"no column 'content' in .*a\.parquet: set data\.text_field to one of id, text",
    ),
    "number column": (
        lambda d: write_parquet(d / "a.parquet", ["a"]).name,
        {"text_field": "id"},
        "must hold strings. Got: int64",
    ),
    "broken parquet": (
        lambda d: write_jsonl(d / "a.parquet", ["no parquet"]).name,
        {},
        r"not a readable parquet file: .*a\.parquet",
    ),
    "no field": (
        lambda d: write_jsonl(d / "a.jsonl", ['{"text": "a"}', "", '{"t": 1, "u": 2}']).name,
        {},
        r"no field 'text' in .*a\.jsonl, line 3.*Got: t, u",
    ),
    "number field": (
        lambda d: write_jsonl(d / "a.jsonl", ['{"text": 1}']).name,
        {},
        "must be a string. Got: int",
    ),
    "no object": (lambda d: write_jsonl(d / "a.jsonl", ["[1]"]).name, {}, "Got: list"),
    "no json": (
        lambda d: write_jsonl(d / "a.jsonl.zst", ['{"text": "a"}', "{"]).name,
        {},
        r"a\.jsonl\.zst, line 2 is not JSON",
    ),
    "no gzip": (lambda d: _text(d / "a.jsonl.gz", b"plain"), {}, r"cannot read .*a\.jsonl\.gz"),
    "no zstd": (lambda d: _text(d / "a.jsonl.zst", b"plain"), {}, r"cannot read .*a\.jsonl\.zst"),
    "cut gzip": (lambda d: _cut(d / "a.jsonl.gz"), {}, r"cannot read .*a\.jsonl\.gz"),
    "cut zstd": (lambda d: _cut(d / "a.jsonl.zst"), {}, "ends in the middle"),
    "binary": (lambda d: _text(d / "a.txt", b"\xff\xfe\x00"), {}, r"a\.txt is not UTF-8"),
    "mixed": (
        lambda d: (_text(d / "a.txt", b"a"), write_jsonl(d / "a.jsonl", ["{}"]), "")[2],
        {},
        "mixes jsonl and text files",
    ),
    "tfds name": (lambda d: "tfds:no_such_data_set", {}, "tensorflow-datasets cannot read"),
}


def _text(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return path.name


def _cut(path: Path) -> str:
    noise = np.random.default_rng(0).integers(0, 10**9, 4000)
    write_jsonl(path, records([" ".join(map(str, noise))]))
    return _text(path, path.read_bytes()[:-200])


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path: Path, case: str) -> None:
    make, options, message = BAD[case]
    name = make(tmp_path)
    path = name if name.startswith("tfds:") else f"{tmp_path}/{name}"
    with pytest.raises(DataError, match=message):
        texts_of(open_at(path, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunking": "some"}, r"data\.chunking must be one of 'all', 'first'\. Got: 'some'"),
        ({"sequence_length": 1}, r"data\.sequence_length must be at least 2\. Got: 1"),
        ({"holdout": 0.9}, r"data\.holdout must be at most 0\.5\. Got: 0\.9"),
        ({"max_tokens": 10, "min_tokens": 20}, r"max_tokens=10, min_tokens=20"),
        ({"min_remainder": 11, "sequence_length": 10}, r"min_remainder=11"),
        ({"workers": True}, r"data\.workers must be a whole number"),
        ({"source": ""}, r"data\.source must not be empty"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        load_corpus(data_config(**options))
