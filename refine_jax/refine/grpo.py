"""GRPO: group-relative advantages and the clipped policy loss.

Source: ReFINE (arXiv 2602.16704), section 3, GRPO (arXiv 2402.03300), dual clipping
(arXiv 1912.09729), leave-one-out baselines (RLOO, arXiv 2402.14740) and the optimal token baseline
(arXiv 2602.07078). The letters: B sequences, c positions, n rollouts a position, k tokens a
rollout; N rollouts in any order where the grouping no longer matters.

What is unbiased, of the gradient of the expected reward of the policy that rolled out, where the
ratio is 1, sampling is at temperature 1 and no token is forbidden:

| choice | expectation of the gradient |
|---|---|
| baseline `leave_one_out` | the true one, with either credit and grouping, for groups of any size |
| baseline `group` | (M - 1) / M of it, in groups of M > 1: a rollout's own reward is in its mean |
| baseline `optimal_token` | near `group`: a rollout's own return and energy are in its baseline |
| credit `reward_to_go` | the same as `sequence`: rewards before a token do not depend on it |
| `normalize_std` | none of these: a group's weight depends on its rewards |

The aggregation `seq-mean-token-sum` has this scale; `token-mean` and `seq-mean-token-mean` give
1 / k of it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from refine_jax.config import RefineConfig
from refine_jax.refine.optimizer import decayed

GROUPINGS = ("sequence", "position")
CREDITS = ("sequence", "reward_to_go")
BASELINES = ("group", "leave_one_out", "optimal_token")
AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
KL_PENALTIES = ("kl", "abs", "mse", "low_var_kl")

_STD_EPS = 1e-6
# Added to gradient energies: where a group has none, each rollout weighs the same.
_ENERGY_EPS = 1e-8
# Bound of log ratios before they are exponentiated.
_MAX_LOG_RATIO = 20.0


def normalize_groups(
    rewards: jax.Array,
    valid: jax.Array,
    *,
    normalize_std: bool = True,
    baseline: str = "group",
    energy: jax.Array | None = None,
) -> jax.Array:
    """Compute advantages [..., M] float32 of groups of M rewards [..., M]; `valid` [..., M] bool.

    An advantage is (r - b) / (std + 1e-6), with the unbiased std of the group's valid rewards;
    without `normalize_std` it is r - b. The baseline b is, of the group's valid rewards, the mean
    (`group`), the mean of the others (`leave_one_out`) or the mean weighted by `energy` [..., M],
    at least 0, which is the plain mean where that is 0 throughout (`optimal_token`).

    A group with a single valid reward has baseline 0 and std 1, whatever the baseline. Rewards that
    are not valid do not enter the statistics and get advantage 0, whatever their value. Raises
    ValueError for an unknown baseline, and for `optimal_token` without energies.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline must be one of {BASELINES}. Got: {baseline!r}.")
    if baseline == "optimal_token" and energy is None:
        raise ValueError("baseline 'optimal_token' needs gradient energies. Got: energy=None.")
    rewards = rewards.astype(jnp.float32)
    count = jnp.sum(valid, axis=-1, keepdims=True, dtype=jnp.float32)
    # Deviations are taken from the group's largest reward first: where all are equal they are
    # exactly 0, while a rounded mean would differ from the rewards by up to an ulp, which the
    # division by 1e-6 makes visible.
    largest = jnp.max(jnp.where(valid, rewards, -jnp.inf), axis=-1, keepdims=True)
    shifted = jnp.where(valid, rewards - largest, 0.0)
    centred = shifted - jnp.sum(shifted, axis=-1, keepdims=True) / jnp.maximum(count, 1.0)
    centred = jnp.where(valid, centred, 0.0)
    squares = jnp.sum(centred * centred, axis=-1, keepdims=True)
    std = jnp.sqrt(squares / jnp.maximum(count - 1.0, 1.0))
    alone = count <= 1.0
    if baseline == "leave_one_out":
        centred *= count / jnp.maximum(count - 1.0, 1.0)
    elif baseline == "optimal_token":
        weights = jnp.where(valid, energy + _ENERGY_EPS, 0.0)
        total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), _ENERGY_EPS)
        centred = shifted - jnp.sum(weights * shifted, axis=-1, keepdims=True) / total
    deviation = jnp.where(alone, rewards, centred)
    if normalize_std:
        deviation = deviation / (jnp.where(alone, 1.0, std) + _STD_EPS)
    return jnp.where(valid, deviation, 0.0)


