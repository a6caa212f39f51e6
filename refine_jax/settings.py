"""What settings are made of: fields with a meaning and what they allow, checked when set."""

import dataclasses
import difflib
import math
import numbers
import os
import types
import typing
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, ClassVar

from ml_collections import ConfigDict

from refine_jax.base.errors import ConfigError, UserError
from refine_jax.base.files import local_path, short

# Upper ends of settings: far above what any machine runs, and low enough that nothing overflows.
MOST_STEPS = 2**31 - 1
"""Of what int32 counters count: steps of training, updates."""
MOST_ROWS = 2**20
"""Of what is in memory at once: rows of a batch, prompts, devices."""
MOST_TOKENS = 2**26
"""Of a row, a prompt or an answer."""
MOST_ITEMS = 2**40
"""Of what is counted and not kept: documents, examples."""
MOST_AT_ONCE = 2**32
"""Tokens of all rows of a batch together; as 4 bytes each, 16 GiB."""
MOST_MATCHED = 64
"""Of a window whose probabilities are computed at every position of a row."""
MOST_WORKERS = 256
LAST_SEED = 2**32 - 1
LEAST = 1e-6
"""Of what others are divided by, so that float32 keeps the quotients."""


def setting(
    default, doc: str, *, choices=None, low=None, high=None, above=None, path: bool = False
):
    """A field with its meaning and what it allows: `low` <= x <= `high`, x > `above`.

    path: it may name a file or folder: `~` is expanded, URLs are refused.
    """
    allowed = {"doc": doc, "choices": choices, "low": low, "high": high, "above": above}
    return dataclasses.field(default=default, metadata=allowed | {"path": path})


class Section:
    """One part of the configuration: checks each field against its type and what it allows."""

    section: ClassVar[str] = ""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            path = f"config.{self.section}.{field.name}"
            value = getattr(self, field.name)
            if field.metadata["path"]:
                value = expanded(value, path, empty=field.default == "")
            value = _converted(value, hints[field.name], path)
            _check_allowed(value, field.metadata, path)
            object.__setattr__(self, field.name, value)


def expanded(
    value: Any, setting: str, *, empty: bool = True, error: type[UserError] = ConfigError
) -> Any:
    """A setting that may be a path, with `~` expanded; all else is the text that was given.

    empty: whether "" is allowed. Raises `error` for a URL.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or (not value and empty):
        return value
    # tfds:NAME may name a folder, too; NAME itself has no slash at its start.
    kind, name = ("tfds:", value[5:]) if value.startswith("tfds:") else ("", value)
    path = local_path(name, setting, error)
    return f"{kind}{path}" if name.startswith("~") else value


def expand_flags(values: MutableMapping[str, Any], *names: str) -> None:
    """Expand `~` in the flags of a command that may be paths; raises ConfigError for URLs."""
    for name in names:
        values[name] = expanded(values[name], f"--{name}", empty=False)


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
        raise ConfigError(f"{path} must be {names[kind]}{none}. Got: {short(value)}.")
    if kind is Mapping:
        return _json_object(value, path)
    try:
        value = kind(value)
    except OverflowError:  # a whole number beyond all floats
        raise ConfigError(f"{path} must be finite. Got: {short(value)}.") from None
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{path} must be finite. Got: {value!r}.")
    return value + 0.0 if kind is float else value  # no negative zero


def _json_object(value: Mapping, path: str) -> dict[str, Any]:
    """Fields as JSON values, numbers of numpy as Python's; raises ConfigError for others."""
    fields = {}
    for name, each in value.items():
        where = f"{path}.{name}"
        if not isinstance(name, str):
            raise ConfigError(f"{path}: names of fields must be strings. Got: {short(name)}.")
        if isinstance(each, Mapping):
            each = _json_object(each, where)
        elif isinstance(each, list | tuple):
            each = list(_json_object({str(n): x for n, x in enumerate(each)}, where).values())
        elif isinstance(each, numbers.Integral) and not isinstance(each, bool):
            each = int(each)
        elif isinstance(each, numbers.Real) and not isinstance(each, int):
            each = _converted(each, float, where)
        elif not (each is None or isinstance(each, str | bool)):
            raise ConfigError(f"{where} must be a JSON value. Got: {short(each)}.")
        fields[name] = each
    return fields


def _check_allowed(value, allowed: Mapping, path: str) -> None:
    if value is None:
        return
    choices = allowed["choices"]
    if choices and value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise ConfigError(
            f"{path} must be one of {names}. Got: {short(value)}.{suggestion(value, choices)}"
        )
    for key, holds, words in (
        ("low", lambda bound: value >= bound, "at least"),
        ("high", lambda bound: value <= bound, "at most"),
        ("above", lambda bound: value > bound, "more than"),
    ):
        bound = allowed[key]
        if bound is not None and not holds(bound):
            limit = f"{bound:,}" if isinstance(bound, int) and bound > 9999 else bound
            raise ConfigError(f"{path} must be {words} {limit}. Got: {short(value)}.")
