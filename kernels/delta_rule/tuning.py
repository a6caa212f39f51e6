"""Block sizes of the delta rule's TPU kernels."""

from __future__ import annotations


def block_sizes(key_dim: int, value_dim: int) -> tuple[int, int, int]:
    """Heads a program, tokens a chunk and chunks a grid step, for padded head sizes.

    By static estimates (notes in pallas_tpu.py) 8 heads hide the latency of their products on every
    generation; states of more than 128 x 128 would take too much VMEM on the smaller ones.
    """
    return (8 if key_dim * value_dim <= 128 * 128 else 4), 128, 1
