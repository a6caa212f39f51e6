"""Text and tokens in, text and tokens out, for prompts of any number and lengths."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from refine_jax.base.errors import DataError
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.generation.engine import (
    Prefix,
    advance,
    decode,
    gather_rows,
    prefill,
    take_rows,
    with_room,
)
from refine_jax.generation.sampling import NOT_FINITE, Sampler, Sampling, not_finite, row_keys
from refine_jax.generation.text import TextStream
from refine_jax.models.config import Architecture
from refine_jax.models.layout import round_length, round_rows
from refine_jax.models.transformer import ComputePolicy, Model, Params

BLOCK = 16  # tokens generated between two looks at the stop strings
PIECES = (512, 64, 8, 1)  # tokens by which states are extended: any number is a sum of few
_SHORT = 512  # rows of at most so many tokens are padded to one length: little work, one program


@dataclasses.dataclass(frozen=True)
class Generated:
    """The continuation of one prompt.

    tokens: as sampled, up to and with a token that ends texts or the one that completed a stop
    string. text: `tokenizer.decode` of those before the end, cut before the stop string.
    finish_reason: "eos" (one of `tokenizer.end_ids`), "stop" (a stop string) or "length"
    (max_new_tokens).
    """

    tokens: tuple[int, ...]
    text: str
    finish_reason: str


class _Programs(NamedTuple):
    """The compiled functions of a model; `advance` and `decode` overwrite the Prefix they get."""

    prefill: Callable
    advance: Callable
    decode: Callable
    take_rows: Callable
    gather: Callable
    row_keys: Callable


@functools.lru_cache(maxsize=8)
def programs_of(
    config: Architecture, policy: ComputePolicy, end: int | tuple[int, ...]
) -> _Programs:
    """Compile the functions of a model whose texts end with the token, or tokens, `end`."""
    model = Model(config, policy)
    return _Programs(
        jax.jit(functools.partial(prefill, model)),
        jax.jit(functools.partial(advance, model), donate_argnums=1),
        jax.jit(functools.partial(decode, model, block=BLOCK, end=end), donate_argnums=1),
        jax.jit(take_rows),
        jax.jit(gather_rows),
        jax.jit(row_keys),
    )


class Generator:
    """Reads prompts and generates from them: text or tokens in, text and tokens out.

    Numbers of rows and lengths are rounded up to few shapes, so that few programs are compiled;
    Generators of equal models share them. Rows do not depend on each other: only the rounding of
    products may differ between programs.

    decode_steps: tokens decoded so far, those of all rows at once counted as one; also those after
    a stop string, which no text has.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, *, prefill_tokens: int = 32768):
        """prefill_tokens: most tokens, padding included, of one forward pass over prompts.

        What such a pass keeps for all tokens is far larger than a state; it is what limits memory.
        Prompts are read in several passes, and longer ones in pieces after their first
        `prefill_tokens`, with memory that does not depend on their length.
        """
        if tokenizer.vocab_size > model.config.vocab_size:
            raise DataError(
                "The tokenizer has more tokens than the model's vocabulary. Got: "
                f"{tokenizer.name!r} with {tokenizer.vocab_size}, "
                f"vocab_size={model.config.vocab_size}. Use the tokenizer the model was made for."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.decode_steps = 0
        self._prefill_tokens = prefill_tokens
        programs = programs_of(model.config, model.policy, tokenizer.end_ids)
        self._prefill, self._advance, self._decode = programs[:3]
        self._take_rows, self._gather, self._row_keys = programs[3:]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts as prompts [T] int32, with a begin-of-sequence token if there is one."""
        return self.tokenizer.encode_batch(list(texts), bos=self.tokenizer.bos_id is not None)

    def read(self, params: Params, prompts: Sequence[Sequence[int]]) -> Prefix:
        """Read prompts of ids, of any lengths >= 1.

        Raises DataError: a prompt without tokens, or with one that is not in the vocabulary.
        """
        prompts = self._check(prompts, shortest=1)
        parts, places, start = [], np.zeros(len(prompts), np.int32), 0
        for group in self._groups([len(prompt) for prompt in prompts]):
            parts.append(self._read_group(params, [prompts[row] for row in group]))
            places[group] = start + np.arange(len(group))
            start += parts[-1].length.shape[0]
        in_place = len(parts) == 1 and np.array_equal(places, np.arange(start))
        prefix = parts[0] if in_place else self._gather(self._of_one_size(parts), places)
        rests = [row[self._prefill_tokens :] for row in prompts]
        return self._read_on(params, prefix, rests, consume=True)

    def extend(
        self, params: Params, prefix: Prefix, continuations: Sequence[Sequence[int]]
    ) -> Prefix:
        """Read on: `continuations` of ids, one a row, of any lengths; `prefix` stays as it is.

        The result is that of `read` with the whole sequences, up to rounding. Raises DataError: not
        one continuation a row, or an id that is not in the vocabulary.
        """
        rows = prefix.length.shape[0]
        if len(continuations) != rows:
            raise DataError(
                f"extend takes one continuation a row. Got: {len(continuations)} for {rows} rows."
            )
        rests = self._check(continuations, shortest=0)
        return self._read_on(params, prefix, rests, consume=False)

    def generate(
        self,
        params: Params,
        prefix: Prefix,
        sampling: Sampling,
        *,
        max_new_tokens: Sequence[int] | None = None,
        ids: Sequence[int] | None = None,
        consume: bool = False,
    ) -> list[Generated]:
        """Generate from every row of `prefix`, which stays as it is.

        max_new_tokens: of each row; None: that of `sampling`. ids: numbers >= 0 that, with the
        seed, decide a row's draws wherever it stands and whatever stands beside it; None: 0, 1, ...
        consume: `prefix` is not needed any more; saves the memory of a copy. Raises RunError: the
        model's predictions are not finite.
        """
        rows = self._rows(prefix, sampling, max_new_tokens)
        for _ in self._run(params, prefix, sampling, rows, ids, BLOCK, consume=consume):
            pass
        return [row.result() for row in rows]

    def stream(
        self,
        params: Params,
        prefix: Prefix,
        sampling: Sampling,
        *,
        ids: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, str | Generated]]:
        """`generate` as it goes: yields (row, piece of text) and, at a row's end, (row, Generated).

        The pieces of a row put together are the text of its Generated.
        """
        rows = self._rows(prefix, sampling, None)
        yield from self._run(params, prefix, sampling, rows, ids, 1)

    def complete(self, params: Params, texts: Sequence[str], sampling: Sampling) -> list[Generated]:
        """Generate after each of `texts`."""
        prefix = self.read(params, self.encode(texts))
        return self.generate(params, prefix, sampling, consume=True)

    # Reading

    def _check(self, rows, shortest: int) -> list[np.ndarray]:
        """Make arrays of ids of the rows, and check that the vocabulary has them."""
        rows = [np.asarray(row, np.int32) for row in rows]
        if not rows:
            raise DataError("At least one prompt is needed. Got: none.")
        vocab_size = self.model.config.vocab_size
        for index, row in enumerate(rows):
            if row.size < shortest:
                raise DataError(f"Prompt {index} holds no token: there is nothing to continue.")
            if row.size and not 0 <= row.min() <= row.max() < vocab_size:
                raise DataError(
                    f"Prompt {index} has ids outside the model's vocabulary of {vocab_size}. "
                    f"Got: {row.min()} to {row.max()}."
                )
        return rows

    def _groups(self, lengths: list[int]) -> list[list[int]]:
        """Group rows that are read together: of similar length, within `prefill_tokens`."""
        lengths = [min(length, self._prefill_tokens) for length in lengths]
        groups, width = [], 0
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            size = round_length(lengths[row])
            fits = groups and round_rows(len(groups[-1]) + 1) * width <= self._prefill_tokens
            if fits and (2 * size >= width or width <= _SHORT):
                groups[-1].append(row)
            else:
                groups.append([row])
                width = size
        return [sorted(group) for group in groups]

    def _read_group(self, params: Params, prompts: list[np.ndarray]) -> Prefix:
        """Read the first `prefill_tokens` of the prompts in one pass; more rows may fill it up."""
        prompts = [prompt[: self._prefill_tokens] for prompt in prompts]
        lengths = np.ones(round_rows(len(prompts)), np.int32)
        lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
        tokens = np.zeros((len(lengths), round_length(lengths.max())), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: len(prompt)] = prompt
        return self._prefill(params, tokens, lengths)

    def _of_one_size(self, parts: list[Prefix]) -> tuple[Prefix, ...]:
        """The parts with room for as many tokens each, where their states grow with these."""
        room = max((self.model.capacity(part.state) or 0 for part in parts), default=0)
        return tuple(part._replace(state=self.model.resize(part.state, room)) for part in parts)

    def _read_on(
        self, params: Params, prefix: Prefix, rests: list[np.ndarray], *, consume: bool
    ) -> Prefix:
        """Extend by `rests` of any lengths, each row at its own pace, in pieces of few sizes."""
        if not any(rest.size for rest in rests):
            return prefix
        count, own = len(rests), self._own(prefix, consume)
        at = np.zeros(own.length.shape[0], np.int64)
        left = np.zeros(len(at), np.int64)
        left[:count] = [rest.size for rest in rests]
        for size in PIECES:
            while (taken := left >= size).any():
                tokens = np.zeros((len(at), size), np.int32)
                for row in np.flatnonzero(taken):
                    tokens[row] = rests[row][at[row] : at[row] + size]
                own = self._advance(params, with_room(self.model, own, size), tokens, taken)
                at, left = at + size * taken, left - size * taken
        if count == len(at):
            return own
        return self._take_rows(own, np.arange(count, dtype=np.int32))

    def _own(self, prefix: Prefix, consume: bool) -> Prefix:
        """Copy a Prefix to be overwritten; repeated rows fill it up to a common size."""
        count = prefix.length.shape[0]
        if consume and count == round_rows(count):
            return prefix
        rows = np.minimum(np.arange(round_rows(count)), count - 1)
        return self._take_rows(prefix, rows.astype(np.int32))

    # Generating

    def _rows(self, prefix: Prefix, sampling: Sampling, max_new_tokens) -> list[_Row]:
        count = prefix.length.shape[0]
        budgets = [sampling.max_new_tokens] * count if max_new_tokens is None else max_new_tokens
        if len(budgets) != count:
            raise DataError(
                f"max_new_tokens must have one number a row. Got: {len(budgets)} for {count} rows."
            )
        return [_Row(self.tokenizer, sampling.stop, int(budget)) for budget in budgets]

    def _run(
        self,
        params: Params,
        prefix: Prefix,
        sampling: Sampling,
        rows: list[_Row],
        ids: Sequence[int] | None,
        every: int,
        *,
        consume: bool = False,
    ) -> Iterator[tuple[int, str | Generated]]:
        """Generate in blocks of `every` tokens until all rows are done: pieces and results."""
        own = self._own(prefix, consume)
        padding = [0] * (own.length.shape[0] - len(rows))
        ids = [*(range(len(rows)) if ids is None else ids), *padding]
        keys = self._row_keys(np.uint32(sampling.seed), np.asarray(ids, np.uint32))
        sampler = Sampler.of(sampling)
        for index, row in enumerate(rows):
            if row.finish_reason:
                yield index, row.result()
        while any(not row.finish_reason for row in rows):
            budgets = np.array([min(row.left, every) for row in rows] + padding, np.int32)
            own = with_room(self.model, own, BLOCK)
            tokens, own = self._decode(params, own, keys, sampler, budgets)
            tokens = np.asarray(tokens)[: len(rows)]
            self.decode_steps += int((tokens >= 0).sum(axis=1).max())
            for index, new in enumerate(tokens):
                if rows[index].finish_reason:
                    continue
                if piece := rows[index].push(new[new != -1]):
                    yield index, piece
                if rows[index].finish_reason:
                    yield index, rows[index].result()


class _Row:
    """The tokens and text of one row while it is generated."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], budget: int):
        self._tokenizer = tokenizer
        self._stream = TextStream(self._decode, stop)
        self._budget = budget
        self._tokens: list[int] = []
        self._pieces: list[str] = []
        self.finish_reason = "" if budget > 0 else "length"

    def _decode(self, ids: Sequence[int]) -> str:
        # The vocabulary of a model may be larger: its ids beyond the tokenizer's have no text.
        return self._tokenizer.decode([i for i in ids if i < self._tokenizer.vocab_size])

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return 0 if self.finish_reason else self._budget - len(self._tokens)

    def push(self, tokens: np.ndarray) -> str:
        """Take tokens until one ends the row; returns the text that became certain.

        Raises RunError where no token could be chosen.
        """
        pieces = []
        for token in map(int, tokens):
            if token == NOT_FINITE:
                raise not_finite(f"after {len(self._tokens)} new tokens")
            self._tokens.append(token)
            if token in self._tokenizer.end_ids:  # has no text
                self.finish_reason = "eos"
                break
            pieces.append(self._stream.push(token))
            if self._stream.stopped:
                self.finish_reason = "stop"
            elif len(self._tokens) == self._budget:
                self.finish_reason = "length"
            if self.finish_reason:
                break
        if self.finish_reason:
            pieces.append(self._stream.flush())
            if self._stream.stopped:  # by characters that were held back
                self.finish_reason = "stop"
        self._pieces += pieces
        return "".join(pieces)

    def result(self) -> Generated:
        """Return what was generated."""
        return Generated(tuple(self._tokens), "".join(self._pieces), self.finish_reason)
