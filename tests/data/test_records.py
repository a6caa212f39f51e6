"""Records: every format and compression holds the same, and what cannot be read is one message."""

import contextlib
import gzip
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from corpora import data_config
from goldens import require_input
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from refine_jax.base.errors import ConfigError, DataError
from refine_jax.config import PromptsConfig
from refine_jax.data import load_tokenizer, open_source
from refine_jax.data.footer import null_counts
from refine_jax.data.formats import files_of, find_files, kind_of
from refine_jax.data.prompts import FilePrompts
from refine_jax.data.records import Records
from refine_jax.data.tasks import load_examples
from refine_jax.data.tasks.haystack import load_essays
from refine_jax.data.unpack import blocks

BYTES = load_tokenizer("bytes")
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\ufeff"), max_size=30)
RECORDS = st.lists(
    st.fixed_dictionaries(
        {"text": st.none() | TEXT, "n": st.integers(-(2**60), 2**60), "list": st.lists(TEXT)}
    ),
    max_size=12,
)


def texts(path: Path | str, **options) -> list[str]:
    source = open_source(data_config(source=str(path), **options))
    return [source[i] for i in range(len(source))]


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table(column: pa.Array, path: Path, **options) -> Path:
    pq.write_table(pa.table({"text": column}), path, **options)
    return path


# ---- Every format and compression holds the same ----


def as_lines(records: list[dict], ends: str = "\n", **options) -> bytes:
    return "".join(json.dumps(record, **options) + ends for record in records).encode()


def as_parquet(records: list[dict], kind: pa.DataType, **options) -> bytes:
    schema = pa.schema({"text": kind, "n": pa.int64(), "list": pa.list_(pa.string())})
    target = pa.BufferOutputStream()
    rows = pa.Table.from_pylist(records, schema)
    pq.write_table(rows, target, row_group_size=3, **options)
    return target.getvalue().to_pybytes()


FORMATS = {
    "lines.jsonl": as_lines,
    "lines.json": as_lines,
    "raw.ndjson": lambda records: as_lines(records, ensure_ascii=False),
    "crlf.jsonl": lambda records: as_lines(records, "\r\n"),
    "blank.JSONL": lambda records: b"\n \n" + as_lines(records, "\n\t\n\n"),
    "marked.jsonl": lambda records: b"\xef\xbb\xbf" + as_lines(records),
    "unended.jsonl": lambda records: as_lines(records).rstrip(b"\n"),
    "array.json": lambda records: json.dumps(records).encode(),
    "pretty.json": lambda records: json.dumps(records, indent=2, ensure_ascii=False).encode(),
    "marked.json": lambda records: b"\xef\xbb\xbf" + json.dumps(records).encode(),
    "objects.json": lambda records: as_lines(records, indent=1),
    "no_suffix": as_lines,
    "string.parquet": lambda records: as_parquet(records, pa.string()),
    "large.parquet": lambda records: as_parquet(records, pa.large_string()),
    "view.parquet": lambda records: as_parquet(records, pa.string_view()),
    "binary.parquet": lambda records: as_parquet(records, pa.binary()),
    "unknown.parquet": lambda records: as_parquet(records, pa.string(), write_statistics=False),
    "words.parquet": lambda records: as_parquet(records, pa.dictionary(pa.int32(), pa.string())),
}
PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".GZ": lambda content: gzip.compress(content[:7]) + gzip.compress(content[7:]) + bytes(64),
    ".zst": lambda content: zstandard.compress(content[:9]) + zstandard.compress(content[9:]),
}


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(records=RECORDS, order=st.randoms())
@example(records=[], order=random.Random(0))
def test_formats_and_compressions_hold_the_same(tmp_path_factory, records, order) -> None:
    folder = tmp_path_factory.mktemp("records")
    kept = [record for record in records if record["text"] is not None]
    for name, write in FORMATS.items():
        if name == "no_suffix" and not records:
            continue  # an empty file without a suffix is an empty text
        suffix, pack = order.choice(list(PACKERS.items()))
        path = put(folder / f"{name}{suffix}", pack(write(records)))
        fields = {"text": "data.text_field", "n": "a setting"}
        found = Records([path], fields, text_field="text")
        assert found.dropped == {"null": len(records) - len(kept)}, path
        numbers = list(range(len(found)))
        order.shuffle(numbers)
        for i in numbers:
            assert found[i] == {"text": kept[i]["text"], "n": kept[i]["n"]}, path
        every = Records([path, path])
        assert [every[i] for i in range(len(every))] == records * 2, path


