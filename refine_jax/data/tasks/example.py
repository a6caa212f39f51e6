"""What a task asks, and how its answer is scored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Naming = Callable[[str], str]
"""From the name of an argument of `load_examples` to what the user sets it with, for messages."""


def settings_of(prefix: str) -> Naming:
    """Return how arguments are called where they are flags or settings: `prefix` and their name.

    Those that take several, such as lengths, are in the plural there.
    """
    several = {"task": "tasks", "length": "lengths"}
    return lambda name: prefix + several.get(name, name)


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        task: name of the task it belongs to.
        index: its number in the task; equal indices at other lengths need not ask the same.
        prompt: the whole text that the model reads.
        answers: the references.
        max_new_tokens: budget of the answer.
        metadata: what is known about it, as JSON values: "prompt_tokens" (with bos), for built
            tasks "length" (the most tokens of prompt and answer) and, where answers have a place
            in the context, "depths": per cent of the context before each answer's needle.
    """

    task: str
    index: int
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: as `load_examples` takes it.
        group: "niah", "ruler", "recall", "ruler_qa" or "longbench".
        metric: name of a score in `refine_jax.evaluation.metrics`.
        max_new_tokens: budget of an answer.
    """

    name: str
    group: str
    metric: str
    max_new_tokens: int
