"""Tokenizers: text to int32 ids and back.

`load_tokenizer` takes "mistral-v1" (the SentencePiece model of Mistral 7B v0.1, 32,000 pieces,
which the published LaCT-760M and DeltaNet-1.3B use), "bytes", or the path of a tokenizer file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from refine_jax.base.errors import DataError
from refine_jax.base.files import local_path

Ids = Sequence[int] | np.ndarray

# Files beside a tokenizer.json that name its special tokens; the first has the last word.
SPECIAL_TOKENS = ("tokenizer_config.json", "special_tokens_map.json")


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer.

    Attributes:
        name: how to load it again: the argument of `load_tokenizer`.
        fingerprint: equal for equal tokenizers, wherever their files lie; used by caches.
        vocab_size: ids are 0 .. vocab_size - 1.
        bos_id: beginning of sequence; None if the tokenizer has none.
        eos_id: end of sequence; None if the tokenizer has none.
        pad_id: fills the slots of a row that hold no token (their segment is 0).
        files: {name: path} from which a folder that they are copied to loads it; empty for bytes.
    """

    name: str
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    files: Mapping[str, Path]

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> np.ndarray:
        """Return the ids [T] int32 of `text`, with bos before and eos after it if wanted."""

    def encode_batch(
        self, texts: Sequence[str], bos: bool = True, eos: bool = False
    ) -> list[np.ndarray]:
        """Return `encode` of each text, several at a time where the library can."""

    def decode(self, ids: Ids) -> str:
        """Return the text of `ids`; bos, eos and pad have no text."""


class ByteTokenizer:
    """UTF-8 bytes (ids 0-255) and bos 256, eos 257, pad 258."""

    name = "bytes"
    fingerprint = "bytes-259"
    vocab_size = 259
    bos_id, eos_id, pad_id = 256, 257, 258
    files: Mapping[str, Path] = {}

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> np.ndarray:
        """Return the bytes of `text` as ids [T] int32."""
        ids = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)
        return _with_ends(self, ids, bos, eos)

    def encode_batch(
        self, texts: Sequence[str], bos: bool = True, eos: bool = False
    ) -> list[np.ndarray]:
        """Return `encode` of each text."""
        return [self.encode(text, bos, eos) for text in texts]

    def decode(self, ids: Ids) -> str:
        """Return the text; bytes that are not UTF-8 become U+FFFD."""
        ids = np.asarray(ids, np.int64)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model file (`tokenizer.model`).

    A model without a padding piece (Mistral's) pads with its eos, else with its unknown piece.
    """

    def __init__(self, path: str | os.PathLike, name: str | None = None) -> None:
        """Read the model at `path`; raises DataError if it is missing or no SentencePiece model."""
        import sentencepiece

        model = _read(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"not a SentencePiece model: {path} ({error})") from error
        self.name = name or str(path)
        self.files = {"tokenizer.model": Path(path)}
        self.fingerprint = f"sentencepiece-{_digest(model)}"
        self.vocab_size = self._model.get_piece_size()
        self.bos_id = _id_or_none(self._model.bos_id())
        self.eos_id = _id_or_none(self._model.eos_id())
        candidates = (self._model.pad_id(), self._model.eos_id(), self._model.unk_id())
        self.pad_id = next(i for i in candidates if i >= 0)

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> np.ndarray:
        """Return the pieces of `text` as ids [T] int32; "<s>" in a text is plain text."""
        return _with_ends(self, np.array(self._model.encode(text), np.int32), bos, eos)

    def encode_batch(
        self, texts: Sequence[str], bos: bool = True, eos: bool = False
    ) -> list[np.ndarray]:
        """Return `encode` of each text, in as many threads as the machine has cores."""
        batch = self._model.encode(list(texts), num_threads=os.cpu_count() or 1)
        return [_with_ends(self, np.array(ids, np.int32), bos, eos) for ids in batch]

    def decode(self, ids: Ids) -> str:
        """Return the text of `ids`."""
        return self._model.decode([int(i) for i in ids])


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` library (an optional dependency).

    The names of bos, eos and pad come from `tokenizer_config.json` or `special_tokens_map.json`
    in the same folder.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Read `path`; raises DataError if it is missing, broken or `tokenizers` is not there."""
        content = _read(path)
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(
                f"{path} needs the `tokenizers` library: pip install 'refine-jax[tokenizers]', "
                "or use a folder that also holds a tokenizer.model."
            ) from error
        try:
            self._model = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"not a tokenizer.json: {path} ({error})") from error
        special = _special_tokens(Path(path).parent)
        ids = {key: self._model.token_to_id(token) for key, token in special.items()}
        self.name = str(path)
        self.files = {"tokenizer.json": Path(path)}
        for name in SPECIAL_TOKENS:
            if (Path(path).parent / name).is_file():
                self.files[name] = Path(path).parent / name
        self.fingerprint = f"tokenizers-{_digest(content, json.dumps(ids, sort_keys=True))}"
        # Added tokens may lie beyond a gap, so the largest id counts, not the number of tokens.
        self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())
        self.bos_id, self.eos_id = ids.get("bos_token"), ids.get("eos_token")
        candidates = (ids.get("pad_token"), self.eos_id, ids.get("unk_token"), 0)
        self.pad_id = next(i for i in candidates if i is not None)

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> np.ndarray:
        """Return the ids [T] int32 of `text`."""
        ids = self._model.encode(text, add_special_tokens=False).ids
        return _with_ends(self, np.array(ids, np.int32), bos, eos)

    def encode_batch(
        self, texts: Sequence[str], bos: bool = True, eos: bool = False
    ) -> list[np.ndarray]:
        """Return `encode` of each text, in the library's threads."""
        batch = self._model.encode_batch(list(texts), add_special_tokens=False)
        return [_with_ends(self, np.array(item.ids, np.int32), bos, eos) for item in batch]

    def decode(self, ids: Ids) -> str:
        """Return the text of `ids` without special tokens."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)


def encode_continuations(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the ids [T] int32 of each text as it stands after other text.

    SentencePiece puts a space before what it encodes, which belongs to the start of a text only:
    the ids are those that follow a line end.
    """
    lead = tokenizer.encode("\n", bos=False)
    behind = tokenizer.encode_batch(["\n" + text for text in texts], bos=False)
    alone = tokenizer.encode_batch(texts, bos=False)
    return [
        # Where line ends melt together the text has no ids of its own behind one.
        ids[len(lead) :] if np.array_equal(ids[: len(lead)], lead) else plain
        for ids, plain in zip(behind, alone, strict=True)
    ]


