"""Configurations of hybrid models: delta-rule layers with full-attention layers between them.

A model's `layer_kinds` names the kind of each layer. Layers of one kind have one mixer, which reads
an `AttentionConfig` or a `DeltaLayerConfig`, and their parameters are stacked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from refine_jax.base.errors import ModelConfigError
from refine_jax.base.files import short
from refine_jax.models.architecture import (
    Architecture,
    Eps,
    Range,
    TokenIds,
    Width,
    kinds_of,
    refusal,
)
from refine_jax.models.layer_config import (
    FULL,
    LINEAR,
    AttentionConfig,
    DeltaLayerConfig,
    OlmoDeltaConfig,
    QwenDeltaConfig,
    Theta,
)

LayerType = Literal["linear_attention", "full_attention"]
_TAPS = Annotated[int, Range(1, 1024)]
_EVERY = 4  # layers, of which the last is full attention where a config.json names none

_TABLES = ("rope_parameters", "rope_scaling")
_NEUTRAL = {"rope_type": "default", "type": "default", "factor": 1}
"""Fields about positions, and the values that ask for what we compute."""
_OF_IMAGES = {"mrope_section", "mrope_interleaved"}
"""Positions of text are equal in all sections: these fields then change nothing."""


@dataclasses.dataclass(frozen=True)
class HybridArchitecture(Architecture):
    """What the published hybrid families share."""

    unsupported: ClassVar[Mapping[str, tuple[Any, str]]] = Architecture.unsupported | {
        "num_experts": (None, "mixtures of experts"),
        "use_sliding_window": (False, "sliding windows"),
        "sliding_window": (None, "sliding windows"),
    }
    may_lack_positions: ClassVar[bool] = False
    """Whether `rope_theta: null` is a value: attention without positions."""

    hidden_act: Literal["swish", "silu"] = "silu"
    intermediate_size: Width = 11008
    num_attention_heads: Width = 32
    num_key_value_heads: Width | None = None
    head_dim: Width | None = None
    attention_bias: bool = False
    layer_types: tuple[LayerType, ...] | None = None
    rms_norm_eps: Eps = 1e-6
    rope_theta: Theta | None = 10000.0
    linear_conv_kernel_dim: _TAPS = 4

    def __post_init__(self):
        super().__post_init__()
        if self.layer_types is not None:
            length, layers = len(self.layer_types), self.num_hidden_layers
            allowed = f"a list of num_hidden_layers={layers} names, not {length}"
            self._require(length == layers, "layer_types", allowed)
        heads = self.num_attention_heads
        if self.head_dim is None:
            divides = self.hidden_size % heads == 0
            allowed = f"a divisor of hidden_size={self.hidden_size}"
            self._require(divides, "num_attention_heads", allowed)
        divides = heads % self.kv_heads == 0
        allowed = f"a divisor of num_attention_heads={heads}"
        self._require(divides, "num_key_value_heads", allowed)
        width = heads * self.attention_head_dim * 2
        self._require_width("num_attention_heads", width, "q_proj")
        linear = self.linear
        groups = linear.num_value_heads % linear.num_heads == 0
        allowed = f"a multiple of linear_num_key_heads={linear.num_heads}"
        self._require(groups, "linear_num_value_heads", allowed)
        width = 2 * linear.num_heads * linear.key_dim + linear.num_value_heads * linear.value_dim
        self._require_width("linear_value_head_dim", width, "the projection of q, k and v")

    @property
    def mlp_size(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.intermediate_size

    @property
    def norm_eps(self) -> float:
        """Epsilon of the norms of blocks and of the final one."""
        return self.rms_norm_eps

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values in attention layers."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def attention_head_dim(self) -> int:
        """Width of a head of attention layers."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def num_heads(self) -> int:
        """Key heads of the delta rule."""
        return self.linear.num_heads

    @property
    def num_value_heads(self) -> int:
        """Value heads of the delta rule."""
        return self.linear.num_value_heads

    @property
    def token_multiple(self) -> int:
        """Devices that share the tokens of a row each hold a multiple of so many."""
        return self.linear.token_multiple

    @property
    def linear(self) -> DeltaLayerConfig:
        """The layers of the delta rule."""
        raise NotImplementedError

    @property
    def attention(self) -> AttentionConfig:
        """The full-attention layers: what the families have in common."""
        return AttentionConfig(
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.attention_head_dim,
            rope_theta=self.rope_theta,
            rotary_dim=self.attention_head_dim,
            qkv_bias=self.attention_bias,
            out_bias=self.attention_bias,
            norm_eps=self.rms_norm_eps,
        )

    def layer_config(self, kind: str | None) -> AttentionConfig | DeltaLayerConfig:
        """See `Architecture`."""
        return self.linear if kind == LINEAR else self.attention

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer; without `layer_types` every fourth one is full attention."""
        if self.layer_types is not None:
            return self.layer_types
        return self._default_kinds(_EVERY)

    def _default_kinds(self, every: int) -> tuple[str, ...]:
        numbers = range(1, self.num_hidden_layers + 1)
        return tuple(LINEAR if number % every else FULL for number in numbers)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> Architecture:
        """See `model_config`. Positions stand under their names, or in a table of positions."""
        config = super().from_hf(_with_positions(cls, fields))
        return dataclasses.replace(config, layer_types=config.layer_kinds)

    def to_hf(self) -> dict[str, Any]:
        """See `Architecture`; positions in the table that Transformers 5 reads."""
        fields = super().to_hf()
        # What follows from other fields is absent: the published code takes null for a value.
        kept = ("rope_theta", "bos_token_id", "eos_token_id")
        fields = {n: x for n, x in fields.items() if x is not None or n in kept}
        table = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
        if "partial_rotary_factor" in fields:
            table["partial_rotary_factor"] = fields.pop("partial_rotary_factor")
        kinds = list(self.layer_kinds)  # not all readers know `full_attention_interval`
        # The padding that the published code has by default is no token of a small vocabulary.
        return fields | {"layer_types": kinds, "rope_parameters": table, "pad_token_id": None}


def _with_positions(cls: type[HybridArchitecture], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with rope_theta and partial_rotary_factor from where they stand.

    rope_theta: null is a value, no positions, for the family that has such models.
    Raises ModelConfigError where two places differ, or one asks for other positions.
    """
    read = [name for name in ("rope_theta", "partial_rotary_factor") if name in kinds_of(cls)]
    stated = [("", name, fields[name]) for name in read if name in fields]
    for place in _TABLES:
        table = fields.get(place)
        if table is not None and not isinstance(table, Mapping):
            raise refusal(cls.model_type, place, "an object or null", table)
        stated += [(f"{place}.", name, value) for name, value in (table or {}).items()]
    found: dict[str, Any] = {}
    for place, name, value in stated:
        if name in read:
            if value is None and not (place and name == "rope_theta"):
                continue
            if name in found and found[name] != value:
                allowed = f"{short(found[name])}, as it is elsewhere"
                raise refusal(cls.model_type, place + name, allowed, value)
            found[name] = value
        elif name in _OF_IMAGES:
            continue
        elif value is not None and (isinstance(value, bool) or value != _NEUTRAL.get(name)):
            allowed = f"{_NEUTRAL.get(name, 'absent')}: other positions are not supported"
            raise refusal(cls.model_type, place + short(name).strip("'"), allowed, value)
    if "rope_theta" not in found and "rope_theta" in fields and not fields.get(_TABLES[0]):
        found["rope_theta"] = fields["rope_theta"]  # null
    if found.get("rope_theta", 0) is None and not cls.may_lack_positions:
        raise refusal(cls.model_type, "rope_theta", "a number", None)
    return {name: value for name, value in fields.items() if name not in read} | found


