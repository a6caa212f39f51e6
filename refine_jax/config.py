"""The configuration of a run: frozen dataclasses, built from an ml_collections ConfigDict.

Every field states its default, its meaning and what it allows in one line, and is checked when the
dataclass is made; `Config` then checks what depends on several fields. An error names the field,
what was got and what is allowed. A config file starts from `defaults()` and sets what it needs:

    from refine_jax.config import defaults

    def get_config(arg=None):
        config = defaults()
        config.train.steps = 100
        return config
"""

import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from ml_collections import ConfigDict, config_dict


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the field and says what is allowed."""


def _field(default, doc: str, *, choices=None, low=None, high=None, above=None):
    """A field with its meaning and what it allows: `low` <= x <= `high`, x > `above`."""
    allowed = {"doc": doc, "choices": choices, "low": low, "high": high, "above": above}
    return dataclasses.field(default=default, metadata=allowed)


class _Section:
    """One part of the configuration: checks each field against its type and what it allows."""

    section: ClassVar[str] = ""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            path = f"config.{self.section}.{field.name}"
            value = _converted(getattr(self, field.name), hints[field.name], path)
            _check_allowed(value, field.metadata, path)
            object.__setattr__(self, field.name, value)


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Section):
    """Which model, and how it computes."""

    section: ClassVar[str] = "model"

    checkpoint: str | None = _field(
        None, "checkpoint to start from, made by refine_jax.convert or by a run; replaces `fresh`"
    )
    fresh: Mapping | None = _field(
        None, "a randomly initialised model: `model_type` and fields of a Hugging Face config.json"
    )
    compute_dtype: str | None = _field(
        None,
        "activations and matmul operands; None: float32 on CPU, bfloat16 on accelerators",
        choices=("float32", "bfloat16"),
    )
    param_dtype: str = _field(
        "float32", "parameters and optimizer moments", choices=("float32", "bfloat16")
    )
    remat: str = _field(
        "none", "what a layer's backward pass recomputes", choices=("none", "full", "dots")
    )
    implementation: str | None = _field(
        None,
        "kernels of the mixers; xla: everywhere; None: the best for the device",
        choices=("xla", "reference", "pallas_tpu", "pallas_gpu"),
    )


@dataclasses.dataclass(frozen=True)
class RefineConfig(_Section):
    """The method (DESIGN section 5; ReFINE, arXiv 2602.16704). Defaults are mid-training's."""

    section: ClassVar[str] = "refine"

    objective: str = _field(
        "refine", "`ntp`: next-token loss alone (the paper's SFT)", choices=("refine", "ntp")
    )
    selection: str = _field(
        "entropy",
        "how a position is picked in each span",
        choices=("entropy", "uniform", "argmax", "argmin"),
    )
    reward: str = _field(
        "cosine",
        "similarity to the true continuation: of hidden states, of tokens, or the sum",
        choices=("cosine", "binary", "hybrid"),
    )
    grouping: str = _field(
        "sequence",
        "rollouts whose rewards are compared: all of a sequence, or those of one position",
        choices=("sequence", "position"),
    )
    rollout_length: int = _field(5, "k: tokens a rollout", low=1)
    num_positions: int = _field(8, "c: positions a sequence", low=1)
    rollouts_per_position: int = _field(1, "n: rollouts a position", low=1)
    selection_temperature: float = _field(1.0, "tau: of the entropies when picking", above=0)
    sampling_temperature: float = _field(1.0, "of the policy when rolling out", above=0)
    forbid_eos: bool = _field(True, "rollouts never sample the end-of-sequence token")
    clip_low: float = _field(0.2, "ratio is clipped below 1 - clip_low", above=0, high=1)
    clip_high: float = _field(0.2, "ratio is clipped above 1 + clip_high", above=0)
    dual_clip: float = _field(3.0, "bound on the loss of negative advantages", above=1)
    normalize_std: bool = _field(True, "advantages are divided by the group's deviation")
    loss_aggregation: str = _field(
        "token-mean",
        "how the policy loss of tokens is combined",
        choices=(
            "token-mean",
            "seq-mean-token-sum",
            "seq-mean-token-mean",
            "seq-mean-token-sum-norm",
        ),
    )
    lambda_sft: float = _field(1.0, "weight of the next-token loss", low=0)
    lambda_rl: float = _field(0.2, "weight of the policy loss", low=0)
    kl_coef: float = _field(0.0, "weight of the divergence from the initial policy", low=0)
    kl_type: str = _field("low_var_kl", "its estimator", choices=("low_var_kl", "kl", "abs", "mse"))
    edge_margin: int = _field(20, "tokens kept free of rollouts at both ends", low=1)

    @property
    def tokens_needed(self) -> int:
        """Shortest document, in tokens, that holds c rollouts of k tokens between the margins."""
        return 2 * self.edge_margin + self.num_positions * self.rollout_length


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(_Section):
    """AdamW with decoupled weight decay on all parameters, after clipping by the global norm."""

    section: ClassVar[str] = "optimizer"

    learning_rate: float = _field(1e-6, "peak learning rate", low=0)
    b1: float = _field(0.9, "decay of the first moment", low=0, high=0.99999)
    b2: float = _field(0.999, "decay of the second moment", low=0, high=0.9999999)
    eps: float = _field(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = _field(0.01, "decoupled, on all parameters", low=0)
    clip_norm: float | None = _field(0.2, "largest global norm of a gradient; None: any", above=0)
    schedule: str = _field(
        "constant", "after the warm-up", choices=("constant", "cosine", "linear")
    )
    warmup_steps: int = _field(0, "training steps of linear warm-up from 0", low=0)
    final_fraction: float = _field(
        0.0, "where `cosine` and `linear` end, of the peak", low=0, high=1
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Section):
    """The loop."""

    section: ClassVar[str] = "train"

    steps: int = _field(100, "training steps, one batch each", low=1)
    warmup_ntp_steps: int = _field(0, "steps of plain next-token training at the start", low=0)
    batch_size: int = _field(128, "sequences a step; rollouts of all are collected at once", low=1)
    mini_batch_size: int | None = _field(
        None, "sequences an optimizer update; None: batch_size", low=1
    )
    micro_batch_size: int | None = _field(
        None, "sequences of one forward and backward pass; None: mini_batch_size", low=1
    )
    eval_every: int = _field(0, "steps between evaluations; 0: before and after only", low=0)
    eval_batches: int = _field(8, "held-out batches of micro_batch_size an evaluation", low=1)
    log_every: int = _field(10, "steps between lines on the terminal; 0: none", low=0)
    checkpoint_every: int = _field(100, "steps between checkpoints; 0: at the end only", low=0)
    keep_checkpoints: int = _field(2, "newest checkpoints to keep", low=1)
    best_metric: str | None = _field(
        None,
        "also keep the checkpoint that is best on held-out documents; needs eval_every",
        choices=("loss", "accuracy", "reward"),
    )
    max_nonfinite_updates: int = _field(
        10, "updates skipped in a row for non-finite gradients before the run stops", low=1
    )
    seed: int = _field(0, "of the initial weights, the rollouts and the order of the data", low=0)

    @property
    def mini_batch(self) -> int:
        """Sequences of one optimizer update."""
        return self.mini_batch_size or self.batch_size

    @property
    def micro_batch(self) -> int:
        """Sequences of one forward and backward pass."""
        return self.micro_batch_size or self.mini_batch

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates in a training step."""
        return self.batch_size // self.mini_batch


@dataclasses.dataclass(frozen=True)
class DataConfig(_Section):
    """Which documents, and how they become rows of tokens (`refine_jax.data.options`)."""

    section: ClassVar[str] = "data"

    source: str = _field(
        "stdlib",
        "`stdlib` (source files of the Python standard library), `tfds:NAME`, or a path: parquet, "
        "jsonl (.gz, .zst), text; a file, folder or glob pattern",
    )
    text_field: str = _field("text", "parquet column, JSON field or tfds feature with the text")
    files: str = _field("", "pattern of file names in folders, e.g. `*.py`; '': known suffixes")
    tfds_split: str = _field("train", "split of a tfds data set, e.g. `train[:10%]`")
    tfds_data_dir: str = _field("", "where tensorflow-datasets keeps its data; '': its default")
    limit_documents: int | None = _field(None, "use only the first documents; None: all", low=1)
    tokenizer: str = _field(
        "mistral-v1", "`mistral-v1`, `bytes`, `checkpoint` (that of model.checkpoint), or a path"
    )
    add_bos: bool = _field(True, "begin-of-sequence token before each document")
    add_eos: bool = _field(False, "end-of-sequence token after each document")
    sequence_length: int = _field(16384, "T: tokens of a row", low=2)
    min_tokens: int | None = _field(
        None, "drop documents with fewer tokens; None: sequence_length", low=1
    )
    max_tokens: int | None = _field(None, "drop documents with more tokens; None: no limit", low=1)
    chunking: str = _field(
        "all",
        "longer documents: cut into rows, or keep the first row",
        choices=("all", "first"),
    )
    min_remainder: int | None = _field(
        None,
        "keep the last piece of a cut document if it has so many tokens; None: as many as the "
        "rollouts of `refine` need, also for `ntp`, which then sees the same rows",
        low=1,
    )
    pack: bool = _field(False, "short documents share a row")
    max_documents: int = _field(8, "most documents of a packed row", low=1)
    holdout: float = _field(
        0.05, "fraction of the documents held out for evaluation", above=0, high=0.5
    )
    epochs: int | None = _field(None, "passes over the training rows; None: no end", low=1)
    workers: int = _field(0, "processes that read ahead; 0: threads of this one", low=0)
    cache_dir: str = _field("", "folder that keeps tokens between runs; '': memory")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. Made by `from_dict`, or from its sections."""

    model: ModelConfig
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    refine: RefineConfig = dataclasses.field(default_factory=RefineConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self):
        _check_model(self.model)
        _check_batches(self.train)
        _check_steps(self.train, self.optimizer)
        _check_lengths(self.data, self.refine)

    @classmethod
    def from_dict(cls, values: Mapping) -> "Config":
        """From a ConfigDict or nested mappings of fields.

        Raises:
          ConfigError: A field is unknown, of a wrong type or value, or does not fit the others.
        """
        values = _plain(values)
        _check_names(values, SECTIONS, "config")
        sections = {}
        for name, kind in SECTIONS.items():
            part = values.get(name, {})
            if not isinstance(part, Mapping):
                raise ConfigError(f"config.{name} must hold fields. Got: {part!r}.")
            _check_names(part, [f.name for f in dataclasses.fields(kind)], f"config.{name}")
            sections[name] = kind(**part)
        return cls(**sections)

    def to_dict(self) -> dict:
        """Nested dict of JSON values; `from_dict` of it gives the same configuration."""
        return dataclasses.asdict(self)


SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "refine": RefineConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
}