def load_tokenizer(name_or_path: str | os.PathLike) -> Tokenizer:
    """Return the tokenizer of that name, or the one found at that path.

    Args:
        name_or_path: "mistral-v1", "bytes", a `.model` file (SentencePiece), a `.json` file
            (`tokenizers` library), or a folder that holds `tokenizer.model` or `tokenizer.json`
            (a Hugging Face folder or a converted checkpoint), itself or in `tokenizer/`.

    Raises:
        DataError: there is no such name or file.
    """
    if name_or_path == "bytes":
        return ByteTokenizer()
    if name_or_path == "mistral-v1":
        return SentencePieceTokenizer(_mistral_model(), name="mistral-v1")
    path = local_path(name_or_path, "the tokenizer", DataError)
    if path.is_dir():
        for file in ("tokenizer.model", "tokenizer.json"):
            for folder in (path, path / "tokenizer"):
                if (folder / file).is_file():
                    return load_tokenizer(folder / file)
        raise DataError(f"no tokenizer.model or tokenizer.json in the folder {path}")
    if not path.is_file():
        raise DataError(
            f"no tokenizer {str(name_or_path)!r}: neither a file or folder nor one of the names "
            "mistral-v1, bytes"
        )
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


def _read(path: str | os.PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer file {path}: {error.strerror}") from error


def _digest(*parts: bytes | str) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def _id_or_none(index: int) -> int | None:
    return index if index >= 0 else None


def _with_ends(tokenizer: Tokenizer, ids: np.ndarray, bos: bool, eos: bool) -> np.ndarray:
    for wanted, index, name in ((bos, tokenizer.bos_id, "bos"), (eos, tokenizer.eos_id, "eos")):
        if wanted and index is None:
            raise DataError(
                f"the tokenizer {tokenizer.name} has no {name} token: set add_{name}=False"
            )
    head = [tokenizer.bos_id] if bos else []
    tail = [tokenizer.eos_id] if eos else []
    return np.concatenate([np.array(head, np.int32), ids, np.array(tail, np.int32)])


def _special_tokens(folder: Path) -> dict[str, str]:
    """Return {"bos_token": "<s>", ...} as the files beside a tokenizer.json name them."""
    found: dict[str, str] = {}
    for file in SPECIAL_TOKENS:
        path = folder / file
        if not path.is_file():
            continue
        try:
            entries = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = entries.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found.setdefault(key, token)
    return found
