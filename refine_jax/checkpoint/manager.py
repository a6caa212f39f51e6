"""Checkpoints of training runs, and of models alone.

A run's folder (usually `WORKDIR/checkpoints`) and a model's folder look alike:

    config.json  tokenizer.model ...     the model, as in a Hugging Face folder
    params/                              a model: its parameters
    run.json  100/  200/ ...             a run: its configuration, and a folder a saved step with
                                         state/ (arrays), data/ (the data iterator) and metrics/

so that whatever reads a model (training, evaluation, conversion to PyTorch) takes both.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from refine_jax import distributed
from refine_jax.base.errors import CheckpointError
from refine_jax.base.files import parse_object, read_json, read_text, write_text
from refine_jax.checkpoint.arrays import damaged, read_arrays, save_args, write_arrays
from refine_jax.checkpoint.expected import abstract_params
from refine_jax.checkpoint.folders import (
    CONFIG,
    RUN,
    companions,
    copy_files,
    has_tokenizer,
    new_folder,
)
from refine_jax.checkpoint.tree import (
    PyTree,
    flatten,
    nest,
    plain_leaf,
    typed_leaf,
    unflatten,
)

_PARAMS = "params"
_STATE, _DATA = "state", "data"


class Restored(NamedTuple):
    """What a run continues from."""

    step: int
    state: PyTree
    data_state: Any


class ModelCheckpoint(NamedTuple):
    """A model from a checkpoint.

    config: the fields of config.json. params: nested dict of arrays. tokenizer: the folder of the
    tokenizer files, None if the checkpoint has none. config_json: the text of config.json.
    files: the files that travel with the weights, {name: path}. step: None unless from a run.
    """

    config: dict
    params: dict
    tokenizer: epath.Path | None
    config_json: str
    files: dict
    step: int | None


class CheckpointManager:
    """Asynchronous, atomic checkpoints of a run. Use as a context manager, or call `close`.

    A step's folder appears under its number only when everything in it is written; what an
    interrupted save leaves behind has another name and is removed when the next manager opens the
    folder. One manager at a time may write to a folder; on several hosts each makes one.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        save_every: int = 0,
        keep: int = 2,
        best_metric: str | None = None,
        best_mode: str = "min",
        config_json: str,
        run_config: Mapping[str, Any] | None = None,
        run_record: Mapping[str, Any] | None = None,
        files: Mapping[str, Path] | None = None,
    ):
        """Open or make a run's checkpoint folder.

        save_every: steps between checkpoints; 0: only where `save` is forced.
        keep: how many of the newest checkpoints to keep.
        best_metric: also keep the checkpoint with the best value of this metric ("min" or "max").
        config_json: text of the model's config.json. run_config: JSON values, for the record.
        run_record: more fields of run.json, JSON values.
        files: {name: path} of the tokenizer's files.

        Raises:
          CheckpointError: The folder belongs to another model.
        """
        self.directory = epath.Path(directory).expanduser().resolve()
        self._save_every = save_every
        self._best_metric, self._best_mode = best_metric, best_mode
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
            )
        self._orbax = _open(
            self.directory, keep=keep, best_metric=best_metric, best_mode=best_mode, write=True
        )
        distributed.check_same("checkpoints", str(sorted(self._orbax.all_steps())))

    def _write_description(self, config_json: str, run: dict, files: Mapping[str, Path]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        config = self.directory / CONFIG
        if config.exists() and read_json(config, CheckpointError) != json.loads(config_json):
            raise CheckpointError(
                f"{self.directory} holds checkpoints of another model (see its {CONFIG}). "
                "Choose another folder, or delete it."
            )
        copy_files(files, self.directory)
        write_text(self.directory / RUN, json.dumps(run, indent=2) + "\n")
        if not config.exists():
            write_text(config, config_json)

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
        if step in self._orbax.all_steps():
            return True
        if not (force or (self._save_every and step % self._save_every == 0)):
            return False
        arrays = {name: plain_leaf(leaf) for name, leaf in flatten(state).items()}
        # Through JSON now: Orbax serialises later, when the iterator has gone on.
        data = {_DATA: json.loads(json.dumps(data_state))}
        with self._reporting_failure():
            self._orbax.save(
                step,
                args=ocp.args.Composite(
                    **{_STATE: save_args(arrays), _DATA: ocp.args.JsonSave(data)}
                ),
                metrics={name: float(value) for name, value in (metrics or {}).items()},
                force=True,
            )
        return True

    def steps(self) -> list[int]:
        """Saved steps, ascending."""
        self.wait()
        return sorted(self._orbax.all_steps())

    def best_step(self) -> int | None:
        """The step with the best metric; None if none was saved with it."""
        self.wait()
        return _best_step(self._orbax, self._best_metric, self._best_mode)

    def restore_latest(self, abstract_state: PyTree) -> Restored | None:
        """The newest checkpoint, or None if there is none. See `restore`."""
        steps = self.steps()
        return self.restore(steps[-1], abstract_state) if steps else None

    def restore(self, step: int, abstract_state: PyTree) -> Restored:
        """Read the checkpoint of a step.

        abstract_state: the structure to fill; leaves are arrays or `jax.ShapeDtypeStruct` with the
            sharding that the result shall have (which may differ from the one saved). Leaves
            without a sharding go to the default device.

        Raises:
          CheckpointError: No such step; it is corrupt; or it is not of this state.
        """
        steps = self.steps()
        if step not in steps:
            raise CheckpointError(f"{self.directory} has no step {step}. Got: steps {steps}.")
        folder = self.directory / str(step)
        fix = _how_to_fix(folder, [s for s in steps if s != step])
        abstract = flatten(abstract_state)
        arrays = read_arrays(
            folder / _STATE,
            {name: _placed(plain_leaf(leaf)) for name, leaf in abstract.items()},
            fix=fix,
        )
        for name, leaf in abstract.items():
            want = plain_leaf(leaf).dtype
            if arrays[name].dtype != want:
                raise CheckpointError(
                    f"{folder}: {name} was saved as {arrays[name].dtype}, but the configuration "
                    f"asks for {want}."
                )
            arrays[name] = typed_leaf(arrays[name], leaf)
        try:
            data = self._orbax.restore(
                step, args=ocp.args.Composite(**{_DATA: ocp.args.JsonRestore()})
            )[_DATA][_DATA]
        except Exception as error:  # Orbax lets through whatever its parsers raise.
            raise damaged(folder / _DATA, error, fix) from None
        return Restored(step, unflatten(abstract_state, arrays), data)

    def wait(self) -> None:
        """Wait for the save under way. Raises CheckpointError if it failed."""
        with self._reporting_failure():
            self._orbax.wait_until_finished()

    def close(self) -> None:
        """Wait for the save under way and release what the manager holds."""
        with self._reporting_failure():
            self._orbax.close()

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @contextlib.contextmanager
    def _reporting_failure(self) -> Iterator[None]:
        """Turn the errors of a save (disk full, no rights) into one clear CheckpointError."""
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"A checkpoint could not be saved in {self.directory} "
                f"({type(error).__name__}: {error})."
            ) from error


