"""Rollouts in the pass that makes the gradient, and estimators, against programs that share none
of it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import REFINE, scaled, tiny, tokens

from refine_jax.models.layout import Layout
from refine_jax.models.transformer import Model
from refine_jax.presets import PRESETS
from refine_jax.refine import grpo
from refine_jax.refine.objective import Objective
from refine_jax.refine.step import TrainState, collect, make_train_step, row_keys

pytestmark = pytest.mark.usefixtures("programs_of_a_test")

ROWS, LENGTH, SGD = 4, 40, optax.sgd(0.1)


def rows(packed: bool) -> dict[str, jax.Array]:
    """Rows of one document, or of one or two, with padding on either side."""
    batch = {"tokens": jnp.asarray(tokens(21, ROWS, LENGTH))}
    if packed:
        segments = np.ones((ROWS, LENGTH), np.int32)
        segments[1, 17:] = 2
        segments[2, 31:] = 0
        segments[3, :5] = 0
        segments[3, 24:] = 2
        batch["segments"] = jnp.asarray(segments)
    return batch


def quiet(name: str, **changes):
    """A model whose roundings are far smaller than what is compared."""
    model, params = tiny(name, **changes)
    return model, scaled(params, 0.4)


def assert_close(got, want, tolerance):
    """Every array to a tolerance relative to its norm, or to that of the whole where it is tiny."""
    got, want = jax.device_get((got, want))
    total = np.linalg.norm([np.linalg.norm(x) for x in jax.tree.leaves(want)])
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-2 * total)
        assert error <= tolerance, (jax.tree_util.keystr(path), float(error))


# The models


@pytest.mark.parametrize(
    ("name", "remat", "packed"),
    [
        ("lact", "none", True),
        ("lact", "full", False),
        ("deltanet", "full", True),
        ("deltanet", "none", False),
        ("gated_deltanet", "dots", True),
        ("qwen", "none", True),
        ("qwen_irregular", "full", True),
        ("olmo", "dots", False),
        ("deltanet_hybrid", "none", False),
    ],
)
def test_the_backward_pass_is_that_of_rows_and_forks_together(name, remat, packed):
    """`run_rows`, `run_forks` and `backward` against autodiff of `forward_with_forks`."""
    model, params = quiet(name)
    remade = Model(model.config, dataclasses.replace(model.policy, remat=remat))
    batch, new = rows(packed), tokens(22, ROWS, 3, 4)
    positions = jnp.asarray([[5, 20, 33], [8, 16, 30], [9, 10, 28], [7, 23, 35]])
    noise = [
        np.float32(np.random.default_rng(i).standard_normal((ROWS, n, 16)))
        for i, n in enumerate((LENGTH, 12))
    ]
    if packed:  # what stands at padding is not defined
        noise[0] = np.where(np.asarray(batch["segments"])[..., None] > 0, noise[0], 0)
    noise[1] = noise[1].reshape(ROWS, 3, 4, 16)

    def layout():
        return Layout.from_segments(batch["segments"], 2) if packed else None

    @jax.jit
    def by_autodiff(params):
        (_, forks), pullback = jax.vjp(
            lambda p: model.forward_with_forks(p, batch["tokens"], layout(), positions, new), params
        )
        return pullback(tuple(jnp.asarray(x) for x in noise))[0], forks

    @jax.jit
    def in_one_pass(params):
        passed = remade.run_rows(params, batch["tokens"], layout())
        state = remade.fork(params, passed.trace, positions, horizon=4)
        forks, inputs = remade.run_forks(params, new, state)
        cotangents = tuple(jnp.asarray(x) for x in noise)
        return remade.backward(params, passed, positions, new, inputs, cotangents), forks

    (want, wanted), (got, forks) = by_autodiff(params), in_one_pass(params)
    assert not np.any(want.pop("lm_head")["weight"])
    assert_close(got, want, 1e-5)
    np.testing.assert_allclose(forks, wanted, atol=1e-5)


# Rollouts in the update, and from the start of the step


def gradient_of(objective):
    """`objective.gradient` of rows that are a whole mini-batch, compiled."""

    @jax.jit
    def gradient(params, batch, keys=None):
        return objective.gradient(params, batch, objective.mini_batch(batch), keys=keys)

    return gradient


def moved(params, gradient):
    """Parameters after a step of SGD."""
    return jax.tree.map(lambda w, g: np.asarray(w) - np.float32(0.1) * g, params, gradient)


@functools.cache
def step_of(name, config, mini_batch, micro_batch, **options):
    """A training step, compiled once for all tests that take it."""
    return make_train_step(
        quiet(name)[0],
        SGD,
        config,
        mini_batch=mini_batch,
        micro_batch=micro_batch,
        eos_id=2,
        max_documents=2,
        **{"steps": 1, **options},
    )


def one_step(name, config, *, packed, mini_batch=ROWS, micro_batch=1, at=0, **options):
    """Parameters after the step with number `at`, and its metrics."""
    config, params = dataclasses.replace(REFINE, **config), quiet(name)[1]
    state = TrainState.create(scaled(params, 1.0), SGD, jax.random.key(3), config)
    state = dataclasses.replace(state, step=jnp.int32(at))
    if config.kl_coef:
        state = dataclasses.replace(state, reference_params=scaled(params, 0.98))
    step = step_of(name, config, mini_batch, micro_batch, **options)
    state, metrics = step(state, rows(packed))
    return state.params, metrics


# Two of three tokens count, in a vocabulary of 53 words of which each is about as likely.
SHORTER = {
    "reward": "edit",
    "rollout_lengths": "adaptive",
    "entropy_budget": 8.0,
    "loss_aggregation": "seq-mean-token-mean",
}
FOUR_WAYS = (("update", 1), ("batch", 1), ("update", ROWS), ("batch", 2))


@pytest.mark.parametrize(
    ("name", "packed", "changes", "ways"),
    [
        # The other cases have another kind of rollouts and another micro-batch at once.
        ("deltanet", True, {"kl_coef": 0.1}, FOUR_WAYS),
        ("deltanet", False, SHORTER, (("update", ROWS), ("batch", 2))),
        ("lact", True, {}, (("update", 1), ("batch", 2))),
    ],
    ids=["deltanet-packed-kl", "deltanet-shorter", "lact-packed"],
)
def test_in_a_batch_of_one_mini_batch_both_rollouts_are_equal(name, packed, changes, ways):
    """Tokens, rewards, losses and parameters, over several micro-batches and over one."""
    found = [
        one_step(name, {"rollouts": rollouts} | changes, packed=packed, micro_batch=micro_batch)
        for rollouts, micro_batch in ways
    ]
    (want, figures), *others = found
    assert figures["policy/clip_fraction"] == 0 and abs(figures["policy/ppo_kl"]) < 1e-6
    for got, also in others:
        assert_close(got, want, 1e-5)
        assert also.keys() == figures.keys()
        for name in (name for name in figures if not name.startswith("time/")):
            np.testing.assert_allclose(also[name], figures[name], rtol=1e-4, atol=1e-5)


def test_later_mini_batches_roll_out_with_the_updated_parameters():
    """With `update` the second mini-batch is that of a step of its own; with `batch` it is not."""
    options = {"packed": False, "mini_batch": 2}
    updated, figures = one_step("deltanet", {"rollouts": "update"}, **options)
    assert abs(figures["policy/ppo_kl"]) < 1e-6
    published, figures = one_step("deltanet", {"rollouts": "batch"}, **options)
    assert abs(figures["policy/ppo_kl"]) > 1e-5
    pairs = zip(jax.tree.leaves(updated), jax.tree.leaves(published), strict=True)
    assert max(np.linalg.norm(np.asarray(a) - np.asarray(b)) for a, b in pairs) > 1e-4

    model, params = quiet("deltanet")
    config = dataclasses.replace(REFINE, rollouts="update")
    objective = Objective(model, config, eos_id=2, max_documents=2)
    keys = row_keys(jax.random.key(3), jnp.int32(0), ROWS)
    gradient = gradient_of(objective)
    for part in range(2):  # mini-batch i holds the rows i, i + 2
        batch = jax.tree.map(lambda x: np.asarray(x)[part::2], rows(False))  # noqa: B023
        params = moved(params, gradient(params, batch, keys[part::2])[0])
    assert_close(updated, params, 1e-5)


def test_rollouts_are_timed_on_demand():
    options = {"packed": False, "mini_batch": 2}
    together, metrics = one_step("deltanet", {"rollouts": "batch"}, **options)
    assert "time/collect" not in metrics and metrics["time/update"] > 0
    apart, metrics = one_step("deltanet", {"rollouts": "batch"}, **options, time_rollouts=True)
    assert metrics["time/collect"] > 0 and metrics["time/update"] > 0
    assert_close(apart, together, 1e-6)


def test_a_batch_that_mini_batches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="Got: mini_batch=3, rows=4"):
        one_step("deltanet", {}, packed=False, mini_batch=3)


@pytest.mark.parametrize("name", ["deltanet", "lact"])
def test_which_rollouts_are_valid_is_known_before(name):
    model, params = quiet(name)
    objective = Objective(model, REFINE, eos_id=2, max_documents=2)
    batch = rows(True)
    state = TrainState.create(params, SGD, jax.random.key(0), REFINE)
    experience = jax.jit(functools.partial(collect, objective, micro_batch=2))(state, batch)
    valid = jax.jit(objective.mini_batch)(batch).valid
    np.testing.assert_array_equal(experience.valid, valid)
    assert valid.any()


# Estimators of rollouts, with every prefix run on its own

ESTIMATORS = {
    "low_noise": PRESETS["low_noise"] | {"rollouts_per_position": 2},
    "expected": {"reward": "expected", "credit": "reward_to_go", "baseline": "leave_one_out"},
    "optimal_token": {"reward": "prefix", "credit": "reward_to_go", "baseline": "optimal_token"},
    "whole": {"reward": "whole", "normalize_std": False},
    "adaptive": {
        "reward": "prefix",
        "rollout_lengths": "adaptive",
        "entropy_budget": 2.7702,  # of ln 4 for each token at most
        "loss_aggregation": "seq-mean-token-mean",
        "normalize_std": False,
    },
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_gradient_of_rollouts_is_that_of_prefixes(estimator):
    model, params = quiet("deltanet", vocab_size=4)
    estimated = ESTIMATORS[estimator] | {"rollout_length": 2, "lambda_sft": 0.0}
    config = dataclasses.replace(REFINE, **estimated)
    batch = {"tokens": jnp.asarray(tokens(23, 2, LENGTH) % 4)}
    objective = Objective(model, config, eos_id=None, max_documents=1)

    @jax.jit
    def roll_out(keys):
        reading = objective.read(params, batch)
        return objective.roll_out(params, reading, batch, keys, None)[0]

    for seed in range(50):  # until a rollout is right, and another is not
        keys = jax.random.split(jax.random.key(seed), 2)
        experience = roll_out(keys)
        if experience.rewards.std() > 0.1 or config.reward == "expected":
            break
    got, metrics = gradient_of(objective)(params, batch, keys)
    starts, rollouts = np.asarray(experience.starts), np.asarray(experience.tokens)
    k, forks = config.rollout_length, starts.shape[1]
    # A row for each rollout after its own prefix; what fills the row comes after both.
    texts = np.zeros((2, forks, LENGTH + k), np.int32)
    for row, fork in np.ndindex(2, forks):
        start = starts[row, fork]
        texts[row, fork, :start] = np.asarray(batch["tokens"])[row, :start]
        texts[row, fork, start : start + k] = rollouts[row, fork]
    predictors = (starts.reshape(-1, 1) - 1 + np.arange(k))[..., None]

    def scores(params):
        """Logits [B, R, k, V] that predict each rollout's tokens, from its own prefix."""
        hidden = model.forward(params, texts.reshape(2 * forks, -1))[0]
        hidden = jnp.take_along_axis(hidden, predictors, axis=1)
        return (hidden @ model.head(params).T).reshape(2, forks, k, -1)

    truth = np.stack(
        [[np.asarray(batch["tokens"])[b, s : s + k] for s in starts[b]] for b in range(2)]
    )

    def log_probs_of(logits, ids):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1)[..., 0]

    logits = np.asarray(jax.jit(scores)(params), np.float64)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    match = rollouts == truth
    if config.reward == "whole":
        rewards = np.zeros(match.shape)
        rewards[..., -1] = k * match.all(-1)
    elif config.reward == "prefix":
        rewards = np.cumprod(match, axis=-1).astype(np.float64)
    else:
        rewards = np.take_along_axis(probabilities, truth[..., None], axis=-1)[..., 0]
    counted = np.ones(match.shape, bool)
    if config.rollout_lengths == "adaptive":

        def read(params):
            hidden = model.forward(params, batch["tokens"])[0]
            return jax.nn.log_softmax(hidden @ model.head(params).T)

        text = np.asarray(jax.jit(read)(params), np.float64)
        entropy = -np.sum(np.exp(text) * text, axis=-1)
        for row, fork in np.ndindex(starts.shape):
            follows = entropy[row, starts[row, fork] - 1 : starts[row, fork] - 1 + k]
            counted[row, fork, 1:] = np.cumsum(follows)[1:] <= config.entropy_budget
        assert counted.any(-1).all() and counted.all(-1).any() and not counted.all()
        rewards = np.where(counted, rewards * k / counted.sum(-1, keepdims=True), 0)
    assert rewards.std() > 0
    own = np.take_along_axis(probabilities, rollouts[..., None], axis=-1)[..., 0]
    energy = np.cumsum(1 - 2 * own + np.sum(probabilities**2, axis=-1), axis=-1)
    shape = (2, config.num_positions, config.rollouts_per_position, k)
    advantages = grpo.token_advantages(
        jnp.asarray(rewards.reshape(shape), jnp.float32),
        jnp.ones(shape[:-1], bool),
        credit=config.credit,
        baseline=config.baseline,
        grouping=config.grouping,
        normalize_std=config.normalize_std,
        own_reward=config.reward != "expected",
        energy=jnp.asarray(energy.reshape(shape), jnp.float32),
    ).reshape(2, forks, k)
    np.testing.assert_allclose(experience.rewards, rewards.mean(-1), atol=1e-5)
    np.testing.assert_allclose(experience.advantages, advantages, atol=1e-4)

    def surrogate(params):
        logits = scores(params)
        terms = advantages * log_probs_of(logits, rollouts)
        loss = -jnp.mean(jnp.sum(jnp.where(counted, terms, 0.0), axis=-1) / counted.sum(-1))
        if config.reward == "expected":
            loss -= jnp.mean(jnp.exp(log_probs_of(logits, truth))) / k
        return config.lambda_rl * loss

    want = jax.jit(jax.grad(surrogate))(params)
    assert max(np.linalg.norm(x) for x in jax.tree.leaves(want)) > 1e-3
    assert_close(got, want, 1e-3 if config.normalize_std else 2e-4)
    assert float(metrics["loss/ntp"]) > 0


