"""Prompts and reference answers in the forms that data sets have, and their values as JSON.

    read_references(42, where)                                            # ("42",)
    read_references([["fox", "the fox"]], where)                          # ("fox", "the fox")
    read_references({"text": ["a", "b"], "answer_start": [0, 9]}, where)  # SQuAD: ("a", "b")
    read_references([None, " ", "fox"], where)                            # ("", "", "fox")

The values come from JSON lines or parquet: they may be numpy's or pyarrow's, dates, decimals or
bytes. Text is cleaned here: lone surrogates become "?", a byte order mark goes.
"""

import datetime
import decimal
import math
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from refine_jax.base.errors import DataError
from refine_jax.base.files import clean_text, short

FRACTIONS = frozenset(("ruler_recall", "ruler_qa_lm_eval"))
"""Metrics whose score is the fraction of the references found; of the others the best counts."""

_DEEPEST = 8  # levels of lists and objects in answers and metadata


Where = Callable[[], str]
"""Names a field and its row for an error; asked only then, as finding the row may take a while."""


def read_prompt(value: Any, where: Where) -> str | None:
    """Return the prompt that a field of a data set holds; None for null.

    Raises DataError: no text, such as the messages of a chat.
    """
    value = plain_value(value)
    if value is None:
        return None
    if isinstance(value, str):
        return clean_text(value)
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, Mapping) and "content" in first:
        raise DataError(
            f"{where()} must be a string. Got: messages of a chat, {short(value)}. Post-training "
            "reads these by prompts.messages_field; elsewhere, write the whole text that the model "
            "is to read."
        )
    raise DataError(f"{where()} must be a string. Got: {type(value).__name__}.")


def read_references(value: Any, where: Where, *, alternatives: bool = True) -> tuple[str, ...]:
    """Return the reference answers that a field of a data set holds.

    Null, NaN and blank text are "", which callers leave out and count: it would be found in every
    response.

    value: a text, or an object that has it as "text" (SQuAD), or lists of these. Numbers and
        booleans are read as JSON writes them, dates in ISO 8601, bytes as UTF-8.
    where: names the field and the row.
    alternatives: whether lists in lists are flattened, which is right where the best reference
        counts. For `FRACTIONS`, False: they would be names of one reference, which cannot be told
        from several references.

    Raises DataError: a value of another form.
    """
    return tuple(_texts(value, where, alternatives, depth=0))


def _texts(value: Any, where: Where, alternatives: bool, depth: int) -> Iterator[str]:
    value = plain_value(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        yield ""
    elif isinstance(value, str):
        text = clean_text(value)
        yield text if text.strip() else ""
    elif isinstance(value, bool):
        yield "true" if value else "false"
    elif isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        yield repr(value)
    elif isinstance(value, Mapping) and "text" in value and depth < _DEEPEST:
        yield from _texts(value["text"], where, alternatives, depth)
    elif isinstance(value, list) and depth < _DEEPEST:
        if depth > 0 and len(value) > 1 and not alternatives:
            raise DataError(
                f"{where()} holds a list in a list, which reads as names of one answer, but the "
                "score is the fraction of all answers found: write one name of each. "
                f"Got: {short(value)}."
            )
        for part in value:
            yield from _texts(part, where, alternatives, depth + 1)
    else:
        raise DataError(
            f"{where()} must be a string, a number, or a list of strings or numbers (or of objects "
            f'with such a "text"). Got: {short(value)}.'
        )


def plain_value(value: Any) -> Any:
    """Return a value that numpy, pyarrow or a parquet file made as Python and JSON have it.

    That is None, bool, int, float, str, list or Mapping. Dates become ISO 8601, decimals their
    digits, bytes the text that they hold in UTF-8. What is none of these comes back as it is.
    """
    if hasattr(value, "as_py"):  # a scalar of pyarrow
        value = value.as_py()
    elif hasattr(value, "tolist") and not isinstance(value, memoryview):  # arrays; numpy's scalars
        value = value.tolist()
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, decimal.Decimal):
        if not value.is_finite():
            return math.nan if value.is_nan() else float(value)
        return format(value, "f") if abs(value.adjusted()) < 1000 else str(value)
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta | uuid.UUID):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError:
            return value
    return value


def json_value(value: Any, depth: int = 0) -> Any:
    """Return a value of a data set as one that JSON can hold.

    Numbers that are not finite become null, and keys text. What has no form in JSON, or stands
    deeper than a few levels, becomes the text that Python prints for it.
    """
    value = plain_value(value)
    if isinstance(value, str):
        return clean_text(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping) and depth < _DEEPEST:
        return {clean_text(str(key)): json_value(x, depth + 1) for key, x in value.items()}
    if isinstance(value, list) and depth < _DEEPEST:
        return [json_value(x, depth + 1) for x in value]
    return clean_text(short(value, 1000))


def whole_number(value: Any, low: int, high: int) -> int | None:
    """Return a value as a whole number from `low` to `high`; None if it is no such number.

    Floats without a fraction count: so tables hold whole numbers in a column with nulls.
    """
    value = plain_value(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    return value if fits else None
