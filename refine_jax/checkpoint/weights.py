"""Files of weights as Hugging Face folders hold them: safetensors, or what torch.save wrote.

One file, or shards that an index lists. Tensors are described without being read, and read once.
"""

import contextlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from refine_jax.base.errors import CheckpointError
from refine_jax.base.files import is_lfs_pointer, kind_of, not_fetched, read_json, short
from refine_jax.checkpoint.folders import contained

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
INDEX = ".index.json"

_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LARGEST_HEADER = 2**25
"""Bytes of the header of a safetensors file; a tensor takes about 120."""


class WeightFiles(NamedTuple):
    """The weights of a folder.

    files: to read, sorted. index: the file that lists them, None for a single file. listed: the
    tensors it names. open: context manager that opens a file, with `describe` and `read`. torch:
    whether torch.save wrote the files.
    """

    files: list[Path]
    index: Path | None
    listed: set[str]
    open: Callable
    torch: bool = False


def weight_files(folder: Path) -> WeightFiles:
    """Find the weights that a Hugging Face folder holds; safetensors if there are several.

    Raises CheckpointError if there are none, or an index names files that are not in the folder.
    """
    for name, open_file in ((SAFETENSORS, open_safetensors), (TORCH, _open_torch)):
        index = contained(folder, name + INDEX)
        torch = name == TORCH
        single = sorted(path.name for path in folder.glob(f"{name}-00001-of-00001*"))
        if (folder / name).is_file():
            weights = WeightFiles([contained(folder, name)], None, set(), open_file, torch)
        elif index.is_file():
            shards, tensors = _shards(folder, index)
            weights = WeightFiles(shards, index, tensors, open_file, torch)
        elif single:
            weights = WeightFiles([contained(folder, single[0])], None, set(), open_file, torch)
        else:
            continue
        _check_fetched(folder, weights.files)
        return weights
    raise CheckpointError(
        f"{folder} has no weights: expected {SAFETENSORS} or {TORCH}, or one of them in shards "
        f"with {SAFETENSORS}{INDEX} or {TORCH}{INDEX}."
    )


def _shards(folder: Path, index: Path) -> tuple[list[Path], set[str]]:
    """Read which files an index lists, and which tensors are in them."""
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} has no weight_map, an object that says which file each tensor is in. "
            f"Got: weight_map={short(weight_map)}."
        )
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(
                f"{index}: weight_map must give the name of a file for {short(tensor)}. "
                f"Got: {kind_of(file)}."
            )
    shards = [contained(folder, name) for name in sorted(set(weight_map.values()))]
    missing = [str(shard.relative_to(folder)) for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names files that are not there: {short(missing, 300)}. Fetch them too."
        )
    return shards, set(weight_map)


def _check_fetched(folder: Path, files: list[Path]) -> None:
    """Raise CheckpointError for files whose content was never fetched."""
    pointers = [file.name for file in files if is_lfs_pointer(file)]
    if pointers:
        raise CheckpointError(not_fetched(f"{folder}: {short(pointers, 300)}", several=True))


class _SafetensorsFile:
    """Tensors of a .safetensors file, read one at a time."""

    def __init__(self, file: Any):
        self._file = file

    def describe(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Read the shape and dtype of every tensor."""
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        return {
            name: (
                tuple(part.get_shape()),
                _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()),
            )
            for name, part in slices.items()
        }

    def read(self, name: str) -> np.ndarray:
        """Read one tensor."""
        return self._file.get_tensor(name)


class _TorchFile:
    """Tensors of a file that torch.save wrote."""

    def __init__(self, tensors: Mapping[str, Any]):
        self._tensors = tensors

    def describe(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Read the shape and dtype of every tensor."""
        return {
            name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """Read one tensor."""
        import torch

        tensor = self._tensors[name].detach().contiguous()
        if tensor.dtype != torch.bfloat16:
            return tensor.numpy()
        # numpy has no bfloat16 that torch knows: pass the bits.
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator[_SafetensorsFile]:
    """Open a .safetensors file; raises CheckpointError for one that is damaged."""
    size = file.stat().st_size
    with file.open("rb") as start:
        header = int.from_bytes(start.read(8), "little")
    if size < 8 or header > size - 8:
        got = "it is empty" if size == 0 else f"it ends after {size} bytes, in its header"
        raise CheckpointError(f"{file} is not a readable safetensors file: {got}.")
    if header > _LARGEST_HEADER:  # it would be parsed at many times its size in memory
        raise CheckpointError(
            f"{file} is not a readable safetensors file: a header of {header} bytes is no model's."
        )
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
        # weights_only: tensors and plain containers, never code from the file. Files of PyTorch
        # before 1.6 are no zip files and cannot be mapped.
        mapped = zipfile.is_zipfile(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises whatever its unpickler and zip reader raise.
        reason = (str(error) or type(error).__name__).split("\n", 1)[0]
        raise CheckpointError(f"{file} holds no plain tensors that can be read: {reason}") from None
    size = file.stat().st_size

    def is_plain(tensor: Any) -> bool:
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            return False
        # A view can repeat a few stored values without end.
        return not tensor.is_meta and tensor.numel() * tensor.element_size() <= size

    if not isinstance(tensors, dict):
        raise CheckpointError(f"{file} must hold a dict of tensors, as from model.state_dict().")
    for name, tensor in tensors.items():
        if not (isinstance(name, str) and is_plain(tensor)):
            raise CheckpointError(
                f"{file} must hold a dict of plain tensors, as from model.state_dict(). Got: "
                f"{short(name)}: {type(tensor).__name__}."
            )
    yield _TorchFile(tensors)