def group_advantages(
    rewards: jax.Array,
    valid: jax.Array,
    *,
    grouping: str = "sequence",
    normalize_std: bool = True,
    baseline: str = "group",
    energy: jax.Array | None = None,
) -> jax.Array:
    """Compute advantages [B, c, n] float32 of rollouts with `rewards` [B, c, n]
    (`normalize_groups`).

    valid: [B, c, n] bool (or broadcasting to it, as [B, c, 1]). grouping: `sequence` compares all c
    * n rollouts of a sequence (the paper, n = 1), `position` the n rollouts of each position.
    energy: [B, c, n], of the baseline `optimal_token`. Raises ValueError for an unknown grouping.
    """
    if grouping not in GROUPINGS:
        raise ValueError(f"grouping must be one of {GROUPINGS}. Got: {grouping!r}.")
    valid = jnp.broadcast_to(valid, rewards.shape)
    batch, positions, repeats = rewards.shape
    groups = (batch, positions * repeats) if grouping == "sequence" else rewards.shape
    advantages = normalize_groups(
        rewards.reshape(groups),
        valid.reshape(groups),
        normalize_std=normalize_std,
        baseline=baseline,
        energy=None if energy is None else energy.reshape(groups),
    )
    return advantages.reshape(rewards.shape)


def token_returns(
    rewards: jax.Array, *, credit: str = "sequence", own_reward: bool = True
) -> jax.Array:
    """Credit each token of a rollout with a return, [..., k] float32, of `rewards` [..., k].

    credit: `sequence`: the mean of all rewards, for every token. `reward_to_go`: the sum of the
    rewards of this token and of later ones, divided by k, which leaves out what a token cannot
    influence. own_reward: False where the reward of a token does not depend on the token itself
    (`expected`): `reward_to_go` then begins with the next token's.

    Raises ValueError for an unknown credit.
    """
    rewards = rewards.astype(jnp.float32)
    if credit == "sequence":
        return jnp.broadcast_to(jnp.mean(rewards, axis=-1, keepdims=True), rewards.shape)
    if credit != "reward_to_go":
        raise ValueError(f"credit must be one of {CREDITS}. Got: {credit!r}.")
    # Summed from the end on: the sum of all minus those before would leave rounding errors where
    # all later rewards are equal.
    sums = jnp.flip(jnp.cumsum(jnp.flip(rewards, axis=-1), axis=-1), axis=-1)
    if not own_reward:
        sums = jnp.concatenate([sums[..., 1:], jnp.zeros_like(sums[..., :1])], axis=-1)
    return sums / rewards.shape[-1]


def gradient_energy(log_probs: jax.Array, squared_probs: jax.Array) -> jax.Array:
    """Accumulate the gradient energy W [..., k] float32 up to each token of a rollout.

    log_probs: [..., k], of the sampled tokens. squared_probs: [..., k], the sum over the vocabulary
    of the squares of the probabilities at that place (`sum_squared_probs`).

    W_j = sum over i <= j of 1 - 2 p_i + sum_v p_i(v)^2: the squared norm of the gradient of log p_i
    by the logits, which stands for that by the parameters (arXiv 2602.07078, section 4).
    """
    norms = 1.0 - 2.0 * jnp.exp(log_probs.astype(jnp.float32)) + squared_probs
    # Of a token with probability 1 nothing but rounding is left.
    return jnp.cumsum(jnp.maximum(norms, 0.0), axis=-1)


def sum_squared_probs(logits: jax.Array) -> jax.Array:
    """Sum the squares of the probabilities, [...] float32 in 0..1, from `logits` [..., V]."""
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1)
    return jnp.exp(jax.nn.logsumexp(2.0 * logits, axis=-1) - 2.0 * total)


def token_advantages(
    rewards: jax.Array,
    valid: jax.Array,
    *,
    credit: str = "sequence",
    baseline: str = "group",
    grouping: str = "sequence",
    normalize_std: bool = True,
    own_reward: bool = True,
    energy: jax.Array | None = None,
) -> jax.Array:
    """Compute advantages [B, c, n, k] float32 of tokens with `rewards` [B, c, n, k]; constants.

    Each token's return (`token_returns`) is compared with those of the same place in the other
    rollouts of the group (`group_advantages`, `normalize_groups`).

    valid: [B, c, n] bool (or broadcasting to it), of rollouts. energy: [B, c, n, k],
    `gradient_energy`, for the baseline `optimal_token`. The docstring of this module says which
    choices are unbiased. Raises ValueError for unknown names.
    """
    returns = token_returns(rewards, credit=credit, own_reward=own_reward)

    def compare(returns, energy):
        return group_advantages(
            returns,
            valid,
            grouping=grouping,
            normalize_std=normalize_std,
            baseline=baseline,
            energy=energy,
        )

    if credit == "sequence" and baseline != "optimal_token":  # all tokens have one return
        return jnp.broadcast_to(compare(returns[..., 0], None)[..., None], returns.shape)
    return jax.vmap(compare, in_axes=-1, out_axes=-1)(returns, energy)


