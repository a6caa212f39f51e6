"""Hugging Face folders of the published PyTorch models, read and written without PyTorch.

A folder holds config.json, the weights (model.safetensors; or shards with an index; or the same as
pytorch_model.bin) and tokenizer files. What the weights must be follows from the config alone
(names.py). Nothing is transposed and no dtype is changed, so that both directions are exact. What a
folder holds of other parts is kept, too (published.py).
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refine_jax.base.errors import CheckpointError
from refine_jax.base.files import (
    is_lfs_pointer,
    local_path,
    not_fetched,
    parse_object,
    read_text,
    write_text,
)
from refine_jax.checkpoint.folders import (
    CONFIG,
    PARAMS,
    RUN,
    ModelCheckpoint,
    companions,
    contained,
    copy_files,
    has_tokenizer,
    new_folder,
)
from refine_jax.checkpoint.names import (
    EMBEDDINGS,
    HEAD,
    Slot,
    embedding_names,
    is_of_other_parts,
    slots_of,
)
from refine_jax.checkpoint.published import (
    InMemory,
    Stored,
    keep,
    read_header,
    stored_tensors,
    take,
    write_safetensors,
)
from refine_jax.checkpoint.tree import (
    abstract_params,
    differences,
    flatten,
    nest,
)
from refine_jax.checkpoint.weights import (
    DTYPES,
    INDEX,
    SAFETENSORS,
    TORCH,
    WeightFiles,
    weight_files,
)
from refine_jax.models.config import (
    Architecture,
    GatedDeltaNetConfig,
    model_config,
    unused_fields,
)

# Published files may hold these tensors, which change nothing: {pattern: (why, of which family)}.
_UNUSED = {
    r".*\.rotary(_emb)?\.inv_freq": ("it follows from config.json", Architecture),
    r"model\.layers\.\d+\.attn\.D": (
        "older versions of the published code store it and do not read it",
        GatedDeltaNetConfig,
    ),
}

# Tokenizers in these forms are not read.
_OTHER_TOKENIZERS = {"tekken.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt"}

# PyTorch's wrappers of modules put these parts into the names of what they wrap.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

_MOST_LINES, _LONGEST_LINE = 15, 240  # of a message, of each kind
_BLOCK = 1 << 18  # elements that stay in a processor's cache between copy and check


class _Entry(NamedTuple):
    """What a file says about one of its tensors. stored_name: with the names of wrappers."""

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: str


def read_hf(folder: str | os.PathLike, *, allow_nonfinite: bool = False) -> ModelCheckpoint:
    """Read a Hugging Face folder into stacked parameters, dtypes as they are.

    allow_nonfinite: take weights that are NaN or infinite.

    Raises:
      CheckpointError: A file is missing or damaged, or the tensors are not those that config.json
        asks for; the message lists every one that is missing, unknown, of another shape or not
        finite.
      ModelConfigError: config.json describes no model that is supported.
    """
    folder = local_path(folder, "SRC", CheckpointError).absolute()
    config_json = _read_config(folder)
    fields = parse_object(config_json, folder / CONFIG, CheckpointError)
    config = model_config(fields)
    weights = weight_files(folder)
    files = companions(folder)
    pointers = [name for name, path in files.items() if is_lfs_pointer(path)]
    if pointers:
        raise CheckpointError(not_fetched(f"{folder}: {_brief(pointers)}", several=True))
    stored, others, unused, wrong = _describe(weights, folder, config)
    slots = slots_of(config, _shapes(abstract_params(fields)), _shapes(stored))
    tied = config.tie_word_embeddings and HEAD in stored
    expected = {name: slot.shape for name, slot in slots.items()}
    (embeddings,) = (name for name, slot in slots.items() if slot.param == EMBEDDINGS)
    if tied:
        expected[HEAD] = expected[embeddings]
    wrong += differences(expected, _shapes(stored))
    wrong += _dtype_problems(slots, stored)
    if wrong:
        hint = ""
        if [line.partition(":")[0] for line in wrong] == [HEAD] and HEAD not in stored:
            hint = "\nSet tie_word_embeddings to true if the embeddings are the head as well."
        raise CheckpointError(
            f"The weights in {folder} are not those of its {CONFIG}:\n  {_listed(wrong)}{hint}"
        )
    arrays, head = _read(weights, slots, stored, abstract_params(fields), allow_nonfinite)
    if tied and not _same_bits(head, arrays[EMBEDDINGS]):
        raise CheckpointError(
            f"{folder}: {CONFIG} ties the embeddings, but {HEAD} differs from {embeddings}. "
            "Set tie_word_embeddings to false if the head is a matrix of its own."
        )
    left_out = (*unused, *_left_out(folder, fields, weights, files))
    if config.layer_kinds is not None:
        files |= _kept(folder, weights, others)
    tokenizer = folder if has_tokenizer(folder) else None
    model = ModelCheckpoint(fields, config_json, nest(arrays), tokenizer, files)
    return model._replace(slots=slots, tensors=len(stored), left_out=left_out)


def _kept(folder: Path, weights: WeightFiles, others: Mapping[str, _Entry]) -> dict:
    """Make the files that keep tensors of other parts, and the layout of the files of weights."""
    if weights.torch:
        tensors = {}
        for name, entry in others.items():
            with weights.open(entry.file) as opened:
                tensors[name] = InMemory(opened.read(entry.stored_name))
        return keep({}, None, tensors)
    headers, index = {}, None
    if all(file.parent == folder for file in weights.files):
        headers = {file.name: read_header(file)[0] for file in weights.files}
        index = None if weights.index is None else read_text(weights.index, CheckpointError)
    tensors = {
        name: stored_tensors(entry.file)[entry.stored_name] for name, entry in others.items()
    }
    return keep(headers, index, tensors)


def _read_config(folder: Path) -> str:
    """Read the text of config.json; raise a CheckpointError that says what else the folder is."""
    if not folder.is_dir():
        got = "it is a file" if folder.exists() else "there is no such folder"
        raise CheckpointError(f"{folder} is not a Hugging Face folder: {got}.")
    ours = [folder / "checkpoints" / CONFIG, folder / RUN, folder / PARAMS]
    names = [file + end for file in (SAFETENSORS, TORCH) for end in ("", INDEX)]
    if any(map(Path.exists, ours)) and not any((folder / name).exists() for name in names):
        raise CheckpointError(
            f"{folder} is a checkpoint or a run of this package, not a Hugging Face folder: "
            "`python -m refine_jax.convert to_hf SRC DST` writes it for PyTorch."
        )
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is not a Hugging Face folder: it has no {CONFIG}.")
    path = contained(folder, CONFIG)
    if is_lfs_pointer(path):
        raise CheckpointError(not_fetched(str(path)))
    return read_text(path, CheckpointError)


def _describe(
    weights: WeightFiles, folder: Path, config: Architecture
) -> tuple[dict[str, _Entry], dict[str, _Entry], list[str], list[str]]:
    """Sort the tensors by published name: the model's and others'; list unused and wrong ones."""
    entries: list[_Entry] = []
    for file in weights.files:
        with weights.open(file) as opened:
            entries += [_Entry(file, name, *what) for name, what in opened.describe().items()]
    prefix = _common_prefix((entry.stored_name for entry in entries), config)
    stored: dict[str, _Entry] = {}
    others: dict[str, _Entry] = {}
    unused: dict[str, int] = {}
    wrong = []
    for entry in entries:
        name = _without_wrappers(entry.stored_name).removeprefix(prefix)
        reason = _why_unused(name, config)
        if reason:
            kind = f"{re.sub(r'[.][0-9]+[.]', '.*.', name)} ({reason})"
            unused[kind] = unused.get(kind, 0) + 1
        elif is_of_other_parts(name, config):
            others[name] = entry
        elif name in stored:
            both = [stored[name], entry]
            places = [f"{entry.stored_name} in {entry.file.relative_to(folder)}" for entry in both]
            wrong.append(f"{name}: there twice, {' and '.join(places)}")
        else:
            stored[name] = entry
    absent = weights.listed - {entry.stored_name for entry in entries}
    wrong += [f"{name}: named by the index, in no file" for name in sorted(absent)]
    lines = [f"tensors {kind}, {count} of them" for kind, count in unused.items()]
    marks = {part for entry in entries for part in entry.stored_name.split(".")} & _WRAPPERS
    marks |= {prefix.rstrip(".")} - {""}
    lines += [f"the part {mark!r} of tensors' names" for mark in sorted(marks)]
    if others:
        parts = sorted({name.partition(".")[0] for name in others})
        lines.append(
            f"{len(others)} tensors of other parts ({_brief(parts)}): kept as they are, for to_hf"
        )
    return stored, others, [_printable(line) for line in lines], wrong


def _why_unused(name: str, config: Architecture) -> str | None:
    for pattern, (why, family) in _UNUSED.items():
        if isinstance(config, family) and re.fullmatch(pattern, name):
            return why
    return None


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _common_prefix(names: Iterable[str], config: Architecture) -> str:
    """Find what stands before the published names of all tensors, such as `module.`."""
    names = [_without_wrappers(name) for name in names]
    prefixes = [
        name.removesuffix(embeddings)
        for embeddings in embedding_names(config)
        for name in names
        if name.endswith(embeddings)
    ]
    prefixes = [prefix for prefix in prefixes if prefix == "" or prefix.endswith(".")]
    prefix = min(prefixes, key=len, default="")
    return prefix if all(name.startswith(prefix) for name in names) else ""


def _read(
    weights: WeightFiles,
    slots: Mapping[str, Slot],
    stored: Mapping[str, _Entry],
    abstract: Mapping[str, Any],
    allow_nonfinite: bool,
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Read the parameters by name, and a head tied to the embeddings, which is no parameter."""
    arrays, head, nonfinite = {}, None, []
    names: dict[Path, list[str]] = {file: [] for file in weights.files}
    for name, entry in stored.items():
        names[entry.file].append(name)
    for file in weights.files:
        with weights.open(file) as opened:
            for name in names[file]:
                entry = stored[name]
                tensor, slot = opened.read(entry.stored_name), slots.get(name)
                if slot is None:
                    head = tensor
                    continue
                if slot.param not in arrays:
                    shape = tuple(abstract[slot.param].shape)
                    arrays[slot.param] = _empty(shape, DTYPES[entry.dtype])
                if not _copy(tensor, _part(arrays, slot)):
                    nonfinite.append(name)
    if nonfinite and not allow_nonfinite:
        raise _nonfinite(nonfinite, "The weights")
    return {slot.param: arrays[slot.param] for slot in slots.values()}, head


