"""Checkpoints of training runs: steps, and what is beside them.

A run's folder (usually `WORKDIR/checkpoints`) looks like a model's (model.py):

    config.json  tokenizer.model ...     the model, as in a Hugging Face folder
    run.json  100/  200/ ...             the run's configuration, and a folder a saved step with
                                         state/ (arrays), data/ (the data iterator) and metrics/
    frozen/                              the parameters that the run does not train, if any

so that whatever reads a model (training, evaluation, conversion to PyTorch) takes both.
"""

import contextlib
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from refine_jax import distributed
from refine_jax.base.errors import CheckpointError
from refine_jax.base.files import given_path, is_there, parse_object, read_json, write_text
from refine_jax.checkpoint.arrays import (
    damaged,
    quiet_orbax,
    read_arrays,
    save_args,
    shorten,
    write_arrays,
)
from refine_jax.checkpoint.folders import CONFIG, FROZEN, copy_files
from refine_jax.checkpoint.steps import (
    DATA,
    FROZEN_FIX,
    STATE,
    StepNames,
    check_newest,
    check_room,
    digest,
    file_digests,
    find_best,
    find_steps,
    how_to_fix,
    read_run,
    read_step_metrics,
    remove_unfinished,
    write_run,
)
from refine_jax.checkpoint.tree import PyTree, flatten, plain_leaf, typed_leaf, unflatten


class Restored(NamedTuple):
    """What a run continues from."""

    step: int
    state: PyTree
    data_state: Any


