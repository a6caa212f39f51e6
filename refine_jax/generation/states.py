"""Saved states: one long document is read once and asked many questions, by other processes too.

A folder holds `arrays/` (Orbax, with fingerprints of their values) and `state.json`, which says by
which model, parameters and tokenizer the state was made: it means nothing to others.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import jax
import jax.numpy as jnp

from refine_jax.base.errors import CheckpointError
from refine_jax.base.files import local_path, read_json, write_text
from refine_jax.checkpoint.arrays import read_arrays, write_arrays
from refine_jax.checkpoint.folders import check_free, new_folder
from refine_jax.checkpoint.tree import (
    fingerprints,
    flatten,
    unflatten,
)
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.generation.engine import Prefix, empty_prefix
from refine_jax.models.config import model_config
from refine_jax.models.transformer import Model, Params

_RECORD, _ARRAYS = "state.json", "arrays"


def save_prefix(
    path: str | os.PathLike, prefix: Prefix, model: Model, params: Params, tokenizer: Tokenizer
) -> None:
    """Write `prefix`, made by `model` with `params`, to a new folder; complete or not there.

    Raises CheckpointError if the path exists.
    """
    check_free(path)
    record = _describe(model, params, tokenizer) | {"lengths": [int(n) for n in prefix.length]}
    with new_folder(path) as folder:
        write_arrays(folder.resolve() / _ARRAYS, flatten(prefix))
        write_text(folder / _RECORD, json.dumps(record, indent=2) + "\n")


def load_prefix(
    path: str | os.PathLike, model: Model, params: Params, tokenizer: Tokenizer
) -> Prefix:
    """Read what `save_prefix` wrote, bit for bit.

    Raises:
      CheckpointError: No saved state, a corrupt one, or one of another model, other parameters,
        another dtype or another tokenizer.
    """
    folder = local_path(path, "the saved state", CheckpointError).resolve()
    if not (folder / _RECORD).is_file():
        raise CheckpointError(f"{path} is not a saved state: it has no {_RECORD}.")
    record = read_json(folder / _RECORD, CheckpointError)
    again = "Read the document again with this one."
    try:
        rows = len(record["lengths"])
        _check_maker(record, _describe(model, params, tokenizer), path, again)
    except KeyError as error:
        raise CheckpointError(f"{folder / _RECORD} lacks {error}. {again}") from None
    abstract = jax.eval_shape(lambda params: empty_prefix(model, params, rows), params)
    arrays = read_arrays(folder / _ARRAYS, flatten(abstract), fix=again)
    return jax.tree.map(jnp.asarray, unflatten(abstract, arrays))


def _describe(model: Model, params: Params, tokenizer: Tokenizer) -> dict[str, Any]:
    values = json.dumps(fingerprints(flatten(params)), sort_keys=True).encode()
    return {
        "model": model.config.to_hf(),
        "compute_dtype": model.policy.compute_dtype,
        "parameters": hashlib.blake2b(values, digest_size=16).hexdigest(),
        "tokenizer": tokenizer.fingerprint,
    }


def _check_maker(saved: dict, mine: dict, path, again: str) -> None:
    """Raise CheckpointError unless the state was made by what would now continue it."""
    if model_config(saved["model"]) != model_config(mine["model"]):
        changed = [
            f"{name}: {saved['model'].get(name)!r}, not {value!r}"
            for name, value in mine["model"].items()
            if saved["model"].get(name) != value
        ]
        raise CheckpointError(
            f"{path} is a state of another model ({'; '.join(changed[:4])}). {again}"
        )
    for name, what in (
        ("compute_dtype", "was computed in another dtype"),
        ("parameters", "is a state of this model with other parameters, such as another step's"),
        ("tokenizer", "was read with another tokenizer"),
    ):
        if saved[name] != mine[name]:
            raise CheckpointError(
                f"{path} {what}. Got: {name}={mine[name]!r}, the state's is {saved[name]!r}. "
                f"{again}"
            )
