"""Losses and steps on answers with the prompt as context: supervised, and GRPO on sampled answers.

A step here changes parameters, optimizer and the counts of skipped updates; it does not count as a
training step of its own (`TrainState.step`), so that it can follow one on the prompts. Rows come as
{"tokens", "segments", "answer_mask": [B, T] int32} (`refine_jax.data.prompts`): one document a row,
padded on the right, whose end is the answer (1 in answer_mask); supervised losses count earlier
answers in the prompt (2), too. Letters beyond those of DESIGN: A tokens of an answer
at most, n sampled answers a prompt.
"""

import dataclasses
import functools
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from refine_jax import distributed
from refine_jax.config import RefineConfig
from refine_jax.generation.sampling import as_ends
from refine_jax.models.head import TokenStats, next_token_loss
from refine_jax.models.layout import Layout
from refine_jax.models.trainable import join
from refine_jax.models.transformer import Model, Params
from refine_jax.parallel import take_tokens
from refine_jax.refine.grpo import aggregate, group_advantages, loss_options, policy_loss
from refine_jax.refine.objective import Metrics
from refine_jax.refine.reading import Batch
from refine_jax.refine.rollout import fork_rollouts, sample_rollouts, score_rollouts
from refine_jax.refine.step import (
    TrainState,
    accumulate,
    apply_update,
    merge_rows,
    row_keys,
    split_rows,
    update_in_turn,
)

# rewards [B, n] float32 of answers `tokens` [B, n, A], of which `mask` [B, n, A] says what counts
Reward = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Draws of answers differ from those of the rollouts on the prompts in the same step.
_ANSWER_STREAM = 3


class AnswerSlots(NamedTuple):
    """Where the answers of rows stand, A slots a row; slots beyond an answer have weight 0."""

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
    """Replace the answers of rows by padding: {"tokens", "segments"} [B, T]."""
    is_prompt = batch["answer_mask"] != 1
    return {
        "tokens": jnp.where(is_prompt, batch["tokens"], pad_id),
        "segments": jnp.where(is_prompt, batch["segments"], 0),
    }


def prompt_lengths(batch: Batch) -> jax.Array:
    """Count the tokens [B] int32 of each row before its answer."""
    return jnp.sum((batch["segments"] != 0) & (batch["answer_mask"] != 1), axis=1, dtype=jnp.int32)


def answer_slots(batch: Batch, max_answer_tokens: int) -> AnswerSlots:
    """Find the slots, targets and weights of the answers; A is `max_answer_tokens`."""
    is_answer = batch["answer_mask"] != 0
    found = jnp.argsort(~is_answer, axis=1, stable=True).astype(jnp.int32)[:, :max_answer_tokens]
    targets = take_tokens(batch["tokens"], found)
    weights = take_tokens(is_answer, found)
    return AnswerSlots(jnp.maximum(found - 1, 0), targets, weights.astype(jnp.float32))


def answer_nll(
    hidden: jax.Array, head: jax.Array, slots: AnswerSlots, *, implementation: str | None = None
) -> tuple[jax.Array, TokenStats]:
    """Sum -log p(answer token | all before it) in nats, with statistics [B, A] of the tokens.

    hidden: [B, T, D] of rows of prompt and answer. Only hidden states that predict a token of an
    answer are read: the loss depends on nothing that predicts the prompt's own tokens.
    """
    predictors = take_tokens(hidden, slots.predictors)
    return next_token_loss(
        predictors, head, slots.targets, slots.weights, implementation=implementation
    )


