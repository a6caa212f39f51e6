"""The method on some rows: one forward pass, select, roll out, reward, advantage, gradient.

With `refine.estimator` "exact" nothing is rolled out: the expected reward is a function of the true
tokens' probabilities (`exact.py`).

Pure functions of parameters and rows; `step.py` makes training steps of them. Rows come as
{"tokens": [B, T] int32, "segments": [B, T] int32}; segment 0 is padding, each other number a
document. Without "segments" every row is one document that fills it.

Letters: B rows, T tokens, D model dim, c positions a row, n rollouts a position, R = c * n, k
tokens a rollout.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.config import RefineConfig
from refine_jax.models.head import (
    TokenStats,
    logits,
    next_token_loss,
    reweighted_loss,
    token_log_probs,
)
from refine_jax.models.layout import Layout
from refine_jax.models.transformer import Model, Params, State, Trace, TracedForks
from refine_jax.parallel import constrain, over_shards, take_tokens
from refine_jax.refine.exact import (
    expected_match,
    expected_match_loss,
    match_count,
    match_probabilities,
    match_weights,
)
from refine_jax.refine.grpo import (
    aggregate,
    expected_reward_loss,
    gradient_energy,
    kl_penalty,
    loss_options,
    policy_loss,
    sum_squared_probs,
    token_advantages,
)
from refine_jax.refine.rewards import EXPECTED, token_rewards
from refine_jax.refine.rollout import (
    Scores,
    fork_rollouts,
    predictors_of,
    sample_rollouts,
    scores_of,
)
from refine_jax.refine.selection import rollout_slots, select_positions, selectable

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Reading(NamedTuple):
    """What a forward pass over whole rows says of them."""

    hidden: jax.Array  # [B, T, D]
    trace: Trace | None
    layout: Layout | None
    nll_sum: jax.Array  # scalar, over the predicted tokens
    stats: TokenStats  # [B, T] each
    weights: jax.Array  # [B, T] float32, 1 where the next token is predicted


class Experience(NamedTuple):
    """Rollouts with their rewards; constants for the gradient."""

    starts: jax.Array  # [B, R] int32, slot of the first token
    valid: jax.Array  # [B, R] bool, whether there is a truth to compare with
    tokens: jax.Array  # [B, R, k] int32
    rewards: jax.Array  # [B, R]
    advantages: jax.Array  # [B, R, k], or [B, R, 1] where all tokens of a rollout have one
    old_log_probs: jax.Array  # [B, R, k], of the policy that rolled out
    ref_log_probs: jax.Array | None  # [B, R, k], of the initial policy


class MiniBatch(NamedTuple):
    """What the losses of a mini-batch's M rows are means over, and the weight of the policy's.

    The latter is that of the expected reward where nothing is rolled out.
    """

    token_count: jax.Array  # scalar float32, predicted tokens, at least 1
    policy_weight: jax.Array | float = 0.0  # scalar
    valid: jax.Array | None = None  # [M, R] bool, of the rollouts; None where none are chosen
    windows: jax.Array | None = None  # scalar float32, of which the exact estimator takes the mean


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


def read_hidden(
    model: Model, params: Params, batch: Batch, layout: Layout | None, hidden: jax.Array
) -> tuple[jax.Array, tuple[TokenStats, jax.Array]]:
    """Sum of the next-token losses (nats) of rows with these hidden states [B, T, D].

    Beside it the statistics and weights of `Reading`.
    """
    tokens = batch["tokens"]
    weights = target_weights(tokens, layout)
    nll_sum, stats = next_token_loss(
        hidden,
        model.head(params),
        jnp.roll(tokens, -1, axis=1),
        weights,
        implementation=head_implementation(model),
    )
    return nll_sum, (stats, weights)


def read_rows(
    model: Model, params: Params, batch: Batch, *, with_trace: bool, max_documents: int = 1
) -> Reading:
    """Forward pass, next-token loss and entropies of rows."""
    layout = layout_of(batch, max_documents)
    hidden, trace = model.forward(params, batch["tokens"], layout, with_trace=with_trace)
    nll_sum, (stats, weights) = read_hidden(model, params, batch, layout, hidden)
    return Reading(hidden, trace, layout, nll_sum, stats, weights)


class Objective:
    """The losses of one configuration, and their gradients, as pure functions of parameters and
    rows.

    eos_id: the token, or tokens, that rollouts never sample, if `config.forbid_eos`. max_documents:
    most documents packed into a row.
    """

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

    @property
    def rolls_out(self) -> bool:
        """Whether the loss is one of rollouts, besides that of the next tokens."""
        return self.config.objective == "refine" and self.config.estimator == "rollouts"

    @property
    def chooses(self) -> bool:
        """Whether positions are chosen; else there are none, or every position counts."""
        return self.config.objective == "refine" and self.config.selection != "all"

    def mini_batch(self, batch: Batch, policy_weight: jax.Array | float | None = None) -> MiniBatch:
        """Count what the losses of M rows [M, T] are means over, before any forward pass.

        policy_weight: scalar; None: `config.lambda_rl`.
        """
        config, tokens = self.config, batch["tokens"]
        layout = layout_of(batch, self.max_documents)
        weights = target_weights(tokens, layout)
        token_count = jnp.maximum(jnp.sum(weights), 1.0)
        if config.objective == "ntp":
            return MiniBatch(token_count)
        policy_weight = config.lambda_rl if policy_weight is None else policy_weight
        if not self.chooses:
            _, counted = match_probabilities(weights, weights, config.rollout_length)
            return MiniBatch(token_count, policy_weight, windows=match_count(counted))
        valid = selectable(**self._spans(layout, tokens.shape))[1]
        valid = jnp.repeat(valid, self._repeats, axis=1)
        return MiniBatch(token_count, policy_weight, valid, match_count(valid))

    @property
    def _repeats(self) -> int:
        """Rollouts from each chosen position; the exact estimator needs one."""
        return self.config.rollouts_per_position if self.rolls_out else 1

    def _spans(self, layout: Layout | None, shape: tuple[int, int]) -> dict[str, Any]:
        """Where positions of rows of that shape [B, T] may be, as `selection` takes it."""
        config = self.config
        return {
            "mask": jnp.ones(shape, bool) if layout is None else layout.mask,
            "document": None if layout is None else layout.document,
            "num_positions": config.num_positions,
            "rollout_length": config.rollout_length,
            "edge_margin": config.edge_margin,
        }

    def gradient(
        self,
        params: Params,
        batch: Batch,
        whole: MiniBatch,
        *,
        keys: jax.Array | None = None,
        experience: Experience | None = None,
        reference_params: Params | None = None,
    ) -> tuple[Params, Metrics]:
        """Gradient and metrics of a micro-batch: its share of the mini-batch's, which add up.

        whole: of the mini-batch. keys: [B], of the rows, where positions are chosen here.
        experience: rollouts of these rows; None: roll out in the very forward pass that the
        gradient goes back through.
        """
        if self.rolls_out:
            return self._rollout_gradient(params, batch, whole, keys, experience, reference_params)
        loss = self._next_token_loss if self.config.objective == "ntp" else self._exact_loss
        return jax.grad(loss, has_aux=True)(params, batch, whole, keys)

    def _rollout_gradient(self, params, batch, whole, keys, experience, reference_params):
        """Written out rather than left to autodiff of a loss: rollouts are sampled between the
        forward pass and the backward pass of the rows, which then takes them along.
        """
        model, config, tokens = self.model, self.config, batch["tokens"]
        layout = layout_of(batch, self.max_documents)
        # The one forward pass; rollouts that are known already go through it with their rows.
        if experience is None:
            rows = model.run_rows(params, tokens, layout)
            hidden = rows.hidden
        else:
            starts, rollouts = experience.starts, experience.tokens
            (hidden, fork_hidden), pull_layers = jax.vjp(
                lambda p: model.forward_with_forks(p, tokens, layout, starts, rollouts), params
            )

        # Next tokens, whose entropies say where to roll out.
        head = model.head_params(params)
        nll_sum, pull_next_tokens, (stats, weights) = jax.vjp(
            lambda head, hidden: read_hidden(model, head, batch, layout, hidden),
            head,
            hidden,
            has_aux=True,
        )
        if experience is None:
            reading = Reading(hidden, rows.trace, layout, nll_sum, stats, weights)
            experience, fork_hidden, fork_inputs = self.roll_out(
                params, reading, batch, keys, reference_params
            )
            starts, rollouts = experience.starts, experience.tokens

            def pull_layers(cotangents):
                return (model.backward(params, rows, starts, rollouts, fork_inputs, cotangents),)

        # The policy loss: of the rollouts, and of the hidden states before them.
        true_tokens, _ = self.truth(batch, hidden, starts)

        def policy(head, last_hidden, fork_hidden):
            scores = self.scores(head, last_hidden, fork_hidden, rollouts, true_tokens)
            return self._policy_loss(experience, scores, whole)

        last_hidden, pull_last = jax.vjp(lambda x: take_tokens(x, starts - 1), hidden)
        policy_loss, pull_policy, metrics = jax.vjp(
            policy, head, last_hidden, fork_hidden, has_aux=True
        )
        # Back through head, rows and rollouts.
        from_tokens, of_hidden = pull_next_tokens(config.lambda_sft / whole.token_count)
        policy_weight = jnp.asarray(whole.policy_weight, jnp.float32)
        from_policy, of_last, of_forks = pull_policy(policy_weight)
        (gradient,) = pull_layers((of_hidden + pull_last(of_last)[0], of_forks))
        gradient = _add_parts(gradient, _add_parts(from_tokens, from_policy))
        ntp, ntp_metrics = self._next_token_metrics(nll_sum, stats, weights, whole)
        total = config.lambda_sft * ntp + policy_weight * policy_loss
        return gradient, ntp_metrics | metrics | {"loss/total": total}

    def _exact_loss(self, params, batch, whole, keys):
        """Next-token loss and minus the expected reward; the gradient of the returned number is
        theirs.
        """
        layout = layout_of(batch, self.max_documents)
        hidden, _ = self.model.forward(params, batch["tokens"], layout)
        of_rows = self._expected_at_chosen if self.chooses else self._expected_everywhere
        total, loss, nll_sum, stats, weights = of_rows(params, batch, layout, hidden, whole, keys)
        ntp, metrics = self._next_token_metrics(nll_sum, stats, weights, whole)
        metrics |= {"loss/policy": loss, "policy/expected_match": -loss}
        metrics["loss/total"] = self.config.lambda_sft * ntp + whole.policy_weight * loss
        return total, metrics

    def _expected_at_chosen(self, params, batch, layout, hidden, whole, keys):
        """`_exact_loss` at positions that are chosen: what is differentiated, minus the expected
        reward, and what the forward pass says of next tokens.
        """
        model, config = self.model, self.config
        nll_sum, (stats, weights) = read_hidden(model, params, batch, layout, hidden)
        reading = Reading(hidden, None, layout, nll_sum, stats, weights)
        starts, valid = self.select(lax.stop_gradient(reading), keys)
        slots = rollout_slots(starts, config.rollout_length)
        log_probs, _ = token_log_probs(
            take_tokens(hidden, slots - 1), model.head(params), take_tokens(batch["tokens"], slots)
        )
        probabilities = jnp.exp(jnp.cumsum(log_probs, axis=-1))
        expected = expected_match(probabilities, config.reward)
        loss = -jnp.sum(jnp.where(valid, expected, 0.0)) / whole.windows
        total = config.lambda_sft * nll_sum / whole.token_count + whole.policy_weight * loss
        return total, loss, nll_sum, stats, weights

    def _expected_everywhere(self, params, batch, layout, hidden, whole, keys):
        """`_expected_at_chosen` at every position: the next-token loss with other weights, which
        follow from the probabilities that it computes.
        """
        del keys
        config = self.config
        weights = target_weights(batch["tokens"], layout)
        k, reward = config.rollout_length, config.reward
        scales = [config.lambda_sft / whole.token_count, whole.policy_weight / whole.windows]
        total, stats = reweighted_loss(
            hidden,
            self.model.head(params),
            jnp.roll(batch["tokens"], -1, axis=1),
            weights,
            jnp.stack(scales),
            functools.partial(match_weights, rollout_length=k, reward=reward),
            max(k - 1, 1),
            implementation=head_implementation(self.model),
        )
        probabilities, counted = match_probabilities(-stats.nll, weights, k)
        loss = expected_match_loss(probabilities, counted, reward=reward, denominator=whole.windows)
        return total, loss, jnp.sum(stats.nll * weights), stats, weights

    def _next_token_loss(self, params, batch, whole, keys):
        del keys
        reading = read_rows(
            self.model, params, batch, with_trace=False, max_documents=self.max_documents
        )
        loss, metrics = self._next_token_metrics(
            reading.nll_sum, reading.stats, reading.weights, whole
        )
        return loss, metrics | {"loss/total": loss}

    def _next_token_metrics(self, nll_sum, stats, weights, whole):
        loss = nll_sum / whole.token_count
        return loss, {
            "loss/ntp": loss,
            "accuracy": jnp.sum(stats.correct * weights) / whole.token_count,
            "entropy/mean": jnp.sum(stats.entropy * weights) / whole.token_count,
        }

    def _policy_loss(self, experience, scores, whole):
        """Policy loss and KL term of a micro-batch's rollouts, as their share of the mini-batch."""
        config, k = self.config, self.config.rollout_length
        mask, whole_mask = (_token_mask(valid, k) for valid in (experience.valid, whole.valid))

        def tokens(x):  # [B, R, k] -> [B R, k]
            return jnp.broadcast_to(x, experience.tokens.shape).reshape(-1, k)

        arrays = [tokens(scores.log_probs), tokens(experience.old_log_probs)]
        loss_of = policy_loss
        if config.reward == EXPECTED:
            loss_of = expected_reward_loss
            arrays.append(tokens(scores.true_log_probs))
        loss, metrics = loss_of(
            *arrays,
            tokens(experience.advantages),
            mask,
            mini_batch_mask=whole_mask,
            **loss_options(config),
        )
        metrics = {f"policy/{name}": value for name, value in metrics.items()}
        metrics["policy/entropy"] = aggregate(
            tokens(scores.entropies), mask, "token-mean", whole_mask
        )
        metrics["loss/policy"] = loss
        if config.kl_coef > 0:
            penalty = kl_penalty(arrays[0], tokens(experience.ref_log_probs), config.kl_type)
            metrics["loss/kl"] = aggregate(penalty, mask, config.loss_aggregation, whole_mask)
            loss += config.kl_coef * metrics["loss/kl"]
        return loss, metrics | _reward_shares(experience, mask, whole_mask)

    # Selection, sampling, rewards: nothing here is differentiated

    def read(self, params: Params, batch: Batch) -> Reading:
        """The forward pass that rollouts start from."""
        return read_rows(
            self.model, params, batch, with_trace=True, max_documents=self.max_documents
        )

    def select(self, reading: Reading, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Positions of rows, with their keys [B]: starts and valid [B, R] of the rollouts."""
        config, layout = self.config, reading.layout
        match = {}
        if config.selection == "variance":
            probabilities, counted = match_probabilities(
                -reading.stats.nll, reading.weights, config.rollout_length
            )
            match = {
                "probabilities": constrain(probabilities[..., -1], "batch"),
                "counted": constrain(counted, "batch"),
            }
        selection = select_positions(
            jax.vmap(jax.random.split)(keys)[:, 0],
            constrain(reading.stats.entropy, "batch"),
            method=config.selection,
            temperature=config.selection_temperature,
            **self._spans(layout, reading.weights.shape),
            **match,
        )
        repeat = functools.partial(jnp.repeat, repeats=self._repeats, axis=1)
        return repeat(selection.starts), repeat(selection.valid)

    def fork(
        self, params: Params, reading: Reading, keys: jax.Array, *, in_place: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array, State | TracedForks]:
        """Select positions of rows, with their keys [B], and fork there.

        Returns starts and valid [B, R] of the rollouts, the hidden states [B, R, D] that predict
        their first tokens, and decode states with leaves [L, B, R, ...]. in_place: see
        `fork_rollouts`.
        """
        starts, valid = self.select(reading, keys)
        last_hidden, state = fork_rollouts(
            self.model,
            params,
            reading.hidden,
            reading.trace,
            starts,
            self.config.rollout_length,
            in_place=in_place,
        )
        return starts, valid, last_hidden, state

    def sample(
        self, params: Params, last_hidden, state: State | TracedForks, keys: jax.Array
    ) -> jax.Array:
        """Rollouts [B, R, k] of rows, with their keys [B]."""
        return sample_rollouts(
            self.model,
            params,
            last_hidden,
            state,
            jax.vmap(jax.random.split)(keys)[:, 1],
            rollout_length=self.config.rollout_length,
            temperature=self.config.sampling_temperature,
            forbidden_token=self.eos_id if self.config.forbid_eos else None,
        )

    def scores(
        self, params: Params, last_hidden, hidden, tokens: jax.Array, true_tokens: jax.Array
    ) -> Scores:
        """`scores_of`, with all that the configuration asks for; differentiable.

        true_tokens: [B, R, k] int32.
        """
        model, config = self.model, self.config
        scores = scores_of(model, params, last_hidden, hidden, tokens)
        predictors = predictors_of(last_hidden, hidden)
        if config.reward == EXPECTED:
            of_truth, _ = token_log_probs(predictors, model.head(params), true_tokens)
            scores = scores._replace(true_log_probs=of_truth)
        if config.baseline == "optimal_token":
            squares = sum_squared_probs(logits(predictors, model.head(params)))
            energy = gradient_energy(scores.log_probs, squares)
            scores = scores._replace(energy=lax.stop_gradient(energy))
        return scores

    def judge(
        self,
        starts: jax.Array,
        valid: jax.Array,
        tokens: jax.Array,
        scores: Scores,
        truth: tuple[jax.Array, jax.Array],
        ref_log_probs: jax.Array | None,
    ) -> Experience:
        """Rewards of rollouts against the true continuation, its tokens [B, R, k] and hidden states
        [B, R, k, D], and advantages within each group.
        """
        config = self.config
        true_tokens, true_hidden = truth
        rewards = token_rewards(
            config.reward,
            scores.hidden,
            true_hidden,
            tokens,
            true_tokens,
            true_log_probs=scores.true_log_probs,
        )
        group = (starts.shape[0], config.num_positions, config.rollouts_per_position)
        compare = functools.partial(
            token_advantages,
            credit=config.credit,
            baseline=config.baseline,
            grouping=config.grouping,
            normalize_std=config.normalize_std,
            own_reward=config.reward != EXPECTED,
        )
        energy = scores.energy
        advantages = over_shards(
            lambda rewards, valid, energy: compare(rewards, valid, energy=energy),
            (("batch",),) * 3,
            ("batch",),
        )(
            rewards.reshape(*group, -1),
            valid.reshape(group),
            None if energy is None else energy.reshape(*group, -1),
        ).reshape(rewards.shape)
        return Experience(
            starts,
            valid,
            tokens,
            jnp.mean(rewards, axis=-1),
            advantages,
            scores.log_probs,
            ref_log_probs,
        )

    def truth(self, batch: Batch, hidden: jax.Array, starts: jax.Array):
        """What rollouts are compared with: tokens [B, R, k] and hidden states [B, R, k, D]."""
        slots = rollout_slots(starts, self.config.rollout_length)
        return take_tokens(batch["tokens"], slots), take_tokens(hidden, slots)

    def reference_log_probs(
        self, reference_params: Params | None, batch: Batch, starts: jax.Array, tokens: jax.Array
    ) -> jax.Array | None:
        """[B, R, k] of the initial policy, where the KL term asks for them."""
        if self.config.kl_coef == 0:
            return None
        layout = layout_of(batch, self.max_documents)
        hidden, forks = self.model.forward_with_forks(
            reference_params, batch["tokens"], layout, starts, tokens
        )
        last_hidden = take_tokens(hidden, starts - 1)
        return scores_of(self.model, reference_params, last_hidden, forks, tokens).log_probs

    def roll_out(
        self,
        params: Params,
        reading: Reading,
        batch: Batch,
        keys: jax.Array,
        reference_params: Params | None,
    ) -> tuple[Experience, jax.Array, jax.Array]:
        """Select, fork, sample and judge, after a forward pass over some rows with keys [B].

        Beside the experience the hidden states [B, R, k, D] of the rollouts' tokens and what
        `Model.backward` takes of them.
        """
        params = self.model.gather(params)
        starts, valid, last_hidden, state = self.fork(params, reading, keys, in_place=True)
        tokens = self.sample(params, last_hidden, state, keys)
        hidden, inputs = self.model.run_forks(params, tokens, state)
        truth = self.truth(batch, reading.hidden, starts)
        scores = self.scores(params, last_hidden, hidden, tokens, truth[0])
        reference = self.reference_log_probs(reference_params, batch, starts, tokens)
        return self.judge(starts, valid, tokens, scores, truth, reference), hidden, inputs


def _add_parts(gradient: Params, more: Params) -> Params:
    """The sum of two gradients, each with respect to some of the parameters' parts."""
    return gradient | {
        name: jax.tree.map(jnp.add, gradient[name], values) if name in gradient else values
        for name, values in more.items()
    }


def _token_mask(valid: jax.Array, rollout_length: int) -> jax.Array:
    """[B, R] bool -> [B * R, k] float32."""
    return jnp.repeat(valid.reshape(-1, 1), rollout_length, axis=1).astype(jnp.float32)


def _reward_shares(experience: Experience, mask: jax.Array, whole: jax.Array) -> Metrics:
    """First and second moments of rewards and advantages, which add up over micro-batches."""

    def mean(x):
        x = jnp.broadcast_to(x.reshape(len(mask), -1), mask.shape)
        return aggregate(x, mask, "token-mean", whole)

    return {
        "reward/mean": mean(experience.rewards),
        "reward/square": mean(experience.rewards**2),
        "advantage/mean": mean(experience.advantages),
        "advantage/square": mean(experience.advantages**2),
        "rollouts/valid": jnp.sum(experience.valid) / (whole.shape[0]),
    }
