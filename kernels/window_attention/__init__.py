"""Softmax attention over a window of tokens, as Pallas kernels for TPUs."""

from refine_jax.kernels.window_attention.pallas_tpu import takes, window_attention_tpu

__all__ = ["takes", "window_attention_tpu"]
