"""Losses on answers with the prompt as context: supervised, and GRPO on sampled answers.

Rows come as {"tokens", "segments", "answer_mask": [B, T] int32} (`refine_jax.data.prompts`): one
document a row, padded on the right, whose end is the answer. Letters beyond those of DESIGN: A
tokens of an answer at most, n sampled answers a prompt.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from refine_jax.config import RefineConfig
from refine_jax.generation.sampling import as_ends
from refine_jax.models.head import TokenStats, next_token_loss
from refine_jax.models.layout import Layout
from refine_jax.models.transformer import Model, Params
from refine_jax.parallel import take_tokens
from refine_jax.refine.grpo import aggregate, group_advantages, policy_loss
from refine_jax.refine.method import Batch, Metrics, head_implementation
from refine_jax.refine.rollout import fork_rollouts, sample_rollouts, score_rollouts


class AnswerSlots(NamedTuple):
    """Where the answers of rows stand, A slots a row; what lies beyond an answer has weight 0."""

    predictors: jax.Array  # [B, A] int32, the slots before the answer's tokens
    targets: jax.Array  # [B, A] int32, the answer's tokens
    weights: jax.Array  # [B, A] float32, 1 at them


class SampledAnswers(NamedTuple):
    """Answers sampled from the policy; constants for the gradient."""

    tokens: jax.Array  # [B, n, A] int32
    mask: jax.Array  # [B, n, A] float32, 1 up to and including the end of sequence
    old_log_probs: jax.Array  # [B, n, A], nats, of the policy that sampled


@functools.partial(jax.jit, static_argnums=1)
def prompts_of(batch: Batch, pad_id: int) -> Batch:
    """The rows without their answers, as padding: {"tokens", "segments"}."""
    is_prompt = batch["answer_mask"] == 0
    return {
        "tokens": jnp.where(is_prompt, batch["tokens"], pad_id),
        "segments": jnp.where(is_prompt, batch["segments"], 0),
    }


def prompt_lengths(batch: Batch) -> jax.Array:
    """Tokens [B] int32 of each row that are not its answer."""
    return jnp.sum((batch["segments"] != 0) & (batch["answer_mask"] == 0), axis=1, dtype=jnp.int32)


def answer_slots(batch: Batch, max_answer_tokens: int) -> AnswerSlots:
    """Slots, targets and weights of the answers; A is `max_answer_tokens`."""
    num_tokens = batch["tokens"].shape[1]
    slots = prompt_lengths(batch)[:, None] + jnp.arange(max_answer_tokens, dtype=jnp.int32)
    inside = jnp.minimum(slots, num_tokens - 1)
    weights = take_tokens(batch["answer_mask"] != 0, inside) & (slots < num_tokens)
    targets = take_tokens(batch["tokens"], inside)
    return AnswerSlots(jnp.maximum(inside - 1, 0), targets, weights.astype(jnp.float32))


def answer_nll(
    hidden: jax.Array, head: jax.Array, slots: AnswerSlots, *, implementation: str | None = None
) -> tuple[jax.Array, TokenStats]:
    """Sum of -log p(answer token | all before it) in nats, and statistics [B, A] of the tokens.

    hidden: [B, T, D] of rows of prompt and answer. Only hidden states that predict a token of an
    answer are read, so the loss depends on nothing that a prompt's own tokens are predicted with.
    """
    predictors = take_tokens(hidden, slots.predictors)
    return next_token_loss(
        predictors, head, slots.targets, slots.weights, implementation=implementation
    )


class AnswerMethod:
    """Supervised and policy losses on answers, as pure functions of parameters and rows.

    model: the policy. config: clipping, aggregation and advantages of the policy loss.
    max_answer_tokens: A. eos_id: the token or tokens that end an answer. pad_id: fills rows.
    """

    def __init__(
        self,
        model: Model,
        config: RefineConfig,
        *,
        max_answer_tokens: int,
        eos_id: int | Sequence[int],
        pad_id: int,
    ):
        self.model = model
        self.config = config
        self.max_answer_tokens = max_answer_tokens
        self.eos_id = as_ends(eos_id)
        self.pad_id = pad_id

    def nll(self, params: Params, batch: Batch) -> tuple[jax.Array, TokenStats, AnswerSlots]:
        """`answer_nll` of rows."""
        hidden, _ = self.model.forward(
            params, batch["tokens"], Layout.from_segments(batch["segments"])
        )
        slots = answer_slots(batch, self.max_answer_tokens)
        nll_sum, stats = answer_nll(
            hidden,
            self.model.head(params),
            slots,
            implementation=head_implementation(self.model),
        )
        return nll_sum, stats, slots

    def supervised_loss(
        self, params: Params, batch: Batch, *, token_count: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Mean loss of the answers' tokens, as a micro-batch's share of the mini-batch's.

        token_count: the mini-batch's tokens of answers (at least 1).
        """
        nll_sum, stats, slots = self.nll(params, batch)
        loss = nll_sum / token_count
        accuracy = jnp.sum(stats.correct * slots.weights) / token_count
        return loss, {"answer/loss": loss, "answer/accuracy": accuracy}

    def _prefill(self, params: Params, batch: Batch):
        """Hidden states and trace of the prompts, and the slot [B, 1] after each."""
        prompts = prompts_of(batch, self.pad_id)
        layout = Layout.from_segments(prompts["segments"])
        hidden, trace = self.model.forward(params, prompts["tokens"], layout, with_trace=True)
        # A row of padding has no slot before its first; its answers count nowhere.
        return hidden, trace, jnp.maximum(prompt_lengths(batch), 1)[:, None]

    def _respond(self, params: Params, batch: Batch, keys, samples: int, temperature: float):
        """Tokens [B, n, A] and mask [B, n, A] of answers, and what scoring them needs."""
        hidden, trace, ends = self._prefill(params, batch)
        starts = jnp.repeat(ends, samples, axis=1)
        last_hidden, state = fork_rollouts(
            self.model, params, hidden, trace, starts, self.max_answer_tokens
        )
        tokens = sample_rollouts(
            self.model,
            params,
            last_hidden,
            state,
            keys,
            rollout_length=self.max_answer_tokens,
            temperature=temperature,
        )
        ends = functools.reduce(operator.or_, (tokens == token for token in self.eos_id))
        ended = jnp.cumsum(ends, axis=-1)
        before = jnp.pad(ended, ((0, 0), (0, 0), (1, 0)))[..., :-1]
        real = jnp.any(batch["segments"] != 0, axis=1)[:, None, None]
        return tokens, ((before == 0) & real).astype(jnp.float32), (hidden, trace, starts)

    def answer(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The likeliest answer, token by token, to each prompt: tokens and mask [B, A].

        The mask is 1 up to and including the end of sequence.
        """
        keys = jax.random.split(jax.random.key(0), batch["tokens"].shape[0])
        tokens, mask, _ = self._respond(params, batch, keys, 1, 0.0)
        return tokens[:, 0], mask[:, 0]

    def sample(
        self, params: Params, batch: Batch, keys: jax.Array, *, samples: int, temperature: float
    ) -> SampledAnswers:
        """n answers to every prompt, forked from one forward pass over it.

        keys: [B] random keys. temperature: of sampling. Answers run to A tokens; what follows an
        end of sequence is masked.
        """
        tokens, mask, context = self._respond(params, batch, keys, samples, temperature)
        scores = score_rollouts(self.model, params, *context, tokens)
        return SampledAnswers(tokens, mask, scores.log_probs)

    def advantages(self, rewards: jax.Array, answers: SampledAnswers) -> jax.Array:
        """Advantages [B, n] of the rewards [B, n]; the answers to one prompt are a group."""
        valid = jnp.any(answers.mask != 0, axis=-1)
        return group_advantages(
            rewards[:, None],
            valid[:, None],
            grouping="sequence",
            normalize_std=self.config.normalize_std,
        )[:, 0]

    def policy_loss(
        self,
        params: Params,
        batch: Batch,
        answers: SampledAnswers,
        advantages: jax.Array,
        *,
        mini_batch_mask: jax.Array,
    ) -> tuple[jax.Array, Metrics]:
        """Clipped policy loss of the sampled answers, as a share of the mini-batch's.

        advantages: [B, n]. mini_batch_mask: [mini-batch, n, A], of all its answers.
        """
        config, width = self.config, self.max_answer_tokens
        hidden, trace, ends = self._prefill(params, batch)
        starts = jnp.broadcast_to(ends, answers.tokens.shape[:2])
        scores = score_rollouts(self.model, params, hidden, trace, starts, answers.tokens)
        mask, whole = (x.reshape(-1, width) for x in (answers.mask, mini_batch_mask))
        loss, metrics = policy_loss(
            scores.log_probs.reshape(-1, width),
            answers.old_log_probs.reshape(-1, width),
            advantages.reshape(-1, 1),
            mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            aggregation=config.loss_aggregation,
            mini_batch_mask=whole,
        )
        entropy = aggregate(scores.entropies.reshape(-1, width), mask, "token-mean", whole)
        metrics = {f"answer/{name}": value for name, value in metrics.items()}
        return loss, metrics | {"answer/policy_loss": loss, "answer/entropy": entropy}
