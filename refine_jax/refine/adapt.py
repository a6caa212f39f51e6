"""Test-time training: ReFINE, or next-token training, on prompts before they are answered.

`make_update` compiles the step; an `Adapter` keeps the parameters between prompts as
`testtime.reset` says:

    example   every prompt adapts a copy of the trained parameters. Its padded length, its random
              numbers and its optimizer state depend on that prompt alone, so results do not depend
              on what else is evaluated, or in which order.
    batch     the trained parameters come back before each batch of prompts.
    never     parameters and optimizer state carry over from batch to batch, as in the official
              code: a prompt's result depends on all those before it.

A prompt that is too short for rollouts (`has_rollouts`) is trained on by next-token loss alone, one
without any next token not at all; the `Cost` of each prompt says so.
"""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from refine_jax.config import RefineConfig, TestTimeConfig
from refine_jax.models.layout import row_length
from refine_jax.models.trainable import join, split
from refine_jax.models.transformer import Model, Params
from refine_jax.refine.objective import Metrics, Objective
from refine_jax.refine.reading import Batch
from refine_jax.refine.step import TrainState, make_train_step, update_rows


class Cost(NamedTuple):
    """What adapting to one prompt took."""

    seconds: float  # of its group, divided by the prompts of the group
    steps: int  # passes over the prompt; 0: it has no next token, nothing was changed for it
    tokens: int  # prompt tokens read, of all passes
    rollout_tokens: int  # sampled and scored, of all passes; 0: next-token training only
    skipped: int  # updates of its group that were left out, as gradients were not finite
    compiled: bool  # the seconds include compilation
    loss: float  # next-token loss of the last pass before its update (nats), mean over the group


class Adapted(NamedTuple):
    """Parameters to answer a group of prompts with.

    params: where the Adapter's `copies` n is above 1, those that are trained, leaves [n, ...] with
        one copy a prompt (a smaller group leaves the last ones unused); else all, one set for all
        prompts.
    """

    params: Params
    costs: list[Cost]


def has_rollouts(tokens: int, config: RefineConfig) -> bool:
    """Whether rollouts fit into a prompt of so many tokens, by the rules of `selection`.

    Below `config.tokens_needed` they overlap.
    """
    if config.selection == "all":
        return config.objective == "refine" and tokens > config.rollout_length
    margin = max(config.edge_margin, config.rollout_length)
    return config.objective == "refine" and tokens >= max(config.num_positions, margin + 1)