def save_model(
    path: epath.PathLike,
    params: dict,
    config_json: str,
    files: Mapping[str, Path] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a model's folder: `params`, the text of its config.json, and {name: path} of files.

    The folder appears when it is complete. One process, local disk.
    Raises CheckpointError if it exists (with `overwrite`: if it is no checkpoint).
    """
    with new_folder(path, overwrite=overwrite) as folder:
        write_arrays(folder / _PARAMS, flatten(params))
        copy_files(files or {}, folder)
        write_text(folder / CONFIG, config_json)


def load_model(
    path: epath.PathLike,
    *,
    step: int | str = "latest",
    shardings: PyTree | None = None,
    dtype: Any = None,
) -> ModelCheckpoint:
    """Read a model from its folder or from a training run's.

    path: written by `save_model` or CheckpointManager, or a work folder with `checkpoints` in it.
    step: of a run: "latest", "best" (by the run's best metric) or a number.
    shardings: like the params, where to put them; None gives numpy arrays.
    dtype: cast the parameters; None keeps those of the file.

    Raises:
      CheckpointError: Not a checkpoint, a corrupt one, or one whose arrays are not those of its
        config.json.
    """
    folder = epath.Path(path).expanduser().resolve()
    if (folder / "checkpoints" / CONFIG).exists():
        folder = folder / "checkpoints"
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"{path} is not a checkpoint: it has no {CONFIG}.")
    config_json = read_text(folder / CONFIG, CheckpointError)
    config = parse_object(config_json, folder / CONFIG, CheckpointError)
    if (folder / _PARAMS).exists():
        step, source, part = None, folder / _PARAMS, ""
        fix = "Convert or copy it again."
    elif (folder / RUN).exists():
        step, others = _choose_step(folder, step)
        source, part = folder / str(step) / _STATE, f"{_PARAMS}."
        fix = _how_to_fix(folder / str(step), others)
    else:
        raise CheckpointError(
            f"{path} is not a checkpoint of this package: it has no {_PARAMS} and no {RUN}. A "
            "Hugging Face folder is converted by `python -m refine_jax.convert from_hf SRC DST`."
        )
    abstract = abstract_params(config)
    placed = flatten(shardings) if shardings is not None else dict.fromkeys(abstract)
    arrays = read_arrays(
        source,
        {
            part + name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[name])
            for name, leaf in abstract.items()
        },
        part=part,
        fix=fix,
    )
    params = nest({name.removeprefix(part): leaf for name, leaf in arrays.items()})
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)
    tokenizer = folder if has_tokenizer(folder) else None
    return ModelCheckpoint(config, params, tokenizer, config_json, companions(folder), step)


def _open(
    directory: epath.Path,
    *,
    keep: int | None,
    best_metric: str | None,
    best_mode: str,
    write: bool,
) -> ocp.CheckpointManager:
    if best_mode not in ("min", "max"):
        raise ValueError(f"best_mode must be 'min' or 'max'. Got: best_mode={best_mode!r}.")

    def quality(metrics: Mapping[str, float]) -> float:
        value = _value(metrics, best_metric)
        return (math.inf if best_mode == "min" else -math.inf) if value is None else value

    kept = [policies.LatestN(keep)]
    if best_metric:
        kept.append(
            policies.BestN(
                get_metric_fn=quality,
                reverse=best_mode == "min",
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        best_fn=quality if best_metric else None,
        best_mode=best_mode,
        create=write,
        cleanup_tmp_directories=write,
    )
    try:
        return ocp.CheckpointManager(directory, options=options)
    except ValueError as error:  # Orbax reads the metrics of all steps.
        step = _step_with_bad_metrics(directory)
        if step is None:
            raise
        raise damaged(step, error, f"Delete {step}.") from None


def _step_with_bad_metrics(directory: epath.Path) -> epath.Path | None:
    for path in directory.glob("*/metrics/metrics"):
        try:
            read_json(path, CheckpointError)
        except CheckpointError:
            return path.parent.parent
    return None


def _value(metrics: Mapping[str, float] | None, name: str | None) -> float | None:
    """A metric that was saved and is a number."""
    value = (metrics or {}).get(name)
    return None if value is None or math.isnan(value) else value


def _best_step(manager: ocp.CheckpointManager, metric: str | None, mode: str) -> int | None:
    if metric is None:
        return None
    values = {step: _value(manager.metrics(step), metric) for step in manager.all_steps()}
    known = {step: value for step, value in values.items() if value is not None}
    return (min if mode == "min" else max)(known, key=known.get, default=None)


def _choose_step(folder: epath.Path, step: int | str) -> tuple[int, list[int]]:
    """The step to read and the other ones there are."""
    run = read_json(folder / RUN, CheckpointError)
    metric, mode = run.get("best_metric"), run.get("best_mode", "min")
    manager = _open(folder, keep=None, best_metric=metric, best_mode=mode, write=False)
    steps, best = sorted(manager.all_steps()), _best_step(manager, metric, mode)
    manager.close()
    if not steps:
        raise CheckpointError(f"{folder} holds no finished checkpoint.")
    if step == "best" and best is None:
        raise CheckpointError(f"{folder} has no best step: no checkpoint was saved with a metric.")
    chosen = {"latest": steps[-1], "best": best}.get(step, step)
    if chosen not in steps:
        raise CheckpointError(f"{folder} has no step {step}. Got: steps {steps}.")
    return chosen, [other for other in steps if other != chosen]


def _how_to_fix(folder: epath.Path, others: list[int]) -> str:
    if not others:
        return f"Delete {folder} to start over; there is no other step."
    return f"Delete {folder} to continue from step {others[-1]}, or choose one of {others}."


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """The abstract leaf with a sharding: its own, or the default device."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)