@pytest.mark.parametrize("size", [3, 70_000, 1_000_000])
def test_values_longer_than_what_is_read_at_a_time(tmp_path, size) -> None:
    records = [{"text": "ü" * size}, {"text": "b"}, {"text": "null" * (size // 4)}]
    for name in ("lines.jsonl", "array.json", "pretty.json", "objects.json", "raw.ndjson"):
        assert texts(put(tmp_path / name, FORMATS[name](records))) == [r["text"] for r in records]


def test_lines_are_counted_past_blank_ones_and_nulls(tmp_path) -> None:
    content = '{"text": "a"}\n\n{"text": null}\n' + "\n" * 100_000 + '{"text": "b"}\n{"text": 1}'
    found = Records([put(tmp_path / "a.jsonl", content)], {"text": "s"}, text_field="text")
    assert [found.place(i).rpartition(", ")[2] for i in range(3)] == [
        "line 1",
        "line 100004",
        "line 100005",
    ]
    found = Records([put(tmp_path / "a.json", '[{"t": 1}, {"t": null}, {"t": 2}]')])
    assert found.place(2).endswith("a.json, record 3")
    column = pa.array(["a", None, "b", None, "c"])
    path = table(column, tmp_path / "a.parquet", row_group_size=2)
    found = Records([path, path], {"text": "s"}, text_field="text")
    assert [found.place(i) for i in (1, 5)] == [f"row 2 of {path}", f"row 4 of {path}"]
    assert [found[i]["text"] for i in range(len(found))] == ["a", "b", "c"] * 2


def test_text_is_clean_wherever_it_stands(tmp_path) -> None:
    line = (
        r'{"text": "\ufeffa\ud83d", "x": ["\udc00", {"k": "\ud83d\ude00"}], "n": [NaN, -Infinity],'
        r' "text2": 1, "text2": 2}'
    )
    for name, content in (("a.jsonl", line), ("a.json", f"[{line}]")):
        (record,) = list(Records([put(tmp_path / name, content)]))
        assert record["text"] == "a?" and record["x"] == ["?", {"k": "\U0001f600"}]
        assert math.isnan(record["n"][0]) and record["text2"] == 2
    path = table(pa.array(["\ufeffb"]), tmp_path / "a.parquet")
    assert texts(path) == ["b"]


# ---- The inputs as people have them ----


READ = (
    *("train.json", "train.ndjson", "crlf.jsonl", "bom.jsonl", "null_text.jsonl"),
    *("array.json", "c4", "members_garbage.jsonl.gz", "members_zeros.jsonl.gz"),
    *("pzstd.jsonl.zst", "u2028.jsonl", "large_string.parquet", "dictionary.parquet"),
    *("binary.parquet", "hf_repo", "null_text.parquet"),
)


@pytest.mark.parametrize("name", READ)
def test_inputs_are_read_as_other_readers_do(name) -> None:
    path = require_input(name)
    file = (
        path if path.is_file() else next(p for p in sorted(path.rglob("*.*")) if p.suffix != ".md")
    )
    if file.suffix == ".parquet":
        expected = [x and str(x, "utf-8") if isinstance(x, bytes) else x for x in column_of(file)]
    else:
        tool = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix)
        content = unpacked_by(tool, file) if tool else file.read_bytes()
        content = content.decode("utf-8-sig")
        rows = json.loads(content) if content[0] == "[" else map(json.loads, content.splitlines())
        if name == "u2028.jsonl":
            rows = map(json.loads, content.strip("\n").split("\n"))
        expected = [row["text"] for row in rows]
    source = open_source(data_config(source=str(path)))
    kept = [text for text in expected if text is not None]
    assert len(kept) > 1 and [source[i] for i in range(len(source))] == kept
    assert source.dropped == {"null": len(expected) - len(kept)}
    assert source.dropped["null"] == name.startswith("null_text")


def column_of(path: Path) -> list:
    return pq.read_table(path).column("text").to_pylist()


def unpacked_by(tool: str, path: Path) -> bytes:
    """By the command where there is one: gzip reads all members and warns of what follows."""
    try:
        return subprocess.run([tool, "-dc", path], capture_output=True, check=False).stdout
    except FileNotFoundError:
        if tool == "gzip":
            pytest.skip("there is no gzip command")
        with zstandard.open(path, "rb") as stream:
            return stream.read()


def test_what_follows_the_last_member_of_gzip_is_said(caplog) -> None:
    texts(require_input("members_garbage.jsonl.gz"))
    assert "members_garbage.jsonl.gz: what follows its last gzip member" in caplog.text
    caplog.clear()
    texts(require_input("members_zeros.jsonl.gz"))
    texts(require_input("null_text.jsonl"))
    assert caplog.messages == [
        f"{require_input('null_text.jsonl')}: left out 1 of 25 records, whose 'text' is null"
    ]


def test_a_byte_order_mark_is_no_text() -> None:
    path = require_input("bom.txt")
    assert texts(path) == [path.read_text("utf-8-sig")] and path.read_bytes()[:3] == b"\xef\xbb\xbf"


@pytest.mark.parametrize("name", ["eval_ok.jsonl", "eval_ok.jsonl.gz", "eval_bom.jsonl"])
def test_evaluation_sets_are_read_by_the_same_reader(name) -> None:
    found = load_examples("hotpotqa", data=str(require_input(name)), tokenizer=BYTES)
    prompts = [f"Question {i}: who jumps?\nAnswer:" for i in range(3)]
    assert [(e.prompt, e.answers) for e in found] == [(prompt, ("fox",)) for prompt in prompts]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bad_utf8.jsonl", r"bad_utf8\.jsonl, line 25 is not UTF-8"),
        ("two_on_a_line.jsonl", r"two_on_a_line\.jsonl, line 1 is not JSON"),
        ("train.csv", r"\.csv files are not read.*parquet or JSON lines"),
        ("eval_list_line.jsonl", r"eval_list_line\.jsonl, line 1 must be a JSON object. Got: list"),
        ("gdn_lfs/model.safetensors", r"pointer of git-lfs"),
    ],
)
def test_inputs_that_are_refused(name, message) -> None:
    with pytest.raises(DataError, match=message):
        texts(require_input(name))


