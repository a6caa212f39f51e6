"""Moves of attention heads between the layouts of a model's arrays."""

from refine_jax.kernels.heads.api import alone, from_chunks, regroup, to_chunks, together

__all__ = ["alone", "from_chunks", "regroup", "to_chunks", "together"]
