"""The sections of a configuration: frozen dataclasses, a field for every setting.

Every field states its default, its meaning and what it allows in one line, and is checked when the
dataclass is made. `refine_jax.config` joins the sections and checks what depends on several fields.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from refine_jax.base.errors import ConfigError
from refine_jax.base.files import short
from refine_jax.presets import PRESETS
from refine_jax.settings import (
    CONTENT,
    COUNT,
    DEVICES,
    DISK_PATH,
    DOCUMENTS,
    FREELY,
    ITEMS,
    LEAST,
    MODEL_PATH,
    MOST_TOKENS,
    PATH,
    ROWS,
    SEEDS,
    STEPS,
    TOKENS,
    WEIGHTS,
    WRITTEN_PATH,
    Section,
    above,
    between,
    choice,
    listed,
    never,
    one_of,
    setting,
)

CUTS = ("middle", "left")
"""Where a prompt that is too long is cut."""


_OF_LORA = never("the saved updates have it")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """Which model, and how it computes."""

    checkpoint: str | None = setting(
        None,
        "start from one of refine_jax.convert, a run's or a Hugging Face folder, or from "
        "`hf://ORG/NAME[@REVISION]`; replaces `fresh`",
        MODEL_PATH,
        FREELY,
    )
    fresh: Mapping | None = setting(
        None,
        "a randomly initialised model: `model_type` and fields of a Hugging Face config.json",
        never("it is the model"),
    )
    adapter: str | None = setting(
        None,
        "start from this adapter of the peft package; without `train.trainable` `lora` it is added "
        "to the weights",
        PATH,
        FREELY,
    )
    lora_rank: int | None = setting(
        None, "r: of low-rank updates; None: the adapter's, else 8", between(1, 2**16), _OF_LORA
    )
    lora_alpha: float | None = setting(
        None, "they are scaled by alpha / r; None: the adapter's, else 16", above(0, 1e6), _OF_LORA
    )
    lora_targets: str = setting(
        "",
        "linear maps that have one, by names or patterns joined by commas, such as "
        "`q_proj,*.mlp.*`; '': the adapter's, else all",
        _OF_LORA,
    )
    compute_dtype: str | None = setting(
        None,
        "activations and matmul operands; None: float32 on CPU, bfloat16 on accelerators",
        one_of("float32", "bfloat16"),
    )
    param_dtype: str = choice(
        ("float32", "bfloat16"),
        "parameters and optimizer moments",
        never("the saved parameters have it"),
    )
    remat: str = choice(("none", "full", "dots"), "what a layer's backward pass recomputes", FREELY)
    implementation: str | None = setting(
        None,
        "kernels of the mixers; xla: everywhere; None: the best for the device",
        one_of("xla", "reference", "pallas_tpu", "pallas_gpu"),
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """How many devices of a slice share what (`refine_jax.parallel`), and how many slices; one size
    may be -1: all that are left.

    Does not change what is computed.
    """

    data: int = setting(1, "devices that share the rows of a batch", DEVICES, FREELY)
    fsdp: int = setting(
        -1, "devices that share the rows, and parameters and optimizer state too", DEVICES, FREELY
    )
    tensor: int = setting(1, "devices that share heads, MLP and vocabulary", DEVICES, FREELY)
    sequence: int = setting(1, "devices that share the tokens of a row", DEVICES, FREELY)
    dcn_data: int = setting(
        -1,
        "slices, joined by the data-centre network, that share the rows; -1: all that are left",
        DEVICES,
        FREELY,
    )
    dcn_fsdp: int = setting(
        1, "slices that share the rows, and parameters and optimizer state too", DEVICES, FREELY
    )

    def __post_init__(self):
        super().__post_init__()
        if 0 in (self.dcn_data, self.dcn_fsdp) or self.dcn_data == self.dcn_fsdp == -1:
            raise ConfigError(
                "config.mesh: dcn_data and dcn_fsdp are at least 1, and only one may be -1. Got: "
                f"dcn_data={self.dcn_data}, dcn_fsdp={self.dcn_fsdp}."
            )
        sizes = dataclasses.asdict(self)
        del sizes["dcn_data"], sizes["dcn_fsdp"]
        if 0 in sizes.values() or list(sizes.values()).count(-1) > 1:
            got = ", ".join(f"{name}={size}" for name, size in sizes.items())
            raise ConfigError(
                f"config.mesh: sizes are at least 1, and only one may be -1. Got: {got}."
            )


@dataclasses.dataclass(frozen=True)
class RefineConfig(Section):
    """The method (DESIGN section 5; ReFINE, arXiv 2602.16704). Defaults are mid-training's."""

    preset: str | None = setting(
        None,
        "several of these together: the published estimator, no sampling, or rollouts that are "
        "unbiased and of low noise; what is set beside it wins",
        one_of(*PRESETS),
    )
    objective: str = choice(("refine", "ntp"), "`ntp`: next-token loss alone (the paper's SFT)")
    estimator: str = choice(
        ("rollouts", "exact"),
        "sampled rollouts, or the exact probabilities that they would be right, without sampling",
    )
    rollouts: str = choice(
        ("update", "batch"),
        "which parameters roll out: those that the same pass updates, or, as published, those at "
        "the start of the step",
    )
    selection: str = choice(
        ("entropy", "uniform", "argmax", "argmin", "variance", "all"),
        "how a position is picked in each span; variance: of the whole-match reward; all: every "
        "position counts, for `exact` alone",
    )
    reward: str = choice(
        ("cosine", "binary", "hybrid", "prefix", "edit", "whole", "pooled_cosine", "expected"),
        "similarity to the true continuation: of hidden states, of tokens, or the sum; the share "
        "of tokens before the first mistake; the share left by edit distance, which forgives "
        "shifts; whether all tokens match; of mean-pooled hidden states; or the probability of the "
        "true tokens",
    )
    grouping: str = choice(
        ("sequence", "position"),
        "rollouts whose rewards are compared: all of a sequence, or those of one position",
    )
    credit: str = choice(
        ("sequence", "reward_to_go"),
        "what a token is credited with: the reward of its rollout, or the part from it on",
    )
    baseline: str = choice(
        ("group", "leave_one_out", "optimal_token"),
        "what a reward is compared with: the mean of its group, of the others in it, or the mean "
        "weighted by the energy of gradients (arXiv 2602.07078)",
    )
    rollout_length: int = setting(5, "k: tokens a rollout", between(1, 2**16))
    rollout_lengths: str = choice(
        ("fixed", "adaptive"),
        "tokens of a rollout that count: all k, or the first ones, until `entropy_budget` is spent",
    )
    entropy_budget: float = setting(
        3.0, "nats of entropy that `adaptive` rollouts may follow, by the text", above(0, 1e6)
    )
    num_positions: int = setting(8, "c: positions a sequence", between(1, 2**16))
    rollouts_per_position: int = setting(1, "n: rollouts a position", between(1, 2**12))
    selection_temperature: float = setting(
        1.0, "tau: of the entropies, or of log variances, when picking", between(LEAST, 1e6)
    )
    sampling_temperature: float = setting(1.0, "of the rollouts' policy", between(LEAST, 1e6))
    forbid_eos: bool = setting(True, "rollouts never sample the end-of-sequence token")
    clip_low: float = setting(0.2, "ratio is clipped below 1 - clip_low", above(0, 1))
    clip_high: float = setting(0.2, "ratio is clipped above 1 + clip_high", above(0, 1e6))
    dual_clip: float = setting(3.0, "bound on the loss of negative advantages", above(1, 1e6))
    normalize_std: bool = setting(True, "advantages are divided by the group's deviation")
    loss_aggregation: str = choice(
        ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"),
        "how the policy loss of tokens is combined",
    )
    lambda_sft: float = setting(1.0, "weight of the next-token loss", WEIGHTS)
    lambda_rl: float = setting(0.2, "weight of the policy loss, or of the expected reward", WEIGHTS)
    lambda_rl_schedule: str = choice(("constant", "linear", "cosine"), "of lambda_rl over the run")
    lambda_rl_until: float = setting(
        1.0, "part of the steps after which lambda_rl is 0, and its schedule ends", above(0, 1)
    )
    kl_coef: float = setting(0.0, "weight of the divergence from the initial policy", WEIGHTS)
    kl_type: str = choice(("low_var_kl", "kl", "abs", "mse"), "its estimator")
    edge_margin: int = setting(20, "tokens kept free of rollouts at both ends", TOKENS)

    def __post_init__(self):
        super().__post_init__()
        if self.preset is not None:
            raise ConfigError(
                "config.refine.preset is replaced by its values in Config.from_dict; "
                f"RefineConfig takes PRESETS[{self.preset!r}] of refine_jax.presets instead."
            )

    @property
    def tokens_needed(self) -> int:
        """Shortest document, in tokens, that holds c rollouts of k tokens between the margins.

        One that holds k tokens to predict, where every position counts.
        """
        if self.selection == "all":
            return self.rollout_length + 1
        return 2 * self.edge_margin + self.num_positions * self.rollout_length


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW with decoupled weight decay on all parameters, after clipping by the global norm."""

    learning_rate: float = setting(1e-6, "peak learning rate", between(0, 1e3))
    b1: float = setting(0.9, "decay of the first moment", between(0, 0.99999))
    b2: float = setting(0.999, "decay of the second moment", between(0, 0.9999999))
    eps: float = setting(1e-8, "added to the root of the second moment", between(1e-30, 1e3))
    weight_decay: float = setting(0.01, "decoupled, on all parameters", between(0, 1e3))
    clip_norm: float | None = setting(
        0.2, "largest global norm of a gradient; None: any", between(1e-30, 1e30)
    )
    first_moment_dtype: str | None = setting(
        None,
        "of the first moments; None: as the parameters. Second ones would lose their small changes",
        one_of("float32", "bfloat16"),
        never("the saved moments have it"),
    )
    schedule: str = choice(("constant", "cosine", "linear"), "after the warm-up")
    warmup_steps: int = setting(0, "training steps of linear warm-up from 0", COUNT)
    final_fraction: float = setting(0.0, "end of `cosine` and `linear`, of the peak", between(0, 1))


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section):
    """The loop."""

    steps: int = setting(100, "training steps, one batch each", STEPS)
    trainable: str = choice(
        ("all", "lora", "fast"),
        "what is trained: all, low-rank updates of linear maps, or what feeds the fast weights "
        "alone (initial values, rates, decays, gates)",
        never("a checkpoint holds what is trained"),
    )
    warmup_ntp_steps: int = setting(0, "steps of plain next-token training at the start", COUNT)
    batch_size: int = setting(128, "sequences a step", ROWS)
    mini_batch_size: int | None = setting(None, "sequences an update; None: batch_size", ROWS)
    micro_batch_size: int | None = setting(
        None,
        "sequences of one forward and backward pass on each device that shares the rows; "
        "None: mini_batch_size",
        ROWS,
    )
    eval_every: int = setting(0, "steps between evaluations; 0: before and after", COUNT, FREELY)
    eval_batches: int = setting(8, "held-out batches of micro_batch_size rows", ROWS, FREELY)
    evaluate: str = setting(
        "",
        "tasks answered while training, joined by commas: those of `evaluate.tasks`, with the "
        "settings of `evaluate`, and `position`, the loss by position; '': none",
        FREELY,
    )
    evaluate_every: int = setting(
        0, "steps between answers to these tasks; 0: before and after", COUNT, FREELY
    )
    time_rollouts: bool = setting(
        False, "with `refine.rollouts` `batch`, time the rollouts in a program of their own", FREELY
    )
    trackers: str | None = setting(
        None,
        "what also gets metrics and plots: `tensorboard`, `wandb`, `mlflow`, `trackio`, joined by "
        "commas; '': nothing; None: tensorboard where it is installed",
        FREELY,
    )
    project: str = setting("refine_jax", "name that trackers keep runs under", FREELY)
    profile: str = setting(
        "",
        "FIRST:LAST, the training steps of which jax.profiler writes a trace; '': none",
        FREELY,
    )
    log_every: int = setting(10, "steps between lines on the terminal; 0: none", COUNT, FREELY)
    checkpoint_every: int = setting(100, "steps between checkpoints; 0: at the end", COUNT, FREELY)
    keep_checkpoints: int = setting(2, "newest checkpoints to keep", ROWS, FREELY)
    best_metric: str | None = setting(
        None,
        "also keep the checkpoint that is best on held-out documents; needs eval_every",
        one_of("loss", "accuracy", "reward", "score"),
    )
    max_nonfinite_updates: int = setting(
        10, "updates skipped in a row for non-finite gradients before the run stops", STEPS, FREELY
    )
    seed: int = setting(
        0,
        "of the initial weights, the rollouts and the order of the data",
        SEEDS,
        never("the order of the data and all random numbers come from it"),
    )

    def __post_init__(self):
        super().__post_init__()
        _ = self.profiled

    @property
    def task_names(self) -> list[str]:
        """The tasks that are answered while training, each once."""
        return listed(self.evaluate)

    @property
    def tracker_names(self) -> list[str] | None:
        """The trackers, each once; None where that is left to what is installed."""
        return None if self.trackers is None else listed(self.trackers)

    @property
    def profiled(self) -> tuple[int, int] | None:
        """First and last step that is traced. Raises ConfigError for other texts."""
        if not self.profile:
            return None
        first, _, last = self.profile.partition(":")
        fits = all(word.isdecimal() and len(word) < 10 for word in (first, last))
        if not fits or not 1 <= int(first) <= int(last):
            raise ConfigError(
                f"{self.prefix}profile must be two steps, the first one at least 1 and the last "
                f"one not before it, such as 10:15. Got: {short(self.profile)}."
            )
        return int(first), int(last)

    @property
    def mini_batch(self) -> int:
        """Sequences of one optimizer update."""
        return self.mini_batch_size or self.batch_size

    @property
    def micro_batch(self) -> int:
        """Sequences of one forward and backward pass on one device."""
        return self.micro_batch_size or self.mini_batch

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates in a training step."""
        return self.batch_size // self.mini_batch


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """Which documents, and how they become rows of tokens (`refine_jax.data`)."""

    source: str = setting(
        "stdlib",
        "`stdlib` (source files of the Python standard library), `recall` (made-up facts), "
        "`tfds:NAME`, or a path: parquet, JSON lines or arrays, text (also .gz, .zst); a file, "
        "folder or glob pattern, also of a store, such as `hf://datasets/ORG/NAME/*.parquet`",
        PATH,
        CONTENT,
    )
    text_field: str = setting(
        "text", "parquet column, JSON field or tfds feature with the text", CONTENT, DOCUMENTS
    )
    files: str = setting("", "pattern of names in folders, as `*.py`; '': known suffixes", CONTENT)
    tfds_split: str = setting("train", "split of a tfds data set, e.g. `train[:10%]`", DOCUMENTS)
    tfds_data_dir: str = setting(
        "",
        "where tensorflow-datasets keeps its data; '': its default",
        DISK_PATH,
        CONTENT,
        DOCUMENTS,
    )
    limit_documents: int | None = setting(None, "use only the first documents; None: all", ITEMS)
    tokenizer: str = setting(
        "mistral-v1",
        "`mistral-v1`, `bytes`, `checkpoint` (model.checkpoint's), or a path",
        PATH,
        CONTENT,
    )
    add_bos: bool = setting(True, "begin-of-sequence token before each document")
    add_eos: bool = setting(False, "end-of-sequence token after each document", DOCUMENTS)
    sequence_length: int = setting(16384, "T: tokens of a row", between(2, MOST_TOKENS))
    min_tokens: int | None = setting(
        None, "drop documents with fewer tokens; None: sequence_length", ITEMS, DOCUMENTS
    )
    max_tokens: int | None = setting(
        None, "drop documents with more tokens; None: no limit", ITEMS, DOCUMENTS
    )
    chunking: str = choice(
        ("all", "first"), "longer documents: cut into rows, or keep the first row", DOCUMENTS
    )
    min_remainder: int | None = setting(
        None,
        "keep the last piece of a cut document if it has so many tokens; None: as many as the "
        "rollouts of `refine` need, also for `ntp`, which then sees the same rows",
        TOKENS,
        DOCUMENTS,
    )
    pack: bool = setting(False, "short documents share a row", DOCUMENTS)
    max_documents: int = setting(8, "most documents of a packed row", ROWS, DOCUMENTS)
    holdout: float = setting(
        0.05,
        "fraction of the documents held out for evaluation, of the rows where there is one "
        "document; 0: no evaluation",
        between(0, 0.5),
    )
    epochs: int | None = setting(None, "passes over the training rows; None: no end", STEPS)
    stream: bool | None = setting(
        None,
        "read documents while training and never all of them, of parquet or JSON; None: those of a "
        "store, without `cache_dir`, `epochs` and `limit_documents`",
        DOCUMENTS,
    )
    workers: int = setting(0, "processes that read ahead; 0: threads", between(0, 256), FREELY)
    cache_dir: str = setting(
        "", "folder that keeps tokens between runs; '': memory", WRITTEN_PATH, CONTENT, DOCUMENTS
    )

    @property
    def shortest(self) -> int:
        """The fewest tokens of a document that is kept."""
        return self.sequence_length if self.min_tokens is None else self.min_tokens


