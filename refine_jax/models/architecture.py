"""What the configurations of all models share: fields with a type and a range, and messages.

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

CHUNK = 64  # tokens
WIDEST = 2**20
"""The most rows or columns of a weight that is no embedding. No size can then overflow."""
_MOST_IDS = 1024


class Range(NamedTuple):
    """The numbers that a field may hold, both ends included."""

    low: float
    high: float


Width = Annotated[int, Range(1, WIDEST)]
Tokens = Annotated[int, Range(1, 2**24)]
Ratio = Annotated[float, Range(1e-3, 1e3)]
TokenId = Annotated[int, Range(-1, 2**31 - 1)]
TokenIds = TokenId | tuple[TokenId, ...] | None
"""One token, several of which each does, or none."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What all model families share.

    Raises ModelConfigError, which names the field, for a value of another type or out of range.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    unsupported: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "quantization_config": (None, "quantized weights"),
        "compression_config": (None, "compressed weights"),
    }
    """Fields that ask for another function: the one value that does not, and what they ask for."""
    norm_offset: ClassVar[float] = 0.0
    """What the norms of blocks and the final one add to their weights."""

    vocab_size: Annotated[int, Range(1, 2**24)] = 32000
    hidden_size: Width = 2048
    num_hidden_layers: Annotated[int, Range(1, 2**10)] = 24
    hidden_act: Literal["swish", "silu"] = "swish"
    tie_word_embeddings: bool = False
    initializer_range: Annotated[float, Range(0, 1e3)] = 0.02
    bos_token_id: TokenIds = 1
    eos_token_id: TokenIds = 2

    def __post_init__(self):
        for name, kind in kinds_of(type(self)).items():
            value = getattr(self, name)
            self._require(fits(value, kind), name, in_words(kind))
            if isinstance(value, list):  # configurations are hashed
                object.__setattr__(self, name, tuple(value))

    def _require(self, ok: bool, name: str, allowed: str) -> None:
        if not ok:
            raise refusal(self.model_type, name, allowed, getattr(self, name))

    def _require_width(self, name: str, width: int, what: str) -> None:
        """Refuse a field that makes a layer too wide, or empty."""
        allowed = f"such that {what} has a width from 1 to {WIDEST}, not {width}"
        self._require(1 <= width <= WIDEST, name, allowed)

    @property
    def layer_kinds(self) -> tuple[str, ...] | None:
        """The kind of each layer, by which parameters are stacked; None: all are of one kind."""
        return None

    def layer_config(self, kind: str | None) -> Any:
        """What the mixer of layers of that kind reads: the configuration, or a part of it."""
        del kind
        return self

    def is_post_norm(self, kind: str | None) -> bool:
        """Whether the norms of layers of that kind stand behind mixer and MLP, not before them."""
        del kind
        return False

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
                raise refusal(cls.model_type, name, allowed, value)
        kinds = kinds_of(cls)
        return cls(
            **{
                name: value
                for name, value in fields.items()
                if name in kinds and (value is not None or fits(None, kinds[name]))
            }
        )


Eps = Annotated[float, Range(1e-30, 1)]


@dataclasses.dataclass(frozen=True)
class FlaArchitecture(Architecture):
    """What the families of the published fast-weight code share.

    `intermediate_size=None` means `256 * ceil(floor(hidden_size * hidden_ratio * 2/3) / 256)`.
    """

    hidden_ratio: Ratio = 4
    intermediate_size: Width | None = None
    norm_eps: Eps = 1e-6

    def __post_init__(self):
        super().__post_init__()
        self._require_width("hidden_ratio", self.mlp_size, "the MLP")

    @property
    def mlp_size(self) -> int:
        """Width of the MLP's hidden layer."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 256 * math.ceil(int(self.hidden_size * self.hidden_ratio * 2 / 3) / 256)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> Architecture:
        """See `Architecture.from_hf`."""
        older = fields.get("rms_norm_eps")
        if fields.get("norm_eps") is None and older not in (None, cls.norm_eps):
            allowed = f"called norm_eps, which the published code reads, or be {cls.norm_eps}"
            raise refusal(cls.model_type, "rms_norm_eps", allowed, older)
        return super().from_hf(fields)


def refusal(model_type: str, name: str, allowed: str, value: Any) -> ModelConfigError:
    """The error for a field `name` of a config.json that may only be `allowed`."""
    last = name.rpartition(".")[2]
    return ModelConfigError(f"{model_type}: {name} must be {allowed}. Got: {last}={short(value)}.")


@functools.cache
def kinds_of(family: type[Architecture]) -> dict[str, Any]:
    """What each field of a family may be: its annotation."""
    hints = typing.get_type_hints(family, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(family)}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation says; true and false are no numbers."""
    form, parts = typing.get_origin(kind), typing.get_args(kind)
    if form in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if form is Annotated:
        number, limits = parts
        accepted = int if number is int else (int, float)
        is_number = isinstance(value, accepted) and not isinstance(value, bool)
        return is_number and limits.low <= value <= limits.high
    if form is Literal:
        return isinstance(value, str) and value in parts
    if form is tuple:
        is_list = isinstance(value, (list, tuple)) and len(value) <= _MOST_IDS
        return is_list and all(fits(each, parts[0]) for each in value)
    return isinstance(value, kind)  # bool, or the type of None


def in_words(kind: Any) -> str:
    """What an annotation allows, for a message."""
    form, parts = typing.get_origin(kind), typing.get_args(kind)
    if form in (typing.Union, types.UnionType):
        return " or ".join(in_words(part) for part in parts)
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
