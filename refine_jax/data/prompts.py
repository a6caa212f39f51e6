"""Prompts with reference answers: rows of prompt + answer for post-training.

    corpus = load_prompts(data_options, prompt_options, tokenizer)
    for batch in corpus.dataset("train", batch_size=64):
        ...  # {"tokens", "segments", "answer_mask": [B, T] int32, "example": [B] int32}

A row is `bos prompt answer eos`, padded on the right. The prompt has at most T - A tokens (T:
`sequence_length`, A: `max_answer_tokens`); a longer one is cut in the middle or on the left. What
was cut or left out is counted in `PromptStatistics`. An answer is tokenised on its own, so that the
prompt's tokens are those of evaluations; SentencePiece begins it with a word boundary ("Answer:" is
followed by " 1066"), for other tokenizers the prompt should end with the space. Order, epochs,
resuming and the held-out split are those of `refine_jax.data.pipeline`.

With `messages_field` a record is a conversation (`refine_jax.data.conversations`): all before the
assistant's last answer is the prompt, whose earlier answers are trained on as well.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from refine_jax.base.errors import DataError
from refine_jax.data.conversations import Conversations
from refine_jax.data.formats import files_of
from refine_jax.data.pipeline import Batch, Dataset
from refine_jax.data.recall import RecallPrompts
from refine_jax.data.records import Records
from refine_jax.data.references import read_prompt, read_references
from refine_jax.data.rows import REASONS, UNREAD, make_rows
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.data.tokens import IndexBuilder, TokenStore, tokenize, unread
from refine_jax.sections import CUTS, DataConfig, PromptsConfig

BUCKETS = 4  # widths that batches may have, so that few programs are compiled


def cut_prompt(
    ids: np.ndarray, max_tokens: int, how: str = "middle", *, bos_id: int | None = None
) -> np.ndarray:
    """Cut the prompt `ids` [P] to exactly `max_tokens` tokens where it has more.

    how: "middle" keeps both ends in equal parts, the end the odd token: instructions and question
        stand there. "left" keeps the end.
    bos_id: beginning of sequence; if the prompt begins with it, a "left" cut keeps it as well.

    Raises ValueError: `max_tokens` is below 1 (below 2 where bos is kept), or `how` is unknown.
    """
    ids = np.asarray(ids)
    keeps_bos = how == "left" and bos_id is not None and len(ids) > 0 and ids[0] == bos_id
    if how not in CUTS:
        raise ValueError(f"how must be one of {CUTS}. Got: {how!r}.")
    if max_tokens < 1 + keeps_bos:
        raise ValueError(f"max_tokens must be at least {1 + keeps_bos}. Got: {max_tokens}.")
    if len(ids) <= max_tokens:
        return ids
    head = max_tokens // 2 if how == "middle" else int(keeps_bos)
    return np.concatenate([ids[:head], ids[len(ids) - (max_tokens - head) :]])


class PromptSource(Protocol):
    """Prompts with their answers by index; `fingerprint` changes when they do."""

    fingerprint: str

    def __len__(self) -> int:
        """Return the number of prompts."""

    def __getitem__(self, index: int) -> tuple[str, tuple[str, ...]]:
        """Return (prompt, reference answers); raises DataError if they cannot be read.

        A blank answer is none.
        """


class FilePrompts:
    """Prompts of parquet or JSON files; see `refine_jax.data.records`."""

    def __init__(
        self, options: DataConfig, prompts: PromptsConfig, *, alternatives: bool = True
    ) -> None:
        """Open the files; raises DataError where they are missing, broken or lack a column.

        alternatives: see `refine_jax.data.references.read_references`.
        """
        setting = options.setting
        files, kind = files_of(options.source, options.files, setting("source"), setting("files"))
        fields = {
            prompts.prompt_field: "prompts.prompt_field",
            prompts.answer_field: "prompts.answer_field",
        }
        if kind == "text":
            raise DataError(
                f"prompts come from parquet or jsonl files. Got: {files[0]} "
                f"(data.source={options.source!r})."
            )
        self._records = Records(files, fields)
        self._prompt, self._answer = prompts.prompt_field, prompts.answer_field
        self._alternatives = alternatives
        self.fingerprint = self._records.fingerprint

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[str, tuple[str, ...]]:
        """Return (prompt, reference answers); null is an empty prompt or no answer."""
        record = self._records[index]

        def where(field: str) -> Callable[[], str]:
            return lambda: f"{field!r} in {self._records.place(index)}"

        prompt = read_prompt(record[self._prompt], where(self._prompt))
        answers = read_references(
            record[self._answer], where(self._answer), alternatives=self._alternatives
        )
        return prompt or "", answers


@dataclasses.dataclass(frozen=True)
class PromptStatistics:
    """What became of the prompts. Counts are of one split, but for the first four.

    Attributes:
        records: prompts of the source.
        without_prompt: left out, as the prompt is blank.
        without_answer: left out, as no answer has text.
        answers_left_out: answers that are null or blank, of records that have others.
        prompts: prompts of this split.
        prompts_cut: how many of them were too long, and were cut.
        prompt_tokens_cut: tokens cut from them.
        longest_prompt: tokens of the longest one before cutting.
        answers_cut: answers that may be targets, were too long, and lost their end and the eos.
        longest_answer: tokens of the longest answer before cutting, with eos.
        untrained: tokens of earlier answers that are not trained on, as a row's answers have more
            than `max_answer_tokens`; of conversations.
        copies: prompts left out of this split, as they equal a held-out one.
        unread: records that were left out before they were tokenised, by reason; none of `records`.
    """

    records: int
    without_prompt: int
    without_answer: int
    answers_left_out: int
    prompts: int
    prompts_cut: int
    prompt_tokens_cut: int
    longest_prompt: int
    answers_cut: int
    longest_answer: int
    untrained: int = 0
    copies: int = 0
    unread: dict[str, int] = dataclasses.field(default_factory=dict)

    def summary(self) -> str:
        """Say in a line what a user must know."""
        parts = [f"{self.prompts:,} prompts, the longest of {self.longest_prompt:,} tokens"]
        if self.prompts_cut:
            parts.append(f"{self.prompts_cut:,} cut by {self.prompt_tokens_cut:,} tokens in all")
        if self.answers_cut:
            parts.append(
                f"{self.answers_cut:,} answers cut, the longest of {self.longest_answer:,} tokens "
                "(raise prompts.max_answer_tokens)"
            )
        if self.untrained:
            parts.append(
                f"{self.untrained:,} tokens of earlier answers not trained on "
                "(raise prompts.max_answer_tokens)"
            )
        for count, what in ((self.without_prompt, "a prompt"), (self.without_answer, "an answer")):
            if count:
                parts.append(f"{count:,} records without {what} left out")
        if self.answers_left_out:
            parts.append(f"{self.answers_left_out:,} empty answers left out")
        if self.copies:
            parts.append(f"{self.copies:,} {REASONS['copies']} left out")
        for reason, count in self.unread.items():
            parts.append(f"{count:,} records {UNREAD.get(reason, reason)} left out")
        return "; ".join(parts)


class PromptCorpus:
    """Tokenised prompts and answers; makes the data sets of both splits. Made by `load_prompts`.

    Attributes:
        answers: reference answers of each kept prompt; "example" in a batch is an index into it.
    """

    def __init__(
        self,
        options: DataConfig,
        prompts: PromptsConfig,
        tokenizer: Tokenizer,
        source: PromptSource | Conversations,
        *,
        seed: int = 0,
        validation_rows: int | None = None,
    ) -> None:
        """Tokenise; raises DataError where nothing can be trained on."""
        self._options = dataclasses.replace(options, min_tokens=1, chunking="first")
        self._prompts, self._tokenizer = prompts, tokenizer
        self._seed, self._validation_rows = seed, validation_rows
        if tokenizer.eos_id is None:
            raise DataError(
                f"the tokenizer {tokenizer.name} has no eos token, which ends every answer: set "
                f"{options.setting('tokenizer')} to another one."
            )
        if self.max_prompt_tokens < 2:
            raise DataError(
                "prompts.max_answer_tokens must leave at least two tokens of data.sequence_length "
                f"to the prompt. Got: max_answer_tokens={prompts.max_answer_tokens}, "
                f"sequence_length={options.sequence_length}."
            )
        self._read(source)

    @property
    def max_prompt_tokens(self) -> int:
        """T - A, the most tokens of a prompt in a row."""
        return self._options.sequence_length - self._prompts.max_answer_tokens

    def _read(self, source: PromptSource | Conversations) -> None:
        """Tokenise the records; keep those with a prompt and an answer."""
        self.answers: list[tuple[str, ...]] = []
        self._answer_ids: list[list[np.ndarray]] = []
        self._earlier: list[list[tuple[int, int]]] = []  # answers in the prompts of conversations
        self._without_prompt = self._without_answer = self._answers_left_out = 0
        tokens, index = [], IndexBuilder()
        read = self._conversations if isinstance(source, Conversations) else self._pairs
        for ids in read(source):
            index.add(ids)
            tokens.append(ids)
        self._unread = unread(source, self._options)
        if not tokens:
            raise DataError(
                f"no prompt with an answer in {self._options.source!r}: {self._without_prompt} of "
                f"{self._records} records have no prompt, {self._without_answer} no answer"
            )
        self._tokens = TokenStore(np.concatenate(tokens).astype(np.int32), index.finish())

    def _conversations(self, source: Conversations) -> Iterator[np.ndarray]:
        """Yield the prompts [P] of conversations."""
        self._records = min(len(source), self._options.limit_documents or len(source))
        for record in range(self._records):
            ids, answers, last = source[record]
            if not answers:
                self._without_answer += 1
            elif not answers[-1][0]:
                self._without_prompt += 1
            else:
                *earlier, (start, end) = answers
                self.answers.append((last,))
                self._answer_ids.append([ids[start:end]])
                self._earlier.append(earlier)
                yield ids[:start]

    def _pairs(self, source: PromptSource) -> Iterator[np.ndarray]:
        """Yield the prompts [P] of records with answers."""
        texts = _PromptTexts(source)
        unended = dataclasses.replace(self._options, add_eos=False)
        for record, ids in enumerate(tokenize(texts, self._tokenizer, unended)):
            answers = tuple(answer for answer in texts.answers[record] if answer.strip())
            if record in texts.blank:
                self._without_prompt += 1
            elif not answers:
                self._without_answer += 1
            else:
                self.answers.append(answers)
                self._answers_left_out += len(texts.answers[record]) - len(answers)
                yield ids
        self._records = len(texts.answers)
        flat = [answer for answers in self.answers for answer in answers]
        encoded = iter(self._tokenizer.encode_batch(flat, bos=False, eos=True))
        self._answer_ids = [[next(encoded) for _ in answers] for answers in self.answers]
        self._earlier = [[] for _ in self.answers]

    def dataset(self, split: str, batch_size: int, share: Sequence[int] | None = None) -> Dataset:
        """Return the batches of a split; see `refine_jax.data.pipeline.Corpus.dataset`.

        A prompt that occurs several times stands in one split only.

        Raises DataError: no rows, or a batch without rows.
        """
        table, made = make_rows(
            self._tokens.lengths, self._tokens.hashes, self._options, split, self._validation_rows
        )
        rows = PromptRows(
            self._tokens,
            [self._answer_ids[example] for example in table.document],
            [self._earlier[example] for example in table.document],
            table.document,
            self._options,
            self._prompts,
            self._tokenizer,
            self._seed,
        )
        return Dataset(
            rows,
            self._statistics(table.document, made.dropped_documents["copies"]),
            self._options,
            split,
            batch_size,
            share,
            seed=self._seed,
        )

    def _statistics(self, examples: np.ndarray, copies: int) -> PromptStatistics:
        lengths = self._tokens.lengths[examples]
        cut = np.maximum(lengths - self.max_prompt_tokens, 0)
        targets = 1 if self._prompts.target == "first" else None
        answers = np.array([len(ids) for e in examples for ids in self._answer_ids[e][:targets]])
        return PromptStatistics(
            records=self._records,
            without_prompt=self._without_prompt,
            without_answer=self._without_answer,
            answers_left_out=self._answers_left_out,
            prompts=len(examples),
            prompts_cut=int(np.count_nonzero(cut)),
            prompt_tokens_cut=int(cut.sum()),
            longest_prompt=int(lengths.max()),
            answers_cut=int(np.count_nonzero(answers > self._prompts.max_answer_tokens)),
            longest_answer=int(answers.max()),
            untrained=sum(map(self._untrained, examples)),
            copies=copies,
            unread=self._unread,
        )

    def _untrained(self, example: int) -> int:
        earlier = sum(end - start for start, end in self._earlier[example])
        room = self._prompts.max_answer_tokens - len(self._answer_ids[example][0])
        return min(earlier, max(earlier - room, 0))


class PromptRows:
    """Rows of prompt + answer by index, a `refine_jax.data.pipeline.RowSource`.

    {"tokens", "segments", "answer_mask": [T] int32, "example": int32}: segments are 1 at prompt and
    answer; answer_mask is 1 at the answer and its eos, and 2 at earlier answers in the prompt of a
    conversation; both are 0 at padding. example counts the prompts of the corpus; -1 in a row of
    padding.
    """

    full = False

    def __init__(
        self,
        prompts: TokenStore,
        answers: Sequence[Sequence[np.ndarray]],
        earlier: Sequence[Sequence[tuple[int, int]]],
        examples: np.ndarray,
        options: DataConfig,
        prompt_options: PromptsConfig,
        tokenizer: Tokenizer,
        seed: int,
    ) -> None:
        self._prompts, self._answers, self._examples = prompts, answers, examples
        self._earlier = earlier
        self._options, self._length = prompt_options, options.sequence_length
        self._seed = seed
        self._bos_id, self._pad_id = tokenizer.bos_id, tokenizer.pad_id
        digest = hashlib.blake2b(digest_size=8)
        for ids in (ids for alternatives in answers for ids in alternatives):
            digest.update(np.ascontiguousarray([len(ids), *ids], "<i4"))
        self.identity = (
            prompts.fingerprint,
            digest.hexdigest(),
            *([json.dumps(earlier)] if any(earlier) else []),
            examples.tolist(),
            self._length,
            json.dumps(dataclasses.asdict(prompt_options)),
        )

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Batch:
        """Return the row of prompt `index % N`, with its answer of epoch `index // N`."""
        epoch, number = divmod(index, len(self))
        example = int(self._examples[number])
        room = self._options.max_answer_tokens
        ids = self._prompts.read(example, 0, int(self._prompts.lengths[example]))
        first = 0 if len(ids) and ids[0] == self._bos_id else None
        kept = cut_prompt(np.arange(len(ids)), self._length - room, self._options.cut, bos_id=first)
        answer = self._choose(number, example, epoch)[:room]
        row, end = self.empty(), len(kept) + len(answer)
        row["tokens"][:end] = np.concatenate([ids[kept], answer])
        row["segments"][:end] = 1
        row["answer_mask"][: len(kept)] = self._earlier_answers(number, len(ids))[kept]
        surplus = np.count_nonzero(row["answer_mask"]) + len(answer) - room
        if surplus > 0:  # the ones that are next to the last answer stay
            row["answer_mask"][np.flatnonzero(row["answer_mask"])[:surplus]] = 0
        row["answer_mask"][len(kept) : end] = 1
        row["example"] = np.int32(example)
        return row

    def _earlier_answers(self, number: int, length: int) -> np.ndarray:
        """Mark the earlier answers in a prompt of `length` tokens by 2, [length] int32."""
        mask = np.zeros(length, np.int32)
        for start, end in self._earlier[number]:
            mask[start:end] = 2
        return mask

    def _choose(self, number: int, example: int, epoch: int) -> np.ndarray:
        alternatives = self._answers[number]
        if self._options.target == "first" or len(alternatives) == 1:
            return alternatives[0]
        generator = np.random.default_rng((self._seed, epoch, example))
        return alternatives[generator.integers(len(alternatives))]

    def empty(self) -> Batch:
        """Return a row of padding alone."""
        return {
            "tokens": np.full(self._length, self._pad_id, np.int32),
            "segments": np.zeros(self._length, np.int32),
            "answer_mask": np.zeros(self._length, np.int32),
            "example": np.int32(-1),
        }


class _PromptTexts:
    """The prompts of a source as texts, remembering the answers of those that were read."""

    def __init__(self, source: PromptSource) -> None:
        self._source = source
        self.answers: list[tuple[str, ...]] = []
        self.blank: set[int] = set()
        self.fingerprint = source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> str:
        prompt, answers = self._source[index]
        self.answers.append(answers)
        if not prompt.strip():
            self.blank.add(index)
        return prompt


def trimmed_width(batch: Batch) -> int:
    """Count the slots that a batch needs: one of `BUCKETS` widths, multiples of T / BUCKETS.

    Beyond them all rows are padding. Few widths, so that few programs are compiled; those of the
    parts of a batch that several processes read may differ.
    """
    length = batch["segments"].shape[1]
    used = int(np.max(np.nonzero(batch["segments"].any(axis=0))[0], initial=0)) + 1
    step = -(-length // BUCKETS)
    return min(-(-used // step) * step, length)


def trim_batch(batch: Batch, width: int) -> Batch:
    """Keep the first `width` slots of the arrays [B, T] of a batch."""
    return {name: x[:, :width] if x.ndim == 2 else x for name, x in batch.items()}


def load_prompts(
    options: DataConfig,
    prompts: PromptsConfig,
    tokenizer: Tokenizer,
    *,
    alternatives: bool = True,
    seed: int = 0,
    validation_rows: int | None = None,
) -> PromptCorpus:
    """Read and tokenise the prompts and answers of `options.source`.

    `source` is "recall" (`refine_jax.data.recall`: made up, nothing is read), or a parquet or jsonl
    file, a folder or a glob pattern. Of the other options, `files`, `limit_documents`, `add_bos`,
    `sequence_length`, `holdout`, `epochs` and `workers` count. `alternatives`: see
    `refine_jax.data.references.read_references`; `seed`, `validation_rows`: see `load_corpus`.

    Raises DataError: the source is missing, unreadable or empty, or lacks a field.
    """
    if options.source == "recall":
        if prompts.messages_field:
            raise DataError(
                "data.source='recall' has prompts and answers, not messages: set "
                f"prompts.messages_field=''. Got: {prompts.messages_field!r}."
            )
        room = options.sequence_length - prompts.max_answer_tokens
        source: PromptSource | Conversations = RecallPrompts(room, tokenizer, seed=seed)
    elif options.source == "stdlib" or options.source.startswith("tfds:"):
        raise DataError(
            f"data.source={options.source!r} has no prompts: use 'recall', or the path of parquet "
            "or jsonl files"
        )
    elif prompts.messages_field:
        source = Conversations(options, prompts.messages_field, tokenizer)
    else:
        source = FilePrompts(options, prompts, alternatives=alternatives)
    if len(source) == 0:
        raise DataError(f"data.source={options.source!r} holds no records")
    return PromptCorpus(
        options, prompts, tokenizer, source, seed=seed, validation_rows=validation_rows
    )
