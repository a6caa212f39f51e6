"""Draws of numbers and words that stay the same: everywhere, in every later version of anything.

The stream is SHA-256 in counter mode, turned into draws by integer arithmetic of our own, so a
data set depends on nothing but its key. (Python and numpy only promise to keep their raw bits; how
`shuffle`, `sample` or `choice` use them may change and has changed.)

The words are those of the package wonderwords, which RULER and lm-eval draw from too. Exactly one
version of its lists is accepted. Words with capitals, spaces or hyphens are left out: keys are made
as adjective-noun.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from refine_jax.base.errors import DataError

Item = TypeVar("Item")

VERSION = "3.0.1"
_SHA256 = "2bdd7be1d23ebad6478a70d68290a8844851a5d8263390ca841a87922415e7e4"
_KINDS = ("noun", "adjective", "verb")


class Draw:
    """A stream of draws, one for each key.

    *key: strings and integers; equal keys give equal streams, others independent ones.
    """

    def __init__(self, *key: str | int) -> None:
        self._name = key
        self._key = hashlib.sha256(json.dumps(key).encode()).digest()
        self._block = 0
        self._words: list[int] = []

    def fork(self, *key: str | int) -> Draw:
        """Return the stream of a longer key; it does not depend on what was drawn here."""
        return Draw(*self._name, *key)

    def bits(self, count: int) -> int:
        """Return an integer of so many random bits, a multiple of 64."""
        value = 0
        for _ in range(count // 64):
            value = value << 64 | self._word()
        return value

    def below(self, bound: int) -> int:
        """Return an integer from 0 to bound - 1 (bound <= 2**64), each equally likely."""
        # Words from the last, incomplete run of `bound` values would favour small results.
        limit = 2**64 // bound * bound
        while True:
            word = self._word()
            if word < limit:
                return word % bound

    def choice(self, items: Sequence[Item]) -> Item:
        """Return one of the items."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """Return `count` of the items, each at most once, in random order (Fisher-Yates)."""
        if count > len(items):
            raise ValueError(f"sample takes at most {len(items)} items. Got: {count}.")
        moved: dict[int, int] = {}  # slots of the shuffled list that differ from their own index
        chosen = []
        for i in range(count):
            j = i + self.below(len(items) - i)
            chosen.append(items[moved.get(j, j)])
            moved[j] = moved.get(i, i)
        return chosen

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """Return the items in random order."""
        return self.sample(items, len(items))

    def _word(self) -> int:
        if not self._words:
            block = hashlib.sha256(self._key + self._block.to_bytes(8, "big")).digest()
            self._words = [int.from_bytes(block[i : i + 8], "big") for i in range(0, 32, 8)]
            self._block += 1
        return self._words.pop()


@functools.cache
def word_lists() -> dict[str, tuple[str, ...]]:
    """Return {"noun": words, "adjective": words, "verb": words}, each sorted, without doubles.

    Raises DataError: wonderwords is not installed, or is another version.
    """
    spec = importlib.util.find_spec("wonderwords")
    if spec is None or spec.origin is None:
        raise DataError(f"RULER's words need wonderwords: pip install wonderwords=={VERSION}")
    digest, lists = hashlib.sha256(), {}
    for kind in _KINDS:
        text = (Path(spec.origin).parent / "assets" / f"{kind}list.txt").read_text("utf-8")
        words = {line.strip() for line in text.splitlines()}
        lists[kind] = tuple(sorted(word for word in words if re.fullmatch("[a-z]+", word)))
        digest.update("\n".join((kind, *lists[kind], "")).encode())
    if digest.hexdigest() != _SHA256:
        raise DataError(
            "this version of wonderwords has other words, which would make other data sets: "
            f"pip install wonderwords=={VERSION}"
        )
    return lists


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Return all words of `word_lists`, sorted, without doubles."""
    return tuple(sorted({word for words in word_lists().values() for word in words}))


def draw_pair(draw: Draw) -> str:
    """Return a word such as "quiet-harbor"."""
    lists = word_lists()
    return f"{draw.choice(lists['adjective'])}-{draw.choice(lists['noun'])}"
