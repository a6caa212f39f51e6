"""Training on prompts before they are answered: steps by hand, resets, what each prompt costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens.refine_rl import select
from tiny import scaled, tiny, tokens

from refine_jax.config import OptimizerConfig, RefineConfig, TestTimeConfig
from refine_jax.refine.adapt import Adapter, has_rollouts, pad_rows, prompt_key
from refine_jax.refine.objective import Objective
from refine_jax.refine.optimizer import make_optimizer
from refine_jax.refine.step import TrainState, make_train_step

pytestmark = pytest.mark.usefixtures("compile_once")

REFINE = RefineConfig(
    reward="binary", num_positions=2, rollout_length=2, lambda_rl=0.4, edge_margin=3
)
NTP = dataclasses.replace(REFINE, objective="ntp")
# With a tiny eps AdamW makes a whole step even of a gradient that is only rounding.
RATE, EPS = 1e-2, 1e-4
OPTIMIZER = OptimizerConfig(learning_rate=RATE, eps=EPS, clip_norm=0.5)
KEY = jax.random.key(3)
PAD = 0


@functools.cache
def optimizer(steps=1, updates=1):
    return make_optimizer(OPTIMIZER, steps=steps, updates_per_step=updates)


def adapter(name="deltanet", config=REFINE, model=None, **options):
    model, params = model or tiny(name)
    options = TestTimeConfig(**options)
    return Adapter(model, params, optimizer(), config, options, key=KEY, eos_id=2, pad_id=PAD)


def prompts(*lengths):
    return [tokens(100 + index, length) for index, length in enumerate(lengths)]


def names(count):
    return [f"example-{index}" for index in range(count)]


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(got, want, tolerance=0.0):
    for a, b in zip(leaves(got), leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def distance(a, b):
    return max(np.abs(x - y).max() for x, y in zip(leaves(a), leaves(b), strict=True))


def hand_rolled_step(model, params, prompt, starts, rollouts, config):
    """One step on one prompt: every prefix run again, advantages and AdamW by formula.

    Returns the leaves of the parameters after it.
    """
    k, rows = config.rollout_length, [prompt]
    rewards = np.array(
        [np.mean(r == prompt[s : s + k]) for s, r in zip(starts, rollouts, strict=True)]
    )
    advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    for start, rollout in zip(starts, rollouts, strict=True):
        rows.append(np.concatenate([prompt[:start], rollout, prompt[start + k :]]))
    rows = np.stack(rows)
    at = np.concatenate([np.arange(s, s + k) for s in starts])
    of = np.repeat(np.arange(1, len(rows)), k)

    @jax.jit
    @jax.grad
    def gradient(params):
        hidden, _ = model.forward(params, rows)
        log_probs = jax.nn.log_softmax(hidden[:, :-1] @ model.head(params).T)
        taken = jnp.take_along_axis(log_probs, rows[:, 1:, None], axis=-1)[..., 0]
        # On policy the ratio is 1 and its derivative that of the log-probability.
        policy = -jnp.mean(np.repeat(advantages, k) * taken[of, at - 1])
        return -jnp.mean(taken[0]) + config.lambda_rl * policy

    gradients = [np.asarray(g, np.float64) for g in leaves(gradient(params))]
    scale = min(1.0, 0.5 / (np.sqrt(sum(np.sum(g**2) for g in gradients)) + 1e-6))
    moved = []
    for p, g in zip(leaves(params), gradients, strict=True):
        g = scale * g
        moved.append(p - RATE * (g / (np.abs(g) + EPS) + 0.01 * p))
    return moved


def find_rollouts(model, params, config):
    """A prompt whose rollouts get different rewards, and its starts and rollouts."""
    objective = Objective(model, config, eos_id=2, max_documents=1)

    @jax.jit
    def collect(params, batch, keys):
        reading = objective.read(params, batch)
        return objective.roll_out(params, reading, batch, keys, None)[0]

    key = jax.random.fold_in(jax.random.fold_in(prompt_key(KEY, "example-0"), 0), 0)
    for seed in range(300):
        prompt = tokens(seed, 30) % 11
        batch = pad_rows([prompt], rows=1, length=64, pad_id=PAD)
        experience = collect(params, batch, key[None])
        starts, rollouts = np.asarray(experience.starts[0]), np.asarray(experience.tokens[0])
        truth = [prompt[s : s + config.rollout_length] for s in starts]
        if np.ptp([np.sum(a == b) for a, b in zip(rollouts, truth, strict=True)]):
            return prompt, starts, rollouts
    pytest.fail("no rollouts of different rewards")


@pytest.mark.parametrize("name", ["deltanet", "lact"])
def test_a_step_is_the_one_computed_by_hand(name):
    model, params = tiny(name, vocab_size=11)
    prompt, starts, rollouts = find_rollouts(model, params, REFINE)
    adapted = adapter(model=(model, params)).adapt([prompt], names(1))
    assert_same(
        adapted.params, hand_rolled_step(model, params, prompt, starts, rollouts, REFINE), 1e-5
    )


@functools.cache
def copying(group):
    """An adapter of copies, which what was adapted before leaves as it was."""
    return adapter(reset="example", copies=group, steps=2)


def each(order=range(4), group=1):
    """{name: (parameters, cost)} of four prompts, adapted in the given order."""
    given, named = prompts(30, 44, 9, 61), names(4)
    adapting, found = copying(group), {}
    for at in range(0, len(order), group):
        part = order[at : at + group]
        adapted = adapting.adapt([given[i] for i in part], [named[i] for i in part])
        for row, i in enumerate(part):
            params = adapted.params
            if group > 1:
                params = jax.tree.map(lambda x, row=row: x[row], jax.device_get(params))
            found[named[i]] = jax.device_get(params), adapted.costs[row]
    return found


@pytest.fixture(scope="module")
def alone():
    return each()


def test_several_steps_are_those_of_training(alone):
    """A copy goes through what `make_train_step` does with a batch of one row."""
    model, params = tiny("deltanet")
    step = make_train_step(model, optimizer(), REFINE, mini_batch=1, micro_batch=1, eos_id=2)
    prompt, name = prompts(30)[0], names(1)[0]
    key = prompt_key(KEY, name)
    state = TrainState.create(scaled(params, 1), optimizer(), key, REFINE)
    batch = pad_rows([prompt], rows=1, length=64, pad_id=PAD)
    for _ in range(2):
        state, metrics = step(state, batch)
    assert_same(alone[name][0], state.params, 1e-6)
    assert alone[name][1].loss == pytest.approx(float(metrics["loss/ntp"]), abs=1e-5)


def test_a_copy_depends_on_its_prompt_alone(alone):
    for order in ((2, 0, 3, 1), (3, 2, 1, 0), (1,)):
        for name, (params, _) in each(order).items():
            assert_same(params, alone[name][0])


def test_copies_at_once_are_those_one_by_one(alone):
    whole = each(group=3)
    for order in ((2, 0, 3, 1), (3, 1, 0, 2)):
        for name, (params, cost) in each(order, group=3).items():
            assert_same(params, whole[name][0])
            assert_same(params, alone[name][0], 1e-5)
            assert cost[1:5] == alone[name][1][1:5]


def test_costs(alone):
    rollouts = 2 * 2 * 2
    for name, tokens_ in zip(names(4), (60, 88, 18, 122), strict=True):
        got = alone[name][1]
        assert (got.steps, got.tokens, got.rollout_tokens) == (2, tokens_, rollouts)
        assert got.seconds > 0
    assert [alone[name][1].compiled for name in names(4)] == [True, False, False, False]


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 7, 30])
@pytest.mark.parametrize(("c", "k", "margin"), [(2, 2, 3), (5, 2, 3), (2, 4, 3), (3, 1, 20)])
def test_which_prompts_have_rollouts(length, c, k, margin):
    config = RefineConfig(num_positions=c, rollout_length=k, edge_margin=margin)
    mask = np.arange(64)[None] < length
    selection = select(
        jax.random.split(KEY, 1),
        np.zeros((1, 64), np.float32),
        mask,
        num_positions=c,
        rollout_length=k,
        edge_margin=margin,
        document=mask.astype(np.int32),
    )
    valid = np.asarray(selection.valid)
    assert valid.all() == valid.any() == has_rollouts(length, config)
    assert not has_rollouts(length, dataclasses.replace(config, objective="ntp"))


def by_hand(groups, *, reset):
    """Parameters after next-token training on groups of mini-batches of prompts, each twice."""
    model, trained = tiny("deltanet")

    @jax.grad
    def gradient(params, rows, weights):
        hidden, _ = model.forward(params, rows)
        log_probs = jax.nn.log_softmax(hidden[:, :-1] @ model.head(params).T)
        taken = jnp.take_along_axis(log_probs, rows[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(taken * weights) / jnp.sum(weights)

    @jax.jit
    def update(params, moments, rows, weights):
        updates, moments = optimizer().update(gradient(params, rows, weights), moments, params)
        return optax.apply_updates(params, updates), moments

    results, params = [], None
    for minis in groups:
        if params is None or reset == "batch":
            params, moments = trained, jax.jit(optimizer().init)(trained)
        for mini in minis * 2:
            rows = pad_rows(mini, rows=2, length=64, pad_id=PAD)
            weights = rows["segments"][:, 1:].astype(np.float32)
            params, moments = update(params, moments, rows["tokens"], weights)
        results.append(params)
    return results


@pytest.mark.parametrize("reset", ["never", "batch"])
def test_batches_are_adapted_together(reset):
    given = prompts(30, 44, 9, 61, 25, 12, 50)
    options = {"reset": reset, "batch_size": 4, "mini_batch_size": 2, "steps": 2}
    adapting = adapter(config=NTP, **options)
    got = [adapting.adapt(given[at : at + 4], names(7)[at : at + 4]) for at in (0, 4)]
    a, b, c, d, e, f, g = given
    # Mini-batches are dealt out; the three prompts of the last batch make two of them.
    want = by_hand([[[a, c], [b, d]], [[e, g], [f]]], reset=reset)
    for adapted, params in zip(got, want, strict=True):
        assert_same(adapted.params, params, 2e-5)
    assert [len(adapted.costs) for adapted in got] == [4, 3]
    # What the first batch was answered with stays as it was while the second is adapted.
    assert np.isfinite(leaves(got[0].params)[0]).all()


def test_the_order_matters_without_a_reset():
    given = prompts(30, 44, 9, 61)
    found = []
    for order in ((0, 1, 2, 3), (2, 3, 0, 1)):
        adapting = adapter(reset="never", batch_size=2, mini_batch_size=2)
        found.append(
            [adapting.adapt([given[i] for i in order[at : at + 2]], "ab") for at in (0, 2)]
        )
    first, second = found[0][0].params, found[1][1].params  # answers prompts 0 and 1
    assert distance(first, second) > 1e-3


@pytest.mark.parametrize("copies", [1, 3])
def test_a_prompt_without_a_next_token_changes_nothing(copies):
    trained = tiny("deltanet")[1]
    adapted = adapter(copies=copies).adapt([[5], [7]][:copies], "ab"[:copies])
    copy = adapted.params if copies == 1 else jax.tree.map(lambda x: x[1], adapted.params)
    assert_same(copy, trained)
    assert {(cost.steps, cost.tokens) for cost in adapted.costs} == {(0, 0)}
    together = adapter(reset="batch", batch_size=4, mini_batch_size=2)
    assert_same(together.adapt([[5], [7]], "ab").params, trained)


def test_short_prompts_are_trained_on_by_next_token_loss():
    """With a margin of 20 no rollout fits."""
    refine = adapter(config=dataclasses.replace(REFINE, edge_margin=20))
    ntp = adapter(config=NTP)
    for prompt in prompts(2, 5, 20):
        adapted, expected = refine.adapt([prompt], names(1)), ntp.adapt([prompt], names(1))
        assert_same(adapted.params, expected.params, 1e-6)
        assert adapted.costs[0].rollout_tokens == 0 and adapted.costs[0].tokens == len(prompt)


@pytest.mark.parametrize(
    ("reset", "changes"), [("example", [False, True, False]), ("never", [False, True, True])]
)
def test_updates_that_are_not_finite_are_left_out_and_counted(reset, changes):
    model, params = tiny("deltanet")
    weight = params["embeddings"]["weight"].at[5].set(jnp.nan)
    poisoned = params | {"embeddings": {"weight": weight}}
    options = {"reset": reset, "steps": 2, "batch_size": 1, "mini_batch_size": 1}
    adapting = adapter(config=NTP, model=(model, poisoned), **options)
    for prompt, skipped, change in zip(([4, 5], [4, 6], [4, 5]), (2, 0, 2), changes, strict=True):
        adapted = adapting.adapt([prompt], names(1))
        assert adapted.costs[0].skipped == skipped
        assert (distance(adapted.params["lm_head"], params["lm_head"]) > 0) == change
