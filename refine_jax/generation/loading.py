"""A checkpoint as what generation and evaluation need of it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

from refine_jax.base.errors import CheckpointError, DataError
from refine_jax.base.files import given_path, json_field, read_json, short
from refine_jax.checkpoint import load_model
from refine_jax.checkpoint.folders import CONFIG, RUN, has_tokenizer
from refine_jax.checkpoint.model import checkpoint_folder
from refine_jax.data.tokenizer import Tokenizer, load_tokenizer, with_ends
from refine_jax.models.config import model_config
from refine_jax.models.hybrid_config import text_fields
from refine_jax.models.transformer import ComputePolicy, Model, Params

GENERATION = "generation_config.json"
_MOST_RUNS = 8  # that start from each other's checkpoints, of which one names the tokenizer


class Loaded(NamedTuple):
    """A model, its parameters on the device, and a tokenizer, of a checkpoint."""

    model: Model
    params: Params
    tokenizer: Tokenizer


def load(
    checkpoint: str,
    *,
    step: int | str = "latest",
    tokenizer: str | None = None,
    compute_dtype: str | None = None,
    adapter: str | None = None,
) -> Loaded:
    """Load a checkpoint to generate from.

    step: of a training run: "latest", "best" or a number. tokenizer: name or path; None: that of
    the checkpoint, or the one that the run was trained with. compute_dtype: None: float32 on CPU,
    bfloat16 on accelerators. adapter: folder of the peft package, which is added to the weights.

    The tokens that end a text are those of the tokenizer and of the checkpoint (`further_ends`).

    Raises:
      CheckpointError: No checkpoint, or a corrupt one.
      DataError: No such tokenizer, or the checkpoint has none.
    """
    folder = checkpoint_folder(checkpoint)
    saved = load_model(folder, step=step, adapter=adapter)
    model = Model(model_config(saved.config), ComputePolicy(compute_dtype=compute_dtype))
    name = tokenizer or saved.tokenizer
    if name is None:
        name = trained_with(folder)
        if name is None:
            raise DataError(
                f"{checkpoint} has no tokenizer files. Name a tokenizer: --tokenizer mistral-v1, "
                "bytes or a path."
            )
        logging.warning("%s has no tokenizer files: its %s names %s.", checkpoint, RUN, name)
    ends = further_ends(saved.config, saved.files.get(GENERATION))
    return Loaded(
        model, jax.device_put(saved.params), with_ends(load_tokenizer(os.fspath(name)), ends)
    )


def trained_with(checkpoint: Path) -> str | None:
    """Name the tokenizer, or its path, that the run in a folder was trained with; None without a
    run.

    Raises:
      CheckpointError: The record of the run is damaged.
      DataError: It names files that are not there any more.
    """
    folder = checkpoint
    for _ in range(_MOST_RUNS):
        folder = folder / "checkpoints" if (folder / "checkpoints" / CONFIG).is_file() else folder
        if not (folder / RUN).is_file():
            return None
        record, where = read_json(folder / RUN, CheckpointError), folder / RUN
        config = _object(record, "config", where)
        name = _setting(config, "data", "tokenizer", where)
        if name is None or name in ("bytes", "mistral-v1"):
            return name
        if name != "checkpoint":
            if not given_path(name, f"{where}: config.data.tokenizer", DataError).exists():
                raise DataError(
                    f"{where} names the tokenizer {name!r}, which is not there any more. Name it: "
                    "--tokenizer PATH."
                )
            return name
        start = _setting(config, "model", "checkpoint", where)
        if start is None:
            return None
        folder = checkpoint_folder(start)
        if has_tokenizer(folder):
            return str(folder)
    return None


def _setting(config: Mapping[str, Any], section: str, name: str, where: Path) -> str | None:
    fields, place = _object(config, section, where), f"{where}: config.{section}"
    return json_field(fields, name, str, where=place, error=CheckpointError)


def _object(fields: Mapping[str, Any], name: str, where: Path) -> dict[str, Any]:
    return json_field(fields, name, dict, where=where, error=CheckpointError, default={})


def further_ends(fields: Mapping[str, Any], path: Path | None) -> tuple[int, ...]:
    """List the tokens that end a text according to the files of a checkpoint.

    fields: of its config.json, where `eos_token_id` counts if it is a list: one number is the
    default of the family in most of them, whatever the tokenizer. path: of its
    generation_config.json, None if there is none; of this file nothing else is used. Raises
    CheckpointError: a field is no id of the model's vocabulary, nor a list of them.
    """
    ends: list[int] = []
    text = text_fields(fields)
    if isinstance(text.get("eos_token_id"), list):
        ends += _ids(text, CONFIG, fields)
    if path is not None:
        ends += _ids(read_json(path, CheckpointError), path, fields)
    return tuple(dict.fromkeys(ends))


def _ids(saved: Mapping[str, Any], where: Any, fields: Mapping[str, Any]) -> list[int]:
    kinds = (int, list)
    value = json_field(saved, "eos_token_id", kinds, where=where, error=CheckpointError, default=[])
    ids = value if isinstance(value, list) else [value]
    vocab_size = model_config(dict(fields)).vocab_size
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise CheckpointError(
            f"{where}: eos_token_id must be an id of the vocabulary of {vocab_size}, or a list of "
            f"them. Got: {short(value)}."
        )
    return ids
