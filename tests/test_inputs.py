"""Small files as people have them: each is read rightly, or refused in one message.

The files are not part of the repository: they are read from ../shared/inputs, or from the folder in
REFINE_INPUTS, and tests that need one are skipped where it is absent. What is right was worked out
from the files with other readers (json, gzip, pyarrow), not with ours.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from corpora import data_config
from goldens import INPUTS, require_input
from safetensors.numpy import load_file
from tiny_runs import comparable, tiny_run

from refine_jax import generate
from refine_jax.base.errors import CheckpointError, DataError, UserError
from refine_jax.checkpoint import load_model, read_hf
from refine_jax.config import Config, PromptsConfig
from refine_jax.convert import main as convert
from refine_jax.data import load_tokenizer, open_source
from refine_jax.data.prompts import load_prompts
from refine_jax.data.tasks import load_examples
from refine_jax.evaluation.metrics import METRICS, score
from refine_jax.main import execute
from refine_jax.phases import evaluate, midtrain

BYTES = load_tokenizer("bytes")


def texts(path: Path | str) -> list[str]:
    source = open_source(data_config(source=str(path)))
    return [source[i] for i in range(len(source))]


def lines(path: Path) -> list[str]:
    """The texts of JSON lines, by Python's own reader."""
    records = path.read_text("utf-8-sig").splitlines()
    found = [json.loads(line)["text"] for line in records if line.strip()]
    return [text for text in found if text is not None]


def examples(path: Path, task: str = "hotpotqa"):
    return load_examples(task, data=str(path), tokenizer=BYTES)


# ---- Corpora ----


def test_saved_truncation_and_padding_cut_and_pad_nothing():
    tokenizer = load_tokenizer(require_input("tok_truncation_padding"))
    vocabulary = json.loads((INPUTS / "tok_truncation_padding/tokenizer.json").read_text())
    vocabulary = vocabulary["model"]["vocab"]
    # What the saved pre-tokenizer, Whitespace, is documented to match; unknown words are <unk>.
    words = [re.findall(r"\w+|[^\w\s]+", text) for text in lines(require_input("bom.jsonl"))]
    expected = [[1, *(vocabulary.get(word, 0) for word in of_one)] for of_one in words]
    assert len(expected) == 24 and {len(ids) for ids in expected} == {64}
    found = tokenizer.encode_batch(texts(INPUTS / "bom.jsonl"))
    assert [ids.tolist() for ids in found] == expected
    assert tokenizer.encode("the quick " * 50, bos=False).tolist() == [3, 4] * 50


@pytest.mark.parametrize("name", ["train.json", "train.ndjson", "crlf.jsonl", "bom.jsonl"])
def test_json_lines_of_any_name(name):
    assert texts(require_input(name)) == lines(INPUTS / name)


def test_a_json_array():
    expected = [record["text"] for record in json.loads(require_input("array.json").read_text())]
    assert texts(INPUTS / "array.json") == expected


def test_csv_is_read_or_refused():
    import csv

    path = require_input("train.csv")
    with path.open(newline="") as file:
        expected = [row["text"] for row in csv.DictReader(file)]
    try:
        found = texts(path)
    except DataError as error:
        assert "csv" in str(error)
    else:
        assert found == expected


def test_compressed_json_of_c4():
    folder = require_input("c4")
    (packed,) = folder.glob("*.gz")
    content = gzip.decompress(packed.read_bytes()).decode().splitlines()
    assert texts(folder) == [json.loads(line)["text"] for line in content]


def test_garbage_after_the_last_member_is_left_out():
    path = require_input("members_garbage.jsonl.gz")
    members = subprocess.run(["gzip", "-dc", path], capture_output=True, check=False).stdout
    assert texts(path) == [json.loads(line)["text"] for line in members.decode().splitlines()]


def test_zeros_after_the_last_member():
    content = gzip.decompress(require_input("members_zeros.jsonl.gz").read_bytes()).decode()
    assert texts(INPUTS / "members_zeros.jsonl.gz") == [
        json.loads(line)["text"] for line in content.splitlines()
    ]


def test_nulls_are_left_out_of_every_format_and_counted():
    expected = lines(require_input("null_text.jsonl"))
    assert texts(INPUTS / "null_text.jsonl") == expected
    pairs = []
    for name in ("null_text.jsonl", "null_text.parquet"):
        source = open_source(data_config(source=str(require_input(name))))
        assert "" not in [source[i] for i in range(len(source))]
        pairs.append(sum(source.dropped.values()))
    assert pairs[0] == 1 and pairs[1] >= 1


