"""Continuing a run under another configuration: what may change, how, and what is kept of it.

| may change | settings |
|---|---|
| freely | where things are computed, how often they are reported (`_FREELY`); what the phase does
not use; `train.steps` where no learning rate or weight depends on it; `refine.rollouts` where a
step has one update |
| while the content is the same | where documents and tokenizer lie (`_BY_CONTENT`) |
| by `--allow_change=NAME` | all others: what is computed from here on |
| never | what saved arrays are and random numbers come from (`_NEVER`) |

Changes by name are kept in `checkpoints/run.json`, so that the next start needs no flag.
"""

import dataclasses
import fnmatch
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from refine_jax.base.errors import CheckpointError, ConfigError
from refine_jax.base.files import json_field, path_of, read_json, short
from refine_jax.checkpoint.folders import CHECKPOINTS, RUN
from refine_jax.checkpoint.steps import find_steps, read_config
from refine_jax.config import SECTIONS, Config, OptimizerConfig, RefineConfig
from refine_jax.phases.setup import has_checkpoints
from refine_jax.refine.optimizer import make_optimizer
from refine_jax.refine.step import TrainState
from refine_jax.settings import BY_NAME, CONTENT, FREELY, suggestion

# {setting: how it may change}, as refine_jax.config states it.
_HOW = {"phase": "the phases train on different data"} | {
    f"{section}.{field.name}": field.metadata["change"]
    for section, kind in SECTIONS.items()
    for field in dataclasses.fields(kind)
}
_FREELY = [name for name, how in _HOW.items() if how == FREELY["change"]]
_BY_CONTENT = [name for name, how in _HOW.items() if how == CONTENT["change"]]
# With them, the saved arrays would be others or mean something else.
_NEVER = {
    name: why
    for name, why in _HOW.items()
    if why != BY_NAME and name not in _FREELY and name not in _BY_CONTENT
}
# What each phase computes with; the other sections are free.
_USED = {"midtrain": ("model", "mesh", "data", "refine", "optimizer", "train")}
_USED["posttrain"] = (*_USED["midtrain"], "prompts", "posttrain")
# Settings that decide which rows there are, by themselves or by the length that rollouts need.
_OF_DATA = (
    "data.*",
    "prompts.*",
    "refine.edge_margin",
    "refine.num_positions",
    "refine.rollout_length",
)

# What runs of versions without a setting did, where that is not its default.
_BEFORE = {("refine", "rollouts"): "batch"}

# Settings that decide how many optimizer updates a step has.
_OF_UPDATES = (
    "train.batch_size",
    "train.mini_batch_size",
    "posttrain.mini_batch_size",
    "posttrain.nested",
)


@dataclasses.dataclass(frozen=True)
class Changes:
    """What a run's record says of its past, and what this start changes.

    Attributes:
      step: the last saved step; 0 of a new run.
      before: its configuration up to there; None of a new run.
      allowed: the settings that this start may change.
      made: {"step": after which, "setting", "from", "to"} of each change by name, oldest first;
        those of this start come last.
      new: how many of them are of this start.
      data: fingerprint of the training data; None where it is not known.
    """

    step: int = 0
    before: Config | None = None
    allowed: tuple[str, ...] = ()
    made: tuple[Mapping[str, Any], ...] = ()
    new: int = 0
    data: str | None = None

    def check_data(self, fingerprint: str, config: Config) -> "Changes":
        """Add the change of the training data to that which there is now.

        Raises ConfigError: it is other data than the run's, and no setting of the data may change.
        """
        known = dataclasses.replace(self, data=fingerprint)
        if self.before is None:
            return known
        if self.data == fingerprint:
            return self
        content = [
            (name, _value(self.before, name), _value(config, name))
            for name in _BY_CONTENT
            if name in self.allowed
        ]
        if content:
            return known._with(content)
        if any(map(_is_of_data, self._of_this_start)):
            return known
        if self.data is not None:
            raise ConfigError(
                "config.data: these are other rows than those the run was trained on up to step "
                f"{self.step}: the documents, the tokenizer or how they are read has changed since "
                f"(the fingerprint was {self.data} and is {fingerprint}). Got: "
                f"source={config.data.source!r}, tokenizer={config.data.tokenizer!r}. Restore what "
                "was there, or choose another --workdir. To go on with the new rows on purpose, "
                "from the first one on, add: --allow_change=data.source"
            )
        return self  # of a version without this record: its checkpoint knows

    def other_rows(self, step: int) -> bool:
        """Whether rows may be others than those that the checkpoint of `step` was made with."""
        return any(change["step"] >= step and _is_of_data(change) for change in self.made)

    def record(self) -> dict[str, Any]:
        """Return what `run.json` keeps beside the configuration."""
        return {"changes": [dict(change) for change in self.made], "data": self.data}

    def describe(self) -> str:
        """Describe the changes of this start, as the end of a sentence; "" where there are none."""
        texts = [
            f"{change['setting']}={short(change['to'])} (was {short(change['from'])})"
            for change in self._of_this_start
        ]
        return f" with {', '.join(texts)}" if texts else ""

    @property
    def _of_this_start(self) -> tuple[Mapping[str, Any], ...]:
        return self.made[len(self.made) - self.new :]

    def _with(self, edits: Iterable[tuple[str, Any, Any]]) -> "Changes":
        made = [
            {"step": self.step, "setting": name, "from": was, "to": now} for name, was, now in edits
        ]
        return dataclasses.replace(self, made=(*self.made, *made), new=self.new + len(made))


