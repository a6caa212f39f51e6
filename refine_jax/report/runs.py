"""What the folder of a run holds, read for the page about it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refine_jax.base.errors import DataError
from refine_jax.base.files import read_json, read_lines
from refine_jax.checkpoint.folders import CHECKPOINTS, RUN
from refine_jax.checkpoint.steps import read_config
from refine_jax.config import SECTIONS
from refine_jax.evaluation import runner
from refine_jax.report.held_out import HELD_OUT_FILE, read_held_out
from refine_jax.report.metrics import METRICS_FILE, step_parser, summarize


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of any phase, finished or not.

    name: of its folder. config: {section: {field: value}} and its phase, as far as the run wrote
    it down. history: records of metrics.jsonl. held_out: of held_out.jsonl. predictions: of
    predictions.jsonl; a run has these or a history.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    history: Sequence[dict[str, Any]] = ()
    held_out: Sequence[dict[str, Any]] = ()
    predictions: Sequence[dict[str, Any]] = ()

    @property
    def trains(self) -> bool:
        """Whether the run is one of training."""
        return not self.predictions

    @property
    def phase(self) -> str:
        """The phase, as far as it is known."""
        return str(self.config.get("phase", "training" if self.trains else "evaluation"))

    def setting(self, section: str, field: str, default: Any = None) -> Any:
        """Look up the value of a setting; `default` where the run did not write it down."""
        return (self.config.get(section) or {}).get(field, default)

    def figures(self) -> dict[str, Any]:
        """Compute the figures of a training run (`metrics.summarize`)."""
        return summarize(list(self.history))


def read_run(folder: Path) -> Run:
    """Read what a folder holds of a run, also of one that goes on.

    Raises:
      DataError: The folder holds no records of a run.
      CheckpointError: Its run.json is damaged.
    """
    name = folder.absolute().name
    predictions = folder / runner.PREDICTIONS
    if predictions.exists():
        records, _ = read_lines(predictions, runner.record_parser(runner.FIELDS))
        if records:
            kept = folder / runner.RECORD
            config = read_json(kept, DataError) if kept.exists() else {}
            return Run(name, folder, config, predictions=records)
    metrics = folder / METRICS_FILE
    history = read_lines(metrics, step_parser())[0] if metrics.exists() else []
    if not history:
        files = f"{METRICS_FILE} or {runner.PREDICTIONS}"
        raise DataError(f"{folder} holds no records of a run, in {files}.")
    config = read_config(folder / CHECKPOINTS) if (folder / CHECKPOINTS / RUN).exists() else {}
    return Run(name, folder, config, history, read_held_out(folder / HELD_OUT_FILE))


def parts_of(folder: Path) -> list[Path]:
    """The folders of a comparison's runs, the oldest first; none where it is a run's own folder."""
    names = (METRICS_FILE, runner.PREDICTIONS)
    if any((folder / name).exists() for name in names):
        return []
    records = [path for name in names for path in folder.glob(f"*/{name}")]
    return [path.parent for path in sorted(records, key=lambda path: path.stat().st_ctime)]


def named_apart(runs: Sequence[Run]) -> list[Run]:
    """Name runs by more of their paths where folders have one name."""
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run
        for run in runs
    ]


def changed_settings(config: Mapping[str, Any]) -> dict[str, tuple[Any, Any, str]]:
    """Find settings that differ from defaults: {section.field: (value, default, meaning)}."""
    changed = {}
    for name, section in SECTIONS.items():
        values = config.get(name)
        for field in dataclasses.fields(section) if isinstance(values, Mapping) else ():
            value = values.get(field.name, field.default)
            if _plain(value) != _plain(field.default):
                changed[f"{name}.{field.name}"] = (value, field.default, field.metadata["doc"])
    return changed


def _plain(value: Any) -> Any:
    """Make a value as JSON keeps it, so that a tuple and a list of one content are equal."""
    return json.loads(json.dumps(value, default=str))
