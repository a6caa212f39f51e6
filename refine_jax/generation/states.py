"""Saved states: one long document is read once and asked many questions, by other processes too.

A folder holds `arrays/` (Orbax, with fingerprints of their values) and `state.json`, which says by
which model, parameters and tokenizer the state was made: it means nothing to others.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.base.errors import CheckpointError
from refine_jax.base.files import (
    check_writable,
    given_path,
    json_field,
    read_json,
    short,
    write_text,
)
from refine_jax.checkpoint.arrays import read_arrays, write_arrays
from refine_jax.checkpoint.folders import check_free, new_folder
from refine_jax.checkpoint.tree import fingerprints, flatten, unflatten
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.generation.engine import Prefix, empty_prefix
from refine_jax.generation.sampling import not_finite
from refine_jax.models.transformer import Model, Params

_RECORD, _ARRAYS = "state.json", "arrays"
_MOST_ROOM = 2**32


def check_state_path(path: str | os.PathLike) -> Path:
    """Return the new folder that a state may be written to.

    Raises CheckpointError if it exists, or its parent is no folder that may be written to.
    """
    folder = given_path(path, "the saved state", CheckpointError, write=True).absolute()
    check_free(folder)
    check_writable(folder.parent, "the folder of the saved state", CheckpointError)
    return folder


def save_prefix(
    path: str | os.PathLike, prefix: Prefix, model: Model, params: Params, tokenizer: Tokenizer
) -> None:
    """Write `prefix`, made by `model` with `params`, to a new folder; complete or not there.

    Raises:
      CheckpointError: The path exists, or cannot be written to.
      RunError: The state is not finite: nothing can follow it.
    """
    path = check_state_path(path)
    if not np.isfinite(np.asarray(prefix.hidden, np.float32)).all():
        raise not_finite("after the prompt")
    record = _describe(model, params, tokenizer) | {"lengths": [int(n) for n in prefix.length]}
    room = model.capacity(prefix.state)
    if room is not None:
        record["room"] = room
    try:
        with new_folder(path) as folder:
            write_arrays(folder / _ARRAYS, flatten(prefix))
            write_text(folder / _RECORD, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write the saved state {path}: {error.strerror}.") from None


def load_prefix(
    path: str | os.PathLike, model: Model, params: Params, tokenizer: Tokenizer
) -> Prefix:
    """Read what `save_prefix` wrote, bit for bit.

    Raises CheckpointError: no saved state, a corrupt one, or one of another model, other
    parameters, another dtype or another tokenizer.
    """
    folder = given_path(path, "the saved state", CheckpointError).absolute()
    if not (folder / _RECORD).is_file():
        raise CheckpointError(f"{path} is not a saved state: it has no {_RECORD}.")
    again = "Read the document again with this one."
    lengths, room = _check_record(
        folder / _RECORD, model, _describe(model, params, tokenizer), again
    )

    def empty(params):
        prefix = empty_prefix(model, params, len(lengths))
        return prefix._replace(state=model.resize(prefix.state, room))

    abstract = jax.eval_shape(empty, params)
    arrays = read_arrays(folder / _ARRAYS, flatten(abstract), fix=again)
    prefix = jax.tree.map(jnp.asarray, unflatten(abstract, arrays))
    if prefix.length.tolist() != lengths:
        raise CheckpointError(
            f"{folder / _RECORD}: lengths are not those of the arrays. Got: {short(lengths)}, the "
            f"arrays have {short(prefix.length.tolist())}. {again}"
        )
    return prefix


def _describe(model: Model, params: Params, tokenizer: Tokenizer) -> dict[str, Any]:
    values = json.dumps(fingerprints(flatten(params)), sort_keys=True).encode()
    return {
        "model": json.loads(json.dumps(model.config.to_hf())),  # as it is read again
        "compute_dtype": model.policy.compute_dtype,
        "parameters": hashlib.blake2b(values, digest_size=16).hexdigest(),
        "tokenizer": tokenizer.fingerprint,
    }


def _check_record(
    path: Path, model: Model, mine: dict[str, Any], again: str
) -> tuple[list[int], int]:
    """Read lengths [B] and room of a saved state, which `model`, described by `mine`, continues.

    Raises CheckpointError if it was made by something else, or the record is damaged.
    """
    saved = read_json(path, CheckpointError)
    kinds = {name: type(value) for name, value in mine.items()}
    for name, kind in (kinds | {"lengths": list}).items():
        if json_field(saved, name, kind, where=path, error=CheckpointError) is None:
            raise CheckpointError(f"{path} lacks {name!r}. {again}")
    defaults = {field.name: field.default for field in dataclasses.fields(model.config)}
    # A state of a version without a field had what is now its default.
    changed = [
        f"{name}: {short(before)}, not {value!r}"
        for name, value in mine["model"].items()
        if (before := saved["model"].get(name, defaults.get(name))) != value
    ]
    if changed:
        raise CheckpointError(
            f"{path.parent} is a state of another model ({'; '.join(changed[:4])}). {again}"
        )
    for name, what in (
        ("compute_dtype", "was computed in another dtype"),
        ("parameters", "is a state of this model with other parameters, such as another step's"),
        ("tokenizer", "was read with another tokenizer"),
    ):
        if saved[name] != mine[name]:
            raise CheckpointError(
                f"{path.parent} {what}. Got: {name}={mine[name]!r}, the state's is "
                f"{short(saved[name])}. {again}"
            )
    lengths = saved["lengths"]
    if not lengths or not all(type(n) is int and n >= 0 for n in lengths):
        raise CheckpointError(
            f"{path}: lengths must be numbers of tokens, one a row. Got: {short(lengths)}. {again}"
        )
    room = saved.get("room", max(lengths))
    if type(room) is not int or not max(lengths) <= room <= _MOST_ROOM:
        raise CheckpointError(
            f"{path}: room must be a number of tokens, at least that of the longest row. Got: "
            f"{short(room)}. {again}"
        )
    return lengths, room
