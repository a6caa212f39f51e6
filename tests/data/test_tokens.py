"""A cache of tokens: what it says of its source, and that no damaged one is trained on."""

import json
from pathlib import Path

import numpy as np
import pytest
from corpora import data_config, write_documents

from refine_jax.base.errors import ConfigError, DataError
from refine_jax.config import DataConfig
from refine_jax.data import load_corpus
from refine_jax.data import tokens as tokens_module


def test_records_that_the_reader_left_out_are_counted(tmp_path: Path, monkeypatch) -> None:
    """In memory, and from a cache that was made before."""
    path = write_documents(tmp_path, ["abc", "defg"])
    read = tokens_module.open_source

    def with_nulls(options):
        source = read(options)
        source.dropped = {"null": 3}
        return source

    monkeypatch.setattr(tokens_module, "open_source", with_nulls)
    for cache in ("", str(tmp_path / "cache"), str(tmp_path / "cache")):
        options = data_config(
            source=str(path), tokenizer="bytes", sequence_length=8, min_tokens=1, cache_dir=cache
        )
        statistics = load_corpus(options).dataset("train", 2).statistics
        assert statistics.unread == {"null": 3}
        assert "3 without text" in statistics.summary()


@pytest.fixture
def cache(tmp_path: Path) -> tuple[DataConfig, Path]:
    """Options, and the cache folder that they made: 300 documents, 6,450 tokens."""
    texts = [chr(97 + i % 26) * (i % 30 + 1) + str(i) for i in range(300)]
    options = data_config(
        source=str(write_documents(tmp_path, texts)),
        tokenizer="bytes",
        sequence_length=8,
        min_tokens=1,
        cache_dir=str(tmp_path / "cache"),
    )
    load_corpus(options)
    (folder,) = (tmp_path / "cache").iterdir()
    return options, folder


