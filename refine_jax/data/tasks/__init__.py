"""Tasks with prompts and answers: RULER and made-up facts, built here, and LongBench, from files.

    from refine_jax.data.tasks import TASKS, load_examples
    from refine_jax.data.tokenizer import load_tokenizer
    from refine_jax.evaluation.metrics import score

    tokenizer = load_tokenizer("mistral-v1")
    examples = load_examples("niah_single_1", length=4096, samples=500, tokenizer=tokenizer)
    score(TASKS["niah_single_1"].metric, "8213476", examples[0].answers)

`python -m refine_jax.data.tasks.generate` writes such sets to files.
"""

import dataclasses
import difflib
from collections.abc import Callable

from absl import logging

from refine_jax.base.errors import DataError
from refine_jax.base.files import given_path, path_of, short
from refine_jax.data.sources import find_files
from refine_jax.data.tasks import facts, files, niah, ruler_qa, synthetic
from refine_jax.data.tasks.example import Example, Naming, Task, settings_of
from refine_jax.data.tasks.files import MAX_LENGTH, NoExamplesError
from refine_jax.data.tasks.haystack import Essays, load_essays
from refine_jax.data.tasks.longbench import LONGBENCH
from refine_jax.data.tasks.ruler_qa import RULER_QA
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.data.unpack import stem_name

__all__ = [
    "TASKS",
    "Essays",
    "Example",
    "NoExamplesError",
    "Task",
    "check_request",
    "is_built",
    "load_essays",
    "load_examples",
    "needs_essays",
    "settings_of",
]

MAX_SAMPLES = 1_000_000
"""Most examples that are built of a task and length."""

TASKS: dict[str, Task] = {
    **{name: Task(name, "niah", "ruler_recall", niah.MAX_NEW_TOKENS) for name in niah.NEEDLES},
    **{
        name: Task(name, "ruler", "ruler_recall", budget)
        for name, budget in synthetic.MAX_NEW_TOKENS.items()
    },
    "recall": Task("recall", "recall", "ruler_recall", facts.MAX_NEW_TOKENS),
    **RULER_QA,
    **LONGBENCH,
}


def needs_essays(name: str) -> bool:
    """Say whether a task hides its needles in essays."""
    return name in niah.NEEDLES and niah.NEEDLES[name].haystack == "essay"


def check_request(
    name: str,
    *,
    length: int | None = None,
    samples: int | None = None,
    data: str | None = None,
    essays: str | Essays | None = None,
    setting: Naming = str,
) -> Task:
    """Return the task if `load_examples` has what it needs for it, without building anything.

    The arguments are those of `load_examples`.

    Raises DataError: there is no such task, or something it needs is missing.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        names = ", ".join(TASKS)
        raise DataError(f"{setting('task')} must be one of {names}. Got: {short(name)}.{hint}")
    built = is_built(name, data)
    for argument, value, high in (
        ("length", length, MAX_LENGTH),
        ("samples", samples, MAX_SAMPLES if built else None),
    ):
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is not None and not (fits and (high is None or value <= high)):
            most = f", at most {high:,}" if high else ""
            raise DataError(
                f"{setting(argument)} of {name} must be a whole number, at least 1{most}. "
                f"Got: {short(value)}."
            )
    if data:
        find_files(data, setting=setting("data"))
    elif name in RULER_QA:
        raise DataError(
            f"{name} needs `{setting('data')}`: parquet or jsonl files of the set, or the .json "
            "file of SQuAD or HotpotQA to build it from"
        )
    elif name in LONGBENCH:
        raise DataError(
            f"{name} needs `{setting('data')}`: LongBench's jsonl files, or parquet files with its "
            "prompts"
        )
    if built:
        if length is None or samples is None:
            raise DataError(
                f"{name} is built: set {setting('length')} and {setting('samples')}. "
                f"Got: length={length}, samples={samples}."
            )
        if needs_essays(name):
            load_essays(essays, setting)
    return TASKS[name]


def load_examples(
    name: str,
    *,
    length: int | None = None,
    samples: int | None = None,
    tokenizer: Tokenizer,
    seed: int = 0,
    data: str | None = None,
    essays: str | Essays | None = None,
    metric: str | None = None,
    report: Callable[[str], None] = logging.warning,
    setting: Naming = str,
) -> list[Example]:
    """Return the examples of a task.

    The needle tasks, vt, cwe, fwe and recall are built from the seed alone; ruler_squadqa and
    ruler_hotpotqa from SQuAD's and HotpotQA's .json files. Everything else is read from `data`,
    also sets that `refine_jax.data.tasks.generate` wrote.

    name: of `TASKS`.
    length: the most tokens of bos, prompt and answer; needed by what is built, and None for all
        rows of a file.
    samples: how many; needed by what is built. From a file so many rows, chosen by the seed; None
        takes all.
    tokenizer: counts the tokens.
    seed: of the set.
    data: a .json file of SQuAD or HotpotQA, or parquet and jsonl files: a file, a folder or a glob
        pattern.
    essays: the text of the tasks that hide needles in essays: a text file, a folder, a glob pattern
        or "stdlib"; see `load_essays`, which reads it once for several calls.
    metric: what scores the answers, if not the task's own: where every reference counts,
        alternatives of one reference are refused.
    report: takes a sentence for each kind of rows of a file that were left out.
    setting: names the arguments for errors.

    Raises:
        NoExamplesError: the files have no rows of this task and length.
        DataError: there is no such task, something it needs is missing, or nothing fits.
    """
    if needs_essays(name) and is_built(name, data):
        essays = load_essays(essays, setting)
    task = check_request(
        name, length=length, samples=samples, data=data, essays=essays, setting=setting
    )
    task = dataclasses.replace(task, metric=metric or task.metric)
    data = str(given_path(data, setting("data"), DataError)) if data else data
    build = {"length": length, "samples": samples, "tokenizer": tokenizer, "seed": seed}
    if not is_built(name, data):
        return files.read_examples(task, data, report=report, setting=setting, **build)
    if name in RULER_QA:
        return ruler_qa.build_examples(task, data, setting=setting, **build)
    if name == "recall":
        return facts.make_examples(**build)
    del build["samples"]
    if name in niah.NEEDLES:
        text = essays if needs_essays(name) else None
        return [niah.make_example(name, i, essays=text, **build) for i in range(samples)]
    return [synthetic.make_example(name, i, **build) for i in range(samples)]


def is_built(name: str, data: str | None) -> bool:
    """Say whether the examples of a task are built, not read from `data`."""
    return not data or (name in RULER_QA and stem_name(path_of(data)).endswith(".json"))
