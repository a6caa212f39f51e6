"""Training steps on answers: supervised, and GRPO with a task's reward; and their evaluation.

What `step.py` is to the method on whole rows, this is to the losses of `answers.py`. The rows of a
batch are those of `refine_jax.data.prompts`. A step here changes parameters, optimizer and the
counts of skipped updates; it does not count as a training step of its own (`TrainState.step`), so
that it can follow one on the prompts.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from refine_jax import distributed
from refine_jax.models.transformer import Params
from refine_jax.refine.answers import AnswerMethod, SampledAnswers
from refine_jax.refine.method import Batch, Metrics
from refine_jax.refine.step import (
    TrainState,
    accumulate_gradient,
    apply_update,
    mean_metrics,
    merge_rows,
    mini_batches,
    row_keys,
    split_rows,
)

# rewards [B, n] float32 of answers `tokens` [B, n, A], of which `mask` [B, n, A] says what counts
Reward = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Draws of answers differ from those of the rollouts on the prompts in the same step.
_ANSWER_STREAM = 3


@dataclasses.dataclass(frozen=True)
class SupervisedStep:
    """Updates on the reference answers, one a mini-batch: `step(state, batch)` -> state, metrics.

    update(state, batch, index, updates) -> state, metrics: the compiled update of mini-batch
    `index` of `updates`. The state's buffers are given away.
    """

    update: Callable
    mini_batch: int

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """One step. Raises ValueError where mini_batch does not divide the batch."""
        begin = time.perf_counter()
        state, metrics = _update_all(self.update, state, batch, batch, self.mini_batch)
        return state, metrics | {"time/answers": time.perf_counter() - begin}


def make_supervised_step(
    method: AnswerMethod,
    optimizer: optax.GradientTransformation,
    *,
    mini_batch: int,
    micro_batch: int,
) -> SupervisedStep:
    """The step on reference answers.

    mini_batch: rows of an update; divides the batch. micro_batch: rows of one forward and backward
    pass; divides mini_batch.
    """

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
    def update(state: TrainState, batch: Batch, index, updates: int):
        rows = jax.tree.map(lambda x: x[index], split_rows(batch, updates))
        token_count = jnp.maximum(jnp.sum(rows["answer_mask"], dtype=jnp.float32), 1.0)
        loss = functools.partial(method.supervised_loss, token_count=token_count)
        gradients, metrics = accumulate_gradient(
            loss, state.params, rows, mini_batch // micro_batch
        )
        state, update_metrics = apply_update(optimizer, state, gradients)
        return state, metrics | update_metrics

    return SupervisedStep(update, mini_batch)


@dataclasses.dataclass(frozen=True)
class PolicyStep:
    """GRPO on n sampled answers a prompt: `step(state, batch, index, reward)` -> state, metrics.

    Its compiled functions: collect(params, batch, keys) -> answers. advantages(rewards, answers).
    update(state, (batch, answers, advantages), index, updates) -> state, metrics, of mini-batch
    `index` of `updates`. The state's buffers are given away.
    """

    collect: Callable
    advantages: Callable
    update: Callable
    mini_batch: int

    def __call__(
        self, state: TrainState, batch: Batch, index: int, reward: Reward
    ) -> tuple[TrainState, dict[str, Any]]:
        """One step. Raises ValueError where mini_batch does not divide the batch.

        index: number of the training step, which decides the draws together with the state's key.
        reward: called on the host between sampling and update, on every process with all answers;
        nothing else decides how good an answer is.

        Metrics: "answer/score" mean reward, "answer/score_std" mean deviation among the answers to
        one prompt, "answer/length" mean tokens of an answer, eos counted; those of the policy loss.
        """
        begin = time.perf_counter()
        key = jax.random.fold_in(state.key, _ANSWER_STREAM)
        keys = row_keys(key, jnp.int32(index), batch["tokens"].shape[0])
        answers = self.collect(state.params, batch, keys)
        tokens, mask = distributed.fetch((answers.tokens, answers.mask))
        rewards = np.asarray(reward(tokens, mask), np.float32)
        advantages = self.advantages(rewards, answers)
        sampled = time.perf_counter()
        inputs = (batch, answers, advantages)
        state, metrics = _update_all(self.update, state, batch, inputs, self.mini_batch)
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
    """The step on sampled answers.

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

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
    def update(state: TrainState, inputs, index, updates: int):
        inputs = jax.tree.map(lambda x: x[index], split_rows(inputs, updates))
        whole = inputs[1].mask

        def loss(params, rows):
            return method.policy_loss(params, *rows, mini_batch_mask=whole)

        gradients, metrics = accumulate_gradient(
            loss, state.params, inputs, mini_batch // micro_batch
        )
        state, update_metrics = apply_update(optimizer, state, gradients)
        return state, metrics | update_metrics

    return PolicyStep(collect, jax.jit(method.advantages), update, mini_batch)


def _update_all(update, state: TrainState, batch: Batch, inputs: Any, mini_batch: int):
    """All mini-batches' updates; metrics are means over them, counts those after the last."""
    rows = batch["tokens"].shape[0]
    if rows % mini_batch:
        raise ValueError(f"mini_batch must divide the batch. Got: {mini_batch=}, rows={rows}.")
    updates = rows // mini_batch
    each = []
    for index in mini_batches(state.step, updates):
        state, metrics = update(state, inputs, index, updates)
        each.append(metrics)
    return state, jax.block_until_ready(mean_metrics(each))


def make_answer_eval(
    method: AnswerMethod,
) -> Callable[[Params, Batch], tuple[Metrics, jax.Array, jax.Array]]:
    """`evaluate(params, batch)`: sums over held-out rows, and the model's own answers.

    The sums: nll_sum and correct_sum over the token_count tokens of the reference answers, each
    predicted from all true tokens before it; exact_sum of the row_count answers whose tokens are
    all predicted right, which greedy decoding would give in full. The answers: tokens and mask
    [B, A], decoded greedily from the prompt alone.
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