@dataclasses.dataclass(frozen=True)
class PromptsConfig(Section):
    """Which prompts and answers, and how they become rows (`refine_jax.data.prompts`).

    They come from `data.source`: `recall` (made up), or parquet or jsonl files.
    """

    prompt_field: str = setting("prompt", "parquet column or JSON field with the prompt")
    answer_field: str = setting("answer", "the one with the reference answer: a string or a list")
    messages_field: str = setting(
        "",
        "the one with the messages of a chat, by the tokenizer's chat template, in place of prompt "
        "and answer: all before the assistant's last message is the prompt; '': none",
    )
    target: str = choice(
        ("first", "random"),
        "which of several answers is trained on; random: drawn for each prompt and epoch",
    )
    max_answer_tokens: int = setting(
        32,
        "A: most tokens of an answer, end of sequence counted, or of all answers of a chat; longer "
        "ones are cut",
        TOKENS,
    )
    cut: str = choice(CUTS, "where prompts of more than data.sequence_length - A tokens are cut")


@dataclasses.dataclass(frozen=True)
class PosttrainConfig(Section):
    """A step of post-training: first on the prompts, then on the answers of the same batch."""

    nested: bool = setting(
        True, "train on the prompts first, with refine.objective; False: on the answers alone"
    )
    answers: str = choice(
        ("sft", "grpo"), "on reference answers, or on sampled ones with the task's score as reward"
    )
    mini_batch_size: int | None = setting(
        None, "prompts of an update on answers; None: train.batch_size, as officially", ROWS
    )
    samples: int = setting(8, "n: answers sampled for a prompt by `grpo`", between(2, 2**12))
    metric: str = setting("ruler_qa_refine", "score of answers in evaluations, reward of `grpo`")


