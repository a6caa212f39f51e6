"""Trackers that a run reports to: TensorBoard, Weights & Biases, MLflow, Trackio.

Each works in a thread of its own, from a queue: training never waits for one, and one that fails
is told of once and left. `WORKDIR/trackers.json` keeps the names of the run in each of them, so
that a run that is continued goes on in the same place. None of them writes to a bucket: there they
write to a temporary folder of this machine, which is copied every minute and at the end.
"""

import contextlib
import functools
import importlib.util
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from refine_jax.base.errors import ConfigError
from refine_jax.base.files import path_of, read_json, write_text
from refine_jax.base.growing import Mirror

TRACKERS_FILE = "trackers.json"
_DATABASE = "mlflow.db"
UPLOAD = 60.0
"""Seconds between two times that what trackers wrote is copied to the bucket of the run."""
PATIENCE = 60.0
"""Seconds that the end of a run waits for a tracker to send what it holds."""

Ids = dict[str, str]


class Tracker(Protocol):
    """One run in one tracker. All methods may be slow and may raise anything."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Keep the figures of a step."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Keep a PNG file."""

    def close(self) -> None:
        """Send what is left, and say that the run has ended."""


class TensorBoard:
    """Event files in `WORKDIR/tensorboard`: figures alone, the writer knows nothing else."""

    def __init__(self, workdir: Path, project: str, ids: Ids, config: Mapping[str, Any]):
        from tensorboard.summary import Writer

        self._writer = Writer(str(workdir / "tensorboard"))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a step."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Leave a picture where it is."""

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases; its own variables (WANDB_MODE, ...) say where it is kept."""

    def __init__(self, workdir: Path, project: str, ids: Ids, config: Mapping[str, Any]):
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            name=workdir.name,
            id=ids.setdefault("wandb", secrets.token_hex(8)),
            resume="allow",
            dir=str(workdir),
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Steps that a run repeats after an interruption would be refused as its own steps.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures of a step."""
        self._run.log({"step": step, **figures})

    def picture(self, step: int, name: str, path: Path) -> None:
        """Send a picture."""
        self._run.log({"step": step, name: self._wandb.Image(str(path))})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class MLflow:
    """A run of MLflow: of MLFLOW_TRACKING_URI, else in `WORKDIR/mlflow.db`."""

    def __init__(self, workdir: Path, project: str, ids: Ids, config: Mapping[str, Any]):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        place: dict[str, Any] = {}
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = f"sqlite:///{workdir / _DATABASE}"
            place["artifact_location"] = (workdir / "mlflow").as_uri()
        self._client, self._metric = MlflowClient(tracking_uri=uri), Metric
        if "mlflow" in ids:
            self._client.update_run(ids["mlflow"], status="RUNNING")
        else:
            experiment = self._client.get_experiment_by_name(project)
            number = (
                experiment.experiment_id
                if experiment
                else self._client.create_experiment(project, **place)
            )
            run = self._client.create_run(number, run_name=workdir.name)
            ids["mlflow"] = run.info.run_id
            settings = [Param(name, str(value)[:6000]) for name, value in flat(config).items()]
            for first in range(0, len(settings), 100):  # the most that one request may hold
                self._client.log_batch(ids["mlflow"], params=settings[first : first + 100])
        self._run = ids["mlflow"]

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures of a step."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Send a picture, as an artifact."""
        self._client.log_artifact(self._run, str(path))

    def close(self) -> None:
        """Say that the run has ended."""
        self._client.set_terminated(self._run)


