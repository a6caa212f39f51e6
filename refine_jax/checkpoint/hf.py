"""Hugging Face folders of the published PyTorch models, read and written without PyTorch.

A folder holds config.json, the weights (model.safetensors; or shards with an index; or the same as
pytorch_model.bin) and tokenizer files. What the weights must be follows from the config alone:

    embeddings.weight                       model.embeddings.weight
    layers.attn.qkv.weight        [L, ...]  model.layers.{0..L-1}.attn.qkv.weight
    layers.attn.momentum_proj.weight        model.layers.{i}.attn.momentum_proj.0.weight
    lm_head.weight                          lm_head.weight

Nothing is transposed and no dtype is changed, so that both directions are exact.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from refine_jax.base.errors import CheckpointError
from refine_jax.base.files import local_path, parse_object, read_json, read_text, write_text
from refine_jax.checkpoint.expected import abstract_params
from refine_jax.checkpoint.folders import (
    CONFIG,
    companions,
    copy_files,
    new_folder,
)
from refine_jax.checkpoint.tree import (
    differences,
    flatten,
    nest,
)

_SAFETENSORS = "model.safetensors"
_TORCH = "pytorch_model.bin"
_INDEX = ".index.json"

_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Buffers that published files may carry and that follow from the config.
_IGNORED = (".rotary.inv_freq", ".rotary_emb.inv_freq")

_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embeddings.weight"


class Pretrained(NamedTuple):
    """A Hugging Face folder.

    config: the fields of config.json. params: nested dict of numpy arrays, layers stacked.
    config_json: the text of config.json. files: the other files that travel along, {name: path}.
    tensors: how many tensors the files hold.
    """

    config: dict
    params: dict
    config_json: str
    files: dict
    tensors: int


class _Slot(NamedTuple):
    """Where a published tensor goes: the parameter's name, and its layer if it is stacked."""

    param: str
    layer: int | None
    shape: tuple[int, ...]


