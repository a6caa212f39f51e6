"""Documents as tokens: tokenised once, then read by index.

Two kinds, both a `TokenSource`: `TokenStore` (a flat array in memory or memory-mapped from a cache
folder) and `TokenRecords` (ArrayRecord written by `refine_jax.data.prepare`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from absl import logging

from refine_jax.base.errors import DataError
from refine_jax.data.options import DataOptions
from refine_jax.data.sources import TextSource, is_tfds_folder, open_source
from refine_jax.data.tokenizer import Tokenizer

FORMAT = 1  # of the cache folders and of the iterator fingerprints; raise it when they change
BATCH_CHARACTERS = 4_000_000  # text tokenised at a time: enough to keep all threads busy
META_FILE, TOKENS_FILE, INDEX_FILE = "meta.json", "tokens.bin", "documents.npz"


class TokenSource(Protocol):
    """Tokenised documents by index.

    Attributes:
        lengths: tokens of each document, [N] int64.
        hashes: equal for documents with equal tokens, [N] uint64.
        fingerprint: equal for equal tokens in equal order.
    """

    lengths: np.ndarray
    hashes: np.ndarray
    fingerprint: str

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """Return tokens start .. start + length of a document, [length] integers."""


@dataclass(frozen=True)
class DocumentIndex:
    """What is known of each document besides its tokens.

    Attributes:
        lengths: tokens of each document, [N] int64.
        hashes: equal for documents with equal tokens, [N] uint64.
    """

    lengths: np.ndarray
    hashes: np.ndarray

    @property
    def fingerprint(self) -> str:
        """Equal for equal documents in equal order."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(np.ascontiguousarray(self.lengths, "<i8"))
        digest.update(np.ascontiguousarray(self.hashes, "<u8"))
        return digest.hexdigest()

    def save(self, folder: str | os.PathLike) -> None:
        """Write the index into `folder`."""
        np.savez(Path(folder) / INDEX_FILE, lengths=self.lengths, hashes=self.hashes)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> DocumentIndex:
        """Read the index in `folder`; raises DataError if it is missing or broken."""
        path = Path(folder) / INDEX_FILE
        try:
            with np.load(path) as arrays:
                return cls(arrays["lengths"], arrays["hashes"])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"cannot read {path} ({error}); remove the folder to make it again"
            ) from error


class IndexBuilder:
    """Collects a `DocumentIndex` document by document."""

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._hashes: list[int] = []

    def add(self, tokens: np.ndarray) -> None:
        """Add a document, [T] int32."""
        content = np.ascontiguousarray(tokens, "<i4")
        digest = hashlib.blake2b(content, digest_size=8).digest()
        self._lengths.append(len(tokens))
        self._hashes.append(int.from_bytes(digest, "little"))

    def finish(self) -> DocumentIndex:
        """Return the index of all documents."""
        return DocumentIndex(np.array(self._lengths, np.int64), np.array(self._hashes, np.uint64))


class TokenStore:
    """Tokens of all documents in one array.

    Args:
        tokens: all documents, one after the other, [sum of lengths] unsigned integers.
        index: of the documents.
        folder: where `tokens` is mapped from; processes that read ahead map it again instead of
            receiving a copy.
    """

    def __init__(self, tokens: np.ndarray, index: DocumentIndex, folder: str | None = None) -> None:
        self.lengths, self.hashes = index.lengths, index.hashes
        self.fingerprint = index.fingerprint
        self._index, self._folder = index, folder
        self._tokens = tokens
        self._starts = np.concatenate([[0], np.cumsum(index.lengths)])

    @classmethod
    def open(cls, folder: str | os.PathLike) -> TokenStore:
        """Map a cache folder; raises DataError if it is broken."""
        folder = Path(folder)
        index = DocumentIndex.load(folder)
        try:
            meta = json.loads((folder / META_FILE).read_text("utf-8"))
            tokens = np.empty(0, meta["dtype"])
            if (folder / TOKENS_FILE).stat().st_size:  # an empty file cannot be mapped
                tokens = np.memmap(folder / TOKENS_FILE, dtype=meta["dtype"], mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"broken token cache {folder} ({error}); remove it to make it again"
            ) from error
        if len(tokens) != index.lengths.sum():
            raise DataError(
                f"broken token cache {folder}: {len(tokens)} tokens instead of "
                f"{index.lengths.sum()}; remove it to make it again"
            )
        return cls(tokens, index, str(folder))

    def __reduce__(self) -> tuple:
        """Pickle the folder's name where there is one."""
        if self._folder is not None:
            return TokenStore.open, (self._folder,)
        return TokenStore, (self._tokens, self._index)

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """Return tokens start .. start + length of a document, [length] unsigned integers."""
        first = self._starts[document] + start
        return self._tokens[first : first + length]


