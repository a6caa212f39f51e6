"""RULER's variable tracking and word counting tasks (arXiv 2404.06654), seeded per sample.

* `vt`: a chain of assignments (VAR B = VAR A) in noise; the answers are the variables of a value.
* `cwe`: a numbered list in which 10 words are more frequent than all others.
* `fwe`: coded words with frequencies of a zeta distribution; the answers are the 3 most frequent
  after the dots.

Wording, parameters and the worked example before `vt` and `cwe` are RULER's. What is ours: random
numbers of each sample's own, haystacks fitted to the word or line, a fresh worked example in each
sample (of other words than the question), the grid of depths for the assignments, and no spaces at
the ends of lines: at the end of a prompt one would be a token that begins no answer.
"""

import math
import string
from collections.abc import Callable, Sequence

from refine_jax.data.tasks.draw import Draw, draw_pair, vocabulary
from refine_jax.data.tasks.example import Example
from refine_jax.data.tasks.haystack import DEPTHS, NOISE, count_tokens, fit, hide
from refine_jax.data.tokenizer import Tokenizer

MAX_NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50}

_VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {value} in the text "
    "above. Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {value}, they are:"
)
_HOPS = 4
# RULER's worked example has as much noise as fits into so many tokens.
_VT_EXAMPLE_TOKENS = 500
_VT_EXAMPLE_LINES = 5

_CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)
_COMMON = 10
# From this length on the words are repeated more often (RULER).
_CWE_LONG = 4096

_FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text? "
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
_ZETA_2 = math.pi**2 / 6
# With fewer draws the fourth and fifth word could be as frequent as each other.
_FWE_LEAST = 80
_FWE_TOKENS_PER_CODE = 50


# What a maker returns: from a size to the prompt, the least size, the answers, more metadata.
_Made = tuple[Callable[[int], str], int, Sequence[str], dict]


def make_example(task: str, index: int, *, length: int, tokenizer: Tokenizer, seed: int) -> Example:
    """Return a sample.

    task: "vt", "cwe" or "fwe". index: which sample. length: the most tokens of bos, prompt and
    answer. tokenizer: counts the tokens. seed: of the set.

    Raises DataError: the length is too short.
    """
    draw = Draw("ruler", 1, seed, task, length, index)
    prompt, least, answers, metadata = _MAKERS[task](draw, length, tokenizer)
    size, tokens = fit(
        prompt,
        tokenizer=tokenizer,
        budget=length - MAX_NEW_TOKENS[task],
        least=least,
        what=f"{task} of length {length}",
    )
    return Example(
        task=task,
        index=index,
        prompt=prompt(size),
        answers=tuple(answers),
        max_new_tokens=MAX_NEW_TOKENS[task],
        metadata={"length": length, "prompt_tokens": tokens, **metadata},
    )


def _variable_tracking(draw: Draw, length: int, tokenizer: Tokenizer) -> _Made:
    shown, question_value = draw.sample(range(10_000, 100_000), 2)
    # The example's names are shorter, so none of them is an answer.
    example_names, _, example = _chain(draw, shown, letters=3)

    def worked(lines: int) -> str:
        return f"{example(lines)} {' '.join(example_names)}\n\n"

    most = min(_VT_EXAMPLE_TOKENS, length // 4)
    lines = _VT_EXAMPLE_LINES
    if count_tokens(tokenizer, worked(lines)) < most:
        lines, _ = fit(worked, tokenizer=tokenizer, budget=most, least=lines, what="the example")
    names, depths, question = _chain(draw, question_value, letters=5)
    before = worked(lines)
    return lambda size: before + question(size), 1, names, {"depths": depths}


def _chain(
    draw: Draw, value: int, letters: int
) -> tuple[list[str], list[int], Callable[[int], str]]:
    """Return a chain's variables, their depths, and the prompt with so many lines of noise."""
    names = _codes(draw, string.ascii_uppercase, letters, _HOPS + 1)
    depths = sorted(draw.sample(DEPTHS, len(names)))
    sources = [str(value), *(f"VAR {name}" for name in names)]
    lines = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=False)]
    needles = list(zip(depths, lines, strict=True))

    def prompt(size: int) -> str:
        context = "\n".join(hide(needles, [NOISE] * size))
        return _VT.format(context=context, value=value, count=len(names))

    return names, depths, prompt


def _common_words(draw: Draw, length: int, tokenizer: Tokenizer) -> _Made:
    del tokenizer
    frequent, rare, shown = (30, 3, 40) if length >= _CWE_LONG else (6, 1, 20)
    shown_frequent, shown_rare = (10, 3) if length >= _CWE_LONG else (3, 1)
    words = draw.shuffled(vocabulary())
    example, words = words[:shown], words[shown:]
    known = set(words)

    def numbered(words: Sequence[str]) -> str:
        return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))

    def listed(words: Sequence[str], often: int, seldom: int, order: Draw) -> str:
        entries = [*words[:_COMMON] * often, *words[_COMMON:] * seldom]
        return _CWE.format(context=numbered(order.shuffled(entries)))

    answer = numbered(example[:_COMMON])
    before = f"{listed(example, shown_frequent, shown_rare, draw)} {answer}\n"

    def prompt(size: int) -> str:
        while len(words) < size:  # very long lists need more words than there are
            pair = draw_pair(draw)
            if pair not in known:
                known.add(pair)
                words.append(pair)
        return before + listed(words[:size], frequent, rare, draw.fork(size))

    return prompt, _COMMON + 1, words[:_COMMON], {}


def _frequent_words(draw: Draw, length: int, tokenizer: Tokenizer) -> _Made:
    del tokenizer
    count = max(5, (length - MAX_NEW_TOKENS["fwe"]) // _FWE_TOKENS_PER_CODE)
    codes = ["...", *_codes(draw, string.ascii_lowercase, 6, count - 1)]

    def prompt(size: int) -> str:
        counts = [int(size / (rank * rank) / _ZETA_2) for rank in range(1, count + 1)]
        entries = [code for code, times in zip(codes, counts, strict=True) for _ in range(times)]
        return _FWE.format(context=" ".join(draw.fork(size).shuffled(entries)))

    return prompt, _FWE_LEAST, codes[1:4], {}


def _codes(draw: Draw, alphabet: str, letters: int, count: int) -> list[str]:
    """Return different words of random letters."""
    codes: dict[str, None] = {}
    while len(codes) < count:
        codes["".join(draw.choice(alphabet) for _ in range(letters))] = None
    return list(codes)


_MAKERS = {"vt": _variable_tracking, "cwe": _common_words, "fwe": _frequent_words}
