"""What of a published folder is kept beside a checkpoint, so that it can be written back as it was.

`published.json` holds the headers of the files of weights, which say the name, dtype and place of
each tensor, and the text of their index. `published.safetensors` holds the tensors of parts that no
model here has, such as a vision tower. Neither is ever in memory as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refine_jax.base.errors import CheckpointError
from refine_jax.base.files import path_of, read_json, write_text
from refine_jax.checkpoint.folders import PUBLISHED, PUBLISHED_TENSORS
from refine_jax.checkpoint.streams import BLOCK, DTYPES

_ALIGNMENT = 8  # bytes, of the end of a header
# fmt: off
_ORDER = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "U16", "F16", "BF16", "I32", "U32", "F32",
    "F64", "I64", "U64",
)
# fmt: on
SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_NAMES = {short: name for name, short in SAFETENSORS_NAMES.items()}


def numpy_dtype(name: str) -> np.dtype:
    """Find the dtype that headers name so, of those that parameters have."""
    return DTYPES[_NAMES[name]]


class Stored(NamedTuple):
    """A tensor in a safetensors file. dtype: as its header names it. start: byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    def blocks(self) -> Iterator[bytes]:
        """Read the tensor's bytes, some at a time."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            left = self.size
            while left:
                block = file.read(min(left, BLOCK))
                if not block:
                    raise CheckpointError(f"{self.file} ends within a tensor.")
                left -= len(block)
                yield block

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read elements from `start` to before `stop`, in the order of the file."""
        dtype = numpy_dtype(self.dtype)
        with self.file.open("rb") as file:
            file.seek(self.start + start * dtype.itemsize)
            data = file.read((stop - start) * dtype.itemsize)
        if len(data) < (stop - start) * dtype.itemsize:
            raise CheckpointError(f"{self.file} ends within a tensor.")
        return np.frombuffer(data, dtype)


class InMemory(NamedTuple):
    """A tensor as an array, with what `Stored` has."""

    array: np.ndarray

    @property
    def dtype(self) -> str:
        """The dtype as headers name it."""
        return SAFETENSORS_NAMES[self.array.dtype.name]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.array.shape

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.array.nbytes

    def blocks(self) -> Iterator[memoryview]:
        """Give the tensor's bytes."""
        yield np.ascontiguousarray(self.array).reshape(-1).view(np.uint8).data

    def read(self, start: int, stop: int) -> np.ndarray:
        """Give elements from `start` to before `stop`."""
        return self.array.reshape(-1)[start:stop]


class OfParams(NamedTuple):
    """A tensor that will be written, whose elements are those of parameters."""

    dtype: str
    shape: tuple[int, ...]
    size: int


def read_header(file: Path) -> tuple[str, int]:
    """Read the text of a safetensors file's header, and the byte where the tensors begin."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        return opened.read(size).decode(), 8 + size


def _tensors_of(header: str) -> dict[str, dict[str, Any]]:
    return {name: x for name, x in json.loads(header).items() if name != "__metadata__"}


def stored_tensors(file: Path) -> dict[str, Stored]:
    """Find the tensors of a safetensors file."""
    header, begin = read_header(file)
    return {
        name: Stored(
            x["dtype"],
            tuple(x["shape"]),
            file,
            begin + x["data_offsets"][0],
            x["data_offsets"][1] - x["data_offsets"][0],
        )
        for name, x in _tensors_of(header).items()
    }


def write_safetensors(path: Path, tensors: Mapping[str, Any], header: str | None = None) -> dict:
    """Write tensors to a safetensors file, one block at a time, but for those of `OfParams`.

    header: of a file with these tensors, to be written as it is; None: one in the order of the
    safetensors package, larger elements first.
    Returns the byte of the file where each tensor begins, {name: start}.
    """
    if header is None:
        order = sorted(tensors, key=lambda name: (-_rank(tensors[name].dtype), name))
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in order:
            tensor = tensors[name]
            offsets = [at, at + tensor.size]
            entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
            at += tensor.size
        header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
        header += " " * (-len(header.encode()) % _ALIGNMENT)
    encoded = header.encode()
    begin = 8 + len(encoded)
    starts = {name: begin + x["data_offsets"][0] for name, x in _tensors_of(header).items()}
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        file.truncate(begin + sum(tensors[name].size for name in starts))
        for name, start in sorted(starts.items(), key=lambda item: item[1]):
            if not isinstance(tensors[name], OfParams):
                file.seek(start)
                for block in tensors[name].blocks():
                    file.write(block)
    return starts


def _rank(dtype: str) -> int:
    """Rank a dtype as the safetensors package does: wider elements come first in a file."""
    return _ORDER.index(dtype) if dtype in _ORDER else -1


class Record(NamedTuple):
    """What `published.json` says. headers: {file: text}. index: text of the index, if any."""

    headers: dict[str, str]
    index: str | None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Read the shapes of all tensors, by name."""
        return {
            name: tuple(x["shape"])
            for header in self.headers.values()
            for name, x in _tensors_of(header).items()
        }

    def holds(self, tensors: Mapping[str, Any]) -> bool:
        """Tell whether the files hold exactly these tensors, shapes and dtypes, without gaps."""
        seen = {}
        for header in self.headers.values():
            end = 0
            for name, x in sorted(_tensors_of(header).items(), key=lambda e: e[1]["data_offsets"]):
                if name in seen or x["data_offsets"][0] != end:
                    return False
                seen[name] = (x["dtype"], tuple(x["shape"]))
                end = x["data_offsets"][1]
        return seen == {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}


def keep(headers: Mapping[str, str], index: str | None, others: Mapping[str, Stored]) -> dict:
    """Make the files that keep headers, index and tensors, {name: function of a path}."""
    record = json.dumps({"headers": dict(headers), "index": index}, indent=1) + "\n"
    files: dict[str, Callable[[Path], None]] = {PUBLISHED: lambda path: write_text(path, record)}
    if others:
        files[PUBLISHED_TENSORS] = lambda path: write_safetensors(path, others)
    return files


def take(files: Mapping[str, Path]) -> tuple[Record | None, dict[str, Stored], dict[str, Path]]:
    """Separate a checkpoint's files: the record, the tensors of other parts, and the other files.

    Raises CheckpointError for a record that is damaged.
    """
    others = {n: path for n, path in files.items() if n not in (PUBLISHED, PUBLISHED_TENSORS)}
    tensors, record = {}, None
    try:
        if PUBLISHED_TENSORS in files:
            tensors = stored_tensors(path_of(files[PUBLISHED_TENSORS]))
        if PUBLISHED in files:
            fields = read_json(files[PUBLISHED], CheckpointError)
            record = Record(dict(fields["headers"]), fields["index"])
            record.shapes()
            if not all(
                re.fullmatch(r"model[\w.-]*[.]safetensors[\w.-]*", n) for n in record.headers
            ):
                raise ValueError("no names of files of weights")
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        where = path_of(files.get(PUBLISHED) or files[PUBLISHED_TENSORS]).parent
        raise CheckpointError(
            f"{where}: {PUBLISHED} or {PUBLISHED_TENSORS} is damaged. Convert the published folder "
            "again."
        ) from error
    return record, tensors, others
