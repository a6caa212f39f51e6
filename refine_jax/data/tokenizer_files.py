"""The files of a tokenizer: which of a folder holds it, and the special tokens named beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import logging

from refine_jax.base.errors import DataError
from refine_jax.base.files import (
    is_lfs_pointer,
    json_field,
    kind_of,
    not_fetched,
    parse_object,
    read_json,
    short,
)

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
CHAT = "chat_template.jinja"
MODEL, FAST, TEKKEN = "tokenizer.model", "tokenizer.json", "tekken.json"
MAX_BYTES = 200 << 20  # of a file; the largest published tokenizers have 40 MB
MAX_ID = 2**31 - 1  # ids are int32


class Named(NamedTuple):
    """What the files beside a tokenizer say of its special tokens.

    bos, pad, unk: texts of tokens, None where no file names one. ends: of all tokens that end a
    text; the first is the one that is appended to documents. added: {text: id} of tokens that were
    added to the vocabulary. files: {name: path} of the files that were read.
    """

    bos: str | None = None
    ends: tuple[str, ...] = ()
    pad: str | None = None
    unk: str | None = None
    added: Mapping[str, int] = {}
    files: Mapping[str, Path] = {}


class SpecialIds(NamedTuple):
    """Ids of special tokens; None and () where there is none."""

    bos: int | None
    ends: tuple[int, ...]
    pad: int | None
    unk: int | None


def read_bytes(path: Path) -> bytes:
    """Read a tokenizer's file.

    Raises:
      DataError: It cannot be read, is empty, larger than any tokenizer, or a pointer of git-lfs.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(
                f"{path} has {size:,} bytes, more than any tokenizer ({MAX_BYTES:,}). Name the "
                "tokenizer's own file."
            )
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer file {path}: {error.strerror}.") from None
    if not content:
        raise DataError(f"{path} is empty. Copy the tokenizer again.")
    if is_lfs_pointer(content):
        raise DataError(not_fetched(str(path)))
    return content


def find_tokenizer(path: Path) -> Path:
    """Find the file of the tokenizer that a folder holds, itself or in `tokenizer/`.

    Of two files it is the one that holds all tokens; a warning says where they disagree. What both
    hold alike is read from tokenizer.model.

    Raises DataError: the folder holds none.
    """
    for folder in (path, path / "tokenizer"):
        model, fast = folder / MODEL, folder / FAST
        if model.is_file() and fast.is_file():
            return _fuller(model, fast)
        for file in (model, fast):
            if file.is_file():
                return file
    for folder in (path, path / "tokenizer"):
        if (folder / TEKKEN).is_file():
            raise DataError(
                f"{folder / TEKKEN} is not supported, and the folder has no {MODEL} or {FAST}. "
                f"Add a {FAST} of the same tokenizer, or name another tokenizer."
            )
    raise DataError(f"no {MODEL} or {FAST} in the folder {path}")


def _fuller(model: Path, fast: Path) -> Path:
    """Choose the one of two files that holds all tokens; the other one, where one is damaged."""
    try:
        pieces = _pieces(model)
    except DataError as error:
        logging.warning("%s is used: %s", fast, error)
        return fast
    try:
        tokens = _tokens(fast)
    except DataError as error:
        logging.warning("%s is used: %s", model, error)
        return model
    more = [token for token in tokens if token not in pieces]
    fewer = [token for token in pieces if token not in tokens]
    moved = [token for token in tokens if pieces.get(token, tokens[token]) != tokens[token]]
    used = fast if more or moved else model
    if more or fewer or moved:
        logging.warning(
            "%s and %s in %s disagree, and %s is used: %s.",
            model.name,
            fast.name,
            model.parent,
            used.name,
            ", ".join(
                f"{len(group)} {what} ({short(group[0], 40)})"
                for group, what in (
                    (more, f"tokens are in {fast.name} alone"),
                    (fewer, f"tokens are in {model.name} alone"),
                    (moved, "tokens have other ids"),
                )
                if group
            ),
        )
    return used


def open_sentencepiece(path: Path) -> tuple[SentencePieceProcessor, bytes]:
    """Open the SentencePiece model in a file; returns the file's content, too.

    Raises DataError if the file holds none.
    """
    import sentencepiece

    content = read_bytes(path)
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise DataError(f"not a SentencePiece model: {path} ({error})") from None
    if not model.get_piece_size():
        raise DataError(f"not a SentencePiece model: {path} holds no pieces.")
    try:
        _pieces_of(model)
    except UnicodeDecodeError:
        raise DataError(
            f"{path} is damaged: it holds a piece that is not UTF-8. Copy the tokenizer again."
        ) from None
    return model, content


def _pieces(path: Path) -> dict[str, int]:
    """Read {token: id} of a tokenizer.model."""
    return _pieces_of(open_sentencepiece(path)[0])


def _pieces_of(model: SentencePieceProcessor) -> dict[str, int]:
    return {model.id_to_piece(index): index for index in range(model.get_piece_size())}


def _tokens(path: Path) -> dict[str, int]:
    """Read {token: id} of a tokenizer.json without its library."""
    fields = parse_object(read_bytes(path), path, DataError)
    model = json_field(fields, "model", dict, where=path, error=DataError, default={})
    kinds = (dict, list)  # a list of (token, score) in a Unigram model
    vocabulary = json_field(model, "vocab", kinds, where=path, error=DataError)
    added = json_field(fields, "added_tokens", list, where=path, error=DataError, default=[])
    try:
        if isinstance(vocabulary, list):
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        tokens = dict(vocabulary) | {token["content"]: token["id"] for token in added}
    except (TypeError, ValueError, KeyError):
        tokens = {}
    if not tokens:
        raise DataError(f"{path} is no tokenizer.json: it holds no vocabulary.")
    return tokens