def test_an_evaluation_row_that_is_no_object_is_named() -> None:
    path = require_input("eval_list_line.jsonl")
    with pytest.raises(DataError, match=r"eval_list_line\.jsonl, line 1 must be a JSON object"):
        load_examples("hotpotqa", data=str(path), tokenizer=BYTES)


# ---- What cannot be read is one message ----


RAW = {
    "200,000 brackets": ("a.jsonl", b'{"text": "a", "x": ' + b"[" * 200_000, "line 1 .*too deeply"),
    "brackets in an array": ("a.json", b"[" * 200_000, "from line 1 on: it is nested too deeply"),
    "10,000 digits": ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 10_000 + b"}", "line 1 .*digits"),
    "digits in an array": ("a.json", b'[{"n": ' + b"9" * 10_000 + b"}]", "line 1 .*digits"),
    "UTF-16": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16.*iconv"),
    "UTF-16 without a mark": ("a.json", '{"text": "a"}'.encode("utf-16-be"), "UTF-16.*iconv"),
    "UTF-16 text": ("a.txt", "a text".encode("utf-16-le"), "UTF-16.*iconv"),
    "UTF-32": ("a.ndjson", '{"text": "a"}'.encode("utf-32"), "UTF-16.*iconv"),
    "array cut off": (
        "a.json",
        b'[{"text": "a"},\n{"text": "b"',
        "a.json is not JSON, from line 2",
    ),
    "array with a comma": ("a.json", b'[{"text": "a"},\n]', "not JSON, from line 2"),
    "after an array": ("a.json", b'[{"text": "a"}]\n{"text": "b"}', "line 2 on: more follows"),
    "array of lines": ("a.jsonl", b'[{"text": "a"},\n{"text": "b"}]', "call it .json"),
    "array not UTF-8": ("a.json", b'[{"text": "a"},\n\n{"text": "\xe9"}]', "line 3 .*not UTF-8"),
    "texts in an array": ("a.json", b'["a", "b"]', "record 1 must be a JSON object. Got: str"),
    "old line ends": ("a.jsonl", b'{"text": "a"}\r{"text": "b"}\r', "line 1 is not JSON"),
    "git-lfs": (
        "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha",
        "git lfs pull",
    ),
    "parquet called jsonl": ("a.jsonl", b"PAR1\x15", "is a parquet file: rename"),
    "unpacked on its way": ("a.json.gz", b'{"text": "a"}', "compressed by gzip, but it is not"),
    "empty gzip": ("a.jsonl.gz", b"", "compressed by gzip, but it is not. Got: an empty file"),
    "bzip2": ("a.jsonl.bz2", b"BZh9", r"\.bz2 files are not read"),
    "pickle": ("a.pkl", b"\x80\x04", r"\.pkl files are not read"),
    "arrow": ("a.arrow", b"ARROW1", r"\.arrow files are not read.*load_from_disk"),
    "empty": ("a.json", b"", "holds no documents"),
    "empty array": ("a.json", b" [ ] ", "holds no documents"),
    "nulls": ("a.jsonl", b'{"text": null}\n' * 3, "'text' is null in all of its 3 records"),
}


