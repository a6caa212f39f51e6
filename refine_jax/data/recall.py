"""Made-up facts for a first run: prompts that ask for one at the end, and documents full of them.

    The number of the blue lamp is 4071.
    The number of the old gate is 9930.
    ...
    What is the number of the blue lamp? Answer:

Answering means to have kept the fact in the state. Nothing is downloaded or read. Prompt i depends
on the seed, i, the room and the tokenizer alone, document i on i alone.
"""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from refine_jax.base.errors import DataError
from refine_jax.data.tokenizer import Tokenizer

RECORDS = 4096
DOCUMENTS = 1 << 17
LINES = 48
"""Lines of a document: 525 tokens or more in the vocabulary of the small models."""
FACTS = (12, 24)
"""Fewest and most facts of a document; the other lines repeat them or ask for them."""
COLOURS = (
    *("black", "blue", "brown", "dark", "gold", "green", "grey", "heavy", "large", "light", "long"),
    *("new", "old", "orange", "pink", "plain", "purple", "red", "round", "short", "silver"),
    *("small", "soft", "tall", "thin", "white", "wide", "yellow"),
)
THINGS = (
    *("bag", "bell", "boat", "book", "box", "bridge", "chair", "clock", "coat", "cup", "door"),
    *("drum", "farm", "field", "flag", "garden", "gate", "glass", "hat", "hill", "house", "key"),
    *("lake", "lamp", "letter", "map", "mirror", "pen", "river", "road", "room", "ship", "stone"),
    *("table", "tower", "train", "tree", "wall", "wheel", "window"),
)


class RecallPrompts:
    """`RECORDS` prompts of facts and a question, each with one answer.

    room: tokens that a prompt may have. tokenizer: counts them. seed: of names, numbers and
    questions. full: whether each prompt has as many facts as fit, or between half of them and all.
    """

    def __init__(
        self, room: int, tokenizer: Tokenizer, *, seed: int = 0, full: bool = False
    ) -> None:
        """Raise DataError if not even two facts fit."""
        self._room, self._tokenizer, self._seed, self._full = room, tokenizer, seed, full
        content = f"{room} {tokenizer.fingerprint} {seed} {RECORDS}"
        self.fingerprint = "recall-" + hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        # Tokens of the parts: joining them can only make fewer of them.
        fact = self._count("The number of the purple mirror is 0000.\n")
        self._question = self._count("\nWhat is the number of the purple mirror? Answer:") + 1
        self._most = min((room - self._question) // fact, len(COLOURS) * len(THINGS))
        if self._most < 2:
            raise DataError(
                "data.source='recall' needs room for two facts and a question: "
                f"{2 * fact + self._question} tokens for the prompt. Got: {room}. Raise "
                "data.sequence_length."
            )

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, bos=False))

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, index: int) -> tuple[str, tuple[str, ...]]:
        random = np.random.default_rng((self._seed, index))
        least = self._most if self._full else (self._most + 1) // 2
        facts = int(random.integers(least, self._most + 1))
        names = random.choice(len(COLOURS) * len(THINGS), facts, replace=False)
        numbers = random.integers(1000, 10000, facts)
        asked = int(random.integers(facts))
        lines = [_statement(*fact) for fact in zip(names, numbers, strict=True)]
        return "".join(lines) + "\n" + _question(names[asked]), (f"{numbers[asked]}",)


class RecallDocuments:
    """`DOCUMENTS` documents in which every fact is told once, and then told again or asked for.

    When the facts are told, and which of those told so far a later line is about, is uniform: a
    number that was told before follows from the text at any distance up to the document's length.
    An empty line stands between what is told and what is asked. A `TextSource`.
    """

    dropped: Mapping[str, int] = MappingProxyType({})
    fingerprint = f"recall-documents-{DOCUMENTS}-{LINES}-{FACTS[0]}-{FACTS[1]}"

    def __len__(self) -> int:
        return DOCUMENTS

    def __getitem__(self, index: int) -> str:
        random = np.random.default_rng((_DOCUMENT_STREAM, index))
        facts = int(random.integers(FACTS[0], FACTS[1] + 1))
        names = random.choice(len(COLOURS) * len(THINGS), facts, replace=False)
        numbers = random.integers(1000, 10000, facts)
        first = {0, *(1 + random.choice(LINES - 1, facts - 1, replace=False)).tolist()}
        asked = random.random(LINES) < 0.5
        text, told, asking = [], 0, False
        for line in range(LINES):
            told += line in first
            fact = told - 1 if line in first else int(random.integers(told))
            asks = bool(asked[line]) and line not in first
            if asks != asking:
                text.append("\n")
                asking = asks
            name, number = names[fact], numbers[fact]
            text.append(f"{_question(name)} {number}\n" if asks else _statement(name, number))
        return "".join(text)


_DOCUMENT_STREAM = 0x7E11  # apart from the seeds of prompts


def _statement(name: int, number: int) -> str:
    return f"The number of the {_name(name)} is {number}.\n"


def _question(name: int) -> str:
    return f"What is the number of the {_name(name)}? Answer:"


def _name(index: int) -> str:
    return f"{COLOURS[index % len(COLOURS)]} {THINGS[index // len(COLOURS)]}"
