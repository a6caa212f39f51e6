"""Documents as tokens: tokenised once, then read by index.

Two kinds, both a `TokenSource`: `TokenStore` (a flat array in memory or memory-mapped from a cache
folder) and `TokenRecords` (ArrayRecord written by `refine_jax.data.prepare`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from absl import logging

from refine_jax.base.errors import DataError, describe
from refine_jax.base.files import json_field, path_of, read_json
from refine_jax.base.growing import fetch_folder, scratch_folder, upload_folder
from refine_jax.base.remote import WRITABLE, RemotePath, is_remote, scheme_of
from refine_jax.config import DataConfig
from refine_jax.data.formats import TFDS_INFO, is_tfds_folder
from refine_jax.data.sources import TextSource, open_source
from refine_jax.data.tfds import first_line, open_tfds
from refine_jax.data.tokenizer import Tokenizer, check_ends

FORMAT = 1  # of the cache folders and of the iterator fingerprints; raise it when they change
BATCH_CHARACTERS = 4_000_000  # text tokenised at a time: enough to keep all threads busy
META_FILE, TOKENS_FILE, INDEX_FILE = "meta.json", "tokens.bin", "documents.npz"
DTYPES = ("<u2", "<u4")
LONGEST = 1 << 48  # tokens of a document; their sum stays far from the end of int64
CHECK_BYTES = 1 << 20  # of a cache compared at a time


class TokenSource(Protocol):
    """Tokenised documents by index.

    Attributes:
        lengths: tokens of each document, [N] int64.
        hashes: equal for documents with equal tokens, [N] uint64.
        fingerprint: equal for equal tokens in equal order.
        dropped: documents of the source that were not tokenised, by reason: "limit_documents", and
            those of the reader, e.g. "null".
    """

    lengths: np.ndarray
    hashes: np.ndarray
    fingerprint: str
    dropped: Mapping[str, int]

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
    def load(cls, folder: str | os.PathLike, documents: int | None = None) -> DocumentIndex:
        """Read the index in `folder`.

        folder: where `save` wrote it. documents: how many it must hold; None: any number.

        Raises DataError: it is missing or broken.
        """
        path = Path(folder) / INDEX_FILE
        try:
            with zipfile.ZipFile(path) as members:
                if any(member.compress_type for member in members.infolist()):
                    raise ValueError("it is compressed")  # a small file could fill the memory
            with np.load(path) as arrays:
                lengths, hashes = arrays["lengths"], arrays["hashes"]
        except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
            raise DataError(f"cannot read {path} ({describe(error)})") from error
        if lengths.ndim != 1 or lengths.shape != hashes.shape:
            raise DataError(f"{path} holds arrays of shapes {lengths.shape} and {hashes.shape}")
        if documents is not None and len(lengths) != documents:
            raise DataError(f"{documents} documents instead of {len(lengths)}")
        if lengths.dtype != np.int64 or hashes.dtype != np.uint64:
            raise DataError(f"{path} holds arrays of {lengths.dtype} and {hashes.dtype}")
        if np.any((lengths < 0) | (lengths > LONGEST)):
            raise DataError(f"{path} holds impossible lengths of documents")
        return cls(lengths, hashes)


def hash_tokens(tokens: np.ndarray) -> int:
    """Return the content hash of a document [T], for any integer type; below 2**64."""
    content = np.ascontiguousarray(tokens, "<i4")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class IndexBuilder:
    """Collects a `DocumentIndex` document by document."""

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._hashes: list[int] = []

    def add(self, tokens: np.ndarray) -> None:
        """Add a document, [T] int32."""
        self._lengths.append(len(tokens))
        self._hashes.append(hash_tokens(tokens))

    def finish(self) -> DocumentIndex:
        """Return the index of all documents."""
        return DocumentIndex(np.array(self._lengths, np.int64), np.array(self._hashes, np.uint64))


class TokenStore:
    """Tokens of all documents in one array.

    tokens: all documents, one after the other, [sum of lengths] unsigned integers. index: of the
    documents. folder: where `tokens` is mapped from; processes that read ahead map it again instead
    of receiving a copy. dropped: documents of the source that are not among them, by reason.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        index: DocumentIndex,
        folder: str | None = None,
        dropped: Mapping[str, int] | None = None,
    ) -> None:
        self.lengths, self.hashes = index.lengths, index.hashes
        self.fingerprint = index.fingerprint
        self.dropped = dict(dropped or {})
        self._index, self._folder = index, folder
        self._tokens = tokens
        self._starts = np.concatenate([[0], np.cumsum(index.lengths)])

    @classmethod
    def open(cls, folder: str | os.PathLike, check: bool = True) -> TokenStore:
        """Map a cache folder.

        folder: the folder. check: read all tokens once and compare them with what was written,
        about a second for three gigabytes.

        Raises DataError: the folder is damaged.
        """
        folder = Path(folder)
        path = folder / TOKENS_FILE
        with damage("token cache", folder, "to make it again"):
            index = DocumentIndex.load(folder)
            meta = read_json(folder / META_FILE, DataError)
            dtype = meta.get("dtype")
            if dtype not in DTYPES:
                raise DataError(f"{META_FILE} must give dtype {' or '.join(DTYPES)}: {dtype!r}")
            size, expected = path.stat().st_size, int(index.lengths.sum())
            if size != expected * np.dtype(dtype).itemsize:
                raise DataError(f"{size} bytes instead of {expected} tokens of {dtype}")
            tokens = np.empty(0, dtype)
            if size:  # an empty file cannot be mapped
                tokens = np.memmap(path, dtype=dtype, mode="r")
            store = cls(tokens, index, str(folder), _counts(meta.get("dropped")))
            if check:
                store._compare(path, meta)
        return store

    def _compare(self, path: Path, meta: Mapping) -> None:
        """Raise DataError where tokens or index are not as they were written."""
        written = json_field(meta, "crc32", int, where=META_FILE, error=DataError)
        if written is None:  # of a version that wrote no checksums
            for document, length in enumerate(self.lengths.tolist()):
                if hash_tokens(self.read(document, 0, length)) != self.hashes[document]:
                    raise DataError(f"document {document} is not as it was written")
            return
        if meta.get("documents") != self.fingerprint:
            raise DataError(f"{INDEX_FILE} is not as it was written")
        checksum = 0
        with path.open("rb") as file:
            while block := file.read(CHECK_BYTES):
                checksum = zlib.crc32(block, checksum)
        if checksum != written:
            raise DataError(f"{TOKENS_FILE} is not as it was written")

    def __reduce__(self) -> tuple:
        """Pickle the folder's name where there is one."""
        if self._folder is not None:
            return TokenStore.open, (self._folder, False)
        return TokenStore, (self._tokens, self._index)

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """Return tokens start .. start + length of a document, [length] unsigned integers."""
        first = self._starts[document] + start
        return self._tokens[first : first + length]