def allowed_names(given: Iterable[str]) -> tuple[str, ...]:
    """Split the settings that a user allows to change: `section.field`, several joined by commas.

    Raises ConfigError: one is no setting, or one that a run cannot change.
    """
    known = list(_HOW)
    names = [name.strip().removeprefix("config.") for text in given for name in text.split(",")]
    for name in filter(None, names):
        if name not in known:
            raise ConfigError(
                f"--allow_change must name settings, such as optimizer.learning_rate. Got: "
                f"{name!r}.{suggestion(name, known)}"
            )
        if name in _NEVER:
            raise ConfigError(
                f"--allow_change={name}: a run cannot change it, because {_NEVER[name]}. Start a "
                "new run in another --workdir; config.model.checkpoint may name this one."
            )
    return tuple(dict.fromkeys(filter(None, names)))


def check_same_run(config: Config, workdir: Path, allow_change: Iterable[str] = ()) -> Changes:
    """Compare this start with the record of the run in `workdir`; writes nothing.

    allow_change: names of settings that may change what is computed from here on.

    Raises:
      ConfigError: The run was started with a configuration that computes something else.
      CheckpointError: Its record cannot be read.
    """
    allowed = allowed_names(allow_change)
    workdir = path_of(workdir)
    path = workdir / CHECKPOINTS / RUN
    if not has_checkpoints(workdir):
        for name in ("predictions.jsonl", "evaluation.json"):
            if (workdir / name).exists():
                raise ConfigError(
                    f"{workdir} holds an evaluation ({name}), which a training run would mix with "
                    "its own files. Choose another --workdir."
                )
        return Changes(allowed=allowed)
    step = max(find_steps(path.parent).saved, default=0)  # 0: all are damaged, which is said later
    if not path.exists():
        raise CheckpointError(
            f"{path.parent} holds saved steps but no {RUN}, which says with what settings. Put it "
            "back from a copy, or choose another --workdir."
        )
    before, made, data = _read(path)
    changes = Changes(step, before, allowed, made, data=data)
    if config.train.steps < changes.step:
        raise ConfigError(
            f"config.train.steps is less than the steps that the run in {workdir} has done. Got: "
            f"steps={config.train.steps}, done: {changes.step}. Set at least as many, or choose "
            "another --workdir."
        )
    edits = list(_differences(before, config))
    refused, offered = [], list(allowed)
    for name, was, now in edits:
        why = _why_never(name, before, config)
        if why is None and name in allowed:
            continue
        line = f"  config.{name}: was {short(was)}, got {short(now)}"
        if why:
            line += f" (cannot change within a run: {why})"
        elif name == "train.steps":
            line += f" ({_steps_decide(config)})"
        if not why:
            offered.append(name)
        refused.append(line)
    if refused:
        message = (
            f"{workdir} holds a run with another configuration. Choose another --workdir, or the "
            "configuration it was started with:\n" + "\n".join(refused)
        )
        if len(offered) > len(allowed):
            message += (
                f"\nTo change it on purpose, from step {changes.step} on, add: "
                f"--allow_change={','.join(offered)}"
            )
        raise ConfigError(message)
    return changes._with(edits)


