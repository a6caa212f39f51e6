"""Tasks with prompts and answers: RULER, built here at any length, and LongBench, from files.

    from refine_jax.data.tasks import load_examples
    from refine_jax.data.tokenizer import load_tokenizer
    from refine_jax.evaluation.metrics import score

    tokenizer = load_tokenizer("mistral-v1")
    examples = load_examples("niah_single_1", length=4096, samples=500, tokenizer=tokenizer)
    score(TASKS["niah_single_1"].metric, "8213476", examples[0].answers)

`python -m refine_jax.data.tasks.generate` writes such sets to files.
"""

from __future__ import annotations

from refine_jax.data.options import DataError
from refine_jax.data.tasks import niah
from refine_jax.data.tasks.example import Example, Task
from refine_jax.data.tasks.haystack import Essays, load_essays
from refine_jax.data.tokenizer import Tokenizer

__all__ = ["TASKS", "Essays", "Example", "Task", "load_essays", "load_examples"]

TASKS: dict[str, Task] = {
    name: Task(name, "niah", "ruler_recall", niah.MAX_NEW_TOKENS) for name in niah.NEEDLES
}


def load_examples(
    name: str,
    *,
    length: int | None = None,
    samples: int | None = None,
    tokenizer: Tokenizer,
    seed: int = 0,
    data: str | None = None,
    essays: str | None = None,
) -> list[Example]:
    """Return examples of a task."""
    task = TASKS[name]
    text = load_essays(essays) if niah.NEEDLES[name].haystack == "essay" else None
    return [
        niah.make_example(task.name, i, length=length, tokenizer=tokenizer, seed=seed, essays=text)
        for i in range(samples)
    ]
