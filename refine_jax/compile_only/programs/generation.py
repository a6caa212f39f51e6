"""The programs of test-time training and of generation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from refine_jax.compile_only.programs.run import EOS, AbstractRun, Program
from refine_jax.generation.copies import copies_programs
from refine_jax.generation.engine import Prefix
from refine_jax.generation.generator import BLOCK, programs_of
from refine_jax.generation.sampling import Sampler
from refine_jax.models.layout import round_length, round_rows
from refine_jax.models.trainable import split
from refine_jax.phases.setup import rows_at_once
from refine_jax.refine.adapt import make_update

_TRAINING = ("midtrain", "posttrain")


def generation_programs(run: AbstractRun) -> dict[str, Callable[[], Program]]:
    """Make the programs that read prompts, and a block of tokens after them."""
    return {"prefill": lambda: _prefill(run), "decode": lambda: _decode(run)}


def adaptation_programs(run: AbstractRun) -> dict[str, Callable[[], Program]]:
    """Make the programs that train on prompts before they are answered."""
    return {"adaptation": lambda: _adaptation(run)}


def _copies(run: AbstractRun) -> int:
    options = run.config.testtime
    shared = run.config.phase != "testtime" or options.reset != "example"
    return 1 if shared else options.copies


def _stacked(run: AbstractRun, tree: Any) -> Any:
    """Copy the tree for each prompt, [copies, ...], where each adapts one of its own."""
    if _copies(run) == 1:
        return tree
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((_copies(run), *x.shape), x.dtype), tree)


def _longest(run: AbstractRun) -> int:
    """Count the tokens of the longest prompt that is known of."""
    config = run.config
    if config.phase in _TRAINING:
        return config.data.sequence_length
    known = [length for length in config.evaluate.token_lengths if length is not None]
    if config.evaluate.max_tokens is not None:
        known = [min(length, config.evaluate.max_tokens) for length in known]
        known = known or [config.evaluate.max_tokens]
    return max(known, default=config.generation.prefill_tokens)


def _prompts(run: AbstractRun) -> int:
    """Count the prompts that are answered together."""
    config = run.config
    if config.phase in _TRAINING:
        return rows_at_once(config)
    if config.phase == "testtime":
        options = config.testtime
        return options.copies if options.reset == "example" else options.batch_size
    return config.evaluate.batch_size


def _prompt_rows(run: AbstractRun, *rows: int) -> dict[str, Any]:
    length = round_length(_longest(run))
    return {name: run.shapes.integers(*rows, length) for name in ("tokens", "segments")}


def _adaptation(run: AbstractRun) -> Program:
    options, copies = run.config.testtime, _copies(run)
    update = make_update(run.model, run.optimizer, run.config.refine, options, eos_id=EOS)
    rows = copies if options.reset == "example" else options.batch_size
    batch = _prompt_rows(run, *((copies, 1) if copies > 1 else (rows,)))
    state = dataclasses.replace(run.state, frozen=None)
    if copies > 1:
        state = run.shapes.state(_stacked(run, state))
    trained, _ = split(run.unplaced_params, run.config.train.trainable)
    tokens = rows * round_length(_longest(run))
    return Program(
        "adaptation",
        f"update on {rows} prompts of {round_length(_longest(run))} tokens",
        update,
        (state, batch, run.state.frozen),
        resident=(run.shapes.state(trained),),  # as they were before
        model_flops=run.operations(tokens, _longest(run), trained=1),
    )


def _generation(run: AbstractRun) -> tuple[Callable, Callable, Callable]:
    if _copies(run) > 1:
        return copies_programs(run.model)
    programs = programs_of(run.model.config, run.model.policy, EOS)
    return programs.prefill, programs.advance, programs.decode


def _params(run: AbstractRun) -> tuple:
    """The parameters as the programs take them: of copies, what they share comes first."""
    if _copies(run) == 1:
        return (run.params,)
    trained, _ = split(run.unplaced_params, run.config.train.trainable)
    return run.state.frozen, run.shapes.state(_stacked(run, trained))


def _prefill(run: AbstractRun) -> Program:
    most = run.config.generation.prefill_tokens
    length, rows = round_length(min(_longest(run), most)), round_rows(_prompts(run))
    while _copies(run) == 1 and rows > 1 and rows * length > most:
        rows = round_rows(rows // 2)
    return Program(
        "prefill",
        f"{rows} prompts of {length} tokens read",
        _generation(run)[0],
        (*_params(run), run.shapes.integers(rows, length), run.shapes.integers(rows)),
        model_flops=run.operations(rows * length, length, read=1),
        compared=run.config.phase in _TRAINING,
    )


def _decode(run: AbstractRun) -> Program:
    rows, shapes, prefill = round_rows(_prompts(run)), run.shapes, _prefill(run)
    params = _params(run)
    # The state after a prompt does not depend on the prompt's length, but for the room of caches.
    prompts = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, 64), (rows,))]
    read = jax.eval_shape(prefill.function, *params, *prompts)
    answer = max(run.config.generation.max_new_tokens or 0, BLOCK)  # None: tasks say how many
    room = run.model.room_after(_longest(run) + answer - BLOCK, BLOCK)
    state = jax.eval_shape(lambda state: run.model.resize(state, room), read.state)
    prefix = Prefix(shapes.rows(state, axis=1), shapes.rows(read.hidden), shapes.rows(read.length))
    sampler = Sampler(*(shapes.scalar(x) for x in (jnp.float32, jnp.int32, jnp.float32)))
    return Program(
        "decode",
        f"{BLOCK} tokens after each of {rows} prompts",
        _generation(run)[2],
        (*params, prefix, run.keys(rows), sampler, shapes.integers(rows)),
        model_flops=run.operations(rows * BLOCK, _longest(run), read=1),
        compared=prefill.compared,
    )
