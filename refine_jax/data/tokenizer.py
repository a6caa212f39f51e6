"""Tokenizers: text to int32 ids and back.

`load_tokenizer` takes "mistral-v1" (the SentencePiece model of Mistral 7B v0.1, 32,000 pieces,
which the published LaCT-760M and DeltaNet-1.3B use), "bytes", or the path of a tokenizer file.
"""

import contextlib
import copy
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from absl import logging

from refine_jax.base.errors import DataError
from refine_jax.base.files import MARK, given_path, path_of, valid_unicode
from refine_jax.data.tokenizer_files import (
    FAST,
    MAX_ID,
    MODEL,
    TEKKEN,
    Named,
    files_beside,
    find_tokenizer,
    ids_of,
    open_sentencepiece,
    read_bytes,
    read_named,
    warn_unknown,
)

Ids = Sequence[int] | np.ndarray


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer.

    Attributes:
        name: how to load it again: the argument of `load_tokenizer`.
        fingerprint: equal for equal tokenizers, wherever their files lie; used by caches.
        vocab_size: ids are 0 .. vocab_size - 1.
        bos_id: beginning of sequence; None if the tokenizer has none.
        eos_id: end of sequence, appended to documents; None if the tokenizer has none.
        end_ids: every token that ends a text that is generated: eos_id, and others that files name.
        pad_id: fills the slots of a row that hold no token (their segment is 0).
        special_tokens: {text: id} of those that no text becomes, but in `encode_special`.
        files: {name: path} from which a folder that they are copied to loads it; empty for bytes.
    """

    name: str
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    end_ids: tuple[int, ...]
    pad_id: int
    special_tokens: Mapping[str, int]
    files: Mapping[str, Path]

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> np.ndarray:
        """Return the ids [T] int32 of `text`, with bos before and eos after it if wanted.

        Special tokens that `text` spells are text. Lone surrogates, of which no text is made, are
        encoded as "?".
        """

    def encode_batch(
        self, texts: Sequence[str], bos: bool = True, eos: bool = False
    ) -> list[np.ndarray]:
        """Return `encode` of each text, [T] int32, several at a time where the library can."""

    def encode_special(self, text: str) -> np.ndarray:
        """Return the ids [T] int32 of a text whose special tokens, as "</s>", are such; no ends."""

    def decode(self, ids: Ids) -> str:
        """Return the text of `ids`; bos, eos and pad have no text."""


class ByteTokenizer:
    """UTF-8 bytes (ids 0-255) and bos 256, eos 257, pad 258."""

    name = "bytes"
    fingerprint = "bytes-259"
    vocab_size = 259
    bos_id, eos_id, pad_id = 256, 257, 258
    end_ids: tuple[int, ...] = (257,)
    special_tokens: Mapping[str, int] = {}  # they have no text
    files: Mapping[str, Path] = {}

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> np.ndarray:
        """Return the bytes of `text` as ids [T] int32."""
        ids = np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)
        return _with_ends(self, ids, bos, eos)

    def encode_batch(
        self, texts: Sequence[str], bos: bool = True, eos: bool = False
    ) -> list[np.ndarray]:
        """Return `encode` of each text, [T] int32."""
        return [self.encode(text, bos, eos) for text in texts]

    def encode_special(self, text: str) -> np.ndarray:
        """Return the bytes of `text` as ids [T] int32."""
        return self.encode(text, bos=False)

    def decode(self, ids: Ids) -> str:
        """Return the text; bytes that are not UTF-8 become U+FFFD."""
        ids = np.asarray(ids, np.int64)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class _LibraryTokenizer:
    """Encodes with a library, which may take words of a text, as "</s>", for special tokens.

    Subclasses have `_encode(texts)` by the library, `_reserved`, the special tokens that no text
    may become, and `_cuts(text)`, a place within each of these in a text.
    """

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> np.ndarray:
        """Return the ids [T] int32 of `text`; a special token in a text is plain text."""
        return self.encode_batch([text], bos, eos)[0]

    def encode_batch(
        self, texts: Sequence[str], bos: bool = True, eos: bool = False
    ) -> list[np.ndarray]:
        """Return `encode` of each text, [T] int32, in the library's threads."""
        batch = self._encode_as_text([valid_unicode(text) for text in texts])
        return [_with_ends(self, ids, bos, eos) for ids in batch]

    def _encode_as_text(self, texts: Sequence[str], tries: int = 8) -> list[np.ndarray]:
        """Return the ids [T] int32 of each text; none of them is a special token.

        A text with a special token is encoded in parts, each of which ends within it. A special
        token of one character remains: the vocabulary has nothing else for it.
        """
        batch = self._encode(texts) if texts else []
        reserved = self._reserved if tries else []
        if not batch or not reserved or not np.isin(np.concatenate(batch), reserved).any():
            return batch
        for place, ids in enumerate(batch):
            if np.isin(ids, reserved).any() and (cuts := self._cuts(texts[place])):
                ends = [0, *cuts, len(texts[place])]
                parts = [texts[place][a:b] for a, b in itertools.pairwise(ends)]
                encode = functools.partial(self._encode_as_text, tries=tries - 1)
                rest = _continuations(encode, parts[1:])
                batch[place] = np.concatenate([*encode(parts[:1]), *rest])
        return batch


