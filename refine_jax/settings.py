"""What settings are made of: fields with a meaning and what they allow, checked when set."""

import dataclasses
import difflib
import functools
import math
import numbers
import operator
import os
import typing
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar

from ml_collections import ConfigDict

from refine_jax.base.errors import ConfigError
from refine_jax.base.files import given_path, local_path, short
from refine_jax.base.hub import is_hub, model_repository

MOST_ROWS = 2**20
MOST_TOKENS = 2**26
MOST_AT_ONCE = 2**32
"""Tokens of all rows of a batch together; as 4 bytes each, 16 GiB."""
MOST_MATCHED = 64
"""Of a window whose probabilities are computed at every position of a row."""
LEAST = 1e-6
"""Of what others are divided by, so that float32 keeps the quotients."""


def setting(default: Any, doc: str, *properties: Mapping[str, Any]) -> Any:
    """A field with its meaning and its properties, which are those below."""
    none = dict.fromkeys(("choices", "low", "high", "above", "path", "documents_only"))
    metadata = functools.reduce(operator.or_, properties, {"doc": doc, "change": BY_NAME} | none)
    return dataclasses.field(default=default, metadata=metadata)


def choice(choices: Sequence[str], doc: str, *properties: Mapping[str, Any]) -> Any:
    """A `setting` that is one of these texts, by default the first."""
    return setting(choices[0], doc, one_of(*choices), *properties)


def one_of(*choices: str) -> dict[str, Any]:
    """It is one of these texts."""
    return {"choices": choices}


def between(low: float, high: float) -> dict[str, Any]:
    """It is at least `low` and at most `high`."""
    return {"low": low, "high": high}


def above(bound: float, high: float) -> dict[str, Any]:
    """It is more than `bound` and at most `high`."""
    return {"above": bound, "high": high}


def never(reason: str) -> dict[str, Any]:
    """A run that is continued cannot change it, for this reason (`refine_jax.phases.changes`)."""
    return {"change": reason}


# Ends far above what any machine runs, and low enough that nothing overflows.
DEVICES = between(-1, MOST_ROWS)
ROWS = between(1, MOST_ROWS)
"""Of what is in memory at once: rows of a batch, prompts."""
TOKENS = between(1, MOST_TOKENS)
"""Of a row, a prompt or an answer."""
STEPS = between(1, 2**31 - 1)
"""Of what int32 counters count: steps of training, updates."""
COUNT = between(0, 2**31 - 1)
ITEMS = between(1, 2**40)
"""Of what is counted and not kept: documents, examples."""
SEEDS = between(0, 2**32 - 1)
WEIGHTS = between(0, 1e6)
PATH = {"path": "read"}
"""It may name a file or folder: on a disk, where `~` is expanded, or a URL of a store."""
DISK_PATH = {"path": "disk"}
"""It may name a file or folder of a disk alone."""
MODEL_PATH = {"path": "model"}
"""It may name a model: on a disk, in a bucket or on the Hugging Face hub."""
WRITTEN_PATH = {"path": "written"}
"""It may name a folder to write to: on a disk or in a bucket."""
DOCUMENTS = {"documents_only": True}
"""How documents become rows; prompts do so in another way, so that post-training refuses it."""
BY_NAME = "by name"
"""A run that is continued changes it where --allow_change names it."""
FREELY = {"change": "freely"}
"""Does not change what a run computes."""
CONTENT = {"change": "with the same content"}
"""The fingerprint of the training data, made of documents and tokenizer, says what changed."""


class Section:
    """One part of the configuration: checks each field against its type and what it allows."""

    prefix: ClassVar[str]
    """What messages say before the name of a field."""

    def __init_subclass__(cls):
        if "prefix" not in vars(cls):
            cls.prefix = f"config.{cls.__name__.removesuffix('Config').lower()}."

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            path = self.prefix + field.name
            value = getattr(self, field.name)
            if field.metadata["path"]:
                value = expanded(value, path, field.metadata["path"], empty=field.default == "")
            value = _converted(value, hints[field.name], path)
            _check_allowed(value, field.metadata, path)
            object.__setattr__(self, field.name, value)

    def setting(self, name: str) -> str:
        """What a user sets a field with, for messages about what it names."""
        return self.prefix.removeprefix("config.") + name


@functools.cache
def flags_of(section: type[Section]) -> type[Section]:
    """The section of a command that takes fields as flags: its messages name --FIELD."""
    return type(section.__name__, (section,), {"prefix": "--"})


def expanded(value: Any, setting: str, kind: str = "read", *, empty: bool = True) -> Any:
    """A setting that may be a path, with `~` expanded; all else is the text that was given.

    kind: of the paths, "read", "disk", "model" or "written" (`PATH` and what follows it). empty:
    whether "" is allowed. Raises ConfigError: it cannot be such a path, or this installation lacks
    what its URL needs.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or (not value and empty):
        return value
    if kind == "model" and is_hub(value):
        return str(model_repository(value, setting, ConfigError))
    # tfds:NAME may name a folder, too; NAME itself has no slash at its start.
    before, name = ("tfds:", value[5:]) if value.startswith("tfds:") else ("", value)
    if before or kind == "disk":
        path = local_path(name, setting)
    else:
        path = given_path(name, setting, write=kind != "read")
    return f"{before}{path}" if name.startswith("~") else value


def expand_flags(values: MutableMapping[str, Any], *names: str) -> None:
    """Expand `~` in the flags of a command that may be paths; raises ConfigError as `expanded`."""
    for name in names:
        kind = {"checkpoint": "model", "output": "written", "out": "written"}.get(name, "read")
        values[name] = expanded(values[name], f"--{name}", kind, empty=False)


def table(sections: Mapping[str, type[Section]]) -> list[str]:
    """A row of Markdown for each field of the sections: its name, its default, its meaning."""
    rows = []
    for name, section in sections.items():
        for field in dataclasses.fields(section):
            number = isinstance(field.default, float)
            default = f"{field.default:g}" if number else repr(field.default)
            meaning = field.metadata["doc"]
            if field.metadata["choices"]:
                choices = ", ".join(f"`{choice}`" for choice in field.metadata["choices"])
                meaning += f"; one of {choices}"
            rows.append(f"| `{name}.{field.name}` | `{default}` | {meaning} |")
    return rows


def listed(text: str) -> list[str]:
    """The texts between the commas of a setting, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def inner_type(hint: Any) -> Any:
    """The type of a field that may be None, too."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0] if kinds and type(None) in typing.get_args(hint) else hint


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
    kind = inner_type(hint)
    if value is None and kind is not hint:
        return None
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
        none = " or None" if kind is not hint else ""
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
    for name, field in value.items():
        where = f"{path}.{name}"
        if not isinstance(name, str):
            raise ConfigError(f"{path}: names of fields must be strings. Got: {short(name)}.")
        if isinstance(field, Mapping):
            field = _json_object(field, where)
        elif isinstance(field, list | tuple):
            field = list(_json_object({str(n): x for n, x in enumerate(field)}, where).values())
        elif isinstance(field, numbers.Integral) and not isinstance(field, bool):
            field = int(field)
        elif isinstance(field, numbers.Real) and not isinstance(field, int):
            field = _converted(field, float, where)
        elif not (field is None or isinstance(field, str | bool)):
            raise ConfigError(f"{where} must be a JSON value. Got: {short(field)}.")
        fields[name] = field
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
