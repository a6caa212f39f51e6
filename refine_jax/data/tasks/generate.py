"""Write the examples of tasks to files, to look at them or to use them elsewhere.

    python -m refine_jax.data.tasks.generate --tasks=niah_single_1,vt --lengths=4096,8192 \\
        --samples=500 --out=DIR

makes DIR/<task>_<length>.parquet (or .jsonl, with --format) and prints one line of JSON for each,
with the SHA-256 of the set. RULER's essay tasks need --essays, its question answering --data.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from refine_jax import commands
from refine_jax.base.errors import DataError, run_command
from refine_jax.base.files import check_writable, short
from refine_jax.data.tasks import (
    check_request,
    is_built,
    load_essays,
    load_examples,
    needs_essays,
    settings_of,
)
from refine_jax.data.tasks.files import MAX_LENGTH, SUFFIXES, digest, write_examples
from refine_jax.data.tokenizer import load_tokenizer
from refine_jax.settings import LAST_SEED, MOST_ITEMS, expand_flags, expanded


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command(lambda: _run(commands.parse_values(_flags(), arguments, __doc__)))


def _run(values: dict[str, Any]) -> None:
    expand_flags(values, "out", "tokenizer")
    for name in ("data", "essays"):
        values[name] = expanded(values[name], f"--{name}")
    folder = Path(values["out"])
    tokenizer = load_tokenizer(values["tokenizer"])
    lengths = [_length(text) for text in values["lengths"]]
    wanted = [(task, length) for task in values["tasks"] for length in lengths]
    if not wanted or not values["out"]:
        raise DataError("--tasks, --lengths and --out must name something, and one is empty.")
    sources = {name: values[name] for name in ("samples", "data", "essays")}
    sources["setting"] = settings_of("--")
    if any(needs_essays(task) and is_built(task, values["data"]) for task in values["tasks"]):
        sources["essays"] = load_essays(values["essays"], sources["setting"])
    for task, length in wanted:  # before anything is written
        check_request(task, length=length, **sources)
    check_writable(folder, "--out", DataError)
    for task, length in wanted:
        examples = load_examples(
            task, length=length, tokenizer=tokenizer, seed=values["seed"], **sources
        )
        path = folder / f"{task}_{length}{values['format']}"
        write_examples(examples, path)
        made = {"file": str(path), "examples": len(examples), "sha256": digest(examples)}
        print(json.dumps(made), flush=True)


def _length(text: str) -> int:
    if not (text.isdecimal() and len(text) < 10 and 1 <= int(text) <= MAX_LENGTH):
        raise DataError(
            f"--lengths must be whole numbers from 1 to {MAX_LENGTH:,}, with commas between. "
            f"Got: {short(text)}."
        )
    return int(text)


def _flags() -> flags.FlagValues:
    own = flags.FlagValues()
    text = functools.partial(flags.DEFINE_string, flag_values=own)
    names = functools.partial(flags.DEFINE_list, flag_values=own)
    number = functools.partial(flags.DEFINE_integer, flag_values=own)
    names("tasks", ["niah_single_1"], "names, with commas")
    names("lengths", ["4096"], "most tokens of bos, prompt and answer, with commas")
    number("samples", 500, "examples of a set", lower_bound=1, upper_bound=MOST_ITEMS)
    text("out", None, "folder to write to")
    number("seed", 0, "of the sets", lower_bound=0, upper_bound=LAST_SEED)
    text("tokenizer", "mistral-v1", "mistral-v1, bytes, or a path")
    text("essays", None, "text file, folder, glob pattern, or stdlib")
    text("data", None, "file, folder or glob pattern of tasks that need one")
    flags.DEFINE_enum("format", SUFFIXES[0], SUFFIXES, "of the files", flag_values=own)
    commands.need(own, "out")
    return own


if __name__ == "__main__":
    sys.exit(main())
