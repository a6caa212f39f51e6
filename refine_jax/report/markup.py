"""Text as HTML that cannot be anything but text.

Whatever a data set, a model or a path says is escaped here: `text` for HTML, `json_block` for data
that a script of the page reads. What would be invisible, or would change how its neighbours are
shown, is replaced by a visible sign of it (`visible`).
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

# These categories show nothing: controls (but tab and line feed), format characters (bidi controls
# and zero-width ones among them), lone surrogates, private use, and line and paragraph separators.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
_NEEDED = "\n\t\u200c\u200d"  # the last two join letters of some scripts, and emoji
_PLAIN = re.compile(r"[\n\t\x20-\x7e]*\Z")


def visible(value: str) -> str:
    """Put a sign in place of each character that shows nothing or moves others."""
    if _PLAIN.match(value):
        return value
    return "".join(map(_sign, value))


def _sign(character: str) -> str:
    code = ord(character)
    if character in _NEEDED or unicodedata.category(character) not in _HIDDEN:
        return character
    if 0xD800 <= code <= 0xDFFF:
        return "\ufffd"
    return f"‹U+{code:04X}›"


def text(value: Any) -> str:
    """Write a value as HTML text, also inside of quoted attributes."""
    return html.escape(visible(str(value)))


def quoted(value: str) -> str:
    """Write text of others as an element whose direction its neighbours do not feel."""
    return f"<bdi>{text(value)}</bdi>"


def json_block(name: str, value: Any) -> str:
    """Write data for the script of the page, which reads it by the id `name`."""
    data = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{text(name)}">{data}</script>\n'


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Write a table of cells that are HTML already; the first of each row is its heading."""
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>\n'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}">'
        f'<table class="{kind}"><caption>{text(caption)}</caption>'
        f"<thead><tr>{columns}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def section(name: str, title: str, body: str, note: str = "") -> str:
    """Write a section; `title`, `body` and `note` are HTML already; "" without a body."""
    if not body:
        return ""
    note = f'<p class="note">{note}</p>\n' if note else ""
    return f'<section id="{name}"><h2>{title}</h2>\n{note}{body}</section>\n'


def number(value: float | None, digits: int = 4, unit: str = "", *, sign: bool = False) -> str:
    """Write a number for a cell; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:{'+' if sign else ''},.{digits}f}{unit}".replace("-", "−")