def loss_sum(values: jax.Array, mask: jax.Array, aggregation: str) -> jax.Array:
    """Sum the numerator of a loss over `values` [N, k] where `mask` [N, k] is not 0: a scalar.

    It adds up over rollouts: the sums of micro-batches make the sum of the mini-batch, which the
    mini-batch's `loss_count` turns into the loss.

    token-mean: mean over tokens. seq-mean-token-sum, seq-mean-token-mean: mean over rollouts of the
    sum, or mean, over their tokens. seq-mean-token-sum-norm: sum over everything divided by k (so
    named in the published code, although it takes no mean over sequences).

    Rollouts without any valid token count in none of the means. (The published code has them count
    as 0 in seq-mean-token-sum and gives NaN in seq-mean-token-mean.) Raises ValueError for an
    unknown aggregation.
    """
    _check_aggregation(aggregation)
    counted = mask != 0
    per_rollout = jnp.sum(jnp.where(counted, values, 0.0), axis=-1, dtype=jnp.float32)
    if aggregation == "seq-mean-token-mean":
        per_rollout /= jnp.maximum(jnp.sum(counted, axis=-1, dtype=jnp.float32), 1.0)
    return jnp.sum(per_rollout)


def loss_count(mask: jax.Array, aggregation: str) -> jax.Array:
    """Count the denominator of a `loss_sum` over `mask` [N, k]: scalar float32, at least 1.

    The number of valid tokens, or of rollouts with valid tokens, or k, as `aggregation` says.
    """
    _check_aggregation(aggregation)
    if aggregation == "seq-mean-token-sum-norm":
        return jnp.float32(mask.shape[-1])
    counted = mask != 0 if aggregation == "token-mean" else jnp.any(mask != 0, axis=-1)
    return jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)


def _check_aggregation(aggregation: str) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"loss_aggregation must be one of {AGGREGATIONS}. Got: {aggregation!r}.")


def aggregate(
    values: jax.Array, mask: jax.Array, aggregation: str, mini_batch_mask: jax.Array | None = None
) -> jax.Array:
    """Compute the loss over `values` [N, k] where `mask` [N, k] is not 0 (`loss_sum`): scalar
    float32.

    mini_batch_mask: [N', k], where the rollouts are one micro-batch: mask of the whole mini-batch.
    The losses of the micro-batches then add up to the mini-batch's.
    """
    whole = mask if mini_batch_mask is None else mini_batch_mask
    return loss_sum(values, mask, aggregation) / loss_count(whole, aggregation)


def reward_shares(
    rewards: jax.Array, advantages: jax.Array, mask: jax.Array, whole: jax.Array
) -> dict[str, jax.Array]:
    """Average rewards and advantages, and their squares: means that add up over micro-batches.

    rewards: [B, R]. advantages: [B, R, k or 1]. mask: [B R, k]. whole: the mask of the mini-batch.
    """

    def mean(x):
        x = jnp.broadcast_to(x.reshape(len(mask), -1), mask.shape)
        return aggregate(x, mask, "token-mean", whole)

    return {
        "reward/mean": mean(rewards),
        "reward/square": mean(rewards**2),
        "advantage/mean": mean(advantages),
        "advantage/square": mean(advantages**2),
    }


def loss_options(config: RefineConfig) -> dict[str, Any]:
    """Read the clipping and the aggregation of `policy_loss` from a configuration."""
    return {
        "clip_low": config.clip_low,
        "clip_high": config.clip_high,
        "dual_clip": config.dual_clip,
        "aggregation": config.loss_aggregation,
    }


