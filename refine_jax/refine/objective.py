"""The method on some rows: one forward pass, select, roll out, reward, advantage, gradient.

Pure functions of parameters and rows; `step.py` makes training steps of them. Rows come as
{"tokens": [B, T] int32, "segments": [B, T] int32}; segment 0 is padding, each other number a
document. Without "segments" every row is one document that fills it.

Letters: B rows, T tokens, D model dim, c positions a row, n rollouts a position, R = c * n, k
tokens a rollout.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.config import RefineConfig
from refine_jax.generation.sampling import as_ends
from refine_jax.models.head import TokenStats, logits, next_token_loss, token_log_probs
from refine_jax.models.layout import Layout
from refine_jax.models.transformer import Model, Params, State, Trace
from refine_jax.parallel import constrain, over_shards, take_tokens
from refine_jax.refine.grpo import aggregate, group_advantages, kl_penalty, policy_loss
from refine_jax.refine.rewards import rollout_rewards
from refine_jax.refine.selection import rollout_slots, select_positions, selectable

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# Longest rollouts of which every step reads all tokens so far once more.
_READ_AGAIN = 16


class Reading(NamedTuple):
    """What a forward pass over whole rows says of them."""

    hidden: jax.Array  # [B, T, D]
    trace: Trace | None
    layout: Layout | None
    nll_sum: jax.Array  # scalar, over the predicted tokens
    stats: TokenStats  # [B, T] each
    weights: jax.Array  # [B, T] float32, 1 where the next token is predicted


class Scores(NamedTuple):
    """What the policy makes of given rollouts."""

    log_probs: jax.Array  # [B, R, k] float32, nats
    entropies: jax.Array  # [B, R, k] float32, nats, of the distributions that predict the tokens
    hidden: jax.Array  # [B, R, k, D], final-norm states after reading each rollout token


class Experience(NamedTuple):
    """Rollouts with their rewards; constants for the gradient."""

    starts: jax.Array  # [B, R] int32, slot of the first token
    valid: jax.Array  # [B, R] bool, whether there is a truth to compare with
    tokens: jax.Array  # [B, R, k] int32
    rewards: jax.Array  # [B, R]
    advantages: jax.Array  # [B, R]
    old_log_probs: jax.Array  # [B, R, k], of the policy that rolled out
    ref_log_probs: jax.Array | None  # [B, R, k], of the initial policy


class MiniBatch(NamedTuple):
    """What the losses of a mini-batch's M rows are means over."""

    token_count: jax.Array  # scalar float32, predicted tokens, at least 1
    valid: jax.Array | None  # [M, R] bool, of the rollouts; None where there are none


# Rows


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


# Rollouts


def fork_rollouts(
    model: Model,
    params: Params,
    hidden: jax.Array,
    trace: Trace,
    starts: jax.Array,
    rollout_length: int,
) -> tuple[jax.Array, State]:
    """Where rollouts of k tokens begin: the hidden state [B, R, D] that predicts the first token at
    every start, and the decode state there.

    hidden [B, T, D], trace: of the forward pass over the rows. starts: [B, R] int32 >= 1, slot of
    each rollout's first token.
    """
    state = model.fork(params, trace, starts, horizon=rollout_length)
    return take_tokens(hidden, starts - 1), state


def sample_rollouts(
    model: Model,
    params: Params,
    last_hidden: jax.Array,
    state: State,
    keys: jax.Array,
    *,
    rollout_length: int,
    temperature: float = 1.0,
    forbidden_token: int | Sequence[int] | None = None,
) -> jax.Array:
    """Sample k tokens from the policy at every fork.

    last_hidden [B, R, D], state: as `fork_rollouts` gives them. keys: [B] random keys, one a row.
    temperature: 0 takes the likeliest token. forbidden_token: one or several that are never
    sampled (the published code forbids the end of sequence, so that all rollouts have k tokens).

    Returns tokens [B, R, k] int32.
    """
    head = model.head(params)
    forks = jnp.arange(last_hidden.shape[1])
    fork_keys = jax.vmap(lambda key: jax.vmap(lambda r: jax.random.fold_in(key, r))(forks))(keys)

    def sample(last_hidden, index):
        z = constrain(logits(last_hidden, head), "batch")
        for token in as_ends(forbidden_token):
            z = z.at[..., token].set(-jnp.inf)
        if temperature == 0:
            return jnp.argmax(z, axis=-1).astype(jnp.int32)
        step_keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, index)))(fork_keys)
        return jax.vmap(jax.vmap(jax.random.categorical))(step_keys, z / temperature).astype(
            jnp.int32
        )

    if _reads_again(model, rollout_length):
        return _sample_from_fork(model, params, last_hidden, state, sample, rollout_length)

    def step(carry, index):
        last_hidden, state = carry
        tokens = sample(last_hidden, index)
        new_hidden, state = model.extend(params, tokens[..., None], state)
        return (new_hidden[:, :, 0], state), tokens

    carry = last_hidden, state
    (last_hidden, _), tokens = lax.scan(step, carry, jnp.arange(rollout_length - 1))
    final = sample(last_hidden, rollout_length - 1)
    return jnp.concatenate([jnp.moveaxis(tokens, 0, -1), final[..., None]], axis=-1)