@pytest.mark.parametrize("case", RAW)
def test_bad_files(tmp_path, case) -> None:
    name, content, message = RAW[case]
    with pytest.raises(DataError, match=message) as error:
        texts(put(tmp_path / name, content))
    assert len(str(error.value)) < 800


def not_utf8() -> pa.Array:
    ends = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0")
    return pa.Array.from_buffers(pa.string(), 2, [None, ends, pa.py_buffer(b"a\xe9")])


COLUMNS = {
    "strings that are not UTF-8": (not_utf8, "row 1 of .*utf-8"),
    "words that are not UTF-8": (lambda: not_utf8().dictionary_encode(), "row 1 of .*utf-8"),
    "bytes that are not UTF-8": (lambda: pa.array([b"a", b"\xff"]), "row 1 of .*not UTF-8"),
    "numbers": (lambda: pa.array([1]), "must hold strings. Got: int64"),
    "objects": (lambda: pa.array([{"a": "b"}]), "must hold strings. Got: struct"),
    "lists": (lambda: pa.array([["a"]]), "must hold strings. Got: list"),
    "nulls": (lambda: pa.array([None], pa.null()), "'text' is null in all of its 1 records"),
    "no rows": (lambda: pa.array([], pa.string()), "holds no documents"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_bad_columns(tmp_path, case) -> None:
    column, message = COLUMNS[case]
    with pytest.raises(DataError, match=message):
        texts(table(column(), tmp_path / "a.parquet"))


def test_columns_of_one_name_and_shards_of_several_schemas(tmp_path) -> None:
    a, b = pa.array(["a"]), pa.array(["b"])
    path = tmp_path / "twice.parquet"
    pq.write_table(pa.Table.from_arrays([a, b], names=["text", "text"]), path)
    with pytest.raises(DataError, match=r"twice\.parquet has 2 columns of the name 'text'"):
        texts(path)
    pq.write_table(pa.Table.from_arrays([a, b, b], names=["text", "x", "x"]), path)
    assert texts(path) == ["a"]
    with pytest.raises(DataError, match="2 columns of the name 'x'"):
        Records([path])
    shards = tmp_path / "shards"
    shards.mkdir()
    table(a.cast(pa.large_string()), shards / "a.parquet")
    pq.write_table(pa.table({"n": [1], "text": b}), shards / "b.parquet")
    assert texts(shards) == ["a", "b"]
    pq.write_table(pa.table({"content": b}), shards / "c.parquet")
    with pytest.raises(DataError, match=r"no column 'text' in .*c\.parquet"):
        texts(shards)


CONTENT = [{"text": f"text {i % 5} ü", "n": i, "list": []} for i in range(40)]
DAMAGED = {
    name: FORMATS[name](CONTENT)
    for name in ("words.parquet", "string.parquet", "lines.jsonl", "pretty.json")
} | {
    "lines.jsonl.gz": gzip.compress(as_lines(CONTENT)),
    "lines.json.zst": zstandard.compress(as_lines(CONTENT)),
}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(DAMAGED)),
    places=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3)), min_size=1, max_size=3),
    cut=st.none() | st.floats(0, 1),
)
def test_damage_is_one_message(tmp_path_factory, name, places, cut) -> None:
    content = bytearray(DAMAGED[name])
    for place, new in places:
        at = int(place * len(content))
        content[at : at + len(new)] = new
    if cut is not None:
        del content[int(cut * len(content)) :]
    path = put(tmp_path_factory.mktemp("damaged") / name, bytes(content))
    with contextlib.suppress(DataError):
        assert all(isinstance(text, str) for text in texts(path))


