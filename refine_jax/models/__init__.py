"""Fast-weight language models as pure functions: `forward`, `fork`, `extend`."""

from refine_jax.base.errors import ModelConfigError
from refine_jax.models.config import (
    DeltaNetConfig,
    GatedDeltaNetConfig,
    LaCTConfig,
    ModelConfig,
    model_config,
)
from refine_jax.models.layout import Layout
from refine_jax.models.transformer import ComputePolicy, Model, Params, State, Trace

__all__ = [
    "ComputePolicy",
    "DeltaNetConfig",
    "GatedDeltaNetConfig",
    "LaCTConfig",
    "Layout",
    "Model",
    "ModelConfig",
    "ModelConfigError",
    "Params",
    "State",
    "Trace",
    "model_config",
]
