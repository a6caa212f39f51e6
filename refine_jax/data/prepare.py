"""Tokenise documents once, into ArrayRecord that runs read at random.

    python -m refine_jax.data.prepare --source=corpus.jsonl.zst --tokenizer=mistral-v1 --out=DIR

The last line printed is JSON: {"folder": ..., "documents": ..., "tokens": ..., "dropped": {reason:
documents that were left out}}. Give the folder to a run as `--config.data.source=FOLDER`. The
folder appears when it is complete; preparing the same documents again finds it and does nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from refine_jax.base.errors import USER_ERRORS, DataError, complain, escape_output
from refine_jax.data.options import DataOptions, FlagOptions


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

    if is_token_folder(options.source):
        raise DataError(f"{options.setting('source')}={options.source!r} is tokenised already")
    tokenizer = load_tokenizer(options.tokenizer)
    source = open_source(options)
    # The builder reads the folder where it was prepared before.
    with damage("tokenised records", Path(out) / "tokenized_text", "of this source"):
        builder = module.Builder(source=source, tokenizer=tokenizer, options=options, data_dir=out)
    try:
        # tfds always makes a download folder, though this builder downloads nothing.
        with tempfile.TemporaryDirectory() as unused:
            builder.download_and_prepare(download_dir=unused)
    except OSError as error:
        raise DataError(f"cannot write the records to {out}: {error}") from error
    folder = Path(builder.data_dir).resolve()
    with damage("tokenised records", folder, "and prepare them again"):
        made = read_metadata(folder)
        return {"folder": str(folder)} | {
            name: made[name] for name in ("documents", "tokens", "dropped")
        }


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    escape_output()
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]}")
    values = {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(argv[0])}
    out = values.pop("out")
    try:
        print(json.dumps(prepare(FlagOptions(**values), out)))
    except USER_ERRORS as error:
        sys.exit(complain(error))


def _define_flags() -> None:
    flags.DEFINE_string("source", "stdlib", "stdlib, tfds:NAME, a file, a folder or a glob pattern")
    flags.DEFINE_string("text_field", "text", "column, JSON field or feature that holds the text")
    flags.DEFINE_string("files", "", "file name pattern within folders, e.g. *.py")
    flags.DEFINE_string("tfds_split", "train", "split of a tfds data set")
    flags.DEFINE_string("tfds_data_dir", "", "where tensorflow-datasets keeps its data")
    flags.DEFINE_integer("limit_documents", None, "only the first so many documents")
    flags.DEFINE_string("tokenizer", "mistral-v1", "mistral-v1, bytes, or a path")
    flags.DEFINE_boolean("add_bos", True, "begin each document with the bos token")
    flags.DEFINE_boolean("add_eos", False, "end each document with the eos token")
    flags.DEFINE_string("out", None, "folder to write to", required=True)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
