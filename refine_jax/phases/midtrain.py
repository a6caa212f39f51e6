"""Mid-training: next-token training, ReFINE, or one after the other, on a corpus of documents.

`run` prepares everything without writing, then continues the run that its folder holds or starts
one (`refine_jax.phases.loop`). Beside what the loop writes: WORKDIR/rollouts.png.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from refine_jax import distributed
from refine_jax.base.files import given_path
from refine_jax.config import Config
from refine_jax.data.pipeline import Batch, Corpus, Dataset, load_corpus
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.parallel import use_mesh
from refine_jax.phases import loop
from refine_jax.phases.loop import Loop, TrainingParts
from refine_jax.phases.setup import data_options, only_run_in, rows_at_once
from refine_jax.refine.step import TrainState, make_eval_step, make_train_step
from refine_jax.report.held_out import HeldOutRecord
from refine_jax.report.plots import plot_rollouts

OBJECTIVES = {"ntp": "next token", "refine": "ReFINE"}


def prepare(config: Config, workdir: Path, allow_change: Sequence[str] = ()) -> TrainingParts:
    """Build and check all that a run needs; see `refine_jax.phases.loop.prepare`."""
    return loop.prepare(config, workdir, allow_change, _load)


def _load(config: Config, tokenizer: Tokenizer) -> Corpus:
    return load_corpus(**data_options(config, tokenizer))


def run(config: Config, workdir: str | Path, allow_change: Sequence[str] = ()) -> dict:
    """Train in the folder `workdir`, or go on from its latest checkpoint, and report.

    allow_change: settings that may be others than those the run was started with, such as
    "optimizer.learning_rate" (`refine_jax.phases.changes`).

    Returns the figures of `refine_jax.report.metrics.summarize`. After SIGTERM or SIGINT:
    {"interrupted": signal name, "step": the last step, which is saved}.

    Raises:
      ConfigError, ModelConfigError, DataError, CheckpointError: Bad input; nothing was written.
      RunError: Training cannot go on.
    """
    workdir = given_path(workdir, "workdir", write=True).absolute()
    with only_run_in(workdir) as check, use_mesh(config.mesh), distributed.Interrupt() as interrupt:
        return MidtrainLoop(prepare(config, workdir, allow_change), workdir).run(interrupt, check)


class MidtrainLoop(Loop):
    """Steps of next-token training or ReFINE."""

    def __init__(self, parts: TrainingParts, workdir: Path):
        train, refine = parts.config.train, parts.config.refine
        super().__init__(parts, workdir)
        rows = {
            "eos_id": parts.tokenizer.end_ids,
            "max_documents": self.config.data.max_documents if self.config.data.pack else 1,
        }
        self.train_steps = {
            objective: make_train_step(
                parts.model,
                self.optimizer,
                dataclasses.replace(refine, objective=objective),
                mini_batch=train.mini_batch,
                micro_batch=rows_at_once(parts.config),
                steps=train.steps,
                time_rollouts=train.time_rollouts,
                **rows,
            )
            for objective in ("ntp", "refine")
        }
        self.eval_step = make_eval_step(parts.model, refine, **rows)

    def describe_data(self) -> str:
        """Count the rows, and give their length."""
        rows, length = self.parts.training.rows, self.config.data.sequence_length
        return f"{'streamed' if rows is None else f'{rows:,}'} rows of {length:,} tokens"

    def describe_left_out(self) -> str:
        """Count documents and tokens that are not trained on, by reason."""
        statistics = self.parts.training.statistics
        return statistics.summary() if statistics is not None else ""

    def place(self, batch: Batch, dataset: Dataset) -> Batch:
        """Drop the segments where they say nothing, which makes the program faster."""
        if dataset.full_rows:
            batch = {"tokens": batch["tokens"]}
        return super().place(batch, dataset)

    def train_step(
        self, step: int, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Any]]:
        """Run training step number `step` (from 0)."""
        warmup, objective = self.config.train.warmup_ntp_steps, self.objective(step)
        if state.reference_params is not None and step == warmup > 0:
            # The divergence is from the policy that ReFINE starts with, not from random weights.
            copy = jax.tree.map(lambda x: x.copy(), state.params)
            state = dataclasses.replace(state, reference_params=copy)
        return self.train_steps[objective](state, batch)

    def objective(self, step: int) -> str:
        """Choose the objective of step number `step`."""
        return "ntp" if step < self.config.train.warmup_ntp_steps else self.config.refine.objective

    def describe_step(self, step: int) -> str:
        """Name the step and its objective."""
        return f"the training step ({OBJECTIVES[self.objective(step)]})"

    def evaluate(self, state: TrainState, record: HeldOutRecord) -> dict[str, float]:
        """Compute held-out figures; the same documents and random keys every time.

        loss and entropy in nats a token, accuracy as a fraction, reward as a mean over rollouts.
        """
        sums: dict[str, float] = {}
        for index, batch in enumerate(self.parts.held_out):
            batch = self.place(batch, self.parts.held_out)
            first = index * len(batch["tokens"])
            part, seen = self.eval_step(state.model_params, batch, self.eval_key, first)
            record.add(batch["tokens"], seen)
            for name, value in jax.device_get(part).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        figures = {
            f"eval/{name}": sums[f"{source}_sum"] / max(sums["token_count"], 1.0)
            for name, source in (("loss", "nll"), ("accuracy", "correct"), ("entropy", "entropy"))
        }
        if sums["rollout_count"]:
            figures["eval/reward"] = sums["reward_sum"] / sums["rollout_count"]
        return figures

    def show_examples(self, state: TrainState) -> None:
        """Draw the first held-out row that rollouts fit in."""
        batch = self.place(next(iter(self.parts.held_out)), self.parts.held_out)
        # With the first row's number, as evaluations call it: without, it would compile again.
        _, seen = self.eval_step(state.model_params, batch, self.eval_key, 0)
        seen = distributed.fetch(seen)
        if not distributed.is_writer():
            return
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
