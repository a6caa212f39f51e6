"""The method on some rows: one forward pass, select, roll out, reward, advantage, loss.

Pure functions of parameters and rows; `step.py` makes training steps of them. Rows come as
{"tokens": [B, T] int32, "segments": [B, T] int32}; segment 0 is padding, each other number a
document. Without "segments" every row is one document that fills it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.config import RefineConfig
from refine_jax.models.head import TokenStats, next_token_loss
from refine_jax.models.layout import Layout
from refine_jax.models.transformer import Model, Params, State, Trace
from refine_jax.parallel import constrain, over_shards, take_tokens
from refine_jax.refine.grpo import aggregate, group_advantages, kl_penalty, policy_loss
from refine_jax.refine.rewards import rollout_rewards
from refine_jax.refine.rollout import (
    Scores,
    fork_rollouts,
    sample_rollouts,
    score_rollouts,
    scores_of,
)
from refine_jax.refine.selection import rollout_slots, select_positions

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Trunk(NamedTuple):
    """The one forward pass over whole rows."""

    hidden: jax.Array  # [B, T, D]
    trace: Trace | None
    layout: Layout | None
    nll_sum: jax.Array  # scalar, over the predicted tokens
    stats: TokenStats  # [B, T] each
    weights: jax.Array  # [B, T] float32, 1 where the next token is predicted


class Forks(NamedTuple):
    """Where rollouts of rows begin, and what they are compared with. R = c * n."""

    starts: jax.Array  # [B, R] int32, slot of the first token
    valid: jax.Array  # [B, R] bool, whether there is a truth to compare with
    hidden: jax.Array  # [B, R, D], of the token before
    state: State  # leaves [L, B, R, ...], after that token
    truth: jax.Array  # [B, R, k] int32
    true_hidden: jax.Array  # [B, R, k, D], of the truth's tokens


class Experience(NamedTuple):
    """Rollouts with their rewards; constants for the gradient. R = c * n."""

    starts: jax.Array  # [B, R] int32, slot of the first token
    valid: jax.Array  # [B, R] bool, whether there is a truth to compare with
    tokens: jax.Array  # [B, R, k] int32
    rewards: jax.Array  # [B, R]
    advantages: jax.Array  # [B, R]
    old_log_probs: jax.Array  # [B, R, k], of the policy that rolled out
    ref_log_probs: jax.Array | None  # [B, R, k], of the initial policy


def layout_of(batch: Batch, max_documents: int) -> Layout | None:
    """Where the real tokens of the rows are."""
    segments = batch.get("segments")
    return None if segments is None else Layout.from_segments(segments, max_documents)


def target_weights(tokens: jax.Array, layout: Layout | None) -> jax.Array:
    """[B, T] float32: 1 where slot t and its target t + 1 are real and of one document."""
    if layout is None:
        return jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0.0)
    same = layout.document[:, 1:] == layout.document[:, :-1]
    has_target = layout.mask[:, 1:] & layout.mask[:, :-1] & same
    return jnp.pad(has_target, ((0, 0), (0, 1))).astype(jnp.float32)


def head_implementation(model: Model) -> str | None:
    """Implementation of the head's loss: like attention, it follows only "xla".

    Other names are those of the mixers' kernels.
    """
    return "xla" if model.policy.implementation == "xla" else None


def run_trunk(
    model: Model, params: Params, batch: Batch, *, with_trace: bool, max_documents: int = 1
) -> Trunk:
    """Forward pass, next-token loss and entropies of a batch."""
    layout = layout_of(batch, max_documents)
    hidden, trace = model.forward(params, batch["tokens"], layout, with_trace=with_trace)
    return _read_trunk(model, params, batch, layout, hidden, trace)


def run_trunk_with_rollouts(
    model: Model,
    params: Params,
    batch: Batch,
    starts: jax.Array,
    tokens: jax.Array,
    *,
    max_documents: int = 1,
) -> tuple[Trunk, Scores]:
    """`run_trunk`, and the scores of given rollouts `tokens` [B, R, k] from `starts` [B, R].

    Equal to `score_rollouts` after it, but no layer's trace outlives the layer.
    """
    layout = layout_of(batch, max_documents)
    hidden, forks = model.forward_with_forks(params, batch["tokens"], layout, starts, tokens)
    trunk = _read_trunk(model, params, batch, layout, hidden, None)
    last_hidden = take_tokens(hidden, starts - 1)
    return trunk, scores_of(model, params, last_hidden, forks, tokens)


def _read_trunk(model, params, batch, layout, hidden, trace) -> Trunk:
    tokens = batch["tokens"]
    weights = target_weights(tokens, layout)
    targets = jnp.roll(tokens, -1, axis=1)
    nll_sum, stats = next_token_loss(
        hidden, model.head(params), targets, weights, implementation=head_implementation(model)
    )
    return Trunk(hidden, trace, layout, nll_sum, stats, weights)


def fork_rows(
    model: Model,
    params: Params,
    trunk: Trunk,
    batch: Batch,
    keys: jax.Array,
    config: RefineConfig,
) -> Forks:
    """Select positions of the rows and fork there; keys: [B]. Nothing here is differentiated."""
    params, trunk = lax.stop_gradient((params, trunk))
    layout = trunk.layout
    selection = select_positions(
        keys,
        constrain(trunk.stats.entropy, "batch"),
        jnp.ones(trunk.weights.shape, bool) if layout is None else layout.mask,
        num_positions=config.num_positions,
        rollout_length=config.rollout_length,
        method=config.selection,
        temperature=config.selection_temperature,
        edge_margin=config.edge_margin,
        document=None if layout is None else layout.document,
    )
    repeat = functools.partial(jnp.repeat, repeats=config.rollouts_per_position, axis=1)
    starts, valid = repeat(selection.starts), repeat(selection.valid)
    k = config.rollout_length
    hidden, state = fork_rollouts(model, params, trunk.hidden, trunk.trace, starts, k)
    slots = rollout_slots(starts, k)
    truth, true_hidden = take_tokens(batch["tokens"], slots), take_tokens(trunk.hidden, slots)
    return Forks(starts, valid, hidden, state, truth, true_hidden)


def judge(
    forks: Forks,
    tokens: jax.Array,
    scores: Scores,
    config: RefineConfig,
    ref_log_probs: jax.Array | None = None,
) -> Experience:
    """Rewards of rollouts [B, R, k] against the true continuation, and advantages within each
    group.
    """
    scores = lax.stop_gradient(scores)
    rewards = rollout_rewards(config.reward, scores.hidden, forks.true_hidden, tokens, forks.truth)
    group = (forks.starts.shape[0], config.num_positions, config.rollouts_per_position)
    advantages = over_shards(
        functools.partial(
            group_advantages, grouping=config.grouping, normalize_std=config.normalize_std
        ),
        (("batch",), ("batch",)),
        ("batch",),
    )(rewards.reshape(group), forks.valid.reshape(group)).reshape(forks.starts.shape)
    return Experience(
        forks.starts, forks.valid, tokens, rewards, advantages, scores.log_probs, ref_log_probs
    )


class Method:
    """The losses of one configuration, as pure functions of parameters and rows."""

    def __init__(
        self,
        model: Model,
        config: RefineConfig,
        *,
        eos_id: int | Sequence[int] | None,
        max_documents: int,
    ):
        self.model = model
        self.config = config
        self.eos_id = eos_id
        self.max_documents = max_documents

    def trunk(self, params: Params, batch: Batch) -> Trunk:
        """The forward pass that the objective needs."""
        return run_trunk(
            self.model,
            params,
            batch,
            with_trace=self.config.objective == "refine",
            max_documents=self.max_documents,
        )

    def trunk_with_rollouts(
        self, params: Params, batch: Batch, starts: jax.Array, tokens: jax.Array
    ) -> tuple[Trunk, Scores]:
        """The forward pass together with given rollouts."""
        return run_trunk_with_rollouts(
            self.model, params, batch, starts, tokens, max_documents=self.max_documents
        )

    def reference_log_probs(
        self, reference_params: Params | None, batch: Batch, starts: jax.Array, tokens: jax.Array
    ) -> jax.Array | None:
        """[B, R, k] of the initial policy, where the KL term asks for them."""
        if self.config.kl_coef == 0:
            return None
        scores = self.trunk_with_rollouts(reference_params, batch, starts, tokens)[1]
        return lax.stop_gradient(scores.log_probs)

    def fork(self, params: Params, trunk: Trunk, batch: Batch, keys: jax.Array) -> Forks:
        """Select positions of rows, with their keys [B], and fork there."""
        select_keys = jax.vmap(jax.random.split)(keys)[:, 0]
        return fork_rows(self.model, params, trunk, batch, select_keys, self.config)

    def sample(self, params: Params, forks: Forks, keys: jax.Array) -> jax.Array:
        """Rollouts [B, R, k] of rows, with their keys [B]; not differentiated."""
        config = self.config
        return sample_rollouts(
            self.model,
            lax.stop_gradient(params),
            forks.hidden,
            forks.state,
            jax.vmap(jax.random.split)(keys)[:, 1],
            rollout_length=config.rollout_length,
            temperature=config.sampling_temperature,
            forbidden_token=self.eos_id if config.forbid_eos else None,
        )

    def experience(
        self, params: Params, forks: Forks, tokens: jax.Array, ref_log_probs: jax.Array | None
    ) -> Experience:
        """What rollouts are worth."""
        hidden, _ = self.model.extend(params, tokens, forks.state)
        scores = scores_of(self.model, params, forks.hidden, hidden, tokens)
        return judge(forks, tokens, scores, self.config, ref_log_probs)

    def collect(
        self, params: Params, reference_params: Params | None, batch: Batch, keys: jax.Array
    ) -> tuple[Experience, Trunk]:
        """The experience of some rows, with keys [B], and the forward pass it comes from."""
        trunk = self.trunk(params, batch)
        forks = self.fork(params, trunk, batch, keys)
        tokens = self.sample(params, forks, keys)
        ref_log_probs = self.reference_log_probs(reference_params, batch, forks.starts, tokens)
        return self.experience(params, forks, tokens, ref_log_probs), trunk

    def _roll_out(self, params, reference_params, trunk, batch, keys) -> tuple[Experience, Scores]:
        """`collect` after a forward pass, with scores that are differentiable through it."""
        forks = self.fork(params, trunk, batch, keys)
        tokens = self.sample(params, forks, keys)
        scores = score_rollouts(self.model, params, trunk.hidden, trunk.trace, forks.starts, tokens)
        ref_log_probs = self.reference_log_probs(reference_params, batch, forks.starts, tokens)
        return judge(forks, tokens, scores, self.config, ref_log_probs), scores

    def loss(
        self,
        params: Params,
        batch: Batch,
        experience: Experience | None,
        *,
        keys: jax.Array | None = None,
        reference_params: Params | None = None,
        token_count: jax.Array,
        valid: jax.Array | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """Loss of a micro-batch, as its share of the mini-batch's; losses and metrics add up.

        experience: of these rows; None: roll out now, with `keys` [B].
        token_count: predicted tokens of the mini-batch. valid: [mini-batch, R] bool, of its
        rollouts; None where the rows are the whole mini-batch.
        """
        config, scores = self.config, None
        if experience is None:
            trunk = self.trunk(params, batch)
        else:
            rollouts = experience.starts, experience.tokens
            trunk, scores = self.trunk_with_rollouts(params, batch, *rollouts)
        ntp = trunk.nll_sum / token_count
        metrics = {
            "loss/ntp": ntp,
            "accuracy": jnp.sum(trunk.stats.correct * trunk.weights) / token_count,
            "entropy/mean": jnp.sum(trunk.stats.entropy * trunk.weights) / token_count,
        }
        if config.objective == "ntp":
            return ntp, {"loss/total": ntp} | metrics

        if experience is None:
            experience, scores = self._roll_out(params, reference_params, trunk, batch, keys)

        k = config.rollout_length
        mask = _token_mask(experience.valid, k)
        whole = mask if valid is None else _token_mask(valid, k)
        policy, policy_metrics = policy_loss(
            scores.log_probs.reshape(-1, k),
            experience.old_log_probs.reshape(-1, k),
            experience.advantages.reshape(-1, 1),
            mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            aggregation=config.loss_aggregation,
            mini_batch_mask=whole,
        )
        entropies = scores.entropies.reshape(-1, k)
        metrics |= {f"policy/{name}": value for name, value in policy_metrics.items()}
        metrics["policy/entropy"] = aggregate(entropies, mask, "token-mean", whole)
        metrics["loss/policy"] = policy
        total = config.lambda_sft * ntp + config.lambda_rl * policy
        if config.kl_coef > 0:
            penalty = kl_penalty(
                scores.log_probs.reshape(-1, k),
                experience.ref_log_probs.reshape(-1, k),
                config.kl_type,
            )
            metrics["loss/kl"] = aggregate(penalty, mask, config.loss_aggregation, whole)
            total += config.lambda_rl * config.kl_coef * metrics["loss/kl"]
        metrics["loss/total"] = total
        return total, metrics | _reward_shares(experience, mask, whole)


def _token_mask(valid: jax.Array, rollout_length: int) -> jax.Array:
    """[B, R] bool -> [B * R, k] float32."""
    return jnp.repeat(valid.reshape(-1, 1), rollout_length, axis=1).astype(jnp.float32)


def _reward_shares(experience: Experience, mask: jax.Array, whole: jax.Array) -> Metrics:
    """First and second moments of rewards and advantages, which add up over micro-batches."""

    def mean(x):
        return aggregate(jnp.broadcast_to(x.reshape(-1, 1), mask.shape), mask, "token-mean", whole)

    return {
        "reward/mean": mean(experience.rewards),
        "reward/square": mean(experience.rewards**2),
        "advantage/mean": mean(experience.advantages),
        "advantage/square": mean(experience.advantages**2),
        "rollouts/valid": jnp.sum(experience.valid) / (whole.shape[0]),
    }