class TokenRecords:
    """A folder of tokenised ArrayRecord, made by `refine_jax.data.prepare`."""

    def __init__(self, folder: str, tokenizer: Tokenizer, options: DataOptions) -> None:
        """Open the folder; raises DataError if it is broken or made with another tokenizer."""
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder_from_directory(folder)
            self._records = builder.as_data_source(split="train")
        except Exception as error:  # tfds raises many kinds
            raise DataError(f"cannot read the tokenised records in {folder}: {error}") from error
        index = DocumentIndex.load(folder)
        if len(self._records) != len(index.lengths):
            raise DataError(
                f"broken tokenised records in {folder}: {len(self._records)} documents instead of "
                f"{len(index.lengths)}; prepare them again"
            )
        made = builder.info.metadata
        for name, wanted in (
            ("tokenizer_fingerprint", tokenizer.fingerprint),
            ("add_bos", options.add_bos),
            ("add_eos", options.add_eos),
        ):
            if made.get(name) != wanted:
                raise DataError(
                    f"the records in {folder} were made with {name}={made.get(name)!r} (tokenizer "
                    f"{made.get('tokenizer')!r}), but the run asks for {wanted!r}: change the data "
                    "options or prepare the records again"
                )
        limit = options.limit_documents
        index = DocumentIndex(index.lengths[:limit], index.hashes[:limit])
        self.lengths, self.hashes = index.lengths, index.hashes
        self.fingerprint = index.fingerprint

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """Return tokens start .. start + length of a document, [length] int32."""
        return self._records[document]["tokens"][start : start + length]


def is_token_folder(path: str) -> bool:
    """Say whether `refine_jax.data.prepare` wrote the folder `path`."""
    return is_tfds_folder(path) and os.path.isfile(os.path.join(path, INDEX_FILE))


def open_tokens(options: DataOptions, tokenizer: Tokenizer) -> TokenSource:
    """Return the documents of `options.source` as tokens.

    They are tokenised once: kept in memory, or in `options.cache_dir` in a folder whose name
    depends on the source's files, the tokenizer and the options that change tokens. A cache folder
    appears complete or not at all, and several processes may make it at the same time.

    Raises:
        DataError: as `open_source`, or the cache is broken.
    """
    if is_token_folder(options.source):
        return TokenRecords(options.source, tokenizer, options)
    source = open_source(options)
    if not options.cache_dir:
        tokens, builder = [], IndexBuilder()
        dtype = _dtype(tokenizer)
        for document in tokenize(source, tokenizer, options):
            builder.add(document)
            tokens.append(document.astype(dtype))
        return TokenStore(np.concatenate(tokens), builder.finish())
    folder = Path(options.cache_dir) / f"tokens-{content_key(source, tokenizer, options)}"
    if not folder.is_dir():
        _write_cache(folder, source, tokenizer, options)
    return TokenStore.open(folder)


def tokenize(
    source: TextSource, tokenizer: Tokenizer, options: DataOptions
) -> Iterator[np.ndarray]:
    """Yield each document's tokens [T] int32, in order."""
    count = min(len(source), options.limit_documents or len(source))
    texts: list[str] = []
    characters = done = 0
    for document in range(count):
        texts.append(source[document])
        characters += len(texts[-1])
        if characters >= BATCH_CHARACTERS or document == count - 1:
            yield from tokenizer.encode_batch(texts, bos=options.add_bos, eos=options.add_eos)
            done += len(texts)
            texts, characters = [], 0
            logging.log_every_n_seconds(
                logging.INFO, "tokenised %d of %d documents", 10, done, count
            )


def _write_cache(
    folder: Path, source: TextSource, tokenizer: Tokenizer, options: DataOptions
) -> None:
    try:
        partial = folder.parent / f".partial-{uuid.uuid4().hex}"
        partial.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"cannot write data.cache_dir={options.cache_dir!r}: {error}") from error
    try:
        builder, dtype = IndexBuilder(), _dtype(tokenizer)
        with (partial / TOKENS_FILE).open("wb") as file:
            for document in tokenize(source, tokenizer, options):
                builder.add(document)
                document.astype(dtype).tofile(file)
        builder.finish().save(partial)
        meta = {"dtype": dtype, "tokenizer": tokenizer.name, "source": options.source}
        (partial / META_FILE).write_text(json.dumps(meta), "utf-8")
        try:
            os.replace(partial, folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another process finished first; its folder holds the same tokens.
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _dtype(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def content_key(source: TextSource, tokenizer: Tokenizer, options: DataOptions) -> str:
    """Return a name for what `tokenize` yields, known before it runs."""
    parts = (
        FORMAT,
        source.fingerprint,
        tokenizer.fingerprint,
        options.add_bos,
        options.add_eos,
        options.limit_documents,
    )
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