class CheckpointManager(contextlib.AbstractContextManager):
    """Asynchronous, atomic checkpoints of a run. Use as a context manager, or call `close`.

    A step's folder appears under its number only when everything in it is written; what an
    interrupted save leaves behind has another name and is removed when the next manager opens the
    folder. One manager at a time may write to a folder; on several hosts each makes one. What is a
    step, and what else may be in the folder, says `refine_jax.checkpoint.steps`.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        save_every: int = 0,
        keep: int = 2,
        best_metric: str | None = None,
        best_mode: str = "min",
        last_step: int | None = None,
        config_json: str,
        run_config: Mapping[str, Any] | None = None,
        run_record: Mapping[str, Any] | None = None,
        files: Mapping[str, Path] | None = None,
    ):
        """Open or make a run's checkpoint folder.

        save_every: steps between checkpoints; 0: only where `save` is forced.
        keep: how many of the newest checkpoints to keep.
        best_metric: also keep the checkpoint with the best value of this metric ("min" or "max").
        last_step: the last one that will be saved; None: not known.
        config_json: text of the model's config.json. run_config: JSON values, for the record.
        run_record: more fields of run.json, JSON values.
        files: {name: path} of the tokenizer's files.

        Raises CheckpointError: the folder belongs to another model; its run.json or the figures of
        a step are damaged; or something else has the name of a step to come.
        """
        if best_mode not in ("min", "max"):
            raise ValueError(f"best_mode must be 'min' or 'max'. Got: best_mode={best_mode!r}.")
        self.directory = given_path(
            directory, "the folder of checkpoints", CheckpointError, write=True
        ).absolute()
        self._save_every = save_every
        self._best_metric, self._best_mode = best_metric, best_mode
        steps = find_steps(self.directory)
        check_room(self.directory, steps, last_step)
        for step in steps.saved:
            # Orbax would not say what is wrong with the figures.
            read_step_metrics(self.directory, step, steps.saved)
        if distributed.is_writer():
            self._write_description(
                config_json,
                {
                    "best_metric": best_metric,
                    "best_mode": best_mode,
                    "config": run_config,
                    **(run_record or {}),
                },
                files or {},
                steps.saved,
            )
            remove_unfinished(self.directory)
        self._failed = threading.Event()
        self._orbax = self._open(keep)
        self._linked = steps.linked
        distributed.check_same("checkpoints", str(self._known_steps()))
        self._digests = file_digests(self.directory)

    def _write_description(
        self, config_json: str, run: dict, files: Mapping[str, Path], steps: list[int]
    ) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        config = self.directory / CONFIG
        if config.exists() and read_json(config, CheckpointError) != json.loads(config_json):
            raise CheckpointError(
                f"{self.directory} holds checkpoints of another model (see its {CONFIG}). "
                "Choose another folder, or delete it."
            )
        if steps:
            read_run(self.directory, verify=True)
        copy_files(files, self.directory)
        write_run(self.directory, run)
        if not config.exists():
            write_text(config, config_json)

    def _open(self, keep: int | None) -> ocp.CheckpointManager:
        metric, mode = self._best_metric, self._best_mode

        def quality(metrics: Mapping[str, float]) -> float:
            best = find_best({0: metrics}, metric, mode)
            return (np.inf if mode == "min" else -np.inf) if best is None else metrics[metric]

        kept = [policies.LatestN(keep)]
        if metric:
            kept.append(
                policies.BestN(
                    get_metric_fn=quality,
                    reverse=mode == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        quiet_orbax()
        return ocp.CheckpointManager(
            epath.Path(self.directory),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                best_fn=quality if metric else None,
                best_mode=mode,
                step_name_format=StepNames(),
                async_options=ocp.AsyncOptions(
                    # Where creating folders fails, threads would wait for them for five minutes.
                    create_directories_asynchronously=False,
                    barrier_sync_fn=self._wait_for_others,
                ),
            ),
        )

    def _wait_for_others(self, *, key: str, timeout_ms: int) -> None:
        """Meet the other processes in the thread of a save.

        Orbax also comes here when the save has failed, where the others would not: not to wait for
        them lets the failure be seen now, not after `timeout_ms`.
        """
        failure = sys.exception()
        if failure is not None and threading.current_thread() is not threading.main_thread():
            self._failed.set()
            raise failure
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _known_steps(self) -> list[int]:
        return sorted({*self._orbax.all_steps(), *self._linked})

    def save(
        self,
        step: int,
        state: PyTree,
        data_state: Any = None,
        metrics: Mapping[str, float] | None = None,
        *,
        force: bool = False,
    ) -> bool:
        """Start to save if the step is due; returns whether a checkpoint of it now exists.

        The arrays are copied before this returns, so the caller may go on to donate them. Waits
        for the save before, and raises CheckpointError if that failed.

        state: pytree of jax or numpy arrays; typed random keys are stored as their data.
        data_state: JSON values. metrics: JSON numbers; the best metric counts if it is among them.
        force: save although `save_every` does not ask for it.
        """
        if step in self._known_steps():
            return True
        if not self.is_due(step, force=force):
            return False
        if is_there(self.directory / str(step)):
            raise CheckpointError(
                f"{self.directory / str(step)} is in the way of the checkpoint of step {step} and "
                "was not written by this run. Move it elsewhere: it is not overwritten."
            )
        arrays = {name: plain_leaf(leaf) for name, leaf in flatten(state).items()}
        # Copy the state through JSON now: Orbax serialises later, when the iterator has gone on.
        data = {DATA: json.loads(json.dumps(data_state))}
        digests = self._digests | {DATA: digest(data)}
        with self._reporting_failure():
            self._orbax.save(
                step,
                args=ocp.args.Composite(
                    **{STATE: save_args(arrays, digests), DATA: ocp.args.JsonSave(data)}
                ),
                metrics={name: float(value) for name, value in (metrics or {}).items()},
                force=True,
            )
        return True

    def is_due(self, step: int, *, force: bool = False) -> bool:
        """Tell whether `save` would save the step, unless it is there already."""
        return force or bool(self._save_every and step % self._save_every == 0)

    def steps(self) -> list[int]:
        """List the saved steps, ascending."""
        self.wait()
        return self._known_steps()

    def restore_latest(self, abstract_state: PyTree) -> Restored | None:
        """Read the newest checkpoint, or return None if there is none. See `restore`."""
        steps = self.steps()
        check_newest(self.directory, find_steps(self.directory))
        return self.restore(steps[-1], abstract_state) if steps else None

    def restore(self, step: int, abstract_state: PyTree) -> Restored:
        """Read the checkpoint of a step.

        abstract_state: the structure to fill; leaves are arrays or `jax.ShapeDtypeStruct` with the
            sharding that the result shall have (which may differ from the one saved). Leaves
            without a sharding go to the default device.

        Raises CheckpointError: no such step; it is corrupt; or it is not of this state.
        """
        steps = self.steps()
        if step not in steps:
            raise CheckpointError(f"{self.directory} has no step {step}. Got: steps {steps}.")
        folder = self.directory / str(step)
        fix = how_to_fix(folder, [s for s in steps if s != step])
        data = _read_data(folder / DATA, fix)
        digests = {self.directory / name: saved for name, saved in self._digests.items()}
        digests |= {folder / DATA: digest(data)}
        return Restored(step, _restore(folder / STATE, abstract_state, digests, fix), data[DATA])

    def save_frozen(self, params: PyTree) -> None:
        """Write the parameters that the run does not train, once, before its first step.

        Raises CheckpointError: something else has their name, or they could not be written.
        """
        folder = self.directory / FROZEN
        if is_there(folder) and not (folder / "_METADATA").is_file():
            raise CheckpointError(
                f"{folder} is in the way of the parameters that are not trained and was not "
                "written by this run. Move it elsewhere: it is not overwritten."
            )
        with self._reporting_failure():
            write_arrays(folder, flatten(params))

    def restore_frozen(self, abstract_params: PyTree) -> PyTree:
        """Read the parameters that the run does not train. See `restore`."""
        return _restore(self.directory / FROZEN, abstract_params, None, FROZEN_FIX)

    def check(self) -> None:
        """Raise CheckpointError if the save under way has failed; does not wait for it."""
        if self._failed.is_set():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way. Raises CheckpointError if it failed."""
        with self._reporting_failure():
            self._orbax.wait_until_finished()

    def close(self) -> None:
        """Wait for the save under way and release what the manager holds."""
        with self._reporting_failure():
            self._orbax.close()

    def __exit__(self, *_: Any) -> None:
        self.close()

    @contextlib.contextmanager
    def _reporting_failure(self) -> Iterator[None]:
        """Turn the errors of a save (disk full, no rights) into one clear CheckpointError."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # Orbax lets through whatever its drivers raise.
            raise CheckpointError(
                f"A checkpoint could not be saved in {self.directory} ({shorten(error)}). "
                "Those that were saved before are there. Make room, or see to the folder; the same "
                "command then continues the run."
            ) from error
        finally:
            self._failed.clear()


def _read_data(folder: Path, fix: str) -> dict[str, Any]:
    """Read what a step saved of the data iterator, under the name `DATA`."""
    try:
        data = parse_object((folder / "metadata").read_bytes(), "metadata", CheckpointError)
        if DATA not in data:
            raise CheckpointError(f"metadata has no field {DATA}")
        return data
    except (OSError, CheckpointError) as error:
        raise damaged(folder, error, fix) from None


def _restore(
    folder: epath.PathLike, abstract: PyTree, digests: Mapping[str, Any] | None, fix: str
) -> PyTree:
    """Read arrays as leaves like `abstract`, in its dtypes; see `CheckpointManager.restore`."""
    named = flatten(abstract)
    placed = {name: _placed(plain_leaf(leaf)) for name, leaf in named.items()}
    arrays = read_arrays(folder, placed, digests=digests, fix=fix)
    for name, leaf in named.items():
        want = plain_leaf(leaf).dtype
        if arrays[name].dtype != want:
            raise CheckpointError(
                f"{folder}: {name} was saved as {arrays[name].dtype}, but the configuration asks "
                f"for {want}."
            )
        arrays[name] = typed_leaf(arrays[name], leaf)
    return unflatten(abstract, arrays)


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """Give the abstract leaf a sharding: its own, or the default device."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)
