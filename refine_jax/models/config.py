"""Model configurations, with the field names of the published `config.json` files.

What a field may be stands in its annotation. Every configuration is checked against the annotations
when it is made, whether a `config.json`, the settings of a run or a program names the values.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from refine_jax.base.errors import ModelConfigError
from refine_jax.base.files import short

_CHUNK = 64  # tokens
_WIDEST = 2**20
"""The most rows or columns of a weight that is no embedding. No size can then overflow."""
_MOST_IDS = 1024


class Range(NamedTuple):
    """The numbers that a field may hold, both ends included."""

    low: float
    high: float


Width = Annotated[int, Range(1, _WIDEST)]
Tokens = Annotated[int, Range(1, 2**24)]
Ratio = Annotated[float, Range(1e-3, 1e3)]
TokenId = Annotated[int, Range(-1, 2**31 - 1)]
TokenIds = TokenId | tuple[TokenId, ...] | None
"""One token, several of which each does, or none."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the three model families share.

    `intermediate_size=None` means `256 * ceil(floor(hidden_size * hidden_ratio * 2/3) / 256)`.
    Raises ModelConfigError, which names the field, for a value of another type or out of range.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    unsupported: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "quantization_config": (None, "quantized weights"),
        "compression_config": (None, "compressed weights"),
    }
    """Fields that ask for another function: the one value that does not, and what they ask for."""

    vocab_size: Annotated[int, Range(1, 2**24)] = 32000
    hidden_size: Width = 2048
    num_hidden_layers: Annotated[int, Range(1, 2**10)] = 24
    hidden_ratio: Ratio = 4
    intermediate_size: Width | None = None
    hidden_act: Literal["swish", "silu"] = "swish"
    norm_eps: Annotated[float, Range(1e-30, 1)] = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: Annotated[float, Range(0, 1e3)] = 0.02
    bos_token_id: TokenIds = 1
    eos_token_id: TokenIds = 2

    def __post_init__(self):
        for name, kind in _kinds(type(self)).items():
            value = getattr(self, name)
            self._require(_fits(value, kind), name, _in_words(kind))
            if isinstance(value, list):  # configurations are hashed
                object.__setattr__(self, name, tuple(value))
        self._require_width("hidden_ratio", self.mlp_size, "the MLP")

    def _require(self, ok: bool, name: str, allowed: str) -> None:
        if not ok:
            raise _refusal(self.model_type, name, allowed, getattr(self, name))

    def _require_width(self, name: str, width: int, what: str) -> None:
        """Refuse a field that makes a layer too wide, or empty."""
        allowed = f"such that {what} has a width from 1 to {_WIDEST}, not {width}"
        self._require(1 <= width <= _WIDEST, name, allowed)

    @property
    def mlp_size(self) -> int:
        """Width of the MLP's hidden layer."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 256 * math.ceil(int(self.hidden_size * self.hidden_ratio * 2 / 3) / 256)

    def to_hf(self) -> dict[str, Any]:
        """Fields for a `config.json` that the published PyTorch code reads."""
        names = {"model_type": self.model_type, "architectures": [self.architecture]}
        return names | dataclasses.asdict(self)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> Architecture:
        """The configuration that the fields of a `config.json` describe; see `model_config`."""
        for name, (neutral, what) in cls.unsupported.items():
            value = fields.get(name)
            if value is not None and value is not neutral:
                allowed = "null" if neutral is None else str(neutral).lower()
                allowed += f": {what} are not supported"
                raise _refusal(cls.model_type, name, allowed, value)
        older = fields.get("rms_norm_eps")
        if fields.get("norm_eps") is None and older not in (None, cls.norm_eps):
            allowed = f"called norm_eps, which the published code reads, or be {cls.norm_eps}"
            raise _refusal(cls.model_type, "rms_norm_eps", allowed, older)
        kinds = _kinds(cls)
        return cls(
            **{
                name: value
                for name, value in fields.items()
                if name in kinds and (value is not None or _fits(None, kinds[name]))
            }
        )


@dataclasses.dataclass(frozen=True)
class LaCTConfig(Architecture):
    """LaCT: window attention plus chunk-wise SwiGLU fast weights (golden README, section 5)."""

    model_type: ClassVar[str] = "lact_swiglu"
    architecture: ClassVar[str] = "LaCTForCausalLM"

    num_attn_heads: Width = 32
    num_lact_heads: Width = 4
    inter_multi: Ratio = 1
    lact_chunk_size: Tokens = 2048
    window_size: Tokens = 2048
    qkv_bias: bool = False
    attn_qk_norm: bool = False
    qkv_silu: bool = True
    no_v_silu: bool = False
    lr_dim: Width = 1
    lr_parameterization: Literal["mamba"] = "mamba"
    use_muon: bool = False
    # The reference always runs Newton-Schulz in bfloat16; float32 is offered for exactness.
    muon_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    use_momentum: bool = True
    learnable_ttt_scale: bool = True
    ttt_loss_type: Literal["dot_product"] = "dot_product"
    ttt_prenorm: bool = False
    ttt_nope: bool = False
    w0_w2_low_rank: Annotated[int, Range(-1, _WIDEST)] = -1
    fw_init_gain: Annotated[float, Range(0, 1e3)] = 0.5
    rope_theta: Annotated[float, Range(1, 1e30)] = 10000.0
    use_fused_kernel: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_attn_heads", "num_lact_heads"):
            divides = self.hidden_size % getattr(self, name) == 0
            self._require(divides, name, f"a divisor of hidden_size={self.hidden_size}")
        self._require(self.attn_head_dim % 2 == 0, "num_attn_heads", "such that heads are even")
        self._require_width("inter_multi", self.fast_hidden, "a fast weight")
        rate_widths = (1,) if self.use_fused_kernel else (1, self.lact_head_dim)
        self._require(self.lr_dim in rate_widths, "lr_dim", f"one of {rate_widths}")
        self._require_width("lr_dim", 3 * self.num_lact_heads * self.lr_dim, "lr_proj")
        if self.lr_dim > 1 and self.fast_hidden != self.lact_head_dim:
            raise ModelConfigError(
                "lact_swiglu: lr_dim > 1 gives one rate a channel of both the key and the hidden, "
                f"which then have one size. Got: lr_dim={self.lr_dim}, "
                f"inter_multi={self.inter_multi}."
            )

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> Architecture:
        """See `model_config`. Positions may stand under rope_theta, or where Transformers 5 does.

        The published code takes `window_size: null` for attention to all earlier tokens, which is
        not supported.
        """
        if "window_size" in fields and fields["window_size"] is None:
            allowed = "a number: attention to all earlier tokens is not supported"
            raise _refusal(cls.model_type, "window_size", allowed, None)
        return super().from_hf(_with_rope_theta(cls.model_type, fields))

    @property
    def attn_head_dim(self) -> int:
        """Width of an attention head; rope is applied in blocks of this width."""
        return self.hidden_size // self.num_attn_heads

    @property
    def lact_head_dim(self) -> int:
        """Key and value width d of a fast-weight head."""
        return self.hidden_size // self.num_lact_heads

    @property
    def fast_hidden(self) -> int:
        """Hidden width F of the fast weights."""
        return int(self.lact_head_dim * self.inter_multi)

    @property
    def token_multiple(self) -> int:
        """Devices that share the tokens of a row each hold a multiple of so many."""
        return self.lact_chunk_size


@dataclasses.dataclass(frozen=True)
class _DeltaFamilyConfig(Architecture):
    """Fields that DeltaNet and Gated DeltaNet share."""

    # Most are of older versions of the published code, which today's ignores.
    unsupported: ClassVar[Mapping[str, tuple[Any, str]]] = Architecture.unsupported | {
        "attn": (None, "hybrid attention layers"),
        "attnres_block_size": (None, "attention residuals"),
        "conv_bias": (False, "biases of the short convolutions"),
        "share_conv_kernel": (False, "convolutions that q, k and v share"),
        "norm_first": (False, "norms inside of the attention layer"),
        "use_rope": (False, "rotary positions"),
    }

    num_heads: Width = 16
    expand_v: Ratio = 1.0
    use_gate: bool = False
    use_short_conv: bool = True
    conv_size: Annotated[int, Range(1, 1024)] = 4
    allow_neg_eigval: bool = False

    @property
    def token_multiple(self) -> int:
        """N: a forward pass keeps the state before every N-th token.

        Saved states then take no more memory than float32 values would. Devices that share the
        tokens of a row each hold a multiple of so many.
        """
        return _CHUNK * -(-self.key_dim // _CHUNK)


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(_DeltaFamilyConfig):
    """DeltaNet (golden README, section 6)."""

    model_type: ClassVar[str] = "delta_net"
    architecture: ClassVar[str] = "DeltaNetForCausalLM"

    expand_k: Ratio = 1.0
    use_beta: bool = True
    qk_norm: Literal["l2", "sum"] = "l2"
    qk_activation: Literal["silu", "relu", "elu", "identity"] = "silu"

    def __post_init__(self):
        super().__post_init__()
        for name in ("expand_k", "expand_v"):
            width = int(self.hidden_size * getattr(self, name))
            self._require_width(name, width, "its projection")
            even = width % self.num_heads == 0
            self._require(even, name, f"such that num_heads={self.num_heads} divides {width}")

    @property
    def key_dim(self) -> int:
        """Key width K of a head."""
        return int(self.hidden_size * self.expand_k) // self.num_heads

    @property
    def value_dim(self) -> int:
        """Value width V of a head."""
        return int(self.hidden_size * self.expand_v) // self.num_heads

    @property
    def num_value_heads(self) -> int:
        """Heads of v; as many as of q and k."""
        return self.num_heads


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig(_DeltaFamilyConfig):
    """Gated DeltaNet (golden README, section 6)."""

    model_type: ClassVar[str] = "gated_deltanet"
    architecture: ClassVar[str] = "GatedDeltaNetForCausalLM"
    unsupported: ClassVar[Mapping[str, tuple[Any, str]]] = _DeltaFamilyConfig.unsupported | {
        "use_mamba_gate": (True, "other gates than Mamba's"),
        "use_residual": (False, "residual connections by attn.D"),
    }

    num_hidden_layers: Annotated[int, Range(1, 2**10)] = 21
    num_heads: Width = 6
    expand_v: Ratio = 2.0
    use_gate: bool = True
    head_dim: Width = 256
    num_v_heads: Width | None = None

    def __post_init__(self):
        super().__post_init__()
        groups = self.num_value_heads % self.num_heads == 0
        self._require(groups, "num_v_heads", f"a multiple of num_heads={self.num_heads}")
        whole = float(self.head_dim * self.expand_v).is_integer()
        self._require(whole, "expand_v", f"such that head_dim={self.head_dim} times it is whole")
        self._require_width("head_dim", self.num_heads * self.key_dim, "q_proj")
        self._require_width("expand_v", self.num_value_heads * self.value_dim, "v_proj")

    @property
    def key_dim(self) -> int:
        """Key width K of a head."""
        return self.head_dim

    @property
    def value_dim(self) -> int:
        """Value width V of a head."""
        return int(self.head_dim * self.expand_v)

    @property
    def num_value_heads(self) -> int:
        """Heads of v."""
        return self.num_heads if self.num_v_heads is None else self.num_v_heads


_FAMILIES = {c.model_type: c for c in (LaCTConfig, DeltaNetConfig, GatedDeltaNetConfig)}


def model_config(fields: Mapping[str, Any]) -> Architecture:
    """The configuration that a `config.json` (as a dict) describes.

    null is a family's default, where the published code gives it no meaning of its own. Fields that
    do not change the function are left out, as the published code does; `unused_fields` names them.

    Raises ModelConfigError, which names the field, for an unknown `model_type`, a value of another
    type or out of range, and whatever asks for a function that is not supported.
    """
    return family_of(fields.get("model_type")).from_hf(fields)


def unused_fields(fields: Mapping[str, Any]) -> list[str]:
    """Names of fields of a `config.json` that say something and are not read, in order.

    Those that are known to change no function, such as `use_cache`, are not among them.
    """
    family = family_of(fields.get("model_type"))
    read = _kinds(family).keys() | family.unsupported.keys()
    if "rope_theta" in read:
        read |= {*_POSITION_TABLES, *_POSITIONS}
    return [
        name
        for name, value in fields.items()
        if value is not None
        and name not in read
        and name not in _HARMLESS
        and not name.startswith("fuse_")
    ]


def family_of(model_type: Any) -> type[Architecture]:
    """The family of that name, whose fields are those of its `config.json`.

    Raises:
      ModelConfigError: There is none.
    """
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise ModelConfigError(
            f"model_type must be one of {sorted(_FAMILIES)}. Got: model_type={short(model_type)}."
        )
    return _FAMILIES[model_type]


# fmt: off
_HARMLESS = frozenset((
    "model_type", "architectures", "auto_map", "_name_or_path", "transformers_version", "dtype",
    "torch_dtype", "max_position_embeddings", "pad_token_id", "use_cache", "attn_mode",
    "use_output_norm", "use_l2warp", "elementwise_affine", "last_layer_fuse_norm", "fp32_states",
    "attention_bias", "rms_norm_eps",
))
# fmt: on
"""Fields of published files that do not change the function."""

_POSITION_TABLES = ("rope_parameters", "rope_scaling")
_POSITIONS = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1, "factor": 1}
"""Fields about positions besides rope_theta, and the values that ask for what we compute."""


def _with_rope_theta(model_type: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with rope_theta from where it stands: alone, or in a table of positions.

    Raises ModelConfigError where two places differ, or one asks for other positions.
    """
    stated = [("", name, fields.get(name)) for name in ("rope_theta", "partial_rotary_factor")]
    stated = [entry for entry in stated if entry[2] is not None]
    for place in _POSITION_TABLES:
        table = fields.get(place)
        if table is not None and not isinstance(table, Mapping):
            raise _refusal(model_type, place, "an object or null", table)
        stated += [(f"{place}.", name, value) for name, value in (table or {}).items()]
    theta = None
    for place, name, value in stated:
        if name == "rope_theta":
            if value is None or (theta is not None and value != theta):
                allowed = "a number" if theta is None else f"{short(theta)}, as it is elsewhere"
                raise _refusal(model_type, place + name, allowed, value)
            theta = value
        elif value is not None and (isinstance(value, bool) or value != _POSITIONS.get(name)):
            allowed = f"{_POSITIONS.get(name, 'absent')}: other positions are not supported"
            raise _refusal(model_type, place + short(name).strip("'"), allowed, value)
    return {**fields, "rope_theta": theta}


