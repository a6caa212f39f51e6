"""What forks read of rows' traces where these are: window attention and LaCT's fast weights."""

from refine_jax.kernels.fork_reads.pallas_tpu import (
    ForkRows,
    attend_windows,
    read_weights,
    takes,
)

__all__ = ["ForkRows", "attend_windows", "read_weights", "takes"]
