"""Scores of answers, equal to those of the published scorers.

    score("qa_f1", "the Eiffel tower in Paris", ["Eiffel Tower"])  # 0.667

A metric is a name; a task names its metric (`refine_jax.data.tasks.TASKS`). The answers are the
references, of which the best counts unless the metric says otherwise. One difference: an empty
reference is never found by RULER's scores, where the published ones find it in every response
(`"" in response`).

| name | what it is | from |
|---|---|---|
| `qa_f1` | F1 of the bags of words, of the first line | LongBench question answering |
| `qa_f1_nonblank` | the same, after leading line ends | LongBench triviaqa |
| `rouge_l` | ROUGE-L F of the whole response | LongBench summaries |
| `rouge_l_nonblank` | of the first line after leading line ends | LongBench samsum |
| `classification` | class names found in that line | LongBench trec |
| `code_similarity` | of the first line that is code | LongBench lcc, repobench-p |
| `ruler_recall` | fraction of the answers found | RULER needles, vt, cwe, fwe |
| `ruler_qa_refine` | any answer found in the first line | RULER QA as ReFINE scores it |
| `ruler_qa_nvidia` | any answer found in the response | RULER QA as NVIDIA scores it |
| `ruler_qa_lm_eval` | fraction of the answers found in it | RULER QA as lm-eval scores it |
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

# The fine classes of TREC as LongBench spells them (`all_classes` of its trec rows).
TREC_CLASSES = (
    "Abbreviation",
    "Animal",
    "City",
    "Color",
    "Country",
    "Currency name",
    "Date",
    "Definition of something",
    "Description of a person",
    "Description of something",
    "Disease and medicine",
    "Distance, linear measure",
    "Element and substance",
    "Equivalent term",
    "Event",
    "Expression abbreviated",
    "Food",
    "Group or organization of person",
    "Individual",
    "Invention, book and other creative piece",
    "Language",
    "Lasting time of somethin",
    "Letter like a-z",
    "Manner of an action",
    "Mountain",
    "Musical instrument",
    "Number of something",
    "Order, rank",
    "Organ of body",
    "Other entity",
    "Other location",
    "Other number",
    "Percent, fraction",
    "Plant",
    "Postcode or other code",
    "Price",
    "Product",
    "Reason",
    "Religion",
    "Size, area and volume",
    "Speed",
    "Sport",
    "State",
    "Symbols and sign",
    "Techniques and method",
    "Temperature",
    "Title of a person",
    "Vehicle",
    "Weight",
    "Word with a special property",
)

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CONTROL = re.compile(r"[\x00-\x1f]")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(metric: str, response: str, answers: Sequence[str]) -> float:
    """Return the score of a response, from 0 to 1.

    metric: a name of `METRICS`. response: the text that the model wrote, as it is. answers: the
    references; without any the score is 0.

    Raises KeyError: there is no such metric.
    """
    if metric not in METRICS:
        raise KeyError(f"metric must be one of {', '.join(METRICS)}. Got: {metric!r}.")
    return METRICS[metric](response, answers)


def _first_line(response: str) -> str:
    return response.split("\n", 1)[0]


def _first_nonblank_line(response: str) -> str:
    return _first_line(response.lstrip("\n"))


def _whole(response: str) -> str:
    return response


def _best(
    similarity: Callable[[str, str], float], part: Callable[[str], str] = _whole
) -> Callable[[str, Sequence[str]], float]:
    """Return the metric that compares a part of the response with each answer."""

    def metric(response: str, answers: Sequence[str]) -> float:
        text = part(response)
        return max((similarity(text, answer) for answer in answers), default=0.0)

    return metric


# ---- LongBench (arXiv 2308.14508) ----


def _words(text: str) -> list[str]:
    """List the words of an answer in SQuAD's normal form: no case, punctuation or articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(text: str, answer: str) -> float:
    given, wanted = _words(text), _words(answer)
    common = (Counter(given) & Counter(wanted)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _rouge_l(text: str, answer: str) -> float:
    """Compute summary-level ROUGE-L F, as the package rouge 1.0.1 does.

    It differs from the paper's: lengths and matches count distinct words, over all sentences.
    (That package recurses, and gives up with a score of 0 on two sentences of about 1,000 words
    together; answers within LongBench's budgets have none, and here they are scored.)
    """
    summary, reference = _sentences(text), _sentences(answer)
    if not summary or not reference:
        return 0.0
    matched: set[str] = set()
    for sentence in reference:
        for other in summary:
            matched |= _lcs_words(sentence, other)
    recall = len(matched) / len({word for sentence in reference for word in sentence})
    precision = len(matched) / len({word for sentence in summary for word in sentence})
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    # A sentence of white space is one empty word, which counts like any other.
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _lcs_words(left: list[str], right: list[str]) -> set[str]:
    """List the distinct words of a longest common subsequence.

    There may be several: of two that are equally long it is the one that skips a word of `right`
    first, read from the end.
    """
    rows = [[0] * (len(right) + 1)]
    for word in left:
        above, row = rows[-1], [0]
        for j, other in enumerate(right):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        rows.append(row)
    common = set()
    i, j = len(left), len(right)
    while i and j:
        if left[i - 1] == right[j - 1]:
            i, j = i - 1, j - 1
            common.add(left[i])
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return common


def _class_score(text: str, answer: str) -> float:
    names = [name for name in TREC_CLASSES if name in text]
    return 1.0 / len(names) if answer in names else 0.0


def _code_line(response: str) -> str:
    """Return the first line without a sign of a comment or a code fence, else all."""
    for line in response.lstrip("\n").split("\n"):
        if not any(sign in line for sign in ("`", "#", "//")):
            return line
    return response


def _similarity(text: str, answer: str) -> float:
    """Compute `fuzz.ratio` of the package fuzzywuzzy in its pure form, over 100."""
    if text == answer:
        return 1.0
    if not text or not answer:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, text, answer).ratio()) / 100


# ---- RULER (arXiv 2404.06654) ----


def _plain(text: str) -> str:
    """Bring a response into RULER's normal form: control characters are line ends."""
    return _CONTROL.sub("\n", text.strip()).strip()


def contains(text: str, answer: str) -> bool:
    """Return whether a text has an answer in it, case aside; a blank one is in none."""
    return bool(answer.strip()) and answer.lower() in text.lower()


def _contains(text: str, answer: str) -> float:
    return float(contains(text, answer))


def _fraction_found(response: str, answers: Sequence[str]) -> float:
    text = _plain(response)
    return sum(_contains(text, answer) for answer in answers) / max(1, len(answers))


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "qa_f1": _best(_f1, _first_line),
    "qa_f1_nonblank": _best(_f1, _first_nonblank_line),
    "rouge_l": _best(_rouge_l),
    "rouge_l_nonblank": _best(_rouge_l, _first_nonblank_line),
    "classification": _best(_class_score, _first_nonblank_line),
    "code_similarity": _best(_similarity, _code_line),
    "ruler_recall": _fraction_found,
    "ruler_qa_refine": _best(_contains, lambda response: _plain(_first_line(response))),
    "ruler_qa_nvidia": _best(_contains, _plain),
    "ruler_qa_lm_eval": _fraction_found,
}
