"""The training loop that mid-training and post-training share.

`Loop` continues the run that its folder holds or starts one: steps, evaluations, checkpoints,
metrics, the closing table. An interrupted run that is started again computes what an uninterrupted
one would have: all that a step depends on (parameters, optimizer, random key, place in the data) is
in a checkpoint. What a step does, and what is evaluated, is up to the phase.

    WORKDIR/report.html  metrics.jsonl  held_out.jsonl  results.json  training.png
            checkpoints/  tensorboard/  profile/
"""

import abc
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax import distributed
from refine_jax.base.errors import RunError
from refine_jax.checkpoint.folders import CHECKPOINTS, ModelCheckpoint
from refine_jax.checkpoint.manager import CheckpointManager
from refine_jax.compiling import Compilations
from refine_jax.config import Config
from refine_jax.data.pipeline import Batch, BatchIterator, Corpus, Dataset
from refine_jax.data.prompts import PromptCorpus
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.models.trainable import Params, split
from refine_jax.models.transformer import Model
from refine_jax.parallel import place_rows, state_shardings
from refine_jax.phases.changes import Changes, check_same_run
from refine_jax.phases.setup import (
    abstract_params,
    check_enough_batches,
    check_mesh,
    check_room,
    initial_params,
    prepare_model,
    training_data,
)
from refine_jax.refine.optimizer import make_optimizer, make_schedule
from refine_jax.refine.step import TrainState
from refine_jax.report.held_out import HeldOutLog, HeldOutRecord
from refine_jax.report.metrics import summarize, table
from refine_jax.report.monitor import Monitor
from refine_jax.report.page import write_run_page
from refine_jax.report.plots import write_report
from refine_jax.report.profile import Profile
from refine_jax.report.trackers import Trackers, check_trackers

if TYPE_CHECKING:
    from refine_jax.phases.tasks import TrainingTasks

# Distinct streams of random numbers from the one seed; initial weights use the seed itself.
_TRAIN_STREAM, _EVAL_STREAM = 1, 2


@dataclasses.dataclass(frozen=True)
class TrainingParts:
    """What a run is made of, before anything is written."""

    config: Config
    start: ModelCheckpoint
    model: Model
    tokenizer: Tokenizer
    corpus: Corpus | PromptCorpus
    training: Dataset
    held_out: Dataset | None
    changes: Changes
    tasks: "TrainingTasks | None"


def prepare(
    config: Config,
    workdir: Path,
    allow_change: Sequence[str],
    load: Callable[[Config, Tokenizer], Corpus | PromptCorpus],
) -> TrainingParts:
    """Build and check all that a run needs; read files, write none.

    allow_change: settings that may be others than the run in `workdir` was started with. load:
    reads what the phase trains on.

    Raises:
      ConfigError, ModelConfigError, DataError, CheckpointError: What of the user's input is wrong.
    """
    changes = check_same_run(config, workdir, allow_change)
    check_trackers(config.train.tracker_names or [])
    start, model, tokenizer = prepare_model(config, workdir)
    check_mesh(config, model)
    check_room(config, model)
    corpus = load(config, tokenizer)
    training, held_out = training_data(corpus, config)
    check_enough_batches(config, training)
    changes = changes.check_data(training.fingerprint, config)
    tasks = None
    if config.train.task_names:
        from refine_jax.phases.tasks import TrainingTasks  # with all of the evaluation

        tasks = TrainingTasks(config, model, tokenizer, corpus)
    return TrainingParts(
        config, start, model, tokenizer, corpus, training, held_out, changes, tasks
    )


