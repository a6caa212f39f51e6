"""Low-rank updates in the format of the peft package: `adapter_config.json` and tensors.

A tensor is named by its module in the published model,

    base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight   [r, in]
    base_model.model.model.layers.{i}.self_attn.q_proj.lora_B.weight   [out, r]

as names.py has the weight's name. Updates are float32 here, whatever the file has.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refine_jax.base.errors import CheckpointError
from refine_jax.base.files import given_path, json_field, path_of, read_json, short, write_text
from refine_jax.base.growing import as_if_there
from refine_jax.checkpoint.folders import ADAPTER, ADAPTER_TENSORS, contained, new_folder
from refine_jax.checkpoint.names import targets_of
from refine_jax.checkpoint.published import InMemory, write_safetensors
from refine_jax.checkpoint.streams import DTYPES
from refine_jax.checkpoint.tree import flatten, nest, shapes_of
from refine_jax.checkpoint.weights import open_safetensors
from refine_jax.models.config import Architecture, QwenConfig
from refine_jax.models.lora import LoRA, linear_maps
from refine_jax.models.trainable import Params

_PARTS = ("lora_A", "lora_B")

# Fields that would change what an adapter computes, and the values that are the plain ones.
_PLAIN: dict[str, tuple] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
}


def is_adapter(folder: str | os.PathLike) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return (path_of(folder) / ADAPTER).is_file()


def read_adapter(folder: str | os.PathLike, config: Architecture) -> tuple[LoRA, Params]:
    """Read the updates of a model with this configuration: what they are, and their nested dict.

    Layers that have no update of a linear map get zeros, which training leaves as they are.

    Raises CheckpointError: a file is missing or damaged, the adapter is of another kind than plain
    LoRA, or its tensors are not those of updates of this model.
    """
    with as_if_there(given_path(folder, "the adapter", CheckpointError).absolute()) as folder:
        return _read_folder(folder, config)


def _read_folder(folder: Path, config: Architecture) -> tuple[LoRA, Params]:
    path, file = (contained(folder, name) for name in (ADAPTER, ADAPTER_TENSORS))
    for needed in (path, file):
        if not needed.is_file():
            raise CheckpointError(
                f"{folder} is not an adapter of the peft package: no {needed.name}."
            )
    rank, alpha = _read_fields(path)
    weights = linear_maps(nest(shapes_of(config)))
    expected = _tensors(config, weights, rank)
    updates: dict[str, np.ndarray] = {}
    seen, wrong = set(), []
    with open_safetensors(file) as opened:
        for name, (shape, dtype) in opened.describe().items():
            if name not in expected:
                wrong.append(f"{name}: is of no linear map of this model's layers")
                continue
            param, layer, wanted = expected[name]
            if shape != wanted or dtype not in DTYPES:
                wrong.append(f"{name}: expected {list(wanted)}, got {list(shape)} of {dtype}")
                continue
            values = opened.read(name).astype(np.float32)
            if not np.isfinite(values).all():
                wrong.append(f"{name}: not all values are finite")
            layers = len(weights[param.rpartition(".")[0]])
            updates.setdefault(param, np.zeros((layers, *wanted), np.float32))[layer] = values
            seen.add(name)
    pairs = [(name, name.replace("lora_A", "lora_B")) for name in expected if "lora_A" in name]
    for pair in pairs:
        if len(there := seen.intersection(pair)) == 1:
            wrong.append(f"{(set(pair) - there).pop()}: missing")
    if wrong or not updates:
        lines = sorted(wrong)[:15] + [f"and {len(wrong) - 15} more"] * (len(wrong) > 15)
        raise CheckpointError(
            f"{file} does not hold updates of this model:\n  "
            + "\n  ".join(lines or ["it is empty"])
        )
    lora = LoRA(rank, alpha, tuple(name for name in weights if f"{name}.lora_A" in updates))
    for name in lora.targets:
        updates[f"{name}.lora_scale"] = np.full(len(weights[name]), lora.scale, np.float32)
    return lora, nest(updates)


def _tensors(
    config: Architecture, weights: Mapping[str, Any], rank: int
) -> dict[str, tuple[str, int, tuple[int, int]]]:
    """Of every tensor that an adapter may hold the parameter, its layer, and the tensor's shape."""
    found = {}
    for target in targets_of(config, {f"{name}.weight": x.shape for name, x in weights.items()}):
        size_out, size_in = target.shape
        for part, shape in (("lora_A", (rank, size_in)), ("lora_B", (size_out, rank))):
            param = target.param.removesuffix("weight") + part
            for (name,) in target.names:
                found[_tensor_name(name, part)] = param, target.layer, shape
    return found