def defaults() -> ConfigDict:
    """A ConfigDict with every field at its default, to set and to override by flags."""
    values = ConfigDict()
    for name, kind in SECTIONS.items():
        hints = typing.get_type_hints(kind)
        section = ConfigDict()
        for field in dataclasses.fields(kind):
            default = getattr(kind(), field.name)
            if default is None:
                # A placeholder is None that knows the type a flag must be parsed to.
                (inner,) = [t for t in typing.get_args(hints[field.name]) if t is not type(None)]
                default = ConfigDict() if inner is Mapping else config_dict.placeholder(inner)
            section[field.name] = default
        values[name] = section
    # Which fields a fresh model has depends on its type: the config file sets them.
    values.lock()
    values.model.fresh.unlock()
    return values


def _plain(values):
    """Nested dicts of plain values from ConfigDicts."""
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    if isinstance(values, Mapping):
        return {key: _plain(value) for key, value in values.items()}
    return values


def _check_names(given: Iterable[str], known: Iterable[str], path: str) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            raise ConfigError(
                f"{path} has no field {name!r}.{suggestion(name, known)} "
                f"Fields: {', '.join(known)}."
            )


def check_flag_names(arguments: Iterable[str]) -> None:
    """Raise ConfigError for a `--config.section.field=value` that names no section or field.

    Fields of `config.model.fresh` depend on the model and are not checked here.
    """
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        prefix, _, rest = name.partition(".")
        if not argument.startswith("-") or prefix != "config" or not rest:
            continue
        section, _, field = rest.partition(".")
        _check_names([section], SECTIONS, "config")
        fields = [f.name for f in dataclasses.fields(SECTIONS[section])]
        _check_names([field.partition(".")[0]], fields, f"config.{section}")


