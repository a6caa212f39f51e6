"""Block sizes of the LaCT op's Pallas TPU kernels, by TPU generation and size."""

from __future__ import annotations

import jax
from jax.experimental.pallas import tpu as pltpu

# (tokens of a grid step, tokens of its parts), forward and backward, for d, F up to a size.
_BLOCKS = {
    "TPU_V6E": {
        "forward": {384: (512, 256), 768: (512, 256)},
        "backward": {384: (256, 256), 768: (256, 256)},
    },
}
_DEFAULT = {
    "forward": {384: (512, 256), 768: (512, 256)},
    "backward": {384: (256, 256), 768: (256, 256)},
}
_SMALLEST = (128, 128)


def generation() -> str | None:
    """Name of the TPU generation that is compiled for, e.g. "TPU_V6E"; None without a TPU."""
    if jax.default_backend() != "tpu":
        return None
    return pltpu.get_tpu_info().chip_version.name


def vmem_bytes() -> int:
    """Bytes of vector memory of a core; those of the largest if there is no TPU."""
    if jax.default_backend() != "tpu":
        return 128 << 20
    return pltpu.get_tpu_info().vmem_capacity_bytes


def block_sizes(direction: str, size: int, chunk: int) -> tuple[int, int]:
    """Tokens of a grid step and of the parts it is computed in, for a chunk of so many tokens.

    direction: "forward" or "backward". size: the larger of d and F. Both sizes divide `chunk`,
    which is a multiple of 128.
    """
    table = _BLOCKS.get(generation(), _DEFAULT)[direction]
    block, part = next((sizes for most, sizes in table.items() if size <= most), _SMALLEST)
    while chunk % block:
        block -= 128
    while block % part:
        part -= 128
    return block, part
