"""Model configurations, with the field names of the published `config.json` files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Set
from typing import Annotated, Any, ClassVar, Literal

from refine_jax.base.errors import ModelConfigError
from refine_jax.base.files import short
from refine_jax.models.architecture import (
    WIDEST,
    Architecture,
    FlaArchitecture,
    Range,
    Ratio,
    Tokens,
    Width,
    kinds_of,
    refusal,
)
from refine_jax.models.hybrid_config import (
    OlmoHybridConfig,
    QwenConfig,
    QwenTextConfig,
    refuse_experts,
)
from refine_jax.models.layer_config import (
    LINEAR,
    AttentionConfig,
    AttentionSpec,
    read_attention_specs,
    saved_every,
    spec_kinds,
    spec_of_kind,
)


@dataclasses.dataclass(frozen=True)
class LaCTConfig(FlaArchitecture):
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
    w0_w2_low_rank: Annotated[int, Range(-1, WIDEST)] = -1
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
            raise refusal(cls.model_type, "window_size", allowed, None)
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
class _DeltaFamilyConfig(FlaArchitecture):
    """Fields that DeltaNet and Gated DeltaNet share.

    attn: Attention layers that stand in the place of some of the delta rule; None: there are none.
    """

    # Most are of older versions of the published code, which today's ignores.
    unsupported: ClassVar[Mapping[str, tuple[Any, str]]] = Architecture.unsupported | {
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
    attn: tuple[AttentionSpec, ...] | None = None

    def __post_init__(self):
        sizes = self.hidden_size, self.num_hidden_layers
        specs = read_attention_specs(self.model_type, self.attn, *sizes)
        object.__setattr__(self, "attn", specs)
        super().__post_init__()

    @property
    def num_attention_heads(self) -> int:
        """What divides the query heads of all attention layers; 0 without any."""
        return math.gcd(*(spec.num_heads for spec in self.attn or ()))

    @property
    def layer_kinds(self) -> tuple[str, ...] | None:
        """The kind of each layer; None without attention layers."""
        return None if self.attn is None else spec_kinds(self.attn, self.num_hidden_layers)

    def layer_config(self, kind: str | None) -> FlaArchitecture | AttentionConfig:
        """See `Architecture`."""
        if kind in (None, LINEAR):
            return self
        return spec_of_kind(self.attn, kind).config(self.hidden_size)

    @property
    def token_multiple(self) -> int:
        """N: a forward pass keeps the state before every N-th token.

        Devices that share the tokens of a row each hold a multiple of so many.
        """
        return saved_every(self.key_dim)

    def to_hf(self) -> dict[str, Any]:
        """See `Architecture`; without attention layers there is no `attn`."""
        fields = super().to_hf()
        specs = [{**spec, "layers": list(spec["layers"])} for spec in fields.pop("attn") or ()]
        return fields | ({"attn": specs[0] if len(specs) == 1 else specs} if specs else {})


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


_FAMILIES = {
    family.model_type: family
    for family in (
        LaCTConfig,
        DeltaNetConfig,
        GatedDeltaNetConfig,
        QwenTextConfig,
        QwenConfig,
        OlmoHybridConfig,
    )
}


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
    read = kinds_of(family).keys() | family.unsupported.keys()
    if "rope_theta" in read:
        read |= {*_POSITION_TABLES, *_POSITIONS}
    inner = fields.get("text_config") if issubclass(family, QwenConfig) else None
    if inner is not None:
        named = unused_fields({**inner, "model_type": QwenTextConfig.model_type})
        read = {"text_config", "vision_config"} | _OF_IMAGES | read
        return [f"text_config.{name}" for name in named] + _unread(fields, read)
    return _unread(fields, read)


def _unread(fields: Mapping[str, Any], read: Set[str]) -> list[str]:
    return [
        name
        for name, value in fields.items()
        if value is not None
        and name not in read
        and name not in _HARMLESS
        and not name.startswith(("fuse_", "mtp_"))
    ]


def family_of(model_type: Any) -> type[Architecture]:
    """The family of that name, whose fields are those of its `config.json`.

    Raises:
      ModelConfigError: There is none.
    """
    refuse_experts(model_type)
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
    "attention_bias", "rms_norm_eps", "attention_dropout", "linear_a_log_min", "linear_a_log_max",
    "linear_dt_min", "linear_dt_max", "linear_dt_init_floor", "attn_output_gate", "mamba_ssm_dtype",
))
# fmt: on
"""Fields of published files that do not change the function."""

_OF_IMAGES = {
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "language_model_only",
}
"""Fields of nested configurations that the text model has no use for."""

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
            raise refusal(model_type, place, "an object or null", table)
        stated += [(f"{place}.", name, value) for name, value in (table or {}).items()]
    theta = None
    for place, name, value in stated:
        if name == "rope_theta":
            if value is None or (theta is not None and value != theta):
                allowed = "a number" if theta is None else f"{short(theta)}, as it is elsewhere"
                raise refusal(model_type, place + name, allowed, value)
            theta = value
        elif value is not None and (isinstance(value, bool) or value != _POSITIONS.get(name)):
            allowed = f"{_POSITIONS.get(name, 'absent')}: other positions are not supported"
            raise refusal(model_type, place + short(name).strip("'"), allowed, value)
    return {**fields, "rope_theta": theta}