def _read(path: Path) -> tuple[Config, tuple[Mapping[str, Any], ...], str | None]:
    """Read the configuration in a run's record, the changes before it, the data's fingerprint.

    A run of a version without a setting had what is now its default, or what `_BEFORE` says.
    """
    where = {"where": path, "error": CheckpointError}
    record = read_json(path, CheckpointError)
    saved = read_config(path.parent)
    sections = {}
    for name, kind in SECTIONS.items():
        given = json_field(saved, name, dict, default={}, **where)
        sections[name] = {
            field.name: given[field.name]
            for field in dataclasses.fields(kind)
            if field.name in given
        }
    for (name, field), value in _BEFORE.items():
        sections[name].setdefault(field, value)
    phase = json_field(saved, "phase", str, default=Config.phase, **where)
    try:
        before = Config.from_dict({"phase": phase, **sections})
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    made = json_field(record, "changes", list, default=[], **where)
    for change in made:
        if not isinstance(change, dict) or not {"step", "setting", "from", "to"} <= change.keys():
            raise CheckpointError(
                f"{path}: changes must be objects with step, setting, from and to. Got: "
                f"{short(change)}."
            )
        json_field(change, "step", int, **where)
        json_field(change, "setting", str, **where)
    return before, tuple(made), json_field(record, "data", str, **where)


def _differences(before: Config, config: Config) -> Iterator[tuple[str, Any, Any]]:
    """List the settings that differ and do not change freely: (name, value before, value now)."""
    if before.phase != config.phase:
        yield "phase", before.phase, config.phase
    sections = config.to_dict()
    for section in _USED[config.phase]:
        for field in sections[section]:
            name = f"{section}.{field}"
            was, now = _value(before, name), _value(config, name)
            free = name in (*_FREELY, *_BY_CONTENT)
            if name == "train.steps":
                free = _steps_decide(config) is None
            elif name == "refine.rollouts":  # with one update, both have the same parameters
                free = config.refine.objective == "ntp" or config.train.updates_per_step == 1
            if was != now and not free:
                yield name, was, now


def _steps_decide(config: Config) -> str | None:
    """Name a setting that depends on the number of steps, which then cannot change freely."""
    optimizer, refine = config.optimizer, config.refine
    if optimizer.schedule != "constant":
        return (
            f"config.optimizer.schedule={optimizer.schedule!r} ends with the last step: the "
            "learning rates of all steps to come change"
        )
    if refine.lambda_rl_schedule != "constant" or refine.lambda_rl_until < 1:
        return (
            f"config.refine.lambda_rl_schedule={refine.lambda_rl_schedule!r} ends at a part of "
            "the steps: the weights of all steps to come change"
        )
    return None


def _why_never(name: str, before: Config, config: Config) -> str | None:
    """Say why a run cannot change a setting in this way; None if it can."""
    if name in _NEVER:
        return _NEVER[name]
    section, _, field = name.partition(".")
    now = {"optimizer": config.optimizer, "refine": config.refine}
    if section in now:
        was = dataclasses.replace(now[section], **{field: _value(before, name)})
        if _saved(**{**now, section: was}) != _saved(**now):
            return "a checkpoint of the one holds arrays that the other lacks"
    counts = before.updates_per_step, config.updates_per_step
    rates_vary = config.optimizer.schedule != "constant" or config.optimizer.warmup_steps
    if name in _OF_UPDATES and counts[0] != counts[1] and rates_vary:
        return (
            "learning rates follow the number of updates, of which a step had "
            f"{counts[0]} and would have {counts[1]}"
        )
    return None


def _saved(optimizer: OptimizerConfig, refine: RefineConfig) -> Any:
    """Describe what a checkpoint holds of a single parameter: structure, shapes and dtypes."""
    state = jax.eval_shape(
        lambda params: TrainState.create(
            params, make_optimizer(optimizer, steps=1), jax.random.key(0), refine
        ),
        {"parameter": jax.ShapeDtypeStruct((1,), jnp.float32)},
    )
    leaves, structure = jax.tree.flatten(state)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _value(config: Config, name: str) -> Any:
    """Return the value of the setting `section.field`, as JSON has it."""
    section, _, field = name.partition(".")
    return json.loads(json.dumps(getattr(getattr(config, section), field)))


def _is_of_data(change: Mapping[str, Any]) -> bool:
    return _matches(change["setting"], _OF_DATA)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
