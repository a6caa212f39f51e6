"""The study's tasks: rows in which values follow from an earlier mention and nothing else.

`SymbolTask` is nothing but facts, with more of them than a small state holds. `TextTask` hides
facts in source code (`corpus.py`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

import numpy as np
from corpus import VALUE, FactCorpus, RecallRows, Shape, train_vocabulary


class Task(Protocol):
    """Rows that depend on their stream `key` and their number alone.

    vocab_size: words. length: tokens of a training row. eos: the token that rollouts never sample.
    answer: tokens at the end of a prompt's row that answer its question.
    """

    vocab_size: int
    length: int
    eos: int | None
    answer: int

    def documents(
        self, count: int, *key: int, held_out: bool = False, scale: int = 1, easy: bool = False
    ) -> RecallRows:
        """Rows of `scale` times the training length; easy: most of them with fewer facts."""

    def prompts(self, count: int, *key: int, held_out: bool = False) -> RecallRows:
        """Rows that end in a question and its answer."""


@dataclasses.dataclass(frozen=True)
class SymbolTask:
    """Rows of facts: a key, then a value of VALUE symbols, one fact after the other.

    A row has so many facts, each mentioned at least once, in random order; longer rows have the
    same number of facts, mentioned more often. Keys and values are drawn anew for every row.
    """

    keys: int = 32
    symbols: int = 16
    facts: int = 10
    length: int = 64

    eos = None
    answer = VALUE

    @property
    def vocab_size(self) -> int:
        """Keys, then the symbols of values."""
        return self.keys + self.symbols

    def documents(
        self, count: int, *key: int, held_out: bool = False, scale: int = 1, easy: bool = False
    ) -> RecallRows:
        """Rows of the stream `key`; held-out rows are of a stream that training never reads.

        easy: row i has all facts, half of them, a quarter or one, as i mod 4 says.
        """
        random = np.random.default_rng((int(held_out), *key))
        mentions = scale * self.length // (1 + VALUE)
        shift = np.arange(count)[:, None] % 4 if easy else np.zeros((count, 1), int)
        facts = np.maximum(self.facts >> shift, 1)
        order = np.arange(mentions) % facts
        more = random.integers(0, facts, (count, mentions))
        order = np.where(np.arange(mentions) < facts, order, more)
        return self._rows(random, random.permuted(order, axis=1))

    def prompts(self, count: int, *key: int, held_out: bool = False) -> RecallRows:
        """Rows whose last fact was mentioned before; only its value is marked."""
        rows = self.documents(count, *key, held_out=held_out)
        facts = rows.tokens.reshape(count, -1, 1 + VALUE)
        random = np.random.default_rng((int(held_out), *key, 1))
        asked = random.integers(0, facts.shape[1] - 1, count)
        facts[:, -1] = facts[np.arange(count), asked]
        marked = np.zeros_like(rows.recall)
        marked[:, -VALUE:] = True
        return RecallRows(facts.reshape(count, -1), marked)

    def _rows(self, random: np.random.Generator, order: np.ndarray) -> RecallRows:
        count, mentions = order.shape
        names = random.permuted(np.tile(np.arange(self.keys), (count, 1)), axis=1)
        names = np.take_along_axis(names, order, axis=1)[..., None]
        values = self.keys + random.integers(0, self.symbols, (count, self.facts, VALUE))
        values = np.take_along_axis(values, order[..., None], axis=1)
        earlier = np.tril(np.ones((mentions, mentions), bool), -1)
        seen = np.any((order[:, :, None] == order[:, None, :]) & earlier, axis=-1)
        recall = np.repeat(seen[..., None], 1 + VALUE, axis=-1)
        recall[..., 0] = False
        tokens = np.concatenate([names, values], axis=-1).astype(np.int32)
        return RecallRows(tokens.reshape(count, -1), recall.reshape(count, -1))


class TextTask:
    """Source code of the standard library with facts to remember, in its own vocabulary."""

    answer = VALUE + 1

    def __init__(self, vocabulary: Path, words: int, shape: Shape):
        if not vocabulary.is_file():
            train_vocabulary(vocabulary, words)
        self._corpus, self._shape = FactCorpus(vocabulary), shape
        self.vocab_size, self.length = self._corpus.vocab_size, shape.length
        self.eos = self._corpus.eos

    def documents(
        self, count: int, *key: int, held_out: bool = False, scale: int = 1, easy: bool = False
    ) -> RecallRows:
        """Longer rows have the same number of facts and mentions, among more text.

        easy: one or two facts, mentioned as often as the others are together.
        """
        shape = dataclasses.replace(self._shape, length=scale * self.length)
        if easy:
            mentions = shape.facts[1] * shape.mentions // 2
            shape = dataclasses.replace(shape, facts=(1, 2), mentions=mentions)
        return self._corpus.documents(shape, count, *key, held_out=held_out)

    def prompts(self, count: int, *key: int, held_out: bool = False) -> RecallRows:
        """As `FactCorpus.prompts`, of the training length with the answer."""
        shape = dataclasses.replace(self._shape, length=self.length - self.answer)
        return self._corpus.prompts(shape, count, *key, held_out=held_out)