@dataclasses.dataclass(frozen=True)
class QwenTextConfig(HybridArchitecture):
    """Qwen 3.5 and its dense successors: gated attention between layers of the delta rule."""

    model_type: ClassVar[str] = "qwen3_5_text"
    architecture: ClassVar[str] = "Qwen3_5ForCausalLM"
    norm_offset: ClassVar[float] = 1.0

    vocab_size: Annotated[int, Range(1, 2**24)] = 248320
    hidden_size: Width = 4096
    intermediate_size: Width = 12288
    num_hidden_layers: Annotated[int, Range(1, 2**10)] = 32
    num_attention_heads: Width = 16
    num_key_value_heads: Width = 4
    head_dim: Width = 256
    rope_theta: Theta = 10000.0
    partial_rotary_factor: Annotated[float, Range(1e-3, 1)] = 0.25
    full_attention_interval: Annotated[int, Range(1, 2**10)] = 4
    linear_key_head_dim: Width = 128
    linear_value_head_dim: Width = 128
    linear_num_key_heads: Width = 16
    linear_num_value_heads: Width = 32
    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None

    def __post_init__(self):
        super().__post_init__()
        even = self._rotary_dim % 2 == 0 and self._rotary_dim > 0
        self._require(even, "partial_rotary_factor", "such that an even part of a head is turned")

    @property
    def _rotary_dim(self) -> int:
        return int(self.attention_head_dim * self.partial_rotary_factor)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer; without `layer_types` one of some is full attention."""
        return self.layer_types or self._default_kinds(self.full_attention_interval)

    @property
    def linear(self) -> QwenDeltaConfig:
        """The layers of the delta rule."""
        return QwenDeltaConfig(
            hidden_size=self.hidden_size,
            num_heads=self.linear_num_key_heads,
            num_value_heads=self.linear_num_value_heads,
            key_dim=self.linear_key_head_dim,
            value_dim=self.linear_value_head_dim,
            conv_size=self.linear_conv_kernel_dim,
            norm_eps=self.rms_norm_eps,
        )

    @property
    def attention(self) -> AttentionConfig:
        """The full-attention layers."""
        return dataclasses.replace(
            super().attention,
            rotary_dim=self._rotary_dim,
            qk_norm="head",
            zero_centred=True,
            gated=True,
        )


@dataclasses.dataclass(frozen=True)
class QwenConfig(QwenTextConfig):
    """Qwen 3.5 as its folders are published: the text model's fields under `text_config`."""

    model_type: ClassVar[str] = "qwen3_5"
    architecture: ClassVar[str] = "Qwen3_5ForConditionalGeneration"

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> Architecture:
        """See `model_config`. What is not in `text_config` is of the images, but for the head."""
        return super().from_hf(text_fields(fields))

    def to_hf(self) -> dict[str, Any]:
        """See `Architecture`."""
        text = super().to_hf()
        names = {name: text.pop(name) for name in ("model_type", "architectures")}
        text["model_type"] = QwenTextConfig.model_type
        return names | {"text_config": text, "tie_word_embeddings": self.tie_word_embeddings}


