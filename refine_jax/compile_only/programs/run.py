"""What the programs of a run are made of: its model and state as shapes with their places."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from refine_jax.base.errors import CheckpointError, ConfigError
from refine_jax.base.files import parse_object, path_of, read_text
from refine_jax.base.hub import is_hub
from refine_jax.checkpoint.folders import CONFIG, ModelCheckpoint
from refine_jax.checkpoint.hub import fetch
from refine_jax.checkpoint.tree import flatten
from refine_jax.compile_only.estimate.flops import forward_flops
from refine_jax.config import Config
from refine_jax.models.lora import linear_maps
from refine_jax.models.trainable import split
from refine_jax.parallel import is_spread, partition_spec, state_shardings
from refine_jax.phases.setup import abstract_params, load_start, make_model, with_updates
from refine_jax.refine.objective import Objective
from refine_jax.refine.optimizer import make_optimizer
from refine_jax.refine.step import TrainState, states_together

# A run reads documents and prompts with a tokenizer, whose special tokens change no shape.
EOS, PAD = 2, 0


@dataclasses.dataclass(frozen=True)
class Program:
    """One program and how it is called.

    function: jitted. args: pytrees of ShapeDtypeStruct, and static arguments as they are.
    runs: in a training step; 0: at other times. resident: trees of what else is in memory while it
    runs. states: trees of the decode states of forks that are there at once. model_flops:
    operations of one run that the method asks for, on all devices and with nothing computed again
    (`AbstractRun.operations`). compared: not a part of the run, compiled to compare with.
    """

    name: str
    meaning: str
    function: Callable
    args: tuple
    runs: int = 0
    resident: tuple = ()
    states: tuple = ()
    model_flops: float = 0.0
    compared: bool = False


def describe_model(config: Config) -> ModelCheckpoint:
    """Describe the run's model, by config.json or `model.fresh`, without parameters.

    Raises ConfigError, ModelConfigError: neither describes a model.
    """
    if config.model.checkpoint is not None:
        folder = config.model.checkpoint
        folder = fetch(folder, only=(CONFIG,)) if is_hub(folder) else path_of(folder)
        for file in (folder / "checkpoints" / CONFIG, folder / CONFIG):
            if file.is_file():
                text = read_text(file, CheckpointError)
                fields = parse_object(text, file, CheckpointError)
                return ModelCheckpoint(fields, text)
        if "model_type" not in (config.model.fresh or {}):
            raise ConfigError(
                f"config.model.checkpoint has no {CONFIG}, and there is no config.model.fresh to "
                f"describe the model instead. Got: {folder}."
            )
    # No run has this name, so that no work folder changes what is compiled.
    return load_start(dataclasses.replace(config.model, checkpoint=None), Path("/dev/null"))


class Shapes:
    """Arrays of a run as shapes with their places.

    device: where everything is without an ambient mesh.
    """

    def __init__(self, device: jax.Device):
        self._device = device

    def state(self, tree: Any) -> Any:
        """Place parameters, or a state that holds them."""
        return self._place(tree, state_shardings(tree))

    def rows(self, tree: Any, axis: int = 0) -> Any:
        """Place arrays with rows of a batch along an axis."""
        return self._spread(tree, (*(None,) * axis, "batch"))

    def states(self, tree: Any) -> Any:
        """Place decode states; their leaves are [L, B, R, H, ...], or small."""
        return self._spread(tree, (None, "batch", None, "heads"))

    def copies(self, tree: Any) -> Any:
        """Place arrays that every device has."""
        if not is_spread():
            return self._place(tree, None)
        whole = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
        return self._place(tree, jax.tree.map(lambda _: whole, tree))

    def _spread(self, tree: Any, names: tuple[str | None, ...]) -> Any:
        if not is_spread():
            return self._place(tree, None)
        mesh = jax.sharding.get_mesh()
        shardings = jax.tree.map(
            lambda x: NamedSharding(mesh, partition_spec(x.shape, names, mesh)), tree
        )
        return self._place(tree, shardings)

    def _place(self, tree: Any, shardings: Any) -> Any:
        if shardings is None:
            single = SingleDeviceSharding(self._device)
            shardings = jax.tree.map(lambda _: single, tree)
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings
        )

    def integers(self, *shape: int) -> jax.ShapeDtypeStruct:
        """Make whole numbers of rows [B, ...]."""
        return self.rows(jax.ShapeDtypeStruct(shape, jnp.int32))

    def scalar(self, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """Make a number."""
        return self.copies(jax.ShapeDtypeStruct((), dtype))


class AbstractRun:
    """The model of a configuration, and its arrays.

    device: one of those that are compiled for. Arrays are placed on the ambient mesh, under which a
    run itself cannot be made where its devices are not there.
    """

    def __init__(self, config: Config, device: jax.Device):
        self.config = config
        start = describe_model(config)
        self.model = make_model(start, config.model)
        start = with_updates(start, self.model, config)
        self.unplaced_params = abstract_params(self.model, start, config)
        self.shapes = Shapes(device)

    @functools.cached_property
    def params(self) -> Any:
        """The parameters."""
        return self.shapes.state(self.unplaced_params)

    @functools.cached_property
    def optimizer(self):
        """The optimizer."""
        return make_optimizer(self.config.optimizer, steps=self.config.train.steps)

    @functools.cached_property
    def state(self) -> TrainState:
        """What a step changes."""

        def create(params):
            key, (trained, frozen) = jax.random.key(0), split(params, self.config.train.trainable)
            return TrainState.create(trained, self.optimizer, key, self.config.refine, frozen)

        return self.shapes.state(jax.eval_shape(create, self.unplaced_params))

    @property
    def max_documents(self) -> int:
        """Most documents of a row."""
        return self.config.data.max_documents if self.config.data.pack else 1

    def keys(self, rows: int) -> jax.ShapeDtypeStruct:
        """Make random keys of rows."""
        return self.shapes.rows(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)))

    def batch(self, rows: int, *, answers: bool = False) -> dict[str, Any]:
        """Make a batch as the phase's data pipeline does."""
        config, length = self.config, self.config.data.sequence_length
        batch = {"tokens": self.shapes.integers(rows, length)}
        full = config.data.chunking == "first" and not config.data.pack
        if config.phase != "midtrain" or not full or (config.data.min_tokens or length) < length:
            batch["segments"] = self.shapes.integers(rows, length)
        if answers:
            batch["answer_mask"] = self.shapes.integers(rows, length)
        return batch

    def rollout_states(
        self,
        batch: dict[str, Any],
        parts: int = 1,
        max_documents: int = 1,
        *,
        together: bool = True,
    ) -> tuple:
        """Make the decode states that exist at once where the rows of a batch roll out.

        parts: of the batch that forward passes read one by one. together: as many of them roll out
        at once as `states_together` says; else each for itself.
        """
        changes = {"objective": "refine", "estimator": "rollouts"}
        config = dataclasses.replace(self.config.refine, **changes)
        objective = Objective(self.model, config, eos_id=EOS, max_documents=max_documents)
        count, states = states_together(objective, self.params, batch, parts)
        return (self.shapes.states(states),) * (count if together else 1)

    def operations(self, tokens: int, length: int, *, read: int = 0, trained: int = 0) -> float:
        """Count the operations of `tokens` in rows of `length` that the method asks for.

        read: forward passes over each of them. trained: gradients. A gradient takes three passes,
        but that of a frozen matrix is not made, which is a third of what the matrix takes.
        """
        forward = forward_flops(self.model.config, length) + 2 * self._updates
        return tokens * ((read + 3 * trained) * forward - 2 * trained * self._frozen_weights)

    @functools.cached_property
    def _updates(self) -> int:
        """Parameters of low-rank updates."""
        named = flatten(self.unplaced_params).items()
        return sum(x.size for name, x in named if name.endswith(("lora_A", "lora_B")))

    @functools.cached_property
    def _frozen_weights(self) -> int:
        """Parameters of frozen matrices that every token is multiplied with."""
        frozen = split(self.unplaced_params, self.config.train.trainable)[1]
        if frozen is None:
            return 0
        matrices = linear_maps(frozen) | self.model.head_params(frozen)
        return sum(x.size for x in jax.tree.leaves(matrices))

    def row_operations(
        self, rows: int, of_rows: dict[str, int], of_rollouts: dict[str, int]
    ) -> float:
        """Count operations of rows and of their rollouts, by `read` and `trained` of either."""
        config, length = self.config.refine, self.config.data.sequence_length
        rollout_tokens = config.num_positions * config.rollouts_per_position * config.rollout_length
        return self.operations(rows * length, length, **of_rows) + self.operations(
            rows * rollout_tokens, length, **of_rollouts
        )
