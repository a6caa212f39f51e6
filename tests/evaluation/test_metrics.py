"""Scores equal those of the published scorers, and slow references written from their formulas."""

import functools
import itertools
import string

import pytest
from goldens import load_json
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_jax.data.references import FRACTIONS
from refine_jax.data.tasks import TASKS
from refine_jax.evaluation.metrics import METRICS, TREC_CLASSES, score

quick = settings(max_examples=80, deadline=None)
texts = st.text("abBTé東  .\n\t\0!-", max_size=24).map(lambda text: text.replace("T", "the "))


def test_scores_equal_the_official_scorers() -> None:
    triples = load_json("refine_rl", "reward_score.json")
    metrics = {"ruler": "ruler_qa_refine", **{name: task.metric for name, task in TASKS.items()}}
    found = [score(metrics[t["task"]], t["response"], t["answers"]) for t in triples]
    # The official RULER score finds an empty reference in whatever the model says.
    empty = [t["task"] == "ruler" and t["answers"] == [""] for t in triples]
    assert sum(empty) == 2 and {t["score"] for t, e in zip(triples, empty, strict=True) if e} == {1}
    assert found == [0 if e else t["score"] for t, e in zip(triples, empty, strict=True)]


# The similarity of code counts characters that agree, of blank ones too.
@pytest.mark.parametrize("metric", [name for name in METRICS if name != "code_similarity"])
@pytest.mark.parametrize("empty", ["", " ", "\n", "\t \u3000"])
def test_an_empty_reference_is_never_matched(metric, empty) -> None:
    for response in ("wrong", "two words\n and\t a \u3000 line"):
        assert score(metric, response, [empty]) == 0
    whole = score(metric, "x", ["x", empty])
    assert whole == (0.5 if metric in FRACTIONS else score(metric, "x", ["x"]))


def test_metrics_that_want_every_reference_are_named() -> None:
    """A reference that is not found lowers their score, and no other."""
    lowered = {m for m in METRICS if score(m, "City", ["City", "q"]) < score(m, "City", ["City"])}
    assert lowered == FRACTIONS


def test_every_task_names_a_metric_and_errors_name_them() -> None:
    assert {task.metric for task in TASKS.values()} <= set(METRICS)
    with pytest.raises(KeyError, match=r"metric must be one of qa_f1.*Got: 'bleu'"):
        score("bleu", "a", ["a"])


@quick
@given(response=texts, answers=st.lists(texts, max_size=2))
def test_scores_are_fractions_whatever_the_text(response, answers) -> None:
    for metric in METRICS:
        assert 0 <= score(metric, response, answers) <= 1
        assert score(metric, response, []) == 0


def words_of(text: str) -> list[str]:
    kept = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    # An article is a whole run of letters, whatever stands beside it.
    runs = ("".join(run) for _, run in itertools.groupby(kept, str.isalnum))
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


@quick
@given(response=texts, answers=st.lists(texts, min_size=1, max_size=3))
def test_f1_pairs_words_off_one_by_one(response, answers) -> None:
    best = 0.0
    for answer in answers:
        found, wanted = words_of(response.partition("\n")[0]), words_of(answer)
        left, pairs = list(wanted), 0
        for word in found:
            if word in left:
                left.remove(word)
                pairs += 1
        if pairs:
            best = max(best, 2 * pairs / (len(found) + len(wanted)))
    assert score("qa_f1", response, answers) == pytest.approx(best, abs=1e-12)


def lcs(left: tuple[str, ...], right: tuple[str, ...]) -> tuple[str, ...]:
    """A longest common subsequence; of equally long ones that which leaves out `right`'s end."""

    @functools.cache
    def length(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return 0
        if left[i - 1] == right[j - 1]:
            return 1 + length(i - 1, j - 1)
        return max(length(i - 1, j), length(i, j - 1))

    def walk(i: int, j: int) -> tuple[str, ...]:
        if i == 0 or j == 0:
            return ()
        if left[i - 1] == right[j - 1]:
            return (*walk(i - 1, j - 1), left[i - 1])
        return walk(i - 1, j) if length(i - 1, j) > length(i, j - 1) else walk(i, j - 1)

    return walk(len(left), len(right))


def rouge_l(response: str, answer: str) -> float:
    def sentences(text):
        return [tuple(" ".join(part.split()).split(" ")) for part in text.split(".") if part]

    summary, reference = sentences(response), sentences(answer)
    if not summary or not reference:
        return 0.0
    union = set()
    for wanted in reference:
        for found in summary:
            union.update(lcs(wanted, found))
    p = len(union) / len(set(sum(summary, ())))
    r = len(union) / len(set(sum(reference, ())))
    return 2 * p * r / (p + r + 1e-8)


@quick
@given(response=texts, answer=texts)
def test_rouge_l_is_the_union_of_common_subsequences(response, answer) -> None:
    assert score("rouge_l", response, [answer]) == pytest.approx(rouge_l(response, answer), 1e-12)
    line = response.lstrip("\n").partition("\n")[0]
    assert score("rouge_l_nonblank", response, [answer]) == score("rouge_l", line, [answer])


def matched(left: str, right: str) -> int:
    """Characters in the longest common block and, recursively, on both sides of it."""
    for size in range(min(len(left), len(right)), 0, -1):
        for i in range(len(left) - size + 1):
            j = right.find(left[i : i + size])
            if j >= 0:
                before = matched(left[:i], right[:j])
                return before + size + matched(left[i + size :], right[j + size :])
    return 0


@quick
@given(response=texts.filter(bool), answer=texts.filter(bool))
def test_code_similarity_is_the_share_of_common_blocks(response, answer) -> None:
    line = response.lstrip("\n").partition("\n")[0]  # these texts hold no comments
    expected = 0.0
    if line == answer:
        expected = 1.0
    elif line:
        expected = round(100 * 2 * matched(line, answer) / (len(line) + len(answer))) / 100
    assert score("code_similarity", response, [answer]) == expected


def test_no_class_of_trec_is_part_of_another() -> None:
    """The official scorer drops such classes from its findings, which then never happens."""
    assert len(set(TREC_CLASSES)) == 50
    assert not [(a, b) for a in TREC_CLASSES for b in TREC_CLASSES if a != b and a in b]


@pytest.mark.parametrize(
    ("response", "answers", "refine", "nvidia", "lm_eval"),
    [
        ("Paris\nLondon", ["london", "rome"], 0, 1, 0.5),
        ("\nParis", ["Paris"], 0, 1, 1),
        ("It is 12, 34\nand 56", ["12", "34", "56", "78"], 1, 1, 0.75),
        ("nothing", ["a thing", "another"], 0, 0, 0),
    ],
)
def test_the_three_conventions_of_ruler(response, answers, refine, nvidia, lm_eval) -> None:
    assert score("ruler_qa_refine", response, answers) == refine
    assert score("ruler_qa_nvidia", response, answers) == nvidia
    assert score("ruler_qa_lm_eval", response, answers) == lm_eval
    assert score("ruler_recall", response, answers) == lm_eval