def test_a_byte_order_mark_is_no_text():
    assert texts(require_input("bom.txt")) == [require_input("bom.txt").read_text("utf-8-sig")]
    plain, marked = require_input("prompt_plain.txt"), require_input("prompt_bom.txt")
    options = generate.command().parse(["--checkpoint=x", f"--prompt_file={marked}"])
    assert generate.read_prompts(options) == [plain.read_text()]


@pytest.mark.parametrize("name", ["large_string.parquet", "dictionary.parquet", "hf_repo"])
def test_parquet(name):
    import pyarrow.parquet as pq

    path = require_input(name)
    file = path if path.is_file() else next(path.rglob("*.parquet"))
    assert texts(path) == pq.read_table(file).column("text").to_pylist()


def test_binary_columns_are_read_as_utf8_or_refused():
    import pyarrow.parquet as pq

    path = require_input("binary.parquet")
    expected = [value.decode() for value in pq.read_table(path).column("text").to_pylist()]
    try:
        assert texts(path) == expected
    except DataError as error:
        assert "binary" in str(error) and "text" in str(error)


def test_lines_and_bytes_that_cannot_be_read_are_named():
    with pytest.raises(DataError, match="line 1"):
        texts(require_input("two_on_a_line.jsonl"))
    wrong = require_input("bad_utf8.jsonl").read_bytes().splitlines()
    (at,) = [i for i, line in enumerate(wrong, 1) if not _decodes(line)]
    with pytest.raises(DataError, match=f"line {at}"):
        texts(INPUTS / "bad_utf8.jsonl")


