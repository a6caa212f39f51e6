"""The study's text: source code of the Python standard library with facts to remember.

A fact is a line of its own at a random line break, `# module407`: a key, which is a word of one
token, and a value of three digits, a token each. In a document every fact is *mentioned* several
times, at independent uniform places: from the second mention on, the value follows from the text
before it and from nothing else, at any distance up to the document's length. A prompt mentions each
of its facts once and ends in a question, `? module`, whose answer is the value.

Rows are exactly as long as asked for and depend on (stream, seed, index) alone. Held-out rows are
of files that the training rows do not touch; facts are drawn for every row.
"""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import numpy as np

from refine_jax.base.errors import DataError
from refine_jax.base.files import write_bytes
from refine_jax.config import DataConfig
from refine_jax.data.sources import open_source

VALUE = 3  # digits
ANSWER = VALUE + 1  # the value and the end of sequence
FACT = VALUE + 3  # "#", the key, the value, the line's end
QUESTION = 3  # the line's end, "?", the key
HELD_OUT = 0.1  # of the files
_SHORTEST = 4000  # characters of a file
_LINES = 60_000  # that the vocabulary is learnt from


@dataclasses.dataclass(frozen=True)
class Shape:
    """What rows are like: tokens a row, fewest and most facts, mentions of each fact."""

    length: int
    facts: tuple[int, int]
    mentions: int = 3


@dataclasses.dataclass(frozen=True)
class RecallRows:
    """tokens [n, T] int32; recall [n, T] bool: the tokens of values that were mentioned before."""

    tokens: np.ndarray
    recall: np.ndarray


def train_vocabulary(path: Path, size: int) -> None:
    """Learn a SentencePiece model of the standard library; digits and line ends are own tokens."""
    import sentencepiece

    lines = [line for text in _texts() for line in text.split("\n") if 0 < len(line) < 400]
    chosen = np.random.default_rng(0).choice(len(lines), min(_LINES, len(lines)), replace=False)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(lines[index] for index in chosen),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["\n", "#", "?"],
        num_threads=1,  # more of them make other vocabularies
        minloglevel=2,
    )
    write_bytes(path, model.getvalue())


def _texts() -> list[str]:
    source = open_source(DataConfig(source="stdlib"))
    texts = [source[index] for index in range(len(source))]
    return [text for text in texts if len(text) >= _SHORTEST and text.isascii()]


class FactCorpus:
    """Rows of documents and prompts in the vocabulary of a SentencePiece model."""

    def __init__(self, vocabulary: Path):
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
        self._files = [np.array(ids, np.int32) for ids in pieces.encode(_texts())]
        self._held_out = int(len(self._files) * (1 - HELD_OUT))
        names = [pieces.id_to_piece(index) for index in range(pieces.get_piece_size())]
        words = [index for index, name in enumerate(names) if re.fullmatch("▁[a-z]{3,}", name)]
        self._words = np.array(words, np.int32)
        self._digits = np.array([pieces.piece_to_id(str(digit)) for digit in range(10)], np.int32)
        marks = (pieces.piece_to_id(mark) for mark in ("\n", "#", "?"))
        self._line_end, self._hash, self._question = marks
        self.bos, self.eos = pieces.bos_id(), pieces.eos_id()
        self.vocab_size = len(names)

    def documents(
        self, shape: Shape, count: int, *key: int, held_out: bool = False, first: int = 0
    ) -> RecallRows:
        """Rows number `first` to `first + count` of the stream `key`."""
        rows = []
        for index in range(first, first + count):
            random = np.random.default_rng((*key, index))
            names, values = self._draw_facts(random, shape)
            order = np.repeat(np.arange(len(names)), shape.mentions)
            rows.append(self._document(random, names, values, order, shape.length, held_out))
        return RecallRows(*(np.stack(part) for part in zip(*rows, strict=True)))

    def prompts(
        self, shape: Shape, count: int, *key: int, held_out: bool = False, first: int = 0
    ) -> RecallRows:
        """Prompts of `shape.length` tokens, the question among them, then ANSWER more.

        `recall` marks the answer's value; the shape's mentions are not used.
        """
        rows = []
        for index in range(first, first + count):
            random = np.random.default_rng((*key, index))
            names, values = self._draw_facts(random, shape)
            asked = int(random.integers(len(names)))
            question = [self._line_end, self._question, names[asked]]
            tokens, recall = self._document(
                random, names, values, np.arange(len(names)), shape.length - QUESTION, held_out
            )
            tail = np.array([*question, *values[asked], self.eos], np.int32)
            marked = np.zeros(len(tail), bool)
            marked[QUESTION:-1] = True
            rows.append((np.concatenate([tokens, tail]), np.concatenate([recall, marked])))
        return RecallRows(*(np.stack(part) for part in zip(*rows, strict=True)))

    def _draw_facts(self, random, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
        count = int(random.integers(shape.facts[0], shape.facts[1] + 1))
        names = random.choice(self._words, count, replace=False)
        return names, self._digits[random.integers(0, 10, (count, VALUE))]

    def _document(self, random, names, values, order, length: int, held_out: bool):
        """`length` tokens of a file with the facts of `order` at line breaks."""
        room = length - 1 - FACT * len(order)
        if room < FACT:
            raise DataError(
                f"{len(order)} lines of {FACT} tokens leave no text in {length} tokens: fewer "
                "facts or mentions, or longer rows."
            )
        body = self._excerpt(random, room, held_out)
        breaks = np.concatenate([[0], np.flatnonzero(body == self._line_end) + 1])
        wanted = random.uniform(0, room, len(order))
        places = breaks[np.searchsorted(breaks, wanted, side="right") - 1]
        pieces, marks, at, seen = [np.array([self.bos], np.int32)], [np.zeros(1, bool)], 0, set()
        for line in np.argsort(wanted, kind="stable"):
            fact, place = int(order[line]), int(places[line])
            pieces += [body[at:place], self._fact(names[fact], values[fact])]
            marks += [np.zeros(place - at, bool), np.zeros(FACT, bool)]
            marks[-1][-1 - VALUE : -1] = fact in seen
            seen.add(fact)
            at = place
        tokens = np.concatenate([*pieces, body[at:]])
        return tokens, np.concatenate([*marks, np.zeros(room - at, bool)])

    def _fact(self, name: int, value: np.ndarray) -> np.ndarray:
        return np.array([self._hash, name, *value, self._line_end], np.int32)

    def _excerpt(self, random, length: int, held_out: bool) -> np.ndarray:
        files = self._files[self._held_out :] if held_out else self._files[: self._held_out]
        files = [file for file in files if len(file) >= length]
        if not files:
            raise DataError(f"no file of the standard library has {length} tokens: shorter rows.")
        file = files[random.integers(len(files))]
        begin = int(random.integers(len(file) - length + 1))
        return file[begin : begin + length]
