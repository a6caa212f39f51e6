"""GRPO: group-relative advantages and the clipped policy loss.

Source: ReFINE (arXiv 2602.16704), section 3, GRPO (arXiv 2402.03300) and dual clipping
(arXiv 1912.09729). The letters: B sequences, c positions, n rollouts a position, k tokens a
rollout; N rollouts in any order where the grouping no longer matters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

GROUPINGS = ("sequence", "position")
AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
KL_PENALTIES = ("kl", "abs", "mse", "low_var_kl")

_STD_EPS = 1e-6
# Bound of log ratios before they are exponentiated.
_MAX_LOG_RATIO = 20.0


def normalize_groups(
    rewards: jax.Array, valid: jax.Array, *, normalize_std: bool = True
) -> jax.Array:
    """Advantages [..., M] float32 of groups of M rewards [..., M]; `valid` [..., M] bool.

    (r - mean) / (std + 1e-6) with the unbiased std of the group's valid rewards; without
    `normalize_std` only the mean is subtracted. A group with a single valid reward has mean 0 and
    std 1. Rewards that are not valid do not enter the statistics and get advantage 0, whatever
    their value.
    """
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
) -> jax.Array:
    """Advantages [B, c, n] float32 of the rollouts with `rewards` [B, c, n].

    valid: [B, c, n] bool (or broadcasting to it, as [B, c, 1]).
    grouping: `sequence` compares all c * n rollouts of a sequence (the paper, n = 1), `position`
        the n rollouts of each position.
    See `normalize_groups` for the formula. Raises ValueError for an unknown grouping.
    """
    if grouping not in GROUPINGS:
        raise ValueError(f"grouping must be one of {GROUPINGS}. Got: {grouping!r}.")
    valid = jnp.broadcast_to(valid, rewards.shape)
    batch, positions, repeats = rewards.shape
    groups = (batch, positions * repeats) if grouping == "sequence" else rewards.shape
    advantages = normalize_groups(
        rewards.reshape(groups), valid.reshape(groups), normalize_std=normalize_std
    )
    return advantages.reshape(rewards.shape)


def loss_sum(values: jax.Array, mask: jax.Array, aggregation: str) -> jax.Array:
    """Numerator of a loss over `values` [N, k] where `mask` [N, k] is not 0: scalar float32.

    It adds up over rollouts: the sums of micro-batches make the sum of the mini-batch, which the
    mini-batch's `loss_count` turns into the loss.

    token-mean: mean over tokens. seq-mean-token-sum, seq-mean-token-mean: mean over rollouts of
    the sum, or mean, over their tokens. seq-mean-token-sum-norm: sum over everything divided by k
    (so named in the published code, although it takes no mean over sequences).

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
    """Denominator to a `loss_sum` over `mask` [N, k]: scalar float32, at least 1.

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
    values: jax.Array,
    mask: jax.Array,
    aggregation: str,
    mini_batch_mask: jax.Array | None = None,
) -> jax.Array:
    """Loss over `values` [N, k] where `mask` [N, k] is not 0: scalar float32.

    mini_batch_mask: [N', k], where the rollouts are one micro-batch: mask of the whole mini-batch.
        The losses of the micro-batches then add up to the mini-batch's.
    See `loss_sum` for the aggregations.
    """
    whole = mask if mini_batch_mask is None else mini_batch_mask
    return loss_sum(values, mask, aggregation) / loss_count(whole, aggregation)


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
    """Clipped policy-gradient loss (to be minimised) of rollout tokens, and its metrics.

    log_probs, old_log_probs: [N, k], of the sampled tokens now and when they were sampled (nats).
    advantages: [N, k] (or [N, 1]), constants.
    mask: [N, k], 0 where a token does not count; whatever stands there has no influence.
    mini_batch_mask: see `aggregate`; metrics add up over micro-batches just so.

    With r = exp(clamp(log_probs - old_log_probs, -20, 20)) a token's loss is
    max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), for A < 0 at most -A dual_clip.

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
