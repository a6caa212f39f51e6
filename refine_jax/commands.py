"""Commands: their flags, their page of help, and how they end.

    command = Command("refine_jax.convert", __doc__, "SRC DST")
    command.group("what is written")
    command.flag("dtype", "cast the parameters", choices=("float32", "bfloat16"))
    return command.run(work, arguments)            # of `main`: parse, work(options), the exit code

Every command is made this way, so that all take flags, print help and fail alike.
"""

import dataclasses
import importlib
import inspect
import itertools
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from refine_jax.base.errors import ConfigError, allow_interrupts, complain, run_command
from refine_jax.base.files import short
from refine_jax.config_files import kind_of_setting, parsed, short_name
from refine_jax.settings import inner_type, suggestion

_HELP = ("help", "h", "helpshort", "helpfull")
_EXAMPLES = "\nExamples:\n"  # where a docstring turns from what a command does to how it is called
_MORE = " ..."  # after the name of words of which there may be several
_MARGIN = 30  # columns of a page's names of flags

Options = types.SimpleNamespace
"""What a command line says: each flag and word by its name, `settings`, and the names `given`."""


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of a command.

    kind: the type that its text becomes: of fields of a configuration, `list` of texts between
      commas, or a function of the text that raises ValueError with what is expected.
    every: each time that it is given counts; the values are a list.
    without: the name of a flag that it cannot stand beside.
    """

    name: str
    help: str
    kind: Any = str
    default: Any = None
    metavar: str = ""
    choices: tuple[str, ...] = ()
    needed: bool = False
    every: bool = False
    without: str = ""

    def read(self, text: str | bool) -> Any:
        """Read the value that a text stands for, or a switch without one (True or False)."""
        if self.choices and text not in self.choices:
            raise ConfigError(
                f"--{self.name}={short_name(text)} must be one of {'|'.join(self.choices)}."
                f"{suggestion(text, self.choices)}"
            )
        if self.kind is list:
            return [word for word in map(str.strip, text.split(",")) if word]
        if inspect.isfunction(self.kind):
            try:
                return self.kind(text)
            except ValueError as error:
                raise ConfigError(f"--{self.name}: {error}.") from None
        return parsed(text, self.kind, self.name)

    def lines(self, width: int) -> list[str]:
        """Write the flag's lines of a page."""
        kinds = {int: "N", float: "X", list: "A,B"}
        if self.kind is bool:
            name = f"  --[no]{self.name}" if self.default else f"  --{self.name}"
        else:
            value = self.metavar or "|".join(self.choices)
            name = f"  --{self.name}={value or kinds.get(inner_type(self.kind), 'TEXT')}"
        text, default = self.help, self.default
        if isinstance(default, list):
            default = ",".join(default)
        if default not in (None, "") and self.kind is not bool:
            text += f" (default {default})"
        lines = textwrap.wrap(text, width - _MARGIN)
        first = [name] if len(name) > _MARGIN - 2 else [name.ljust(_MARGIN) + lines.pop(0)]
        return first + [" " * _MARGIN + line for line in lines]


