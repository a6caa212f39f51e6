"""Log-probabilities of given tokens, many requests at a time.

Requests that begin alike share the work: the longest of them is a trunk, read by one forward pass,
and the others fork from its trace where they leave it (four answers to one question cost one pass
over the question). Shapes are rounded up, so that few programs are compiled. Requests of more than
MAX_BATCH_TOKENS are read in blocks, with memory that does not depend on their length.

Letters: B rows of a batch, T tokens of a row, R forks of a row, S tokens of a fork.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.evaluation.stream import Reader
from refine_jax.generation.sampling import not_finite
from refine_jax.models.head import TokenStats, next_token_loss
from refine_jax.models.transformer import Model, Params, Trace
from refine_jax.parallel import take_tokens

# A longer tail is a row of its own: a forward pass reads many tokens faster than a fork does.
MAX_FORK_TOKENS = 256
# Forks of a row that run at once; more take turns, from the same trace.
MAX_FORKS = 8
# Of a batch, padding included. What forks need of a token is kept while they run: 0.3 MB with
# LaCT-760M in bfloat16, 0.5 MB with DeltaNet-1.3B, 24 layers each.
MAX_BATCH_TOKENS = 16384

_SHORTEST_ROW, _SHORTEST_FORK = 32, 4


class Request(NamedTuple):
    """Tokens [n] int32, of which those after the first `context` >= 1 are to be scored."""

    tokens: np.ndarray
    context: int


class Score(NamedTuple):
    """Log-probability (nats) of the scored tokens; whether each of them is the likeliest."""

    log_prob: float
    is_greedy: bool


@dataclasses.dataclass
class Usage:
    """What scoring has cost so far.

    rows, row_tokens: rows read by forward passes and their tokens, without padding. forks,
    fork_tokens: continuations of such rows and the tokens they read beyond them. programs: shapes
    that were compiled.
    """

    requests: int = 0
    rows: int = 0
    row_tokens: int = 0
    forks: int = 0
    fork_tokens: int = 0
    programs: int = 0


@dataclasses.dataclass
class Trunk:
    """A request that is read whole, and those that leave it: (request, tokens they share)."""

    request: int
    forks: list[tuple[int, int]] = dataclasses.field(default_factory=list)


def find_trunks(requests: Sequence[Request]) -> list[Trunk]:
    """Choose requests that are read whole, and those that fork from them; longest trunks first.

    A request joins the trunk with which it shares most, if that holds its context (of more than
    the one token that texts without a context begin with) or half of its tokens, and at most
    MAX_FORK_TOKENS remain.
    """
    trunks: list[Trunk] = []
    # Big-endian bytes sort like the tokens; what shares most with a request is its neighbour.
    keys: list[bytes] = []
    by_key: list[Trunk] = []
    for index in sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens)):
        tokens, context = requests[index]
        key = np.asarray(tokens, ">u4").tobytes()
        place = bisect.bisect_left(keys, key)
        best, shared = None, 0
        for trunk in by_key[max(place - 1, 0) : place + 1]:
            common = _common_prefix(requests[trunk.request].tokens, tokens)
            if common > shared:
                best, shared = trunk, common
        holds_enough = 1 < context <= shared or 2 * shared >= len(tokens)
        if best is not None and holds_enough and len(tokens) - shared <= MAX_FORK_TOKENS:
            best.forks.append((index, shared))
        else:
            trunk = Trunk(index)
            trunks.append(trunk)
            keys.insert(place, key)
            by_key.insert(place, trunk)
    return trunks


class Scorer:
    """Scores requests with one model. `usage` counts what it did."""

    def __init__(self, model: Model, params: Params, *, batch_size: int = 8):
        """batch_size: most rows of a batch; long ones are fewer (MAX_BATCH_TOKENS)."""
        self.params, self.batch_size = params, batch_size
        self.usage = Usage()
        self._shapes: set[tuple] = set()
        self._reader = Reader(model, params)
        self._read = jax.jit(functools.partial(_read, model), static_argnames="with_trace")
        self._branch = jax.jit(functools.partial(_branch, model))

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Score]]:
        """Yield (index of a request, its score), in the order in which they are done.

        Raises:
          ValueError: A request has no context or no token to score.
          RunError: The model's predictions are not finite.
        """
        for index, (tokens, context) in enumerate(requests):
            if not 1 <= context < len(tokens):
                raise ValueError(
                    "a request needs a token of context and a token to score. "
                    f"Got: request {index} with {len(tokens)} tokens, context={context}."
                )
        trunks = find_trunks(requests)
        # Rows without forks apart, or a batch would keep a trace for one of them.
        trunks.sort(key=lambda trunk: bool(trunk.forks), reverse=True)
        first = 0
        while first < len(trunks):
            if len(requests[trunks[first].request].tokens) > MAX_BATCH_TOKENS:
                yield from self._score_long(requests, trunks[first])
                first += 1
                continue
            length = _round_up(len(requests[trunks[first].request].tokens) - 1, _SHORTEST_ROW)
            size = min(self.batch_size, max(1, MAX_BATCH_TOKENS // length))
            yield from self._score_batch(requests, trunks[first : first + size], (size, length))
            first += size
        self.usage.requests += len(requests)

    def _score_long(self, requests: Sequence[Request], trunk: Trunk) -> Iterator[tuple[int, Score]]:
        """Score what belongs to one trunk, read in blocks.

        The blocks that all of its requests share are read once.
        """
        block, trunk_tokens = self._reader.block, requests[trunk.request].tokens
        shared, before = 0, None
        if trunk.forks:
            common = min(len(trunk_tokens) - 1, *(count for _, count in trunk.forks))
            shared = common // block * block
        if shared:
            before = self._reader.read(trunk_tokens[None, : shared + 1])
        self._count("blocks")
        self.usage.rows += 1
        self.usage.row_tokens += len(trunk_tokens) - 1
        for index in (trunk.request, *(index for index, _ in trunk.forks)):
            tokens, context = requests[index]
            parts = []
            if before is not None:
                parts.append(
                    (before.nll[0, : len(tokens) - 1], before.correct[0, : len(tokens) - 1])
                )
            if len(tokens) - shared > 1:
                state = None if before is None else jax.tree.map(jnp.copy, before.state)
                rest = self._reader.read(tokens[None, shared:], state)
                parts.append((rest.nll[0], rest.correct[0]))
            if index != trunk.request:
                self.usage.forks += 1
                self.usage.fork_tokens += max(len(tokens) - shared - 1, 0)
            nll, correct = (np.concatenate(x)[context - 1 :] for x in zip(*parts, strict=True))
            yield index, _total(nll, correct)

    def _score_batch(
        self, requests: Sequence[Request], trunks: Sequence[Trunk], shape: tuple[int, int]
    ) -> Iterator[tuple[int, Score]]:
        """Score what belongs to some trunks, of which `shape` (B, T) holds all."""
        rows = [requests[trunk.request].tokens for trunk in trunks]
        tails = [self._tails(requests, trunk) for trunk in trunks]
        longest_tail = max((len(tail) for row in tails for _, _, tail in row), default=0)
        inputs, targets = np.zeros((2, *shape), np.int32)
        for row, tokens in enumerate(rows):
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, : len(tokens) - 1] = tokens[1:]
        with_trace = longest_tail > 1  # the first token of a tail is predicted by the trunk
        self._count(inputs.shape, with_trace)
        stats, hidden, trace = self._read(self.params, inputs, targets, with_trace=with_trace)
        nll, correct = np.asarray(stats.nll), np.asarray(stats.correct)
        self.usage.rows += len(rows)
        self.usage.row_tokens += sum(len(tokens) - 1 for tokens in rows)

        for row, trunk in enumerate(trunks):
            whole = (trunk.request, len(requests[trunk.request].tokens))
            contained = [(i, n) for i, n in trunk.forks if n == len(requests[i].tokens)]
            for index, end in (whole, *contained):
                span = np.s_[row, requests[index].context - 1 : end - 1]
                yield index, _total(nll[span], correct[span])
        most = max(map(len, tails))
        width = min(MAX_FORKS, _round_up(most, 2 if most > 1 else 1))
        for first in range(0, most, width):
            wave = [row[first : first + width] for row in tails]
            stats = self._score_forks(wave, width, hidden, trace)
            fork_nll, fork_correct = np.asarray(stats.nll), np.asarray(stats.correct)
            for row, forks in enumerate(wave):
                for fork, (index, start, tail) in enumerate(forks):
                    context = requests[index].context
                    before = np.s_[row, context - 1 : start - 1]
                    after = np.s_[row, fork, max(context - start, 0) : len(tail)]
                    losses = np.concatenate([nll[before], fork_nll[after]])
                    hits = np.concatenate([correct[before], fork_correct[after]])
                    yield index, _total(losses, hits)

    def _tails(self, requests, trunk: Trunk) -> list[tuple[int, int, np.ndarray]]:
        """List (request, tokens shared, tokens beyond) of the trunk's forks, longest first."""
        tails = [(i, start, requests[i].tokens[start:]) for i, start in trunk.forks]
        return sorted((t for t in tails if len(t[2])), key=lambda tail: -len(tail[2]))

    def _score_forks(self, wave, width: int, hidden: jax.Array, trace: Trace | None) -> TokenStats:
        """Compute statistics [B, R, S] of the tails of a wave."""
        longest = max(len(tail) for forks in wave for _, _, tail in forks)
        read = _round_up(longest - 1, _SHORTEST_FORK) if longest > 1 else 0
        starts = np.ones((hidden.shape[0], width), np.int32)
        tails = np.zeros((hidden.shape[0], width, read + 1), np.int32)
        for row, forks in enumerate(wave):
            for fork, (_, start, tail) in enumerate(forks):
                starts[row, fork] = start
                tails[row, fork, : len(tail)] = tail
                self.usage.forks += 1
                self.usage.fork_tokens += len(tail) - 1
        self._count(hidden.shape, tails.shape)
        return self._branch(self.params, hidden, trace if read else None, starts, tails)

    def _count(self, *shape) -> None:
        self._shapes.add(shape)
        self.usage.programs = len(self._shapes)


