"""The delta rule of DeltaNet and Gated DeltaNet: `delta_rule`, and `delta_step` for decoding."""

from refine_jax.kernels.delta_rule.api import (
    IMPLEMENTATIONS,
    STEP_IMPLEMENTATIONS,
    delta_rule,
    delta_step,
)

__all__ = ["IMPLEMENTATIONS", "STEP_IMPLEMENTATIONS", "delta_rule", "delta_step"]