def _reads_again(model: Model, rollout_length: int) -> bool:
    """Whether states stay as they are while tokens are sampled: neither written nor copied.

    An accelerator waits for states and parameters to be read, for one token or for some; a CPU
    computes.
    """
    in_place = jax.default_backend() == "cpu" or not model.writes_much
    return not in_place and rollout_length <= _READ_AGAIN


def _sample_from_fork(model, params, last_hidden, state, sample, rollout_length):
    """Each step continues the fork by all tokens of a rollout; of those to come nothing is used."""

    def step(carry, index):
        last_hidden, tokens = carry
        tokens = tokens.at[:, :, index].set(sample(last_hidden, index))
        hidden, _ = model.extend(params, tokens[:, :, :-1], state)
        return (lax.dynamic_index_in_dim(hidden, index, axis=2, keepdims=False), tokens), None

    tokens = jnp.zeros((*last_hidden.shape[:2], rollout_length), jnp.int32)
    carry = last_hidden, tokens
    (last_hidden, tokens), _ = lax.scan(step, carry, jnp.arange(rollout_length - 1))
    return tokens.at[:, :, -1].set(sample(last_hidden, rollout_length - 1))


def scores_of(
    model: Model, params: Params, last_hidden: jax.Array, hidden: jax.Array, tokens: jax.Array
) -> Scores:
    """Scores of rollouts `tokens` [B, R, k], given the hidden states before them [B, R, D] and of
    their tokens [B, R, k, D].
    """
    predictors = jnp.concatenate([last_hidden[:, :, None], hidden[:, :, :-1]], axis=2)
    log_probs, entropies = token_log_probs(predictors, model.head(params), tokens)
    return Scores(log_probs, entropies, hidden)


