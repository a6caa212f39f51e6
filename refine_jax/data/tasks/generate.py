"""Write the examples of tasks to files, to look at them or to use them elsewhere.

    python -m refine_jax.data.tasks.generate --tasks=niah_single_1,vt --lengths=4096,8192 \
        --samples=500 --out=DIR

makes DIR/<task>_<length>.parquet (or .jsonl, with --format) and prints one line of JSON for each,
with the SHA-256 of the set. RULER's essay tasks need --essays, its question answering --data.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from refine_jax.base.errors import USER_ERRORS, DataError, complain, escape_output
from refine_jax.base.files import check_folder, short
from refine_jax.data.tasks import check_request, load_examples
from refine_jax.data.tasks.files import MAX_LENGTH, SUFFIXES, digest, write_examples
from refine_jax.data.tokenizer import load_tokenizer


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    escape_output()
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]}")
    values = flags.FLAGS
    sources = {"samples": values.samples, "data": values.data, "essays": values.essays}
    try:
        tokenizer = load_tokenizer(values.tokenizer)
        wanted = [(task, _positive(length)) for task in values.tasks for length in values.lengths]
        if not wanted or not values.out:
            raise DataError("--tasks, --lengths and --out must name something, and one is empty.")
        for task, length in wanted:  # before anything is written
            check_request(task, length=length, **sources)
        folder = Path(values.out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot make the folder --out={folder}: {error.strerror}.") from None
        check_folder(folder, DataError)
        for task, length in wanted:
            examples = load_examples(
                task, length=length, tokenizer=tokenizer, seed=values.seed, **sources
            )
            path = folder / f"{task}_{length}{values.format}"
            write_examples(examples, path)
            made = {"file": str(path), "examples": len(examples), "sha256": digest(examples)}
            print(json.dumps(made), flush=True)
    except USER_ERRORS as error:
        sys.exit(complain(error))


def _positive(text: str) -> int:
    if not (text.isdecimal() and len(text) < 10 and int(text) > 0):  # int() of 5,000 digits raises
        raise DataError(
            f"--lengths must be whole numbers from 1 to {MAX_LENGTH:,}, with commas. "
            f"Got: {short(text)}."
        )
    return int(text)


def _define_flags() -> None:
    flags.DEFINE_list("tasks", ["niah_single_1"], "names, with commas")
    flags.DEFINE_list("lengths", ["4096"], "most tokens of bos, prompt and answer, with commas")
    flags.DEFINE_integer("samples", 500, "examples of a set", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the sets", lower_bound=0)
    flags.DEFINE_string("tokenizer", "mistral-v1", "mistral-v1, bytes, or a path")
    flags.DEFINE_string("essays", None, "text file, folder, glob pattern, or stdlib")
    flags.DEFINE_string("data", None, "file, folder or glob pattern of tasks that need one")
    flags.DEFINE_enum("format", SUFFIXES[0], SUFFIXES, "of the files")
    flags.DEFINE_string("out", None, "folder to write to", required=True)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