def suggestion(name: Any, known: Iterable[str]) -> str:
    """' Did you mean ...?' where one of the known names is near, else an empty string."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def _converted(value, hint, path: str):
    """The value as its annotated type; integers pass as floats, nothing else is converted."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    fits = {
        bool: lambda: isinstance(value, bool),
        int: lambda: isinstance(value, numbers.Integral) and not isinstance(value, bool),
        float: lambda: isinstance(value, numbers.Real) and not isinstance(value, bool),
        str: lambda: isinstance(value, str),
        Mapping: lambda: isinstance(value, Mapping),
    }[kind]()
    if not fits:
        names = {bool: "True or False", int: "a whole number", float: "a number"}
        names |= {str: "a string", Mapping: "a dictionary"}
        none = " or None" if type(None) in kinds else ""
        raise ConfigError(f"{path} must be {names[kind]}{none}. Got: {value!r}.")
    value = dict(value) if kind is Mapping else kind(value)
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{path} must be finite. Got: {value!r}.")
    return value


def _check_allowed(value, allowed: Mapping, path: str) -> None:
    if value is None:
        return
    choices = allowed["choices"]
    if choices and value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise ConfigError(
            f"{path} must be one of {names}. Got: {value!r}.{suggestion(value, choices)}"
        )
    for key, holds, words in (
        ("low", lambda bound: value >= bound, "at least"),
        ("high", lambda bound: value <= bound, "at most"),
        ("above", lambda bound: value > bound, "more than"),
    ):
        bound = allowed[key]
        if bound is not None and not holds(bound):
            raise ConfigError(f"{path} must be {words} {bound}. Got: {value}.")