def _part(arrays: Mapping[str, np.ndarray], slot: Slot) -> np.ndarray:
    """Take the part of a parameter that a published tensor holds."""
    array = arrays[slot.param]
    array = array if slot.layer is None else array[slot.layer]
    return array if slot.rows is None else array[slice(*slot.rows)]


def _nonfinite(names: list[str], what: str) -> CheckpointError:
    return CheckpointError(
        f"{what} hold NaN or infinite values, of which no model computes anything. Convert "
        f"with --allow_nonfinite to keep them as they are:\n  {_listed(names)}"
    )


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    try:
        return np.empty(shape, dtype)
    except MemoryError:
        raise CheckpointError(
            f"There is not enough memory for the weights: {list(shape)} of {dtype}."
        ) from None


def _copy(source: np.ndarray, target: np.ndarray) -> bool:
    """Copy an array; returns whether all of its values are finite. Memory is passed once."""
    source, target = source.reshape(-1), target.reshape(-1)
    finite = True
    for start in range(0, source.size, _BLOCK):
        block = source[start : start + _BLOCK]
        target[start : start + _BLOCK] = block
        finite &= _is_finite(block)
    return finite


_EXPONENTS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}


def _all_finite(x: np.ndarray) -> bool:
    flat = x.reshape(-1)
    return all(_is_finite(flat[i : i + _BLOCK]) for i in range(0, flat.size, _BLOCK))


