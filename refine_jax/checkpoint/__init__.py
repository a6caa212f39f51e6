"""Checkpoints: of training runs and models (Orbax), and of Hugging Face folders (safetensors)."""

from refine_jax.base.errors import CheckpointError
from refine_jax.checkpoint.folders import ModelCheckpoint
from refine_jax.checkpoint.hf import read_hf, write_hf
from refine_jax.checkpoint.manager import (
    CheckpointManager,
    Restored,
    load_model,
    save_model,
)

__all__ = [
    "CheckpointError",
    "CheckpointManager",
    "ModelCheckpoint",
    "Restored",
    "load_model",
    "read_hf",
    "save_model",
    "write_hf",
]