class Command:
    """A command: its words and flags, its page of help, and how it ends.

    Flags are `--name=value` or `--name value`; switches are `--name`, `--noname` or `--name=true`.
    A flag has its whole name. `--flagfile=FILE` stands for the flags in a file, a line each.

    module: what `python -m` runs.
    doc: the docstring: what the command does, then `Examples:`.
    usage: what is needed, for the first line of the page.
    words: {name: meaning} of what is given without a flag, all of it needed. A last name that ends
    with " ..." stands for one or more; its value is a list.
    settings: whether the settings of a run are flags, too: --config.SECTION.FIELD=VALUE.
    """

    def __init__(
        self,
        module: str,
        doc: str,
        usage: str,
        *,
        words: Mapping[str, str] = types.MappingProxyType({}),
        settings: bool = False,
    ):
        self.flags: dict[str, Flag] = {}
        self._module, self._doc, self._usage = module, doc.strip(), usage
        self._words, self._settings = words, settings
        self._groups: dict[str, list[Flag]] = {}

    def group(self, title: str) -> None:
        """Begin a group of flags on the page."""
        self._groups[title] = []

    def flag(self, name: str, help: str, kind: Any = str, **options: Any) -> None:
        """Add a `Flag` to the last group."""
        self.flags[name] = Flag(name, help, kind, **options)
        self._groups[next(reversed(self._groups))].append(self.flags[name])

    def fields(
        self, section: type, *names: str, help: Mapping[str, str] | None = None, **defaults: Any
    ) -> None:
        """Add the flags --FIELD=VALUE for fields of a section of the configuration.

        help, defaults: what differs from the fields' own; a list stands for texts with commas.
        """
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            if field.name in names:
                text = (help or {}).get(field.name, field.metadata["doc"].replace("`", ""))
                default = defaults.get(field.name, field.default)
                kind = list if isinstance(default, list) else hints[field.name]
                choices = field.metadata["choices"] or ()
                self.flag(field.name, text, kind, default=default, choices=choices)

    def parse(self, arguments: Sequence[str] | None = None) -> Options:
        """Read a command line, None: that of the process; for --help print the page and exit.

        `notes` of the options say what the user should know, such as flags that are given twice.

        Raises ConfigError: a flag is unknown, has no value or a wrong one; something is missing.
        """
        left = _with_flag_files(sys.argv[1:] if arguments is None else arguments)
        words: list[Any] = []
        several = any(name.endswith(_MORE) for name in self._words)
        given: dict[str, list[str | bool]] = {}
        while left:
            word = left.pop(0)
            if _is_flag(word):
                name, text = self._next(word, left)
                given.setdefault(name, []).append(text)
            elif len(words) < len(self._words) or several:
                words.append(word)
            elif self._words:
                raise ConfigError(
                    f"More is given than the command takes: {short(word)}. --help says what."
                )
            else:
                raise ConfigError(f"Arguments must be flags, --name=value. Got: {short(word)}.")
        for name, meaning in list(self._words.items())[len(words) :]:
            raise ConfigError(f"{name.removesuffix(_MORE)} is needed: {meaning}.")
        if several:
            words[len(self._words) - 1 :] = [words[len(self._words) - 1 :]]
        names = (name.removesuffix(_MORE).lower() for name in self._words)
        options = Options(**dict(zip(names, words, strict=True)))
        options.given = given.keys()
        options.notes = []
        for name, flag in self.flags.items():
            value = flag.default
            if name in given:
                value = self._value(flag, given)
            elif inspect.isfunction(flag.kind) and value is not None:
                value = flag.read(value)
            elif flag.needed:
                raise ConfigError(f"--{name} is needed: {flag.help}.")
            setattr(options, name, value)
        options.settings = {name: given[name][-1] for name in given if name not in self.flags}
        for name, texts in given.items():
            flag = self.flags.get(name)
            if flag is not None and (flag.every or flag.kind is list):
                continue  # each time counts
            for before, after in itertools.pairwise(texts):
                if before != after:
                    twice = f"{short(before)} and {short(after)}"
                    options.notes.append(f"--{name} is given twice, {twice}: the last one counts.")
        return options

    def _value(self, flag: Flag, given: Mapping[str, list[str | bool]]) -> Any:
        texts = given[flag.name]
        if flag.without in given:
            raise ConfigError(f"--{flag.name} cannot stand beside --{flag.without}.")
        if flag.every:
            return [flag.read(text) for text in texts]
        return flag.read(",".join(texts) if flag.kind is list else texts[-1])

    def _kind(self, name: str) -> Any:
        if name in self.flags:
            return self.flags[name].kind
        return kind_of_setting(name) if self._settings else None

    def _next(self, word: str, left: list[str]) -> tuple[str, str | bool]:
        """Split the flag `word` into name and value, which may be the first of what is `left`."""
        name, sign, value = word.lstrip("-").partition("=")
        kind = self._kind(name)
        if kind is bool:
            return name, value if sign else True
        if kind is None and not sign and name[:2] == "no" and self._kind(name[2:]) is bool:
            return name[2:], False
        if kind is None and name in _HELP:
            print(self.page(), flush=True)
            raise SystemExit(0)
        if kind is None:
            near = suggestion(f"--{name}", [f"--{known}" for known in self.flags])
            raise ConfigError(
                f"There is no flag {short_name(f'--{name}')}.{near} --help lists the flags."
            )
        if not sign:
            if not left or (left[0].startswith("--") and _is_flag(left[0])):
                raise ConfigError(f"--{name} needs a value: --{name}=VALUE.")
            value = left.pop(0)
        return name, value

    def page(self) -> str:
        """Write the page of help: what the command does, its flags, examples."""
        program = f"python -m {self._module}"
        about, _, examples = self._doc.partition(_EXAMPLES)
        width = max(60, min(shutil.get_terminal_size().columns, 100))
        called = sys.argv[0] if sys.argv[0].startswith(FACES) else program
        lines = [f"usage: {called} {self._usage} [flags]", "", about.rstrip()]
        if self._words:
            lines += ["", *(f"  {name:{_MARGIN - 2}}{text}" for name, text in self._words.items())]
        for title, group in self._groups.items():
            lines += ["", f"{title}:", *(line for flag in group for line in flag.lines(width))]
        if examples:
            lines += [_EXAMPLES.rstrip("\n"), examples.strip("\n").replace(program, called)]
        return "\n".join(lines)

    def run(
        self,
        work: Callable[[Options], int | None],
        arguments: Sequence[str] | None = None,
        *,
        imports: Sequence[str] | None = (),
    ) -> int:
        """Parse a command line and do the work; returns the exit code (`run_command`).

        A command line that is wrong ends the process with 1. imports: modules that the work needs
        and that take long to import, so that help comes at once; Ctrl-C waits for them. None: the
        work imports by itself, and calls `allow_interrupts` then.
        """
        arguments = sys.argv[1:] if arguments is None else list(arguments)

        def whole() -> int | None:
            try:
                options = self.parse(arguments)
            except ConfigError as error:
                raise SystemExit(complain(error)) from None
            if not self._settings:  # else the configuration has notes as well
                say(options.notes)
            if imports is not None:
                for name in imports:
                    importlib.import_module(name)
                allow_interrupts()
            return work(options)

        debug = "debug" in self.flags and bool({"--debug", "--debug=true"} & {*arguments})
        return run_command(whole, debug=debug, imports=True)


FACES = ("refine-jax ", "python -m refine_jax ")
"""How the name of a program begins that `refine_jax.__main__` has found the command for."""


def say(notes: Iterable[str]) -> None:
    """Print what the user should know on standard error."""
    for text in notes:
        print(f"note: {text}", file=sys.stderr, flush=True)


def step_argument(text: str) -> int | str:
    """Parse the step of a run, as command lines take it: "latest", "best" or a number."""
    if text in ("latest", "best"):
        return text
    if not text.isdecimal():
        raise ValueError(f"expected latest, best or a number, got {short(text)}")
    return int(text)


def _with_flag_files(arguments: Sequence[str]) -> list[str]:
    from absl import flags

    try:
        return flags.FlagValues().read_flags_from_files(list(arguments), force_gnu=False)
    except flags.Error as error:
        raise ConfigError(str(error).strip()) from None


def _is_flag(word: str) -> bool:
    return word.startswith("-") and bool(word.strip("-")) and " " not in word.partition("=")[0]
