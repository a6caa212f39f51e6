"""Rewards, returns and baselines of tokens: formulas in float64 numpy, and what is unbiased.

The policy of these tests has a table of logits for every context of a rollout, so that all its
rollouts, and all groups of two of them, can be enumerated.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_jax.config import RefineConfig
from refine_jax.refine import grpo, rewards

VOCABULARY = 4
TRUTH = np.array([2, 0, 3])
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
# Compiled as a whole: one by one, their operations would be dozens of programs.
token_returns = jax.jit(grpo.token_returns, static_argnames=("credit", "own_reward"))
group_advantages = jax.jit(grpo.group_advantages, static_argnames=("grouping", "normalize_std"))
token_advantages = jax.jit(
    grpo.token_advantages,
    static_argnames=("credit", "baseline", "grouping", "normalize_std", "own_reward"),
)


def random_tokens(shape=(7, 3, 5), seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, shape)
    return np.where(rng.random(shape) < 0.8, truth, 3), truth


# Rewards


def test_match_rewards():
    tokens, truth = random_tokens()
    match = (tokens == truth).astype(np.float64)
    assert 0 < match.all(axis=-1).mean() < 1
    expected = {
        "binary": (match, match.mean(axis=-1)),
        "prefix": (np.cumprod(match, axis=-1), np.cumprod(match, axis=-1).mean(axis=-1)),
        "whole": (match.all(axis=-1)[..., None] * [0, 0, 0, 0, 5], match.all(axis=-1)),
    }
    for kind, (per_token, per_rollout) in expected.items():
        close(rewards.token_rewards(kind, None, None, tokens, truth), per_token)
        close(rewards.token_rewards(kind, None, None, tokens, truth).mean(-1), per_rollout)


KINDS = (*rewards.REWARDS, *rewards.ROLLOUT_REWARDS, rewards.EXPECTED)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollouts_reward_is_the_mean_of_its_tokens(kind):
    tokens, truth = random_tokens()
    hidden, true_hidden = np.random.default_rng(1).normal(size=(2, *tokens.shape, 8))
    log_probs = -np.random.default_rng(2).exponential(size=tokens.shape)
    run = jax.jit(rewards.token_rewards, static_argnums=0)
    per_token = run(kind, hidden, true_hidden, tokens, truth, true_log_probs=log_probs)
    assert per_token.shape == tokens.shape and per_token.dtype == jnp.float32
    close(per_token.mean(-1), np.asarray(per_token, np.float64).mean(axis=-1))
    if kind == "expected":
        close(per_token, np.exp(log_probs))


@functools.cache
def edit_distance(one, two):
    """Levenshtein's, by its recursion."""
    if not one or not two:
        return len(one) + len(two)
    replaced = edit_distance(one[:-1], two[:-1]) + (one[-1] != two[-1])
    return min(replaced, edit_distance(one[:-1], two) + 1, edit_distance(one, two[:-1]) + 1)


def test_edit_rewards_are_what_the_distance_of_prefixes_grows_by():
    """Of rollouts that are right, shifted, cut in the middle, or unlike; the truth broadcasts."""
    random = np.random.default_rng(0)
    truth = random.integers(0, 5, (40, 1, 6))
    shifted = np.concatenate([random.integers(0, 5, (40, 1, 1)), truth[..., :-1]], axis=-1)
    ahead = np.concatenate([truth[..., :2], truth[..., 3:], truth[..., :1]], axis=-1)
    tokens = np.concatenate([truth, shifted, ahead, random.integers(0, 3, (40, 2, 6))], axis=1)
    per_token = np.asarray(rewards.token_rewards("edit", None, None, tokens, truth))
    for row, fork in np.ndindex(tokens.shape[:2]):
        one, two = tuple(tokens[row, fork].tolist()), tuple(truth[row, 0].tolist())
        distances = [edit_distance(one[:j], two[:j]) for j in range(7)]
        close(per_token[row, fork], 1 - np.diff(distances))
        close(per_token[row, fork].mean(), 1 - edit_distance(one, two) / 6)
    # A shift by one costs an insertion and a deletion, where tokens place by place are all wrong.
    assert per_token[:, 1].mean() > 0.6
    binary = rewards.token_rewards("binary", None, None, tokens[:, 1:2], truth)
    assert np.asarray(binary).mean() < 0.4