@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": False}, {"write_page_index": True, "version": "1.0"}]
)
def test_null_counts_are_those_of_pyarrow(tmp_path, options) -> None:
    generator = random.Random(3)
    column = [generator.choice([None, "a", "bb"]) for _ in range(2000)]
    rows = pa.table(
        {
            "n": [None if i % 3 else float(i) for i in range(2000)],
            "text": column,
            "nested": [{"text": None, "list": [i, None]} for i in range(2000)],
            "flag": [i % 2 == 0 for i in range(2000)],
        }
    )
    path = tmp_path / "a.parquet"
    pq.write_table(rows, path, row_group_size=90, **options)
    with pq.ParquetFile(path) as file, path.open("rb") as stream:
        for place, name in ((0, "n"), (1, "text"), (4, "flag")):
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            expected = [group.column(place).statistics.null_count for group in groups]
            assert len(expected) == 23 and null_counts(stream, name) == expected
    pq.write_table(rows, path, write_statistics=False)
    with path.open("rb") as stream:
        assert null_counts(stream, "text") == [None]
        assert null_counts(stream, "no such column") == [None]


FOOTERS = """
import io, sys
from pathlib import Path
import pyarrow, pyarrow.parquet
from refine_jax.base.errors import DataError
from refine_jax.data.records import Records

path, target = Path(sys.argv[1]), io.BytesIO()
table = pyarrow.table({"text": ["a", None, "b"]})
pyarrow.parquet.write_table(table, target, store_schema=False)
content = target.getvalue()
end = len(content) - 8
for place in range(end - int.from_bytes(content[end : end + 4], "little"), end):
    for flip in (1, 48):
        damaged = bytearray(content)
        damaged[place] ^= flip
        path.write_bytes(damaged)
        try:
            records = Records([path], {"text": ""}, text_field="text")
            [records[i] for i in range(min(len(records), 9))]
        except DataError as error:
            assert path.name in str(error)
print("survived")
"""