class SentencePieceTokenizer(_LibraryTokenizer):
    """A SentencePiece model file (`tokenizer.model`).

    Files in the same folder (`tokenizer_config.json` or `special_tokens_map.json`) may name other
    special tokens than the model's own. A model without a padding piece (Mistral's) pads with its
    eos, else with its unknown piece.
    """

    def __init__(self, path: str | os.PathLike, name: str | None = None) -> None:
        """Read the model at `path`; a `name` stands for a model without files beside it.

        Raises DataError if the file is missing or no SentencePiece model, or a file beside it is
        none of its kind.
        """
        path = path_of(path)
        self._model, content = open_sentencepiece(path)
        named = Named() if name else read_named(path.parent)
        self._pieces = self._model.get_piece_size()
        ids = ids_of(named, functools.partial(self._id_of, named), path)
        warn_unknown(named, self._text_of, path)
        self.name = name or str(path)
        self.files = {MODEL: path} if name else {MODEL: path, **files_beside(path.parent, named)}
        self._added = named.added
        self.vocab_size = 1 + max(self._pieces - 1, *(i for i in (ids.bos, *ids.ends) if i), 0)
        own = [_id_or_none(self._model.bos_id()), _id_or_none(self._model.eos_id())]
        self.bos_id = own[0] if ids.bos is None else ids.bos
        self.end_ids = ids.ends or tuple(i for i in own[1:] if i is not None)
        self.eos_id = next(iter(self.end_ids), None)
        for role, mine, index in (("bos", own[0], ids.bos), ("eos", own[1], self.eos_id)):
            if None not in (mine, index) and mine != index:
                logging.warning(
                    "%s: %s names token %d as %s_token, the model's own is %d; the former is used.",
                    path,
                    " or ".join(named.files),
                    index,
                    role,
                    mine,
                )
        special = [self.bos_id, *self.end_ids]
        self.fingerprint = f"sentencepiece-{_digest(content)}"
        if special != [i for i in own if i is not None]:
            self.fingerprint += f"-{_digest(json.dumps(special))}"
        candidates = (self._model.pad_id(), self._model.eos_id(), self._model.unk_id())
        self.pad_id = next(i for i in candidates if i >= 0)
        self._reserved = [
            i
            for i in (self.bos_id, self.eos_id)
            if i is not None and i < self._pieces and not self._model.is_control(i)
        ]

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """{text: id} of control pieces, bos, eos and tokens that were added to the model."""
        ids = [*self._reserved, *(i for i in range(self._pieces) if self._model.is_control(i))]
        added = {text: i for text, i in self._added.items() if i >= self._pieces}
        return added | {self._model.id_to_piece(i): i for i in ids}

    def encode_special(self, text: str) -> np.ndarray:
        """Return the ids [T] int32 of a text whose special tokens are such.

        What stands between them is encoded on its own, with the space before a text.
        """
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
        parts = re.split(f"({pattern})", valid_unicode(text))
        ids = [np.zeros(0, np.int32), *self._encode_as_text(parts[::2])]
        tokens = [np.array([self.special_tokens[part]], np.int32) for part in parts[1::2]]
        pairs = itertools.zip_longest(ids[1:], tokens, fillvalue=ids[0])
        return np.concatenate([*itertools.chain.from_iterable(pairs)])

    def decode(self, ids: Ids) -> str:
        """Return the text of `ids`; special tokens have none."""
        known = [int(i) for i in ids if i < self._pieces and i not in self._reserved]
        return self._model.decode(known)

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if len(texts) == 1:  # starting threads takes longer than a short text
            batch = [self._model.encode(texts[0])]
        else:
            batch = self._model.encode(list(texts), num_threads=os.cpu_count() or 1)
        return [np.array(ids, np.int32) for ids in batch]

    def _cuts(self, text: str) -> list[int]:
        # Such pieces are user-defined symbols, which are found as they are written.
        pieces = "|".join(re.escape(self._model.id_to_piece(i)) for i in self._reserved)
        return [match.start() + 1 for match in re.finditer(pieces, text) if len(match[0]) > 1]

    def _id_of(self, named: Named, text: str) -> int | None:
        index = self._model.piece_to_id(text)  # the unknown piece's, if there is none
        return index if self._model.id_to_piece(index) == text else named.added.get(text)

    def _text_of(self, index: int) -> str | None:
        return self._model.id_to_piece(index) if index < self._pieces else None


