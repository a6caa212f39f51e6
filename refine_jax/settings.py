"""What settings are made of: fields with a meaning and what they allow, checked when set."""

import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from ml_collections import ConfigDict

from refine_jax.base.errors import ConfigError


def setting(default, doc: str, *, choices=None, low=None, high=None, above=None):
    """A field with its meaning and what it allows: `low` <= x <= `high`, x > `above`."""
    allowed = {"doc": doc, "choices": choices, "low": low, "high": high, "above": above}
    return dataclasses.field(default=default, metadata=allowed)


class Section:
    """One part of the configuration: checks each field against its type and what it allows."""

    section: ClassVar[str] = ""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            path = f"config.{self.section}.{field.name}"
            value = _converted(getattr(self, field.name), hints[field.name], path)
            _check_allowed(value, field.metadata, path)
            object.__setattr__(self, field.name, value)


def plain(values):
    """Nested dicts of plain values from ConfigDicts."""
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    if isinstance(values, Mapping):
        return {key: plain(value) for key, value in values.items()}
    return values


def check_names(given: Iterable[str], known: Iterable[str], path: str) -> None:
    """Raise ConfigError for a name that is not known."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ConfigError(
                f"{path} has no field {name!r}.{suggestion(name, known)} "
                f"Fields: {', '.join(known)}."
            )


def suggestion(name: Any, known: Iterable[str]) -> str:
    """' Did you mean ...?' where one of the known names is near, else an empty string."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def _converted(value, hint, path: str):
    """The value as its annotated type; integers pass as floats, nothing else is converted."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    fits = {
        bool: lambda: isinstance(value, bool),
        int: lambda: isinstance(value, numbers.Integral) and not isinstance(value, bool),
        float: lambda: isinstance(value, numbers.Real) and not isinstance(value, bool),
        str: lambda: isinstance(value, str),
        Mapping: lambda: isinstance(value, Mapping),
    }[kind]()
    if not fits:
        names = {bool: "True or False", int: "a whole number", float: "a number"}
        names |= {str: "a string", Mapping: "a dictionary"}
        none = " or None" if type(None) in kinds else ""
        raise ConfigError(f"{path} must be {names[kind]}{none}. Got: {value!r}.")
    value = dict(value) if kind is Mapping else kind(value)
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{path} must be finite. Got: {value!r}.")
    return value


def _check_allowed(value, allowed: Mapping, path: str) -> None:
    if value is None:
        return
    choices = allowed["choices"]
    if choices and value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise ConfigError(
            f"{path} must be one of {names}. Got: {value!r}.{suggestion(value, choices)}"
        )
    for key, holds, words in (
        ("low", lambda bound: value >= bound, "at least"),
        ("high", lambda bound: value <= bound, "at most"),
        ("above", lambda bound: value > bound, "more than"),
    ):
        bound = allowed[key]
        if bound is not None and not holds(bound):
            raise ConfigError(f"{path} must be {words} {bound}. Got: {value}.")