def test_pooled_cosine_compares_means():
    tokens, truth = random_tokens()
    hidden, true_hidden = np.random.default_rng(1).normal(size=(2, *tokens.shape, 8))
    got = rewards.token_rewards("pooled_cosine", hidden, true_hidden, tokens, truth)
    a, b = hidden.mean(axis=-2), true_hidden.mean(axis=-2)
    want = np.sum(a * b, axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    close(got.mean(-1), want)
    assert not np.asarray(got)[..., :-1].any()
    order = np.random.default_rng(2).permutation(5)
    moved = hidden[..., order, :]
    close(rewards.token_rewards("pooled_cosine", moved, true_hidden, tokens, truth), got)


# Rollouts of which the first tokens count


def test_tokens_count_until_the_entropy_is_spent():
    entropy = np.random.default_rng(0).exponential(size=(50, 6)).astype(np.float32)
    counted = np.asarray(rewards.counted_tokens(entropy, 3.0))
    for row, got in zip(entropy, counted, strict=True):
        length, spent = 1, row[0]
        while length < 6 and spent + row[length] <= 3.0:
            spent += row[length]
            length += 1
        np.testing.assert_array_equal(got, np.arange(6) < length)
    assert set(counted.sum(axis=-1)) == set(range(1, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_do_not_count_are_as_if_cut_off(kind):
    tokens, truth = random_tokens()
    hidden, true_hidden = np.random.default_rng(1).normal(size=(2, *tokens.shape, 8))
    log_probs = -np.random.default_rng(2).exponential(size=tokens.shape)
    lengths = np.random.default_rng(3).integers(1, 6, tokens.shape[:-1])
    counted = np.arange(5) < lengths[..., None]
    got = rewards.token_rewards(
        kind, hidden, true_hidden, tokens, truth, true_log_probs=log_probs, counted=counted
    )
    assert not np.asarray(got)[~counted].any()
    for length in range(1, 6):
        cut = rewards.token_rewards(
            kind,
            *(x[..., :length, :] for x in (hidden, true_hidden)),
            *(x[..., :length] for x in (tokens, truth)),
            true_log_probs=log_probs[..., :length],
        )
        here = lengths == length
        close(np.asarray(got)[here].mean(-1), np.asarray(cut)[here].mean(-1))
        close(np.asarray(got)[here][:, :length], np.asarray(cut)[here] * 5 / length)


def test_expected_rewards_need_their_probabilities():
    tokens, truth = random_tokens()
    with pytest.raises(ValueError, match="needs true_log_probs"):
        rewards.token_rewards("expected", None, None, tokens, truth).mean(-1)


# Returns and baselines


def test_returns():
    values = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    to_go = np.array([[row[j:].sum() / 5 for j in range(5)] for row in values.astype(np.float64)])
    close(token_returns(values), np.repeat(values.mean(axis=-1, keepdims=True), 5, axis=-1))
    close(token_returns(values, credit="reward_to_go"), to_go)
    later = np.concatenate([to_go[:, 1:], np.zeros((4, 1))], axis=-1)
    close(token_returns(values, credit="reward_to_go", own_reward=False), later)
    with pytest.raises(ValueError, match="Got: 'token'"):
        grpo.token_returns(values, credit="token")


def plain_advantages(returns, valid, energy, *, baseline, grouping, normalize_std):
    """[B, c, n, k] float64 of returns [B, c, n, k], group by group and place by place."""
    batch, positions, repeats, k = returns.shape
    result = np.zeros(returns.shape)
    groups = [[(b, p, r) for p in range(positions) for r in range(repeats)] for b in range(batch)]
    if grouping == "position":
        groups = [[(b, p, r) for r in range(repeats)] for b, p in np.ndindex(batch, positions)]
    for group, j in itertools.product(groups, range(k)):
        members = [index for index in group if valid[index]]
        values = [returns[index][j] for index in members]
        for index in members:
            others = [returns[other][j] for other in members if other != index]
            if len(members) == 1:
                mean = 0.0
            elif baseline == "group":
                mean = np.mean(values)
            elif baseline == "leave_one_out":
                mean = np.mean(others)
            else:
                mean = np.average(values, weights=[energy[index][j] for index in members])
            std = np.std(values, ddof=1) if len(members) > 1 else 1.0
            result[index][j] = (returns[index][j] - mean) / (std + 1e-6 if normalize_std else 1.0)
    return result


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("grouping", grpo.GROUPINGS)
@pytest.mark.parametrize("baseline", grpo.BASELINES)
@pytest.mark.parametrize("credit", grpo.CREDITS)
def test_token_advantages(credit, baseline, grouping, normalize_std):
    rng = np.random.default_rng(0)
    values, energy = rng.normal(size=(2, 3, 4, 3, 5))
    energy = np.cumsum(np.abs(energy), axis=-1)
    valid = rng.random((3, 4, 3)) < 0.7
    valid[0, 0] = False  # a group of none, and one of a single rollout
    valid[0, 1] = [False, True, False]
    options = {"baseline": baseline, "grouping": grouping, "normalize_std": normalize_std}
    got = token_advantages(
        np.where(valid[..., None], values, np.nan),
        valid,
        credit=credit,
        energy=np.where(valid[..., None], energy, np.nan),
        **options,
    )
    to_go = np.flip(np.cumsum(np.flip(values, -1), -1), -1) / 5
    mean = np.broadcast_to(values.mean(axis=-1, keepdims=True), values.shape)
    returns = {"reward_to_go": to_go, "sequence": mean}[credit]
    expected = plain_advantages(returns, valid, energy, **options)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
    if baseline == "group" and credit == "sequence":
        today = group_advantages(
            jnp.mean(values, axis=-1), valid, grouping=grouping, normalize_std=normalize_std
        )
        np.testing.assert_array_equal(got, np.repeat(np.asarray(today)[..., None], 5, axis=-1))


@pytest.mark.parametrize("baseline", grpo.BASELINES)
def test_equal_returns_give_exactly_zero(baseline):
    values = np.full((1, 2, 3, 4), 0.1, np.float32)
    energy = np.cumsum(np.abs(np.random.default_rng(0).normal(size=values.shape)), axis=-1)
    for credit in grpo.CREDITS:
        got = token_advantages(
            values, np.ones((1, 2, 3), bool), credit=credit, baseline=baseline, energy=energy
        )
        np.testing.assert_array_equal(got, 0.0)


def test_without_energy_the_optimal_token_baseline_is_the_mean():
    values = jnp.array([[1.0, 2.0, 6.0]])
    valid = jnp.ones((1, 3), bool)
    got = grpo.normalize_groups(
        values, valid, normalize_std=False, baseline="optimal_token", energy=jnp.zeros((1, 3))
    )
    close(got, [[-2.0, -1.0, 3.0]])


def test_unknown_baselines_are_refused():
    x = jnp.zeros((1, 2, 3, 4))
    with pytest.raises(ValueError, match="Got: 'mean'"):
        grpo.token_advantages(x, x[..., 0] == 0, baseline="mean")
    with pytest.raises(ValueError, match="Got: energy=None"):
        grpo.token_advantages(x, x[..., 0] == 0, baseline="optimal_token")


def test_energy_is_that_of_the_gradient_by_the_logits():
    logits = jax.random.normal(jax.random.key(0), (6, 5, 9)) * 3
    tokens = jax.random.categorical(jax.random.key(1), logits)

    def log_prob(logits, token):
        return jax.nn.log_softmax(logits)[token]

    both = jax.jit(jax.vmap(jax.vmap(jax.value_and_grad(log_prob))))
    log_probs, gradients = both(logits, tokens)
    expected = np.cumsum(np.sum(np.asarray(gradients, np.float64) ** 2, axis=-1), axis=-1)
    squares = np.sum(np.asarray(jax.nn.softmax(logits), np.float64) ** 2, axis=-1)
    close(grpo.sum_squared_probs(logits), squares)
    close(grpo.gradient_energy(log_probs, squares), expected)


def test_energy_of_a_certain_token_is_zero():
    got = grpo.gradient_energy(jnp.zeros((1, 3)), jnp.float32([[1 - 1e-7] * 3]))
    np.testing.assert_array_equal(got, 0.0)


# The gradient of the expected reward


def random_tables(k, seed=3):
    """Logits of the next token for each of the contexts of 0 .. k - 1 tokens."""
    keys = jax.random.split(jax.random.key(seed), k)
    tables = [jax.random.normal(key, (VOCABULARY,) * (j + 1)) for j, key in enumerate(keys)]
    # The truth is likely enough that each reward is often other than 0.
    return [table.at[..., TRUTH[j]].add(1.0) for j, table in enumerate(tables)]


def scores_of(tables, rollout):
    """Log-probabilities [k] of a rollout, those of the true tokens, and energies."""
    rows = [jax.nn.log_softmax(table[tuple(rollout[:j])]) for j, table in enumerate(tables)]
    own = jnp.stack([row[rollout[j]] for j, row in enumerate(rows)])
    true = jnp.stack([row[TRUTH[j]] for j, row in enumerate(rows)])
    squares = jnp.stack([jnp.sum(jnp.exp(2 * row)) for row in rows])
    return own, true, grpo.gradient_energy(own, squares)


def flat(tables):
    return jnp.concatenate([table.ravel() for table in tables])


def exact_gradient(tables, reward, length=None):
    """Of the expected reward of the first tokens, summed over all rollouts."""
    tables, unread = tables[:length], tables[length or len(tables) :]
    k = len(tables)
    rollouts = np.array(list(itertools.product(range(VOCABULARY), repeat=k)))
    match = (rollouts == TRUTH[:k]).astype(float)
    values = {
        "binary": match.mean(axis=-1),
        "expected": match.mean(axis=-1),  # its expectation is that of `binary`
        "prefix": np.cumprod(match, axis=-1).mean(axis=-1),
        "whole": match.prod(axis=-1),
        "edit": [1 - edit_distance((*y,), (*TRUTH[:k].tolist(),)) / k for y in rollouts.tolist()],
    }[reward]

    def expectation(tables):
        log_probs = jax.vmap(lambda rollout: scores_of(tables, rollout)[0])(jnp.asarray(rollouts))
        return jnp.sum(jnp.asarray(values) * jnp.exp(jnp.sum(log_probs, axis=-1)))

    def gradient(tables):
        return flat([*jax.grad(expectation)(tables), *map(jnp.zeros_like, unread)])

    return jax.jit(gradient)(tables)


def estimated_gradient(tables, group, reward, length=None, **options):
    """The estimate of one group of rollouts [n, k], ascending; normalised as `exact_gradient`.

    length: of the first tokens, which count; None: all do.
    """
    n, k = group.shape
    counted = None if length is None else jnp.arange(k) < jnp.full((n, 1), length)

    def loss(tables):
        own, true, energy = jax.vmap(lambda rollout: scores_of(tables, rollout))(group)
        per_token = rewards.token_rewards(
            reward,
            None,
            None,
            group,
            jnp.asarray(TRUTH[:k]),
            true_log_probs=true,
            counted=counted,
        )
        advantages = grpo.token_advantages(
            per_token[None, None],
            jnp.ones((1, 1, n), bool),
            grouping="position",
            energy=energy[None, None],
            own_reward=reward != "expected",
            **options,
        )[0, 0]
        advantages, old = jax.lax.stop_gradient((advantages, own))
        rest = {"aggregation": "seq-mean-token-sum"}
        mask = jnp.ones((n, k)) if counted is None else counted.astype(jnp.float32)
        if reward == "expected":
            return grpo.expected_reward_loss(own, old, true, advantages, mask, **rest)[0]
        return grpo.policy_loss(own, old, advantages, mask, **rest)[0]

    return -flat(jax.grad(loss)(tables))


def mean_over_all_groups(tables, reward, n=2, **options):
    """Expectation of the estimate: each group of n rollouts with its probability."""
    k = len(tables)
    rollouts = np.array(list(itertools.product(range(VOCABULARY), repeat=k)))
    run = jax.jit(jax.vmap(lambda rollout: scores_of(tables, rollout)[0]))
    log_probs = run(jnp.asarray(rollouts))
    chances = np.exp(np.asarray(log_probs, np.float64).sum(axis=-1))
    indices = np.array(list(itertools.product(range(len(rollouts)), repeat=n)))
    estimate = jax.jit(jax.vmap(lambda group: estimated_gradient(tables, group, reward, **options)))
    gradients = np.asarray(estimate(jnp.asarray(rollouts[indices])), np.float64)
    return np.sum(chances[indices].prod(axis=-1)[:, None] * gradients, axis=0)


@pytest.mark.parametrize("reward", ["binary", "whole", "prefix", "expected", "edit"])
@pytest.mark.parametrize("credit", grpo.CREDITS)
def test_expectations_of_the_baselines(credit, reward):
    """Over all pairs of rollouts: leave-one-out is unbiased, the group's mean gives half of it."""
    tables = random_tables(2)
    exact = np.asarray(exact_gradient(tables, reward))
    options = {"credit": credit, "normalize_std": False}
    mean = functools.partial(mean_over_all_groups, tables, reward, **options)
    close(mean(baseline="leave_one_out"), exact)
    if reward != "expected":  # whose own gradient no baseline touches
        close(mean(baseline="group"), exact / 2)
    biased = mean(baseline="optimal_token")
    assert np.abs(biased - exact).max() > 0.01


@pytest.mark.parametrize("reward", ["edit", "whole", "expected"])
def test_rollouts_of_which_a_part_counts_are_unbiased(reward):
    """Two of three tokens: leave-one-out estimates the gradient of the reward of two."""
    tables = random_tables(3)
    options = {"credit": "reward_to_go", "normalize_std": False, "baseline": "leave_one_out"}
    got = mean_over_all_groups(tables, reward, length=2, **options)
    close(got, exact_gradient(tables, reward, length=2), atol=1e-5)


def test_dividing_by_the_deviation_is_biased():
    tables = random_tables(2)
    exact = np.asarray(exact_gradient(tables, "binary"))
    got = mean_over_all_groups(tables, "binary", baseline="leave_one_out", normalize_std=True)
    cosine = got @ exact / np.linalg.norm(got) / np.linalg.norm(exact)
    assert cosine < 0.999  # not even its direction stays


def draw_groups(tables, key, groups, n):
    """Rollouts [groups, n, k] of the policy."""
    tokens = []
    for table, place_key in zip(tables, jax.random.split(key, len(tables)), strict=True):
        rows = jnp.broadcast_to(table[tuple(tokens)], (groups, n, VOCABULARY))
        tokens.append(jax.random.categorical(place_key, rows))
    return jnp.stack(tokens, axis=-1)


@pytest.mark.parametrize(("credit", "k"), [("sequence", 2), ("reward_to_go", 3)])
@pytest.mark.parametrize("reward", ["binary", "whole", "prefix", "expected"])
def test_the_mean_of_many_draws_is_the_exact_gradient(credit, reward, k):
    """Within four standard errors of the mean, for groups of three rollouts.

    In the logits that every rollout reads, and along random directions through all of them: logits
    of contexts that only few rollouts meet have no normal distribution of their mean.
    """
    tables = random_tables(k)
    groups = draw_groups(tables, jax.random.key(7), 4000, 3)
    options = {"credit": credit, "baseline": "leave_one_out", "normalize_std": False}
    estimate = jax.jit(jax.vmap(lambda g: estimated_gradient(tables, g, reward, **options)))
    exact = np.asarray(exact_gradient(tables, reward))
    directions = np.random.default_rng(0).normal(size=(exact.size, 20))
    directions = np.concatenate([np.eye(exact.size)[:, :VOCABULARY], directions], axis=1)
    gradients = np.asarray(estimate(groups), np.float64) @ directions
    exact = exact @ directions
    error = gradients.std(axis=0, ddof=1) / math.sqrt(len(gradients))
    assert (np.abs(gradients.mean(axis=0) - exact) <= 4 * error + 1e-6).all()
    # The test can tell: no estimate of nothing would pass.
    assert (np.abs(exact) > 8 * error).any()


def test_less_noise():
    """What each choice is for: less variance of the estimate, of the same expectation."""
    tables = random_tables(3)
    groups = draw_groups(tables, jax.random.key(8), 4000, 4)

    def noise(reward, credit="sequence"):
        options = {"credit": credit, "baseline": "leave_one_out", "normalize_std": False}
        estimate = jax.jit(jax.vmap(lambda g: estimated_gradient(tables, g, reward, **options)))
        return np.asarray(estimate(groups), np.float64).var(axis=0).sum()

    assert noise("binary", "reward_to_go") < 0.9 * noise("binary")
    assert noise("expected", "reward_to_go") < 0.9 * noise("binary", "reward_to_go")


def test_masked_rollouts_have_no_influence_on_the_expected_reward():
    rng = np.random.default_rng(0)
    own, old, true, advantages = (-rng.exponential(size=(4, 3)).astype(np.float32) for _ in "abcd")
    mask = np.ones((4, 3), np.float32)
    mask[1] = 0
    kept = mask.any(axis=1)

    @jax.jit
    def evaluate(*arrays):
        def loss(true, own):
            return grpo.expected_reward_loss(own, old, true, *rest)[0]

        true, own, old, *rest = arrays
        return jax.value_and_grad(loss, (0, 1))(true, own)

    arrays = [true, own, old, advantages, mask]
    value, gradients = evaluate(*(x[kept] for x in arrays))
    for x in arrays[:-1]:
        x[1] = np.nan
    got_value, got = evaluate(*arrays)
    close(got_value, value)
    for full, part in zip(got, gradients, strict=True):
        close(full[kept], part)
        assert not full[1].any()


# Weight over the run


def test_weights_over_a_run():
    steps, until = 10, 0.7
    x = np.minimum(np.arange(steps) / 7, 1)
    shapes = {"constant": np.ones(10), "linear": 1 - x, "cosine": (1 + np.cos(np.pi * x)) / 2}
    for schedule, shape in shapes.items():
        config = RefineConfig(lambda_rl=0.4, lambda_rl_schedule=schedule, lambda_rl_until=until)
        weight = jax.jit(functools.partial(grpo.policy_weight, config, steps=steps))
        got = np.array([weight(step) for step in range(steps)])
        close(got, 0.4 * np.where(np.arange(steps) < 7, shape, 0))
        assert not got[7:].any() and got[:7].all()


def test_the_default_weight_never_changes():
    weights = [grpo.policy_weight(RefineConfig(), step, 3) for step in range(3)]
    np.testing.assert_array_equal(weights, np.float32(0.2))
