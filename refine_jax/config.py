"""The configuration of a run, built from an ml_collections ConfigDict; what its settings must be
together.

Each section (`refine_jax.sections`) checks its own fields. `Config` checks what depends on several:
an error names the fields, what was got and what is allowed. A config file starts from `defaults()`
and sets what it needs:

    from refine_jax.config import defaults

    def get_config(arg=None):
        config = defaults()
        config.train.steps = 100
        return config
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping

from ml_collections import ConfigDict, config_dict

from refine_jax.base.errors import ConfigError
from refine_jax.base.files import short
from refine_jax.presets import GivenFields, expand
from refine_jax.sections import (
    CompareConfig,
    DataConfig,
    EvaluateConfig,
    GenerationConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PosttrainConfig,
    PromptsConfig,
    RefineConfig,
    TestTimeConfig,
    TrainConfig,
)
from refine_jax.settings import (
    LEAST,
    MOST_AT_ONCE,
    MOST_MATCHED,
    MOST_ROWS,
    check_names,
    inner_type,
    plain,
    suggestion,
)

# What a run does; each is a module of refine_jax.phases.
PHASES = ("midtrain", "posttrain", "testtime", "evaluate", "compare")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. Made by `from_dict`, or from its sections."""

    model: ModelConfig
    phase: str = "midtrain"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    refine: RefineConfig = dataclasses.field(default_factory=RefineConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    prompts: PromptsConfig = dataclasses.field(default_factory=PromptsConfig)
    posttrain: PosttrainConfig = dataclasses.field(default_factory=PosttrainConfig)
    generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    testtime: TestTimeConfig = dataclasses.field(default_factory=TestTimeConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    compare: CompareConfig = dataclasses.field(default_factory=CompareConfig)

    def __post_init__(self):
        if self.phase not in PHASES:
            raise ConfigError(
                f"config.phase must be one of {', '.join(map(repr, PHASES))}. "
                f"Got: {short(self.phase)}."
                f"{suggestion(self.phase, PHASES)}"
            )
        _check(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> "Config":
        """From a ConfigDict or nested mappings of fields.

        A preset of `refine` is replaced by its values (`refine_jax.presets`).

        Raises:
          ConfigError: A field is unknown, of a wrong type or value, or does not fit the others.
        """
        refine = values.get("refine")
        values = plain(values)
        if isinstance(refine, Mapping | ConfigDict):
            values["refine"] = expand(refine)
        check_names(values, ["phase", *SECTIONS], "config")
        sections = {"phase": values["phase"]} if "phase" in values else {}
        for name, kind in SECTIONS.items():
            part = values.get(name, {})
            if not isinstance(part, Mapping):
                raise ConfigError(f"config.{name} must hold fields. Got: {part!r}.")
            check_names(part, [f.name for f in dataclasses.fields(kind)], f"config.{name}")
            sections[name] = kind(**part)
        return cls(**sections)

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates in a training step, in post-training on prompts and on answers."""
        updates = self.train.updates_per_step
        if self.phase != "posttrain":
            return updates
        on_answers = self.posttrain.mini_batch_size or self.train.batch_size
        return updates * self.posttrain.nested + self.train.batch_size // on_answers

    def to_dict(self) -> dict:
        """Nested dict of JSON values; `from_dict` of it gives the same configuration."""
        return dataclasses.asdict(self)


SECTIONS = {field.name: field.type for field in dataclasses.fields(Config) if field.name != "phase"}


def defaults() -> ConfigDict:
    """A ConfigDict with every field at its default, to set and to override by flags."""
    values = ConfigDict({"phase": "midtrain"})
    for name, kind in SECTIONS.items():
        section = GivenFields() if name == "refine" else ConfigDict()
        for field in dataclasses.fields(kind):
            default = field.default
            if default is None:
                inner = inner_type(field.type)  # a placeholder is None that knows its type
                default = ConfigDict() if inner is Mapping else config_dict.placeholder(inner)
            section[field.name] = default
        if name == "refine":
            section.given.clear()
        values[name] = section
    # Which fields a fresh model has depends on its type: the config file sets them.
    values.lock()
    values.model.fresh.unlock()
    return values


def _check(config: Config) -> None:
    """Raise ConfigError for settings that do not fit each other."""
    model, train, refine, testtime = config.model, config.train, config.refine, config.testtime
    if model.checkpoint is None and "model_type" not in (model.fresh or {}):
        raise ConfigError(
            "config.model needs `checkpoint` (a folder made by refine_jax.convert) or `fresh` with "
            f"a `model_type` and the fields of the model. Got: checkpoint=None, "
            f"fresh={short(model.fresh)}."
        )
    for name in ("lora_rank", "lora_alpha", "lora_targets"):
        value = getattr(model, name)
        if value and train.trainable != "lora":
            raise ConfigError(
                f"config.model.{name} is for config.train.trainable='lora'. Got: {name}="
                f"{short(value)}, trainable={train.trainable!r}."
            )
    _check_batches(train, train.mini_batch)
    _check_sizes(config)
    _check_steps(train, config.optimizer)
    _check_lengths(config.data, refine)
    _check_estimator(refine)
    if train.best_metric and not config.data.holdout:
        raise ConfigError(
            "config.train.best_metric needs held-out documents: set config.data.holdout. "
            f"Got: best_metric={train.best_metric!r}, holdout=0."
        )
    if testtime.copies > 1 and testtime.reset != "example":
        raise ConfigError(
            "config.testtime.copies is for reset='example', where each prompt adapts a copy of its "
            f"own. Got: copies={testtime.copies}, reset={testtime.reset!r}."
        )
    _check_batches(testtime, testtime.mini_batch_size)
    scheduled = refine.lambda_rl_schedule != "constant" or refine.lambda_rl_until < 1
    if config.phase == "testtime" and testtime.reset == "never" and scheduled:
        raise ConfigError(
            "config.refine.lambda_rl_schedule and lambda_rl_until run over the steps on a prompt, "
            "which config.testtime.reset='never' does not begin again. Got: "
            f"{refine.lambda_rl_schedule!r}, {refine.lambda_rl_until}."
        )
    if 0 < config.generation.temperature < LEAST:
        raise ConfigError(
            f"config.generation.temperature must be 0, for greedy, or at least {LEAST}. "
            f"Got: {config.generation.temperature}."
        )
    if config.phase == "posttrain":
        _check_posttrain(config)
    elif train.best_metric == "score":
        raise ConfigError(
            "config.train.best_metric='score' is the score of answers: it needs phase "
            f"'posttrain'. Got: {config.phase!r}."
        )


def _check_batches(section: TrainConfig | TestTimeConfig, mini: int) -> None:
    sizes = {"batch_size": section.batch_size, "mini_batch_size": mini}
    sizes["micro_batch_size"] = section.micro_batch
    for (larger, whole), (smaller, part) in itertools.pairwise(sizes.items()):
        if whole % part:
            raise ConfigError(
                f"{section.prefix}{smaller} must divide {section.prefix}{larger}. "
                f"Got: {smaller}={part}, {larger}={whole}."
            )


def _check_sizes(config: Config) -> None:
    """Refuse what no memory holds, before anything makes arrays of it."""
    train, data, refine = config.train, config.data, config.refine
    mesh = math.prod(max(size, 1) for size in dataclasses.asdict(config.mesh).values())
    if mesh > MOST_ROWS:
        raise ConfigError(
            f"config.mesh: its sizes are of at most {MOST_ROWS:,} devices in all. Got: {mesh:,}."
        )
    rollouts = {
        "refine.num_positions": refine.num_positions,
        "refine.rollouts_per_position": refine.rollouts_per_position,
        "refine.rollout_length": refine.rollout_length,
    }
    row, batch = (
        {"data.sequence_length": data.sequence_length},
        {"train.batch_size": train.batch_size},
    )
    products = [batch | row, batch | rollouts]
    if config.phase == "posttrain" and config.posttrain.answers == "grpo":
        samples = {"posttrain.samples": config.posttrain.samples}
        products.append(batch | samples | row)
    for sizes in products:
        tokens = math.prod(sizes.values())
        if tokens > MOST_AT_ONCE:
            got = ", ".join(f"{name}={size}" for name, size in sizes.items())
            raise ConfigError(
                f"config: {' * '.join(sizes)} must be at most {MOST_AT_ONCE:,} tokens, which are "
                f"in memory together: 4 bytes each are {tokens * 4 / 2**30:,.0f} GiB. Got: {got}."
            )
    if data.pack and data.max_documents > data.sequence_length:
        raise ConfigError(
            "config.data.max_documents must be at most config.data.sequence_length: a document has "
            f"a token. Got: max_documents={data.max_documents}, "
            f"sequence_length={data.sequence_length}."
        )


def _check_steps(train: TrainConfig, optimizer: OptimizerConfig) -> None:
    for section, name in ((train, "warmup_ntp_steps"), (optimizer, "warmup_steps")):
        if getattr(section, name) > train.steps:
            raise ConfigError(
                f"{section.prefix}{name} must be at most config.train.steps. "
                f"Got: {name}={getattr(section, name)}, steps={train.steps}."
            )
    if train.best_metric and not train.eval_every:
        raise ConfigError(
            "config.train.best_metric needs evaluations during the run: set "
            f"config.train.eval_every. Got: best_metric={train.best_metric!r}, eval_every=0."
        )


def _check_lengths(data: DataConfig, refine: RefineConfig) -> None:
    """Every rollout, and the truth it is compared with, must lie between the margins."""
    length, margin = data.sequence_length, refine.edge_margin
    shortest = data.shortest
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


def _check_estimator(refine: RefineConfig) -> None:
    """What an exact expectation is known of, and what it leaves no room for."""
    k, exact = refine.rollout_length, refine.estimator == "exact"
    if exact and refine.reward not in ("whole", "prefix"):
        raise ConfigError(
            "config.refine.estimator='exact' needs config.refine.reward='whole' or 'prefix': of "
            f"other rewards only rollouts tell the expectation. Got: reward={refine.reward!r}."
        )
    if exact and refine.kl_coef:
        raise ConfigError(
            "config.refine.kl_coef is a divergence on rollouts, of which "
            f"config.refine.estimator='exact' makes none. Got: kl_coef={refine.kl_coef}."
        )
    if refine.selection == "all" and not exact:
        raise ConfigError(
            "config.refine.selection='all' is for config.refine.estimator='exact': rollouts start "
            "at a position of each span. Got: estimator='rollouts'."
        )
    if refine.objective == "refine" and refine.rollout_lengths == "adaptive":
        if exact:
            raise ConfigError(
                "config.refine.rollout_lengths='adaptive' is of rollouts, of which "
                "config.refine.estimator='exact' makes none."
            )
        if refine.loss_aggregation not in ("seq-mean-token-sum", "seq-mean-token-mean"):
            raise ConfigError(
                "config.refine.rollout_lengths='adaptive' needs config.refine.loss_aggregation="
                "'seq-mean-token-mean' or 'seq-mean-token-sum': how many tokens there are to "
                f"average is not known in advance. Got: {refine.loss_aggregation!r}."
            )
    if (exact or refine.selection == "variance") and k > MOST_MATCHED:
        raise ConfigError(
            f"config.refine.rollout_length must be at most {MOST_MATCHED} with "
            "config.refine.estimator='exact' and config.refine.selection='variance', which keep a "
            f"probability for each of its tokens at every position. Got: rollout_length={k}."
        )


def _check_posttrain(config: Config) -> None:
    """Settings of mid-training that would be ignored are refused; batches and lengths must fit."""
    data, train, posttrain = config.data, config.train, config.posttrain
    for field in dataclasses.fields(data):
        value = getattr(data, field.name)
        if field.metadata["documents_only"] and value != field.default:
            raise ConfigError(
                f"config.data.{field.name} is for documents; config.prompts says how prompts "
                f"become rows (phase 'posttrain'). Got: {value!r}."
            )
    if train.warmup_ntp_steps:
        raise ConfigError(
            "config.train.warmup_ntp_steps is for mid-training. Got: "
            f"{train.warmup_ntp_steps} in phase 'posttrain'."
        )
    if config.refine.kl_coef and not posttrain.nested:
        raise ConfigError(
            "config.refine.kl_coef belongs to the training on prompts (config.posttrain.nested). "
            f"Got: kl_coef={config.refine.kl_coef}, nested=False."
        )
    mini_batch = posttrain.mini_batch_size or train.batch_size
    if train.batch_size % mini_batch or mini_batch % train.micro_batch:
        raise ConfigError(
            "config.posttrain.mini_batch_size must divide config.train.batch_size and be a "
            f"multiple of config.train.micro_batch_size. Got: mini_batch_size={mini_batch}, "
            f"batch_size={train.batch_size}, micro_batch_size={train.micro_batch}."
        )
    room = data.sequence_length - config.prompts.max_answer_tokens
    needed = config.refine.tokens_needed if config.refine.objective == "refine" else 2
    if room < needed:
        raise ConfigError(
            f"config.data.sequence_length must hold {needed} tokens of a prompt (for the rollouts "
            "of config.refine) beside config.prompts.max_answer_tokens. Got: sequence_length="
            f"{data.sequence_length}, max_answer_tokens={config.prompts.max_answer_tokens}."
        )
