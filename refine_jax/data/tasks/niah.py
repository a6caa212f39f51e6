"""RULER's eight needle-in-a-haystack tasks (arXiv 2404.06654), seeded per sample.

Needles are sentences "One of the special magic numbers for quiet-harbor is: 8213476."; the prompt
asks for the values of some keys and begins the answer, as RULER's template for base models does.
Tasks, wording, parameters and the grid of 40 depths are RULER's. What is ours:

* Every sample has random numbers of its own, made of (seed, task, length, index): it does not
  depend on other samples or tasks, on the platform or on the version of anything.
* Haystacks are fitted to the length for each sample, to the word or line.
* All keys and all values of a sample differ, and no value occurs in the essays, so that each is
  there exactly once.
* Needles lie on the grid of depths in every kind of haystack, not in essays only.
* Sentences end where a word ends in . ! or ?, without a trained splitter.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from refine_jax.data.tasks.draw import Draw, draw_pair
from refine_jax.data.tasks.example import Example
from refine_jax.data.tasks.haystack import DEPTHS, NOISE, Essays, fit, hide
from refine_jax.data.tokenizer import Tokenizer

MAX_NEW_TOKENS = 128

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_MANY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text are"
)
_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text is"
)
_KINDS: dict[str, Callable[[Draw], str]] = {
    "words": draw_pair,
    "numbers": lambda draw: str(1_000_000 + draw.below(9_000_000)),
    "uuids": lambda draw: str(uuid.UUID(int=draw.bits(128), version=4)),
}


@dataclass(frozen=True)
class Needles:
    """What is hidden where, and what is asked.

    Attributes:
        haystack: "noise" (RULER's five sentences, repeated), "essay" or "needle" (other needles).
        keys: kind of the keys: "words", "numbers" or "uuids".
        values: kind of the values.
        num_keys: keys hidden on purpose.
        values_per_key: needles of a key, each with a value of its own.
        queries: keys that are asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    values_per_key: int = 1
    queries: int = 1


NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", values="uuids"),
    "niah_multikey_1": Needles("essay", num_keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Needles("essay", values_per_key=4),
    "niah_multiquery": Needles("essay", num_keys=4, queries=4),
}


def make_example(
    task: str,
    index: int,
    *,
    length: int,
    tokenizer: Tokenizer,
    seed: int,
    essays: Essays | None = None,
) -> Example:
    """Return a sample.

    task: a name of `NEEDLES`. index: which sample. length: the most tokens of bos, prompt and
    answer. tokenizer: counts the tokens. seed: of the set. essays: the haystack of the tasks that
    hide needles in essays.

    Raises DataError: the length is too short.
    """
    spec = NEEDLES[task]
    draw = Draw("ruler", 1, seed, task, length, index)
    used: set[str] = set()
    keys = [_fresh(spec.keys, draw, used, essays) for _ in range(spec.num_keys)]
    pairs = [
        (key, _fresh(spec.values, draw, used, essays))
        for key in keys
        for _ in range(spec.values_per_key)
    ]
    depths = dict(zip(draw.shuffled(pairs), draw.sample(DEPTHS, len(pairs)), strict=True))
    needles = [(depth, _needle(spec, *pair)) for pair, depth in depths.items()]
    asked = draw.sample(keys, spec.queries)
    answers = [pair for key in asked for pair in pairs if pair[0] == key]

    lines: list[str] = []  # the other needles of a haystack of needles, as many as were needed yet

    def pieces(size: int) -> list[str]:
        if spec.haystack == "essay":
            return essays.sentences(size)
        if spec.haystack == "noise":
            return [NOISE] * size
        while len(lines) < size:
            pair = [_fresh(kind, draw, used, essays) for kind in (spec.keys, spec.values)]
            lines.append(_needle(spec, *pair))
        return lines[:size]

    one = len(answers) == 1
    template = _ONE if one else _MANY
    kind = spec.values.removesuffix("s") if one else spec.values
    query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    space = " " if spec.haystack == "essay" else "\n"

    def prompt(size: int) -> str:
        context = space.join(hide(needles, pieces(size)))
        return template.format(kind=kind, context=context, query=query)

    size, tokens = fit(
        prompt,
        tokenizer=tokenizer,
        budget=length - MAX_NEW_TOKENS,
        least=1,
        what=f"{task} of length {length}",
    )
    return Example(
        task=task,
        index=index,
        prompt=prompt(size),
        answers=tuple(value for _, value in answers),
        max_new_tokens=MAX_NEW_TOKENS,
        metadata={
            "length": length,
            "prompt_tokens": tokens,
            "depths": [depths[pair] for pair in answers],
        },
    )


def _fresh(kind: str, draw: Draw, used: set[str], essays: Essays | None) -> str:
    """Return a key or value that is nowhere yet."""
    while True:
        word = _KINDS[kind](draw)
        if word not in used and not (essays and word in essays.text):
            used.add(word)
            return word


def _needle(spec: Needles, key: str, value: str) -> str:
    return _NEEDLE.format(kind=spec.values, key=key, value=value)
