"""Corpora of token lists, their rows read back, and the inputs that people really have."""

import itertools
import json
from pathlib import Path

import numpy as np

from refine_jax.config import DataConfig
from refine_jax.data.pipeline import Corpus, Dataset, load_corpus
from refine_jax.data.tokenizer import ByteTokenizer
from refine_jax.data.tokens import IndexBuilder, TokenStore


def data_config(**fields) -> DataConfig:
    """The settings of the data; nothing is held out where a test does not say so."""
    return DataConfig(**{"holdout": 0.0} | fields)


def make_dataset(options: DataConfig, split: str, batch_size: int) -> Dataset:
    """One split of the documents of `options`."""
    return load_corpus(options).dataset(split, batch_size)


def corpus_of(
    documents: list[list[int]], *, seed: int = 0, validation_rows: int | None = None, **options
) -> Corpus:
    """Return a corpus of token lists, without files."""
    index = IndexBuilder()
    for document in documents:
        index.add(np.array(document, np.int32))
    tokens = np.array([token for document in documents for token in document], np.uint16)
    store = TokenStore(tokens, index.finish())
    return Corpus(
        data_config(**{"min_tokens": 1, **options}),
        store,
        ByteTokenizer(),
        seed=seed,
        validation_rows=validation_rows,
    )


def numbered(lengths: list[int]) -> list[list[int]]:
    """Return documents of these lengths whose tokens all differ."""
    counter = itertools.count()
    return [[next(counter) for _ in range(length)] for length in lengths]


def collect(dataset, count: int | None = None) -> list[dict[str, np.ndarray]]:
    iterator = iter(dataset)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def segments_of(batches) -> list[list[int]]:
    """Return the tokens of every segment of every row, and check the form of the rows."""
    found = []
    for batch in batches:
        for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
            used = np.count_nonzero(segments)
            assert np.all(segments[used:] == 0)
            assert np.all(tokens[used:] == ByteTokenizer.pad_id)
            assert np.all(np.isin(np.diff(segments[:used]), (0, 1)))
            for segment in range(1, 1 + segments.max(initial=0)):
                found.append(tokens[segments == segment].tolist())
    return found


def assert_equal(left, right) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == {"tokens", "segments"}
        for name in a:
            assert a[name].dtype == np.int32
            np.testing.assert_array_equal(a[name], b[name])


def expected_pieces(documents, size, chunking="all", min_remainder=1) -> list[list[int]]:
    """Return the pieces of documents, by the shortest code that does it."""
    pieces = []
    for document in documents:
        cut = [document[i : i + size] for i in range(0, len(document), size)]
        if chunking == "first":
            cut = cut[:1]
        elif len(cut) > 1 and len(cut[-1]) < min_remainder:
            cut.pop()
        pieces += cut
    return pieces


def write_documents(folder: Path, texts: list[str]) -> Path:
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def tokens_of(batches) -> list[list[int]]:
    """Return the tokens of each row that holds some, without padding."""
    return [
        tokens[segments != 0].tolist()
        for batch in batches
        for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True)
        if segments.any()
    ]
