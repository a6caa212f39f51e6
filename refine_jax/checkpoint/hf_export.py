"""Hugging Face folders as PyTorch's code reads them, written without PyTorch; hf.py reads them."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from refine_jax.base.errors import CheckpointError
from refine_jax.base.files import parse_object, write_text
from refine_jax.checkpoint.folders import CONFIG, copy_files, new_folder
from refine_jax.checkpoint.hf import (
    listed,
    nonfinite_error,
    range_of,
    shapes_by_name,
    unsupported_dtype,
)
from refine_jax.checkpoint.names import EMBEDDINGS, HEAD, slots_of
from refine_jax.checkpoint.published import (
    SAFETENSORS_NAMES,
    OfParams,
    Stored,
    take,
    write_safetensors,
)
from refine_jax.checkpoint.streams import DTYPES, Streamed, all_finite, streamed
from refine_jax.checkpoint.tree import abstract_params, differences, flatten
from refine_jax.checkpoint.weights import INDEX, SAFETENSORS
from refine_jax.models.config import model_config


def write_hf(
    folder: str | os.PathLike,
    params: dict,
    config_json: str,
    files: Mapping[str, Path] | None = None,
    *,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> int:
    """Write a Hugging Face folder, as PyTorch's code reads it; returns the number of tensors.

    params: nested dict of arrays, or `Streamed`, layers stacked. config_json: text of config.json,
    written as it is. files: {name: path}, copied; with what `read_hf` kept of other parts, whose
    tensors are written back. Weights larger than `max_shard_bytes` are cut into shards with an
    index; None: as they were read, where that was kept, else 5 GB. The folder appears when it is
    complete.
    allow_nonfinite: write parameters that are NaN or infinite.

    Raises CheckpointError if the folder exists (with `overwrite`: if it holds more than a model) or
    cannot be written, or the parameters are not those of the config.
    """
    named = {name: streamed(leaf) for name, leaf in flatten(params).items()}
    fields = parse_object(config_json, CONFIG, CheckpointError)
    config, expected = model_config(fields), shapes_by_name(abstract_params(fields))
    wrong = differences(expected, shapes_by_name(named))
    wrong += [
        unsupported_dtype(name, leaf.dtype)
        for name, leaf in named.items()
        if np.dtype(leaf.dtype).name not in DTYPES
    ]
    if wrong:
        raise CheckpointError(f"The parameters are not those of {CONFIG}:\n  {listed(wrong)}")
    record, others, files = take(files or {})
    slots = slots_of(config, expected, record and record.shapes())
    places = {
        name: (slot.param, *range_of(slot, expected[slot.param])) for name, slot in slots.items()
    }
    if record and config.tie_word_embeddings and HEAD in record.shapes():
        places[HEAD] = (EMBEDDINGS, 0, math.prod(expected[EMBEDDINGS]))
    tensors: dict[str, OfParams | Stored] = {
        name: OfParams(
            SAFETENSORS_NAMES[named[param].dtype.name],
            slots[name].shape if name in slots else expected[param],
            (stop - start) * named[param].dtype.itemsize,
        )
        for name, (param, start, stop) in sorted(places.items())
    }
    tensors |= others
    size = sum(tensor.size for tensor in tensors.values())
    with new_folder(folder, overwrite=overwrite, size=size, staged=True) as target:
        if record and max_shard_bytes is None and record.holds(tensors):
            starts = {
                target / name: write_safetensors(target / name, tensors, header)
                for name, header in record.headers.items()
            }
            if record.index is not None:
                write_text(target / (SAFETENSORS + INDEX), record.index)
        else:
            starts = _write_shards(target, tensors, max_shard_bytes or 5 * 10**9)
        nonfinite = _fill(starts, places, named)
        if nonfinite and not allow_nonfinite:
            raise nonfinite_error([name for name in nonfinite if name in slots], "The parameters")
        copy_files(files, target)
        write_text(target / CONFIG, config_json)
    return len(slots)


def _fill(
    starts: Mapping[Path, Mapping[str, int]],
    places: Mapping[str, tuple[str, int, int]],
    named: Mapping[str, Streamed],
) -> list[str]:
    """Write parameters into the files of tensors; returns the tensors that are not finite.

    starts: where tensors begin in each file. places: the parameter whose elements a tensor has,
    the first of them and the end.
    """
    pieces: dict[str, list] = {param: [] for param in named}
    nonfinite: dict[str, None] = {}
    with contextlib.ExitStack() as stack:
        for path, of_file in starts.items():
            file = stack.enter_context(path.open("r+b"))
            for name in of_file.keys() & places.keys():
                param, first, end = places[name]
                pieces[param].append((first, end, name, file, of_file[name]))
        for param, stream in named.items():
            for start, values in stream.read():
                for first, end, name, file, at in pieces[param]:
                    begin, stop = max(first, start), min(end, start + values.size)
                    if begin >= stop:
                        continue
                    part = values[begin - start : stop - start]
                    if not all_finite(part):
                        nonfinite[name] = None
                    file.seek(at + (begin - first) * values.dtype.itemsize)
                    file.write(part.view(np.uint8).data)
    return sorted(nonfinite)


def _write_shards(
    folder: Path, tensors: Mapping[str, OfParams | Stored], max_bytes: int
) -> dict[Path, dict[str, int]]:
    """Write files, with an index if they are several; returns where tensors begin in each."""
    shards: list[dict[str, OfParams | Stored]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.size > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.size
    if len(shards) == 1:
        return {folder / SAFETENSORS: write_safetensors(folder / SAFETENSORS, shards[0])}
    starts, weight_map = {}, {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        starts[folder / file] = write_safetensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.size for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / (SAFETENSORS + INDEX), json.dumps(index, indent=2, sort_keys=True) + "\n")
    return starts
