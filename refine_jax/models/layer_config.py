"""What the mixers of hybrid models read: configurations of a layer, and `attn` of a config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from refine_jax.models.architecture import (
    CHUNK,
    Range,
    Tokens,
    Width,
    fits,
    in_words,
    kinds_of,
    refusal,
)

LINEAR, FULL = "linear_attention", "full_attention"
Theta = Annotated[float, Range(1, 1e30)]


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """A full-attention layer.

    num_heads queries share num_kv_heads keys and values, of head_dim each. rope_theta: None for no
    positions; the first rotary_dim numbers of a head are turned. window: tokens that a query sees,
    itself among them; None: all. qk_norm: of each head, of the whole width, or none. zero_centred:
    norms multiply by 1 + weight. gated: the output is multiplied by the sigmoid of a gate that
    q_proj gives beside each head's query.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float | None
    rotary_dim: int
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["head", "width"] | None = None
    norm_eps: float = 1e-6
    zero_centred: bool = False
    gated: bool = False


@dataclasses.dataclass(frozen=True)
class DeltaLayerConfig:
    """A layer of the gated delta rule, with the names that its mixer reads.

    norm_eps: Of the output's norm.
    """

    use_short_conv: ClassVar[bool] = True
    use_gate: ClassVar[bool] = True

    hidden_size: int
    num_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_size: int
    norm_eps: float
    allow_neg_eigval: bool = False

    @property
    def token_multiple(self) -> int:
        """N: a forward pass keeps the state before every N-th token."""
        return saved_every(self.key_dim)


class QwenDeltaConfig(DeltaLayerConfig):
    """The delta rule of Qwen 3.5, whose q, k and v come from one projection."""


class OlmoDeltaConfig(DeltaLayerConfig):
    """The delta rule of Olmo Hybrid, with one convolution for q, k and v."""


def saved_every(key_dim: int) -> int:
    """N for keys of width K: saved states then take no more memory than float32 values would."""
    return CHUNK * -(-key_dim // CHUNK)


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The attention layers that `attn` of a published config.json puts between others.

    window_size: None for attention to all earlier tokens.
    """

    layers: tuple[Annotated[int, Range(0, 2**10)], ...]
    num_heads: Width
    num_kv_heads: Width | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    window_size: Tokens | None = None
    rope_theta: Theta = 10000.0

    def config(self, hidden_size: int) -> AttentionConfig:
        """The layer that the published code makes of it."""
        head_dim = hidden_size // self.num_heads
        return AttentionConfig(
            hidden_size=hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=head_dim,
            rope_theta=self.rope_theta,
            rotary_dim=head_dim,
            window=self.window_size,
            qkv_bias=self.qkv_bias,
            qk_norm="head" if self.qk_norm else None,
            norm_eps=1e-5,
        )


def read_attention_specs(
    model_type: str, value: Any, hidden_size: Any, num_layers: Any
) -> tuple[AttentionSpec, ...] | None:
    """The specifications that `attn` of a config.json holds: an object, or a list of some.

    Raises ModelConfigError, which names the field.
    """
    if value is None:
        return None
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise refusal(model_type, "attn", "null, an object or a list of objects", value)
    specs, taken = [], set()
    for entry in entries:
        if isinstance(entry, AttentionSpec):
            entry = dataclasses.asdict(entry)
        if not isinstance(entry, Mapping):
            raise refusal(model_type, "attn", "null, an object or a list of objects", value)
        given = {}
        for name, kind in kinds_of(AttentionSpec).items():
            needed = name in ("layers", "num_heads")
            if entry.get(name) is None and not needed:
                continue
            if not fits(entry.get(name), kind):
                raise refusal(model_type, f"attn.{name}", in_words(kind), entry.get(name))
            given[name] = entry[name]
        given["layers"] = tuple(given["layers"])
        spec = AttentionSpec(**given)
        _check_spec(model_type, spec, hidden_size, num_layers, taken)
        taken |= set(spec.layers)
        specs.append(spec)
    return tuple(spec for spec in specs if spec.layers) or None


def _check_spec(model_type, spec: AttentionSpec, hidden_size, num_layers, taken) -> None:
    layers, heads = spec.layers, spec.num_heads
    if len(set(layers)) < len(layers) or taken & set(layers):
        raise refusal(model_type, "attn.layers", "layers named once each", list(layers))
    if isinstance(num_layers, int) and any(layer >= num_layers for layer in layers):
        allowed = f"numbers of layers below num_hidden_layers={num_layers}"
        raise refusal(model_type, "attn.layers", allowed, list(layers))
    if isinstance(hidden_size, int) and (hidden_size % heads or hidden_size // heads % 2):
        allowed = f"such that hidden_size={hidden_size} is that many heads of even width"
        raise refusal(model_type, "attn.num_heads", allowed, heads)
    if heads % (spec.num_kv_heads or heads):
        allowed = f"a divisor of attn.num_heads={heads}"
        raise refusal(model_type, "attn.num_kv_heads", allowed, spec.num_kv_heads)


def spec_kinds(specs: Sequence[AttentionSpec], num_layers: int) -> tuple[str, ...]:
    """The kind of each layer of a model with these attention layers between its own."""
    kinds = [LINEAR] * num_layers
    for number, spec in enumerate(specs):
        for layer in spec.layers:
            kinds[layer] = FULL + (f"_{number}" if number else "")
    return tuple(kinds)


def spec_of_kind(specs: Sequence[AttentionSpec], kind: str) -> AttentionSpec:
    """The specification of the layers of a kind."""
    number = kind.removeprefix(FULL).removeprefix("_")
    return specs[int(number or 0)]