class AnswerMethod:
    """Supervised and policy losses on answers: pure functions of parameters and rows.

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
        """Compute `answer_nll` of rows [B, T]."""
        hidden, _ = self.model.forward(
            params, batch["tokens"], Layout.from_segments(batch["segments"])
        )
        slots = answer_slots(batch, self.max_answer_tokens)
        nll_sum, stats = answer_nll(
            hidden,
            self.model.head(params),
            slots,
            implementation=self.model.policy.head_implementation,
        )
        return nll_sum, stats, slots

    def supervised_loss(
        self, params: Params, batch: Batch, *, token_count: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Compute the answers' loss (nats a token): a micro-batch's share of the mini-batch's mean.

        token_count: scalar, the mini-batch's tokens of answers (at least 1).
        """
        nll_sum, stats, slots = self.nll(params, batch)
        loss = nll_sum / token_count
        accuracy = jnp.sum(stats.correct * slots.weights) / token_count
        return loss, {"answer/loss": loss, "answer/accuracy": accuracy}

    def _prefill(self, params: Params, batch: Batch):
        """Compute hidden states and trace of the prompts, and the slot [B, 1] after each."""
        prompts = prompts_of(batch, self.pad_id)
        layout = Layout.from_segments(prompts["segments"])
        hidden, trace = self.model.forward(params, prompts["tokens"], layout, with_trace=True)
        # A row of padding has no slot before its first; its answers count nowhere.
        return hidden, trace, jnp.maximum(prompt_lengths(batch), 1)[:, None]

    def _respond(self, params: Params, batch: Batch, keys, samples: int, temperature: float):
        """Generate answers: tokens and mask [B, n, A], and what scoring them needs."""
        hidden, trace, starts = self._prefill(params, batch)
        last_hidden, state = fork_rollouts(
            self.model, params, hidden, trace, starts, self.max_answer_tokens, copies=samples
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
        """Decode the answer to each prompt greedily: tokens and mask [B, A].

        The mask is 1 up to and including the end of sequence.
        """
        keys = jax.random.split(jax.random.key(0), batch["tokens"].shape[0])
        tokens, mask, _ = self._respond(params, batch, keys, 1, 0.0)
        return tokens[:, 0], mask[:, 0]

    def sample(
        self, params: Params, batch: Batch, keys: jax.Array, *, samples: int, temperature: float
    ) -> SampledAnswers:
        """Sample n answers to every prompt, forked from one forward pass over it.

        keys: [B] random keys. Answers run to A tokens; what follows an end of sequence is masked.
        """
        tokens, mask, context = self._respond(params, batch, keys, samples, temperature)
        scores = score_rollouts(self.model, params, *context, tokens)
        return SampledAnswers(tokens, mask, scores.log_probs)

    def advantages(self, rewards: jax.Array, answers: SampledAnswers) -> jax.Array:
        """Compute advantages [B, n] of rewards [B, n]; the answers to one prompt are a group."""
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
        """Compute the clipped policy loss of sampled answers, as a share of the mini-batch's.

        advantages: [B, n]. mini_batch_mask: [mini-batch, n, A], of all its answers.
        """
        config, width = self.config, self.max_answer_tokens
        hidden, trace, starts = self._prefill(params, batch)
        scores = score_rollouts(self.model, params, hidden, trace, starts, answers.tokens)
        mask, whole = (x.reshape(-1, width) for x in (answers.mask, mini_batch_mask))
        loss, metrics = policy_loss(
            scores.log_probs.reshape(-1, width),
            answers.old_log_probs.reshape(-1, width),
            advantages.reshape(-1, 1),
            mask,
            mini_batch_mask=whole,
            **loss_options(config),
        )
        entropy = aggregate(scores.entropies.reshape(-1, width), mask, "token-mean", whole)
        metrics = {f"answer/{name}": value for name, value in metrics.items()}
        return loss, metrics | {"answer/policy_loss": loss, "answer/entropy": entropy}


def _compile_updates(optimizer, loss_of: Callable, mini_batch: int, micro_batch: int) -> Callable:
    """Compile `updates(state, rows)`, one a mini-batch.

    loss_of(rows of the mini-batch): the loss (params, rows of a micro-batch) -> share, metrics.
    """

    def update(state: TrainState, rows):
        loss = loss_of(rows)
        gradient = jax.grad(lambda p, part: loss(join(p, state.frozen), part), has_aux=True)
        gradients, metrics = accumulate(gradient, state.params, rows, mini_batch // micro_batch)
        state, update_metrics = apply_update(optimizer, state, gradients)
        return state, metrics | update_metrics

    @functools.partial(jax.jit, donate_argnums=0)
    def updates(state: TrainState, rows):
        return update_in_turn(update, state, rows, mini_batch)

    return updates


@dataclasses.dataclass(frozen=True)
class SupervisedStep:
    """Updates on the reference answers, one a mini-batch: `step(state, batch)` -> state, metrics.

    update(state, batch) -> state, metrics: the compiled updates, which give the state's buffers
    away.
    """

    update: Callable

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """Run one step. Raises ValueError where mini_batch does not divide the batch."""
        begin = time.perf_counter()
        state, metrics = jax.block_until_ready(self.update(state, batch))
        return state, metrics | {"time/answers": time.perf_counter() - begin}


def make_supervised_step(
    method: AnswerMethod,
    optimizer: optax.GradientTransformation,
    *,
    mini_batch: int,
    micro_batch: int,
) -> SupervisedStep:
    """Make the step on reference answers.

    mini_batch: rows of an update; divides the batch. micro_batch: rows of one forward and backward
    pass; divides mini_batch.
    """

    def loss_of(rows: Batch):
        token_count = jnp.maximum(jnp.sum(rows["answer_mask"] != 0, dtype=jnp.float32), 1.0)
        return functools.partial(method.supervised_loss, token_count=token_count)

    return SupervisedStep(_compile_updates(optimizer, loss_of, mini_batch, micro_batch))


@dataclasses.dataclass(frozen=True)
class PolicyStep:
    """GRPO on n sampled answers a prompt: `step(state, batch, index, reward)` -> state, metrics.

    Its compiled functions: collect(params, batch, keys) -> answers. advantages(rewards, answers).
    update(state, (batch, answers, advantages)) -> state, metrics: one update a mini-batch, which
    gives the state's buffers away.
    """

    collect: Callable
    advantages: Callable
    update: Callable

    def __call__(
        self, state: TrainState, batch: Batch, index: int, reward: Reward
    ) -> tuple[TrainState, dict[str, Any]]:
        """Run one step. Raises ValueError where mini_batch does not divide the batch.

        index: number of the training step, which decides the draws together with the state's key.
        reward: called on the host between sampling and update, on every process with all answers;
        nothing else decides how good an answer is.

        Metrics: "answer/score" mean reward, "answer/score_std" mean deviation among the answers to
        one prompt, "answer/length" mean tokens of an answer, eos counted; those of the policy loss.
        """
        begin = time.perf_counter()
        key = jax.random.fold_in(state.key, _ANSWER_STREAM)
        keys = row_keys(key, jnp.int32(index), batch["tokens"].shape[0])
        answers = self.collect(state.model_params, batch, keys)
        tokens, mask = distributed.fetch((answers.tokens, answers.mask))
        rewards = np.asarray(reward(tokens, mask), np.float32)
        advantages = self.advantages(rewards, answers)
        sampled = time.perf_counter()
        inputs = (batch, answers, advantages)
        state, metrics = jax.block_until_ready(self.update(state, inputs))
        real = mask.any(axis=(1, 2))
        return state, metrics | {
            "answer/score": rewards[real].mean(),
            "answer/score_std": rewards[real].std(axis=1).mean(),
            "answer/length": mask[real].sum(axis=-1).mean(),
            "time/sample": sampled - begin,
            "time/answers": time.perf_counter() - sampled,
        }


def make_policy_step(
    method: AnswerMethod,
    optimizer: optax.GradientTransformation,
    *,
    samples: int,
    temperature: float,
    mini_batch: int,
    micro_batch: int,
) -> PolicyStep:
    """Make the step on sampled answers.

    samples: n. temperature: of sampling. mini_batch: rows of an update; divides the batch.
    micro_batch: rows that are sampled for together, and of one forward and backward pass; divides
    mini_batch.
    """

    @jax.jit
    def collect(params: Params, batch: Batch, keys) -> SampledAnswers:
        parts = batch["tokens"].shape[0] // micro_batch

        def one(inputs):
            rows, row_key = inputs
            return method.sample(params, rows, row_key, samples=samples, temperature=temperature)

        return merge_rows(lax.map(one, split_rows((batch, keys), parts)))

    def loss_of(inputs):
        def loss(params, rows):
            return method.policy_loss(params, *rows, mini_batch_mask=inputs[1].mask)

        return loss

    updates = _compile_updates(optimizer, loss_of, mini_batch, micro_batch)
    return PolicyStep(collect, jax.jit(method.advantages), updates)


def make_answer_eval(
    method: AnswerMethod,
) -> Callable[[Params, Batch], tuple[Metrics, jax.Array, jax.Array]]:
    """Make `evaluate(params, batch)`: sums over held-out rows, and the model's own answers.

    The sums: nll_sum and correct_sum over the token_count tokens of the reference answers, each
    predicted from all true tokens before it; exact_sum of the row_count answers whose tokens are
    all predicted right, which greedy decoding would give in full. The answers: tokens and mask [B,
    A], decoded greedily from the prompt alone.
    """

    @jax.jit
    def evaluate(params: Params, batch: Batch):
        nll_sum, stats, slots = method.nll(params, batch)
        wrong = jnp.sum((stats.correct == 0) * slots.weights, axis=1)
        real = jnp.any(slots.weights != 0, axis=1)
        sums = {
            "nll_sum": nll_sum,
            "correct_sum": jnp.sum(stats.correct * slots.weights),
            "token_count": jnp.sum(slots.weights),
            "exact_sum": jnp.sum((wrong == 0) & real),
            "row_count": jnp.sum(real),
        }
        return sums, *method.answer(params, batch)

    return evaluate