def policy_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    aggregation: str = "token-mean",
    mini_batch_mask: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the clipped policy-gradient loss (to minimise) of rollout tokens, and its metrics.

    log_probs, old_log_probs: [N, k], of the sampled tokens now and when they were sampled (nats).
    advantages: [N, k] (or [N, 1]), constants. mask: [N, k], 0 where a token does not count;
    whatever stands there has no influence. mini_batch_mask: see `aggregate`; metrics add up over
    micro-batches just so.

    With r = exp(clamp(log_probs - old_log_probs, -20, 20)) a token's loss is max(-A r, -A clip(r, 1
    - clip_low, 1 + clip_high)), for A < 0 at most -A dual_clip.

    Metrics, means over tokens: `clip_fraction` (the ratio was clipped), `clip_fraction_lower` (the
    dual clip acts), `ppo_kl` (mean of old_log_probs - log_probs, clamped).
    """
    counted = mask != 0
    log_ratio = jnp.where(counted, log_probs - old_log_probs, 0.0)
    advantages = jnp.where(counted, advantages, 0.0)
    log_ratio = jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = jnp.exp(log_ratio)
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    worst = jnp.maximum(plain, clipped)
    bound = -advantages * dual_clip
    negative = advantages < 0
    losses = jnp.where(negative, jnp.minimum(worst, bound), worst)
    per_token = {
        "clip_fraction": clipped > plain,
        "clip_fraction_lower": negative & (worst > bound),
        "ppo_kl": -log_ratio,
    }
    metrics = {
        name: aggregate(value.astype(jnp.float32), mask, "token-mean", mini_batch_mask)
        for name, value in per_token.items()
    }
    return aggregate(losses, mask, aggregation, mini_batch_mask), metrics


def expected_reward_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    true_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    aggregation: str = "token-mean",
    mini_batch_mask: jax.Array | None = None,
    **clipping: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the loss of rollouts with reward `expected` (`rewards.token_rewards`), and metrics.

    true_log_probs: [N, k], of the true token at each place, given the rollout's tokens before it;
    differentiated. advantages: [N, k], constants, of `token_advantages` with `own_reward` False.
    The other arguments and the metrics are those of `policy_loss`.

    The expected reward J = E[(r_1 + ... + r_k) / k], r_j = p(true token j | rollout before j), is
    that of `binary`. Its gradient has two parts: the rewards' own, and a score term for what token
    j does to the rewards after it:

        grad J = E[sum_j (grad r_j / k + G_j grad log p(token j))],  G_j = (r_{j+1} + ... + r_k) / k

    So -(r_j / k) is added to the policy loss of every token; the gradient of the sum is unbiased
    where that of `policy_loss` is (the docstring of this module says where, and with what scale).
    """
    loss, metrics = policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        aggregation=aggregation,
        mini_batch_mask=mini_batch_mask,
        **clipping,
    )
    length = jnp.maximum(jnp.sum(mask != 0, axis=-1, keepdims=True, dtype=jnp.float32), 1.0)
    rewards = jnp.exp(jnp.where(mask != 0, true_log_probs, -jnp.inf)) / length
    return loss - aggregate(rewards, mask, aggregation, mini_batch_mask), metrics


def policy_weight(
    config: RefineConfig, step: jax.Array | int, steps: int | None
) -> jax.Array | float:
    """Compute the weight of the policy loss, or expected reward, in a step: scalar float32.

    step: from 0, of `steps` training steps in all; may be traced. steps may be None where the
    weight stays as it is, else ValueError.

    `lambda_rl` times 1 (`lambda_rl_schedule` constant), 1 - x (linear) or (1 + cos(pi x)) / 2
    (cosine), with x = step / (lambda_rl_until * steps); 0 from x = 1 on.
    """
    if config.lambda_rl_schedule == "constant" and config.lambda_rl_until == 1:
        return jnp.float32(config.lambda_rl)
    if steps is None:
        raise ValueError("The schedule of lambda_rl needs the number of steps. Got: steps=None.")
    # Rounded first: 0.7 * 10 is a little more than 7 in floating point.
    end = math.ceil(round(config.lambda_rl_until * steps, 6))
    x = jnp.minimum(jnp.asarray(step, jnp.float32) / (config.lambda_rl_until * steps), 1.0)
    weight = config.lambda_rl * decayed(config.lambda_rl_schedule, x)
    return jnp.where(step < end, weight, 0.0)


def kl_penalty(log_probs: jax.Array, ref_log_probs: jax.Array, kind: str) -> jax.Array:
    """Estimate token by token of KL(policy || reference), shape as `log_probs` [N, k], in nats.

    kl: the log ratio (k1). abs: its absolute value. mse: half its square (k2). low_var_kl:
    exp(-x) - 1 + x of the log ratio x clamped to +-20, clamped to +-10 (k3,
    http://joschu.net/blog/kl-approx.html). Raises ValueError for an unknown kind.
    """
    log_ratio = log_probs - ref_log_probs
    match kind:
        case "kl":
            return log_ratio
        case "abs":
            return jnp.abs(log_ratio)
        case "mse":
            return 0.5 * jnp.square(log_ratio)
        case "low_var_kl":
            inverse = jnp.clip(-log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
            return jnp.clip(jnp.expm1(inverse) - inverse, -10.0, 10.0)
    raise ValueError(f"kl_type must be one of {KL_PENALTIES}. Got: {kind!r}.")