def _is_finite(x: np.ndarray) -> bool:
    """Tell whether all values are finite: no exponent is all ones."""
    mask = _EXPONENTS[x.dtype.name]
    bits = x.view(f"uint{8 * x.dtype.itemsize}")
    return not np.any((bits & bits.dtype.type(mask)) == mask)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8))


def _left_out(folder: Path, fields: Mapping, weights: WeightFiles, files: Mapping) -> list[str]:
    """List in lines what else the folder and its config.json hold: nothing is dropped unsaid."""
    lines = []
    unread = unused_fields(fields)
    if unread:
        lines.append(f"fields of {CONFIG} that change nothing here: {_brief(unread)}")
    read = {CONFIG, *files, *(file.relative_to(folder).parts[0] for file in weights.files)}
    read |= {weights.index.name} if weights.index else set()
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if name not in read and not name.startswith(".")]
    if others:
        lines.append(f"files: {_brief(others)}")
    if not has_tokenizer(folder) and not _OTHER_TOKENIZERS.isdisjoint(others):
        lines[-1] += " (tokenizers are read from tokenizer.json or tokenizer.model)"
    return lines


def _brief(names: list[str], most: int = 12) -> str:
    """Write names in a line, printable and not too many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(_printable(name, 60) for name in names[:most]) + more


def _listed(lines: list[str]) -> str:
    """Write lines of a message, printable and few of a kind: faults, unknown, missing."""
    shown = []
    for kind in (": unknown, ", ": missing, "):
        same = [line for line in lines if kind in line]
        lines = [line for line in lines if kind not in line]
        shown.append(same)
    return "\n  ".join(
        line
        for same in (lines, *shown)
        for line in (
            *(_printable(line) for line in same[:_MOST_LINES]),
            *([f"and {len(same) - _MOST_LINES} more"] if len(same) > _MOST_LINES else []),
        )
    )


def _printable(text: str, most: int = _LONGEST_LINE) -> str:
    text = text if len(text) <= most else text[: most - 3] + "..."
    return text if text.isprintable() else ascii(text)[1:-1]


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

    params: nested dict of arrays, layers stacked. config_json: text of config.json, written as it
    is. files: {name: path}, copied; with what `read_hf` kept of other parts, whose tensors are
    written back. Weights larger than `max_shard_bytes` are cut into shards with an index; None: as
    they were read, where that was kept, else 5 GB. The folder appears when it is complete.
    allow_nonfinite: write parameters that are NaN or infinite.

    Raises CheckpointError if the folder exists (with `overwrite`: if it holds more than a model) or
    cannot be written, or the parameters are not those of the config.
    """
    named = flatten(params)
    fields = parse_object(config_json, CONFIG, CheckpointError)
    config, expected = model_config(fields), _shapes(abstract_params(fields))
    wrong = differences(expected, _shapes(named))
    wrong += [
        _unsupported_dtype(name, leaf.dtype)
        for name, leaf in named.items()
        if np.dtype(leaf.dtype).name not in DTYPES
    ]
    if wrong:
        raise CheckpointError(f"The parameters are not those of {CONFIG}:\n  {_listed(wrong)}")
    record, others, files = take(files or {})
    arrays = {name: np.asarray(leaf) for name, leaf in named.items()}
    slots = slots_of(config, expected, record and record.shapes())
    tensors = {name: InMemory(_part(arrays, slot)) for name, slot in sorted(slots.items())}
    count = len(tensors)
    nonfinite = [name for name, tensor in tensors.items() if not _all_finite(tensor.array)]
    if nonfinite and not allow_nonfinite:
        raise _nonfinite(nonfinite, "The parameters")
    if record and config.tie_word_embeddings and HEAD in record.shapes():
        tensors[HEAD] = InMemory(arrays[EMBEDDINGS])
    tensors |= others
    size = sum(tensor.size for tensor in tensors.values())
    with new_folder(folder, overwrite=overwrite, size=size) as target:
        if record and max_shard_bytes is None and record.holds(tensors):
            for name, header in record.headers.items():
                write_safetensors(target / name, tensors, header)
            if record.index is not None:
                write_text(target / (SAFETENSORS + INDEX), record.index)
        else:
            _write_shards(target, tensors, max_shard_bytes or 5 * 10**9)
        copy_files(files, target)
        write_text(target / CONFIG, config_json)
    return count