class HuggingFaceTokenizer(_LibraryTokenizer):
    """A `tokenizer.json` of the `tokenizers` library.

    The names of bos, eos and pad come from `tokenizer_config.json` or `special_tokens_map.json`
    in the same folder. Texts are encoded whole and as they are, whatever the file has saved of a
    batch's truncation and padding, or of random segmentation.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Read `path`.

        Raises DataError if the file is missing, broken or larger than a tokenizer, or if one beside
        it is.
        """
        import tokenizers

        path = path_of(path)
        content = read_bytes(path)
        with _errors_of_library(f"not a tokenizer.json: {path}"):
            text = content.decode("utf-8").removeprefix(MARK)
            self._model = tokenizers.Tokenizer.from_str(text)
            vocabulary = self._model.get_vocab(with_added_tokens=True)
        if not vocabulary or max(vocabulary.values()) > MAX_ID:
            raise DataError(f"not a tokenizer.json: {path} holds no tokens, or ids beyond int32.")
        named = read_named(path.parent)
        ids = ids_of(named, self._model.token_to_id, path)
        warn_unknown(named, self._model.id_to_token, path)
        added = self._model.get_added_tokens_decoder()
        self._take_texts_as_they_are([added[i].content for i in (ids.bos, *ids.ends) if i in added])
        added = self._model.get_added_tokens_decoder()
        special = {i for i in added if added[i].special} | {ids.bos, *ids.ends[:1]}
        self._reserved = sorted(special - {None} - self._unknown())
        self.name = str(path)
        self.special_tokens = {self._model.id_to_token(i): i for i in self._reserved}
        self.files = {FAST: path, **files_beside(path.parent, named)}
        # Added tokens may lie beyond a gap, so the largest id counts, not the number of tokens.
        self.vocab_size = 1 + max(vocabulary.values())
        self.bos_id, self.end_ids = ids.bos, ids.ends
        self.eos_id = next(iter(self.end_ids), None)
        # The number counts changes of what a text is encoded to.
        self.fingerprint = f"tokenizers-2-{_digest(text, json.dumps(ids))}"
        candidates = (ids.pad, self.eos_id, ids.unk, 0)
        self.pad_id = next(i for i in candidates if i is not None)

    def _take_texts_as_they_are(self, ends: list[str]) -> None:
        """Switch off what the file may have saved and would change texts: see the class."""
        self._model.no_truncation()
        self._model.no_padding()
        for name in ("dropout", "alpha", "nbest_size"):  # segment at random, to train robustly
            if getattr(self._model.model, name, None) is not None:
                setattr(self._model.model, name, None)
        self._model.add_special_tokens(ends)  # where the file calls them added tokens like others
        self._model.encode_special_tokens = True  # in a text they are text

    def _unknown(self) -> set[int]:
        """List the ids of what the model does not know: what it makes of no character."""
        try:
            return set(self._model.encode("\U0010fffe", add_special_tokens=False).ids)
        except Exception:  # the library's, of a model without an unknown token
            return set()

    def decode(self, ids: Ids) -> str:
        """Return the text of `ids` without special tokens."""
        ends = (self.bos_id, self.eos_id)
        with _errors_of_library(f"{self.name} cannot decode"):
            texts = [int(i) for i in ids if i not in ends]
            return self._model.decode(texts, skip_special_tokens=True)

    def encode_special(self, text: str) -> np.ndarray:
        """Return the ids [T] int32 of a text whose special tokens are such."""
        with _errors_of_library(f"{self.name} cannot encode a text"):
            ids = self._model_of_special.encode(valid_unicode(text), add_special_tokens=False).ids
        return np.array(ids, np.int32)

    @functools.cached_property
    def _model_of_special(self):
        # A model of its own: another thread may encode a text, in which these tokens are text.
        model = copy.deepcopy(self._model)
        model.encode_special_tokens = False
        return model

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        with _errors_of_library(f"{self.name} cannot encode a text"):
            batch = self._model.encode_batch(list(texts), add_special_tokens=False)
            return [np.array(item.ids, np.int32) for item in batch]

    def _cuts(self, text: str) -> list[int]:
        encoding = self._model.encode(text, add_special_tokens=False)
        special = np.isin(encoding.ids, self._reserved)
        spans = [span for span, taken in zip(encoding.offsets, special, strict=True) if taken]
        return [begin + 1 for begin, end in spans if end - begin > 1]