def pad_rows(
    prompts: Sequence[Sequence[int]], *, rows: int, length: int, pad_id: int
) -> dict[str, np.ndarray]:
    """Pad prompts on the right and below: {"tokens", "segments"} [rows, length] int32."""
    tokens = np.full((rows, length), pad_id, np.int32)
    segments = np.zeros((rows, length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        segments[row, : len(prompt)] = 1
    return {"tokens": tokens, "segments": segments}


def prompt_key(key: jax.Array, name: str) -> jax.Array:
    """Derive the random key, a scalar, of the prompt of that name, the same everywhere."""
    for word in np.frombuffer(hashlib.blake2b(name.encode(), digest_size=8).digest(), "<u4"):
        key = jax.random.fold_in(key, word)
    return key


def make_update(
    model: Model,
    optimizer: optax.GradientTransformation,
    config: RefineConfig,
    options: TestTimeConfig,
    *,
    eos_id: int | Sequence[int] | None,
) -> Callable[[TrainState, Batch, Params | None], tuple[TrainState, Metrics]]:
    """Compile `update(state, batch, frozen)` as `options.reset` says.

    It gives the state's buffers away, but not those of the frozen parameters, which the state
    lacks. With `example` batches have a row, or, with n copies, leaves of states and batches a
    leading n; these share what is frozen.
    """
    if options.reset != "example":
        run = make_train_step(
            model,
            optimizer,
            config,
            mini_batch=options.mini_batch_size,
            micro_batch=options.micro_batch,
            eos_id=eos_id,
            steps=options.steps,
        ).run
    else:
        objective = Objective(model, config, eos_id=eos_id, max_documents=1)
        run = functools.partial(update_rows, objective, optimizer, steps=options.steps)

    def update(state: TrainState, batch: Batch, frozen: Params | None):
        state, metrics = run(dataclasses.replace(state, frozen=frozen), batch)
        return dataclasses.replace(state, frozen=None), metrics

    several = options.reset == "example" and options.copies > 1
    return jax.jit(jax.vmap(update, (0, 0, None)) if several else update, donate_argnums=0)


class Adapter:
    """Adapts a model to prompts, group by group.

    model, params: the trained model; `params` are left as they are. optimizer: of one training on a
    prompt, or, with reset `never`, of all of them. config: the objective and its numbers. options:
    how much, and when to reset. key: random key of all rollouts. eos_id: see `Objective`. pad_id:
    any token. trainable: which parameters are adapted (models/trainable.py).

    Attributes:
      frozen: the parameters that are not adapted, which all copies share; None: all are.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        optimizer: optax.GradientTransformation,
        config: RefineConfig,
        options: TestTimeConfig,
        *,
        key: jax.Array,
        eos_id: int | Sequence[int] | None,
        pad_id: int,
        trainable: str = "all",
    ):
        self._trained, self.frozen = split(params, trainable)
        self._config, self._options = config, options
        self._key, self._pad_id = key, pad_id
        self._state: TrainState | None = None  # of reset `never`, between groups
        self._compiled: set[tuple[int, int]] = set()

        def fresh(params: Params, key: jax.Array) -> TrainState:
            # Copies: steps give the arrays of their state away.
            params = jax.tree.map(jnp.copy, params)
            return TrainState.create(params, optimizer, key, config)

        self._fresh = jax.jit(fresh if self.copies == 1 else jax.vmap(fresh, (None, 0)))
        self._update = make_update(model, optimizer, config, options, eos_id=eos_id)

    @property
    def copies(self) -> int:
        """Copies of the parameters that adapt at once; 1: one set, without a copy axis."""
        return self._options.copies if self._options.reset == "example" else 1

    @property
    def group_size(self) -> int:
        """The most prompts that `adapt` takes at once."""
        return self.copies if self._options.reset == "example" else self._options.batch_size

    @property
    def shares_parameters(self) -> bool:
        """Whether a group of prompts is answered with one set of parameters."""
        return self._options.reset != "example"

    @property
    def carries_over(self) -> bool:
        """Whether a group's parameters depend on the groups before it."""
        return self._options.reset == "never"

    def adapt(self, prompts: Sequence[Sequence[int]], names: Sequence[str]) -> Adapted:
        """Adapt to the next group of prompts, given as token ids.

        names: one a prompt, from which all random numbers derive: with reset `example` from each
        prompt's own, with `batch` from the group's first, with `never` from the first of all. With
        `example`, the prompts of a group must have the same `row_length`.
        """
        begin = time.perf_counter()
        if self._options.reset == "example":
            params, metrics, shape = self._adapt_each(prompts, names)
        else:
            params, metrics, shape = self._adapt_together(prompts, names)
        jax.block_until_ready(params)
        compiled = shape is not None and shape not in self._compiled
        self._compiled.add(shape)
        seconds = (time.perf_counter() - begin) / len(prompts)
        losses = np.broadcast_to(np.asarray(metrics.get("loss/ntp", np.nan)), len(prompts))
        skipped = np.broadcast_to(np.asarray(metrics.get("update/skipped", 0)), len(prompts))
        costs = [
            self._cost(len(prompt), seconds, int(left_out), compiled, float(loss))
            for prompt, left_out, loss in zip(prompts, skipped, losses, strict=True)
        ]
        return Adapted(params, costs)

    def _cost(self, tokens: int, seconds: float, skipped: int, compiled: bool, loss: float) -> Cost:
        config = self._config
        steps = self._options.steps if tokens > 1 else 0
        sampled = config.estimator == "rollouts"
        rollouts = config.num_positions * config.rollouts_per_position * sampled
        rollout_tokens = rollouts * config.rollout_length * has_rollouts(tokens, config)
        return Cost(seconds, steps, steps * tokens, steps * rollout_tokens, skipped, compiled, loss)

    def _adapt_each(self, prompts, names):
        keys = [prompt_key(self._key, name) for name in names]
        if max(map(len, prompts)) < 2:
            if self.copies == 1:
                return join(self._trained, self.frozen), {}, None
            return jax.tree.map(lambda x: jnp.stack([x] * self.copies), self._trained), {}, None
        length = row_length(len(prompts[0]))
        if self.copies == 1:
            state = self._fresh(self._trained, keys[0])
            batch = pad_rows(prompts, rows=1, length=length, pad_id=self._pad_id)
        else:
            # A smaller group is filled up, so that it runs in the same program.
            missing = self.copies - len(prompts)
            rows = [*prompts, *prompts[:1] * missing]
            keys = jnp.stack(keys + keys[:1] * missing)
            state = self._fresh(self._trained, keys)
            batch = pad_rows(rows, rows=len(rows), length=length, pad_id=self._pad_id)
            batch = {name: array[:, None] for name, array in batch.items()}
        for _ in range(self._options.steps):
            state, metrics = self._update(state, batch, self.frozen)
        if self.copies == 1:
            return join(state.params, self.frozen), metrics, (1, length)
        metrics = {name: value[: len(prompts)] for name, value in metrics.items()}
        return state.params, metrics, (self.copies, length)

    def _adapt_together(self, prompts, names):
        state = self._state
        if state is None:
            state = self._fresh(self._trained, prompt_key(self._key, names[0]))
        skipped = int(state.skipped)
        usable = [prompt for prompt in prompts if len(prompt) > 1]
        shape, metrics = None, {}
        if usable:
            # Empty rows fill up the last mini-batch only: each update has a prompt to learn from,
            # as `make_train_step` deals the rows out like cards.
            rows = -(-len(usable) // self._options.mini_batch_size) * self._options.mini_batch_size
            shape = (rows, row_length(max(map(len, usable))))
            batch = pad_rows(usable, rows=rows, length=shape[1], pad_id=self._pad_id)
            for _ in range(self._options.steps):
                state, metrics = self._update(state, batch, self.frozen)
            metrics["update/skipped"] = int(state.skipped) - skipped
        if self._options.reset == "never":
            # The caller answers with these while the next group's steps give their state away.
            self._state = dataclasses.replace(state, params=jax.tree.map(jnp.copy, state.params))
        return join(state.params, self.frozen), metrics, shape