class TokenRecords:
    """A folder of tokenised ArrayRecord, made by `refine_jax.data.prepare`."""

    def __init__(self, folder: str, tokenizer: Tokenizer, options: DataConfig) -> None:
        """Open the folder; raises DataError if it is broken or made with another tokenizer."""
        self._folder = Path(folder)
        with damage("tokenised records", self._folder, "and prepare them again"):
            _, self._records = open_tfds(str(self._folder))
            made = read_metadata(self._folder)
            index = DocumentIndex.load(self._folder, documents=len(self._records))
            self.dropped = made["dropped"]
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
        self.dropped = _with_limit(self.dropped, len(index.lengths), options)
        limit = options.limit_documents
        index = DocumentIndex(index.lengths[:limit], index.hashes[:limit])
        self.lengths, self.hashes = index.lengths, index.hashes
        self.fingerprint = index.fingerprint

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """Return tokens start .. start + length of a document, [length] int32.

        Raises DataError: the document is not as it was written.
        """
        with damage("tokenised records", self._folder, "and prepare them again"):
            tokens = np.asarray(self._records[document]["tokens"])
            if (
                tokens.ndim != 1
                or tokens.dtype.kind not in "iu"
                or hash_tokens(tokens) != self.hashes[document]
            ):
                raise DataError(f"document {document} is not as it was written")
        return tokens[start : start + length]


@contextlib.contextmanager
def damage(what: str, folder: Path, why: str) -> Iterator[None]:
    """Turn any error of reading a folder that this package wrote into one that says what to do.

    what: the folder holds. folder: to remove. why: end of "Remove the folder".
    """
    try:
        yield
    except Exception as error:  # the libraries that read records raise many kinds
        reason = str(error) if isinstance(error, DataError) else first_line(error)
        reason = reason.removesuffix(".")
        raise DataError(f"broken {what} in {folder}: {reason}. Remove the folder {why}.") from error


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return what `refine_jax.data.prepare` says of its records; raises DataError if broken."""
    path = folder / "metadata.json"
    made = read_json(path, DataError)
    for name in ("documents", "tokens"):
        made[name] = json_field(made, name, int, where=path, error=DataError)
    return made | {"dropped": _counts(made.get("dropped"))}


def _counts(value: object) -> dict[str, int]:
    """Check counts by reason, as a folder has them; raises DataError if they are none."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(type(x) is int and x >= 0 for x in value.values()):
        raise DataError(f"'dropped' must hold counts: {value!r:.80}")
    return dict(value)