def test_a_flipped_byte_of_a_cache_is_found(cache) -> None:
    options, folder = cache
    for name in ("tokens.bin", "documents.npz"):
        whole = (folder / name).read_bytes()
        for place in range(0, len(whole), len(whole) // 60):
            changed = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
            (folder / name).write_bytes(changed)
            try:
                same = load_corpus(options)
            except DataError as error:
                assert "token cache" in str(error) and "Remove the folder" in str(error)
                assert len(str(error).splitlines()) == 1
            else:  # a byte of a zip archive that says nothing, such as a date
                assert name == "documents.npz"
                (folder / name).write_bytes(whole)
                right = load_corpus(options)
                assert same.dataset("train", 1).fingerprint == right.dataset("train", 1).fingerprint
        (folder / name).write_bytes(whole)
    load_corpus(options)


def test_a_flipped_byte_of_a_cache_without_checksums_is_found(cache) -> None:
    options, folder = cache
    meta = json.loads((folder / "meta.json").read_text())
    meta = {name: meta[name] for name in ("dtype", "tokenizer", "source")}  # as before
    (folder / "meta.json").write_text(json.dumps(meta))
    load_corpus(options)
    whole = bytearray((folder / "tokens.bin").read_bytes())
    whole[2000] ^= 1
    (folder / "tokens.bin").write_bytes(whole)
    with pytest.raises(DataError, match=r"document \d+ is not as it was written"):
        load_corpus(options)


def _arrays(folder: Path, **changes) -> None:
    with np.load(folder / "documents.npz") as old:
        arrays = {name: old[name] for name in old.files}
    arrays |= {name: change(arrays[name]) for name, change in changes.items()}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    np.savez(folder / "documents.npz", **arrays)


def _meta(folder: Path, **changes) -> None:
    meta = json.loads((folder / "meta.json").read_text()) | changes
    (folder / "meta.json").write_text(json.dumps(meta))


DAMAGE = {
    "shorter": lambda f: (f / "tokens.bin").write_bytes((f / "tokens.bin").read_bytes()[:-2]),
    "half a token": lambda f: (f / "tokens.bin").write_bytes((f / "tokens.bin").read_bytes()[:-1]),
    "no tokens": lambda f: (f / "tokens.bin").unlink(),
    "no index": lambda f: (f / "documents.npz").unlink(),
    "no meta": lambda f: (f / "meta.json").unlink(),
    "objects": lambda f: _meta(f, dtype="O"),
    "structure": lambda f: _meta(f, dtype="i4,i4"),
    "bogus dtype": lambda f: _meta(f, dtype="<u3"),
    "signed dtype": lambda f: _meta(f, dtype="<i2"),
    "dtype of a list": lambda f: _meta(f, dtype=["<u2"]),
    "no dtype": lambda f: _meta(f, dtype=None),
    "checksum of text": lambda f: _meta(f, crc32="1"),
    "wrong checksum": lambda f: _meta(f, crc32=1),
    "counts of text": lambda f: _meta(f, dropped={"null": "3"}),
    "counts of a list": lambda f: _meta(f, dropped=[3]),
    "meta of a list": lambda f: (f / "meta.json").write_text("[]"),
    "meta of nothing": lambda f: (f / "meta.json").write_text(""),
    "nested meta": lambda f: (f / "meta.json").write_text("[" * 100_000),
    "index of text": lambda f: (f / "documents.npz").write_text("text"),
    "empty index": lambda f: (f / "documents.npz").write_bytes(b""),
    "a single array": lambda f: np.save((f / "documents.npz").open("wb"), np.arange(3)),
    "pickled": lambda f: _arrays(f, lengths=lambda x: x.astype(object)),
    "no lengths": lambda f: _arrays(f, lengths=lambda x: None),
    "no hashes": lambda f: _arrays(f, hashes=lambda x: None),
    "floats": lambda f: _arrays(f, lengths=lambda x: x.astype(np.float64)),
    "matrix": lambda f: _arrays(f, lengths=lambda x: x[None], hashes=lambda x: x[None]),
    "scalar": lambda f: _arrays(f, lengths=lambda x: x[0], hashes=lambda x: x[0]),
    "negative": lambda f: _arrays(f, lengths=lambda x: np.r_[x[0] + x[1] + 9, -9, x[2:]]),
    "overflow": lambda f: _arrays(f, lengths=lambda x: np.r_[x[0], [1 << 62] * 4, x[5:]]),
    "moved ends": lambda f: _arrays(f, lengths=lambda x: np.r_[x[0] + 1, x[1] - 1, x[2:]]),
    "other hashes": lambda f: _arrays(f, hashes=lambda x: x + np.uint64(1)),
    "fewer documents": lambda f: _arrays(
        f, lengths=lambda x: np.r_[x[:-2], x[-2:].sum()], hashes=lambda x: x[:-1]
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_one_message(cache, damage: str) -> None:
    options, folder = cache
    DAMAGE[damage](folder)
    with pytest.raises(DataError, match=r"broken token cache .* Remove the folder") as caught:
        load_corpus(options)
    assert len(str(caught.value).splitlines()) == 1


def test_cache_at_home_and_cache_that_cannot_be_written(cache, tmp_path, monkeypatch) -> None:
    options, folder = cache
    monkeypatch.setenv("HOME", str(tmp_path))
    load_corpus(data_config(**{**vars(options), "cache_dir": "~/other"}))
    assert [path.name for path in (tmp_path / "other").iterdir()] == [folder.name]
    (tmp_path / "file").write_text("")
    for wrong in (str(tmp_path / "file"), str(tmp_path / "file" / "cache"), "/proc/cache"):
        with pytest.raises(DataError, match=r"cannot write data\.cache_dir="):
            load_corpus(data_config(**{**vars(options), "cache_dir": wrong}))
    with pytest.raises(ConfigError, match=r"data\.cache_dir must be a path of a file system"):
        load_corpus(data_config(**{**vars(options), "cache_dir": "s3://bucket/cache"}))
