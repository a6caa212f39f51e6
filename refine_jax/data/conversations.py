"""Conversations as tokens, of which the assistant's are trained on.

    tokens, answers = encode_conversation(tokenizer, template, messages)
    # answers [(start, end), ...]: the tokens of each answer, with the one that ends it

The text is that of the checkpoint's chat template. An answer begins where the template begins one
to be generated, so that training and generation have the same context, and ends behind the first
end token after it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from refine_jax.base.errors import DataError
from refine_jax.base.files import clean_text, short
from refine_jax.data.chat import (
    ChatTemplate,
    Message,
    load_chat_template,
    mark_special_tokens,
    tokens_of_marked,
)
from refine_jax.data.formats import files_of
from refine_jax.data.records import Records
from refine_jax.data.references import plain_value
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.sections import DataConfig

_BEGIN, _END = "\ufdd1", "\ufdd2"  # around an answer; Unicode keeps these for use within programs
_MARKS = re.compile(f"[{_BEGIN}{_END}]")
# Templates drop what an answer of an earlier turn reasoned, up to here.
_ANSWER = re.compile(r"(?P<before>(?:.*</think>)?\s*)(?P<text>.*?)(?P<behind>\s*)", re.DOTALL)


def read_messages(value: Any, where: Callable[[], str]) -> list[Message]:
    """Return the messages that a field of a data set holds; none for null.

    A message is an object with a text `role` and a text `content`, and what else a template reads.
    Messages behind the last answer are left out: nothing follows them.

    where: names the field and the row for an error.

    Raises DataError: a value of another form.
    """
    value = plain_value(value)
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(
            f"{where()} must be a list of messages, each with role and content. "
            f"Got: {type(value).__name__}, {short(value)}."
        )
    messages = [_message(plain_value(each), number, where) for number, each in enumerate(value, 1)]
    last = max((i for i, each in enumerate(messages) if _is_answer(each)), default=-1)
    return messages[: last + 1]


def _message(value: Any, number: int, where: Callable[[], str]) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(
            f"message {number} of {where()} must be an object with role and content. "
            f"Got: {type(value).__name__}, {short(value)}."
        )
    for name in ("role", "content"):
        got = plain_value(value.get(name))
        calls = name == "content" and got is None and value.get("tool_calls") is not None
        if not isinstance(got, str) and not calls:
            raise DataError(
                f"{name} of message {number} of {where()} must be a text. "
                f"Got: {type(got).__name__}, {short(got)}, in a message of {short([*value])}."
            )
    texts = {name: clean_text(value[name] or "") for name in ("role", "content")}
    return {**value, **texts}


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant"


def encode_conversation(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return the ids [T] int32 of messages, the last of which is an answer of the assistant.

    Also returns where its answers stand, (start, end) each. The row ends with the last one.

    Raises DataError: the template refuses the messages, changes what the assistant said, or ends
    no answer by an end token of the tokenizer.
    """
    messages = mark_special_tokens(tokenizer, messages)
    text = template.render(messages)
    places = _answers_in(template, messages, text)
    names = {index: token for token, index in tokenizer.special_tokens.items()}
    ends = [names[index] for index in tokenizer.end_ids if index in names]
    find_end = re.compile("|".join(map(re.escape, ends)) or "(?!)")
    pieces, at = [], 0
    nexts = [start for start, _ in places[1:]] + [len(text)]
    for number, ((start, end), limit) in enumerate(zip(places, nexts, strict=True), 1):
        found = find_end.search(text, end, limit)
        if found is None:
            raise DataError(
                f"{template.where} must end each answer by an end token, "
                f"{' or '.join(ends) or 'of which the tokenizer has none with a text'}. "
                f"Got: {short(text[end:limit])} behind answer {number}."
            )
        pieces += [text[at:start], text[start : found.end()]]
        at = found.end()
    ids = tokens_of_marked(tokenizer, pieces)
    stops = np.cumsum([len(each) for each in ids]).tolist()
    answers = [(stops[i - 1], stops[i]) for i in range(1, len(stops), 2)]
    return np.concatenate(ids), answers


def _answers_in(
    template: ChatTemplate, messages: Sequence[Message], text: str
) -> list[tuple[int, int]]:
    """Find the assistant's answers in the text of messages: start and end of each."""
    marked = template.render([_marked(each) if _is_answer(each) else each for each in messages])
    count = sum(map(_is_answer, messages))
    plain = _MARKS.sub("", marked)
    if plain != text or _MARKS.findall(marked) != [_BEGIN, _END] * count:
        raise DataError(
            f"{template.where} must show each answer of the assistant once and as it is, to tell "
            f"its tokens from others. Got: {short(plain if plain != text else marked)}."
        )
    places = [match.start() - number for number, match in enumerate(_MARKS.finditer(marked))]
    spans = list(zip(places[::2], places[1::2], strict=True))
    numbers = (number for number, each in enumerate(messages) if _is_answer(each))
    for index, number in enumerate(numbers):
        # Where the model would begin, so that it also learns what it must write before the answer.
        asked = template.render(messages[:number], add_generation_prompt=True)
        start, end = spans[index]
        if text.startswith(asked) and len(asked) <= start:
            spans[index] = len(asked), end
    return spans


def _marked(message: Message) -> Message:
    """Put marks around what an answer says, inside of the space that templates strip."""
    parts = _ANSWER.fullmatch(message["content"])
    text = f"{parts['before']}{_BEGIN}{parts['text']}{_END}{parts['behind']}"
    return {**message, "content": text}


class Conversation(NamedTuple):
    """A record as tokens: ids [T] int32; where its answers stand, (start, end) each; the last one.

    Without an answer there are no ids.
    """

    ids: np.ndarray
    answers: list[tuple[int, int]]
    last: str


class Conversations:
    """Conversations of parquet or JSON files, with the chat template that lies by the tokenizer.

    Attributes:
        fingerprint: changes when the files do.
    """

    def __init__(self, options: DataConfig, field: str, tokenizer: Tokenizer) -> None:
        """Open the files, whose records have messages in `field`.

        Raises DataError: they are missing, broken or lack the field; there is no template.
        """
        self._template, self._tokenizer = load_chat_template(tokenizer), tokenizer
        setting = options.setting
        files, _ = files_of(options.source, options.files, setting("source"), setting("files"))
        self._records = Records(files, {field: "prompts.messages_field"})
        self._field, self.fingerprint = field, self._records.fingerprint

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Conversation:
        """Return a record; raises DataError, with its place, if it is none that can be rendered."""

        def where() -> str:
            return f"{self._field!r} in {self._records.place(index)}"

        messages = read_messages(self._records[index][self._field], where)
        if not messages or not messages[-1]["content"].strip():
            return Conversation(np.empty(0, np.int32), [], "")
        try:
            ids, answers = encode_conversation(self._tokenizer, self._template, messages)
        except DataError as error:
            raise DataError(f"{where()}: {error}") from None
        return Conversation(ids, answers, messages[-1]["content"])
