"""The programs of mid-training and post-training."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from refine_jax.compile_only.programs.run import EOS, PAD, AbstractRun, Program
from refine_jax.phases.setup import rows_at_once
from refine_jax.refine.answers import (
    AnswerMethod,
    PolicyStep,
    make_answer_eval,
    make_policy_step,
    make_supervised_step,
)
from refine_jax.refine.step import make_eval_step, make_train_step


def training_programs(run: AbstractRun) -> dict[str, Callable[[], Program]]:
    """Make the steps on whole rows: documents, or the prompts of post-training."""
    train = run.config.train
    if run.config.refine.objective == "ntp":
        return {"update": lambda: _update(run, "ntp", compared=False)}
    compared = not (run.config.phase == "midtrain" and train.warmup_ntp_steps)
    return {
        "update": lambda: _update(run, "refine", compared=False),
        "ntp_update": lambda: _update(run, "ntp", compared=compared),
    }


def answer_programs(run: AbstractRun) -> dict[str, Callable[[], Program]]:
    """Make the steps on the answers of post-training, and their evaluation."""
    rest = {"answer_evaluation": lambda: _answer_evaluation(run)}
    if run.config.posttrain.answers == "sft":
        return {"answer_update": lambda: _supervised(run)} | rest
    return {"answer_collect": lambda: _sample(run), "answer_update": lambda: _policy(run)} | rest


def evaluation(run: AbstractRun) -> Program:
    """Make the evaluation of held-out rows."""
    rows = rows_at_once(run.config)
    batch = run.batch(rows)
    step = make_eval_step(run.model, run.config.refine, eos_id=EOS, max_documents=run.max_documents)
    key = run.shapes.copies(jax.eval_shape(lambda: jax.random.key(0)))
    return Program(
        "evaluation",
        f"forward, selection and rollouts of {rows} held-out rows",
        step,
        (run.state.model_params, batch, key, run.shapes.scalar()),
        resident=(run.state,),
        states=run.rollout_states(batch, max_documents=run.max_documents),
        model_flops=run.row_operations(rows, {"read": 1}, {"read": 2}),
    )


def _update(run: AbstractRun, objective: str, *, compared: bool) -> Program:
    train, at_once = run.config.train, rows_at_once(run.config)
    config = dataclasses.replace(run.config.refine, objective=objective)
    train_step = make_train_step(
        run.model,
        run.optimizer,
        config,
        mini_batch=train.mini_batch,
        micro_batch=at_once,
        eos_id=EOS,
        max_documents=run.max_documents,
        steps=train.steps,
    )
    rows, states = train.batch_size, ()
    of_rows, of_rollouts = {"read": 0, "trained": 1}, {}
    batch, wording = run.batch(rows), "next-token"
    if objective == "refine":
        wording = "ReFINE"
    if objective == "refine" and config.estimator == "rollouts":
        of_rollouts = {"read": 1, "trained": 1}
        collects = config.rollouts == "batch"
        of_rows["read"] += collects
        parts = rows // at_once
        states = run.rollout_states(batch, parts, run.max_documents, together=collects)
    return Program(
        "update" if objective == run.config.refine.objective else "ntp_update",
        f"{wording} step on {rows} rows, {at_once} at a time, {train.updates_per_step} updates",
        train_step.run,
        (run.state, batch),
        runs=0 if compared else 1,
        states=states,
        model_flops=run.row_operations(rows, of_rows, of_rollouts),
        compared=compared,
    )


def _method(run: AbstractRun) -> AnswerMethod:
    tokens = run.config.prompts.max_answer_tokens
    return AnswerMethod(
        run.model, run.config.refine, max_answer_tokens=tokens, eos_id=EOS, pad_id=PAD
    )


def _answer_sizes(run: AbstractRun) -> dict[str, int]:
    mini_batch = run.config.posttrain.mini_batch_size or run.config.train.batch_size
    return {"mini_batch": mini_batch, "micro_batch": rows_at_once(run.config)}


def _answer_update(run: AbstractRun, update: Callable, inputs: Any, sampled: int) -> Program:
    """sampled: tokens of the answers that a prompt has besides its own row."""
    rows, length = run.config.train.batch_size, run.config.data.sequence_length
    updates = rows // _answer_sizes(run)["mini_batch"]
    return Program(
        "answer_update",
        f"step on the answers of {rows} rows, {updates} updates",
        update,
        (run.state, inputs),
        runs=1,
        model_flops=run.operations(rows * (length + sampled), length, trained=1),
    )


def _supervised(run: AbstractRun) -> Program:
    step = make_supervised_step(_method(run), run.optimizer, **_answer_sizes(run))
    return _answer_update(run, step.update, run.batch(run.config.train.batch_size, answers=True), 0)


def _policy_step(run: AbstractRun) -> PolicyStep:
    return make_policy_step(
        _method(run),
        run.optimizer,
        samples=run.config.posttrain.samples,
        temperature=run.config.refine.sampling_temperature,
        **_answer_sizes(run),
    )


def _sampled(run: AbstractRun) -> int:
    return run.config.posttrain.samples * run.config.prompts.max_answer_tokens


def _sample(run: AbstractRun) -> Program:
    rows, length = run.config.train.batch_size, run.config.data.sequence_length
    return Program(
        "answer_collect",
        f"{run.config.posttrain.samples} answers to each of {rows} prompts",
        _policy_step(run).collect,
        (run.state.model_params, run.batch(rows, answers=True), run.keys(rows)),
        runs=1,
        resident=(run.state,),
        model_flops=run.operations(rows * (length + _sampled(run)), length, read=1),
    )


def _policy(run: AbstractRun) -> Program:
    sample, step = _sample(run), _policy_step(run)
    answers = run.shapes.rows(jax.eval_shape(sample.function, *sample.args))
    shape = run.config.train.batch_size, run.config.posttrain.samples
    rewards = jax.ShapeDtypeStruct(shape, jnp.float32)
    advantages = run.shapes.rows(jax.eval_shape(step.advantages, rewards, answers))
    inputs = sample.args[1], answers, advantages
    return _answer_update(run, step.update, inputs, _sampled(run))


def _answer_evaluation(run: AbstractRun) -> Program:
    rows, length = rows_at_once(run.config), run.config.data.sequence_length
    # The true answers are read, and others are generated from the prompts.
    tokens = rows * (2 * length + run.config.prompts.max_answer_tokens)
    return Program(
        "answer_evaluation",
        f"answers to {rows} held-out prompts",
        make_answer_eval(_method(run)),
        (run.state.model_params, run.batch(rows, answers=True)),
        resident=(run.state,),
        model_flops=run.operations(tokens, length, read=1),
    )
