"""What forks read of rows' traces where these are: attention and LaCT's fast weights."""

from refine_jax.kernels.fork_reads.attention import (
    Reach,
    attend_row,
    attend_row_backward,
    takes_row,
)
from refine_jax.kernels.fork_reads.pallas_tpu import (
    ForkRows,
    attend_windows,
    read_weights,
    takes,
)

__all__ = [
    "ForkRows",
    "Reach",
    "attend_row",
    "attend_row_backward",
    "attend_windows",
    "read_weights",
    "takes",
    "takes_row",
]
