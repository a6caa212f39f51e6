"""Mid-training: next-token training, ReFINE, or one after the other, on a corpus of documents.

`run` prepares everything without writing, then continues the run that its folder holds or starts
one. An interrupted run that is started again computes what an uninterrupted one would have: all
that a step depends on (parameters, optimizer, random key, place in the data) is in a checkpoint.

    WORKDIR/metrics.jsonl  results.json  training.png  rollouts.png  checkpoints/  tensorboard/
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from refine_jax.checkpoint.manager import CheckpointManager
from refine_jax.config import Config
from refine_jax.data.pipeline import BatchIterator, Dataset, load_corpus
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.models.transformer import Model
from refine_jax.monitor import Monitor, summarize, table, write_results
from refine_jax.phases.interrupt import Interrupt
from refine_jax.phases.setup import (
    CHECKPOINTS,
    RunError,
    Start,
    check_same_run,
    data_options,
    initial_params,
    load_matching_tokenizer,
    load_start,
    make_model,
)
from refine_jax.plots import plot_rollouts, plot_training
from refine_jax.refine.optimizer import make_optimizer, make_schedule
from refine_jax.refine.step import TrainState, make_eval_step, make_train_step
from refine_jax.settings import ConfigError

# Distinct streams of random numbers from the one seed; initial weights use the seed itself.
_TRAIN_STREAM, _EVAL_STREAM = 1, 2


def _rows(batch: Mapping[str, np.ndarray], dataset: Dataset) -> dict[str, np.ndarray]:
    """The batch for a step: without segments, the faster program, where they say nothing."""
    return {"tokens": batch["tokens"]} if dataset.full_rows else dict(batch)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of; nothing of it is written yet."""

    config: Config
    start: Start
    model: Model
    tokenizer: Tokenizer
    training: Dataset
    held_out: Dataset


def prepare(config: Config, workdir: Path) -> Parts:
    """Build and check all that a run needs; read files, write none.

    Raises:
      ConfigError, ModelConfigError, DataError, CheckpointError: What of the user's input is wrong.
    """
    check_same_run(config, workdir)
    start = load_start(config.model, workdir)
    model = make_model(start, config.model)
    tokenizer = load_matching_tokenizer(config, start)
    if start.tokenizer is None:  # a continued run has that of its folder
        start = dataclasses.replace(start, files={**tokenizer.files, **start.files})
    corpus = load_corpus(data_options(config, tokenizer), tokenizer)
    training = corpus.dataset("train", config.train.batch_size)
    held_out = corpus.dataset("validation", config.train.micro_batch)
    if training.batches is not None and training.batches < config.train.steps:
        raise ConfigError(
            f"config.data.epochs={config.data.epochs} gives {training.batches} batches, fewer than "
            f"config.train.steps={config.train.steps}. Raise epochs (None: no end) or lower steps."
        )
    return Parts(config, start, model, tokenizer, training, held_out)


def run(config: Config, workdir: str | Path) -> dict:
    """Train, or go on training, and report.

    Args:
      config: The run.
      workdir: Its folder, made if it is not there. If it holds checkpoints of this configuration,
        the run continues from the latest.

    Returns:
      The figures of `refine_jax.monitor.summarize`. After SIGTERM or SIGINT: {"interrupted":
      signal name, "step": the last step, which is saved}.

    Raises:
      ConfigError, ModelConfigError, DataError, CheckpointError: Bad input; nothing was written.
      RunError: Training cannot go on.
    """
    workdir = Path(workdir).expanduser().absolute()
    loop = _Loop(prepare(config, workdir), workdir)
    with Interrupt() as interrupt:
        return loop.run(interrupt)