# The exact estimator


def expected_match_by_hand(model, params, batch, config, starts=None):
    """(next-token loss, mean expected reward), from the log-probabilities of `model.forward`."""
    ids = batch["tokens"]
    layout = None
    segments = np.ones(ids.shape, np.int32)
    if "segments" in batch:
        segments, layout = batch["segments"], Layout.from_segments(batch["segments"], 2)
    hidden = model.forward(params, ids, layout)[0]
    log_probs = jax.nn.log_softmax(hidden @ model.head(params).T)[:, :-1]
    log_probs = jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=-1)[..., 0]
    segments, k = np.asarray(segments), config.rollout_length
    predicted, windows = [], []
    for row in range(ids.shape[0]):
        for slot in range(ids.shape[1] - 1):
            document = segments[row, slot]
            if document == 0 or segments[row, slot + 1] != document:
                continue
            predicted.append((row, slot))
            of_window = segments[row, slot : slot + k + 1]
            if len(of_window) < k + 1 or (of_window != document).any():
                continue
            times = 1 if starts is None else int((starts[row] == slot + 1).sum())
            windows += [(row, slot)] * times
    nll = -jnp.mean(log_probs[tuple(np.transpose(predicted))])
    of_rows, slots = np.transpose(windows)
    # Of each window, the probabilities that its first 1, 2, ... k tokens are right.
    products = jnp.stack(
        [
            jnp.exp(sum(log_probs[of_rows, slots + i] for i in range(length)))
            for length in range(1, k + 1)
        ]
    )
    return nll, jnp.mean(products[-1] if config.reward == "whole" else products)