class _Stored(NamedTuple):
    """What a file says about one of its tensors."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_hf(folder: str | os.PathLike) -> Pretrained:
    """Read a Hugging Face folder into stacked parameters, dtypes as they are.

    Raises:
      CheckpointError: A file is missing or damaged, or the tensors are not those that config.json
        asks for; the message lists every one that is missing, unknown or of another shape.
    """
    folder = local_path(folder, "the Hugging Face folder", CheckpointError).absolute()
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is not a Hugging Face folder: it has no {CONFIG}.")
    config_json = read_text(folder / CONFIG, CheckpointError)
    config = parse_object(config_json, folder / CONFIG, CheckpointError)
    slots = published_slots(_shapes(abstract_params(config)))
    files, listed, open_file = _weight_files(folder)

    stored: dict[str, _Stored] = {}
    for file in files:
        with open_file(file) as weights:
            for name, (shape, dtype) in weights.describe().items():
                if not name.endswith(_IGNORED):
                    stored[name] = _Stored(file, shape, dtype)
    tied = bool(config.get("tie_word_embeddings")) and _HEAD in stored
    expected = {name: slot.shape for name, slot in slots.items()}
    if tied:
        expected[_HEAD] = expected[_EMBEDDINGS]
    wrong = differences(expected, _shapes(stored))
    wrong += [f"{name}: named by the index, in no file" for name in sorted(listed - stored.keys())]
    wrong += _dtype_problems(slots, stored)
    if wrong:
        raise CheckpointError(
            f"The weights in {folder} are not those of its {CONFIG}:\n  " + "\n  ".join(wrong)
        )

    arrays = {
        slot.param: np.empty(
            slot.shape if slot.layer is None else (config["num_hidden_layers"], *slot.shape),
            _DTYPES[stored[name].dtype],
        )
        for name, slot in slots.items()
    }
    head = None
    for file in files:
        with open_file(file) as weights:
            for name in (name for name, entry in stored.items() if entry.file == file):
                if name in slots:
                    slot = slots[name]
                    arrays[slot.param][... if slot.layer is None else slot.layer] = weights.read(
                        name
                    )
                else:
                    head = weights.read(name)
    if tied and head.tobytes() != arrays["embeddings.weight"].tobytes():
        raise CheckpointError(
            f"{folder}: {CONFIG} ties the embeddings, but {_HEAD} differs from {_EMBEDDINGS}. "
            "Set tie_word_embeddings to false if the head is a matrix of its own."
        )
    return Pretrained(config, nest(arrays), config_json, companions(folder), len(stored))


def write_hf(
    folder: str | os.PathLike,
    params: dict,
    config_json: str,
    files: Mapping[str, Path] | None = None,
    *,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> int:
    """Write a Hugging Face folder, as PyTorch's code reads it; returns the number of tensors.

    params: nested dict of arrays, layers stacked. config_json: text of config.json, written as it
    is. files: {name: path}, copied. Weights larger than `max_shard_bytes` are cut into shards with
    an index. The folder appears when it is complete.

    Raises CheckpointError if the folder exists (with `overwrite`: if it is no checkpoint), or the
    parameters are not those of the config.
    """
    named = flatten(params)
    expected = _shapes(abstract_params(parse_object(config_json, CONFIG, CheckpointError)))
    wrong = differences(expected, _shapes(named))
    if wrong:
        raise CheckpointError(f"The parameters are not those of {CONFIG}:\n  " + "\n  ".join(wrong))
    arrays = {name: np.asarray(leaf) for name, leaf in named.items()}
    tensors = {
        name: arrays[slot.param][... if slot.layer is None else slot.layer]
        for name, slot in sorted(published_slots(expected).items())
    }
    with new_folder(folder, overwrite=overwrite) as target:
        _write_shards(target, tensors, max_shard_bytes)
        copy_files(files or {}, target)
        write_text(target / CONFIG, config_json)
        for file in target.glob("*.safetensors"):
            # safetensors makes files that only their owner can read.
            shutil.copymode(target / CONFIG, file)
    return len(tensors)


def published_slots(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Slot]:
    """The place of every published tensor, by its name, in parameters of the given shapes."""
    slots = {}
    for param, shape in shapes.items():
        head, *rest = param.split(".")
        if head == "layers":
            # The published module is a Sequential, whose first part is this projection.
            tail = ".".join(rest).replace("momentum_proj.", "momentum_proj.0.")
            for layer in range(shape[0]):
                slots[f"model.layers.{layer}.{tail}"] = _Slot(param, layer, shape[1:])
        elif head == "lm_head":
            slots[param] = _Slot(param, None, shape)
        else:
            slots[f"model.{param}"] = _Slot(param, None, shape)
    return slots


def _shapes(named: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in named.items()}


def _dtype_problems(slots: Mapping[str, _Slot], stored: Mapping[str, _Stored]) -> list[str]:
    """Lines for dtypes that are not supported, and for layers that do not stack."""
    lines = [
        f"{name}: dtype {entry.dtype} is not supported, expected one of {list(_DTYPES)}"
        for name, entry in sorted(stored.items())
        if entry.dtype not in _DTYPES
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


def _weight_files(folder: Path) -> tuple[list[Path], set[str], Callable]:
    """The weight files, the tensors that an index lists, and what opens a file."""
    for name, open_file in ((_SAFETENSORS, _open_safetensors), (_TORCH, _open_torch)):
        if (folder / name).is_file():
            return [folder / name], set(), open_file
        index = folder / (name + _INDEX)
        if index.is_file():
            weight_map = read_json(index, CheckpointError).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index} has no weight_map.")
            shards = sorted(set(weight_map.values()))
            outside = [shard for shard in shards if Path(shard).name != shard]
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if outside or missing:
                raise CheckpointError(f"{index} names files that are not there: {missing}.")
            kept = {tensor for tensor in weight_map if not tensor.endswith(_IGNORED)}
            return [folder / shard for shard in shards], kept, open_file
    raise CheckpointError(
        f"{folder} has no weights: expected {_SAFETENSORS} or {_TORCH}, or one of them in shards "
        f"with {_SAFETENSORS}{_INDEX} or {_TORCH}{_INDEX}."
    )


class _SafetensorsFile:
    """Tensors of a .safetensors file, read one at a time."""

    def __init__(self, file: Any):
        self._file = file

    def describe(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every tensor."""
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        return {
            name: (
                tuple(part.get_shape()),
                _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()),
            )
            for name, part in slices.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._file.get_tensor(name)


class _TorchFile:
    """Tensors of a file that torch.save wrote."""

    def __init__(self, tensors: Mapping[str, Any]):
        self._tensors = tensors

    def describe(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every tensor."""
        return {
            name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        import torch

        tensor = self._tensors[name].detach().contiguous()
        if tensor.dtype != torch.bfloat16:
            return tensor.numpy()
        # numpy has no bfloat16 that torch knows: pass the bits.
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


@contextlib.contextmanager
def _open_safetensors(file: Path) -> Iterator[_SafetensorsFile]:
    try:
        with safe_open(file, framework="numpy") as opened:
            yield _SafetensorsFile(opened)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}.") from None


@contextlib.contextmanager
def _open_torch(file: Path) -> Iterator[_TorchFile]:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{file} needs PyTorch to be read: pip install 'refine-jax[torch]', or save the model "
            "as safetensors."
        ) from None
    try:
        # weights_only: tensors and plain containers, never code from the file.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever its unpickler and zip reader raise.
        reason = str(error).split("\n", 1)[0]
        raise CheckpointError(f"{file} holds no plain tensors that can be read: {reason}") from None
    if not isinstance(tensors, dict) or not all(hasattr(t, "dtype") for t in tensors.values()):
        raise CheckpointError(f"{file} must hold a dict of tensors, as from model.state_dict().")
    yield _TorchFile(tensors)


def _write_shards(folder: Path, tensors: Mapping[str, np.ndarray], max_bytes: int) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / _SAFETENSORS, metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / (_SAFETENSORS + _INDEX), json.dumps(index, indent=2, sort_keys=True) + "\n")