class Loop(abc.ABC):
    """The steps of one run, and what is written on the way.

    Attributes:
      parts: What the run is made of.
      optimizer, schedule: One optimizer for the whole run; all updates of a step have one rate.
      train_key, eval_key: Where the random numbers of steps and of evaluations come from.
    """

    def __init__(self, parts: TrainingParts, workdir: Path):
        self.parts, self.config, self.workdir = parts, parts.config, workdir
        train = self.config.train
        self.optimizer = make_optimizer(
            self.config.optimizer, steps=train.steps, updates_per_step=self.config.updates_per_step
        )
        self.schedule = make_schedule(self.config.optimizer, train.steps)
        key = jax.random.key(train.seed)
        self.train_key = jax.random.fold_in(key, _TRAIN_STREAM)
        self.eval_key = jax.random.fold_in(key, _EVAL_STREAM)
        self.compilations = Compilations()

    def place(self, batch: Batch, dataset: Dataset) -> Batch:
        """Spread a batch over the mesh, if there is one.

        batch: the rows `dataset.share` of the global batch, which this process has read.
        """
        return place_rows(batch, dataset.share, dataset.batch_size)

    @abc.abstractmethod
    def train_step(
        self, step: int, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Any]]:
        """Run training step number `step` (from 0); gives the state's buffers away."""

    @abc.abstractmethod
    def describe_step(self, step: int) -> str:
        """Name training step number `step` (from 0), for words about its compilation."""

    @abc.abstractmethod
    def evaluate(self, state: TrainState, record: HeldOutRecord) -> dict[str, float]:
        """Compute held-out figures; the same examples and random keys every time.

        record: takes what the method saw of each batch, for the page of the run.
        """

    @abc.abstractmethod
    def describe_data(self) -> str:
        """Say in a few words what is trained on."""

    def describe_left_out(self) -> str:
        """Say in a line what of the data is not trained on, and why; "" if there is nothing."""
        return ""

    @abc.abstractmethod
    def show_examples(self, state: TrainState) -> None:
        """Write what the model does on held-out examples at the end of a run."""

    def run(
        self, interrupt: distributed.Interrupt, check: Callable[[], None] = lambda: None
    ) -> dict:
        """Train from the latest checkpoint, or from the start, to the end.

        check: called between steps; raises what ends the run.

        Returns the figures of `refine_jax.report.metrics.summarize`. After SIGTERM or SIGINT:
        {"interrupted": signal name, "step": the last step, which is saved}.

        Raises:
          CheckpointError: The folder holds another model's checkpoints, or a corrupt one.
          RunError: Training cannot go on.
        """
        distributed.check_same("training data", self.parts.training.fingerprint)
        self.workdir.mkdir(parents=True, exist_ok=True)
        with self.open_trackers() as self.trackers:
            return self._run(interrupt, check)

    def open_trackers(self) -> Trackers:
        """Start what else gets the metrics and plots of this run."""
        train = self.config.train
        return Trackers(
            self.workdir,
            train.tracker_names,
            project=train.project,
            config=self.config.to_dict(),
            say=distributed.say,
            write=distributed.is_writer(),
        )

    def _run(self, interrupt: distributed.Interrupt, check: Callable[[], None]) -> dict:
        train = self.config.train
        with self.open_checkpoints() as manager:
            step, state, batches = self.restore_or_start(manager)
            self.introduce(step)
            writes = distributed.is_writer()
            with Monitor(
                self.workdir, steps=train.steps, start=step, log_every=train.log_every, write=writes
            ) as monitor:
                say = monitor.say if writes and train.log_every else None
                self.held_out_log = HeldOutLog(self.workdir, step, monitor.say, write=writes)
                profile = Profile(self.workdir, train.profiled, monitor.say, write=writes)
                with Compilations(say) as self.compilations, profile as self.profile:
                    state = self.train(step, state, batches, manager, monitor, interrupt, check)
        if interrupt and int(state.step) < train.steps:
            distributed.say(
                f"{interrupt.signal}: saved step {int(state.step)} of {train.steps} and stopped. "
                "The same command continues the run."
            )
            return {"interrupted": interrupt.signal, "step": int(state.step)}
        return self.report(state, monitor.history)

    def open_checkpoints(self) -> CheckpointManager:
        """Open the checkpoints of this run; makes their folder."""
        train, start, record = self.config.train, self.parts.start, self.parts.changes.record()
        if start.lora is not None:
            record["lora"] = dataclasses.asdict(start.lora)
        return CheckpointManager(
            self.workdir / CHECKPOINTS,
            save_every=train.checkpoint_every,
            keep=train.keep_checkpoints,
            best_metric=train.best_metric,
            best_mode="min" if train.best_metric == "loss" else "max",
            last_step=train.steps,
            config_json=start.config_json,
            run_config=self.config.to_dict(),
            run_record=record,
            files=start.files,
        )

    def initial_state(self) -> TrainState:
        """Make the state before the first step."""
        state = self.create(initial_params(self.parts.model, self.parts.start, self.config))
        shardings = state_shardings(state)
        return state if shardings is None else jax.device_put(state, shardings)

    def create(self, params: Params) -> TrainState:
        """Make the state of parameters before the first step."""
        trained, frozen = split(params, self.config.train.trainable)
        key, method = self.train_key, self.config.refine
        return TrainState.create(trained, self.optimizer, key, method, frozen)

    def abstract_state(self) -> TrainState:
        """Give shapes and dtypes of the state, and where its arrays belong on an ambient mesh."""
        params = abstract_params(self.parts.model, self.parts.start, self.config)
        state = jax.eval_shape(self.create, params)
        shardings = state_shardings(state)
        if shardings is None:
            return state
        return jax.tree.map(lambda x, place: x.update(sharding=place), state, shardings)

    def restore_or_start(self, manager: CheckpointManager) -> tuple[int, TrainState, BatchIterator]:
        """Return the steps done, the state after them, and the batches that follow."""
        batches = iter(self.parts.training)
        abstract = self.abstract_state()
        restored = manager.restore_latest(dataclasses.replace(abstract, frozen=None))
        if restored is None:
            state = self.initial_state()
            if state.frozen is not None:
                manager.save_frozen(state.frozen)
            return 0, state, batches
        state = restored.state
        if abstract.frozen is not None:
            frozen = manager.restore_frozen(abstract.frozen)
            state = dataclasses.replace(state, frozen=frozen)
        saved, fingerprint = restored.data_state, self.parts.training.fingerprint
        other = isinstance(saved, Mapping) and saved.get("fingerprint") != fingerprint
        if other and self.parts.changes.other_rows(restored.step):
            distributed.say("The rows are others than before: they are read from the first one on.")
        else:
            batches.set_state(saved)
        return restored.step, state, batches

    def introduce(self, step: int) -> None:
        """Say what is trained, and on which devices."""
        config, model = self.config, self.parts.model
        state = self.abstract_state()
        count, trained = (
            sum(math.prod(x.shape) for x in jax.tree.leaves(params))
            for params in (state.model_params, state.params)
        )
        part = "" if state.frozen is None else f" ({trained / 1e6:,.1f} M trained)"
        device = jax.devices()[0]
        if step == config.train.steps:
            plan = f"all {step} steps are done"
        elif step:
            plan = f"continuing after step {step} of {config.train.steps}"
        else:
            plan = f"{config.train.steps} steps"
        if step < config.train.steps:
            plan += self.parts.changes.describe()
        distributed.say(
            f"{self.parts.start.config['model_type']}, {count / 1e6:,.1f} M parameters{part}, "
            f"{model.policy.compute_dtype} on {device.device_kind}; {self.describe_data()}, "
            f"{config.train.batch_size} a step; {plan}"
        )
        if left_out := self.describe_left_out():
            distributed.say(left_out)
        if not self.parts.held_out:
            distributed.say("nothing is held out (config.data.holdout=0): no evaluation")

    def train(
        self,
        step: int,
        state: TrainState,
        batches: BatchIterator,
        manager: CheckpointManager,
        monitor: Monitor,
        interrupt: distributed.Interrupt,
        check: Callable[[], None],
    ) -> TrainState:
        """Run all remaining steps, evaluations and checkpoints; stops early when interrupted."""
        train = self.config.train
        if step == 0 and not monitor.history:
            before = self._timed_evaluation(0, state) | self._timed_tasks(0, state)
            if before:
                self._keep(monitor, 0, before)
        while step < train.steps and not interrupt.agreed():
            check()
            manager.check()
            with self.profile.step(step + 1):
                state, metrics = self._timed_step(step, state, batches)
            step += 1
            failed = int(metrics["update/skipped_in_a_row"]) >= train.max_nonfinite_updates
            due = train.eval_every and step % train.eval_every == 0
            wanted = (due or step == train.steps) and not failed
            evaluation = self._timed_evaluation(step, state) if wanted else {}
            tasks = {} if failed else self._timed_tasks(step, state)
            self._keep(monitor, step, metrics | evaluation | tasks)
            if failed:
                raise RunError(
                    f"Stopped at step {step}: the gradients of the last "
                    f"{int(metrics['update/skipped_in_a_row'])} updates were not finite "
                    "(config.train.max_nonfinite_updates). The parameters were not changed by "
                    f"them; the last checkpoint is step {(manager.steps() or [None])[-1]}. Try a "
                    "smaller learning rate, or look at the data."
                )
            self._save(manager, monitor, step, state, batches, evaluation, last=step == train.steps)
        check()
        self._save(manager, monitor, step, state, batches, {}, last=True)
        return state

    def _keep(self, monitor: Monitor, step: int, metrics: Mapping[str, Any]) -> None:
        monitor.record(step, metrics)
        self.trackers.log(step, monitor.history[-1])

    def _timed_step(
        self, step: int, state: TrainState, batches: BatchIterator
    ) -> tuple[TrainState, dict[str, Any]]:
        begin = time.perf_counter()
        batch = self.place(next(batches), self.parts.training)
        tokens = _count_tokens(batch)
        loaded, compiled = time.perf_counter(), self.compilations.seconds
        with self.compilations.of(self.describe_step(step)):
            state, metrics = self.train_step(step, state, batch)
            metrics = jax.device_get(metrics)
        seconds = time.perf_counter() - begin
        if compiled := self.compilations.seconds - compiled:
            metrics["time/compile"] = compiled
        if peak := _peak_memory():
            metrics["memory/peak"] = peak
        return state, metrics | {
            "learning_rate": float(self.schedule(step)),
            "tokens_per_second": tokens / seconds,
            "time/data": loaded - begin,
            "time/step": seconds,
        }

    def _timed_evaluation(self, step: int, state: TrainState) -> dict[str, float]:
        if not self.parts.held_out:
            return {}
        begin = time.perf_counter()
        record = HeldOutRecord(
            self.parts.tokenizer, self.config.refine, self.parts.held_out.fingerprint
        )
        with self.compilations.of("the evaluation"):
            figures = self.evaluate(state, record)
        self.held_out_log.add(step, record)
        return figures | {"time/eval": time.perf_counter() - begin}

    def _timed_tasks(self, step: int, state: TrainState) -> dict[str, float]:
        train, tasks = self.config.train, self.parts.tasks
        every = train.evaluate_every
        due = step in (0, train.steps) or (every and step % every == 0)
        if tasks is None or not due:
            return {}
        begin = time.perf_counter()
        with self.compilations.of("what answers the tasks"):
            figures = tasks.measure(state.model_params)
        return figures | {"time/tasks": time.perf_counter() - begin}

    def _save(
        self,
        manager: CheckpointManager,
        monitor: Monitor,
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
        force = last or bool(best and metrics)
        if manager.is_due(step, force=force):
            monitor.flush()  # a step that can be continued from has the metrics up to it
        manager.save(
            step,
            dataclasses.replace(state, frozen=None),
            data_state=batches.get_state(),
            metrics=metrics if best and metrics else None,
            force=force,
        )

    def report(self, state: TrainState, history: list[dict]) -> dict:
        """Write plots, results.json and report.html, and print the closing table."""
        results = summarize(history)
        if self.parts.held_out:
            self.show_examples(state)
        if distributed.is_writer():
            clip_norm = self.config.optimizer.clip_norm
            write_report(self.workdir, history, results, clip_norm=clip_norm)
            write_run_page(self.workdir)
            for path in sorted(self.workdir.glob("*.png")):
                self.trackers.picture(self.config.train.steps, path.stem, path)
        distributed.say(f"\n{table(results)}\n\nPlots, figures and checkpoints: {self.workdir}")
        return results


def _peak_memory() -> int:
    """Bytes that the fullest device of this process has held at once; 0 where it does not say."""
    return max((d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices())


def _count_tokens(batch: Batch) -> int:
    """Count the tokens of the whole batch that are not padding."""
    if "segments" not in batch:
        return batch["tokens"].size
    count = np if isinstance(batch["segments"], np.ndarray) else jnp
    return int(count.count_nonzero(batch["segments"]))