def _with_limit(dropped: Mapping[str, int], total: int, options: DataConfig) -> dict[str, int]:
    """Count the documents left out, with those of `total` beyond `options.limit_documents`."""
    beyond = max(total - (options.limit_documents or total), 0)
    counts = {**dropped, "limit_documents": dropped.get("limit_documents", 0) + beyond}
    return {reason: int(count) for reason, count in counts.items() if count}


def unread(source: TextSource, options: DataConfig) -> dict[str, int]:
    """Return how many documents of a source are not tokenised, by reason."""
    return _with_limit(getattr(source, "dropped", {}), len(source), options)


def is_token_folder(path: str) -> bool:
    """Say whether `refine_jax.data.prepare` wrote the folder `path`."""
    if is_remote(path):
        files = (path_of(path) / name for name in (TFDS_INFO, INDEX_FILE))
        return scheme_of(path) in WRITABLE and all(file.is_file() for file in files)
    return is_tfds_folder(path) and os.path.isfile(
        os.path.join(os.path.expanduser(path), INDEX_FILE)
    )


def open_tokens(options: DataConfig, tokenizer: Tokenizer) -> TokenSource:
    """Return the documents of `options.source` as tokens.

    They are tokenised once: kept in memory, or in `options.cache_dir` in a folder whose name
    depends on the source's files, the tokenizer and the options that change tokens. A cache folder
    appears complete or not at all, and several processes may make it at the same time. Of a folder
    in a bucket each process takes a copy on this machine.

    Raises DataError: as `open_source`, or the cache is broken.
    """
    if is_token_folder(options.source):
        folder = options.source
        folder = str(fetch_folder(path_of(folder))) if is_remote(folder) else folder
        return TokenRecords(folder, tokenizer, options)
    source = open_source(options)
    if not options.cache_dir:
        tokens, builder = [], IndexBuilder()
        dtype = token_dtype(tokenizer)
        for document in tokenize(source, tokenizer, options):
            builder.add(document)
            tokens.append(document.astype(dtype))
        dropped = unread(source, options)
        return TokenStore(np.concatenate(tokens), builder.finish(), dropped=dropped)
    cache, kept = path_of(options.cache_dir), None
    folder = cache / f"tokens-{content_key(source, tokenizer, options)}"
    if isinstance(folder, RemotePath):
        with _writing(options):
            if (folder / META_FILE).is_file():
                return TokenStore.open(fetch_folder(folder))
        kept, folder = folder, scratch_folder() / folder.name
    if not folder.is_dir():
        _write_cache(folder, source, tokenizer, options)
        if kept is not None:
            with _writing(options):
                upload_folder(folder, kept, META_FILE)
        return TokenStore.open(folder, check=False)
    return TokenStore.open(folder)


def tokenize(
    source: TextSource | Sequence[str], tokenizer: Tokenizer, options: DataConfig
) -> Iterator[np.ndarray]:
    """Yield each document's tokens [T] int32, in order."""
    check_ends(tokenizer, bos=options.add_bos, eos=options.add_eos, setting=options.setting)
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
    folder: Path, source: TextSource, tokenizer: Tokenizer, options: DataConfig
) -> None:
    partial = folder.parent / f".partial-{uuid.uuid4().hex}"
    try:
        with _writing(options):
            partial.mkdir(parents=True)
            file = (partial / TOKENS_FILE).open("wb")
        builder, dtype, checksum = IndexBuilder(), token_dtype(tokenizer), 0
        with file:
            for document in tokenize(source, tokenizer, options):
                builder.add(document)
                content = document.astype(dtype).tobytes()
                checksum = zlib.crc32(content, checksum)
                with _writing(options):
                    file.write(content)
        index = builder.finish()
        meta = {
            "dtype": dtype,
            "tokenizer": tokenizer.name,
            "source": options.source,
            "crc32": checksum,
            "documents": index.fingerprint,
            "dropped": unread(source, options),
        }
        with _writing(options):
            index.save(partial)
            (partial / META_FILE).write_text(json.dumps(meta), "utf-8")
            try:
                os.replace(partial, folder)
            except OSError:
                if not folder.is_dir():
                    raise
                # Another process finished first; its folder holds the same tokens.
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _writing(options: DataConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {options.setting('cache_dir')}={options.cache_dir!r} "
            f"({error.strerror or error}): name a folder with space that you may write to."
        ) from error


def token_dtype(tokenizer: Tokenizer) -> str:
    """Name the integers that hold the tokenizer's ids."""
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def content_key(source: TextSource, tokenizer: Tokenizer, options: DataConfig) -> str:
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
