"""Model configurations, with the field names of the published `config.json` files."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from refine_jax.base.errors import ModelConfigError

_CHUNK = 64  # tokens


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the three model families share.

    `intermediate_size=None` means `256 * ceil(floor(hidden_size * hidden_ratio * 2/3) / 256)`.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    hidden_ratio: float = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(self.hidden_act in ("swish", "silu"), "hidden_act", "'swish'")

    def _require(self, ok: bool, name: str, allowed: str) -> None:
        if not ok:
            raise ModelConfigError(
                f"{self.model_type}: {name} must be {allowed}. Got: {name}={getattr(self, name)!r}."
            )

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


@dataclasses.dataclass(frozen=True)
class LaCTConfig(ModelConfig):
    """LaCT: window attention plus chunk-wise SwiGLU fast weights (golden README, section 5)."""

    model_type: ClassVar[str] = "lact_swiglu"
    architecture: ClassVar[str] = "LaCTForCausalLM"

    num_attn_heads: int = 32
    num_lact_heads: int = 4
    inter_multi: float = 1
    lact_chunk_size: int = 2048
    window_size: int = 2048
    qkv_bias: bool = False
    attn_qk_norm: bool = False
    qkv_silu: bool = True
    no_v_silu: bool = False
    lr_dim: int = 1
    lr_parameterization: str = "mamba"
    use_muon: bool = False
    # The reference always runs Newton-Schulz in bfloat16; float32 is offered for exactness.
    muon_dtype: str = "bfloat16"
    use_momentum: bool = True
    learnable_ttt_scale: bool = True
    ttt_loss_type: str = "dot_product"
    ttt_prenorm: bool = False
    ttt_nope: bool = False
    w0_w2_low_rank: int = 32
    fw_init_gain: float = 0.5
    rope_theta: float = 10000.0
    use_fused_kernel: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_attn_heads", "num_lact_heads"):
            heads = getattr(self, name)
            divides = heads >= 1 and self.hidden_size % heads == 0
            self._require(divides, name, f"a divisor of hidden_size={self.hidden_size}")
        self._require(self.attn_head_dim % 2 == 0, "num_attn_heads", "such that heads are even")
        self._require(self.lact_chunk_size >= 1, "lact_chunk_size", "at least 1")
        self._require(self.window_size >= 1, "window_size", "at least 1")
        self._require(self.lr_parameterization == "mamba", "lr_parameterization", "'mamba'")
        self._require(self.ttt_loss_type == "dot_product", "ttt_loss_type", "'dot_product'")
        self._require(self.muon_dtype in ("bfloat16", "float32"), "muon_dtype", "a float dtype")
        rate_widths = (1,) if self.use_fused_kernel else (1, self.lact_head_dim)
        self._require(self.lr_dim in rate_widths, "lr_dim", f"one of {rate_widths}")
        if self.lr_dim > 1 and self.fast_hidden != self.lact_head_dim:
            raise ModelConfigError(
                "lact_swiglu: lr_dim > 1 gives one rate a channel of both the key and the hidden, "
                f"which then have one size. Got: lr_dim={self.lr_dim}, "
                f"inter_multi={self.inter_multi}."
            )

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
class _DeltaFamilyConfig(ModelConfig):
    """Fields that DeltaNet and Gated DeltaNet share."""

    num_heads: int = 16
    expand_v: float = 1.0
    use_gate: bool = False
    use_short_conv: bool = True
    conv_size: int = 4
    allow_neg_eigval: bool = False
    attn: dict | None = None

    def __post_init__(self):
        super().__post_init__()
        self._require(self.num_heads >= 1, "num_heads", "at least 1")
        self._require(self.conv_size >= 1, "conv_size", "at least 1")
        self._require(self.attn is None, "attn", "null: hybrid attention layers are not supported")

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

    expand_k: float = 1.0
    use_beta: bool = True
    qk_norm: str = "l2"
    qk_activation: str = "silu"

    def __post_init__(self):
        super().__post_init__()
        activations = ("silu", "relu", "elu", "identity")
        self._require(self.qk_norm in ("l2", "sum"), "qk_norm", "'l2' or 'sum'")
        self._require(self.qk_activation in activations, "qk_activation", f"one of {activations}")
        for name in ("expand_k", "expand_v"):
            width = int(self.hidden_size * getattr(self, name))
            even = width >= 1 and width % self.num_heads == 0
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

    num_heads: int = 6
    expand_v: float = 2.0
    use_gate: bool = True
    head_dim: int = 256
    num_v_heads: int | None = None

    def __post_init__(self):
        super().__post_init__()
        groups = self.num_value_heads % self.num_heads == 0
        self._require(groups, "num_v_heads", f"a multiple of num_heads={self.num_heads}")
        whole = float(self.head_dim * self.expand_v).is_integer()
        self._require(whole, "expand_v", f"such that head_dim={self.head_dim} times it is whole")

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


def family_of(model_type: Any) -> type[ModelConfig]:
    """The family of that name, whose fields are those of its `config.json`.

    Raises:
      ModelConfigError: There is none.
    """
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise ModelConfigError(
            f"model_type must be one of {sorted(_FAMILIES)}. Got: model_type={model_type!r}."
        )
    return _FAMILIES[model_type]


def model_config(fields: dict[str, Any]) -> ModelConfig:
    """The configuration that a `config.json` (as a dict) describes.

    Keys that do not change the function (`use_cache`, `torch_dtype`, kernel switches, ...) are left
    out, as the published code does. Raises ModelConfigError for an unknown `model_type` or a value
    that is not supported.
    """
    model_type = fields.get("model_type")
    family = family_of(model_type)
    known = {field.name for field in dataclasses.fields(family)}
    try:
        return family(**{k: v for k, v in fields.items() if k in known})
    except TypeError as error:
        raise ModelConfigError(f"{model_type}: a field has a value of a wrong type: {error}.")  # noqa: B904
