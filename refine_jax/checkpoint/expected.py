"""What the parameters of a model must be, by its config.json alone."""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from refine_jax.checkpoint.tree import flatten
from refine_jax.models.config import ModelConfig, model_config
from refine_jax.models.transformer import Model


def abstract_params(fields: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes by name of the parameters of a model with these config.json fields.

    Raises ModelConfigError for a model that is not known.
    """
    return _traced(model_config(dict(fields)))


@functools.cache
def _traced(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    return flatten(Model(config).abstract_params())
