"""What a run's checkpoint folder holds: the saved steps, and beside them run.json with digests.

A step is a folder that has the number of the step as its name and the marks of a finished save in
it. On a disk a folder gets its name when it is complete. In a bucket, where nothing is renamed, the
time at which it was finished is written last, into Orbax's `_CHECKPOINT_METADATA`. Whatever else
people keep there is left alone: nothing that a run did not write is deleted.

Arrays have fingerprints; the files beside them decide as much. A step is saved with the digests of
what it depends on: the model's config.json, its tokenizer, the place in the data. `run.json` is
rewritten at every start of the run, with the settings of then, so that its digest is in it.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from orbax.checkpoint.path import step as orbax_steps

from refine_jax.base.errors import CheckpointError
from refine_jax.base.files import (
    json_field,
    kind_of,
    parse_json,
    path_of,
    read_json,
    short,
    write_text,
)
from refine_jax.base.remote import RemotePath
from refine_jax.checkpoint.arrays import damaged
from refine_jax.checkpoint.folders import CONFIG, RUN, TOKENIZERS

STATE, DATA, METRICS = "state", "data", "metrics"
_DIGEST = "digest"
FROZEN_FIX = "Put it back from a copy: the run has no other of the parameters it does not train."
_FINISHED = "_CHECKPOINT_METADATA"  # Orbax's, written last
_COMMITTED = "commit_success.txt"  # Orbax's, in buckets, beside it
_NUMBER = re.compile(r"(?:0|[1-9][0-9]{0,17})")  # ASCII digits, as a run writes them
_UNFINISHED = re.compile(_NUMBER.pattern + r"\.orbax-checkpoint-tmp(?:-[0-9]+)?")


class Steps(NamedTuple):
    """What in a checkpoint folder has the number of a step as its name; each ascending.

    saved: finished checkpoints, links to such among them. linked: those of them that are links.
    broken: of a checkpoint only a part is there, or it cannot be read. other: anything else.
    """

    saved: list[int]
    linked: list[int]
    broken: list[int]
    other: list[int]


def find_steps(folder: str | os.PathLike) -> Steps:
    """Find the steps in a checkpoint folder; none if there is no such folder."""
    steps = Steps([], [], [], [])
    folder = path_of(folder)
    try:
        numbers = sorted(int(p.name) for p in folder.iterdir() if _NUMBER.fullmatch(p.name))
    except (FileNotFoundError, NotADirectoryError):
        return steps
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}.") from None
    for number in numbers:
        path = folder / str(number)
        try:
            names = {entry.name for entry in path.iterdir()}
        except (FileNotFoundError, NotADirectoryError):  # deleted just now; a file; a link to none
            steps.other.append(number)
        except OSError:
            steps.broken.append(number)
        else:
            if isinstance(path, RemotePath) and _is_unfinished(path, names):
                continue
            if names >= {_FINISHED, STATE, DATA}:
                steps.saved.append(number)
                if path.is_symlink():
                    steps.linked.append(number)
            elif not names or names & {_FINISHED, STATE, DATA, METRICS}:
                steps.broken.append(number)
            else:
                steps.other.append(number)
    return steps


def check_newest(folder: str | os.PathLike, steps: Steps) -> None:
    """Raise CheckpointError if what would be the newest step is broken: an older one is no answer.

    A copy that was cut short and a folder that cannot be read look like this.
    """
    newest = max(steps.saved, default=-1)
    for number in reversed(steps.broken):
        if number > newest:
            path = path_of(folder) / str(number)
            raise damaged(path, _why_broken(path), how_to_fix(path, steps.saved))


def check_room(folder: str | os.PathLike, steps: Steps, last: int | None) -> None:
    """Raise CheckpointError if something that is no checkpoint has the name of a step to come.

    last: the last step that the run will save; None: any.
    """
    newest = max(steps.saved, default=-1)
    for number in steps.other:
        if newest < number and (last is None or number <= last):
            raise CheckpointError(
                f"{path_of(folder) / str(number)} is no checkpoint of this run but has the name of "
                "one that the run will save. Move it elsewhere: it is not overwritten."
            )


def _why_broken(path: Path) -> str | OSError:
    try:
        missing = [name for name in (STATE, DATA, _FINISHED) if not (path / name).exists()]
        list(path.iterdir())
    except OSError as error:
        return error
    return f"it has no {', '.join(missing)}"


def how_to_fix(folder: str | os.PathLike, others: list[int]) -> str:
    """Say what to do about a damaged step, given the other ones."""
    if not others:
        return f"Delete {folder} to start over; there is no other step."
    return f"Delete {folder} to continue from step {others[-1]}, or choose one of {others}."


def _is_unfinished(path: RemotePath, names: set[str]) -> bool:
    """Tell whether a save that was interrupted has left a step's folder in a bucket.

    names: of what is in it. Raises nothing: what cannot be read is none.
    """
    if not names or not names <= {_FINISHED, _COMMITTED, STATE, DATA, METRICS}:
        return False
    if _FINISHED not in names:
        return True
    with contextlib.suppress(OSError, CheckpointError):
        fields = read_json(path / _FINISHED, CheckpointError)
        return fields.get("commit_timestamp_nsecs") is None
    return False


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Delete what saves that were interrupted have left; only folders of the names Orbax uses."""
    folder = path_of(folder)
    if isinstance(folder, RemotePath):
        for path in list(folder.iterdir()):
            if _NUMBER.fullmatch(path.name):
                names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
                if _is_unfinished(path, names):
                    path.rmtree()
        return
    with os.scandir(folder) as entries:
        left = [
            entry.path
            for entry in entries
            if _UNFINISHED.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]
    for path in left:
        shutil.rmtree(path)


