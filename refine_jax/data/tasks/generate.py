"""Write the examples of tasks to files, to look at them or to use them elsewhere.

The files are DIR/<task>_<length>.parquet (or .jsonl, with --format). A line of JSON is printed for
each, with the SHA-256 of the set. RULER's essay tasks need --essays, its question answering --data.

Examples:

    python -m refine_jax.data.tasks.generate --tasks=niah_single_1,vt --lengths=4096,8192 \\
        --samples=500 --out=DIR
    python -m refine_jax.data.tasks.generate --tasks=niah_single_2 --essays=stdlib --out=DIR
"""

import json
import sys
from collections.abc import Sequence

from refine_jax.base.errors import DataError
from refine_jax.base.files import check_writable, path_of
from refine_jax.commands import Command, Options
from refine_jax.config import DataConfig, EvaluateConfig
from refine_jax.data.tasks import (
    check_request,
    is_built,
    load_essays,
    load_examples,
    needs_essays,
    settings_of,
)
from refine_jax.data.tasks.files import SUFFIXES, digest, write_examples
from refine_jax.data.tokenizer import load_tokenizer
from refine_jax.settings import expand_flags, flags_of

_FIELDS = ("tasks", "lengths", "samples", "seed", "essays", "data")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return command().run(run, arguments)


def run(options: Options) -> None:
    """Do what the command line asks for; prints a line for each file."""
    expand_flags(vars(options), "out", "tokenizer")
    given = {name: getattr(options, name) for name in _FIELDS}
    given |= {name: ",".join(given[name]) for name in ("tasks", "lengths")}
    asked = flags_of(EvaluateConfig)(**given)
    wanted = [(task, length) for task in asked.task_names for length in asked.token_lengths]
    if not wanted or not given["lengths"] or not options.out:
        raise DataError("--tasks, --lengths and --out must name something, and one is empty.")
    folder, tokenizer = path_of(options.out), load_tokenizer(options.tokenizer)
    sources = {"samples": asked.samples, "data": asked.data, "essays": asked.essays}
    sources["setting"] = settings_of("--")
    if any(needs_essays(task) and is_built(task, asked.data) for task in asked.task_names):
        sources["essays"] = load_essays(asked.essays, sources["setting"])
    for task, length in wanted:  # before anything is written
        check_request(task, length=length, **sources)
    check_writable(folder, "--out", DataError)
    for task, length in wanted:
        examples = load_examples(
            task, length=length, tokenizer=tokenizer, seed=asked.seed, **sources
        )
        path = folder / f"{task}_{length}{options.format}"
        write_examples(examples, path)
        made = {"file": str(path), "examples": len(examples), "sha256": digest(examples)}
        print(json.dumps(made), flush=True)


def command() -> Command:
    """Make the command, its flags and its page of help."""
    made = Command("refine_jax.data.tasks.generate", __doc__, "--out=DIR")
    made.group("sets")
    defaults = {"tasks": ["niah_single_1"], "lengths": ["4096"], "samples": 500}
    made.fields(EvaluateConfig, *_FIELDS, **defaults)
    made.group("files")
    made.fields(DataConfig, "tokenizer", help={"tokenizer": "mistral-v1, bytes, or a path"})
    made.flag("out", "folder to write to", metavar="DIR", needed=True)
    made.flag("format", "of the files", default=SUFFIXES[0], choices=SUFFIXES)
    return made


if __name__ == "__main__":
    sys.exit(main())