def _shapes(named: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in named.items()}


def _unsupported_dtype(name: str, dtype: Any) -> str:
    return f"{name}: dtype {dtype} is not supported, expected one of {list(DTYPES)}"


def _dtype_problems(slots: Mapping[str, Slot], stored: Mapping[str, _Entry]) -> list[str]:
    """List in lines the dtypes that are not supported, and layers that do not stack."""
    lines = [
        _unsupported_dtype(name, entry.dtype)
        for name, entry in sorted(stored.items())
        if entry.dtype not in DTYPES
    ]
    layers: dict[str, dict[str, list[int]]] = {}
    for name, slot in slots.items():
        if slot.layer is not None and name in stored:
            by_dtype = layers.setdefault(slot.param, {})
            by_dtype.setdefault(stored[name].dtype, []).append(slot.layer)
    for param, by_dtype in sorted(layers.items()):
        if len(by_dtype) > 1:
            got = "; ".join(f"{dtype} in layers {of}" for dtype, of in by_dtype.items())
            lines.append(f"{param}: layers must have one dtype, got {got}")
    return lines


def _write_shards(folder: Path, tensors: Mapping[str, InMemory | Stored], max_bytes: int) -> None:
    shards: list[dict[str, InMemory | Stored]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.size > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.size
    if len(shards) == 1:
        write_safetensors(folder / SAFETENSORS, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.size for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / (SAFETENSORS + INDEX), json.dumps(index, indent=2, sort_keys=True) + "\n")
