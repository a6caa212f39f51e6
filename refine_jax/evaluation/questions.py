"""The examples of an evaluation as token ids, in the order in which they are answered."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from refine_jax.base.errors import ConfigError, DataError
from refine_jax.config import EvaluateConfig
from refine_jax.data.prompts import cut_prompt
from refine_jax.data.tasks import (
    TASKS,
    Essays,
    Example,
    NoExamplesError,
    Task,
    check_request,
    is_built,
    load_essays,
    load_examples,
    needs_essays,
    settings_of,
)
from refine_jax.data.tokenizer import Tokenizer, check_ends
from refine_jax.settings import suggestion

_setting = settings_of("config.evaluate.")


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
    config: EvaluateConfig,
    tokenizer: Tokenizer,
    *,
    bos: bool,
    max_new_tokens: int | None = None,
    report: Callable[[str], None] = logging.warning,
) -> list[Question]:
    """Load all questions of an evaluation, as its tasks come.

    Of tasks and lengths that are read from files, those that the files lack are left out.

    bos: whether prompts begin with the begin-of-sequence token. max_new_tokens: budget of every
    answer; None: that of each example. report: takes a sentence for each kind of what was left out.

    Raises:
      ConfigError: An unknown task, or lengths that leave no room for a prompt.
      DataError: Examples cannot be made or read, or there are none.
    """
    if not config.task_names:
        raise ConfigError("config.evaluate.tasks names no task.")
    for name in config.task_names:
        if name not in TASKS:
            raise ConfigError(
                f"config.evaluate.tasks: there is no task {name!r}.{suggestion(name, TASKS)} "
                f"Tasks: {', '.join(TASKS)}."
            )
    check_ends(tokenizer, bos=bos, setting="config.data.{}".format)
    lengths = config.token_lengths
    with_essays = any(map(needs_essays, config.task_names))
    essays = load_essays(config.essays, _setting) if with_essays else None
    requests = [
        (TASKS[name], length, _sources(config, TASKS[name], essays))
        for name in config.task_names
        # LongBench has no sets of a length; its rows are taken, and cut, as they are.
        for length in ([None] if TASKS[name].group == "longbench" else lengths)
    ]
    made = [task.name for task, _, sources in requests if is_built(task.name, None)]
    made = [
        name for name in dict.fromkeys(made) if TASKS[name].group in ("niah", "ruler", "recall")
    ]
    if config.data and made:
        names = ", ".join(made)
        report(f"config.evaluate.data is not read for {names}: they are made from the seed")
    for task, length, sources in requests:  # before minutes go into making the first sets
        check_request(task.name, length=length, setting=_setting, **sources)
        if is_built(task.name, sources["data"]):
            _room(config, max_new_tokens or task.max_new_tokens, task.name)
    # What is read comes before what is made, for the same reason.
    order = sorted(
        range(len(requests)), key=lambda i: is_built(requests[i][0].name, requests[i][2]["data"])
    )
    groups: dict[int, list[Question]] = {}
    missing: list[NoExamplesError] = []
    for number in tqdm(order, desc="sets", unit="set", disable=None):
        task, length, sources = requests[number]
        metric = f"ruler_qa_{config.ruler_qa}" if task.group == "ruler_qa" else task.metric
        try:
            examples = load_examples(
                task.name,
                length=length,
                tokenizer=tokenizer,
                seed=config.seed,
                metric=metric,
                report=report,
                setting=_setting,
                **sources,
            )
        except NoExamplesError as reason:
            missing.append(reason)
            continue
        set_name = task.name if length is None else f"{task.name}/{length}"
        prompts = tokenizer.encode_batch([example.prompt for example in examples], bos=bos)
        groups[number] = [
            _question(example, ids, set_name, metric, max_new_tokens, config, tokenizer)
            for example, ids in zip(examples, prompts, strict=True)
        ]
    if missing and not groups:
        wanted = "" if len(missing) == 1 else f" Nor of {', '.join(x.wanted for x in missing[1:])}."
        raise DataError(f"{missing[0]}{wanted}")
    if missing:
        report(f"{missing[0].data} lacks {', '.join(x.wanted for x in missing)}: left out")
    return [question for number in sorted(groups) for question in groups[number]]


def digest(questions: Sequence[Question]) -> str:
    """Hash all that answers and scores depend on; equal for equal questions, in their order.

    It does not depend on where the files of a set are.
    """
    hasher = hashlib.blake2b(digest_size=16)
    for question in questions:
        fields = (
            question.name,
            question.set_name,
            question.tokens.tolist(),
            question.budget,
            question.metric,
            question.example.answers,
        )
        hasher.update(json.dumps(fields).encode())
    return hasher.hexdigest()


def _sources(config: EvaluateConfig, task: Task, essays: Essays | None) -> dict[str, Any]:
    """Tell `load_examples` what the examples of a task are made or read from."""
    # Needles, vt, cwe, fwe and recall are made from the seed, whatever else is read.
    data = config.data if task.group in ("ruler_qa", "longbench") else ""
    return {"samples": config.samples, "data": data or None, "essays": essays}


def shuffled(questions: Sequence[Question], seed: int | None) -> list[Question]:
    """Shuffle the questions by a seed; None: as they are."""
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
    room = _room(config, budget, name)
    if room is not None:
        ids = cut_prompt(ids, room, config.cut, bos_id=tokenizer.bos_id)
    return Question(name, set_name, example, ids, whole - len(ids), budget, metric)


def _room(config: EvaluateConfig, budget: int, name: str) -> int | None:
    """Count the most tokens of a prompt whose answer has up to `budget`; None: any number."""
    if config.max_tokens is None:
        return None
    room = config.max_tokens - budget
    if room < 2:
        raise ConfigError(
            "config.evaluate.max_tokens must leave at least 2 tokens to the prompt beside the "
            f"answer. Got: max_tokens={config.max_tokens}, {budget} for the answer of {name}."
        )
    return room


def group_by_length(questions: Sequence[Question], size: int, length_of) -> list[list[Question]]:
    """Group up to `size` questions whose prompts have one `length_of(tokens)`, in order.

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
    """Group `size` questions one after the other, the last group smaller."""
    return [list(questions[at : at + size]) for at in range(0, len(questions), size)]
