"""Tokenise documents once, into ArrayRecord that runs read at random.

    python -m refine_jax.data.prepare --source=corpus.jsonl.zst --tokenizer=mistral-v1 --out=DIR

The last line printed is JSON: {"folder": ..., "documents": ..., "tokens": ..., "dropped": {reason:
documents that were left out}}. Give the folder to a run as `--config.data.source=FOLDER`. The
folder appears when it is complete; preparing the same documents again finds it and does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from refine_jax import commands
from refine_jax.base.errors import DataError, run_command
from refine_jax.base.files import check_writable, local_path
from refine_jax.data.options import DataOptions, FlagOptions
from refine_jax.settings import MOST_ITEMS


def prepare(options: DataOptions, out: str) -> dict[str, Any]:
    """Write the documents of `options` as tokenised ArrayRecord.

    Args:
        options: source, tokenizer and what else decides the tokens of a document.
        out: folder under which the records' own folder is made.

    Returns:
        {"folder": the records' folder, "documents": their number, "tokens": the sum of tokens,
        "dropped": {reason: documents of the source that were left out}}.

    Raises:
        DataError: as `open_source` and `load_tokenizer`, or the folder cannot be written.
    """
    from refine_jax.data.builders.tokenized_text import tokenized_text_dataset_builder as module
    from refine_jax.data.sources import open_source
    from refine_jax.data.tokenizer import load_tokenizer
    from refine_jax.data.tokens import damage, is_token_folder, read_metadata

    folder = local_path(out, "--out", DataError)
    check_writable(folder, "--out", DataError)
    if is_token_folder(options.source):
        raise DataError(f"{options.setting('source')}={options.source!r} is tokenised already")
    tokenizer = load_tokenizer(options.tokenizer)
    source = open_source(options)
    # The builder reads the folder where it was prepared before.
    with damage("tokenised records", folder / "tokenized_text", "of this source"):
        builder = module.Builder(
            source=source, tokenizer=tokenizer, options=options, data_dir=str(folder)
        )
    try:
        # tfds always makes a download folder, though this builder downloads nothing, and tells of
        # its progress where this command prints its result.
        with tempfile.TemporaryDirectory() as unused, contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(download_dir=unused)
    except OSError as error:
        raise DataError(f"cannot write the records to {folder}: {error}") from error
    made_in = Path(builder.data_dir).resolve()
    with damage("tokenised records", made_in, "and prepare them again"):
        made = read_metadata(made_in)
        return {"folder": str(made_in)} | {
            name: made[name] for name in ("documents", "tokens", "dropped")
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command(lambda: _run(commands.parse_values(_flags(), arguments, __doc__)))


def _run(values: dict[str, Any]) -> None:
    out = values.pop("out")
    print(json.dumps(prepare(FlagOptions(**values), out)))


def _flags() -> flags.FlagValues:
    own = flags.FlagValues()
    text = functools.partial(flags.DEFINE_string, flag_values=own)
    switch = functools.partial(flags.DEFINE_boolean, flag_values=own)
    text("source", "stdlib", "stdlib, tfds:NAME, a file, a folder or a glob pattern")
    text("out", None, "folder to write to")
    text("text_field", "text", "column, JSON field or feature that holds the text")
    text("files", "", "file name pattern within folders, e.g. *.py")
    text("tfds_split", "train", "split of a tfds data set")
    text("tfds_data_dir", "", "where tensorflow-datasets keeps its data")
    flags.DEFINE_integer(
        "limit_documents",
        None,
        "only the first so many documents",
        1,
        MOST_ITEMS,
        flag_values=own,
    )
    text("tokenizer", "mistral-v1", "mistral-v1, bytes, or a path")
    switch("add_bos", True, "begin each document with the bos token")
    switch("add_eos", False, "end each document with the eos token")
    commands.need(own, "out")
    return own


if __name__ == "__main__":
    sys.exit(main())
