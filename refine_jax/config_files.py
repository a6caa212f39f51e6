"""Configuration files, and settings as flags: --config=FILE, --config.SECTION.FIELD=VALUE.

What is wrong with either is a ConfigError.
"""

import contextlib
import dataclasses
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import traceback
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from refine_jax.base.errors import ConfigError, UserError
from refine_jax.base.files import local_path, parse_object, short
from refine_jax.config import SECTIONS, defaults
from refine_jax.presets import PRESETS, GivenFields
from refine_jax.settings import check_names, inner_type

_SWITCHES = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def short_name(name: str) -> str:
    """Write the name of a flag for a message, cut where it is long."""
    return short(name)[1:-1]


def kind_of_setting(name: str) -> Any:
    """Find the type of a flag --config.SECTION.FIELD; None for other names.

    Fields of `config.model.fresh` depend on the model: str stands for theirs, which
    `override` knows.

    Raises ConfigError: there is no such section or field.
    """
    prefix, _, rest = name.partition(".")
    if prefix != "config" or not rest:
        return None
    if rest == "phase":
        return str
    section, _, field = rest.partition(".")
    check_names([section], ["phase", *SECTIONS], "config")
    if not field:
        raise ConfigError(f"--{name}: config.{section} holds fields; name one of them.")
    field, _, inner = field.partition(".")
    check_names([field], _fields(SECTIONS[section]), f"config.{section}")
    if inner and (section, field) != ("model", "fresh"):
        raise ConfigError(f"--{short_name(name)}: config.{section}.{field} has no fields.")
    return str if inner else inner_type(typing.get_type_hints(SECTIONS[section])[field])


def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def override(values: ConfigDict, given: Mapping[str, str | bool]) -> None:
    """Set the settings that flags name (`kind_of_setting`), in the order of the flags.

    A field of `model.fresh` is one of the family that `model_type` names, whether or not the
    configuration sets it.

    Raises ConfigError: a value that is none of its type; a field that the family has not.
    """
    # The family decides which fields there are.
    order = sorted(given, key=lambda name: name != "config.model.fresh.model_type")
    order.sort(key=lambda name: name != "config.model.fresh")
    # Set a preset before the values beside it, which win over it. It counts as a flag for each of
    # its values, so that it wins over the file.
    order.sort(key=lambda name: name != "config.refine.preset")
    for name in order:
        section, _, field = name.removeprefix("config.").partition(".")
        if section == "phase":
            values.phase = given[name]
            continue
        field, _, inner = field.partition(".")
        if inner:
            fresh = values.model.fresh
            hint = _fresh_hint(fresh, inner)
            _put(fresh, inner, parsed(given[name], hint, name))
        else:
            hint = typing.get_type_hints(SECTIONS[section])[field]
            value = parsed(given[name], hint, name)
            _put(values[section], field, value)
            if (section, field) == ("refine", "preset"):
                for preset_field, preset_value in PRESETS.get(value, {}).items():
                    _put(values.refine, preset_field, preset_value)


def _put(section: ConfigDict, name: str, value: Any) -> None:
    # The file may have set a whole number where any is allowed.
    with section.unlocked(), section.ignore_type():
        section[name] = value


def _fresh_hint(fresh: ConfigDict, name: str) -> Any:
    """Find the type of a field of a fresh model."""
    from refine_jax.models.config import family_of

    if name == "model_type":
        return str
    if "model_type" not in fresh:
        raise ConfigError(
            f"--config.model.fresh.{short_name(name)}: which fields a fresh model has depends on "
            "its family: set --config.model.fresh.model_type, too."
        )
    family = family_of(fresh["model_type"])
    check_names(
        [name], ["model_type", *_fields(family)], f"config.model.fresh ({family.model_type})"
    )
    return typing.get_type_hints(family)[name]


