"""Names of published tensors, and where each goes in stacked parameters.

    embeddings.weight                       model.embeddings.weight
    layers.attn.qkv.weight        [L, ...]  model.layers.{0..L-1}.attn.qkv.weight
    layers.attn.momentum_proj.weight        model.layers.{i}.attn.momentum_proj.0.weight
    lm_head.weight                          lm_head.weight

Layers of hybrid models are stacked by kind, `layers.linear_attention.attn...`, and some of their
tensors have several names, or are several tensors, in files that the same code reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

from refine_jax.models.config import Architecture, OlmoHybridConfig, QwenConfig, QwenTextConfig
from refine_jax.models.layer_config import FULL, LINEAR

HEAD = "lm_head.weight"
EMBEDDINGS = "embeddings.weight"

# Names of layers' parameters begin so here (keys) and in published files (values).
_RENAMED: dict[type[Architecture], dict[str, dict[str, tuple[str, ...]]]] = {
    QwenTextConfig: {
        LINEAR: {
            "attn_norm.": ("input_layernorm.",),
            "attn.": ("linear_attn.",),
            "mlp_norm.": ("post_attention_layernorm.",),
        },
        FULL: {
            "attn_norm.": ("input_layernorm.",),
            "attn.": ("self_attn.",),
            "mlp_norm.": ("post_attention_layernorm.",),
        },
    },
    OlmoHybridConfig: {
        LINEAR: {
            "attn_norm.": ("attention_layer_norm.", "input_layernorm."),
            "attn.": ("linear_attn.",),
            "mlp_norm.": ("feedforward_layer_norm.", "post_attention_layernorm."),
        },
        FULL: {
            "attn_norm.": ("post_attention_layernorm.", "feedforward_layer_norm."),
            "attn.": ("self_attn.",),
            "mlp_norm.": ("post_feedforward_layernorm.",),
        },
    },
}
_TEXT_MODEL = "model.language_model."


class Slot(NamedTuple):
    """Where a published tensor goes: the parameter's name, and its layer if it is stacked.

    shape: of the tensor. rows: those of the parameter that it holds; None: all.
    """

    param: str
    layer: int | None
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None


class Target(NamedTuple):
    """A parameter, of one layer if it is stacked, and the published tensors that may hold it.

    names: alternatives, the first of which is written; the tensors of one hold the parameter's
    rows one after the other. rows: how many each of the first alternative's tensors holds.
    """

    param: str
    layer: int | None
    shape: tuple[int, ...]
    names: tuple[tuple[str, ...], ...]
    rows: tuple[int, ...]


def embedding_names(config: Architecture) -> tuple[str, ...]:
    """List the names that the embeddings may have."""
    if not isinstance(config, QwenTextConfig | OlmoHybridConfig):
        return (f"model.{EMBEDDINGS}",)
    return tuple(f"{base}embed_tokens.weight" for base in _bases(config))


def is_of_other_parts(name: str, config: Architecture) -> bool:
    """Tell whether a tensor belongs to a part of the published model beside the text model.

    These are the vision tower and the head that predicts several tokens.
    """
    return isinstance(config, QwenTextConfig) and name.startswith(("model.visual.", "mtp."))


def _bases(config: Architecture) -> tuple[str, ...]:
    """List what names of the text model's tensors may begin with."""
    if isinstance(config, QwenConfig):
        return _TEXT_MODEL, "model."
    return ("model.", _TEXT_MODEL) if isinstance(config, QwenTextConfig) else ("model.",)


def targets_of(config: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> list[Target]:
    """Find the published tensors of parameters of these shapes."""
    bases, targets = _bases(config), []
    for param, shape in shapes.items():
        head, *rest = param.split(".")
        if head == "layers":
            targets += _layer_targets(config, bases, param, rest, shape)
        elif head == "lm_head":
            targets.append(Target(param, None, shape, ((param,),), shape[:1]))
        elif head == "embeddings":
            names = tuple((name,) for name in embedding_names(config))
            targets.append(Target(param, None, shape, names, shape[:1]))
        else:
            names = tuple((base + param,) for base in bases)
            targets.append(Target(param, None, shape, names, shape[:1]))
    return targets


def _layer_targets(config, bases, param: str, rest: list[str], shape) -> list[Target]:
    kinds, layers = config.layer_kinds, range(shape[0])
    renamed: Mapping[str, tuple[str, ...]] = {}
    if kinds is not None:
        kind, *rest = rest
        layers = [layer for layer, kind_of_layer in enumerate(kinds) if kind_of_layer == kind]
        tables = [t for family, t in _RENAMED.items() if isinstance(config, family)]
        renamed = tables[0][kind] if tables else {}
    # The published module is a Sequential, whose first part is this projection.
    tail = ".".join(rest).replace("momentum_proj.", "momentum_proj.0.")
    tails, rows = [(tail,)], shape[1:2]
    for begin, others in renamed.items():
        if tail.startswith(begin):
            tails = [(other + tail.removeprefix(begin),) for other in others]
    if isinstance(config, OlmoHybridConfig) and tail == "attn.conv1d.weight":
        linear, (whole,) = config.linear, tails
        keys = linear.num_heads * linear.key_dim
        rows = keys, keys, shape[1] - 2 * keys
        split = tuple(whole[0].replace("conv1d", f"{part}_conv1d") for part in "qkv")
        tails = [split, whole]
    return [
        Target(
            param,
            index,
            shape[1:],
            tuple(
                tuple(f"{base}layers.{layer}.{name}" for name in names)
                for base, names in itertools.product(bases, tails)
            ),
            rows,
        )
        for index, layer in enumerate(layers)
    ]


def slots_of(
    config: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Slot]:
    """Find the place of every published tensor, by its name, in parameters of the given shapes.

    stored: shapes of the tensors of files that were read, by name: of several names and forms that
    a tensor may have, those that the files have. None: those that are written.
    """
    stored, slots = stored or {}, {}
    for target in targets_of(config, shapes):
        there = [names for names in target.names if any(name in stored for name in names)]
        names = there[0] if there else target.names[0]
        if len(names) == 1:
            slots[names[0]] = Slot(target.param, target.layer, target.shape)
            continue
        rows = target.rows
        if all(name in stored for name in names):
            shapes_stored = [stored[name] for name in names]
            whole = sum(shape[0] for shape in shapes_stored if shape) == target.shape[0]
            if whole and all(shape[1:] == target.shape[1:] for shape in shapes_stored):
                rows = [shape[0] for shape in shapes_stored]  # cut elsewhere by some writers
        start = 0
        for name, count in zip(names, rows, strict=True):
            shape = (count, *target.shape[1:])
            slots[name] = Slot(target.param, target.layer, shape, (start, start + count))
            start += count
    return slots
