"""The method on some rows: one forward pass, select, roll out, reward, advantage, gradient.

With `refine.estimator` "exact" nothing is rolled out: the expected reward is a function of the true
tokens' probabilities (`exact.py`).

Pure functions of parameters and rows (`reading.Batch`); `step.py` makes training steps of them.

Letters: B rows, T tokens, D model dim, c positions a row, n rollouts a position, R = c * n, k
tokens a rollout.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.config import RefineConfig
from refine_jax.models.head import reweighted_loss, token_log_probs
from refine_jax.models.layout import Layout
from refine_jax.models.trainable import join, select
from refine_jax.models.transformer import Model, Params
from refine_jax.parallel import constrain, over_shards, take_tokens
from refine_jax.refine.exact import (
    expected_match_loss,
    match_count,
    match_probabilities,
    match_weights,
)
from refine_jax.refine.grpo import (
    aggregate,
    expected_reward_loss,
    kl_penalty,
    loss_options,
    policy_loss,
    reward_shares,
    token_advantages,
)
from refine_jax.refine.reading import (
    Batch,
    Reading,
    layout_of,
    read_hidden,
    read_rows,
    target_weights,
)
from refine_jax.refine.rewards import EXPECTED, counted_tokens, token_rewards
from refine_jax.refine.rollout import (
    Experience,
    Forks,
    Scores,
    fork_rollouts,
    sample_rollouts,
    scores_of,
)
from refine_jax.refine.selection import rollout_slots, select_positions, selectable

Metrics = dict[str, jax.Array]


class MiniBatch(NamedTuple):
    """Denominators of the losses of a mini-batch of M rows, and the weight of its policy loss."""

    token_count: jax.Array  # scalar float32, predicted tokens, at least 1
    policy_weight: jax.Array | float = 0.0  # scalar; of the expected reward without rollouts
    valid: jax.Array | None = None  # [M, R] bool, of the rollouts; None where no position is chosen
    windows: jax.Array | None = None  # scalar float32, windows that the exact estimator counts


class Objective:
    """The losses of one configuration and their gradients: pure functions of parameters and rows.

    eos_id: the token or tokens that rollouts never sample, if `config.forbid_eos`. max_documents:
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
        """Whether the loss includes that of rollouts."""
        return self.config.objective == "refine" and self.config.estimator == "rollouts"

    @property
    def chooses(self) -> bool:
        """Whether positions are chosen; else no position counts, or every one."""
        return self.config.objective == "refine" and self.config.selection != "all"

    def mini_batch(self, batch: Batch, policy_weight: jax.Array | float | None = None) -> MiniBatch:
        """Count the tokens and rollouts of M rows [M, T], before any forward pass.

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
        """Tell `selection` where positions of rows [B, T] may be."""
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
        frozen: Params | None = None,
    ) -> tuple[Params, Metrics]:
        """Compute a micro-batch's share of the mini-batch's gradient and metrics; shares add up.

        params: those that are trained. frozen: the others; None: there are none. whole: of the
        mini-batch. keys: [B], of the rows, where positions are chosen here. experience: rollouts of
        these rows; None: roll out in the forward pass that the gradient goes back through.
        """
        if self.rolls_out:
            rest = batch, whole, keys, experience, reference_params
            return self._rollout_gradient(params, frozen, *rest)
        loss = functools.partial(self._loss, batch=batch, whole=whole, keys=keys)
        return jax.grad(lambda p: loss(join(p, frozen)), has_aux=True)(params)

    def _rollout_gradient(self, trained, frozen, batch, whole, keys, experience, reference_params):
        """Compute the gradient by hand: rollouts are sampled between the forward and the backward
        pass of the rows, so that autodiff of one loss function cannot express it.
        """
        model, config, tokens = self.model, self.config, batch["tokens"]
        layout = layout_of(batch, self.max_documents)
        params = join(trained, frozen)
        # The one forward pass; rollouts that are known already go through it with their rows.
        if experience is None:
            rows = model.run_rows(params, tokens, layout)
            hidden = rows.hidden
        else:
            starts, rollouts = experience.starts, experience.tokens
            positions = starts[:, :: self._repeats]
            (hidden, fork_hidden), pull_layers = jax.vjp(
                lambda trained: model.forward_with_forks(
                    join(trained, frozen), tokens, layout, positions, rollouts
                ),
                trained,
            )

        # Next tokens, whose entropies say where to roll out.
        whole_head = model.head_params(params)
        head = select(whole_head, trained)
        nll_sum, pull_next_tokens, (stats, weights) = jax.vjp(
            lambda head, hidden: read_hidden(model, whole_head | head, batch, layout, hidden),
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
            forks = starts[:, :: self._repeats], rollouts, fork_inputs

            def pull_layers(cotangents):
                return (model.backward(params, rows, *forks, cotangents, trained),)

        # The policy loss: of the rollouts, and of the hidden states before them.
        true_tokens = take_tokens(batch["tokens"], rollout_slots(starts, config.rollout_length))

        def policy(head, last_hidden, fork_hidden):
            head = whole_head | head
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

    def _loss(self, params, batch, whole, keys):
        """Compute the loss and metrics where nothing is rolled out."""
        model, config, tokens = self.model, self.config, batch["tokens"]
        layout = layout_of(batch, self.max_documents)
        hidden, _ = model.forward(params, tokens, layout)
        k, reward, head = config.rollout_length, config.reward, model.head(params)
        if config.objective == "refine" and not self.chooses:
            # The gradient of all windows is that of the next-token loss with other weights, which
            # follow from the probabilities that this loss computes.
            weights = target_weights(tokens, layout)
            scales = [config.lambda_sft / whole.token_count, whole.policy_weight / whole.windows]
            total, stats = reweighted_loss(
                hidden,
                head,
                jnp.roll(tokens, -1, axis=1),
                weights,
                jnp.stack(scales),
                functools.partial(match_weights, rollout_length=k, reward=reward),
                max(k - 1, 1),
                implementation=model.policy.head_implementation,
            )
            nll_sum = jnp.sum(stats.nll * weights)
            probabilities, counted = match_probabilities(-stats.nll, weights, k)
        else:
            nll_sum, (stats, weights) = read_hidden(model, params, batch, layout, hidden)
        ntp, metrics = self._next_token_metrics(nll_sum, stats, weights, whole)
        if config.objective == "ntp":
            return ntp, metrics | {"loss/total": ntp}
        if self.chooses:
            reading = Reading(hidden, None, layout, nll_sum, stats, weights)
            starts, counted = self.select(lax.stop_gradient(reading), keys)
            slots = rollout_slots(starts, k)
            predictors, true_tokens = take_tokens(hidden, slots - 1), take_tokens(tokens, slots)
            log_probs, _ = token_log_probs(predictors, head, true_tokens)
            probabilities = jnp.exp(jnp.cumsum(log_probs, axis=-1))
        loss = expected_match_loss(probabilities, counted, reward=reward, denominator=whole.windows)
        metrics |= {"loss/policy": loss, "policy/expected_match": -loss}
        metrics["loss/total"] = config.lambda_sft * ntp + whole.policy_weight * loss
        return (metrics["loss/total"] if self.chooses else total), metrics

    def _next_token_metrics(self, nll_sum, stats, weights, whole):
        loss = nll_sum / whole.token_count
        return loss, {
            "loss/ntp": loss,
            "accuracy": jnp.sum(stats.correct * weights) / whole.token_count,
            "entropy/mean": jnp.sum(stats.entropy * weights) / whole.token_count,
        }

    def _policy_loss(self, experience, scores, whole):
        """Compute the micro-batch's share of the mini-batch's policy loss, with the KL term."""
        config, k = self.config, self.config.rollout_length
        rollouts, whole_mask = (_token_mask(valid, k) for valid in (experience.valid, whole.valid))

        def tokens(x):  # [B, R, k] -> [B R, k]
            return jnp.broadcast_to(x, experience.tokens.shape).reshape(-1, k)

        # Tokens beyond a rollout's length have no loss. Denominators count rollouts then, which
        # are known before any forward pass.
        mask = rollouts
        if experience.counted is not None:
            mask = rollouts * tokens(experience.counted)

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
            tokens(scores.entropies), mask, "seq-mean-token-mean", whole_mask
        )
        metrics["loss/policy"] = loss
        if config.kl_coef > 0:
            penalty = kl_penalty(arrays[0], tokens(experience.ref_log_probs), config.kl_type)
            metrics["loss/kl"] = aggregate(penalty, mask, config.loss_aggregation, whole_mask)
            loss += config.kl_coef * metrics["loss/kl"]
        shares = reward_shares(experience.rewards, experience.advantages, rollouts, whole_mask)
        shares["rollouts/valid"] = jnp.sum(experience.valid) / len(whole_mask)
        return loss, metrics | shares

    # Selection, sampling, rewards: nothing here is differentiated

    def read(self, params: Params, batch: Batch) -> Reading:
        """Run the forward pass that rollouts start from."""
        return read_rows(
            self.model, params, batch, with_trace=True, max_documents=self.max_documents
        )

    @jax.named_scope("selection")
    def select(self, reading: Reading, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Choose the positions of rows with keys [B]: `starts` and `valid` [B, R] of `Forks`."""
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
        self,
        params: Params,
        reading: Reading,
        batch: Batch,
        keys: jax.Array,
        *,
        in_place: bool = False,
    ) -> Forks:
        """Choose positions of rows with keys [B], and fork there. in_place: see `fork_rollouts`."""
        k, n = self.config.rollout_length, self._repeats
        starts, valid = self.select(reading, keys)
        passed = reading.hidden, reading.trace
        with jax.named_scope("fork"):
            last_hidden, state = fork_rollouts(
                self.model, params, *passed, starts[:, ::n], k, copies=n, in_place=in_place
            )
            slots = rollout_slots(starts, k)
            truth = take_tokens(batch["tokens"], slots), take_tokens(reading.hidden, slots)
        counted = None
        if self.config.rollout_lengths == "adaptive":
            entropy = take_tokens(reading.stats.entropy, slots - 1)
            counted = counted_tokens(entropy, self.config.entropy_budget)
        return Forks(starts, valid, last_hidden, state, *truth, counted)

    def scores(
        self, params: Params, last_hidden, hidden, tokens: jax.Array, true_tokens: jax.Array
    ) -> Scores:
        """Compute the `scores_of` rollouts that the configuration asks for; differentiable."""
        return scores_of(
            self.model,
            params,
            last_hidden,
            hidden,
            tokens,
            true_tokens=true_tokens if self.config.reward == EXPECTED else None,
            with_energy=self.config.baseline == "optimal_token",
        )

    def judge(
        self, forks: Forks, tokens: jax.Array, scores: Scores, ref_log_probs: jax.Array | None
    ) -> Experience:
        """Compute the rewards of rollouts `tokens` [B, R, k], and advantages within each group."""
        config = self.config
        rewards = token_rewards(
            config.reward,
            scores.hidden,
            forks.true_hidden,
            tokens,
            forks.true_tokens,
            true_log_probs=scores.true_log_probs,
            counted=forks.counted,
        )

        def compare(rewards, valid, energy):
            return token_advantages(
                rewards,
                valid,
                credit=config.credit,
                baseline=config.baseline,
                grouping=config.grouping,
                normalize_std=config.normalize_std,
                own_reward=config.reward != EXPECTED,
                energy=energy,
            )

        group = (len(tokens), config.num_positions, config.rollouts_per_position)
        energy = None if scores.energy is None else scores.energy.reshape(*group, -1)
        advantages = over_shards(compare, (("batch",),) * 3, ("batch",))(
            rewards.reshape(*group, -1), forks.valid.reshape(group), energy
        ).reshape(rewards.shape)
        return Experience(
            forks.starts,
            forks.valid,
            tokens,
            jnp.mean(rewards, axis=-1),
            advantages,
            scores.log_probs,
            ref_log_probs,
            forks.counted,
        )

    def reference_log_probs(
        self, reference_params: Params | None, batch: Batch, starts: jax.Array, tokens: jax.Array
    ) -> jax.Array | None:
        """Compute the initial policy's log-probabilities [B, R, k]; None without a KL term."""
        if self.config.kl_coef == 0:
            return None
        layout = layout_of(batch, self.max_documents)
        hidden, forks = self.model.forward_with_forks(
            reference_params, batch["tokens"], layout, starts[:, :: self._repeats], tokens
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
        """Choose positions of rows with keys [B] after a forward pass, and roll out from there.

        Returns what `continue_forks` does.
        """
        params = self.model.gather(params)
        forks = self.fork(params, reading, batch, keys, in_place=True)
        reference = functools.partial(
            self.reference_log_probs, reference_params, batch, forks.starts
        )
        return self.continue_forks(params, forks, keys, reference)

    def continue_forks(
        self,
        params: Params,
        forks: Forks,
        keys: jax.Array,
        reference: Callable[[jax.Array], jax.Array | None],
    ) -> tuple[Experience, jax.Array, jax.Array]:
        """Sample rollouts of rows with keys [B], and judge them.

        reference: gives the `ref_log_probs` of tokens [B, R, k]. Returns the experience, the hidden
        states [B, R, k, D] of the rollouts' tokens, and what `Model.backward` takes of them.
        """
        config = self.config
        with jax.named_scope("rollout"):
            tokens = sample_rollouts(
                self.model,
                params,
                forks.last_hidden,
                forks.state,
                jax.vmap(jax.random.split)(keys)[:, 1],
                rollout_length=config.rollout_length,
                temperature=config.sampling_temperature,
                forbidden_token=self.eos_id if config.forbid_eos else None,
            )
        with jax.named_scope("score"):
            hidden, inputs = self.model.run_forks(params, tokens, forks.state)
            scores = self.scores(params, forks.last_hidden, hidden, tokens, forks.true_tokens)
            return self.judge(forks, tokens, scores, reference(tokens)), hidden, inputs


def _add_parts(gradient: Params, more: Params) -> Params:
    """Add two gradients, each with respect to some of the parameters' parts."""
    return gradient | {
        name: jax.tree.map(jnp.add, gradient[name], values) if name in gradient else values
        for name, values in more.items()
    }


def _token_mask(valid: jax.Array, rollout_length: int) -> jax.Array:
    """Repeat `valid` [B, R] bool for every token: [B * R, k] float32."""
    return jnp.repeat(valid.reshape(-1, 1), rollout_length, axis=1).astype(jnp.float32)
