"""The examples of an evaluation as token ids, in the order in which they are answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from refine_jax.config import EvaluateConfig
from refine_jax.data.options import DataError
from refine_jax.data.prompts import cut_prompt
from refine_jax.data.tasks import TASKS, Example, load_examples
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.settings import ConfigError, suggestion


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
    """All questions of an evaluation, in its order.

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
    questions = []
    for name in config.task_names:
        task = TASKS[name]
        # LongBench has no sets of a length; its rows are taken, and cut, as they are.
        for length in [None] if task.group == "longbench" else lengths:
            examples = load_examples(
                name,
                length=length,
                samples=config.samples,
                tokenizer=tokenizer,
                seed=config.seed,
                # Needles, vt, cwe and fwe are made from the seed, whatever else is read.
                data=config.data or None if task.group in ("ruler_qa", "longbench") else None,
                essays=config.essays or None,
            )
            metric = f"ruler_qa_{config.ruler_qa}" if task.group == "ruler_qa" else task.metric
            set_name = name if length is None else f"{name}/{length}"
            prompts = tokenizer.encode_batch([example.prompt for example in examples], bos=bos)
            questions += [
                _question(example, ids, set_name, metric, max_new_tokens, config, tokenizer)
                for example, ids in zip(examples, prompts, strict=True)
            ]
    if config.order_seed is not None:
        order = np.random.default_rng(config.order_seed).permutation(len(questions))
        questions = [questions[index] for index in order]
    return questions


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