def test_a_damaged_footer_never_ends_the_process(tmp_path) -> None:
    # pyarrow aborts where it is asked for the statistics of some of these files.
    command = [sys.executable, "-c", FOOTERS, tmp_path / "a.parquet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr[-2000:]


# ---- Compression ----


def test_bombs_are_unpacked_in_small_blocks(tmp_path) -> None:
    zeros = bytes(1 << 20)
    packer = zstandard.ZstdCompressor(19).compressobj()
    bomb = b"".join([*(packer.compress(zeros) for _ in range(100)), packer.flush()])
    assert len(bomb) < 10_000
    path = put(tmp_path / "a.jsonl.zst", bomb)
    sizes = [len(block) for block in blocks(path)]
    assert sum(sizes) == 100 << 20 and max(sizes) <= 16 << 20
    with pytest.raises(DataError, match=r"a\.jsonl\.zst is not UTF-8"):
        texts(path)
    line = b'{"text": "' + b"a" * (65 << 20)
    for name, content in (("a.jsonl.zst", line), ("a.json.gz", b"[" + line)):
        pack = zstandard.compress if name.endswith("zst") else lambda x: gzip.compress(x, 1)
        with pytest.raises(DataError, match=r"line 1 .*64 MiB"):
            texts(put(tmp_path / name, pack(content)))
    with pytest.raises(DataError, match="more than 64 MiB of text"):
        texts(put(tmp_path / "a.txt.zst", zstandard.compress(line)))


def test_a_long_window_is_read(tmp_path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = packer.compress(as_lines(CONTENT)) + packer.flush()
    assert zstandard.get_frame_parameters(content).window_size == 1 << 31
    assert texts(put(tmp_path / "a.jsonl.zst", content)) == [r["text"] for r in CONTENT]


def test_first_bytes_decide_where_names_do_not(tmp_path) -> None:
    lines = as_lines(CONTENT)
    for name, content in (
        ("packed.jsonl", gzip.compress(lines)),
        ("wrong.jsonl.gz", zstandard.compress(lines)),
        ("blob", zstandard.compress(lines)),
        ("c4-train.00000-of-01024", lines),
        ("pretty", FORMATS["pretty.json"](CONTENT)),
        ("objects.jsn", FORMATS["objects.json"](CONTENT)),
        ("rows", FORMATS["string.parquet"](CONTENT)),
    ):
        assert texts(put(tmp_path / name, content)) == [r["text"] for r in CONTENT]
    assert texts(put(tmp_path / "a.txt.gz", gzip.compress(b"\xef\xbb\xbfa\r\n"))) == ["a\r\n"]


def test_json_read_as_a_text_is_said(tmp_path, caplog) -> None:
    texts(put(tmp_path / "a.txt", '{braces} are text, and "colons": too'))
    assert not caplog.text
    assert texts(put(tmp_path / "b.txt", '{"text": "a"}\n')) == ['{"text": "a"}\n']
    assert "b.txt is read as one text, but it begins as JSON does" in caplog.text


def test_no_room_to_unpack_is_said(tmp_path, monkeypatch) -> None:
    path = put(tmp_path / "a.jsonl.gz", gzip.compress(as_lines(CONTENT)))

    def fail():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", fail)
    with pytest.raises(DataError, match=r"cannot unpack .*a\.jsonl\.gz.*No space left.*TMPDIR"):
        texts(path)


# ---- Finding files ----


def test_folders_that_hold_nothing_to_read(tmp_path) -> None:
    with pytest.raises(DataError, match=r"no file at all in data\.source=.*is empty"):
        texts(tmp_path)
    put(tmp_path / "README.md", "about it")
    assert texts(tmp_path) == ["about it"]
    put(tmp_path / "a.py", "code")
    with pytest.raises(DataError, match=r'It holds 2 files: .*1 of \.py.*data\.files="\*\.py"'):
        texts(tmp_path)
    put(tmp_path / "a.csv", "a,b")
    with pytest.raises(DataError, match=r"1 of \.csv.*\.csv files are not read.*pandas"):
        texts(tmp_path)
    saved = tmp_path / "saved"  # by datasets.save_to_disk
    for name in ("dataset_dict.json", "train/state.json", "train/dataset_info.json"):
        put(saved / name, "{}")
    put(saved / "train" / "data-00000-of-00001.arrow", "x")
    for folder in (saved, saved / "train"):
        with pytest.raises(DataError, match=r"1 of \.arrow.*load_from_disk"):
            texts(folder)


def test_what_accompanies_data_is_passed_over(tmp_path, caplog) -> None:
    put(tmp_path / "data" / "train.jsonl", as_lines(CONTENT))
    for name in ("README.md", "LICENSE.txt", "dataset_infos.json", ".cache/x.jsonl"):
        put(tmp_path / name, "{}")
    assert len(texts(tmp_path)) == len(CONTENT) and not caplog.text
    put(tmp_path / "extra.json", "[]")
    put(tmp_path / "more.csv", "a")
    assert len(texts(tmp_path)) == len(CONTENT)
    assert "passed over 1 .json files beside others: extra.json" in caplog.text
    assert "left out 1 files that are not read: more.csv" in caplog.text
    put(tmp_path / "notes.txt", "text")
    with pytest.raises(DataError, match=r'mixes jsonl and text.*data\.files="'):
        texts(tmp_path)


def test_links_are_followed_and_never_in_circles(tmp_path) -> None:
    hub = tmp_path / "datasets--x"  # as the hub's cache has it
    put(hub / "blobs" / "0123", FORMATS["string.parquet"](CONTENT))
    snapshot = hub / "snapshots" / "r1" / "data"
    snapshot.mkdir(parents=True)
    (snapshot / "train.parquet").symlink_to("../../../blobs/0123")
    for path in (hub, snapshot, snapshot / "train.parquet"):
        assert len(texts(path)) == len(CONTENT)
    (hub / "snapshots" / "r2").mkdir()
    with pytest.raises(DataError, match=r"several revisions: set data\.source to .*r1 or .*r2"):
        texts(hub)
    folder = tmp_path / "linked"
    put(tmp_path / "elsewhere" / "b.txt", "b")
    put(folder / "a.txt", "a")
    (folder / "far").symlink_to("../elsewhere")
    for name, target in (("me", "."), ("up", ".."), ("far2", "../elsewhere")):
        (folder / name).symlink_to(target)
    found = [file.name for file in find_files(str(folder), "[ab].txt")]
    assert found == ["a.txt", "b.txt"]
    (folder / "gone.txt").symlink_to("nowhere.txt")
    for path in (folder, folder / "gone.txt", f"{folder}/*.txt"):
        with pytest.raises(DataError, match=r"link .*gone\.txt leads to nowhere\.txt"):
            texts(path)
    (tmp_path / "self.txt").symlink_to("self.txt")
    with pytest.raises(DataError, match=r"leads to self\.txt"):
        texts(tmp_path / "self.txt")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in ("/dev/zero", tmp_path / "pipe.jsonl", tmp_path, f"{tmp_path}/*.jsonl"):
        with pytest.raises(DataError, match="is no regular file"):
            texts(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}/*.nothing", "the pattern matches nothing"),
        ("{}/d*", "the pattern matches folders alone"),
        ("{}/**x", "no glob pattern that works|matches nothing"),
        ("{}/a.txt/b", "no such file or folder"),
        ("x" * 5000, "cannot read data.source=.*name too long"),
        ("s3://bucket/a.jsonl", "data.source=s3://bucket.*: s3:// needs the package s3fs"),
        ("a\0b", "null character"),
    ],
)
def test_paths_that_name_nothing(tmp_path, path, message) -> None:
    put(tmp_path / "a.txt", "a")
    (tmp_path / "d").mkdir()
    with pytest.raises((ConfigError, DataError), match=message):
        texts(path.replace("{}", str(tmp_path)))


def test_globs_pass_over_hidden_files_and_know_the_home_folder(tmp_path, monkeypatch) -> None:
    for name in ("a.txt", ".b.txt", "c/d.txt", ".e/f.txt"):
        put(tmp_path / name, name)
    assert texts(f"{tmp_path}/**/*.txt") == ["a.txt", "c/d.txt"]
    assert texts(f"{tmp_path}/.e/*.txt") == [".e/f.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/c") == texts("~/*/d.txt") == ["c/d.txt"]


def test_what_may_not_be_read_is_named() -> None:
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:  # that of pytest is closed to all others
        folder = Path(name)
        folder.chmod(0o755)
        put(folder / "closed" / "a.txt", "a").parent.chmod(0)
        put(folder / "file.jsonl", "{}").chmod(0)
        put(folder / "over" / "in" / "a.txt", "a").parent.chmod(0)
        try:
            if is_root:  # to whom nothing is closed
                os.seteuid(65534)
            for path in ("closed", "closed/a.txt", "file.jsonl", "over"):
                with pytest.raises(DataError, match=r"cannot read .*Permission denied"):
                    texts(folder / path)
        finally:
            if is_root:
                os.seteuid(0)
            for path in ("closed", "over/in"):
                (folder / path).chmod(0o700)


def test_kinds_follow_from_suffixes(tmp_path) -> None:
    for name, kind in (("A.JSON.GZ", "jsonl"), ("b.Parquet", "parquet"), ("c.md.zst", "text")):
        assert kind_of(tmp_path / name) == kind
    put(tmp_path / "a.JSONL", as_lines(CONTENT))
    put(tmp_path / "b.ndjson.gz", gzip.compress(as_lines(CONTENT)))
    files, kind = files_of(str(tmp_path))
    assert ([file.name for file in files], kind) == (["a.JSONL", "b.ndjson.gz"], "jsonl")


# ---- Prompts, essays and question answering read the same ----


def test_prompts_essays_and_questions_are_read_alike(tmp_path) -> None:
    rows = [{"prompt": "\ufeffone\ud800", "answer": "1"}, {"prompt": "two", "answer": "2"}]
    expected = [("one?", ("1",)), ("two", ("2",))]
    for name in ("a.json", "b.json.gz", "c.jsonl.zst"):
        content = as_lines(rows) if "jsonl" in name else json.dumps(rows).encode()
        path = put(tmp_path / name, _packed(name, content))
        prompts = FilePrompts(data_config(source=str(path)), PromptsConfig())
        assert [prompts[i] for i in range(len(prompts))] == expected
    essay = {"text": "Running text, and more of it."}
    for name, content in (
        ("essay.json", json.dumps(essay)),
        ("essays.jsonl.gz", as_lines([essay])),
        ("essay.txt.gz", essay["text"]),
    ):
        content = content.encode() if isinstance(content, str) else content
        path = put(tmp_path / "essays" / name, _packed(name, content))
        assert load_essays(str(path)).text == essay["text"]
    with pytest.raises(DataError, match=r"no field 'text' in .*wrong\.json"):
        load_essays(str(put(tmp_path / "wrong.json", '{"title": "a"}')))
    answer = {"text": "fox", "answer_start": 0}
    paragraph = {"context": "The fox.", "qas": [{"question": "Who?", "answers": [answer]}]}
    squad = json.dumps({"version": "1.1", "data": [{"title": "A", "paragraphs": [paragraph]}]})
    options = {"length": 600, "samples": 1, "tokenizer": BYTES}
    found = []
    for name in ("dev.json", "dev.JSON.gz"):
        path = put(tmp_path / "squad" / name, _packed(name, squad.encode()))
        found.append(load_examples("ruler_squadqa", data=str(path), **options))
    assert found[0] == found[1] and found[0][0].answers == ("fox",)


def _packed(name: str, content: bytes) -> bytes:
    return PACKERS[Path(name).suffix if Path(name).suffix in PACKERS else ""](content)
