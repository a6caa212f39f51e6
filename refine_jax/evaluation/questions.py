"""The examples of an evaluation as token ids, in the order in which they are answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from refine_jax.base.errors import ConfigError, DataError
from refine_jax.config import EvaluateConfig
from refine_jax.data.prompts import cut_prompt
from refine_jax.data.tasks import TASKS, Example, Task, check_request, load_examples
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.settings import suggestion


@dataclasses.dataclass(frozen=True)
class Question:
    """An example, ready to be answered.

    name: "task/length/index", or "task/index" where no length was asked for; decides its random
    numbers. set_name: that of all examples of its task and length. tokens: ids [P] int32 of the
    prompt. cut: tokens that were cut from it. budget: most tokens of the answer.
    """

    name: str
    set_name: str
    example: Example
    tokens: np.ndarray
    cut: int
    budget: int
    metric: str


def load_questions(
    config: EvaluateConfig, tokenizer: Tokenizer, *, bos: bool, max_new_tokens: int | None = None
) -> list[Question]:
    """All questions of an evaluation, as its tasks come.

    bos: whether prompts begin with the begin-of-sequence token. max_new_tokens: budget of every
    answer; None: that of each example.

    Raises:
      ConfigError: An unknown task, or lengths that leave no room for a prompt.
      DataError: Examples cannot be made or read.
    """
    lengths = config.token_lengths
    if not config.task_names:
        raise ConfigError("config.evaluate.tasks names no task.")
    for name in config.task_names:
        if name not in TASKS:
            raise ConfigError(
                f"config.evaluate.tasks: there is no task {name!r}.{suggestion(name, TASKS)} "
                f"Tasks: {', '.join(TASKS)}."
            )
    requests = [
        (TASKS[name], length, _sources(config, TASKS[name]))
        for name in config.task_names
        # LongBench has no sets of a length; its rows are taken, and cut, as they are.
        for length in ([None] if TASKS[name].group == "longbench" else lengths)
    ]
    for task, length, sources in requests:  # before minutes go into making the first sets
        check_request(task.name, length=length, **sources)
    questions = []
    for task, length, sources in tqdm(requests, desc="sets", unit="set", disable=None):
        name = task.name
        examples = load_examples(
            name, length=length, tokenizer=tokenizer, seed=config.seed, **sources
        )
        metric = f"ruler_qa_{config.ruler_qa}" if task.group == "ruler_qa" else task.metric
        set_name = name if length is None else f"{name}/{length}"
        prompts = tokenizer.encode_batch([example.prompt for example in examples], bos=bos)
        questions += [
            _question(example, ids, set_name, metric, max_new_tokens, config, tokenizer)
            for example, ids in zip(examples, prompts, strict=True)
        ]
    return questions


def _sources(config: EvaluateConfig, task: Task) -> dict[str, Any]:
    """What the examples of a task are made or read from, as `load_examples` takes it."""
    # Needles, vt, cwe and fwe are made from the seed, whatever else is read.
    data = config.data if task.group in ("ruler_qa", "longbench") else ""
    return {"samples": config.samples, "data": data or None, "essays": config.essays or None}


def shuffled(questions: Sequence[Question], seed: int | None) -> list[Question]:
    """The questions in an order that the seed decides; None: as they are."""
    if seed is None:
        return list(questions)
    order = np.random.default_rng(seed).permutation(len(questions))
    return [questions[index] for index in order]


def _question(
    example: Example,
    ids: np.ndarray,
    set_name: str,
    metric: str,
    max_new_tokens: int | None,
    config: EvaluateConfig,
    tokenizer: Tokenizer,
) -> Question:
    name = f"{set_name}/{example.index}"
    budget = max_new_tokens or example.max_new_tokens
    if len(ids) == 0:
        raise DataError(f"{name} has an empty prompt: set config.data.add_bos, or leave it out")
    whole = len(ids)
    if config.max_tokens is not None:
        room = config.max_tokens - budget
        if room < 2:
            raise ConfigError(
                "config.evaluate.max_tokens must leave at least 2 tokens to the prompt beside the "
                f"answer. Got: max_tokens={config.max_tokens}, {budget} for the answer of {name}."
            )
        ids = cut_prompt(ids, room, config.cut, bos_id=tokenizer.bos_id)
    return Question(name, set_name, example, ids, whole - len(ids), budget, metric)


def group_by_length(questions: Sequence[Question], size: int, length_of) -> list[list[Question]]:
    """Groups of up to `size` questions whose prompts have one `length_of(tokens)`, in order.

    How long a row a prompt is computed in then depends on that prompt alone.
    """
    groups: list[list[Question]] = []
    open_groups: dict[int, list[Question]] = {}
    for question in questions:
        group = open_groups.setdefault(length_of(len(question.tokens)), [])
        if not group:
            groups.append(group)
        group.append(question)
        if len(group) == size:
            del open_groups[length_of(len(question.tokens))]
    return groups


def group_in_order(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Groups of `size` questions one after the other, the last one smaller."""
    return [list(questions[at : at + size]) for at in range(0, len(questions), size)]