class _Loop:
    """The steps of one run, and what is written on the way."""

    def __init__(self, parts: Parts, workdir: Path):
        self.parts, self.config, self.workdir = parts, parts.config, workdir
        train, refine = self.config.train, self.config.refine
        self.optimizer = make_optimizer(
            self.config.optimizer, steps=train.steps, updates_per_step=train.updates_per_step
        )
        self.schedule = make_schedule(self.config.optimizer, train.steps)
        rows = {
            "eos_id": parts.tokenizer.eos_id,
            "max_documents": self.config.data.max_documents if self.config.data.pack else 1,
        }
        self.train_steps = {
            objective: make_train_step(
                parts.model,
                self.optimizer,
                dataclasses.replace(refine, objective=objective),
                mini_batch=train.mini_batch,
                micro_batch=train.micro_batch,
                **rows,
            )
            for objective in ("ntp", "refine")
        }
        self.eval_step = make_eval_step(parts.model, refine, **rows)
        key = jax.random.key(train.seed)
        self.train_key = jax.random.fold_in(key, _TRAIN_STREAM)
        self.eval_key = jax.random.fold_in(key, _EVAL_STREAM)

    def run(self, interrupt: Interrupt) -> dict:
        """From the latest checkpoint, or the start, to the end."""
        train = self.config.train
        self.workdir.mkdir(parents=True, exist_ok=True)
        with self.open_checkpoints() as manager:
            step, state, batches = self.restore_or_start(manager)
            self.introduce(step)
            with Monitor(
                self.workdir, steps=train.steps, start=step, log_every=train.log_every
            ) as monitor:
                state = self.train(step, state, batches, manager, monitor, interrupt)
        if interrupt and int(state.step) < train.steps:
            print(
                f"{interrupt.signal}: saved step {int(state.step)} of {train.steps} and stopped. "
                "The same command continues the run.",
                flush=True,
            )
            return {"interrupted": interrupt.signal, "step": int(state.step)}
        return self.report(state, monitor.history)

    def open_checkpoints(self) -> CheckpointManager:
        """The checkpoints of this run; makes their folder."""
        train, start = self.config.train, self.parts.start
        return CheckpointManager(
            self.workdir / CHECKPOINTS,
            save_every=train.checkpoint_every,
            keep=train.keep_checkpoints,
            best_metric=train.best_metric,
            best_mode="min" if train.best_metric == "loss" else "max",
            config_json=start.config_json,
            run_config=self.config.to_dict(),
            files=start.files,
        )

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        params = initial_params(self.parts.model, self.parts.start, self.config)
        return TrainState.create(params, self.optimizer, self.train_key, self.config.refine)

    def restore_or_start(self, manager: CheckpointManager) -> tuple[int, TrainState, BatchIterator]:
        """Steps done, the state after them, and the batches that follow."""

        batches = iter(self.parts.training)
        if not manager.steps():
            return 0, self.initial_state(), batches
        restored = manager.restore_latest(jax.eval_shape(self.initial_state))
        batches.set_state(restored.data_state)
        return restored.step, restored.state, batches

    def introduce(self, step: int) -> None:
        """Say what runs, on what."""
        config, model = self.config, self.parts.model
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(model.abstract_params()))
        device = jax.devices()[0]
        print(
            f"{self.parts.start.fields['model_type']}, {count / 1e6:,.1f} M parameters, "
            f"{model.policy.compute_dtype} on {device.device_kind}; "
            f"{self.parts.training.rows:,} rows of {config.data.sequence_length:,} tokens, "
            f"{config.train.batch_size} a step; "
            + (f"continuing after step {step}" if step else f"{config.train.steps} steps"),
            flush=True,
        )

    def train(
        self,
        step: int,
        state: TrainState,
        batches: BatchIterator,
        manager: CheckpointManager,
        monitor: Monitor,
        interrupt: Interrupt,
    ) -> TrainState:
        """All remaining steps, evaluations and checkpoints; stops early when interrupted."""
        train = self.config.train
        if step == 0 and not monitor.history:
            monitor.record(0, self.evaluate(state))
        while step < train.steps and not interrupt:
            state, metrics = self.one_step(step, state, batches)
            step += 1
            failed = int(metrics["update/skipped_in_a_row"]) >= train.max_nonfinite_updates
            due = train.eval_every and step % train.eval_every == 0
            evaluation = self.evaluate(state) if (due or step == train.steps) and not failed else {}
            monitor.record(step, metrics | evaluation)
            if failed:
                raise RunError(
                    f"Stopped at step {step}: the gradients of the last "
                    f"{int(metrics['update/skipped_in_a_row'])} updates were not finite "
                    "(config.train.max_nonfinite_updates). The parameters were not changed by "
                    f"them; the last checkpoint is step {(manager.steps() or [None])[-1]}. Try a "
                    "smaller learning rate, or look at the data."
                )
            self.save(manager, step, state, batches, evaluation, last=step == train.steps)
        self.save(manager, step, state, batches, {}, last=True)
        return state

    def one_step(
        self, step: int, state: TrainState, batches: BatchIterator
    ) -> tuple[TrainState, dict[str, Any]]:
        """Training step number `step` (from 0)."""
        warmup = self.config.train.warmup_ntp_steps
        objective = "ntp" if step < warmup else self.config.refine.objective
        if state.reference_params is not None and step == warmup > 0:
            # The divergence is from the policy that ReFINE starts with, not from random weights.
            copy = jax.tree.map(lambda x: x.copy(), state.params)
            state = dataclasses.replace(state, reference_params=copy)
        begin = time.perf_counter()
        batch = next(batches)
        tokens = np.count_nonzero(batch["segments"])
        loaded = time.perf_counter()
        state, metrics = self.train_steps[objective](state, _rows(batch, self.parts.training))
        metrics = jax.device_get(metrics)
        seconds = time.perf_counter() - begin
        return state, metrics | {
            "learning_rate": float(self.schedule(step)),
            "tokens_per_second": tokens / seconds,
            "time/data": loaded - begin,
            "time/step": seconds,
        }

    def save(
        self,
        manager: CheckpointManager,
        step: int,
        state: TrainState,
        batches: BatchIterator,
        evaluation: Mapping[str, float],
        *,
        last: bool,
    ) -> None:
        """Start a checkpoint if one is due; a step that may be the best is saved to be kept."""
        best = self.config.train.best_metric
        metrics = {name.removeprefix("eval/"): value for name, value in evaluation.items()}
        manager.save(
            step,
            state,
            data_state=batches.get_state(),
            metrics=metrics if best and metrics else None,
            force=last or bool(best and metrics),
        )

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Held-out figures; the same documents and random keys every time.

        loss and entropy in nats a token, accuracy as a fraction, reward as a mean over rollouts.
        """
        sums: dict[str, float] = {}
        begin = time.perf_counter()
        for index, batch in enumerate(self.parts.held_out):
            key = jax.random.fold_in(self.eval_key, index)
            part, _ = jax.device_get(
                self.eval_step(state.params, _rows(batch, self.parts.held_out), key)
            )
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        figures = {
            f"eval/{name}": sums[f"{source}_sum"] / max(sums["token_count"], 1.0)
            for name, source in (("loss", "nll"), ("accuracy", "correct"), ("entropy", "entropy"))
        }
        if sums["rollout_count"]:
            figures["eval/reward"] = sums["reward_sum"] / sums["rollout_count"]
        return figures | {"time/eval": time.perf_counter() - begin}

    def report(self, state: TrainState, history: list[dict]) -> dict:
        """Plots, results.json, and the closing table."""
        results = summarize(history)
        plot_training(
            self.workdir / "training.png", history, clip_norm=self.config.optimizer.clip_norm
        )
        self.plot_rollouts(state)
        write_results(self.workdir, results)
        print(f"\n{table(results)}\n\nPlots, figures and checkpoints: {self.workdir}", flush=True)
        return results

    def plot_rollouts(self, state: TrainState) -> None:
        """Draw the first held-out row that rollouts fit in."""
        batch = next(iter(self.parts.held_out))
        key = jax.random.fold_in(self.eval_key, 0)
        _, seen = jax.device_get(
            self.eval_step(state.params, _rows(batch, self.parts.held_out), key)
        )
        for row in range(len(seen["valid"])):
            if seen["valid"][row].any():
                break
        else:
            return
        n = self.config.refine.rollouts_per_position
        groups = {
            name: seen[name][row].reshape(-1, n, *seen[name].shape[2:])
            for name in ("starts", "valid", "rewards", "tokens", "truth")
        }
        kept = groups["valid"].all(axis=1)
        decode: Callable = lambda ids: repr(self.parts.tokenizer.decode(ids))[1:-1]  # noqa: E731
        plot_rollouts(
            self.workdir / "rollouts.png",
            np.where(seen["mask"][row], seen["entropy"][row], np.nan),
            groups["starts"][kept, 0],
            groups["rewards"][kept],
            length=self.config.refine.rollout_length,
            reward_name=self.config.refine.reward,
            texts=[
                (decode(truth[0]), decode(tokens[0]))
                for truth, tokens in zip(groups["truth"][kept], groups["tokens"][kept], strict=True)
            ],
        )