def _decodes(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_unicode_line_separators_end_no_line():
    expected = [
        json.loads(x)["text"] for x in require_input("u2028.jsonl").read_text().split("\n") if x
    ]
    assert texts(INPUTS / "u2028.jsonl") == expected and "\u2028" in expected[0]
    prompts = [
        json.loads(x) for x in require_input("eval_u2028.jsonl").read_text().split("\n") if x
    ]
    found = examples(INPUTS / "eval_u2028.jsonl")
    assert [example.prompt for example in found] == [row["prompt"] for row in prompts]


def test_several_frames_of_zstd():
    zstandard = pytest.importorskip("zstandard")
    with zstandard.open(require_input("pzstd.jsonl.zst"), "rb") as file:  # reads all frames
        content = file.read()
    reader = zstandard.ZstdDecompressor().stream_reader(
        require_input("pzstd.jsonl.zst").open("rb"), read_across_frames=True
    )
    content = reader.read()
    expected = [json.loads(line)["text"] for line in content.decode().splitlines()]
    assert texts(INPUTS / "pzstd.jsonl.zst") == expected


def training(source: Path | str, **data):
    changes = {
        "data": {"source": str(source), "sequence_length": 48} | data,
        "train": {"steps": 1, "batch_size": 2, "eval_batches": 1, "checkpoint_every": 1},
    }
    return tiny_run("midtrain", changes)


@pytest.mark.parametrize("twins", [False, True])
def test_few_documents_are_split_by_rows(tmp_path, twins):
    source = require_input("tinyshakespeare.txt")
    if twins:
        source = tmp_path / "twins"
        source.mkdir()
        for name in ("twins_a.txt", "twins_b.txt"):
            shutil.copy(require_input(name), source)
    config = Config.from_dict(training(source))
    parts = midtrain.prepare(config, tmp_path / "run")
    text = b"\x00" + (require_input("twins_a.txt") if twins else source).read_bytes()
    pieces = [tuple(text[at : at + 48]) for at in range(0, len(text), 48)]
    seen = [
        [tuple(row) for batch in dataset for row in batch["tokens"].tolist() if max(row) < 258]
        for dataset in (_one_epoch(parts.training), parts.held_out)
    ]
    seen = [[(row if row[0] != 256 else (0, *row[1:])) for row in rows] for rows in seen]
    count = parts.training.rows
    assert 0 < count < len(pieces) and sorted(seen[0][:count]) == sorted(pieces[:count])
    assert seen[1] and all(row in pieces[count:] for row in seen[1])


def _one_epoch(dataset):
    batches = iter(dataset)
    for _ in range(-(-dataset.rows // dataset.batch_size)):
        yield next(batches)
    batches.close()


def test_no_holdout_is_no_evaluation(tmp_path, capsys):
    values = training(require_input("tinyshakespeare.txt"), holdout=0.0, limit_documents=1)
    assert execute(values, str(tmp_path / "run")) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["steps"] == 1 and results["validation_loss_after"] is None


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(require_input("corpus"), tmp_path / "corpus")
    config = Config.from_dict(training("~/corpus"))
    assert midtrain.prepare(config, tmp_path / "run").training.rows > 0


def test_a_moved_corpus_goes_on_bit_for_bit(tmp_path):
    shutil.copytree(require_input("corpus"), tmp_path / "old")
    values = training(tmp_path / "old")
    values.train.update(steps=4, checkpoint_every=2)
    assert execute(values, str(tmp_path / "whole")) == 0
    values.train.steps = 2
    assert execute(values, str(tmp_path / "run")) == 0
    shutil.move(tmp_path / "old", tmp_path / "new")
    values.data.source, values.train.steps = str(tmp_path / "new"), 4
    assert execute(values, str(tmp_path / "run")) == 0
    steps = [
        [record for record in comparable(tmp_path / name) if record["step"] in (3, 4)]
        for name in ("whole", "run")
    ]
    assert steps[0] == steps[1] and len(steps[0]) == 2
    (tmp_path / "new" / "00.txt").write_text("another text, which is no longer that of the run")
    values.train.steps = 6
    assert execute(values, str(tmp_path / "run")) == 1


# ---- Tokenizers ----


def test_special_tokens_in_a_text_are_text():
    tokenizer = load_tokenizer(require_input("tok_plain"))
    ids = tokenizer.encode("the fox </s> dog", bos=False).tolist()
    assert tokenizer.eos_id == 2 and 2 not in ids and 1 not in ids
    assert ids[:2] == [3, 6]
    (batch,) = tokenizer.encode_batch(["the fox </s> dog"], bos=False)
    assert batch.tolist() == ids


def test_every_end_of_a_list_ends_a_generation():
    tokenizer = load_tokenizer(require_input("tok_eos_list"))
    vocabulary = json.loads((INPUTS / "tok_eos_list/tokenizer.json").read_text())["model"]["vocab"]
    assert set(tokenizer.end_ids) == {vocabulary["</s>"], vocabulary["dog"]}
    assert tokenizer.eos_id == vocabulary["</s>"]


def test_a_mark_in_the_files_of_a_tokenizer():
    tokenizer = load_tokenizer(require_input("tok_bom"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_tokenizers_that_are_not_there_yet_are_called_what_they_are():
    with pytest.raises(UserError, match=r"git.lfs"):
        load_tokenizer(require_input("tok_lfs"))
    with pytest.raises(UserError, match=r"tekken\.json"):
        load_tokenizer(require_input("tok_tekken"))


# ---- Models ----


@pytest.mark.parametrize("name", ["gdn_plain", "gdn_bom", "gdn_with_D", "gdn_index_sub"])
def test_model_folders_convert(tmp_path, capsys, name):
    source = require_input(name)
    assert convert(["from_hf", str(source), str(tmp_path / "out")]) == 0
    weights = next(source.rglob("*.safetensors"))
    tensors = load_file(weights)
    params = load_model(tmp_path / "out").params
    found = params["layers"]["attn"]["A_log"][0]
    np.testing.assert_array_equal(found, tensors["model.layers.0.attn.A_log"])
    if name == "gdn_with_D":
        assert "attn.D (" in capsys.readouterr().out


def test_compiled_models_convert_or_say_why():
    try:
        read_hf(require_input("gdn_orig_mod"))
    except CheckpointError as error:
        assert "_orig_mod" in str(error) and str(error).count("\n") <= 2


def test_models_that_cannot_be_read_are_called_what_they_are(tmp_path, capsys):
    with pytest.raises(CheckpointError, match=r"git.lfs"):
        read_hf(require_input("gdn_lfs"))
    assert convert(["from_hf", str(require_input("gdn_tekken")), str(tmp_path / "out")]) == 0
    output = capsys.readouterr()
    assert "tekken.json" in output.out + output.err
    shutil.copytree(require_input("gdn_nan_json"), tmp_path / "nan")
    config = tmp_path / "nan" / "config.json"
    config.write_text(config.read_text().replace("{", '{"norm_eps": NaN,', 1))
    assert convert(["from_hf", str(tmp_path / "nan"), str(tmp_path / "not")]) == 1
    error = capsys.readouterr().err
    assert "config.json" in error and "NaN" in error and "Traceback" not in error


@pytest.mark.parametrize("name", ["gdn_tied_missing", "gdn_tied_flag_lost"])
def test_tied_embeddings(name):
    source = require_input(name)
    tied = json.loads((source / "config.json").read_text()).get("tie_word_embeddings")
    if tied:
        assert "lm_head" not in read_hf(source).params
    else:
        with pytest.raises(CheckpointError, match=r"lm_head\.weight: missing"):
            read_hf(source)


# ---- Evaluation sets, prompts and answers ----


@pytest.mark.parametrize("metric", [name for name in METRICS if name.startswith("ruler")])
def test_an_empty_reference_is_never_matched(metric):
    assert score(metric, "wrong", [""]) == 0
    assert score(metric, "wrong", ["", "wrong"]) <= 1


@pytest.mark.parametrize("name", ["eval_bom.jsonl", "eval_ok.jsonl", "eval_ok.jsonl.gz"])
def test_evaluation_sets_in_every_form(name):
    found = examples(require_input(name))
    expected = [json.loads(line) for line in (INPUTS / "eval_ok.jsonl").read_text().splitlines()]
    assert [example.prompt for example in found] == [row["prompt"] for row in expected]
    assert {example.answers for example in found} == {("fox",)}


def test_answers_of_every_type():
    assert {e.answers for e in examples(require_input("eval_int_answers.jsonl"))} == {("42",)}
    null = examples(require_input("eval_answers_null_answer_set.jsonl"))
    assert {e.answers for e in null} == {("fox",)}
    try:
        nested = {e.answers for e in examples(require_input("eval_nested_answers.jsonl"))}
    except DataError as error:
        assert "eval_nested_answers.jsonl" in str(error) and "answers" in str(error)
    else:
        assert nested == {("fox", "the fox")}


@pytest.mark.parametrize("name", ["eval_metadata_dict.jsonl", "eval_metadata_text.jsonl"])
def test_metadata_is_read_or_refused(name):
    try:
        found = examples(require_input(name))
    except DataError as error:
        assert "metadata" in str(error) and name in str(error)
    else:
        assert len(found) == 3
        json.dumps(dict(found[0].metadata))


def test_a_line_that_is_no_object_is_named():
    with pytest.raises(DataError, match=r"eval_list_line\.jsonl.*line 1|line 1"):
        examples(require_input("eval_list_line.jsonl"))


def test_half_an_emoji(tmp_path):
    (example,) = examples(require_input("eval_surrogate.jsonl"))
    assert example.prompt == "emoji ? cut in half. Answer:"
    changes = {
        "evaluate": {"tasks": "hotpotqa", "data": str(INPUTS / "eval_surrogate.jsonl")},
        "generation": {"max_new_tokens": 2},
    }
    results = evaluate.run(Config.from_dict(tiny_run("evaluate", changes)), tmp_path / "run")
    assert results["samples"] == 1


def prompts(name: str):
    options = data_config(source=str(require_input(name)), sequence_length=64, holdout=0.2)
    return load_prompts(options, PromptsConfig(max_answer_tokens=8), BYTES)


def test_answers_of_prompts():
    rows = [
        json.loads(line)
        for line in require_input("prompts_int_answer.jsonl").read_text().splitlines()
    ]
    assert prompts("prompts_int_answer.jsonl").answers == [(str(row["answer"]),) for row in rows]
    try:
        found = prompts("prompts_squad_answer.jsonl").answers
    except DataError as error:
        assert "answer" in str(error)
    else:
        assert set(found) == {("a",)}
    with pytest.raises(DataError, match=r"prompt.*message|message.*prompt|prompt.*string"):
        prompts("prompts_messages.jsonl")


# ---- Commands ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of bytes, converted."""
    folder = tmp_path_factory.mktemp("model") / "gdn"
    assert convert(["from_hf", str(require_input("gdn_plain")), str(folder)]) == 0
    return folder


def test_prompts_and_output_that_are_not_utf8(checkpoint):
    command = [sys.executable, "-m", "refine_jax.generate", f"--checkpoint={checkpoint}"]
    command += ["--tokenizer=bytes", "--max_new_tokens=12", "--json", "--prompt", b"caf\xe9"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    record = json.loads(done.stdout.decode("ascii").splitlines()[-1])
    assert record["tokens_read"] == 1 + len("caf?")


def test_tasks_of_lm_eval(checkpoint, capsys):
    pytest.importorskip("lm_eval")
    from refine_jax.lm_harness import main

    folder = require_input("lmtasks")
    where = Path(__file__).parents[1]
    if not (where.parent / "shared" / "inputs" / "lmtasks").exists():
        pytest.skip("the tasks name their data as ../shared/inputs")
    before = Path.cwd()
    os.chdir(where)
    try:
        tasks = ["local_*roll2", "local_penalty", "local_ifeval_like"]
        for task in tasks:
            options = [f"--checkpoint={checkpoint}", "--tokenizer=bytes", f"--tasks={task}"]
            assert main([*options, f"--include_path={folder}", "--limit=2"]) == 0, task
            results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
            names = {task.replace("*", "")}
            assert set(results) == names
    finally:
        os.chdir(before)