@dataclasses.dataclass(frozen=True)
class GenerationConfig(Section):
    """How phases that generate do it (`refine_jax.generation`)."""

    temperature: float = setting(0.0, "of the policy when generating; 0: greedy", WEIGHTS)
    top_k: int | None = setting(None, "draw among the k most likely tokens; None: among all", STEPS)
    top_p: float | None = setting(
        None,
        "draw among the fewest most likely tokens of this total probability; None: among all",
        between(LEAST, 1),
    )
    max_new_tokens: int | None = setting(
        None, "most tokens of an answer; None: as many as its task allows", TOKENS
    )
    prefill_tokens: int = setting(
        32768,
        "most tokens, padding included, of one forward pass over prompts; what is longer is read "
        "in pieces",
        TOKENS,
    )


@dataclasses.dataclass(frozen=True)
class TestTimeConfig(Section):
    """Training on a prompt before it is answered, by the `refine` and `optimizer` sections."""

    __test__: ClassVar[bool] = False  # not a test case, whatever its name

    steps: int = setting(1, "passes over a prompt, or over a batch of prompts", ROWS)
    reset: str = choice(
        ("example", "batch", "never"),
        "when the trained parameters come back: for each prompt, which then adapts a copy of its "
        "own; for each batch; or never (the official code), where scores depend on the order",
    )
    copies: int = setting(
        1, "`example`: prompts adapted at once, vmapped; 1: one after the other", between(1, 2**10)
    )
    batch_size: int = setting(
        8, "`batch` and `never`: prompts adapted together and answered with one result", ROWS
    )
    mini_batch_size: int = setting(4, "prompts an optimizer update", ROWS)
    micro_batch_size: int | None = setting(
        None, "prompts of one forward and backward pass; None: mini_batch_size", ROWS
    )
    answer_before: bool = setting(
        False, "also answer each prompt without training on it, to compare the two in report.html"
    )

    @property
    def micro_batch(self) -> int:
        """Prompts of one forward and backward pass."""
        return self.micro_batch_size or self.mini_batch_size


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Section):
    """Which tasks are answered and scored, by the phases `evaluate` and `testtime`."""

    tasks: str = setting("niah_single_1", "names of `refine_jax.data.tasks.TASKS`, comma-separated")
    lengths: str = setting(
        "4096,8192,16384",
        "most tokens of prompt and answer, joined by commas: RULER's tasks are made or read at "
        "each; '': all that the files hold (LongBench always)",
    )
    samples: int | None = setting(
        None, "examples of a task and length; None: all of a file; needed by what is made", ITEMS
    )
    data: str = setting(
        "",
        "of LongBench and RULER's question answering: parquet or JSON files, or SQuAD's or "
        "HotpotQA's .json; a file, folder or glob",
        PATH,
    )
    essays: str = setting(
        "", "text that hides needles: a file, folder, glob, or `stdlib`; '': none needed", PATH
    )
    ruler_qa: str = choice(
        ("refine", "nvidia", "lm_eval"), "convention that scores RULER's question answering"
    )
    max_tokens: int | None = setting(
        None,
        "most tokens of prompt and answer; longer prompts are cut; None: as they are",
        between(2, MOST_TOKENS),
    )
    cut: str = choice(CUTS, "where they are cut")
    batch_size: int = setting(8, "prompts answered at once, where parameters are shared", ROWS)
    seed: int = setting(0, "of the examples that are made or chosen", SEEDS)
    order_seed: int | None = setting(
        None, "shuffles the order of evaluation; None: as the tasks come", SEEDS
    )

    def __post_init__(self):
        super().__post_init__()
        _ = self.token_lengths

    @property
    def task_names(self) -> list[str]:
        """The tasks, each once."""
        return listed(self.tasks)

    @property
    def token_lengths(self) -> list[int | None]:
        """The lengths, each once; [None] for as they come. Raises ConfigError for other texts."""
        words = listed(self.lengths)
        fits = [word.isdecimal() and len(word) < 10 for word in words]
        if not all(fits) or not all(0 < int(word) <= MOST_TOKENS for word in words):
            raise ConfigError(
                f"{self.prefix}lengths must be whole numbers from 1 to {MOST_TOKENS:,}, without "
                f"signs in them, joined by commas. Got: {short(self.lengths)}."
            )
        return list(dict.fromkeys(map(int, words))) or [None]


@dataclasses.dataclass(frozen=True)
class CompareConfig(Section):
    """Trainings from one start that are asked the questions of `evaluate`, in phase `compare`."""

    arms: str = setting(
        "ntp,refine",
        "trainings, comma-separated: `ntp`, `refine` (as that section says) or a preset of it; "
        "differences are from the first",
    )
    adapted: int = setting(
        0,
        "prompts of each set that the last arm also answers after training on them "
        "(`testtime`); 0: none",
        COUNT,
    )

    def __post_init__(self):
        super().__post_init__()
        known = ("ntp", "refine", *PRESETS)
        if not self.arm_names or not set(self.arm_names) <= set(known):
            raise ConfigError(
                f"{self.prefix}arms must be names of {', '.join(known)}, joined by commas. "
                f"Got: {short(self.arms)}."
            )

    @property
    def arm_names(self) -> list[str]:
        """The arms, each once."""
        return listed(self.arms)
