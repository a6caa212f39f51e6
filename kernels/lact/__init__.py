"""LaCT fast weights: `lact` over chunked sequences, and its parts for decoding."""

from refine_jax.kernels.lact.api import IMPLEMENTATIONS, lact
from refine_jax.kernels.lact.reference import FastState, Options, Weights
from refine_jax.kernels.lact.xla import (
    apply_fast_weights,
    apply_update,
    fresh_state,
    newton_schulz,
    row_norms,
    update_sums,
)

__all__ = [
    "IMPLEMENTATIONS",
    "FastState",
    "Options",
    "Weights",
    "apply_fast_weights",
    "apply_update",
    "fresh_state",
    "lact",
    "newton_schulz",
    "row_norms",
    "update_sums",
]