def _read(model: Model, params: Params, tokens, targets, *, with_trace: bool):
    """Predict `targets` [B, T], the tokens after `tokens`: statistics, hidden states, trace."""
    hidden, trace = model.forward(params, tokens, with_trace=with_trace)
    weights = jnp.zeros(targets.shape, jnp.float32)  # the sum is not wanted
    _, stats = next_token_loss(hidden, model.head(params), targets, weights)
    return stats, hidden, trace


def _branch(model: Model, params: Params, hidden, trace: Trace | None, starts, tails) -> TokenStats:
    """Predict `tails` [B, R, S], which follow the first `starts` [B, R] tokens: statistics."""
    predictors = take_tokens(hidden, starts - 1)[:, :, None]
    if trace is not None:
        states = model.forward_forks(params, trace, starts, tails[..., :-1])
        predictors = jnp.concatenate([predictors, states], axis=2)
    flat = tails.reshape(tails.shape[0], -1)
    _, stats = next_token_loss(
        predictors.reshape(*flat.shape, -1),
        model.head(params),
        flat,
        jnp.zeros(flat.shape, jnp.float32),
    )
    return jax.tree.map(lambda x: x.reshape(tails.shape), stats)


def _total(nll: np.ndarray, correct: np.ndarray) -> Score:
    """Sum up a request's score; raises RunError unless all predictions are finite."""
    total = float(np.sum(nll, dtype=np.float64))
    if not math.isfinite(total):
        raise not_finite(f"for one of {nll.size} tokens to score")
    return Score(-total, bool(np.all(correct)))


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    return int(np.argmax(differ)) if differ.any() else size


def _round_up(count: int, least: int) -> int:
    """Return the first of least, 1.5, 2, 3, 4, 6, ... times least that is enough."""
    size = least
    while size < count:
        if count <= size * 3 // 2:
            return size * 3 // 2
        size *= 2
    return size
