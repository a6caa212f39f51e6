"""RULER's question answering (arXiv 2404.06654), built from the files of SQuAD and HotpotQA.

A question's own passages stand among others, as many as fit: first those of the same article
(SQuAD), then any. The prompt is that of the sets that ReFINE's experiments used. What is ours:
questions are chosen by the seed, the same at every length, where RULER takes the first ones, which
are all about one or two articles; and passages are fitted one by one, none twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refine_jax.base.errors import DataError
from refine_jax.base.files import counted
from refine_jax.data.formats import record_files
from refine_jax.data.records import Records
from refine_jax.data.references import read_references
from refine_jax.data.tasks.draw import Draw
from refine_jax.data.tasks.example import Example, Naming, Task
from refine_jax.data.tasks.haystack import count_tokens, fit
from refine_jax.data.tasks.longbench import PROMPTS
from refine_jax.data.tokenizer import Tokenizer

RULER_QA = {
    "ruler_squadqa": Task("ruler_squadqa", "ruler_qa", "ruler_qa_refine", 32),
    "ruler_hotpotqa": Task("ruler_hotpotqa", "ruler_qa", "ruler_qa_refine", 32),
}


@dataclass(frozen=True)
class PassageQuestion:
    """A question over passages.

    Attributes:
        text: the question.
        answers: the references, as often as the file has them, without empty ones.
        own: numbers of the passages that come with it.
        gold: numbers of those that hold the answer.
        related: numbers of passages to add first.
    """

    text: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    gold: frozenset[int]
    related: tuple[int, ...] = ()


def build_examples(
    task: Task,
    path: str,
    *,
    length: int,
    samples: int,
    tokenizer: Tokenizer,
    seed: int,
    setting: Naming = str,
) -> list[Example]:
    """Return samples of a length.

    task: one of `RULER_QA`.
    path: SQuAD's file (train-v2.0.json, dev-v2.0.json, or of version 1.1), or HotpotQA's
        (hotpot_dev_distractor_v1.json and the like).
    length: the most tokens of bos, prompt and answer. Questions whose own passages need more are
        passed over.
    samples: how many.
    tokenizer: counts the tokens.
    seed: of the choice of questions and passages.
    setting: names the arguments for errors.

    Raises DataError: the file is not what the task needs, or too few questions fit.
    """
    questions, passages = _read(task, path, setting("data"))
    budget = length - task.max_new_tokens
    examples: list[Example] = []
    for number in Draw("ruler_qa", seed, task.name).shuffled(range(len(questions))):
        if len(examples) == samples:
            break
        question = questions[number]
        if count_tokens(tokenizer, _prompt(question, question.own, passages)) <= budget:
            draw = Draw("ruler_qa", seed, task.name, length, number)
            examples.append(
                _example(task, len(examples), number, question, passages, length, tokenizer, draw)
            )
    if len(examples) < samples:
        raise DataError(
            f"only {len(examples)} of the {counted(len(questions), 'question')} of {path} fit into "
            f"{setting('length')}={length}: choose fewer samples or a larger length. "
            f"Got: {setting('samples')}={samples}."
        )
    return examples


def _example(
    task: Task,
    index: int,
    number: int,
    question: PassageQuestion,
    passages: Sequence[str],
    length: int,
    tokenizer: Tokenizer,
    draw: Draw,
) -> Example:
    near = {*question.own, *question.related}
    others = [i for i in range(len(passages)) if i not in near]
    added = [*draw.shuffled(question.related), *draw.shuffled(others)]

    def chosen(size: int) -> list[int]:
        return draw.fork(size).shuffled([*question.own, *added[: size - len(question.own)]])

    size, tokens = fit(
        lambda size: _prompt(question, chosen(size), passages),
        tokenizer=tokenizer,
        budget=length - task.max_new_tokens,
        least=len(question.own),
        most=len(question.own) + len(added),
        what=f"question {number} of {task.name}, length {length},",
    )
    order = chosen(size)
    depths = [100 * place // size for place, i in enumerate(order) if i in question.gold]
    return Example(
        task=task.name,
        index=index,
        prompt=_prompt(question, order, passages),
        answers=question.answers,
        max_new_tokens=task.max_new_tokens,
        metadata={
            "length": length,
            "prompt_tokens": tokens,
            "depths": depths,
            "question": number,
            "passages": size,
        },
    )


def _prompt(question: PassageQuestion, numbers: Sequence[int], passages: Sequence[str]) -> str:
    context = "\n\n".join(
        f"Document {place}:\n{passages[number]}" for place, number in enumerate(numbers, 1)
    )
    return PROMPTS["hotpotqa"].format(context=context, input=question.text)


def _read(task: Task, path: str, setting: str) -> tuple[list[PassageQuestion], list[str]]:
    """Return the questions and all passages of a file, each passage once."""
    records = Records(record_files(path, setting))
    content: Any = [records[index] for index in range(len(records))]
    if task.name == "ruler_squadqa" and len(content) == 1:
        (content,) = content
    reader, kind = {
        "ruler_squadqa": (_read_squad, "SQuAD"),
        "ruler_hotpotqa": (_read_hotpotqa, "HotpotQA"),
    }[task.name]
    try:
        questions, passages = reader(content, path)
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a file of {kind}, which {task.name} needs") from error
    if not questions:
        raise DataError(f"{path} holds no question with an answer")
    return questions, passages


def _answers(value: Any, path: str) -> tuple[str, ...]:
    references = read_references(value, lambda: f"an answer in {path}")
    return tuple(answer for answer in references if answer)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")  # `_read` says so of the file
    return value


def _read_squad(content: Any, path: str) -> tuple[list[PassageQuestion], list[str]]:
    numbers: dict[str, int] = {}
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            numbers.setdefault(_text(paragraph["context"]), len(numbers))
    questions = []
    for article in content["data"]:
        siblings = dict.fromkeys(numbers[p["context"]] for p in article["paragraphs"])
        for paragraph in article["paragraphs"]:
            own = numbers[paragraph["context"]]
            related = tuple(i for i in siblings if i != own)
            for entry in paragraph["qas"]:
                text, answers = _text(entry["question"]), _answers(entry["answers"], path)
                if answers and not entry.get("is_impossible"):
                    gold = frozenset((own,))
                    questions.append(PassageQuestion(text, answers, (own,), gold, related))
    return questions, list(numbers)


def _read_hotpotqa(content: Any, path: str) -> tuple[list[PassageQuestion], list[str]]:
    numbers: dict[str, int] = {}
    questions = []
    for entry in content:
        supporting = {title for title, _ in entry["supporting_facts"]}
        own: dict[int, None] = {}
        gold = set()
        for title, sentences in entry["context"]:
            passage = f"{title}\n{''.join(sentences)}"
            number = numbers.setdefault(passage, len(numbers))
            own[number] = None
            if title in supporting:
                gold.add(number)
        text, answers = _text(entry["question"]), _answers(entry["answer"], path)
        if answers:
            questions.append(PassageQuestion(text, answers, tuple(own), frozenset(gold)))
    return questions, list(numbers)
