"""Text around needles, and how much of it fits."""

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from refine_jax.base.errors import DataError
from refine_jax.data.sources import open_texts
from refine_jax.data.tasks.example import Naming
from refine_jax.data.tokenizer import Tokenizer

# One line of RULER's noise.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# RULER's places of needles: 40 from 0 to 100 per cent of the pieces of a haystack.
DEPTHS = tuple(round(100 * i / 39) for i in range(40))
# The text that `essays="stdlib"` names.
STDLIB = "stdlib"
_SENTENCE_END = re.compile(r"[.!?][\"')\]’”]*$")


@dataclass(frozen=True)
class Essays:
    """Running text, read from its beginning and again from there if it is too short.

    Attributes:
        words: the text, cut at white space.
    """

    words: tuple[str, ...]

    @functools.cached_property
    def text(self) -> str:
        """The words with single spaces between them."""
        return " ".join(self.words)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for equal texts."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def sentences(self, count: int) -> list[str]:
        """Return the first `count` words as sentences; the last may be cut off."""
        rounds, rest = divmod(count, len(self.words))
        whole = list(itertools.pairwise((0, *self._sentence_ends)))
        part = [(start, min(end, rest)) for start, end in whole if start < rest]
        spans = whole * rounds + part
        return [" ".join(self.words[start:end]) for start, end in spans]

    @functools.cached_property
    def _sentence_ends(self) -> tuple[int, ...]:
        ends = [i for i, word in enumerate(self.words, 1) if _SENTENCE_END.search(word)]
        return tuple(dict.fromkeys([*ends, len(self.words)]))


def load_essays(essays: str | Essays | None, setting: Naming = str) -> Essays:
    """Return the text of the essay haystack, read once where it is given on.

    essays: a text file, a folder of text files or a glob pattern; of JSON, such as RULER's own
    {"text": ...}, and of parquet the field "text". Or "stdlib", the reference of the Python
    language that comes with every Python: English prose about one subject, and another text in
    every version of Python. That is good for a trial, not for figures to publish. `Essays` come
    back as they are. setting: names the argument for errors.

    Raises DataError: nothing is given, or there is no text in it.
    """
    if isinstance(essays, Essays):
        return essays
    if not essays:
        raise DataError(
            f"this task hides its needles in essays: set `{setting('essays')}` to a text file, a "
            'folder of text files or a glob pattern, or to "stdlib" for a trial'
        )
    if essays == STDLIB:
        from pydoc_data.topics import topics

        words = " ".join(topics[name] for name in sorted(topics)).split()
    else:
        texts = open_texts(essays, setting=setting("essays"))
        words = [word for index in range(len(texts)) for word in texts[index].split()]
    if not words:
        raise DataError(f"no text in {setting('essays')}={essays!r}")
    return Essays(tuple(words))


def hide(needles: Iterable[tuple[int, str]], pieces: Sequence[str]) -> list[str]:
    """Return the pieces with each needle, (depth, text), after `depth` per cent of them."""
    hidden, taken = [], 0
    for depth, needle in sorted(needles):
        place = len(pieces) * depth // 100
        hidden += [*pieces[taken:place], needle]
        taken = place
    return hidden + list(pieces[taken:])


def count_tokens(tokenizer: Tokenizer, prompt: str) -> int:
    """Return the number of tokens of a prompt, with bos if the tokenizer has one."""
    return len(tokenizer.encode(prompt, bos=tokenizer.bos_id is not None))


def fit(
    make: Callable[[int], str],
    *,
    tokenizer: Tokenizer,
    budget: int,
    least: int,
    what: str,
    most: int | None = None,
) -> tuple[int, int]:
    """Return the size of the largest haystack that fits, and its prompt's tokens.

    The number of tokens must grow with the size, nearly evenly: then it takes some five tries.

    make: from a size to the prompt. tokenizer: counts the tokens. budget: the most tokens of a
    prompt, bos counted. least: the smallest size to try. what: the sample, for the error. most: the
    largest size there is; None is no limit.

    Raises DataError: not even the smallest fits.
    """
    low, tokens = least, count_tokens(tokenizer, make(least))
    if tokens > budget:
        raise DataError(
            f"{what} needs at least {tokens} tokens for its prompt, and {max(budget, 0)} are left "
            "beside the answer: choose a larger length"
        )
    high = None if most is None else most + 1  # the smallest size known not to fit
    rate = max(1.0, tokens / (least + 1))
    while high is None or high - low > 1:
        size = low + max(1, int((budget - tokens) / rate))
        size = size if high is None else min(size, high - 1)
        count = count_tokens(tokenizer, make(size))
        if count > tokens:
            rate = (count - tokens) / (size - low)
        if count <= budget:
            low, tokens = size, count
        else:
            high = size
    return low, tokens
