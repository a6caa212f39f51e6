"""The tfds builder and its command: the same tokens as without it, complete or not at all."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from corpora import data_config

from refine_jax.base.errors import DataError
from refine_jax.config import DataConfig
from refine_jax.data import load_corpus, open_source
from refine_jax.data.builders.tokenized_text import tokenized_text_dataset_builder as module
from refine_jax.data.prepare import prepare
from refine_jax.data.tokenizer import ByteTokenizer
from refine_jax.data.tokens import is_token_folder

ROOT = Path(__file__).parents[2]
TEXTS = ["alpha", "", "gämma", *("x" * n for n in range(1, 40))]


@pytest.fixture
def corpus_file(tmp_path: Path) -> str:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def options_of(source: str, **changes) -> DataConfig:
    values = {"tokenizer": "bytes", "sequence_length": 16, "min_tokens": 1, "holdout": 0.1}
    return data_config(source=source, **{**values, **changes})


def batches_of(options: DataConfig, split: str) -> tuple:
    dataset = load_corpus(options).dataset(split, 4)
    batches = [batch for _, batch in zip(range(20), dataset, strict=False)]
    arrays = [np.stack([batch[name] for batch in batches]) for name in ("tokens", "segments")]
    return dataset.statistics, dataset.fingerprint, *arrays


@pytest.mark.parametrize("split", ["train", "validation"])
def test_records_give_the_same_batches_as_their_source(tmp_path, corpus_file, split) -> None:
    options = options_of(corpus_file, add_eos=True, pack=True)
    made = prepare(options, str(tmp_path / "out"))
    assert made["documents"] == len(TEXTS)
    assert made["tokens"] == sum(len(text.encode()) + 2 for text in TEXTS)
    records = options_of(made["folder"], add_eos=True, pack=True)
    *expected_facts, expected_tokens, expected_segments = batches_of(options, split)
    *facts, tokens, segments = batches_of(records, split)
    assert facts == expected_facts  # with the fingerprint, so a run can change over on the way
    np.testing.assert_array_equal(tokens, expected_tokens)
    np.testing.assert_array_equal(segments, expected_segments)


def test_records_are_a_plain_tfds_data_set(tmp_path: Path, corpus_file: str) -> None:
    options = options_of(corpus_file)
    folder = prepare(options, str(tmp_path))["folder"]
    builder = tfds.builder_from_directory(folder)
    source = builder.as_data_source(split="train")
    tokens = [ByteTokenizer().decode(record["tokens"]) for record in source]
    assert tokens == TEXTS
    metadata = dict(builder.info.metadata)
    assert (metadata["tokenizer"], metadata["vocab_size"]) == ("bytes", 259)
    assert (metadata["documents"], metadata["add_bos"]) == (len(TEXTS), True)


def test_order_holds_over_shards(tmp_path: Path, corpus_file: str) -> None:
    options = options_of(corpus_file)
    builder = module.Builder(
        source=open_source(options),
        tokenizer=ByteTokenizer(),
        options=options,
        data_dir=str(tmp_path / "sharded"),
    )
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=3),
        download_dir=str(tmp_path / "downloads"),
    )
    assert builder.info.splits["train"].num_shards == 3
    expected = batches_of(options, "train")
    found = batches_of(options_of(str(builder.data_dir)), "train")
    assert found[:2] == expected[:2]
    np.testing.assert_array_equal(found[2], expected[2])


def test_preparing_again_finds_the_folder(tmp_path: Path, corpus_file: str, monkeypatch) -> None:
    options, out = options_of(corpus_file), str(tmp_path / "out")
    made = prepare(options, out)
    other = prepare(options_of(corpus_file, add_eos=True), out)
    assert other["folder"] != made["folder"]
    monkeypatch.setattr(ByteTokenizer, "encode_batch", None)  # must not be needed again
    assert prepare(options, out) == made


def test_interruption_leaves_nothing_that_looks_complete(
    tmp_path, corpus_file, monkeypatch
) -> None:
    options, out = options_of(corpus_file), tmp_path / "out"

    def interrupted(self, texts, bos, eos):
        yield self.encode("one")
        raise KeyboardInterrupt

    monkeypatch.setattr(ByteTokenizer, "encode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(options, str(out))
    assert not [path for path in out.rglob("*") if path.is_file()]
    monkeypatch.undo()
    assert prepare(options, str(out))["documents"] == len(TEXTS)


def test_a_bad_document_names_its_line(tmp_path: Path) -> None:
    path, out = tmp_path / "bad.jsonl", tmp_path / "out"
    path.write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2 must be a string"):
        prepare(options_of(str(path)), str(out))
    assert not [path for path in out.rglob("*") if path.is_file()]


def test_records_of_another_tokenizer_are_refused(tmp_path: Path, corpus_file: str) -> None:
    folder = prepare(options_of(corpus_file), str(tmp_path))["folder"]
    assert is_token_folder(folder)
    with pytest.raises(DataError, match=r"tokenizer_fingerprint='bytes-259'"):
        load_corpus(options_of(folder, tokenizer="mistral-v1"))
    with pytest.raises(DataError, match="made with add_eos=False"):
        load_corpus(options_of(folder, add_eos=True))
    with pytest.raises(DataError, match="tokenised already"):
        prepare(options_of(folder), str(tmp_path))
    np.savez(Path(folder) / "documents.npz", lengths=np.ones(3), hashes=np.ones(3))
    with pytest.raises(DataError, match="42 documents instead of 3"):
        load_corpus(options_of(folder))


def test_command(tmp_path: Path, corpus_file: str) -> None:
    command = [sys.executable, "-m", "refine_jax.data.prepare", "--tokenizer=bytes"]
    run = {"cwd": ROOT, "capture_output": True, "text": True}
    good = subprocess.run([*command, f"--source={corpus_file}", f"--out={tmp_path}"], **run)
    assert good.returncode == 0, good.stderr
    made = json.loads(good.stdout.splitlines()[-1])
    assert load_corpus(options_of(made["folder"])).dataset("train", 2).statistics.documents == 42
    bad = subprocess.run([*command, "--source=nowhere", f"--out={tmp_path / 'bad'}"], **run)
    assert bad.returncode == 1
    assert bad.stderr.splitlines()[-1].startswith("error: no such file or folder")
    assert not (tmp_path / "bad").exists()
    wrong = [f"--source={corpus_file}", "--text_field=body", f"--out={tmp_path / 'bad'}"]
    bad = subprocess.run([*command, *wrong], **run)
    assert bad.returncode == 1
    assert "set --text_field. Got: " in bad.stderr.splitlines()[-1]


@pytest.fixture
def records(tmp_path: Path, corpus_file: str) -> Path:
    """A folder of tokenised records."""
    return Path(prepare(options_of(corpus_file), str(tmp_path / "out"))["folder"])


def read_all(folder: Path) -> list[list[int]]:
    """Return the tokens of every row."""
    corpus = load_corpus(options_of(str(folder), holdout=0.0, epochs=1))
    return [row.tolist() for batch in corpus.dataset("train", 4) for row in batch["tokens"]]


def test_damaged_records_are_one_message_before_they_are_trained_on(records: Path) -> None:
    (path,) = records.glob("*array_record*")
    whole = path.read_bytes()
    expected = read_all(records)
    written = np.flatnonzero(np.frombuffer(whole, np.uint8))  # the file is padded with zeros
    found = 0
    for place in written[:: len(written) // 20].tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert read_all(records) == expected
        except DataError as error:
            assert "broken tokenised records" in str(error) and "Remove the folder" in str(error)
            assert len(str(error).splitlines()) == 1
            found += 1
    assert found > 10
    path.unlink()
    with pytest.raises(DataError, match="broken tokenised records"):
        read_all(records)


def test_records_that_are_not_as_they_were_written(records: Path) -> None:
    """Whole as files, but of other documents than the index says."""
    with np.load(records / "documents.npz") as old:
        lengths, hashes = old["lengths"], old["hashes"]
    np.savez(records / "documents.npz", lengths=lengths, hashes=np.roll(hashes, 1))
    with pytest.raises(DataError, match=r"document \d+ is not as it was written\. Remove the"):
        read_all(records)
    np.savez(records / "documents.npz", lengths=-lengths, hashes=hashes)
    with pytest.raises(DataError, match="impossible lengths"):
        read_all(records)
    for content in ("[]", "", '{"dropped": [1]}'):
        np.savez(records / "documents.npz", lengths=lengths, hashes=hashes)
        (records / "metadata.json").write_text(content)
        with pytest.raises(DataError):
            read_all(records)


@pytest.mark.parametrize("name", ["dataset_info.json", "metadata.json"])
@pytest.mark.parametrize("content", ["[]", "", '{"documents": "3"}', "[" * 100_000])
def test_a_damaged_folder_is_not_taken_for_a_prepared_one(
    records: Path, tmp_path: Path, corpus_file: str, name: str, content: str
) -> None:
    (records / name).write_text(content)
    with pytest.raises(DataError, match="broken tokenised records") as caught:
        prepare(options_of(corpus_file), str(tmp_path / "out"))
    assert len(str(caught.value).splitlines()) == 1


def test_records_are_read_by_workers(records: Path) -> None:
    expected = batches_of(options_of(str(records)), "train")
    dataset = load_corpus(options_of(str(records), workers=1)).dataset("train", 4)
    iterator = iter(dataset)
    for tokens in expected[2][:3]:
        np.testing.assert_array_equal(next(iterator)["tokens"], tokens)
    iterator.close()


def test_what_was_left_out_is_printed_and_kept(tmp_path: Path, corpus_file: str) -> None:
    made = prepare(options_of(corpus_file, limit_documents=40), str(tmp_path / "out"))
    assert (made["documents"], made["dropped"]) == (40, {"limit_documents": len(TEXTS) - 40})
    fewer = load_corpus(options_of(made["folder"], limit_documents=30)).dataset("train", 4)
    assert fewer.statistics.unread == {"limit_documents": len(TEXTS) - 30}
    assert prepare(options_of(corpus_file), str(tmp_path / "out"))["dropped"] == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("stdlib", "stdlib"),
        ("tfds:wiki40b/en:1.3.0", "wiki40b_en_1_3_0"),
        ("/data/c4/en/*.json.gz", "data_c4_en"),
        ("corpus.jsonl.zst", "corpus"),
        ("/home/me/pile/00.jsonl.zst", "home_me_pile_00"),
        ("~/texts/**/*.md", "texts"),
        (
            "/a/a-really-long-folder-name-of-ours/and_another_long_folder/documents.jsonl",
            "and_another_long_folder_documents",
        ),
        ("/a/supercalifragilistic-expialidocious_longer", "supercalifragilistic_expialidocious"),
        ("/data/" + "w" * 60, "documents"),
        ("**/*", "documents"),
    ],
)
def test_folders_are_named_by_whole_words_of_the_source(source: str, expected: str) -> None:
    assert module.name_of(source) == expected
    assert len(expected) <= 40
