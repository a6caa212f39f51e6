"""Log-probabilities of requests, against the golden logits and a numpy implementation."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import load_arrays, require
from plain_deltanet import PlainDeltaNet

from refine_jax import lm_harness
from refine_jax.checkpoint.hf import read_hf
from refine_jax.evaluation.scoring import MAX_FORK_TOKENS, Request, Scorer, find_trunks
from refine_jax.models.config import model_config
from refine_jax.models.head import TokenStats
from refine_jax.models.transformer import Model


@functools.cache
def golden_model(folder: str):
    loaded = read_hf(require(folder))
    return Model(model_config(loaded.config)), jax.tree.map(jnp.asarray, loaded.params)


@functools.cache
def plain() -> PlainDeltaNet:
    return PlainDeltaNet(require("deltanet_base"))


def request(tokens, context: int) -> Request:
    return Request(np.asarray(tokens, np.int32), context)


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def scores_in_order(scorer: Scorer, requests):
    got = dict(scorer.score(requests))
    assert sorted(got) == list(range(len(requests)))
    return [got[i] for i in range(len(requests))]


def assert_scores(got, want):
    log_probs = [score.log_prob for score in got]
    np.testing.assert_allclose(log_probs, [log_prob for log_prob, _ in want], rtol=0, atol=1e-4)
    assert [score.is_greedy for score in got] == [greedy for _, greedy in want]


@pytest.mark.parametrize("folder", ["lact_base", "deltanet_base"])
def test_scores_are_those_of_the_golden_logits(folder):
    golden = load_arrays(folder, "expected.npz")
    requests, want = [], []
    for length in (33, 77):  # LaCT's chunks are 16 tokens
        for tokens, z in zip(
            golden[f"L{length}/input_ids"], golden[f"L{length}/logits"], strict=True
        ):
            table = log_softmax(z)
            for context, end in ((1, length), (length // 2, length), (length // 2, length - 3)):
                scored = tokens[context:end]
                chosen = table[np.arange(context - 1, end - 1), scored]
                requests.append(request(tokens[:end], context))
                greedy = np.array_equal(table[context - 1 : end - 1].argmax(-1), scored)
                want.append((chosen.sum(), greedy))
            # Every token, likely or not, after one context: among them the likeliest.
            for token in range(0, 97, 12):
                requests.append(request([*tokens[:-1], token], length - 1))
                want.append((table[-2, token], token == table[-2].argmax()))
            likeliest = int(table[-2].argmax())
            requests.append(request([*tokens[:-1], likeliest], length - 1))
            want.append((table[-2, likeliest], True))
    for prefix in (23, 40):
        tokens = np.concatenate([golden[f"cont/prefix{prefix}"], golden[f"cont/tokens{prefix}"]])
        log_probs = golden[f"cont/logprobs{prefix}"]
        requests.append(request(tokens, prefix))
        want.append((log_probs.sum(), False))
    for j in range(2):
        prompt, greedy = golden[f"greedy/prompt{j}"], golden[f"greedy/tokens{j}"]
        requests.append(request([*prompt, *greedy], len(prompt)))
        want.append((None, True))
    scorer = Scorer(*golden_model(folder), batch_size=4)
    got = scores_in_order(scorer, requests)
    assert [score.is_greedy for score in got[-2:]] == [True, True]
    assert_scores(got[:-2], want[:-2])
    assert sum(greedy for _, greedy in want) >= 6
    assert scorer.usage.rows == 8  # two rows of each length, two prefixes, two prompts


def test_forks_at_every_kind_of_place():
    """Shared contexts, tails of every length, forks inside context or continuation, copies."""
    random = np.random.default_rng(0)
    trunk = random.integers(0, 97, 70)
    requests = [request(trunk, 40)]
    for tail in (1, 2, 5, 6, 9, 20, 30):
        requests.append(request([*trunk[:40], *random.integers(0, 97, tail)], 40))
    requests += [
        request(trunk, 40),  # a copy
        request(trunk[:50], 40),  # contained in the trunk
        request(trunk[:50], 12),  # the same tokens, other context
        request([*trunk[:45], 3, 5], 40),  # leaves within the continuation
        request([*trunk[:30], 3, 5, 7, 9], 32),  # leaves within the context
        request([*trunk[:40], *plain().greedy(trunk[:40], 6)], 40),
        request([trunk[0], 4], 1),
        request(random.integers(0, 97, 33), 1),
    ]
    scorer = Scorer(*golden_model("deltanet_base"), batch_size=2)
    want = [plain().score(list(r.tokens), r.context) for r in requests]
    assert sum(greedy for _, greedy in want) == 1
    assert_scores(scores_in_order(scorer, requests), want)
    usage = scorer.usage
    assert usage.requests == len(requests)
    assert (usage.rows, usage.row_tokens) == (2, 69 + 32)
    tails = [1, 2, 5, 6, 9, 20, 30, 2, 4, 6, 1]
    assert (usage.forks, usage.fork_tokens) == (len(tails), sum(tails) - len(tails))


def test_plain_deltanet_is_the_golden_one():
    golden = load_arrays("deltanet_base", "expected.npz")
    for tokens, z in zip(golden["L77/input_ids"], golden["L77/logits"], strict=True):
        np.testing.assert_allclose(plain().log_probs(tokens), log_softmax(z), atol=5e-5)


def test_trunks():
    def shape(*requests):
        return [(t.request, sorted(t.forks)) for t in find_trunks([request(*r) for r in requests])]

    a, b = list(range(50)), list(range(100, 150))
    question = [*a, 1, 2]
    # Answers to one question: the longest is the trunk, whatever the order.
    assert shape((question, 50), ([*a, 7, 8, 9], 50), ([*b, 1], 50)) == [(1, [(0, 50)]), (2, [])]
    # Half of the tokens are enough, without the context.
    assert shape((a, 45), ([*a[:25], *b[:25]], 45)) == [(0, [(1, 25)])]
    assert shape((a, 45), ([*a[:24], *b[:26]], 45)) == [(0, []), (1, [])]
    # A short context counts as a whole; the one token of empty contexts does not.
    assert shape(([1, 2, *a], 2), ([1, 2, *b], 2)) == [(0, [(1, 2)])]
    assert shape(([1, *a], 1), ([1, *b], 1)) == [(0, []), (1, [])]
    # Long continuations are rows of their own.
    long = list(range(200, 201 + MAX_FORK_TOKENS))
    assert len(shape(([*a, *long], 50), ([*a, 5, *long[1:]], 50))) == 2


def test_requests_without_context_or_target_are_refused():
    scorer = Scorer(None, None)
    for tokens, context in (([1, 2], 0), ([1, 2], 2)):
        with pytest.raises(ValueError, match=f"request 1 with 2 tokens, context={context}"):
            next(scorer.score([request([1, 2], 1), request(tokens, context)]))


def test_the_command_says_that_lm_eval_is_missing(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "refine_jax.evaluation.harness", raising=False)
    monkeypatch.delattr("refine_jax.evaluation.harness", raising=False)
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.instance"):
        monkeypatch.setitem(sys.modules, name, None)
    assert lm_harness.main(["--checkpoint=none", "--tasks=none"]) == 1
    assert "pip install 'refine-jax[eval]'" in capsys.readouterr().err


def test_few_programs_and_no_row_read_twice(monkeypatch):
    """2,000 questions with four answers each, as the shapes of a benchmark: nothing is computed."""
    random = np.random.default_rng(0)
    requests = []
    for _ in range(2000):
        question = random.integers(0, 97, random.integers(20, 120))
        for _ in range(4):
            answer = random.integers(0, 97, random.integers(5, 60))
            requests.append(request([*question, *answer], len(question)))
    scorer = Scorer(None, None, batch_size=32)
    computed = 0

    def read(params, tokens, targets, with_trace):
        nonlocal computed
        computed += tokens.size
        return TokenStats(*np.zeros((3, *tokens.shape))), np.zeros((*tokens.shape, 0)), None

    def branch(params, hidden, trace, starts, tails):
        nonlocal computed
        computed += tails[..., 1:].size
        return TokenStats(*np.zeros((3, *tails.shape)))

    monkeypatch.setattr(scorer, "_read", read)
    monkeypatch.setattr(scorer, "_branch", branch)
    assert len(dict(scorer.score(requests))) == 8000
    usage = scorer.usage
    assert (usage.rows, usage.forks) == (2000, 6000)
    assert usage.programs <= 12
    alone = sum(len(r.tokens) - 1 for r in requests)
    assert usage.row_tokens + usage.fork_tokens < alone / 2
    assert computed < 0.85 * alone  # with all padding, still fewer than one row a request