def files_beside(folder: Path, named: Named) -> dict[str, Path]:
    """List {name: path} of the files that belong to the tokenizer of a folder beside its own."""
    chat = folder / CHAT
    return dict(named.files) | ({CHAT: chat} if chat.is_file() else {})


def read_named(folder: Path) -> Named:
    """Read which special and added tokens the files in `folder` name.

    tokenizer_config.json has the last word; a warning says where the files disagree.

    Raises DataError: a file is no JSON object, or a field is of another type.
    """
    fields, files = {}, {}
    for name in (CONFIG, MAP, ADDED):
        fields[name] = {}
        if (folder / name).is_file():
            if is_lfs_pointer(folder / name):
                raise DataError(not_fetched(str(folder / name)))
            fields[name] = read_json(folder / name, DataError)
            files[name] = folder / name
    special = {}
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        several = role == "eos_token"
        first, second = (
            _texts(fields[name].get(role), f"{folder / name}: {role}", several=several)
            for name in (CONFIG, MAP)
        )
        if first and second and set(first) != set(second):
            logging.warning(
                "%s: %s and %s name another %s, %s and %s; the former is used.",
                folder,
                CONFIG,
                MAP,
                role,
                short(" ".join(first)),
                short(" ".join(second)),
            )
        special[role] = first or second
    bos, pad, unk = (
        special[role][0] if special[role] else None
        for role in ("bos_token", "pad_token", "unk_token")
    )
    added = _added_tokens(folder, fields)
    return Named(bos, special["eos_token"], pad, unk, added, files)


def _texts(value: Any, where: str, *, several: bool) -> tuple[str, ...]:
    """List the texts of the token, or tokens, that a field names."""
    if value is None or value == "":
        return ()
    if isinstance(value, list) and several:
        texts = tuple(text for entry in value for text in _texts(entry, where, several=False))
        if len(texts) < len(value) or not value:
            raise DataError(f"{where} must name a token, or a list of them. Got: {short(value)}.")
        return texts
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        lists = ", or a list of them" if several else ""
        raise DataError(
            f'{where} must be a string or {{"content": string}}{lists}. Got: {short(value)}.'
        )
    return (text,)


def _added_tokens(folder: Path, fields: Mapping[str, dict]) -> dict[str, int]:
    """Read {text: id} of added_tokens.json and tokenizer_config.json's added_tokens_decoder."""
    added = {}
    decoder = json_field(
        fields[CONFIG],
        "added_tokens_decoder",
        dict,
        where=folder / CONFIG,
        error=DataError,
        default={},
    )
    for index, entry in decoder.items():
        texts = _texts(entry, f"{folder / CONFIG}: added_tokens_decoder {index}", several=False)
        if not texts or not (index.isascii() and index.isdigit() and len(index) < 11):
            raise DataError(
                f"{folder / CONFIG}: added_tokens_decoder must have ids and their tokens. "
                f"Got: {short({index: entry})}."
            )
        added[texts[0]] = int(index)
    for text, index in fields[ADDED].items():
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index <= MAX_ID:
            raise DataError(
                f"{folder / ADDED}: {short(text)} must have an id. Got: {kind_of(index)}."
            )
        if added.setdefault(text, index) != index:
            logging.warning(
                "%s: %s and %s give the token %s other ids, %d and %d; the former is used.",
                folder,
                CONFIG,
                ADDED,
                short(text),
                added[text],
                index,
            )
    return added


def ids_of(named: Named, find_id: Callable[[str], int | None], path: Path) -> SpecialIds:
    """Look up the ids of the named tokens in the vocabulary of `path` with `find_id`.

    Raises DataError: the vocabulary lacks the token that begins or one that ends a text. Without
    the others nothing changes: a warning names them.
    """
    ids = {}
    for role, texts in (
        ("bos_token", (named.bos,)),
        ("eos_token", named.ends),
        ("pad_token", (named.pad,)),
        ("unk_token", (named.unk,)),
    ):
        ids[role] = [find_id(text) for text in texts if text is not None]
        for text, index in zip(texts, ids[role], strict=False):
            if index is not None:
                continue
            message = (
                f"{path} has no token {short(text)}, which {' or '.join(named.files)} names as "
                f"{role}."
            )
            if role in ("bos_token", "eos_token"):
                raise DataError(f"{message} Correct the name, or take the tokenizer's own files.")
            logging.warning("%s It is not used.", message)
    ends = tuple(dict.fromkeys(ids["eos_token"]))
    bos, pad, unk = (
        next(iter(ids[role]), None) for role in ("bos_token", "pad_token", "unk_token")
    )
    return SpecialIds(bos, ends, pad, unk)


def warn_unknown(named: Named, find_text: Callable[[int], str | None], path: Path) -> None:
    """Say which added tokens the vocabulary of `path` lacks, or has under another id."""
    known = {named.bos, named.pad, named.unk, *named.ends}
    unknown = [t for t, index in named.added.items() if t not in known and find_text(index) != t]
    if unknown:
        logging.warning(
            "%s lacks %d of the added tokens that %s name, such as %s: in texts they are texts "
            "like others.",
            path,
            len(unknown),
            " and ".join(name for name in named.files if name != MAP),
            short(unknown[0]),
        )
