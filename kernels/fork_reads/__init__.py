"""What forks read of rows' traces where these are: attention and LaCT's fast weights."""

from refine_jax.kernels.fork_reads.api import (
    ROW_IMPLEMENTATIONS,
    WEIGHT_IMPLEMENTATIONS,
    WINDOW_IMPLEMENTATIONS,
    attend_row,
    attend_row_of_layer,
    attend_windows,
    read_weights,
)
from refine_jax.kernels.fork_reads.reference import ForkRows, Reach

__all__ = [
    "ROW_IMPLEMENTATIONS",
    "WEIGHT_IMPLEMENTATIONS",
    "WINDOW_IMPLEMENTATIONS",
    "ForkRows",
    "Reach",
    "attend_row",
    "attend_row_of_layer",
    "attend_windows",
    "read_weights",
]
