"""Next-token loss and accuracy by position: how much a model gains from a longer context.

`refine_jax.evaluation.position` is the command.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from scipy.special import stdtrit

from refine_jax.base.errors import DataError, RunError
from refine_jax.config import DataConfig
from refine_jax.evaluation.stream import Reader
from refine_jax.generation import load
from refine_jax.models.transformer import Model, Params
from refine_jax.refine.reading import read_rows

# Tokens of a batch that one forward pass reads, faster than blocks.
WHOLE_TOKENS = 65536
MOST_BUCKETS = 10_000
MOST_ROWS = 65536
_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over tokens with its 95 % interval; None where one document says nothing of it.

    The interval is that of other documents of the same kind: tokens of one document are not
    independent, so documents are what is counted (ratio estimator, Student's t).
    """

    mean: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Predictions from `first` to `last` tokens of context.

    loss: nats a token. accuracy: fraction of tokens that are the likeliest.
    """

    first: int
    last: int
    tokens: int
    documents: int
    loss: Mean
    accuracy: Mean


def position_edges(length: int, spacing: str = "log", count: int | None = None) -> np.ndarray:
    """Choose edges [K + 1] of buckets for documents of `length` tokens: contexts 1 .. length - 1.

    Bucket k holds the contexts edges[k] <= n < edges[k + 1]. spacing: "log" (equal ratios) or
    "linear" (equal widths). count: buckets, fewer where they would be empty; None: one an octave of
    "log", 16 of "linear".

    Raises DataError: an option that cannot work.
    """
    if spacing not in ("log", "linear"):
        raise DataError(f"spacing must be log or linear. Got: {spacing!r}.")
    if length < 2 or (count is not None and not 1 <= count <= MOST_BUCKETS):
        raise DataError(
            f"buckets need at least 1 of them, at most {MOST_BUCKETS:,}, and 2 tokens. "
            f"Got: buckets={count}, tokens={length}."
        )
    if spacing == "log":
        count = count or int(np.ceil(np.log2(length)))
        edges = np.geomspace(1, length, count + 1)
    else:
        edges = np.linspace(1, length, (count or 16) + 1)
    return np.unique(np.rint(edges).astype(np.int64))


def measure(
    model: Model,
    params: Params,
    batches: Iterable[Mapping[str, np.ndarray]],
    edges: np.ndarray,
    *,
    max_documents: int = 1,
) -> tuple[Bucket, list[Bucket]]:
    """Measure loss and accuracy over all positions, and by position.

    batches: {"tokens": [B, T] int32, "segments": [B, T] int32} of one shape, as the data pipeline
    gives them: segment 0 is padding, each run of another number a document, of which a row has at
    most `max_documents`. edges: [K + 1], of `position_edges`. Buckets without tokens are left out.

    Raises:
      DataError: There is no token to predict.
      ValueError: a document is longer than the edges allow.
    """
    # Per document and bucket: tokens, and the sums of losses and of hits.
    columns = [np.zeros((0, 3, len(edges) - 1))]
    reader = Reader(model, params)
    for batch in batches:
        tokens, segments = (np.asarray(batch[name]) for name in ("tokens", "segments"))
        if tokens.size > WHOLE_TOKENS:
            results = _read(reader, tokens, segments)
        else:
            rows = {"tokens": tokens, "segments": segments}
            results = map(np.asarray, _predict(model, params, rows, max_documents))
        columns.append(_sum_documents(*results, segments, edges))
    sums = np.concatenate(columns)
    if not sums[:, 0].any():
        raise DataError("there is no token to predict: no document has two tokens.")
    whole = _bucket(1, int(edges[-1]) - 1, sums.sum(axis=2))
    buckets = [
        _bucket(int(edges[k]), int(edges[k + 1]) - 1, sums[:, :, k])
        for k in range(len(edges) - 1)
        if sums[:, 0, k].any()
    ]
    return whole, buckets


@functools.partial(jax.jit, static_argnames=("model", "max_documents"))
def _predict(model: Model, params: Params, rows: Mapping[str, jax.Array], max_documents: int):
    """Compute losses, hits, weights (1 at predictions) and tokens of context: [B, T] each."""
    trunk = read_rows(model, params, rows, with_trace=False, max_documents=max_documents)
    return trunk.stats.nll, trunk.stats.correct, trunk.weights, trunk.layout.position + 1


def _read(reader: Reader, tokens: np.ndarray, segments: np.ndarray):
    """Do what `_predict` does, by blocks: as many documents at a time as there are rows."""
    nll, correct, weights = np.zeros((3, *tokens.shape), np.float32)
    context = np.zeros(tokens.shape, np.int32)
    edges = np.diff(segments, axis=1, prepend=0, append=0) != 0
    documents = []
    for row, borders in enumerate(edges):
        slots = np.flatnonzero(borders)
        spans = [np.s_[row, a:b] for a, b in itertools.pairwise(slots) if segments[row, a]]
        documents += [span for span in spans if tokens[span].size > 1]
    documents.sort(key=lambda span: -tokens[span].size)
    for first in range(0, len(documents), len(tokens)):
        group = documents[first : first + len(tokens)]
        texts = np.zeros((len(tokens), tokens[group[0]].size), np.int32)
        for text, span in zip(texts, group, strict=False):
            text[: tokens[span].size] = tokens[span]
        stats = reader.read(texts)
        for row, span in enumerate(group):
            count = tokens[span].size - 1
            predicted = np.s_[span[0], span[1].start : span[1].stop - 1]
            nll[predicted], correct[predicted] = stats.nll[row, :count], stats.correct[row, :count]
            weights[predicted] = 1
            context[predicted] = 1 + np.arange(count)
    return nll, correct, weights, context


def _sum_documents(nll, correct, weights, context, segments, edges) -> np.ndarray:
    """Sum tokens, losses and hits of a batch's documents by bucket: [documents, 3, K] float64."""
    predicted = weights > 0
    starts = np.diff(segments, axis=1, prepend=0) != 0
    document = np.cumsum(starts & (segments > 0)).reshape(segments.shape) - 1
    context = context[predicted]
    if context.size and context.max() >= edges[-1]:
        raise ValueError(
            f"a document predicts from {context.max()} tokens, the last edge is {edges[-1]}."
        )
    shape = int(document.max()) + 1, len(edges) - 1
    bucket = np.searchsorted(edges, context, side="right") - 1
    index = document[predicted] * shape[1] + bucket
    sums = [
        np.bincount(index, weights=values, minlength=shape[0] * shape[1]).reshape(shape)
        for values in (
            np.ones(context.size),
            nll[predicted].astype(np.float64),
            correct[predicted].astype(np.float64),
        )
    ]
    return np.stack(sums, axis=1)