@pytest.mark.parametrize(("reward", "packed"), [("whole", True), ("prefix", False)])
def test_the_exact_objective_is_the_mean_of_products(reward, packed):
    """Loss, metric and gradient, as one micro-batch and as four."""
    model, params = quiet("deltanet")
    batch, weight = rows(packed), 3.0
    exact = PRESETS["exact"] | {"reward": reward, "lambda_rl": weight}
    config = dataclasses.replace(REFINE, **exact)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def by_hand(params):
        ntp, match = expected_match_by_hand(model, params, batch, config)
        return config.lambda_sft * ntp - weight * match, match

    (_, match), want = by_hand(params)
    objective = Objective(model, config, eos_id=2, max_documents=2)
    got, metrics = gradient_of(objective)(params, batch)
    assert_close(got, want, 1e-5)
    np.testing.assert_allclose(metrics["policy/expected_match"], match, rtol=1e-5)
    expected = moved(params, want)
    for micro_batch in (1, 4):
        after, figures = one_step("deltanet", exact, packed=packed, micro_batch=micro_batch)
        assert_close(after, expected, 1e-5)
        np.testing.assert_allclose(figures["policy/expected_match"], match, rtol=1e-5)


def test_the_exact_objective_at_chosen_positions():
    model, params = quiet("deltanet")
    exact = PRESETS["exact"] | {"selection": "variance", "reward": "prefix"}
    config = dataclasses.replace(REFINE, **exact)
    objective, batch = Objective(model, config, eos_id=2, max_documents=2), rows(True)
    keys = jax.random.split(jax.random.key(1), ROWS)
    got, metrics = gradient_of(objective)(params, batch, keys)

    @jax.jit
    def select(params, keys):
        return objective.select(objective.read(params, batch), keys)

    starts, valid = select(params, keys)
    assert starts.shape == (ROWS, config.num_positions)  # one of each, whatever n is
    starts = np.where(valid, starts, -1)

    def by_hand(params):
        ntp, match = expected_match_by_hand(model, params, batch, config, starts)
        return ntp - config.lambda_rl * match, match

    (_, match), want = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(params)
    np.testing.assert_allclose(metrics["policy/expected_match"], match, rtol=1e-5)
    assert_close(got, want, 1e-5)


def test_the_weight_of_the_policy_follows_its_schedule():
    """From `lambda_rl_until` on a step is one of next tokens."""
    after = functools.partial(one_step, "deltanet", packed=False, micro_batch=ROWS, steps=8)
    exact = PRESETS["exact"]
    linear = exact | {"lambda_rl_schedule": "linear", "lambda_rl_until": 0.5}
    half = exact | {"lambda_rl": REFINE.lambda_rl / 2}
    assert "lambda_rl" not in exact
    assert_close(after(linear, at=2)[0], after(half, at=2)[0], 1e-6)
    assert_close(after(linear, at=4)[0], after({"objective": "ntp"}, at=4)[0], 1e-6)