def score_rollouts(
    model: Model,
    params: Params,
    hidden: jax.Array,
    trace: Trace,
    starts: jax.Array,
    tokens: jax.Array,
) -> Scores:
    """Scores of rollouts `tokens` [B, R, k] from `starts` [B, R].

    Differentiable in params, hidden and trace: with hidden and trace from a differentiated forward
    pass, the gradient is that of running every prefix with its rollout on its own.
    """
    fork_hidden = model.forward_forks(params, trace, starts, tokens)
    return scores_of(model, params, take_tokens(hidden, starts - 1), fork_hidden, tokens)


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
        return self.config.objective == "refine"

    def mini_batch(self, batch: Batch) -> MiniBatch:
        """What the losses of a mini-batch are means over: known before any forward pass."""
        config, tokens = self.config, batch["tokens"]
        layout = layout_of(batch, self.max_documents)
        token_count = jnp.maximum(jnp.sum(target_weights(tokens, layout)), 1.0)
        if not self.rolls_out:
            return MiniBatch(token_count, None)
        valid = selectable(
            jnp.ones(tokens.shape, bool) if layout is None else layout.mask,
            num_positions=config.num_positions,
            rollout_length=config.rollout_length,
            edge_margin=config.edge_margin,
            document=None if layout is None else layout.document,
        )[1]
        return MiniBatch(token_count, jnp.repeat(valid, config.rollouts_per_position, axis=1))

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

        whole: of the mini-batch. experience: rollouts of these rows; None: roll out in the very
        forward pass that the gradient goes back through, with `keys` [B].
        """
        if not self.rolls_out:
            return jax.grad(self._next_token_loss, has_aux=True)(params, batch, whole)
        model, config, tokens = self.model, self.config, batch["tokens"]
        layout = layout_of(batch, self.max_documents)
        if experience is None:
            rows = model.run_rows(params, tokens, layout)
            hidden = rows.hidden
        else:
            starts, rollouts = experience.starts, experience.tokens
            (hidden, fork_hidden), pull_layers = jax.vjp(
                lambda p: model.forward_with_forks(p, tokens, layout, starts, rollouts), params
            )

        def next_tokens(head, hidden):
            return read_hidden(model, head, batch, layout, hidden)

        head = model.head_params(params)
        nll_sum, pull_next_tokens, (stats, weights) = jax.vjp(
            next_tokens, head, hidden, has_aux=True
        )
        if experience is None:
            reading = Reading(hidden, rows.trace, layout, nll_sum, stats, weights)
            experience, fork_hidden, fork_inputs = self.roll_out(
                params, reading, batch, keys, reference_params
            )

            def pull_layers(cotangents):
                return (
                    model.backward(
                        params,
                        rows,
                        experience.starts,
                        experience.tokens,
                        fork_inputs,
                        cotangents,
                    ),
                )

        last_hidden, pull_last = jax.vjp(lambda x: take_tokens(x, experience.starts - 1), hidden)

        def policy(head, last_hidden, fork_hidden):
            scores = scores_of(model, head, last_hidden, fork_hidden, experience.tokens)
            return self._policy_loss(experience, scores, whole)

        policy_loss, pull_policy, metrics = jax.vjp(
            policy, head, last_hidden, fork_hidden, has_aux=True
        )
        lambda_sft = jnp.float32(config.lambda_sft)
        head_gradient, of_hidden = pull_next_tokens(lambda_sft / whole.token_count)
        from_policy, of_last, of_forks = pull_policy(jnp.float32(config.lambda_rl))
        (more,) = pull_last(of_last)
        (gradient,) = pull_layers((of_hidden + more, of_forks))
        for part in (head_gradient, from_policy):
            ((name, values),) = part.items()
            if name in gradient:
                values = jax.tree.map(jnp.add, gradient[name], values)
            gradient = gradient | {name: values}
        ntp, ntp_metrics = self._next_token_metrics(nll_sum, stats, weights, whole)
        total = config.lambda_sft * ntp + config.lambda_rl * policy_loss
        return gradient, ntp_metrics | metrics | {"loss/total": total}

    def _next_token_loss(self, params, batch, whole):
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
        policy, policy_metrics = policy_loss(
            scores.log_probs.reshape(-1, k),
            experience.old_log_probs.reshape(-1, k),
            experience.advantages.reshape(-1, 1),
            mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            aggregation=config.loss_aggregation,
            mini_batch_mask=whole_mask,
        )
        metrics = {f"policy/{name}": value for name, value in policy_metrics.items()}
        entropies = scores.entropies.reshape(-1, k)
        metrics["policy/entropy"] = aggregate(entropies, mask, "token-mean", whole_mask)
        metrics["loss/policy"] = policy
        if config.kl_coef > 0:
            penalty = kl_penalty(
                scores.log_probs.reshape(-1, k),
                experience.ref_log_probs.reshape(-1, k),
                config.kl_type,
            )
            metrics["loss/kl"] = aggregate(penalty, mask, config.loss_aggregation, whole_mask)
            policy += config.kl_coef * metrics["loss/kl"]
        return policy, metrics | _reward_shares(experience, mask, whole_mask)

    # Selection, sampling, rewards: nothing here is differentiated

    def read(self, params: Params, batch: Batch) -> Reading:
        """The forward pass that rollouts start from."""
        return read_rows(
            self.model, params, batch, with_trace=True, max_documents=self.max_documents
        )

    def fork(
        self, params: Params, reading: Reading, keys: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, State]:
        """Select positions of rows, with their keys [B], and fork there.

        Returns starts and valid [B, R] of the rollouts, the hidden states [B, R, D] that predict
        their first tokens, and decode states with leaves [L, B, R, ...].
        """
        config, layout = self.config, reading.layout
        selection = select_positions(
            jax.vmap(jax.random.split)(keys)[:, 0],
            constrain(reading.stats.entropy, "batch"),
            jnp.ones(reading.weights.shape, bool) if layout is None else layout.mask,
            num_positions=config.num_positions,
            rollout_length=config.rollout_length,
            method=config.selection,
            temperature=config.selection_temperature,
            edge_margin=config.edge_margin,
            document=None if layout is None else layout.document,
        )
        repeat = functools.partial(jnp.repeat, repeats=config.rollouts_per_position, axis=1)
        starts, valid = repeat(selection.starts), repeat(selection.valid)
        last_hidden, state = fork_rollouts(
            self.model, params, reading.hidden, reading.trace, starts, config.rollout_length
        )
        return starts, valid, last_hidden, state

    def sample(self, params: Params, last_hidden, state: State, keys: jax.Array) -> jax.Array:
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

    def score(
        self, params: Params, tokens: jax.Array, last_hidden: jax.Array, state: State
    ) -> tuple[Scores, jax.Array]:
        """Scores of rollouts [B, R, k], and what `Model.backward` takes of their pass."""
        hidden, inputs = self.model.run_forks(params, tokens, state)
        return scores_of(self.model, params, last_hidden, hidden, tokens), inputs

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
        rewards = rollout_rewards(config.reward, scores.hidden, true_hidden, tokens, true_tokens)
        group = (starts.shape[0], config.num_positions, config.rollouts_per_position)
        advantages = over_shards(
            functools.partial(
                group_advantages, grouping=config.grouping, normalize_std=config.normalize_std
            ),
            (("batch",), ("batch",)),
            ("batch",),
        )(rewards.reshape(group), valid.reshape(group)).reshape(starts.shape)
        return Experience(
            starts, valid, tokens, rewards, advantages, scores.log_probs, ref_log_probs
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
        starts, valid, last_hidden, state = self.fork(params, reading, keys)
        tokens = self.sample(params, last_hidden, state, keys)
        scores, inputs = self.score(params, tokens, last_hidden, state)
        truth = self.truth(batch, reading.hidden, starts)
        reference = self.reference_log_probs(reference_params, batch, starts, tokens)
        return self.judge(starts, valid, tokens, scores, truth, reference), scores.hidden, inputs


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
