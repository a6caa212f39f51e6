"""Configurations of hybrid models: delta-rule layers with full-attention layers between them.

A model's `layer_kinds` names the kind of each layer. Layers of one kind have one mixer, which reads
an `AttentionConfig` or a `DeltaLayerConfig`, and their parameters are stacked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from refine_jax.base.errors import ModelConfigError
from refine_jax.base.files import short
from refine_jax.models.architecture import (
    CHUNK,
    Architecture,
    Eps,
    Range,
    TokenIds,
    Tokens,
    Width,
    fits,
    in_words,
    kinds_of,
    refusal,
)

LINEAR, FULL = "linear_attention", "full_attention"
LayerType = Literal["linear_attention", "full_attention"]
Theta = Annotated[float, Range(1, 1e30)]
_TAPS = Annotated[int, Range(1, 1024)]
_EVERY = 4  # layers, of which the last is full attention where a config.json names none

_TABLES = ("rope_parameters", "rope_scaling")
_NEUTRAL = {"rope_type": "default", "type": "default", "factor": 1}
"""Fields about positions, and the values that ask for what we compute."""
_OF_IMAGES = {"mrope_section", "mrope_interleaved"}
"""Positions of text are equal in all sections: these fields then change nothing."""


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


@dataclasses.dataclass(frozen=True)
class HybridArchitecture(Architecture):
    """What the published hybrid families share."""

    unsupported: ClassVar[Mapping[str, tuple[Any, str]]] = Architecture.unsupported | {
        "num_experts": (None, "mixtures of experts"),
        "use_sliding_window": (False, "sliding windows"),
        "sliding_window": (None, "sliding windows"),
    }
    renamed: ClassVar[tuple[str, ...]] = ()
    """Fields of a config.json that are read and are no fields here."""

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
        """The full-attention layers."""
        raise NotImplementedError

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
        table = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
        if "partial_rotary_factor" in fields:
            table["partial_rotary_factor"] = fields.pop("partial_rotary_factor")
        kinds = list(self.layer_kinds)  # not all readers know `full_attention_interval`
        return fields | {"layer_types": kinds, "rope_parameters": table}


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
    may_lack_positions: ClassVar[bool] = False
    norm_offset: ClassVar[float] = 1.0

    vocab_size: Annotated[int, Range(1, 2**24)] = 248320
    hidden_size: Width = 4096
    intermediate_size: Width = 12288
    num_hidden_layers: Annotated[int, Range(1, 2**10)] = 32
    num_attention_heads: Width = 16
    num_key_value_heads: Width | None = 4
    head_dim: Width | None = 256
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
        return AttentionConfig(
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.attention_head_dim,
            rope_theta=self.rope_theta,
            rotary_dim=self._rotary_dim,
            qkv_bias=self.attention_bias,
            out_bias=self.attention_bias,
            qk_norm="head",
            norm_eps=self.rms_norm_eps,
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
        return AttentionConfig(
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.attention_head_dim,
            rope_theta=self.rope_theta,
            rotary_dim=self.attention_head_dim,
            qkv_bias=self.attention_bias,
            out_bias=self.attention_bias,
            qk_norm="width",
            norm_eps=self.rms_norm_eps,
        )


def refuse_experts(model_type: Any) -> None:
    """Say of mixtures of experts that these are what is not supported.

    Raises ModelConfigError.
    """
    if isinstance(model_type, str) and "_moe" in model_type:
        raise ModelConfigError(
            f"model_type={short(model_type)}: mixtures of experts are not supported; the dense "
            "models of the family are."
        )