def encode_continuations(
    tokenizer: Tokenizer, texts: Sequence[str], *, special: bool = False
) -> list[np.ndarray]:
    """Return the ids [T] int32 of each text as it stands after other text.

    SentencePiece puts a space before what it encodes, which belongs to the start of a text only:
    the ids are those that follow a line end. special: encode by `Tokenizer.encode_special`.
    """
    if special:
        return _continuations(lambda texts: [*map(tokenizer.encode_special, texts)], texts)
    return _continuations(functools.partial(tokenizer.encode_batch, bos=False), texts)


def _continuations(encode: Callable, texts: Sequence[str]) -> list[np.ndarray]:
    """Do `encode_continuations` by the ids [T] of each text of a list."""
    (lead,) = encode(["\n"])
    behind, alone = encode(["\n" + text for text in texts]), encode(texts)
    return [
        # Where line ends melt together the text has no ids of its own behind one.
        ids[len(lead) :] if np.array_equal(ids[: len(lead)], lead) else plain
        for ids, plain in zip(behind, alone, strict=True)
    ]


def with_ends(tokenizer: Tokenizer, ids: Sequence[int]) -> Tokenizer:
    """Add `ids` to the tokens that end a generated text."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.end_ids = tuple(dict.fromkeys([*tokenizer.end_ids, *ids]))
    return tokenizer


def load_tokenizer(name_or_path: str | os.PathLike) -> Tokenizer:
    """Return the tokenizer of that name, or the one found at that path.

    name_or_path: "mistral-v1", "bytes", a `.model` file (SentencePiece), a `.json` file
        (`tokenizers` library), or a folder that holds `tokenizer.model` or `tokenizer.json` (a
        Hugging Face folder or a converted checkpoint), itself or in `tokenizer/`.

    Raises DataError: there is no such name or file.
    """
    if name_or_path == "bytes":
        return ByteTokenizer()
    if name_or_path == "mistral-v1":
        return SentencePieceTokenizer(_mistral_model(), name="mistral-v1")
    path = given_path(name_or_path, "the tokenizer", DataError)
    try:
        if path.is_dir():
            path = find_tokenizer(path)
        if not path.is_file():
            raise DataError(
                f"no tokenizer {str(name_or_path)!r}: neither a file or folder nor one of the "
                "names mistral-v1, bytes"
            )
    except OSError as error:  # a name too long, a folder that may not be read
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}.") from None
    if path.name == TEKKEN:
        raise DataError(f"{path} is not supported: name a {MODEL} or {FAST} of the tokenizer.")
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def _mistral_model() -> Path:
    # The package is only located: importing it would load pydantic, PIL and requests.
    spec = importlib.util.find_spec("mistral_common")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "data" / "tokenizer.model.v1"
        if path.is_file():
            return path
    raise DataError(
        "the tokenizer mistral-v1 is a file of the package mistral-common, which is "
        f"{'without it' if spec else 'not installed'}: pip install mistral-common"
    )


def _digest(*parts: bytes | str) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def _id_or_none(index: int) -> int | None:
    return index if index >= 0 else None


def check_ends(
    tokenizer: Tokenizer, *, bos: bool, eos: bool = False, setting: Callable[[str], str] = str
) -> None:
    """Raise DataError unless the tokenizer has the tokens that are wanted around a text.

    setting: from add_bos and add_eos to what the user sets them with.
    """
    for wanted, index, name in ((bos, tokenizer.bos_id, "bos"), (eos, tokenizer.eos_id, "eos")):
        if wanted and index is None:
            raise DataError(
                f"the tokenizer {tokenizer.name} has no {name} token: set "
                f"{setting(f'add_{name}')}=False."
            )


def _with_ends(tokenizer: Tokenizer, ids: np.ndarray, bos: bool, eos: bool) -> np.ndarray:
    check_ends(tokenizer, bos=bos, eos=eos)
    head = [tokenizer.bos_id] if bos else []
    tail = [tokenizer.eos_id] if eos else []
    return np.concatenate([np.array(head, np.int32), ids, np.array(tail, np.int32)])


@contextlib.contextmanager
def _errors_of_library(what: str) -> Iterator[None]:
    """Raise what the `tokenizers` library raises, which has no classes of its own, as DataError."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{what} ({error})") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust: no Exception
            raise
        raise DataError(f"{what} ({error})") from None