class Trackio:
    """A run of Trackio; its own variables (TRACKIO_DIR, TRACKIO_SPACE_ID, ...) say where."""

    def __init__(self, workdir: Path, project: str, ids: Ids, config: Mapping[str, Any]):
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            project=project,
            name=ids.setdefault("trackio", f"{workdir.name}-{secrets.token_hex(3)}"),
            config=flat(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures of a step."""
        self._run.log(dict(figures), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Send a picture."""
        self._run.log({name: self._trackio.Image(path)}, step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


KINDS: dict[str, Callable[..., Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}
"""By their names, which are those of their packages and of our extras."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed.

    Raises ConfigError: which, and how to install it.
    """
    for name in names:
        if name not in KINDS:
            raise ConfigError(
                f"config.train.trackers knows {', '.join(KINDS)}, joined by commas. Got: {name!r}."
            )
        if not _is_installed(name):
            raise ConfigError(
                f"config.train.trackers={name!r} needs the package {name}, which is not installed: "
                f"pip install 'refine-jax[{name}]'."
            )


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


class Trackers(contextlib.AbstractContextManager):
    """The trackers of a run, each in a thread.

    workdir: existing folder, whose name is that of the run. names: of `KINDS`; None: TensorBoard
    where it is installed. config: settings, as nested mappings of JSON values. say: prints a line
    where a tracker fails. write: whether this process reports; with False all of this does nothing.
    """

    def __init__(
        self,
        workdir: Path,
        names: Sequence[str] | None,
        *,
        project: str,
        config: Mapping[str, Any],
        say: Callable[[str], None],
        write: bool = True,
    ):
        if names is None:
            names = [name for name in ("tensorboard",) if _is_installed(name)]
        self._workers: list[_Worker] = []
        self._mirror: Mirror | None = None
        if not write or not names:
            return
        workdir = path_of(workdir)
        path = workdir / TRACKERS_FILE
        self._mirror = Mirror(workdir)
        self._mirror.fetch(_DATABASE)
        self._next = time.monotonic() + UPLOAD
        ids: Ids = read_json(path, ConfigError) if path.exists() else {}
        lock = threading.Lock()

        def start(kind: Callable[..., Tracker]) -> Tracker:
            own = dict(ids)
            tracker = kind(self._mirror.path, project, own, config)
            with lock:
                if own.items() - ids.items():
                    ids.update(own)
                    write_text(path, json.dumps(ids, indent=2) + "\n")
            return tracker

        self._workers = [
            _Worker(name, functools.partial(start, KINDS[name]), say) for name in names
        ]

    def log(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Report the figures of a step; None, which is no number, is left out."""
        known = {n: value for n, value in figures.items() if value is not None and n != "step"}
        for worker in self._workers:
            worker.put(lambda tracker: tracker.log(step, known))
        if self._workers and time.monotonic() > self._next:
            self._next = time.monotonic() + UPLOAD
            self._workers[0].put(lambda _: self._mirror.upload())

    def picture(self, step: int, name: str, path: Path) -> None:
        """Report a PNG file, which has to stay."""
        if self._workers:
            path = self._mirror.fetch(path.name)
        for worker in self._workers:
            worker.put(lambda tracker: tracker.picture(step, name, path))

    def close(self) -> None:
        """Wait until all is sent, for `PATIENCE` seconds at most."""
        until = time.monotonic() + PATIENCE
        for worker in self._workers:
            worker.put(None)
        for worker in self._workers:
            worker.join(until - time.monotonic())
        if self._mirror is not None:
            self._mirror.close()

    def __exit__(self, *exception) -> None:
        self.close()


class _Worker:
    """One tracker in its thread: started there, and fed from a queue until None."""

    def __init__(self, name: str, start: Callable[[], Tracker], say: Callable[[str], None]):
        self._name, self._start, self._say = name, start, say
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._failed = False
        # A daemon: one that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, work: Callable[[Tracker], None] | None) -> None:
        if not self._failed:
            self._queue.put(work)

    def join(self, seconds: float) -> None:
        self._thread.join(max(seconds, 0.0))
        if self._thread.is_alive():
            self._say(
                f"{self._name} has not taken the metrics within {PATIENCE:.0f} s of the end: the "
                "run does not wait for it. All of them are in metrics.jsonl."
            )

    def _run(self) -> None:
        try:
            tracker = self._start()
            while (work := self._queue.get()) is not None:
                work(tracker)
            tracker.close()
        except BaseException as error:  # some packages raise SystemExit where they are not set up
            self._failed = True
            reason = " ".join(str(error).split()) or type(error).__name__
            self._say(
                f"{self._name} failed and gets no more of this run, which goes on: {reason[:300]}"
            )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: {"train.steps": 100}."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        result |= flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return result