def _check_model(model: ModelConfig) -> None:
    if model.checkpoint is None and "model_type" not in (model.fresh or {}):
        raise ConfigError(
            "config.model needs `checkpoint` (a folder made by refine_jax.convert) or `fresh` with "
            f"a `model_type` and the fields of the model. Got: checkpoint=None, "
            f"fresh={model.fresh}."
        )


def _check_batches(train: TrainConfig) -> None:
    for large, small in (("batch", "mini_batch"), ("mini_batch", "micro_batch")):
        whole = train.batch_size if large == "batch" else train.mini_batch
        part = getattr(train, small)
        if whole % part:
            raise ConfigError(
                f"config.train.{small}_size must divide config.train.{large}_size. "
                f"Got: {small}_size={part}, {large}_size={whole}."
            )


def _check_steps(train: TrainConfig, optimizer: OptimizerConfig) -> None:
    if train.warmup_ntp_steps > train.steps:
        raise ConfigError(
            "config.train.warmup_ntp_steps must be at most config.train.steps. "
            f"Got: warmup_ntp_steps={train.warmup_ntp_steps}, steps={train.steps}."
        )
    if optimizer.warmup_steps > train.steps:
        raise ConfigError(
            "config.optimizer.warmup_steps must be at most config.train.steps. "
            f"Got: warmup_steps={optimizer.warmup_steps}, steps={train.steps}."
        )
    if train.best_metric and not train.eval_every:
        raise ConfigError(
            "config.train.best_metric needs evaluations during the run: set "
            f"config.train.eval_every. Got: best_metric={train.best_metric!r}, eval_every=0."
        )


def _check_lengths(data: DataConfig, refine: RefineConfig) -> None:
    """Every rollout, and the truth it is compared with, must lie between the margins."""
    length, margin = data.sequence_length, refine.edge_margin
    shortest = length if data.min_tokens is None else data.min_tokens
    k, c = refine.rollout_length, refine.num_positions
    if k + 2 > length:
        raise ConfigError(
            "config.refine.rollout_length must leave two tokens of config.data.sequence_length "
            f"(evaluation rolls out for every objective). Got: rollout_length={k}, "
            f"sequence_length={length}."
        )
    if refine.objective == "ntp":
        return
    if k > margin:
        raise ConfigError(
            "config.refine.rollout_length must be at most config.refine.edge_margin, or a rollout "
            f"could pass the end of its sequence. Got: rollout_length={k}, edge_margin={margin}."
        )
    for name, tokens in (("sequence_length", length), ("min_tokens", shortest)):
        if refine.tokens_needed > tokens:
            room = max(tokens - 2 * margin, 0)
            raise ConfigError(
                f"config.refine: {c} positions (num_positions) with rollouts of {k} tokens "
                f"(rollout_length) do not fit config.data.{name}={tokens}: {refine.tokens_needed} "
                f"tokens are needed, {margin} of them at both ends (edge_margin). Allowed at this "
                f"length: num_positions * rollout_length <= {room}."
            )