def _refusal(model_type: str, name: str, allowed: str, value: Any) -> ModelConfigError:
    last = name.rpartition(".")[2]
    return ModelConfigError(f"{model_type}: {name} must be {allowed}. Got: {last}={short(value)}.")


@functools.cache
def _kinds(family: type[Architecture]) -> dict[str, Any]:
    """What each field of a family may be: its annotation."""
    hints = typing.get_type_hints(family, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(family)}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation says; true and false are no numbers."""
    form, parts = typing.get_origin(kind), typing.get_args(kind)
    if form in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if form is Annotated:
        number, limits = parts
        accepted = int if number is int else (int, float)
        is_number = isinstance(value, accepted) and not isinstance(value, bool)
        return is_number and limits.low <= value <= limits.high
    if form is Literal:
        return isinstance(value, str) and value in parts
    if form is tuple:
        is_list = isinstance(value, (list, tuple)) and len(value) <= _MOST_IDS
        return is_list and all(_fits(each, parts[0]) for each in value)
    return isinstance(value, kind)  # bool, or the type of None


def _in_words(kind: Any) -> str:
    """What an annotation allows, for a message."""
    form, parts = typing.get_origin(kind), typing.get_args(kind)
    if form in (typing.Union, types.UnionType):
        return " or ".join(_in_words(part) for part in parts)
    if form is Annotated:
        number, limits = parts
        if number is int:
            return f"a whole number from {limits.low} to {limits.high}"
        return f"a number from {limits.low:g} to {limits.high:g}"
    if form is Literal:
        return " or ".join(repr(part) for part in parts)
    if form is tuple:
        return f"a list of at most {_MOST_IDS} of them"
    return "true or false" if kind is bool else "null"
