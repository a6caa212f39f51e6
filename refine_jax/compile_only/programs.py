"""The programs of a run, with the shapes and the places of their arguments but no data.

What the phases compile while they run is built here from the configuration alone: neither documents
nor parameters are read, of a checkpoint only its config.json.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from refine_jax.compile_only.flops import forward_flops
from refine_jax.config import Config
from refine_jax.generation.copies import copies_programs
from refine_jax.generation.engine import Prefix, round_length, round_rows
from refine_jax.generation.generator import BLOCK, PIECES, programs_of
from refine_jax.generation.sampling import Sampler
from refine_jax.models.transformer import Model
from refine_jax.parallel import is_spread, partition_spec, state_shardings
from refine_jax.phases.setup import Start, load_start, make_model
from refine_jax.refine.adapt import update_copies
from refine_jax.refine.answer_step import make_policy_programs, make_supervised_update
from refine_jax.refine.answers import AnswerMethod
from refine_jax.refine.method import Method
from refine_jax.refine.optimizer import make_optimizer
from refine_jax.refine.step import TrainState, make_eval_step, make_step_programs, update_rows
from refine_jax.settings import ConfigError

CONFIG = "config.json"
# Documents and prompts are read with a tokenizer whose special tokens change no shape.
_EOS, _PAD = 2, 0


@dataclasses.dataclass(frozen=True)
class Program:
    """One program and how it is called.

    function: jitted. args: pytrees of ShapeDtypeStruct, and static arguments as they are.
    runs: in a training step; 0: at other times. resident: trees of what else is in memory while it
    runs. model_flops: operations of one run that the method asks for, on all devices: one forward
    pass over each token read or sampled, three where it is trained on, nothing computed again.
    compared: not a part of the run, compiled to compare with.
    """

    name: str
    meaning: str
    function: Callable
    args: tuple
    runs: int = 0
    resident: tuple = ()
    model_flops: float = 0.0
    compared: bool = False


def describe_model(config: Config) -> Start:
    """The model of the run, by its config.json or the fields of `model.fresh`; no parameters.

    Raises:
      ConfigError, ModelConfigError: Neither describes a model.
    """
    if config.model.checkpoint is not None:
        folder = epath.Path(config.model.checkpoint).expanduser()
        for found in (folder / "checkpoints" / CONFIG, folder / CONFIG):
            if found.is_file():
                text = found.read_text()
                return Start(json.loads(text), text, None, {}, None)
        if "model_type" not in (config.model.fresh or {}):
            raise ConfigError(
                f"config.model.checkpoint has no {CONFIG}, and there is no config.model.fresh to "
                f"describe the model instead. Got: {folder}."
            )
    # No run has this name: what is compiled does not depend on what a work folder holds.
    return load_start(dataclasses.replace(config.model, checkpoint=None), epath.Path("/dev/null"))


class Shapes:
    """Arrays of a run as shapes with their places.

    device: where everything is without an ambient mesh.
    """

    def __init__(self, device: jax.Device):
        self._device = device

    def state(self, tree: Any) -> Any:
        """Parameters, or a state that holds them."""
        return self._place(tree, state_shardings(tree))

    def rows(self, tree: Any, axis: int = 0) -> Any:
        """Arrays with rows of a batch along an axis."""
        if not is_spread():
            return self._place(tree, None)
        mesh = jax.sharding.get_mesh()
        names = (*(None,) * axis, "batch")
        shardings = jax.tree.map(
            lambda x: NamedSharding(mesh, partition_spec(x.shape, names, mesh)), tree
        )
        return self._place(tree, shardings)

    def copies(self, tree: Any) -> Any:
        """Arrays that every device has."""
        if not is_spread():
            return self._place(tree, None)
        whole = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
        return self._place(tree, jax.tree.map(lambda _: whole, tree))

    def _place(self, tree: Any, shardings: Any) -> Any:
        if shardings is None:
            single = SingleDeviceSharding(self._device)
            shardings = jax.tree.map(lambda _: single, tree)
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            tree,
            shardings,
        )

    def integers(self, *shape: int) -> jax.ShapeDtypeStruct:
        """Whole numbers of rows [B, ...]."""
        return self.rows(jax.ShapeDtypeStruct(shape, jnp.int32))

    def scalar(self, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """A number."""
        return self.copies(jax.ShapeDtypeStruct((), dtype))


class Run:
    """All programs of a configuration; each is made when it is asked for.

    device: one of those that are compiled for. Programs are made for the ambient mesh, under which
    a Run itself cannot be made where its devices are not there.
    """

    def __init__(self, config: Config, device: jax.Device):
        self.config = config
        self.model = make_model(describe_model(config), config.model)
        dtype = jnp.dtype(config.model.param_dtype)
        self._params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype), self.model.abstract_params()
        )
        self._shapes = Shapes(device)

    def programs(self) -> dict[str, Callable[[], Program]]:
        """What makes each program, by name."""
        phase = self.config.phase
        found = {}
        if phase == "midtrain" or (phase == "posttrain" and self.config.posttrain.nested):
            found |= self._training()
        if phase == "posttrain":
            found |= self._answers()
        if phase in ("midtrain", "posttrain"):
            found["evaluation"] = self._evaluation
        if phase == "testtime":
            found["adaptation"] = self._adaptation
        return found | {"prefill": self._prefill, "decode": self._decode}

    # What the programs work on

    @functools.cached_property
    def params(self) -> Any:
        """The parameters."""
        return self._shapes.state(self._params)

    @functools.cached_property
    def optimizer(self):
        """The optimizer."""
        return make_optimizer(self.config.optimizer, steps=self.config.train.steps)

    @functools.cached_property
    def state(self) -> TrainState:
        """What a step changes."""

        def create(params):
            key = jax.random.key(0)
            return TrainState.create(params, self.optimizer, key, self.config.refine)

        return self._shapes.state(jax.eval_shape(create, self._params))

    def _keys(self, rows: int) -> jax.ShapeDtypeStruct:
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
        return self._shapes.rows(keys)

    def _batch(self, rows: int, *, answers: bool = False) -> dict[str, Any]:
        config, length = self.config, self.config.data.sequence_length
        batch = {"tokens": self._shapes.integers(rows, length)}
        full = config.data.chunking == "first" and not config.data.pack
        if config.phase != "midtrain" or not full or (config.data.min_tokens or length) < length:
            batch["segments"] = self._shapes.integers(rows, length)
        if answers:
            batch["answer_mask"] = self._shapes.integers(rows, length)
        return batch

    @property
    def _rollout_tokens(self) -> int:
        refine = self.config.refine
        return refine.num_positions * refine.rollouts_per_position * refine.rollout_length

    def _flops(self, rows: int, *, trunk: float, rollouts: float) -> float:
        """Of rows whose tokens, and those of their rollouts, go through so many forward passes."""
        length = self.config.data.sequence_length
        tokens = rows * (trunk * length + rollouts * self._rollout_tokens)
        return tokens * forward_flops(self.model.config, length)

    # Training

    def _step_programs(self, refine) -> Any:
        config = self.config
        return make_step_programs(
            self.model,
            self.optimizer,
            refine,
            mini_batch=config.train.mini_batch,
            micro_batch=config.train.micro_batch,
            eos_id=_EOS,
            max_documents=config.data.max_documents if config.data.pack else 1,
        )

    def _training(self) -> dict[str, Callable[[], Program]]:
        train = self.config.train
        if self.config.refine.objective == "ntp":
            return {"update": lambda: self._update("ntp", compared=False)}
        found = {"update": lambda: self._update("refine", compared=False)}
        if train.batch_size != train.micro_batch:
            found = {"collect": self._collect, **found}
        compared = not (self.config.phase == "midtrain" and train.warmup_ntp_steps)
        return found | {"ntp_update": lambda: self._update("ntp", compared=compared)}

    def _collect(self) -> Program:
        rows = self.config.train.batch_size
        return Program(
            "collect",
            f"forward, selection and rollouts of {rows} rows",
            self._step_programs(self.config.refine).collect,
            (self.state, self._batch(rows)),
            runs=1,
            model_flops=self._flops(rows, trunk=1, rollouts=2),
        )

    def _update(self, objective: str, *, compared: bool) -> Program:
        train = self.config.train
        rows, updates = train.mini_batch, train.updates_per_step
        refine = dataclasses.replace(self.config.refine, objective=objective)
        programs = self._step_programs(refine)
        batch, experience, rollouts = self._batch(train.batch_size), None, 0
        if objective == "refine":
            rollouts = 3 + (train.batch_size == train.micro_batch)
            if train.batch_size != train.micro_batch:
                collected = jax.eval_shape(programs.collect, self.state, batch)
                experience = self._shapes.rows(collected)
        name = "update" if objective == self.config.refine.objective else "ntp_update"
        wording = "ReFINE" if objective == "refine" else "next-token"
        return Program(
            name,
            f"{wording} update by {rows} rows, {train.micro_batch} at a time",
            programs.update,
            (self.state, batch, experience, self._shapes.scalar(), updates),
            runs=0 if compared else updates,
            model_flops=self._flops(rows, trunk=3, rollouts=rollouts),
            compared=compared,
        )

    def _evaluation(self) -> Program:
        rows, config = self.config.train.micro_batch, self.config
        pack = config.data.max_documents if config.data.pack else 1
        step = make_eval_step(self.model, config.refine, eos_id=_EOS, max_documents=pack)
        key = self._shapes.copies(jax.eval_shape(lambda: jax.random.key(0)))
        return Program(
            "evaluation",
            f"forward, selection and rollouts of {rows} held-out rows",
            step,
            (self.state.params, self._batch(rows), key),
            resident=(self.state,),
            model_flops=self._flops(rows, trunk=1, rollouts=2),
        )

    # Answers

    @functools.cached_property
    def _method(self) -> AnswerMethod:
        tokens = self.config.prompts.max_answer_tokens
        return AnswerMethod(
            self.model, self.config.refine, max_answer_tokens=tokens, eos_id=_EOS, pad_id=_PAD
        )

    def _answers(self) -> dict[str, Callable[[], Program]]:
        if self.config.posttrain.answers == "sft":
            return {"answer_update": self._supervised}
        return {"answer_collect": self._sample, "answer_update": self._policy}

    @property
    def _answer_sizes(self) -> dict[str, int]:
        train = self.config.train
        mini_batch = self.config.posttrain.mini_batch_size or train.batch_size
        return {"mini_batch": mini_batch, "micro_batch": train.micro_batch}

    def _answer_update(self, update: Callable, inputs: Any, samples: int) -> Program:
        sizes, rows = self._answer_sizes, self.config.train.batch_size
        updates = rows // sizes["mini_batch"]
        length, tokens = self.config.data.sequence_length, self.config.prompts.max_answer_tokens
        each = length + samples * tokens
        flops = 3 * sizes["mini_batch"] * each * forward_flops(self.model.config, length)
        return Program(
            "answer_update",
            f"update on the answers of {sizes['mini_batch']} rows",
            update,
            (self.state, inputs, self._shapes.scalar(), updates),
            runs=updates,
            model_flops=flops,
        )

    def _supervised(self) -> Program:
        update = make_supervised_update(self._method, self.optimizer, **self._answer_sizes)
        batch = self._batch(self.config.train.batch_size, answers=True)
        return self._answer_update(update, batch, 0)

    @functools.cached_property
    def _policy_programs(self) -> Any:
        return make_policy_programs(
            self._method,
            self.optimizer,
            samples=self.config.posttrain.samples,
            temperature=self.config.refine.sampling_temperature,
            **self._answer_sizes,
        )

    def _sample(self) -> Program:
        rows, length = self.config.train.batch_size, self.config.data.sequence_length
        sampled = self.config.posttrain.samples * self.config.prompts.max_answer_tokens
        return Program(
            "answer_collect",
            f"{self.config.posttrain.samples} answers to each of {rows} prompts",
            self._policy_programs.collect,
            (self.state.params, self._batch(rows, answers=True), self._keys(rows)),
            runs=1,
            resident=(self.state,),
            model_flops=rows * (length + sampled) * forward_flops(self.model.config, length),
        )

    def _policy(self) -> Program:
        sample = self._sample()
        answers = self._shapes.rows(jax.eval_shape(sample.function, *sample.args))
        rewards = (self.config.train.batch_size, self.config.posttrain.samples)
        advantages = jax.eval_shape(
            self._policy_programs.advantages, jax.ShapeDtypeStruct(rewards, jnp.float32), answers
        )
        inputs = (sample.args[1], answers, self._shapes.rows(advantages))
        return self._answer_update(
            self._policy_programs.update, inputs, self.config.posttrain.samples
        )

    # Test time and generation

    @property
    def _copies(self) -> int:
        options = self.config.testtime
        shared = self.config.phase != "testtime" or options.reset != "example"
        return 1 if shared else options.copies

    def _stacked(self, tree: Any) -> Any:
        """With a copy for each prompt, where each adapts one of its own."""
        if self._copies == 1:
            return tree
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self._copies, *x.shape), x.dtype), tree
        )

    def _adaptation(self) -> Program:
        options, length = self.config.testtime, round_length(self._longest)
        rows = 1 if options.reset == "example" else options.mini_batch_size
        batch = {name: (rows, length) for name in ("tokens", "segments")}
        if options.reset != "example":
            batch = {name: (options.batch_size, length) for name in batch}
        shapes = self._shapes
        state = self.state
        if options.reset == "example":
            method = Method(self.model, self.config.refine, eos_id=_EOS, max_documents=1)
            update = update_rows if self._copies == 1 else update_copies
            function = jax.jit(
                functools.partial(update, method, self.optimizer), donate_argnums=0
            )
            if self._copies > 1:
                state = shapes.state(self._stacked(self.state))
                batch = {name: (self._copies, *shape) for name, shape in batch.items()}
            args = (state, {name: shapes.integers(*shape) for name, shape in batch.items()})
            rows = self._copies
        else:
            programs = make_step_programs(
                self.model,
                self.optimizer,
                self.config.refine,
                mini_batch=rows,
                micro_batch=options.micro_batch,
                eos_id=_EOS,
            )
            batch = {name: shapes.integers(*shape) for name, shape in batch.items()}
            experience = None
            if self.config.refine.objective == "refine" and options.batch_size != rows:
                experience = shapes.rows(jax.eval_shape(programs.collect, state, batch))
            function = programs.update
            args = (state, batch, experience, shapes.scalar(), options.batch_size // rows)
        flops = 3 * rows * length * forward_flops(self.model.config, length)
        return Program(
            "adaptation",
            f"update on {rows} prompts of {length} tokens",
            function,
            args,
            resident=(self.params,),
            model_flops=flops,
        )

    @property
    def _longest(self) -> int:
        """Tokens of the longest prompt that is known of."""
        config = self.config
        if config.phase in ("midtrain", "posttrain"):
            return config.data.sequence_length
        known = [length for length in config.evaluate.token_lengths if length is not None]
        limit = config.evaluate.max_tokens
        if limit is not None:
            known = [min(length, limit) for length in known] or [limit]
        return max(known, default=config.generation.prefill_tokens)

    @property
    def _prompts(self) -> int:
        """Prompts that are answered together."""
        if self.config.phase in ("midtrain", "posttrain"):
            return self.config.train.micro_batch
        if self.config.phase == "testtime":
            options = self.config.testtime
            return options.copies if options.reset == "example" else options.batch_size
        return self.config.evaluate.batch_size

    def _generation(self) -> tuple[Any, Any, Any]:
        if self._copies > 1:
            return copies_programs(self.model)
        programs = programs_of(self.model.config, self.model.policy, _EOS)
        return programs.prefill, programs.advance, programs.decode

    def _prefill(self) -> Program:
        most = self.config.generation.prefill_tokens
        length, rows = round_length(min(self._longest, most)), round_rows(self._prompts)
        while self._copies == 1 and rows > 1 and rows * length > most:
            rows = round_rows(rows // 2)
        tokens, lengths = self._shapes.integers(rows, length), self._shapes.integers(rows)
        return Program(
            "prefill",
            f"{rows} prompts of {length} tokens read",
            self._generation()[0],
            (self._shapes.state(self._stacked(self._params)), tokens, lengths),
            model_flops=rows * length * forward_flops(self.model.config, length),
            compared=self.config.phase in ("midtrain", "posttrain"),
        )

    def _decode(self) -> Program:
        rows = round_rows(self._prompts)
        shapes, prefill = self._shapes, self._prefill()
        params, _, _ = prefill.args
        tokens, lengths = (
            jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, PIECES[-1]), (rows,))
        )
        read = jax.eval_shape(prefill.function, params, tokens, lengths)
        prefix = Prefix(
            shapes.rows(read.state, axis=1), shapes.rows(read.hidden), shapes.rows(read.length)
        )
        sampler = Sampler(*(shapes.scalar(x) for x in (jnp.float32, jnp.int32, jnp.float32)))
        return Program(
            "decode",
            f"{BLOCK} tokens after each of {rows} prompts",
            self._generation()[2],
            (params, prefix, self._keys(rows), sampler, shapes.integers(rows)),
            model_flops=rows * BLOCK * forward_flops(self.model.config, self._longest),
            compared=prefill.compared,
        )
