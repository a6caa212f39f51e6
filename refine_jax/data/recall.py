"""Made-up prompts for a first run: facts to read, one of them asked for at the end.

    The number of the blue lamp is 4071.
    The number of the old gate is 9930.
    ...
    What is the number of the blue lamp? Answer:

Answering means to have kept the fact in the state. Nothing is downloaded or read, and prompt i
depends on the seed, i, the room and the tokenizer alone.
"""

import hashlib

import numpy as np

from refine_jax.base.errors import DataError
from refine_jax.data.tokenizer import Tokenizer

RECORDS = 4096
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

    room: tokens that a prompt may have; prompts have between half of it and all. tokenizer: counts
    them. seed: of names, numbers and questions.
    """

    def __init__(self, room: int, tokenizer: Tokenizer, *, seed: int = 0) -> None:
        """Raise DataError if not even two facts fit."""
        self._room, self._tokenizer, self._seed = room, tokenizer, seed
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
        facts = int(random.integers((self._most + 1) // 2, self._most + 1))
        names = random.choice(len(COLOURS) * len(THINGS), facts, replace=False)
        numbers = random.integers(1000, 10000, facts)
        asked = int(random.integers(facts))
        lines = [
            f"The number of the {self._name(name)} is {number}.\n"
            for name, number in zip(names, numbers, strict=True)
        ]
        question = f"\nWhat is the number of the {self._name(names[asked])}? Answer:"
        return "".join(lines) + question, (f"{numbers[asked]}",)

    @staticmethod
    def _name(index: int) -> str:
        return f"{COLOURS[index % len(COLOURS)]} {THINGS[index // len(COLOURS)]}"
