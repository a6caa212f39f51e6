"""Examples in files: parquet or jsonl, one row an example.

Columns: `prompt` and `answers` (or `answer`); optional are `task`, `max_gen_tokens`,
`max_seq_length` (the length that a set was built for) and `metadata` (JSON). That covers the sets
that ReFINE's experiments used and what `write_examples` writes. Rows of LongBench's own files,
with `context` and `input` in place of a prompt, get LongBench's prompts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from refine_jax.base.errors import DataError
from refine_jax.base.files import local_path
from refine_jax.data.sources import find_files
from refine_jax.data.tasks import longbench
from refine_jax.data.tasks.draw import Draw
from refine_jax.data.tasks.example import Example, Task
from refine_jax.data.tasks.haystack import count_tokens
from refine_jax.data.tokenizer import Tokenizer

Row = Mapping[str, Any]
SUFFIXES = (".parquet", ".jsonl")


def read_examples(
    task: Task,
    data: str,
    *,
    length: int | None,
    samples: int | None,
    tokenizer: Tokenizer,
    seed: int,
) -> list[Example]:
    """Return the examples of a task that a file holds, in its order.

    Args:
        task: the task; rows of others are passed over.
        data: a .parquet or .jsonl file, a folder or a glob pattern.
        length: the most tokens of bos, prompt and answer: longer rows are left out, and a warning
            says how many. In files of sets that were built for a length (`max_seq_length`), only
            sets of this length count. None takes every row.
        samples: so many of these rows, chosen by the seed; None, or more than there are, takes all.
        tokenizer: counts the tokens.
        seed: of the choice.

    Raises:
        DataError: there are no such rows, or several files have some, or a row is incomplete.
    """
    path, rows = _select(task, data, length)
    order: Sequence[int] = range(len(rows))
    if samples is not None:
        order = Draw("rows", seed, task.name).shuffled(order)
    examples, too_long = [], 0
    for i in order:
        if len(examples) == samples:
            break
        example = _example(task, path, rows[i], i, tokenizer)
        needed = example.metadata["prompt_tokens"] + example.max_new_tokens
        if length is not None and needed > length:
            too_long += 1
        else:
            examples.append(example)
    if not examples:
        raise DataError(f"none of the {len(rows)} rows of {path} fits into length={length}")
    if too_long:
        logging.warning(
            "%s: left out %d of %d rows that need more than %d tokens",
            path,
            too_long,
            too_long + len(examples),
            length,
        )
    return sorted(examples, key=lambda example: example.index)


def write_examples(examples: Sequence[Example], path: str | os.PathLike) -> None:
    """Write examples to a .parquet or .jsonl file, which appears when it is complete.

    Raises:
        DataError: the file cannot be written, or has another suffix.
    """
    path = local_path(path, "the file", DataError)
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
            "max_seq_length": example.metadata.get("length"),
            "metadata": json.dumps(dict(example.metadata)),
        }
        for example in examples
    ]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), partial)
        else:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            partial.write_text(text, "utf-8")
        partial.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def digest(examples: Iterable[Example]) -> str:
    """Return the SHA-256 of everything that examples hold, in hexadecimal."""
    rows = [dataclasses.astuple(example) for example in examples]
    text = json.dumps(rows, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _select(task: Task, data: str, length: int | None) -> tuple[Path, list[Row]]:
    """Return the one file with rows of the task, and these rows."""
    found: dict[Path, list[Row]] = {}
    seen: set[str] = set()
    for path in find_files(data, setting="data"):
        if path.suffix not in SUFFIXES:
            continue
        for row in _read(path):
            name = str(row.get("task") or row.get("dataset") or task.name)
            built_for = row.get("max_seq_length")
            seen.add(name if built_for is None else f"{name} of length {built_for}")
            if name == task.name and (built_for is None or length in (None, built_for)):
                found.setdefault(path, []).append(row)
    if not found:
        wanted = task.name if length is None else f"{task.name} of length {length}"
        there = ", ".join(sorted(seen)) or f"no {' or '.join(SUFFIXES)} file"
        raise DataError(f"no examples of {wanted} in data={data!r}. It holds: {there}.")
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise DataError(f"several files hold examples of {task.name}: set data to one of {names}")
    ((path, rows),) = found.items()
    lengths = {row.get("max_seq_length") for row in rows}
    if len(lengths) > 1:
        raise DataError(f"{path} holds sets of several lengths {sorted(lengths)}: set the length")
    return path, rows


def _read(path: Path) -> list[Row]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:  # what pyarrow finds broken is a ValueError
        raise DataError(f"cannot read {path}: {error}") from error


def _example(task: Task, path: Path, row: Row, index: int, tokenizer: Tokenizer) -> Example:
    if "prompt" not in row and task.name in longbench.PROMPTS:
        row = longbench.with_prompt(task.name, row)
    answers = row.get("answers", row.get("answer"))
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(row.get("prompt"), str) or not isinstance(answers, list):
        raise DataError(
            f"row {index} of {path} needs a prompt and answers. Got: {', '.join(sorted(row))}."
        )
    metadata = json.loads(row.get("metadata") or "{}")
    if row.get("max_seq_length") is not None:
        metadata["length"] = row["max_seq_length"]
    return Example(
        task=task.name,
        index=index,
        prompt=row["prompt"],
        answers=tuple(answers),
        max_new_tokens=row.get("max_gen_tokens") or task.max_new_tokens,
        metadata={**metadata, "prompt_tokens": count_tokens(tokenizer, row["prompt"])},
    )