def _bucket(first: int, last: int, sums: np.ndarray) -> Bucket:
    """Make a bucket from sums [documents, 3] of tokens, losses and hits."""
    sums = sums[sums[:, 0] > 0]
    tokens, losses, hits = sums.T
    return Bucket(
        first,
        last,
        int(tokens.sum()),
        len(sums),
        _mean(losses, tokens),
        _mean(hits, tokens, most=1.0),
    )


def _mean(values: np.ndarray, tokens: np.ndarray, most: float = math.inf) -> Mean:
    """Sum of `values` over sum of `tokens`, both [documents]; a mean is from 0 to `most`."""
    mean, count = float(values.sum() / tokens.sum()), len(tokens)
    if count < 2:
        return Mean(mean, None, None)
    # Cochran, Sampling Techniques (1977), section 6.3: the variance of a ratio of two sums.
    residuals = values - mean * tokens
    deviation = np.sqrt(count / (count - 1) * np.sum(residuals**2)) / tokens.sum()
    half = float(stdtrit(count - 1, (1 + _CONFIDENCE) / 2) * deviation)
    return Mean(mean, max(0.0, mean - half), min(most, mean + half))


def evaluate(
    checkpoint: str,
    options: DataConfig,
    *,
    step: int | str = "latest",
    spacing: str = "log",
    buckets: int | None = None,
    batch_size: int = 4,
) -> dict:
    """Apply `measure` to a checkpoint on the documents of `options`; returns JSON values.

    The tokenizer `checkpoint` of the options is that of the checkpoint. With a holdout, its
    documents alone are read, those that a run with the same options does not train on.

    Raises:
      CheckpointError, ModelConfigError: No checkpoint of a model.
      DataError: No documents, or options that cannot work.
      RunError: The model's predictions are not finite.
    """
    from refine_jax.data.pipeline import load_corpus  # grain takes seconds to import

    edges = position_edges(options.sequence_length, spacing, buckets)
    if not 1 <= batch_size <= MOST_ROWS:
        raise DataError(f"batch_size must be from 1 to {MOST_ROWS:,}. Got: {batch_size}.")
    name = None if options.tokenizer == "checkpoint" else options.tokenizer
    model, params, tokenizer = load(checkpoint, step=step, tokenizer=name, compute_dtype=None)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise DataError(
            f"the tokenizer {tokenizer.name} has more tokens than the model's vocabulary. "
            f"Got: {tokenizer.vocab_size}, vocab_size={model.config.vocab_size}."
        )
    bos = options.add_bos and tokenizer.bos_id is not None  # no flag says it
    # All documents are read at first: how many there are is among the results.
    options = dataclasses.replace(options, tokenizer=tokenizer.name, add_bos=bos, stream=False)
    split = "validation" if options.holdout else "train"
    dataset = load_corpus(options, tokenizer).dataset(split, batch_size)
    started = time.perf_counter()
    whole, parts = measure(model, params, dataset, edges)
    if not math.isfinite(whole.loss.mean):
        raise RunError(
            f"the predictions of {checkpoint} are not finite (NaN or infinite): its parameters are "
            "damaged, or training has diverged. Choose another checkpoint or step."
        )
    return {
        "checkpoint": str(checkpoint),
        "source": options.source,
        "sequence_length": options.sequence_length,
        "spacing": spacing,
        "compute_dtype": model.policy.compute_dtype,
        "seconds": time.perf_counter() - started,
        "data": dataclasses.asdict(dataset.statistics),
        "all": dataclasses.asdict(whole),
        "buckets": [dataclasses.asdict(part) for part in parts],
    }
