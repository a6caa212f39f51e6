"""Tokenise documents once, into ArrayRecord that runs read at random.

The last line printed is JSON: {"folder": ..., "documents": ..., "tokens": ..., "dropped": {reason:
documents that were left out}}. Give the folder to a run as `--config.data.source=FOLDER`. The
folder appears when it is complete; preparing the same documents again finds it and does nothing.

Examples:

    python -m refine_jax.data.prepare --source=corpus.jsonl.zst --tokenizer=mistral-v1 --out=DIR
    python -m refine_jax.data.prepare --source=texts/ --files='*.md' --tokenizer=bytes --out=DIR
"""

import contextlib
import json
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refine_jax.base.errors import DataError, reason
from refine_jax.base.files import check_writable, given_path
from refine_jax.base.growing import scratch_folder, upload_folder
from refine_jax.base.remote import RemotePath
from refine_jax.commands import Command, Options
from refine_jax.config import DataConfig
from refine_jax.settings import flags_of

_FIELDS = (
    *("source", "text_field", "files", "tfds_split", "tfds_data_dir", "limit_documents"),
    *("tokenizer", "add_bos", "add_eos"),
)


def prepare(options: DataConfig, out: str) -> dict[str, Any]:
    """Write the documents of `options` as tokenised ArrayRecord.

    options: source, tokenizer and what else decides the tokens of a document.
    out: folder under which the records' own folder is made.

    Returns {"folder": the records' folder, "documents": their number, "tokens": the sum of tokens,
    "dropped": {reason: documents of the source that were left out}}.

    Raises DataError: as `open_source` and `load_tokenizer`, or the folder cannot be written.
    """
    from refine_jax.data.builders.tokenized_text import tokenized_text_dataset_builder as module
    from refine_jax.data.formats import TFDS_INFO
    from refine_jax.data.sources import open_source
    from refine_jax.data.tokenizer import load_tokenizer
    from refine_jax.data.tokens import damage, is_token_folder

    folder = given_path(out, "--out", DataError, write=True)
    check_writable(folder, "--out", DataError)
    if is_token_folder(options.source):
        raise DataError(f"{options.setting('source')}={options.source!r} is tokenised already")
    tokenizer = load_tokenizer(options.tokenizer)
    source = open_source(options)
    bucket = folder if isinstance(folder, RemotePath) else None
    if bucket is not None:  # the library writes records on disks
        folder = scratch_folder() / secrets.token_hex(8)
        folder.mkdir()
    # The builder reads the folder where it was prepared before.
    with damage("tokenised records", folder / "tokenized_text", "of this source"):
        builder = module.Builder(
            source=source, tokenizer=tokenizer, options=options, data_dir=str(folder)
        )
    place = Path(builder.data_dir).relative_to(folder).as_posix()
    if bucket is not None and is_token_folder(str(bucket / place)):
        return _describe(bucket / place)
    try:
        # tfds always makes a download folder, though this builder downloads nothing, and tells of
        # its progress where this command prints its result.
        with tempfile.TemporaryDirectory() as unused, contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(download_dir=unused)
    except OSError as error:
        raise DataError(f"cannot write the records to {folder}: {error}") from error
    if bucket is None:
        return _describe(Path(builder.data_dir).resolve())
    try:
        upload_folder(folder / place, bucket / place, TFDS_INFO)
    except OSError as error:
        raise DataError(f"cannot write the records to {bucket}: {reason(error)}.") from error
    return _describe(bucket / place)


def _describe(folder: Path) -> dict[str, Any]:
    from refine_jax.data.tokens import damage, read_metadata

    with damage("tokenised records", folder, "and prepare them again"):
        made = read_metadata(folder)
        return {"folder": str(folder)} | {
            name: made[name] for name in ("documents", "tokens", "dropped")
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return command().run(run, arguments)


def run(options: Options) -> None:
    """Do what the command line asks for; prints the result."""
    fields = {name: getattr(options, name) for name in _FIELDS}
    print(json.dumps(prepare(flags_of(DataConfig)(**fields), options.out)))


def command() -> Command:
    """Make the command, its flags and its page of help."""
    made = Command("refine_jax.data.prepare", __doc__, "--out=DIR")
    made.group("records")
    made.flag("out", "folder to write to", metavar="DIR", needed=True)
    made.group("documents")
    made.fields(DataConfig, *_FIELDS, help={"tokenizer": "mistral-v1, bytes, or a path"})
    return made


if __name__ == "__main__":
    sys.exit(main())
