"""Hugging Face folders of the published PyTorch models, read without PyTorch.

A folder holds config.json, the weights (model.safetensors; or shards with an index; or the same as
pytorch_model.bin) and tokenizer files. What the weights must be follows from the config alone
(names.py). Nothing is transposed and no dtype is changed, so that both directions are exact. What a
folder holds of other parts is kept, too (published.py).
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refine_jax.base.errors import CheckpointError
from refine_jax.base.files import (
    given_path,
    is_lfs_pointer,
    not_fetched,
    parse_object,
    read_text,
)
from refine_jax.base.growing import as_if_there
from refine_jax.checkpoint.folders import (
    CONFIG,
    PARAMS,
    RUN,
    ModelCheckpoint,
    companions,
    contained,
    has_tokenizer,
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
    numpy_dtype,
    read_header,
    stored_tensors,
)
from refine_jax.checkpoint.streams import (
    DTYPES,
    Streamed,
    all_finite,
    block_ranges,
    same_bits,
)
from refine_jax.checkpoint.tree import (
    abstract_params,
    block_fingerprint,
    differences,
    nest,
)
from refine_jax.checkpoint.weights import (
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


class _Entry(NamedTuple):
    """What a file says about one of its tensors. stored_name: with the names of wrappers."""

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: str


def read_hf(
    folder: str | os.PathLike, *, allow_nonfinite: bool = False, in_memory: bool = True
) -> ModelCheckpoint:
    """Read a Hugging Face folder into stacked parameters, dtypes as they are.

    allow_nonfinite: take weights that are NaN or infinite. in_memory: make numpy arrays; else
    parameters are `Streamed`, read again from the folder where they are used.

    Raises:
      CheckpointError: A file is missing or damaged, or the tensors are not those that config.json
        asks for; the message lists every one that is missing, unknown, of another shape or not
        finite.
      ModelConfigError: config.json describes no model that is supported.
    """
    given = given_path(folder, "SRC", CheckpointError).absolute()
    with as_if_there(given) as folder:
        model = _read_folder(folder, allow_nonfinite, in_memory)
    return model._replace(tokenizer=given if has_tokenizer(given) else None)


def _read_folder(folder: Path, allow_nonfinite: bool, in_memory: bool) -> ModelCheckpoint:
    config_json = _read_config(folder)
    fields = parse_object(config_json, folder / CONFIG, CheckpointError)
    config = model_config(fields)
    weights = weight_files(folder)
    files = companions(folder)
    pointers = [name for name, path in files.items() if is_lfs_pointer(path)]
    if pointers:
        raise CheckpointError(not_fetched(f"{folder}: {_brief(pointers)}", several=True))
    stored, others, unused, wrong = _describe(weights, folder, config)
    slots = slots_of(config, shapes_by_name(abstract_params(fields)), shapes_by_name(stored))
    tied = config.tie_word_embeddings and HEAD in stored
    expected = {name: slot.shape for name, slot in slots.items()}
    (embeddings,) = (name for name, slot in slots.items() if slot.param == EMBEDDINGS)
    if tied:
        expected[HEAD] = expected[embeddings]
    wrong += differences(expected, shapes_by_name(stored))
    wrong += _dtype_problems(slots, stored)
    if wrong:
        hint = ""
        if [line.partition(":")[0] for line in wrong] == [HEAD] and HEAD not in stored:
            hint = "\nSet tie_word_embeddings to true if the embeddings are the head as well."
        raise CheckpointError(
            f"The weights in {folder} are not those of its {CONFIG}:\n  {listed(wrong)}{hint}"
        )
    sources = _sources(weights, stored)
    streams = _streams(slots, sources, abstract_params(fields))
    head = sources.get(HEAD) if tied else None
    if head is not None:
        whole = _stream(expected[HEAD], [(0, math.prod(expected[HEAD]), head)])
        if not same_bits(whole, streams[EMBEDDINGS]):
            raise CheckpointError(
                f"{folder}: {CONFIG} ties the embeddings, but {HEAD} differs from {embeddings}. "
                "Set tie_word_embeddings to false if the head is a matrix of its own."
            )
    arrays, nonfinite = _read(streams, in_memory)
    if nonfinite and not allow_nonfinite:
        raise nonfinite_error(_nonfinite_tensors(slots, sources, nonfinite), "The weights")
    left_out = (*unused, *_left_out(folder, fields, weights, files))
    if config.layer_kinds is not None:
        files |= _kept(folder, weights, others)
    model = ModelCheckpoint(fields, config_json, nest(arrays), None, files)
    return model._replace(slots=slots, tensors=len(stored), left_out=left_out)


def _kept(folder: Path, weights: WeightFiles, others: Mapping[str, _Entry]) -> dict:
    """Make the files that keep tensors of other parts, and the layout of the files of weights."""
    headers, index = {}, None
    if not weights.torch and all(file.parent == folder for file in weights.files):
        headers = {file.name: read_header(file)[0] for file in weights.files}
        index = None if weights.index is None else read_text(weights.index, CheckpointError)
    return keep(headers, index, _sources(weights, others))


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


def _sources(weights: WeightFiles, entries: Mapping[str, _Entry]) -> dict[str, Stored | InMemory]:
    """Make each tensor as what reads parts of it."""
    sources: dict[str, Stored | InMemory] = {}
    for file in weights.files:
        names = [name for name, entry in entries.items() if entry.file == file]
        if weights.torch:
            with weights.open(file) as opened:
                for name in names:
                    sources[name] = InMemory(opened.read(entries[name].stored_name))
        elif names:
            tensors = stored_tensors(file)
            sources |= {name: tensors[entries[name].stored_name] for name in names}
    return {name: sources[name] for name in entries}


def _streams(
    slots: Mapping[str, Slot], sources: Mapping[str, Stored | InMemory], abstract: Mapping[str, Any]
) -> dict[str, Streamed]:
    """Make the parameters, which are read from the tensors that hold parts of them."""
    parts: dict[str, list] = {slot.param: [] for slot in slots.values()}
    for name, slot in slots.items():
        parts[slot.param].append((*range_of(slot, abstract[slot.param].shape), sources[name]))
    return {param: _stream(abstract[param].shape, found) for param, found in parts.items()}


def _stream(shape: tuple[int, ...], parts: list[tuple[int, int, Stored | InMemory]]) -> Streamed:
    """Make an array of tensors that hold the elements from `start` to before `stop`."""
    dtype = numpy_dtype(parts[0][2].dtype)
    ranges = block_ranges(shape, dtype.itemsize)

    def read() -> Iterator[tuple[int, np.ndarray]]:
        for begin, end in ranges:
            overlaps = [
                tensor.read(max(begin, start) - start, min(end, stop) - start)
                for start, stop, tensor in sorted(parts, key=lambda part: part[0])
                if start < end and begin < stop
            ]
            yield begin, overlaps[0] if len(overlaps) == 1 else np.concatenate(overlaps)

    return Streamed(tuple(shape), dtype, read)


def range_of(slot: Slot, shape: tuple[int, ...]) -> tuple[int, int]:
    """Find the elements of a parameter of `shape` that a published tensor holds: first and end."""
    rows = shape if slot.layer is None else shape[1:]
    start = 0 if slot.layer is None else slot.layer * math.prod(rows)
    if slot.rows is not None:
        start += slot.rows[0] * math.prod(rows[1:])
    return start, start + math.prod(slot.shape)


def _read(
    streams: Mapping[str, Streamed], in_memory: bool
) -> tuple[dict[str, Streamed | np.ndarray], list[str]]:
    """Read the parameters once, into memory or for their fingerprints.

    Returns them by name, and the names of those that are not finite.
    """
    arrays, nonfinite = {}, []
    for param, stream in streams.items():
        array = _empty(stream.shape, stream.dtype) if in_memory else None
        fingerprint, finite = 0, True
        for start, values in stream.read():
            finite &= all_finite(values)
            if array is None:
                fingerprint += block_fingerprint(values, start)
            else:
                array.reshape(-1)[start : start + values.size] = values
        nonfinite += [] if finite else [param]
        known = dataclasses.replace(stream, fingerprint=fingerprint % 2**32)
        arrays[param] = known if array is None else array
    return arrays, nonfinite


def _nonfinite_tensors(
    slots: Mapping[str, Slot], sources: Mapping[str, Stored | InMemory], params: list[str]
) -> list[str]:
    """List the tensors of these parameters that are not finite."""
    tensors = {
        name: _stream(slot.shape, [(0, math.prod(slot.shape), sources[name])])
        for name, slot in slots.items()
        if slot.param in params
    }
    return _read(tensors, in_memory=False)[1]


def nonfinite_error(names: list[str], what: str) -> CheckpointError:
    """Make the error for tensors with these names, of `what`, which are not finite."""
    return CheckpointError(
        f"{what} hold NaN or infinite values, of which no model computes anything. Convert "
        f"with --allow_nonfinite to keep them as they are:\n  {listed(names)}"
    )


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    try:
        return np.empty(shape, dtype)
    except MemoryError:
        raise CheckpointError(
            f"There is not enough memory for the weights: {list(shape)} of {dtype}."
        ) from None


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


def listed(lines: list[str]) -> str:
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


def shapes_by_name(named: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Take the shapes of arrays, or of what has one."""
    return {name: tuple(leaf.shape) for name, leaf in named.items()}


def unsupported_dtype(name: str, dtype: Any) -> str:
    """Say in a line that weights have no such dtype."""
    return f"{name}: dtype {dtype} is not supported, expected one of {list(DTYPES)}"


def _dtype_problems(slots: Mapping[str, Slot], stored: Mapping[str, _Entry]) -> list[str]:
    """List in lines the dtypes that are not supported, and layers that do not stack."""
    lines = [
        unsupported_dtype(name, entry.dtype)
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
