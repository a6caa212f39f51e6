"""English words: those of the package wonderwords, which RULER and lm-eval draw from too.

A set of needles is only the same set again if the words are, so exactly one version of the lists
is accepted. Words with capitals, spaces or hyphens are left out: keys are made as adjective-noun.
"""

import functools
import hashlib
import importlib.util
import re
from pathlib import Path

from refine_jax.base.errors import DataError
from refine_jax.data.tasks.draw import Draw

VERSION = "3.0.1"
_SHA256 = "2bdd7be1d23ebad6478a70d68290a8844851a5d8263390ca841a87922415e7e4"
_KINDS = ("noun", "adjective", "verb")


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
