"""Block sizes of the TPU kernels."""

from __future__ import annotations


def block_sizes(key_dim: int, value_dim: int) -> tuple[int, int, int]:
    """Heads a program, tokens a chunk and chunks a grid step for padded head sizes."""
    return (8 if key_dim * value_dim <= 128 * 128 else 4), 128, 1
