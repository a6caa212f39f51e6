"""Text of tokens as they come: whole characters only, cut at the first stop string."""

from collections.abc import Callable, Iterable, Sequence

_UNKNOWN = "�"
_MOST_UNKNOWN = 3  # bytes of a UTF-8 character that may still lack its last one


class TextStream:
    """Turns the tokens of one row into pieces of text that later tokens cannot change.

    The pieces put together are `decode(tokens)`, cut before the first stop string. Time per token
    does not depend on the tokens before: only a window of the last ones is decoded again.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        """decode: text of ids. stop: strings that end the text and are not part of it."""
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # The window starts before tokens whose text is out: the same tokens decode differently at
        # the start of a text (SentencePiece drops a leading space there).
        self._start = self._boundary = 0
        self._out = 0  # characters of the window's text that are out of the window
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Take a token; returns the text that it makes certain, "" after a stop string."""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        certain = len(text) - min(len(text) - len(text.rstrip(_UNKNOWN)), _MOST_UNKNOWN)
        new = text[self._out : certain]
        self._out = max(self._out, certain)
        if new and certain == len(text):
            self._start, self._boundary = self._boundary, len(self._ids)
            self._out = len(self._decode(self._ids[self._start :]))
        return self._release(new)

    def flush(self) -> str:
        """Release what was held back, when no token follows."""
        text = self._decode(self._ids[self._start :])
        piece = self._release(text[self._out :])
        self._out = len(text)
        if not self.stopped:
            piece, self._held = piece + self._held, ""
        return piece

    def _release(self, new: str) -> str:
        """Return the part of held and new text that is not, and does not begin, a stop string."""
        if self.stopped:
            return ""
        text = self._held + new
        stops = [at for at in map(text.find, self._stop) if at >= 0]
        if stops:
            self.stopped, self._held = True, ""
            return text[: min(stops)]
        hold = max(
            (
                size
                for stop in self._stop
                for size in range(min(len(stop) - 1, len(text)), 0, -1)
                if stop.startswith(text[-size:])
            ),
            default=0,
        )
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def token_texts(decode: Callable[[Sequence[int]], str], tokens: Iterable[int]) -> list[str]:
    """The text of each token; that of a character's bytes stands with the last of them."""
    stream = TextStream(decode)
    texts = [stream.push(int(token)) for token in tokens]
    if texts:
        texts[-1] += stream.flush()
    return texts
