"""Texts read in blocks: the losses of a whole forward pass, one program whatever their length."""

import functools

import jax
import numpy as np
import pytest
import tiny

from refine_jax.evaluation import by_position, scoring
from refine_jax.evaluation.by_position import measure, position_edges
from refine_jax.evaluation.scoring import Request, Scorer
from refine_jax.evaluation.stream import Reader
from refine_jax.refine.reading import read_rows

BLOCK = 16  # two of LaCT's chunks


@functools.partial(jax.jit, static_argnums=0)
def whole(model, params, tokens):
    stats = read_rows(model, params, {"tokens": tokens}, with_trace=False).stats
    return stats.nll[:, :-1], stats.correct[:, :-1]


@pytest.fixture
def compilations():
    """Programs compiled so far, as a list that grows."""
    names = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("family", ["lact", "deltanet", "gated_deltanet", "qwen"])
def test_equals_a_forward_pass_and_compiles_once(family, compilations):
    model, params = tiny.tiny(family)
    tokens = tiny.tokens(5, 2, 6 * BLOCK + 8)  # ends within a chunk
    reader = Reader(model, params, block=BLOCK)
    first = reader.read(tokens[:, : 2 * BLOCK + 1])  # whole blocks: may be continued
    compiled = len(compilations)
    rest = reader.read(tokens[:, 2 * BLOCK :], first.state)
    again = reader.read(tokens)
    reader.read(tokens[:, :7])
    grows = model.capacity(first.state) is not None  # by programs for other shapes, of few sizes
    assert grows or len(compilations) == compiled > 0
    nll, correct = whole(model, params, tokens)
    for got in (again.nll, np.concatenate([first.nll, rest.nll], axis=1)):
        np.testing.assert_allclose(got, nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(again.correct, correct)


@pytest.fixture
def short_blocks(monkeypatch):
    """What is long enough for blocks here."""
    for module in (by_position, scoring):
        monkeypatch.setattr(module, "Reader", functools.partial(Reader, block=BLOCK))


def test_positions_of_long_documents(short_blocks, monkeypatch):
    """Packed, padded and single ones, against one forward pass over the rows."""
    model, params = tiny.tiny("lact")
    tokens = tiny.tokens(6, 3, 60)
    segments = np.zeros_like(tokens)
    segments[0] = 1
    segments[1, 3:30], segments[1, 30:] = 1, 2
    segments[2, :1], segments[2, 5:50] = 1, 2
    rows, edges = [{"tokens": tokens, "segments": segments}], position_edges(60)
    expected = measure(model, params, rows, edges, max_documents=2)
    monkeypatch.setattr(by_position, "WHOLE_TOKENS", 100)
    monkeypatch.setattr(by_position, "_predict", None)
    (all_, buckets), (want, want_buckets) = measure(model, params, rows, edges), expected
    for got, other in zip((all_, *buckets), (want, *want_buckets), strict=True):
        assert (got.first, got.tokens, got.documents) == (
            other.first,
            other.tokens,
            other.documents,
        )
        np.testing.assert_allclose(got.loss.mean, other.loss.mean, rtol=1e-5)
        assert got.accuracy.mean == pytest.approx(other.accuracy.mean, abs=1e-9)


def test_long_requests(short_blocks, monkeypatch):
    """With and without what they share, against forward passes over each."""
    model, params = tiny.tiny("deltanet")
    trunk = tiny.tokens(7, 70)
    requests = [
        Request(tokens.astype(np.int32), context)
        for tokens, context in (
            (trunk, 50),
            (np.append(trunk[:60], [4, 5]), 50),
            (trunk[: 3 * BLOCK], 20),  # ends with a block
            (trunk[:60], 1),
            (tiny.tokens(8, 66), 1),
        )
    ]
    expected = dict(Scorer(model, params).score(requests))
    monkeypatch.setattr(scoring, "MAX_BATCH_TOKENS", 64)
    scorer = Scorer(model, params)
    monkeypatch.setattr(scorer, "_read", None)
    found = dict(scorer.score(requests))
    assert found.keys() == expected.keys()
    for index, score in expected.items():
        np.testing.assert_allclose(found[index].log_prob, score.log_prob, rtol=1e-5)
        assert found[index].is_greedy == score.is_greedy
    assert (scorer.usage.rows, scorer.usage.programs) == (2, 1)