def parsed(text: str | bool, hint: Any, name: str) -> Any:
    """Parse the value that the flag `name` gives a field of this type; raises ConfigError."""
    kind = inner_type(hint)
    optional = kind is not hint
    if isinstance(text, bool):
        if kind is not bool:
            raise ConfigError(f"--{name} needs a value: --{name}=VALUE.")
        return text
    if optional and text in ("None", "none"):
        return None
    words = {bool: "true or false", int: "a whole number", float: "a number"}
    try:
        if kind is bool:
            return _SWITCHES[text.lower()]
        if kind is int:
            return int(text, 0) if text[:2].lower() == "0x" else int(text)
        if kind is float:
            return float(text)
    except (ValueError, KeyError):
        none = " or None" if optional else ""
        raise ConfigError(f"--{name}={short_name(text)} must be {words[kind]}{none}.") from None
    if kind is str or typing.get_origin(kind) is typing.Literal:
        return text
    if kind in (Mapping, dict):
        return ConfigDict(parse_object(text, f"--{name}", ConfigError))
    raise ConfigError(f"--{name} cannot be set by a flag: set it in the configuration file.")


def load_config(name: str) -> ConfigDict:
    """Load the configuration of a file `FILE` or `FILE:FORM`, completed with defaults.

    Raises ConfigError: there is no such file, or it makes no configuration; the message says where.
    """
    text, _, form = name.partition(":")
    path = local_path(name if form.startswith("/") else text, "--config")
    if path.is_dir():
        raise ConfigError(f"--config must name a file. {text!r} is a folder.")
    if not path.exists():
        raise ConfigError(f"There is no configuration file {text!r}.")
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(
            "--config must name a Python file that defines get_config(), as configs/demo.py does. "
            f"Got: {text!r}."
        )
    # What a configuration file prints is no output of the command.
    with contextlib.redirect_stdout(sys.stderr):
        values = _call(str(path), text, [form] if form else [])
    if not isinstance(values, ConfigDict):
        got = "None: is a return missing?" if values is None else f"{type(values).__name__}."
        raise ConfigError(
            f"get_config() of {text} must return the ConfigDict that refine_jax.config.defaults() "
            f"makes. Got: {got}"
        )
    return _complete(values, text)


def _call(path: str, shown: str, arguments: list[str]) -> Any:
    """Call get_config() of a file and return what it makes."""
    try:
        loader = importlib.machinery.SourceFileLoader("config_file", path)
        module = importlib.util.module_from_spec(
            importlib.util.spec_from_loader("config_file", loader)
        )
        sys.modules["config_file"] = module  # dataclasses look themselves up there
        loader.exec_module(module)
        function = getattr(module, "get_config", None)
        if not callable(function):
            raise ConfigError(f"The configuration file {shown} defines no function get_config().")
        _check_form(function, shown, arguments)
        return function(*arguments)
    except UserError:
        raise
    except SyntaxError as error:
        place = f", line {error.lineno}" if error.filename == path and error.lineno else ""
        raise ConfigError(
            f"The configuration file {shown}{place} is not valid Python: {error.msg}."
        ) from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        place = f" in line {lines[-1]}" if lines else ""
        text = error
        while isinstance(text, AttributeError | KeyError) and len(text.args) == 1:
            (text,) = text.args  # the text itself, not its repr
        # ml_collections lists all values of a section that lacks a field.
        text = re.sub(r"Other fields present: .*?(?=Did you mean|$)", "", str(text), flags=re.S)
        said = " ".join(text.split())
        said = said if len(said) <= 500 else f"{said[:500]} ..."
        message = f"{type(error).__name__}: {said}" if said else type(error).__name__
        raise ConfigError(f"The configuration file {shown} failed{place}: {message}") from error


def _check_form(function: Callable, shown: str, arguments: list[str]) -> None:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        got = f"{shown}:{arguments[0]}" if arguments else shown
        wanted = "takes no form" if arguments else "needs a form, FILE:FORM"
        raise ConfigError(
            f"The configuration file {shown} {wanted}. Got: --config={got}."
        ) from None


def _complete(values: ConfigDict, shown: str) -> ConfigDict:
    """Complete a configuration with defaults for sections and fields that it does not have."""
    given = set(values.get("refine") or ())
    for name, default in defaults().items():
        with values.unlocked():
            if name not in values:
                values[name] = default
            elif isinstance(default, ConfigDict):
                if not isinstance(values[name], ConfigDict):
                    got = short(values[name])
                    raise ConfigError(f"{shown}: config.{name} must hold fields. Got: {got}.")
                for field, value in default.items():
                    if field not in values[name] or (
                        isinstance(value, ConfigDict) and values[name][field] is None
                    ):
                        _put(values[name], field, value)
    if not isinstance(values.refine, GivenFields):
        with values.unlocked(), values.ignore_type():
            values.refine = GivenFields(values.refine, given)
    return values
