"""What a run is made of, built and checked from its configuration before anything is written."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from refine_jax import distributed
from refine_jax.base.errors import CheckpointError, ConfigError
from refine_jax.base.files import parse_object, path_of, read_text, short
from refine_jax.base.lock import Lock
from refine_jax.checkpoint.folders import (
    CHECKPOINTS,
    CONFIG,
    RUN,
    ModelCheckpoint,
    has_tokenizer,
)
from refine_jax.checkpoint.model import checkpoint_folder, load_model, read_lora
from refine_jax.checkpoint.peft import read_adapter
from refine_jax.checkpoint.steps import find_steps
from refine_jax.config import Config, ModelConfig
from refine_jax.data.pipeline import Corpus, Dataset
from refine_jax.data.prompts import PromptCorpus
from refine_jax.data.tokenizer import Tokenizer, load_tokenizer, with_ends
from refine_jax.generation.loading import GENERATION, further_ends, trained_with
from refine_jax.kernels.device import backend
from refine_jax.models.config import Architecture, model_config
from refine_jax.models.lora import (
    ALPHA,
    RANK,
    LoRA,
    abstract_updates,
    choose_targets,
    init_updates,
    merge,
)
from refine_jax.models.trainable import join
from refine_jax.models.transformer import ComputePolicy, Model, Params
from refine_jax.parallel import axis_sizes, place_state, rows_here, state_shardings
from refine_jax.settings import suggestion

# A stream of random numbers of its own, apart from those of training, evaluation and prompts.
_UPDATES_STREAM = 4


@contextlib.contextmanager
def only_run_in(workdir: Path) -> Iterator[Callable[[], None]]:
    """Keep other runs out of a folder, from before anything is written until the end.

    Gives a function to call between steps, which raises RunError if another run has taken the
    folder over nonetheless. Process 0 holds the lock: where it is refused, it ends the others.

    Raises RunError: another run is using the folder, or it cannot be written in.
    """
    if not distributed.is_writer():
        yield lambda: None
        return
    with Lock(workdir, distributed.say) as lock:
        yield lock.check


def has_checkpoints(workdir: Path) -> bool:
    """Whether a run in `workdir` has saved a step, be it one that is damaged now."""
    steps = find_steps(path_of(workdir) / CHECKPOINTS)
    return bool(steps.saved or steps.broken)


def load_start(config: ModelConfig, workdir: Path) -> ModelCheckpoint:
    """Load the model of the interrupted run in `workdir`, else the configuration's.

    Raises:
      CheckpointError: `config.checkpoint` is no checkpoint, or a corrupt one.
      ConfigError, ModelConfigError: `config.fresh` describes no model.
    """
    if has_checkpoints(workdir):
        folder = path_of(workdir) / CHECKPOINTS
        if not (folder / CONFIG).exists():
            raise CheckpointError(
                f"{folder} holds saved steps but no {CONFIG}, which says of what model. Put it "
                "back from a copy, or choose another --workdir."
            )
        text = read_text(folder / CONFIG, CheckpointError)
        fields = parse_object(text, folder / CONFIG, CheckpointError)
        lora = read_lora(folder) if (folder / RUN).exists() else None
        return ModelCheckpoint(fields, text, tokenizer=folder, lora=lora)
    if config.checkpoint is not None:
        return load_model(config.checkpoint)
    described = model_config(dict(config.fresh))
    known = ["model_type", *(field.name for field in dataclasses.fields(described))]
    for name in config.fresh:
        if name not in known:
            raise ConfigError(
                f"config.model.fresh: {described.model_type} has no field {name!r}."
                f"{suggestion(name, known)} Fields: {', '.join(known)}."
            )
    fields = described.to_hf()
    return ModelCheckpoint(fields, json.dumps(fields, indent=2) + "\n")


def make_model(start: ModelCheckpoint, config: ModelConfig) -> Model:
    """Make the model, computing as the configuration says.

    Raises ConfigError: the configured implementation cannot run this model.
    """
    policy = ComputePolicy(
        compute_dtype=config.compute_dtype, remat=config.remat, implementation=config.implementation
    )
    model = Model(model_config(dict(start.config)), policy)
    if config.implementation is not None:
        try:
            tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
            jax.eval_shape(model.forward, model.abstract_params(), tokens)
        except ValueError as error:
            raise ConfigError(f"config.model.implementation: {error}") from error
    return model


def initial_params(model: Model, start: ModelCheckpoint, config: Config) -> Params:
    """Make parameters before the first step, where an ambient mesh wants them, in their dtype."""
    dtype = jnp.dtype(config.model.param_dtype)
    shardings = state_shardings(model.abstract_params())

    def cast(params: Params) -> Params:
        return jax.tree.map(lambda x: x.astype(dtype), params)

    key = jax.random.key(config.train.seed)
    if start.params is not None:
        params = cast(place_state(start.params, shardings))
    else:
        params = jax.jit(lambda key: cast(model.init(key)), out_shardings=shardings)(key)
    if start.updates is not None:
        updates = place_state(start.updates, state_shardings(start.updates))
    elif start.lora is not None:
        abstract = model.abstract_params()
        places = state_shardings(abstract_updates(abstract, start.lora))
        draw = jax.jit(lambda key: init_updates(abstract, start.lora, key), out_shardings=places)
        updates = draw(jax.random.fold_in(key, _UPDATES_STREAM))
    else:
        return params
    params = join(params, updates)
    return params if start.lora is not None else merge(params)


def abstract_params(model: Model, start: ModelCheckpoint, config: Config) -> Params:
    """Give shapes and dtypes of `initial_params`."""
    dtype = jnp.dtype(config.model.param_dtype)
    params = jax.tree.map(lambda x: x.update(dtype=dtype), model.abstract_params())
    return params if start.lora is None else join(params, abstract_updates(params, start.lora))


def with_updates(start: ModelCheckpoint, model: Model, config: Config) -> ModelCheckpoint:
    """Say which low-rank updates a new run trains, or adds to the weights that it starts from.

    Raises:
      CheckpointError: config.model.adapter is no adapter of this model.
      ConfigError, ModelConfigError: what is asked for fits neither model nor adapter.
    """
    settings, trains = config.model, config.train.trainable == "lora"
    asked = {"rank": settings.lora_rank, "alpha": settings.lora_alpha, "targets": None}
    if settings.lora_targets or (trains and settings.adapter is None):
        shapes = model.abstract_params()
        asked["targets"] = choose_targets(shapes, settings.lora_targets or "*")
    if settings.adapter is None:
        new = LoRA(asked["rank"] or RANK, asked["alpha"] or ALPHA, asked["targets"] or ())
        return start._replace(lora=new if trains else None)
    lora, updates = read_adapter(settings.adapter, model.config)
    for name, value in asked.items():
        if value not in (None, getattr(lora, name)):
            raise ConfigError(
                f"config.model.lora_{name} must be that of config.model.adapter, or be left out. "
                f"Got: {short(value)}, not {short(getattr(lora, name))}."
            )
    return start._replace(lora=lora if trains else None, updates=updates)


def prepare_model(config: Config, workdir: Path) -> tuple[ModelCheckpoint, Model, Tokenizer]:
    """Load what every phase starts from: the model of `load_start`, and the tokenizer with its
    files.

    Raises ConfigError, ModelConfigError, DataError, CheckpointError: bad input.
    """
    start = load_start(config.model, workdir)
    model = make_model(start, config.model)
    if not has_checkpoints(workdir):
        start = with_updates(start, model, config)
    tokenizer = load_matching_tokenizer(config, start)
    return with_tokenizer_files(start, tokenizer), model, tokenizer


def load_matching_tokenizer(config: Config, start: ModelCheckpoint) -> Tokenizer:
    """Load the configured tokenizer.

    Raises:
      DataError: It is not there.
      ConfigError: It has more tokens than the model has embeddings.
    """
    name = config.data.tokenizer
    if name == "checkpoint":
        name, source = start.tokenizer, config.model.checkpoint
        if name is None or not has_tokenizer(name):
            name = None if source is None else trained_with(checkpoint_folder(source))
        if name is None:
            raise ConfigError(
                "config.data.tokenizer='checkpoint' needs a model.checkpoint with tokenizer files. "
                f"Got: checkpoint={config.model.checkpoint!r}, which has none. Name a tokenizer: "
                "'mistral-v1', 'bytes' or a path."
            )
    tokenizer = load_tokenizer(os.fspath(name))
    vocab_size = model_config(start.config).vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            "config.data.tokenizer has more tokens than the model's vocabulary. Got: "
            f"{config.data.tokenizer!r} with {tokenizer.vocab_size}, vocab_size={vocab_size}. Use "
            "the tokenizer the model was made for, or a larger vocab_size."
        )
    generation = start.files.get(GENERATION)
    if generation is None and start.tokenizer is not None:  # of a run that goes on
        generation = start.tokenizer / GENERATION
        generation = generation if generation.is_file() else None
    return with_ends(tokenizer, further_ends(start.config, generation))


def with_tokenizer_files(start: ModelCheckpoint, tokenizer: Tokenizer) -> ModelCheckpoint:
    """Add the files of the tokenizer to the start, unless it comes with its own."""
    if start.tokenizer is not None:
        return start
    return start._replace(files={**tokenizer.files, **start.files})


def check_mesh(config: Config, model: Model) -> None:
    """Refuse a mesh that cannot divide the model, or would leave devices idle in training.

    Raises ConfigError: what does not divide.
    """
    sizes = axis_sizes()
    updates = {"train": config.train.mini_batch}
    if config.phase == "posttrain":
        updates["posttrain"] = config.posttrain.mini_batch_size or config.train.batch_size
    for section, rows in updates.items():
        if rows % rows_at_once(config) or rows % (sizes["data"] * sizes["fsdp"]):
            raise ConfigError(
                "config.mesh.data * config.mesh.fsdp devices share the rows of a mini-batch, which "
                f"must divide evenly among them, {config.train.micro_batch} "
                "(config.train.micro_batch_size) at a time or all at once. Got: "
                f"data={sizes['data']}, fsdp={sizes['fsdp']}, config.{section}: {rows} rows. "
                "Choose larger mini-batches, or give devices to config.mesh.tensor or sequence."
            )
    check_fits(sizes, tokens=config.data.sequence_length, model=model.config)


def check_fits(sizes: Mapping[str, int], *, tokens: int, model: Architecture) -> None:
    """Refuse a mesh whose axes, of `sizes` devices, cannot divide a model of configuration `model`.

    tokens: The length of a row.

    Raises ConfigError: with what does not divide.
    """
    names = ("num_heads", "num_value_heads", "num_attn_heads", "num_lact_heads")
    for name in (*names, "num_attention_heads"):
        heads = getattr(model, name, 0)
        if heads % sizes["tensor"]:
            raise ConfigError(
                "config.mesh.tensor must divide the heads of the model. Got: "
                f"tensor={sizes['tensor']}, {name}={heads}."
            )
    chunk = getattr(model, "lact_chunk_size", 0)
    if chunk % sizes["sequence"]:
        raise ConfigError(
            "config.mesh.sequence must divide lact_chunk_size: its devices share the tokens of "
            f"every chunk. Got: sequence={sizes['sequence']}, lact_chunk_size={chunk}."
        )
    if sizes["sequence"] > 1 and tokens % (sizes["sequence"] * model.token_multiple):
        raise ConfigError(
            "config.mesh.sequence gives every device the same number of tokens of a row, a "
            f"multiple of {model.token_multiple} for this model. Got: "
            f"sequence={sizes['sequence']}, sequence_length={tokens}."
        )


def check_room(config: Config, model: Model) -> None:
    """Refuse rows that all memory of the run's machines cannot hold, whatever else is there.

    The backward pass needs the input of each layer, and a host its share of a batch.

    Raises ConfigError: with the bytes that are needed at least, and those that there are.
    """
    length, rows = config.data.sequence_length, rows_at_once(config)
    fields = model.config
    width = jnp.dtype(model.policy.compute_dtype).itemsize
    inputs = fields.num_hidden_layers * rows * length * fields.hidden_size * width
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * jax.process_count()
    devices = host
    if backend() != "cpu":
        known = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        devices = known * jax.device_count() if known else math.inf
    for what, needed, there, name in (
        (f"inputs of the layers for {rows} rows at once", inputs, devices, "micro_batch_size"),
        ("tokens of a batch", 4 * config.train.batch_size * length, host, "batch_size"),
    ):
        if needed > there:
            raise ConfigError(
                f"config.train.{name}: the {what} ({length} tokens each) alone take "
                f"{needed / 2**30:,.1f} GiB, and there are {there / 2**30:,.1f} GiB in all. Lower "
                f"config.train.{name}"
                f"{' or config.train.mini_batch_size' if name[0] == 'm' else ''}."
            )


def rows_at_once(config: Config) -> int:
    """Count the rows of one forward and backward pass of all devices; at most a mini-batch."""
    sizes, train = axis_sizes(), config.train
    return min(train.micro_batch * sizes["data"] * sizes["fsdp"], train.mini_batch)


def training_data(corpus: Corpus | PromptCorpus, config: Config) -> tuple[Dataset, Dataset | None]:
    """Make batches to train on and held-out ones; this process reads the rows its devices hold.

    With data.holdout=0 there are none that are held out.
    """
    size, held_out = config.train.batch_size, rows_at_once(config)
    training = corpus.dataset("train", size, rows_here(size))
    if not config.data.holdout:
        return training, None
    return training, corpus.dataset("validation", held_out, rows_here(held_out))


def check_enough_batches(config: Config, training: Dataset) -> None:
    """Refuse a run that its data ends before.

    Raises ConfigError: data.epochs gives fewer batches than train.steps.
    """
    if training.batches is not None and training.batches < config.train.steps:
        raise ConfigError(
            f"config.data.epochs={config.data.epochs} gives {training.batches} batches, fewer than "
            f"config.train.steps={config.train.steps}. Raise epochs (None: no end) or lower steps."
        )


def data_options(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """List the arguments of `load_corpus`: data section, seed, and the rows that are evaluated."""
    remainder = config.data.min_remainder
    if remainder is None:
        remainder = min(config.refine.tokens_needed, config.data.sequence_length)
    return {
        "options": dataclasses.replace(
            config.data, tokenizer=tokenizer.name, min_remainder=remainder
        ),
        "tokenizer": tokenizer,
        "seed": config.train.seed,
        "validation_rows": config.train.eval_batches * config.train.micro_batch,
    }
