"""Measure next-token loss and accuracy by position: what a model gains from a longer context.

Documents are read from their first token, in blocks: any --sequence_length takes the same memory.
Every token is predicted from all that precede it in its document, and falls into a bucket by how
many these are. The last line on standard output is JSON, which says what was left out, too.

Examples:

    python -m refine_jax.evaluation.position --checkpoint=checkpoints/lact-760m \\
        --source=corpus.jsonl --sequence_length=16384 --min_tokens=4096 --output=positions/
    python -m refine_jax.evaluation.position --checkpoint=runs/scratch --step=best --holdout=0.05
"""

import json
import sys
from collections.abc import Sequence

from absl import logging

from refine_jax.base.errors import DataError
from refine_jax.base.files import check_writable, path_of, write_text
from refine_jax.commands import Command, Options, step_argument
from refine_jax.config import DataConfig
from refine_jax.settings import expand_flags, flags_of

_FIELDS = (
    *("source", "text_field", "files", "tfds_split", "limit_documents", "tokenizer"),
    *("sequence_length", "min_tokens", "holdout"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return command().run(run, arguments, imports=("jax", "refine_jax.evaluation.by_position"))


def run(options: Options) -> None:
    """Do what the command line asks for; prints the result."""
    from refine_jax.compiling import announced
    from refine_jax.evaluation.by_position import evaluate

    logging.set_verbosity(logging.WARNING)
    expand_flags(vars(options), "checkpoint", "output")
    output = None
    if options.output is not None:
        output = path_of(options.output)
        check_writable(output, "--output", DataError)
        if (output / "position.json").exists():
            raise DataError(f"{output} has a position.json: choose another --output.")
    # One pass over the first tokens of each document.
    fields = {name: getattr(options, name) for name in _FIELDS}
    data = flags_of(DataConfig)(**fields, chunking="first", epochs=1)
    chosen = {name: getattr(options, name) for name in ("step", "spacing", "buckets", "batch_size")}
    with announced():
        results = evaluate(options.checkpoint, data, **chosen)
    print(json.dumps(results), flush=True)
    if output is not None:
        from refine_jax.evaluation.plots import plot_positions

        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "position.json", json.dumps(results, indent=2) + "\n")
        plot_positions(output / "position.png", {path_of(options.checkpoint).name: results})


def command() -> Command:
    """Make the command, its flags and its page of help."""
    made = Command("refine_jax.evaluation.position", __doc__, "--checkpoint=DIR")
    made.group("model")
    text = "made by refine_jax.convert, or a run's work folder"
    made.flag("checkpoint", text, metavar="DIR", needed=True)
    made.flag("step", "of a run: latest, best, or a number", step_argument, default="latest")
    made.group("documents")
    meanings = {
        "tokenizer": "mistral-v1, bytes, checkpoint (that of --checkpoint), or a path",
        "min_tokens": "leave out documents with fewer (default: sequence_length, so that all "
        "buckets hold the same documents)",
        "holdout": "read only the documents that a run with this data.holdout holds out; 0: all",
    }
    made.fields(DataConfig, *_FIELDS, help=meanings, tokenizer="checkpoint", holdout=0.0)
    made.group("buckets and output")
    made.flag("spacing", "of the buckets", default="log", choices=("log", "linear"))
    made.flag("buckets", "how many (default: one an octave, or 16 linear ones)", int)
    made.flag("batch_size", "documents at a time", int, default=4)
    made.flag("output", "folder for position.json and position.png", metavar="DIR")
    return made


if __name__ == "__main__":
    sys.exit(main())
