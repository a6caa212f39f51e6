"""A checkpoint as what generation and evaluation need of it."""

from __future__ import annotations

from typing import NamedTuple

import jax

from refine_jax.base.errors import DataError
from refine_jax.checkpoint import load_model
from refine_jax.data.tokenizer import Tokenizer, load_tokenizer
from refine_jax.models.config import model_config
from refine_jax.models.transformer import ComputePolicy, Model, Params


class Loaded(NamedTuple):
    """What a checkpoint gives: a model, its parameters on the device, and a tokenizer."""

    model: Model
    params: Params
    tokenizer: Tokenizer


def load(
    checkpoint: str,
    *,
    step: int | str = "latest",
    tokenizer: str | None = None,
    compute_dtype: str | None = None,
) -> Loaded:
    """Load a checkpoint to generate from.

    step: of a training run: "latest", "best" or a number. tokenizer: name or path; None: that of
    the checkpoint. compute_dtype: None: float32 on CPU, bfloat16 on accelerators.

    Raises:
      CheckpointError: No checkpoint, or a corrupt one.
      DataError: No such tokenizer, or the checkpoint has none.
    """
    found = load_model(checkpoint, step=step)
    if tokenizer is None and found.tokenizer is None:
        raise DataError(
            f"{checkpoint} has no tokenizer files. Name a tokenizer: --tokenizer mistral-v1, bytes "
            "or a path."
        )
    return Loaded(
        Model(model_config(found.config), ComputePolicy(compute_dtype=compute_dtype)),
        jax.device_put(found.params),
        load_tokenizer(tokenizer or str(found.tokenizer)),
    )
