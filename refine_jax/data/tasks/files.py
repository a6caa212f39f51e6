"""Examples in files: parquet or JSON, one row an example; see `refine_jax.data.records`.

Columns: `prompt` and `answers` (or `answer`), in any form that `refine_jax.data.references` reads;
optional are `task` (or `dataset`), `max_gen_tokens`, `max_seq_length` (the length that a set was
built for) and `metadata` (an object, or JSON text of one; other text is kept as it is). That covers
the sets that ReFINE's experiments used and what `write_examples` writes. Rows of LongBench's own
files, with `context` and `input` in place of a prompt, get LongBench's prompts.

Rows without a prompt or without an answer are left out, and so are empty answers beside others;
both are counted and said.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from refine_jax.base.errors import DataError
from refine_jax.base.files import clean_text, counted, given_path, names_of, replacing, short
from refine_jax.data.formats import record_files
from refine_jax.data.records import Records
from refine_jax.data.references import (
    FRACTIONS,
    json_value,
    plain_value,
    read_prompt,
    read_references,
    whole_number,
)
from refine_jax.data.tasks import longbench
from refine_jax.data.tasks.draw import Draw
from refine_jax.data.tasks.example import Example, Naming, Task
from refine_jax.data.tasks.haystack import count_tokens
from refine_jax.data.tokenizer import Tokenizer

Row = Mapping[str, Any]
SUFFIXES = (".parquet", ".jsonl")
MAX_LENGTH = 2**24
"""Most tokens that a set can be built for, prompt and answer."""
MAX_ANSWER = 2**20
"""Most tokens that an example can ask an answer of."""


class NoExamplesError(DataError):
    """The files hold no rows of a task and length, but may hold those of others.

    wanted: the task and the length. data: the files, as they were named.
    """

    def __init__(self, wanted: str, data: str, there: str, setting: str = "data"):
        super().__init__(f"no examples of {wanted} in {setting}={data!r}. It holds: {there}.")
        self.wanted, self.data = wanted, data


def read_examples(
    task: Task,
    data: str,
    *,
    length: int | None,
    samples: int | None,
    tokenizer: Tokenizer,
    seed: int,
    report: Callable[[str], None],
    setting: Naming = str,
) -> list[Example]:
    """Return the examples of a task that a file holds, in its order.

    task: the task; rows of others are passed over. Its metric says whether every reference counts.
    data: a parquet or JSON file, a folder or a glob pattern.
    length: the most tokens of bos, prompt and answer: longer rows are left out. In files of sets
        that were built for a length (`max_seq_length`), only sets of this length count. None takes
        every row.
    samples: so many of these rows, chosen by the seed; None, or more than there are, takes all.
    tokenizer: counts the tokens.
    seed: of the choice.
    report: takes a sentence for each kind of rows that were left out.
    setting: names the arguments for errors.

    Raises:
        NoExamplesError: there are no such rows.
        DataError: several files have some, none can be used, or a field holds something else.
    """
    path, rows = _select(task, data, length, setting)  # with the place of each
    order: Sequence[int] = range(len(rows))
    if samples is not None:
        order = Draw("rows", seed, task.name).shuffled(order)
    examples: list[Example] = []
    left_out: Counter[str] = Counter()
    for i in order:
        if len(examples) == samples:
            break
        example = _example(task, *rows[i], i, tokenizer, left_out)
        if example is None:
            continue
        needed = example.metadata["prompt_tokens"] + example.max_new_tokens
        if length is not None and needed > length:
            left_out[_TOO_LONG] += 1
        else:
            examples.append(example)
    if not examples:
        if set(left_out) == {_TOO_LONG}:
            raise DataError(
                f"none of the {counted(len(rows), 'row')} of {path} fits into "
                f"{setting('length')}={length}"
            )
        why = ", ".join(f"{count} {what}" for what, count in left_out.items())
        raise DataError(
            f"none of the {counted(len(rows), 'row')} of {path} can be used: {why}. An example "
            "needs a prompt and a reference answer that is not empty."
        )
    empty = left_out.pop(_EMPTY, 0)
    seen = len(examples) + left_out.total()
    for what, count in left_out.items():
        what = f"that need more than {length} tokens" if what == _TOO_LONG else what
        report(f"{path}: left out {count} of {counted(seen, 'row')} {what}")
    if empty:
        report(f"{path}: left out {empty} empty answers beside others")
    return sorted(examples, key=lambda example: example.index)


def write_examples(examples: Sequence[Example], path: str | os.PathLike) -> None:
    """Write examples to a .parquet or .jsonl file, which appears when it is complete.

    Raises DataError: the file cannot be written, or has another suffix.
    """
    path = given_path(path, "the file", DataError, write=True)
    if path.suffix not in SUFFIXES:
        raise DataError(f"examples are written to .parquet or .jsonl. Got: {path}.")
    rows = [
        {
            "task": example.task,
            "index": example.index,
            "prompt": example.prompt,
            "answers": list(example.answers),
            "prompt_length": example.metadata["prompt_tokens"],
            "max_gen_tokens": example.max_new_tokens,
            "max_seq_length": whole_number(example.metadata.get("length"), 1, MAX_LENGTH),
            "metadata": json.dumps(dict(example.metadata)),
        }
        for example in examples
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            if path.suffix == ".parquet":
                import pyarrow
                import pyarrow.parquet

                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), part)
            else:
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                part.write_text(text, "utf-8")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}") from error


def digest(examples: Iterable[Example]) -> str:
    """Return the SHA-256 of everything that examples hold, in hexadecimal."""
    rows = [dataclasses.astuple(example) for example in examples]
    text = json.dumps(rows, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _select(
    task: Task, data: str, length: int | None, setting: Naming
) -> tuple[Path, list[tuple[str, Row]]]:
    """Return the one file with rows of the task, and these rows, each with where it stands."""
    rows_of: dict[Path, list[tuple[str, Row]]] = {}
    seen: set[str] = set()
    for path in record_files(data, setting("data")):
        records = Records([path])
        for index in range(len(records)):
            row = records[index]
            name, built_for = _set_of(row, task, functools.partial(records.place, index))
            seen.add(name if built_for is None else f"{name} of length {built_for}")
            if name == task.name and (built_for is None or length in (None, built_for)):
                rows_of.setdefault(path, []).append((records.place(index), row))
    if not rows_of:
        wanted = task.name if length is None else f"{task.name} of length {length}"
        there = ", ".join(sorted(seen)) or "no rows"
        raise NoExamplesError(wanted, data, there, setting("data"))
    if len(rows_of) > 1:
        names = ", ".join(str(path) for path in rows_of)
        raise DataError(
            f"several files hold examples of {task.name}: set {setting('data')} to one of {names}"
        )
    ((path, rows),) = rows_of.items()
    lengths = {_set_of(row, task, functools.partial(str, place))[1] for place, row in rows}
    if len(lengths) > 1:
        named = ", ".join("without one" if n is None else str(n) for n in sorted(lengths, key=str))
        raise DataError(f"{path} holds sets of several lengths ({named}): set {setting('length')}")
    return path, rows


# Why rows, and answers of rows, are left out.
_TOO_LONG, _NO_PROMPT, _NO_ANSWER = "too long", "without a prompt", "without an answer"
_EMPTY = "empty answers"


def _set_of(row: Row, task: Task, where: Callable[[], str]) -> tuple[str, int | None]:
    """Return the task that a row belongs to, and the length that its set was built for."""
    name: Any = None
    for field in ("task", "dataset"):
        name = name or plain_value(row.get(field))
        if name is not None and not isinstance(name, str):
            raise DataError(f"{field!r} in {where()} must be a string. Got: {short(name)}.")
    return clean_text(name or task.name), _count(row, "max_seq_length", MAX_LENGTH, where)


def _example(
    task: Task, place: str, row: Row, index: int, tokenizer: Tokenizer, left_out: Counter[str]
) -> Example | None:
    """Return the example of a row, None if it has no prompt or answer; counts what it leaves out.

    place: where the row stands. index: its number among those of the task, from 0.
    """

    def where(field: str = "") -> Callable[[], str]:
        needs = f" needs a prompt and answers: {field!r}" if field else ""
        return lambda: f"{place}{needs}"

    name = next((name for name in ("answers", "answer") if row.get(name) is not None), None)
    fields = ("prompt", "context") if task.name in longbench.PROMPTS else ("prompt",)
    if not any(field in row for field in fields) or not {"answers", "answer"} & row.keys():
        raise DataError(f"{place} needs a prompt and answers. Got: {names_of(sorted(row))}.")
    prompt = read_prompt(row.get("prompt"), where("prompt"))
    if prompt is None and "context" in fields:
        context = read_prompt(row.get("context"), where("context"))
        asked = read_prompt(row.get("input"), where("input"))
        if context is not None:
            prompt = longbench.make_prompt(task.name, context, asked or "")
    if prompt is None:
        left_out[_NO_PROMPT] += 1
        return None
    alternatives = task.metric not in FRACTIONS
    answers = read_references(row.get(name), where(name), alternatives=alternatives)
    given = tuple(answer for answer in answers if answer)
    if not given:
        left_out[_NO_ANSWER] += 1
        return None
    if len(given) < len(answers):
        left_out[_EMPTY] += len(answers) - len(given)
    metadata = _metadata(row.get("metadata"))
    built_for = _count(row, "max_seq_length", MAX_LENGTH, where())
    if built_for is not None:
        metadata["length"] = built_for
    return Example(
        task=task.name,
        index=index,
        prompt=prompt,
        answers=given,
        max_new_tokens=_count(row, "max_gen_tokens", MAX_ANSWER, where()) or task.max_new_tokens,
        metadata={**metadata, "prompt_tokens": count_tokens(tokenizer, prompt)},
    )


def _count(row: Row, field: str, high: int, where: Callable[[], str]) -> int | None:
    """Return a number of tokens that a row may hold, None for null."""
    value = plain_value(row.get(field))
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    number = whole_number(value, 1, high)
    if number is None:
        raise DataError(
            f"{field!r} in {where()} must be a whole number from 1 to {high:,}. "
            f"Got: {short(value)}."
        )
    return number


def _metadata(value: Any) -> dict[str, Any]:
    """Return what is known about an example as JSON values; text that is no object stays text."""
    value = plain_value(value)
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            parsed = json.loads(value)
            value = parsed if isinstance(parsed, dict) else value
    if value is None or value == "":
        return {}
    return json_value(value) if isinstance(value, Mapping) else {"metadata": json_value(value)}
