"""Causal softmax attention over a window of tokens."""

from refine_jax.kernels.window_attention.api import IMPLEMENTATIONS, window_attention
from refine_jax.kernels.window_attention.xla import MASKED, product

__all__ = ["IMPLEMENTATIONS", "MASKED", "product", "window_attention"]
