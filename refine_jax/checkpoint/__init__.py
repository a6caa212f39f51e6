"""Checkpoints: of training runs and models (Orbax), and of Hugging Face folders (safetensors)."""

from refine_jax.base.errors import CheckpointError
from refine_jax.checkpoint.folders import ModelCheckpoint
from refine_jax.checkpoint.hf import read_hf
from refine_jax.checkpoint.hf_export import write_hf
from refine_jax.checkpoint.manager import CheckpointManager, Restored
from refine_jax.checkpoint.model import load_model, save_model
from refine_jax.checkpoint.peft import read_adapter, write_adapter

__all__ = [
    "CheckpointError",
    "CheckpointManager",
    "ModelCheckpoint",
    "Restored",
    "load_model",
    "read_adapter",
    "read_hf",
    "save_model",
    "write_adapter",
    "write_hf",
]
