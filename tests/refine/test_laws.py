"""Laws of selection, rewards, advantages and policy loss; their golden tests are elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from goldens.refine_rl import (
    brute_force_valid,
    chi_square_p_value,
    draw,
    loss_and_gradient,
    normalize,
    select,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_jax.refine import grpo, rewards, selection

TOLERANCE = {"rtol": 0, "atol": 1e-5}


# Drawing


def test_temperature_sharpens_the_draws():
    entropy = np.random.default_rng(2).uniform(0, 2, 60).astype(np.float32)
    mask = np.ones(60, bool)
    options = {"num_positions": 3, "rollout_length": 1, "method": "entropy"}
    logits = entropy.reshape(3, 20) / 0.5
    probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
    for temperature, fits in ((0.5, True), (1.0, False)):
        chosen = draw(entropy, mask, 4000, temperature=temperature, **options).chosen
        draws = np.asarray(chosen) - np.array([0, 20, 40])
        assert (chi_square_p_value(draws, probabilities, 20) > 1e-5) == fits


def test_spans_of_a_row_are_drawn_independently():
    mask = np.ones(8, bool)
    options = {"num_positions": 2, "rollout_length": 1, "method": "uniform"}
    draws = np.asarray(draw(np.zeros(8), mask, 8000, **options).chosen)
    table = np.histogram2d(draws[:, 0], draws[:, 1] - 4, bins=4)[0]
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-5


def test_a_draw_depends_on_its_own_key_only():
    keys = jax.random.split(jax.random.key(3), 6)
    entropy = np.random.default_rng(3).uniform(0, 2, (6, 50)).astype(np.float32)
    mask = np.ones((6, 50), bool)
    options = {"num_positions": 4, "rollout_length": 3, "method": "entropy", "edge_margin": 2}
    together = select(keys, entropy, mask, **options)
    alone = [select(keys[i:][:2], entropy[i:][:2], mask[i:][:2], **options) for i in (0, 2, 4)]
    parts = jax.tree.map(lambda *x: np.concatenate(x), *alone)
    jax.tree.map(np.testing.assert_array_equal, together, parts)


# Selection


@st.composite
def packed_rows(draw_from, batch=3, num_tokens=64):
    """Segments [B, T]: 0 is padding, anywhere; documents numbered in order."""
    segments = np.zeros((batch, num_tokens), np.int32)
    for row in segments:
        at = 0
        documents = draw_from(
            st.lists(st.tuples(st.integers(0, 9), st.integers(0, 64)), max_size=4)
        )
        for number, (pad, length) in enumerate(documents, start=1):
            row[at + pad : at + pad + length] = number
            at += pad + length
    return segments


@settings(max_examples=30, deadline=None)
@given(packed_rows(), st.sampled_from(selection.SELECTIONS), st.integers(0, 2**31 - 1))
def test_every_valid_position_has_its_truth(segments, method, seed):
    rng = np.random.default_rng(seed)
    batch, num_tokens = segments.shape
    c, k, margin = 4, 5, 8
    mask = segments != 0
    entropy = rng.uniform(0, 5, segments.shape).astype(np.float32)
    known = {}
    if method == "variance":
        known = {"probabilities": entropy / 5, "counted": rng.random(segments.shape) < 0.5}
    got = select(
        jax.random.split(jax.random.key(seed), batch),
        entropy,
        mask,
        **known,
        num_positions=c,
        rollout_length=k,
        method=method,
        edge_margin=margin,
        document=np.maximum.accumulate(segments, axis=1),
    )
    got = jax.tree.map(np.asarray, got)
    assert ((got.starts >= 1) & (got.starts <= num_tokens - k)).all()
    count = mask.sum(axis=1)
    np.testing.assert_array_equal(got.chosen >= 0, np.broadcast_to(count[:, None] >= c, (batch, c)))
    for row in range(batch):
        real = np.flatnonzero(mask[row])
        size = real.size // c
        if size == 0:
            assert not got.valid[row].any()
            continue
        lower, upper = real[0] + margin, real[-1] + 1 - margin
        expected = np.minimum(np.maximum(got.chosen[row] + 1, lower), upper)
        document = np.maximum.accumulate(segments[row])
        valid = brute_force_valid(expected[None], mask[row, None], document[None], k)[0]
        np.testing.assert_array_equal(got.valid[row], valid)
        np.testing.assert_array_equal(got.starts[row][valid], expected[valid])
        for j in range(c):
            span = real[j * size : (j + 1) * size]
            # Slots whose rollout has a truth, or all where none has.
            at = np.minimum(np.maximum(span + 1, lower), upper)
            has = brute_force_valid(at[None], mask[row, None], document[None], k)[0]
            assert got.valid[row, j] == has.any()
            allowed = span[has] if has.any() else span
            assert got.chosen[row, j] in allowed
            if method in ("argmax", "argmin"):
                best = getattr(np, method)(entropy[row, allowed])
                assert got.chosen[row, j] == allowed[best]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 80), st.integers(0, 80), st.integers(0, 2**31 - 1))
def test_padding_on_either_side_shifts_the_positions(length, left, seed):
    left = min(left, 80 - length)
    entropy = np.random.default_rng(seed).uniform(0, 5, length).astype(np.float32)
    rows = np.zeros((2, 80), np.float32)
    mask = np.zeros((2, 80), bool)
    for row, start in enumerate((0, left)):
        rows[row, start : start + length] = entropy
        mask[row, start : start + length] = True
    keys = jax.random.split(jax.random.key(0), 2)
    got = select(keys, rows, mask, num_positions=4, rollout_length=5, method="argmax")
    np.testing.assert_array_equal(*np.asarray(got.valid))
    starts = np.asarray(got.starts) - np.array([[0], [left]])
    np.testing.assert_array_equal(*np.where(got.valid, starts, -1))


def test_ties_go_to_the_first():
    mask = np.ones((1, 60), bool)
    for method in ("argmax", "argmin"):
        got = draw(np.zeros(60), mask[0], 1, num_positions=3, rollout_length=5, method=method)
        np.testing.assert_array_equal(got.chosen, [[0, 20, 40]])


def test_unknown_names_are_refused():
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="Got: 'max'"):
        selection.selection_scores(x, 5, "max")
    with pytest.raises(ValueError, match="Got: 'dot'"):
        rewards.token_rewards("dot", x, x, x, x).mean(-1)
    with pytest.raises(ValueError, match="Got: 'batch'"):
        grpo.group_advantages(x[None], x[None] == 0, grouping="batch")
    with pytest.raises(ValueError, match="Got: 'mean'"):
        grpo.policy_loss(x, x, x, x, aggregation="mean")
    with pytest.raises(ValueError, match="Got: 'k3'"):
        grpo.kl_penalty(x, x, "k3")


# Rewards


def test_a_truth_stands_against_several_rollouts():
    """Leading axes broadcast: [c, n, k, D] rollouts against [c, 1, k, D] truths."""
    rng = np.random.default_rng(0)
    hidden, truth = np.float32(rng.normal(size=(2, 4, 5, 16)))
    tokens, true_tokens = rng.integers(0, 3, (2, 4, 5))
    repeat = functools.partial(np.repeat, repeats=3, axis=1)
    hybrid = jax.jit(functools.partial(rewards.token_rewards, "hybrid"))
    got = hybrid(
        repeat(hidden[:, None]), truth[:, None], repeat(tokens[:, None]), true_tokens[:, None]
    ).mean(-1)
    alone = hybrid(hidden, truth, tokens, true_tokens).mean(-1)
    np.testing.assert_allclose(got, np.repeat(alone[:, None], 3, axis=1), **TOLERANCE)


def test_rewards_accumulate_in_float32():
    hidden = jax.random.normal(jax.random.key(0), (3, 5, 4096)).astype(jnp.bfloat16)
    tokens = jnp.zeros((3, 5), jnp.int32)
    run = jax.jit(functools.partial(rewards.token_rewards, "cosine"))
    got = run(hidden, hidden, tokens, tokens).mean(-1)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 1.0, **TOLERANCE)


# Advantages

GROUP = 6
group_values = st.lists(
    st.floats(-2, 2, width=32, allow_subnormal=False), min_size=GROUP, max_size=GROUP
)
group_mask = st.lists(st.booleans(), min_size=GROUP, max_size=GROUP)


@settings(max_examples=50, deadline=None)
@given(group_values, group_mask, st.booleans(), st.randoms(use_true_random=False))
def test_advantages_of_a_group(values, valid, normalize_std, random):
    values, valid = np.float32(values), np.array(valid)
    got = np.asarray(normalize(values, valid, normalize_std=normalize_std))
    members = values[valid].astype(np.float64)
    expected = members
    if len(members) > 1:
        expected = members - members.mean()
        std = members.std(ddof=1)
    else:
        std = 1.0
    if normalize_std:
        expected = expected / (std + 1e-6)
    # Rounding of the rewards (ulp of 2) is divided by the std in both.
    scale = max(std, 1e-6) if normalize_std else 1.0
    np.testing.assert_allclose(got[valid], expected, rtol=1e-4, atol=1e-6 / scale)
    assert not got[~valid].any()
    if len(members) > 1:
        np.testing.assert_allclose(got.sum(), 0.0, atol=4e-6 / scale)
    # What is not valid has no influence, whatever it is.
    garbage = np.where(valid, values, np.float32(random.choice([np.nan, np.inf, -1e30])))
    np.testing.assert_array_equal(normalize(garbage, valid, normalize_std=normalize_std), got)
    order = np.array(random.sample(range(GROUP), GROUP))
    permuted = normalize(values[order], valid[order], normalize_std=normalize_std)
    np.testing.assert_allclose(permuted, got[order], rtol=1e-4, atol=1e-6 / scale)


@settings(max_examples=50, deadline=None)
@given(st.floats(-2, 2, width=32, allow_subnormal=False), group_mask, st.booleans())
def test_equal_rewards_give_exactly_zero(value, valid, normalize_std):
    valid = np.array(valid)
    got = np.asarray(
        normalize(np.full(GROUP, value, np.float32), valid, normalize_std=normalize_std)
    )
    if valid.sum() == 1:
        # The smallest normal number divided by 1 + 1e-6 is subnormal, which XLA makes 0.
        tiny = np.finfo(np.float32).tiny
        np.testing.assert_allclose(got[valid], value, rtol=1e-5, atol=tiny)
    else:
        np.testing.assert_array_equal(got, 0.0)


@pytest.mark.parametrize("grouping", grpo.GROUPINGS)
def test_groupings(grouping):
    shape = (3, 4, 2)
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    valid = np.random.default_rng(1).random((3, 4, 1)) < 0.7
    got = jax.jit(grpo.group_advantages, static_argnames="grouping")(
        values, valid, grouping=grouping
    )
    groups = {"sequence": [(b,) for b in range(3)], "position": list(np.ndindex(3, 4))}[grouping]
    for index in groups:
        members = np.broadcast_to(valid, shape)[index]
        inside = values[index][members]
        if inside.size:
            expected = (inside - inside.mean()) / (inside.std(ddof=1) + 1e-6)
            np.testing.assert_allclose(np.asarray(got)[index][members], expected, **TOLERANCE)
    assert not np.asarray(got)[~np.broadcast_to(valid, shape)].any()


# Policy loss


def random_rollouts(rows=12, k=5, seed=0):
    rng = np.random.default_rng(seed)
    old = -rng.exponential(2, (rows, k)).astype(np.float32)
    new = old + rng.normal(0, 0.5, (rows, k)).astype(np.float32)
    advantages = rng.normal(size=(rows, 1)).repeat(k, axis=1).astype(np.float32)
    mask = (rng.random((rows, k)) < 0.8).astype(np.float32)
    mask[[2, 7]] = 0
    return [new, old, advantages, mask]


@pytest.mark.parametrize("aggregation", grpo.AGGREGATIONS)
def test_micro_batches_add_up_to_the_mini_batch(aggregation):
    inputs = random_rollouts()
    whole = loss_and_gradient(*inputs, aggregation=aggregation)
    parts = [
        loss_and_gradient(*(x[i : i + 4] for x in inputs), whole=inputs[3], aggregation=aggregation)
        for i in range(0, 12, 4)
    ]
    losses = jax.tree.map(lambda *x: np.sum(x, axis=0), *(part[0] for part in parts))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), losses, whole[0])
    gradient = np.concatenate([part[1] for part in parts])
    np.testing.assert_allclose(gradient, whole[1], rtol=1e-5)


@pytest.mark.parametrize("aggregation", grpo.AGGREGATIONS)
def test_masked_tokens_and_rollouts_have_no_influence(aggregation):
    *values, mask = random_rollouts()
    expected = loss_and_gradient(*values, mask, aggregation=aggregation)
    for garbage in (np.nan, np.inf, 1e30):
        other = [np.where(mask != 0, x, np.float32(garbage)) for x in values]
        got = loss_and_gradient(*other, mask, aggregation=aggregation)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert not np.asarray(expected[1])[mask == 0].any()
    kept = mask.any(axis=1)
    removed = loss_and_gradient(*(x[kept] for x in (*values, mask)), aggregation=aggregation)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, expected[0], removed[0])
    close(np.asarray(expected[1])[kept], removed[1])


@pytest.mark.parametrize("aggregation", grpo.AGGREGATIONS)
def test_a_batch_without_valid_rollouts_gives_zero(aggregation):
    *values, mask = random_rollouts()
    got = loss_and_gradient(*values, np.zeros_like(mask), aggregation=aggregation)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), got)
