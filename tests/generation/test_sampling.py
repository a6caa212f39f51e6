"""How a token is chosen, and how tokens become text."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_jax.base.errors import ConfigError
from refine_jax.data.tokenizer import load_tokenizer
from refine_jax.generation import Sampler, Sampling, sample
from refine_jax.generation.sampling import keep_likeliest
from refine_jax.generation.text import TextStream

VOCAB = 12
run_sample = jax.jit(sample)
run_keep = jax.jit(keep_likeliest)
laws = settings(max_examples=60, deadline=None, derandomize=True)


def sampler(temperature=1.0, top_k=None, top_p=None):
    return Sampler.of(Sampling(temperature=temperature, top_k=top_k, top_p=top_p))


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def kept(z, top_k, top_p):
    """Ids that may be drawn from logits z [V], by plain Python."""
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))[: top_k or len(z)]
    weights = [math.exp(z[i] - z[order[0]]) for i in order]
    total, chosen = 0.0, []
    for i, weight in zip(order, weights, strict=True):
        if top_p is not None and total >= top_p:
            break
        chosen.append(i)
        total += weight / sum(weights)
    return chosen


@laws
@given(
    seed=st.integers(0, 999),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.floats(0.01, 1.0),
    ties=st.booleans(),
)
def test_top_k_and_top_p_keep_what_they_say(seed, top_k, top_p, ties):
    z = 2 * np.random.default_rng(seed).standard_normal((3, VOCAB)).astype(np.float32)
    z = np.round(z) if ties else z
    got = np.asarray(run_keep(z, sampler(top_k=top_k, top_p=top_p)))
    for before, after in zip(z.astype(np.float64), got, strict=True):
        ids = np.flatnonzero(np.isfinite(after))
        # A sum that equals top_p up to rounding may be cut on either side of it.
        near = [kept(before, top_k, None if top_p is None else top_p + d) for d in (-1e-6, 0, 1e-6)]
        assert sorted(ids) in [sorted(chosen) for chosen in near]
        np.testing.assert_array_equal(after[ids], before[ids])


def test_limits_of_sampling_are_greedy_and_plain_sampling():
    z = np.random.default_rng(0).standard_normal((64, VOCAB)).astype(np.float32)
    z[:8, 3] = z[:8, 7] = 9.0  # of equal ones the first
    best = z.argmax(-1)
    for setting in (
        sampler(0.0),
        sampler(1.0, top_k=1),
        sampler(5.0, top_p=1e-6),
    ):
        np.testing.assert_array_equal(run_sample(z, keys(64), setting), best)
    np.testing.assert_array_equal(run_sample(z[8:], keys(56), sampler(1e-30)), best[8:])
    plain = run_sample(z, keys(64), sampler())
    np.testing.assert_array_equal(plain, jax.vmap(jax.random.categorical)(keys(64), z))
    for setting in (sampler(top_k=VOCAB), sampler(top_k=99), sampler(top_p=1.0)):
        np.testing.assert_array_equal(run_sample(z, keys(64), setting), plain)


@pytest.mark.parametrize(
    "setting", [(1.0, None, None), (0.5, None, None), (2.0, 5, None), (1.5, 8, 0.8)]
)
def test_draws_have_the_distribution_that_is_left(setting):
    """Pearson's test on 20,000 draws; the bound is passed by chance once in 1,000 seeds."""
    temperature, top_k, top_p = setting
    z = np.random.default_rng(1).standard_normal(VOCAB)
    draws = run_sample(
        jnp.broadcast_to(jnp.asarray(z, jnp.float32), (20000, VOCAB)),
        keys(20000),
        sampler(*setting),
    )
    counts = np.bincount(draws, minlength=VOCAB)
    ids = kept(z / temperature, top_k, top_p)
    p = np.exp(z[ids] / temperature)
    expected = 20000 * p / p.sum()
    assert counts.sum() == counts[ids].sum()
    statistic = ((counts[ids] - expected) ** 2 / expected).sum()
    degrees = len(ids) - 1
    # Wilson and Hilferty's approximation of the 99.9 % quantile of chi square.
    bound = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < bound


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature must be .* at least 0. Got: temperature=-0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"top_k": 3}, "top_k must be None at temperature 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
        ({"stop": "\n"}, "stop must be"),
        ({"stop": ("a", "")}, "non-empty texts"),
        ({"seed": 2**32}, "seed must be"),
    ],
)
def test_sampling_refuses_what_cannot_work(fields, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**fields)


# Text


def stream(tokenizer, ids, stop=()):
    """Pieces after each token and at the end; the tokens that were taken."""
    made = TextStream(tokenizer.decode, stop)
    pieces = []
    for token in ids:
        pieces.append(made.push(token))
        if made.stopped:
            break
    return [*pieces, made.flush()], made.stopped


mistral = functools.cache(lambda: load_tokenizer("mistral-v1"))
texts = st.text("ab \n\t.é你😀\ufffd\x00", max_size=40)


@laws
@given(text=texts, noise=st.lists(st.integers(0, 255), max_size=12))
def test_pieces_of_bytes_are_the_text(text, noise):
    """Also of bytes that are no text: those of an unfinished character are held back."""
    tokenizer = load_tokenizer("bytes")
    ids = [*tokenizer.encode(text, bos=False), *noise, *tokenizer.encode(text, bos=False)]
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if not noise:
        assert all("�" not in piece for piece in pieces) or "�" in text


@laws
@given(text=texts, noise=st.lists(st.integers(0, 31999), max_size=12))
def test_pieces_of_sentencepiece_are_the_text(text, noise):
    """Also of any ids, single bytes and control tokens among them."""
    ids = [*mistral().encode(text, bos=False), *noise, *mistral().encode(text, bos=False)]
    ids = [int(i) for i in ids]
    pieces, _ = stream(mistral(), ids)
    assert "".join(pieces) == mistral().decode(ids)


@laws
@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    size=st.integers(1, 3),
)
def test_text_ends_before_the_first_stop_string(text, stop, size):
    """Tokens of up to `size` characters; a stop string ends the text with the token it ends in."""

    parts = [text[i : i + size] for i in range(0, len(text), size)]

    class Pieces:
        def decode(self, ids):
            return "".join(parts[i] for i in ids)

    count = len(parts)
    pieces, stopped = stream(Pieces(), range(count), stop)
    want = text
    for taken in range(1, count + 1):
        known = text[: taken * size]
        found = [known.find(s) for s in stop if s in known]
        if found:
            assert stopped and len(pieces) == taken + 1
            want = known[: min(found)]
            break
    else:
        assert not stopped
    assert "".join(pieces) == want
    if not stop:
        assert pieces[:count] == parts


def test_text_is_not_held_back_longer_than_needed():
    tokenizer = load_tokenizer("bytes")
    pieces, _ = stream(tokenizer, tokenizer.encode("a\né\n\nb", bos=False), stop=("\n\n",))
    assert pieces == ["a", "", "", "\né", "", "", ""]