def text_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the text model of a nested config.json; those of a flat one as they are.

    Raises ModelConfigError where they are those of another model.
    """
    text = fields.get("text_config")
    if text is None:
        return dict(fields)
    if not isinstance(text, Mapping):
        raise refusal("qwen3_5", "text_config", "an object", text)
    inner = text.get("model_type")
    if inner not in (None, QwenTextConfig.model_type):
        allowed = f"{QwenTextConfig.model_type}: no other text model is supported"
        raise refusal("qwen3_5", "text_config.model_type", allowed, inner)
    shared = ("tie_word_embeddings", "quantization_config", "compression_config")
    outer = {name: fields[name] for name in shared if fields.get(name) is not None}
    return {**text, **outer}


@dataclasses.dataclass(frozen=True)
class OlmoHybridConfig(HybridArchitecture):
    """Olmo Hybrid: attention layers with norms behind mixer and MLP, positions or none."""

    model_type: ClassVar[str] = "olmo_hybrid"
    architecture: ClassVar[str] = "OlmoHybridForCausalLM"
    may_lack_positions: ClassVar[bool] = True

    vocab_size: Annotated[int, Range(1, 2**24)] = 100352
    hidden_size: Width = 3840
    num_hidden_layers: Annotated[int, Range(1, 2**10)] = 32
    num_attention_heads: Width = 30
    linear_num_key_heads: Width | None = None
    linear_num_value_heads: Width | None = None
    linear_key_head_dim: Width | None = None
    linear_value_head_dim: Width | None = None
    linear_allow_neg_eigval: bool = True
    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = 100257

    def __post_init__(self):
        super().__post_init__()
        even = self.rope_theta is None or self.attention_head_dim % 2 == 0
        self._require(even, "num_attention_heads", "such that heads are even")

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer; without `layer_types` the last of few layers is attention."""
        if self.layer_types is not None:
            return self.layer_types
        kinds = self._default_kinds(_EVERY)
        return kinds if FULL in kinds else (*kinds[:-1], FULL)

    def is_post_norm(self, kind: str | None) -> bool:
        """See `Architecture`."""
        return kind == FULL

    @property
    def linear(self) -> OlmoDeltaConfig:
        """The layers of the delta rule; the output's norm has an epsilon of its own."""
        key_heads = self.linear_num_key_heads or self.num_attention_heads
        key_dim = self.linear_key_head_dim or max(1, int(0.75 * self.hidden_size / key_heads))
        return OlmoDeltaConfig(
            hidden_size=self.hidden_size,
            num_heads=key_heads,
            num_value_heads=self.linear_num_value_heads or self.num_attention_heads,
            key_dim=key_dim,
            value_dim=self.linear_value_head_dim or 2 * key_dim,
            conv_size=self.linear_conv_kernel_dim,
            norm_eps=1e-5,
            allow_neg_eigval=self.linear_allow_neg_eigval,
        )

    @property
    def attention(self) -> AttentionConfig:
        """The full-attention layers."""
        return dataclasses.replace(super().attention, qk_norm="width")


def refuse_experts(model_type: Any) -> None:
    """Say of mixtures of experts that these are what is not supported.

    Raises ModelConfigError.
    """
    if isinstance(model_type, str) and "_moe" in model_type:
        raise ModelConfigError(
            f"model_type={short(model_type)}: mixtures of experts are not supported; the dense "
            "models of the family are."
        )
