"""Fast-weight language models as pure functions: `forward`, `fork`, `extend`."""

from refine_jax.base.errors import ModelConfigError
from refine_jax.models.config import (
    Architecture,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    LaCTConfig,
    model_config,
)
from refine_jax.models.layout import Layout
from refine_jax.models.transformer import ComputePolicy, Model, Params, State, Trace

__all__ = [
    "Architecture",
    "ComputePolicy",
    "DeltaNetConfig",
    "GatedDeltaNetConfig",
    "LaCTConfig",
    "Layout",
    "Model",
    "ModelConfigError",
    "Params",
    "State",
    "Trace",
    "model_config",
]