class StepNames(orbax_steps.NameFormat):
    """Shows Orbax the folders that the run wrote, and no others: it deletes what it knows of."""

    def build_name(self, step: int) -> str:
        """Name a step's folder."""
        return str(step)

    def find_all(self, base_path: Any) -> Iterator[orbax_steps.Metadata]:
        """Find the finished steps that are no links."""
        steps = find_steps(base_path)
        for step in steps.saved:
            if step not in steps.linked:
                yield self.find_step(base_path, step)

    def find_step(self, base_path: Any, step: int) -> orbax_steps.Metadata:
        """Describe a step, which is there."""
        return orbax_steps.Metadata(
            step=step, path=orbax_steps.build_step_path(base_path, self, step)
        )


def read_step_metrics(folder: str | os.PathLike, step: int, others: list[int]) -> dict[str, float]:
    """Read the figures that a step was saved with, by name; none if it has none. Some may be NaN.

    Raises CheckpointError if they are damaged.
    """
    path = path_of(folder) / str(step)
    file = path / METRICS / METRICS
    try:
        if not (path / METRICS).exists():
            return {}
        figures = parse_json(file.read_bytes(), file.name, CheckpointError, strict=False)
        if not isinstance(figures, dict):
            raise CheckpointError(f"{file.name} must hold an object. Got: {kind_of(figures)}")
        for name, value in figures.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise CheckpointError(f"{file.name}: {name} must be a number. Got: {short(value)}")
        return {name: float(value) for name, value in figures.items()}
    except (OSError, OverflowError, CheckpointError) as error:
        raise damaged(path, error, how_to_fix(path, [s for s in others if s != step])) from None


def find_best(figures: Mapping[int, Mapping[str, float]], name: str | None, mode: str):
    """Find the step whose figure `name` is best ("min" or "max"); None where no step has it."""
    known = {
        step: values[name]
        for step, values in figures.items()
        if name in values and not math.isnan(values[name])
    }
    return (min if mode == "min" else max)(known, key=known.get, default=None)


class RunRecord(NamedTuple):
    """What run.json says.

    best_metric, best_mode: which checkpoint is best ("min" or "max" of a figure; None: none is).
    config: the configuration of the run. lora: rank, alpha and targets of its low-rank updates;
    None: there are none.
    """

    best_metric: str | None
    best_mode: str
    config: dict[str, Any]
    lora: dict[str, Any] | None = None


def write_run(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write run.json: JSON values, and their digest."""
    fields = json.loads(json.dumps(fields))
    text = json.dumps({_DIGEST: digest(fields)} | fields, indent=2) + "\n"
    write_text(path_of(folder) / RUN, text)


def read_run(folder: Path, *, verify: bool = False) -> RunRecord:
    """Read run.json; every field of the right type.

    verify: also compare its digest. Versions before had none.

    Raises CheckpointError: it is missing, damaged, or (`verify`) not as it was written.
    """
    path = path_of(folder) / RUN
    fields = read_json(path, CheckpointError)

    def get(name: str, kind: type, default: Any = None) -> Any:
        return json_field(fields, name, kind, where=path, error=CheckpointError, default=default)

    mode = get("best_mode", str, "min")
    if mode not in ("min", "max"):
        raise CheckpointError(f"{path}: best_mode must be 'min' or 'max'. Got: {short(mode)}.")
    written = get(_DIGEST, str)
    if verify and written not in (None, digest({k: fields[k] for k in fields if k != _DIGEST})):
        raise CheckpointError(
            f"{path} is not as the run wrote it: it was changed or damaged. Put it back from a "
            f'copy; if what it says is right, remove the line "{_DIGEST}" in it.'
        )
    return RunRecord(get("best_metric", str), mode, get("config", dict, {}), get("lora", dict))


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration in run.json, {section: {field: value}}, and its phase.

    Raises CheckpointError as `read_run` does, also where run.json is not as it was written, and for
    a section that is no object.
    """
    config = read_run(folder, verify=True).config
    for section, values in config.items():
        wanted = str if section == "phase" else dict
        if not isinstance(values, wanted):
            raise CheckpointError(
                f"{path_of(folder) / RUN}: config.{section} must be {kind_of(wanted())}. "
                f"Got: {short(values)}."
            )
    return config


def digest(value: Any) -> str:
    """Compute a digest of a JSON value: the same however the value is written down."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_digests(folder: Path) -> dict[str, str | None]:
    """Compute digests of the model's description in a folder, by file; None where absent."""
    digests: dict[str, str | None] = {CONFIG: digest(read_json(folder / CONFIG, CheckpointError))}
    for name in TOKENIZERS:
        path = path_of(folder) / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            digests[name] = None
            continue
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}.") from None
        digests[name] = hashlib.blake2b(content, digest_size=16).hexdigest()
    return digests