def _tensor_name(weight: str, part: str) -> str:
    """The name in an adapter of a part of the update of a published weight."""
    return f"base_model.model.{weight.removesuffix('weight')}{part}.weight"


def _read_fields(path: Path) -> tuple[int, float]:
    """The rank and alpha of adapter_config.json; raises CheckpointError for what is not plain."""
    fields = read_json(path, CheckpointError)
    where = {"where": path, "error": CheckpointError}
    kind = json_field(fields, "peft_type", str, **where)
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type must be 'LORA'. Got: {short(kind)}.")
    for name, plain in _PLAIN.items():
        if fields.get(name) not in plain:
            raise CheckpointError(
                f"{path}: {name} must be {short(plain[0])}, as of plain LoRA. "
                f"Got: {short(fields[name])}."
            )
    rank = json_field(fields, "r", int, **where)
    alpha = json_field(fields, "lora_alpha", (int, float), **where)
    if not rank or rank < 1 or not alpha or not 0 < alpha < math.inf:
        raise CheckpointError(
            f"{path}: r must be at least 1 and lora_alpha above 0. Got: r={short(rank)}, "
            f"lora_alpha={short(alpha)}."
        )
    # With use_rslora an update is multiplied by alpha / sqrt(r).
    return rank, float(alpha) * (math.sqrt(rank) if fields.get("use_rslora") else 1.0)


def write_adapter(
    path: str | os.PathLike,
    params: Params,
    lora: LoRA,
    config: Architecture,
    *,
    base: str = "",
    overwrite: bool = False,
) -> int:
    """Write the updates among parameters for the peft package; returns the number of tensors.

    base: name or path of the model that they belong to, for those who load both.
    Raises CheckpointError if the folder exists (with `overwrite`: if it is no adapter).
    """
    arrays, weights = flatten(params), linear_maps(nest(shapes_of(config)))
    tensors, modules = {}, []
    for target in targets_of(config, {f"{x}.weight": weights[x].shape for x in lora.targets}):
        (name,) = target.names[0]
        modules.append(name.removesuffix(".weight"))
        for part in _PARTS:
            stacked = arrays[target.param.removesuffix("weight") + part]
            tensors[_tensor_name(name, part)] = InMemory(np.asarray(stacked[target.layer]))
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": _short_names(modules, weights, config),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(
        path, overwrite=overwrite, size=sum(x.size for x in tensors.values()), staged=True
    ) as folder:
        write_safetensors(folder / ADAPTER_TENSORS, tensors)
        write_text(folder / ADAPTER, json.dumps(fields, indent=2) + "\n")
    return len(tensors)


def _short_names(modules: list[str], weights: Mapping[str, Any], config: Architecture) -> list[str]:
    """The last parts of modules' names, where no other module has one of them; else all names."""
    last = {name.rpartition(".")[2] for name in modules}
    shapes = {f"{name}.weight": x.shape for name, x in weights.items()}
    names = [target.names[0][0].split(".")[-2] for target in targets_of(config, shapes)]
    alike = sum(name in last for name in names)
    # The whole published model has further parts, with linear maps of the same names.
    alone = not isinstance(config, QwenConfig) and alike == len(modules)
    return sorted(last) if alone else modules
