"""What the data pipeline can be told, and the one error that it raises for bad input.

This module imports nothing heavy: options can be checked before grain or pyarrow load.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar

from refine_jax.base.errors import DataError
from refine_jax.base.files import short
from refine_jax.settings import (
    LAST_SEED,
    MOST_ITEMS,
    MOST_ROWS,
    MOST_STEPS,
    MOST_TOKENS,
    MOST_WORKERS,
    expanded,
)

CHUNKINGS = ("all", "first")
SPLITS = ("train", "validation")
LIMITS = {
    "limit_documents": (1, MOST_ITEMS),
    "sequence_length": (2, MOST_TOKENS),
    "min_tokens": (1, MOST_ITEMS),
    "max_tokens": (1, MOST_ITEMS),
    "min_remainder": (1, MOST_TOKENS),
    "max_documents": (1, MOST_ROWS),
    "validation_rows": (1, MOST_ITEMS),
    "epochs": (1, MOST_STEPS),
    "seed": (0, LAST_SEED),
    "workers": (0, MOST_WORKERS),
}
"""The least and the largest value of each whole number; None is allowed where it is the default."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Everything that decides which tokens are trained on, and in which order.

    Attributes:
        source: "stdlib" (the source files of the Python standard library on this machine);
            "tfds:NAME" (a tensorflow-datasets data set, e.g. "tfds:wiki40b/en", or a folder of
            one: "tfds:FOLDER"); or a file, a folder (searched recursively) or a glob pattern:
            records of parquet or JSON, or text, one document a file; see
            `refine_jax.data.formats`. A folder that `refine_jax.data.prepare` or
            tensorflow-datasets wrote is read as such.
        text_field: parquet column, JSON field or tfds feature that holds the text.
        files: file name pattern, e.g. "*.py", that chooses files in folders; "" chooses the known
            suffixes (.parquet, .jsonl, .ndjson, .json, .txt, .md, each also with .gz or .zst).
        tfds_split: split of a tfds data set, e.g. "train" or "train[:10%]".
        tfds_data_dir: where tensorflow-datasets keeps its data; "" is its own default.
        limit_documents: use only the first so many documents of the source; None uses all.
        tokenizer: "mistral-v1", "bytes", or the path of a tokenizer file or of a folder with one.
        add_bos: put the beginning-of-sequence token before each document.
        add_eos: put the end-of-sequence token after each document.
        sequence_length: T, tokens of a row.
        min_tokens: drop documents with fewer tokens, bos and eos counted; None is T.
        max_tokens: drop documents with more tokens; None is no limit.
        chunking: "all" cuts a document longer than T into rows of T; "first" keeps its first T.
        min_remainder: the last, shorter piece of a cut document is kept if it has at least so many
            tokens: 1 keeps every token, T keeps full pieces only.
        pack: put several short documents into one row, each a segment of its own.
        max_documents: most documents that a packed row may hold.
        holdout: fraction of the documents held out of training, the "validation" split; of the
            rows where there is a single document. 0 holds nothing out.
        validation_rows: use so many rows of the held-out documents, evenly spread; None uses all.
        epochs: how often training passes over its rows; None never stops.
        seed: decides the order of the training rows (0 <= seed < 2**32).
        workers: processes that read ahead; 0 reads ahead in threads of this process.
        cache_dir: folder that keeps the tokens between runs; "" keeps them in memory.
    """

    prefix: ClassVar[str] = "data."

    source: str = "stdlib"
    text_field: str = "text"
    files: str = ""
    tfds_split: str = "train"
    tfds_data_dir: str = ""
    limit_documents: int | None = None
    tokenizer: str = "mistral-v1"
    add_bos: bool = True
    add_eos: bool = False
    sequence_length: int = 16384
    min_tokens: int | None = None
    max_tokens: int | None = None
    chunking: str = "all"
    min_remainder: int = 1
    pack: bool = False
    max_documents: int = 8
    holdout: float = 0.0
    validation_rows: int | None = None
    epochs: int | None = None
    seed: int = 0
    workers: int = 0
    cache_dir: str = ""

    def __post_init__(self) -> None:
        """Raise DataError, naming the field, for a value that cannot work."""
        for field in fields(self):
            _check(self.setting(field.name), field, getattr(self, field.name))
        for name in ("source", "tokenizer", "tfds_data_dir", "cache_dir"):
            path = expanded(getattr(self, name), self.setting(name), error=DataError)
            object.__setattr__(self, name, path)
        if not self.source:
            raise DataError(
                f"{self.setting('source')} must be stdlib, tfds:NAME or a path. Got: ''."
            )
        if self.chunking not in CHUNKINGS:
            raise DataError(
                f"{self.setting('chunking')} must be all or first. Got: {self.chunking!r}."
            )
        if not 0 <= self.holdout <= 0.5:
            raise DataError(
                f"{self.setting('holdout')} must be between 0 and 0.5. Got: {self.holdout!r}."
            )
        if self.max_tokens is not None and self.max_tokens < self.shortest:
            raise DataError(
                f"{self.setting('max_tokens')} must be at least {self.setting('min_tokens')} "
                "(default: sequence_length). "
                f"Got: max_tokens={self.max_tokens}, min_tokens={self.shortest}."
            )
        if self.min_remainder > self.sequence_length:
            raise DataError(
                f"{self.setting('min_remainder')} must be at most "
                f"{self.setting('sequence_length')}. "
                f"Got: min_remainder={self.min_remainder}, sequence_length={self.sequence_length}."
            )

    def setting(self, name: str) -> str:
        """What the user sets the field `name` with, for messages."""
        return self.prefix + name

    @property
    def shortest(self) -> int:
        """The fewest tokens of a document that is kept."""
        return self.sequence_length if self.min_tokens is None else self.min_tokens


def _check(setting: str, field: Field, value: Any) -> None:
    """Raise DataError for a value of another type than the field's, or out of its limits."""
    if field.name in LIMITS:
        low, high = LIMITS[field.name]
        if value is None and field.default is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise DataError(f"{setting} must be an integer >= {low}. Got: {short(value)}.")
        if value > high:
            raise DataError(f"{setting} must be below {high + 1}. Got: {short(value)}.")
        return
    kind = type(field.default)  # a string, a boolean or a float
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and kind is not bool):
        wanted = {str: "a string", bool: "True or False", float: "a number"}[kind]
        raise DataError(f"{setting} must be {wanted}. Got: {short(value)}.")


@dataclass(frozen=True, kw_only=True)
class FlagOptions(DataOptions):
    """Options that a command takes as flags of their names."""

    prefix: ClassVar[str] = "--"
