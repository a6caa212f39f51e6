"""Random draws that stay the same: everywhere, and in every later version of Python and numpy.

The stream is SHA-256 in counter mode, turned into draws by integer arithmetic of our own, so a
data set depends on nothing but its key. (Python and numpy only promise to keep their raw bits; how
`shuffle`, `sample` or `choice` use them may change and has changed.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


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
