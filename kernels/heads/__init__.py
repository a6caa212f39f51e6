"""Attention heads side by side, and how they move between the layouts of the models' arrays."""

from refine_jax.kernels.heads.api import alone, from_chunks, regroup, to_chunks, together

__all__ = ["alone", "from_chunks", "regroup", "to_chunks", "together"]
