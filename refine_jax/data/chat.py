"""Chat templates: messages to the tokens of a prompt.

    tokenizer = load_tokenizer("checkpoints/qwen3.5-0.8b")
    template = load_chat_template(tokenizer)
    messages = [{"role": "user", "content": "Who is Ahab?"}]
    ids = encode_chat(tokenizer, template, messages, add_generation_prompt=True)

Templates are programs that others wrote: they run in the sandbox of Jinja, which shows them no
attribute of Python and lets them change nothing. Texts are those of `apply_chat_template` of the
package `transformers`.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from refine_jax.base.errors import DataError
from refine_jax.base.files import decode_text, kind_of, read_json, short
from refine_jax.data.tokenizer import Tokenizer, encode_continuations
from refine_jax.data.tokenizer_files import CHAT, CONFIG, read_bytes

Message = Mapping[str, Any]

_CUT = "\ufdd0"  # marks a place in a text
_MARKS = re.compile("[\ufdd0-\ufddf]")  # Unicode keeps these characters for use within programs


class ChatTemplate:
    """A Jinja template that renders messages as one text.

    Attributes:
        where: what holds the template, for messages.
    """

    def __init__(self, source: str, where: str, tokens: Mapping[str, str]) -> None:
        """Compile `source`. tokens: {"bos_token": text, "eos_token": text}, those that there are.

        Raises DataError: it is no Jinja template.
        """
        self.where, self._tokens = where, dict(tokens)
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise DataError(
                f"{where} is no chat template: line {error.lineno}: {_line(error)}"
            ) from None
        except Exception as error:  # such as Python's, of what is nested too deeply
            raise DataError(f"{where} is no chat template: {_line(error)}") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Render messages, each with a role and content, as one text.

        A field that is None counts as absent. add_generation_prompt: end with what begins an
        answer. Raises DataError: the template refuses the messages, fails, or asks for what the
        sandbox forbids.
        """
        given = [{k: v for k, v in message.items() if v is not None} for message in messages]
        try:
            return self._template.render(
                messages=given,
                add_generation_prompt=add_generation_prompt,
                tools=None,  # some templates ask whether they are none, not whether there are any
                documents=None,
                **self._tokens,
            )
        except _Refused as error:
            raise DataError(f"{self.where} refuses the messages: {_line(error)}") from None
        except Exception as error:
            raise DataError(f"{self.where} fails on the messages: {_line(error)}") from None


def load_chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """Load the chat template that lies beside a tokenizer.

    It is chat_template.jinja, else `chat_template` of tokenizer_config.json: a string, or a list of
    named ones, of which it is "default".

    Raises DataError: there is none, or it is damaged.
    """
    files = tokenizer.files
    if CHAT in files:
        where = str(files[CHAT])
        source = decode_text(read_bytes(files[CHAT]), where, DataError)
    else:
        where = f"{files.get(CONFIG)}: chat_template"
        fields = read_json(files[CONFIG], DataError) if CONFIG in files else {}
        source = _default(fields.get("chat_template"), where)
    if source is None:
        raise DataError(
            f"the tokenizer {tokenizer.name} has no chat template. Put a {CHAT} beside its files, "
            "or give prompts as texts."
        )
    texts = {index: text for text, index in tokenizer.special_tokens.items()}
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return ChatTemplate(source, where, {k: texts[i] for k, i in ends.items() if i in texts})


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
) -> np.ndarray:
    """Return the ids [T] int32 of messages as the template renders them; bos is the template's.

    Special tokens that the template writes are such. Those that messages spell are text: nobody
    ends a turn, or begins another one, by what it says.

    Raises DataError: see `ChatTemplate.render`.
    """
    marked = mark_special_tokens(tokenizer, messages)
    text = template.render(marked, add_generation_prompt=add_generation_prompt)
    return tokens_of_marked(tokenizer, [text])[0]


def mark_special_tokens(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[Message]:
    """Mark a place within each special token that the texts of messages spell.

    What a template makes of them is for `tokens_of_marked`. Characters that mark places here, which
    no text needs, are left out.
    """
    return _cut_tokens(messages, _spelling(tuple(tokenizer.special_tokens)))


def tokens_of_marked(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the ids [T] int32 of each part of a text whose messages are marked."""
    parts = [text.split(_CUT) for text in texts]
    first, *rest = (piece for pieces in parts for piece in pieces)
    ids = iter(
        [tokenizer.encode_special(first), *encode_continuations(tokenizer, rest, special=True)]
    )
    return [np.concatenate([next(ids) for _ in pieces]) for pieces in parts]


def _cut_tokens(value: Any, spelling: re.Pattern) -> Any:
    """Mark a place within each special token in the texts of messages."""
    if isinstance(value, str):
        return spelling.sub(rf"\g<0>{_CUT}", _MARKS.sub("", value))
    if isinstance(value, Mapping):
        return {key: _cut_tokens(each, spelling) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_cut_tokens(each, spelling) for each in value]
    return value


@functools.lru_cache(maxsize=8)
def _spelling(tokens: tuple[str, ...]) -> re.Pattern:
    """Match the first character of each token in a text, of tokens that overlap too."""
    anywhere = "|".join(map(re.escape, tokens)) or "(?!)"
    return re.compile(f"(?={anywhere}).", re.DOTALL)


def _default(value: Any, where: str) -> str | None:
    """Choose the template of a field: its text, or that of its entry "default"."""
    if value is None or isinstance(value, str):
        return value
    try:
        named = {entry["name"]: entry["template"] for entry in value}
        is_text = all(isinstance(text, str) for text in (*named, *named.values()))
    except (TypeError, KeyError):
        is_text = False
    if not is_text:
        raise DataError(
            f"{where} must be a template, or a list of them with name and template. "
            f"Got: {kind_of(value)}, {short(value)}."
        )
    if "default" not in named:
        raise DataError(f"{where} must have a template named default. Got: {short([*named])}.")
    return named["default"]


class _Refused(TemplateError):
    """What a template raises by itself."""


class _Generation(Extension):
    """`{% generation %}`, around what training counts of an answer, changes no text."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _to_json
    made.globals.update(raise_exception=_refuse, strftime_now=_format_now)
    return made


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as it is: Jinja's own filter writes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: Any) -> None:
    raise _Refused(str(message))


def _format_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _line(error: Exception) -> str:
    """Put what an error says on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text:.300}".rstrip(".") + "."
