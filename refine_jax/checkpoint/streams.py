"""Arrays read in blocks, so that a conversion holds a few blocks and never a whole model.

A block is a range of an array's elements in the order of memory (C), at most `BLOCK` bytes where
the shape allows it. The arrays that we write to checkpoints are stored in chunks of the same shape:
a layer of a stack, or some of its rows, is then read without the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

BLOCK = 1 << 24  # bytes
Blocks = Iterator[tuple[int, np.ndarray]]

_PIECE = 1 << 18  # elements that stay in a processor's cache
_EXPONENTS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class Streamed:
    """An array that lies elsewhere, with the shape and dtype of one.

    read: returns the blocks, (index of the first element, elements [n]), one after the other and
    all of them; called for each pass. fingerprint: of the elements (tree.py), if known.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], Blocks]
    fingerprint: int | None = None

    def __deepcopy__(self, memo: dict) -> Streamed:
        """Return the array itself: Orbax copies what it saves, which nothing changes here."""
        return self

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.size * self.dtype.itemsize

    def astype(self, dtype: Any) -> Streamed:
        """Cast each block when it is read."""
        dtype = np.dtype(dtype)

        def read() -> Blocks:
            for start, values in self.read():
                yield start, values.astype(dtype)

        return self if dtype == self.dtype else Streamed(self.shape, dtype, read)


def streamed(array: Any) -> Streamed:
    """Make a `Streamed` of an array in memory; what is one stays as it is."""
    if isinstance(array, Streamed):
        return array
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    flat, ranges = array.reshape(-1), block_ranges(array.shape, array.dtype.itemsize)
    return Streamed(array.shape, array.dtype, lambda: ((a, flat[a:b]) for a, b in ranges))


def chunk_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Choose the shape of blocks: leading axes are cut until a block has at most `BLOCK` bytes."""
    chunk = list(shape)
    for axis in range(len(shape)):
        inner = math.prod(shape[axis + 1 :]) * itemsize
        chunk[axis] = min(max(BLOCK // inner, 1), shape[axis])
        if inner <= BLOCK:
            break
    return tuple(chunk)


def block_ranges(
    shape: Sequence[int], itemsize: int, chunk: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """List the ranges of elements that blocks hold.

    chunk: the shape of the chunks that the array is stored in, of which no block holds a part of
    the leading axes; None: `chunk_shape`.
    """
    chunk = chunk_shape(shape, itemsize) if chunk is None else chunk
    axis = next((a for a, size in enumerate(chunk) if size > 1), max(len(shape) - 1, 0))
    period = math.prod(shape[axis:])
    step = math.prod((*chunk[axis : axis + 1], *shape[axis + 1 :]))
    return [
        (base + start, base + min(start + step, period))
        for base in range(0, math.prod(shape), period)
        for start in range(0, period, step)
    ]


def index_of(shape: Sequence[int], start: int, stop: int) -> tuple[int | slice, ...]:
    """Make the index of an array of `shape` that takes the elements of a block."""
    index: list[int | slice] = []
    for axis in range(len(shape)):
        inner = math.prod(shape[axis + 1 :])
        if start % inner == stop % inner == 0:
            return (*index, slice(start // inner, stop // inner))
        index.append(start // inner)
        start, stop = start % inner, stop - inner * (start // inner)
    return tuple(index)


def all_finite(values: np.ndarray) -> bool:
    """Tell whether all elements are finite: no exponent is all ones."""
    flat = values.reshape(-1).view(f"uint{8 * values.dtype.itemsize}")
    mask = flat.dtype.type(_EXPONENTS[values.dtype.name])
    pieces = (flat[i : i + _PIECE] for i in range(0, flat.size, _PIECE))
    return not any(np.any((piece & mask) == mask) for piece in pieces)


def same_bits(a: Streamed, b: Streamed) -> bool:
    """Tell whether two arrays of one shape hold the same bits."""
    return a.dtype == b.dtype and all(
        np.array_equal(x.view(np.uint8), y.view(np.uint8))
        for (_, x), (_, y) in zip(a.read(), b.read(), strict=True)
    )
