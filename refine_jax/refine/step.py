"""Training and evaluation steps: batches, mini-batches, micro-batches, updates.

A batch of B rows is one *step*. Its rollouts are collected with the parameters at its start; then
each of its mini-batches makes one optimizer update, whose gradient is accumulated over
micro-batches. Where a batch is a single micro-batch, rollouts and gradient share one forward pass:
the policy that rolls out is then the one that is updated. What happens to the rows is in
`method.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from refine_jax.config import RefineConfig
from refine_jax.models.transformer import Model, Params, State
from refine_jax.parallel import axis_size, constrain_state, take_tokens
from refine_jax.refine.method import (
    Batch,
    Experience,
    Forks,
    Method,
    Metrics,
    layout_of,
    target_weights,
)
from refine_jax.refine.selection import rollout_slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and the key that all its randomness comes from."""

    params: Params
    opt_state: Any
    key: jax.Array  # constant; a step's draws come from (key, step)
    step: jax.Array  # int32, batches done
    skipped: jax.Array  # int32, updates skipped for non-finite gradients
    skipped_in_a_row: jax.Array  # int32
    reference_params: Params | None = None  # the initial policy, kept only for the KL term

    @classmethod
    def create(
        cls,
        params: Params,
        optimizer: optax.GradientTransformation,
        key: jax.Array,
        config: RefineConfig,
    ) -> TrainState:
        """The state before the first step."""
        keep_reference = config.objective == "refine" and config.kl_coef > 0
        # Three buffers, not one: a step donates each of them.
        step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
        return cls(
            params=params,
            opt_state=optimizer.init(params),
            key=key,
            step=step,
            skipped=skipped,
            skipped_in_a_row=in_a_row,
            reference_params=jax.tree.map(jnp.copy, params) if keep_reference else None,
        )


def _finish_moments(metrics: Metrics) -> Metrics:
    """Second moments become standard deviations."""
    metrics = dict(metrics)
    for name in ("reward", "advantage"):
        if f"{name}/square" in metrics:
            square, mean = metrics.pop(f"{name}/square"), metrics[f"{name}/mean"]
            metrics[f"{name}/std"] = jnp.sqrt(jnp.maximum(square - mean**2, 0.0))
    return metrics


def split_rows(tree: Any, parts: int) -> Any:
    """Leaves [B, ...] -> [parts, B / parts, ...]; part i holds the rows i, i + parts, ...

    Strided, so that the parts of an array whose rows are spread over devices are spread as well.
    """
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), tree
    )


def merge_rows(tree: Any) -> Any:
    """Inverse of `split_rows`."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


@functools.partial(jax.jit, static_argnums=1)
def mini_batches(like: jax.Array, count: int) -> list[jax.Array]:
    """0 .. count - 1, int32, made where the int32 scalar `like` is: nothing comes from the host."""
    return [0 * like + index for index in range(count)]


@jax.jit
def mean_metrics(each: list[Metrics]) -> Metrics:
    """Metrics of several updates: means, and the counts ("update/...") after the last."""
    metrics = jax.tree.map(lambda *x: sum(x) / len(x), *each)
    return metrics | {name: each[-1][name] for name in metrics if name.startswith("update/")}


def row_keys(key: jax.Array, step: jax.Array, rows: int, first: int | jax.Array = 0) -> jax.Array:
    """[B] keys that depend on (key, step, row) alone, however the rows are grouped or placed.

    The rows are those from number `first` on.
    """
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda row: jax.random.fold_in(step_key, row))(first + jnp.arange(rows))


def apply_update(
    optimizer: optax.GradientTransformation, state: TrainState, gradients: Params
) -> tuple[TrainState, Metrics]:
    """One optimizer update, skipped and counted where the gradient is not finite."""
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    bad = (~finite).astype(jnp.int32)
    state = dataclasses.replace(
        state,
        params=constrain_state(keep(params, state.params)),
        opt_state=constrain_state(keep(opt_state, state.opt_state)),
        skipped=state.skipped + bad,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )
    metrics = {
        "grad/norm": norm,
        "update/skipped": state.skipped,
        "update/skipped_in_a_row": state.skipped_in_a_row,
    }
    return state, metrics


def accumulate_gradient(
    loss: Callable[..., tuple[jax.Array, Metrics]], params: Params, rows: Any, parts: int
) -> tuple[Params, Metrics]:
    """Gradient and metrics of `loss(params, rows)`, summed over `parts` micro-batches of the rows.

    The losses of the micro-batches, and their metrics, must add up to those of all rows.
    """
    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        return gradient(params, rows)

    def micro_batch(total, part):
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    inputs = split_rows(rows, parts)
    first = jax.tree.map(lambda x: x[0], inputs)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first)
    )
    return lax.scan(micro_batch, zeros, inputs)[0]


def collect_in_parts(
    method: Method, state: TrainState, batch: Batch, keys: jax.Array, parts: int
) -> Experience:
    """`method.collect` of many rows, with forward passes over `1 / parts` of them at a time.

    Rollouts are few tokens, for which reading the parameters is all the time there is. So the rows
    of several parts roll out together: as many as have states no larger than a quarter of the trace
    of one part.
    """
    params, reference_params = state.params, state.reference_params

    def fork(inputs):
        batch, keys = inputs
        return method.fork(params, method.trunk(params, batch), batch, keys)

    def together(inputs):
        batch, keys = inputs
        forks = _merge_forks(lax.map(fork, split_rows(inputs, group)))
        tokens = method.sample(params, forks, keys)

        def reference(inputs):
            return method.reference_log_probs(reference_params, *inputs)

        rollouts = split_rows((batch, forks.starts, tokens), group)
        ref_log_probs = merge_rows(lax.map(reference, rollouts))
        return method.experience(params, forks, tokens, ref_log_probs)

    group = states_together(method, params, batch, keys, parts)[0]
    return merge_rows(lax.map(together, split_rows((batch, keys), parts // group)))


def states_together(
    method: Method, params: Params, batch: Batch, keys: jax.Array, parts: int
) -> tuple[int, State]:
    """How many of the `parts` of a batch roll out together, and the shapes of one part's states.

    Computes nothing; leaves may be shapes. The number divides `parts`.
    """

    def sizes(params, batch, keys):
        batch, keys = jax.tree.map(lambda x: x[0], split_rows((batch, keys), parts))
        trunk = method.trunk(params, batch)
        return trunk.trace.layers, method.fork(params, trunk, batch, keys).state

    layers, states = jax.eval_shape(sizes, params, batch, keys)
    trace, state = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (layers, states)
    )
    # Traces are spread over the axis `sequence`, states are not.
    most = max(trace // (4 * state * axis_size("sequence")), 1)
    group = max(group for group in range(1, parts + 1) if parts % group == 0 and group <= most)
    return group, states


def _merge_forks(forks: Forks) -> Forks:
    """`merge_rows`, also of the states, whose rows come second."""
    state = jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 2).reshape(x.shape[1], -1, *x.shape[3:]), forks.state
    )
    return merge_rows(forks._replace(state=None))._replace(state=state)


def _method_gradient(method: Method, state: TrainState, batch, experience, keys, parts: int):
    """Gradient and metrics of a mini-batch, over `parts` micro-batches."""
    layout = layout_of(batch, method.max_documents)
    token_count = jnp.maximum(jnp.sum(target_weights(batch["tokens"], layout)), 1.0)
    options = {"token_count": token_count, "reference_params": state.reference_params}
    if parts == 1:
        options["keys"] = keys
    else:
        options["valid"] = None if experience is None else experience.valid

    def loss(params, rows):
        return method.loss(params, *rows, **options)

    return accumulate_gradient(loss, state.params, (batch, experience), parts)


def update_rows(
    method: Method, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One step on rows that are a single mini-batch and micro-batch.

    Pure: what a `TrainStep` does with such rows, to be jitted or vmapped by the caller.
    """
    keys = row_keys(state.key, state.step, batch["tokens"].shape[0])
    gradients, metrics = _method_gradient(method, state, batch, None, keys, 1)
    state, update_metrics = apply_update(optimizer, state, gradients)
    state = dataclasses.replace(state, step=state.step + 1)
    return state, _finish_moments(metrics) | update_metrics


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A training step, `train_step(state, batch)` -> state, metrics, made of compiled functions.

    collect(state, batch) -> experience. update(state, batch, experience, index, updates) -> state,
    metrics: the update of mini-batch `index` of `updates`; it gives the state's buffers away.
    experience None: roll out in the update, where the method does.
    """

    collect: Callable
    update: Callable
    objective: str
    mini_batch: int
    micro_batch: int

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """One step; it gives the state's buffers away.

        Metrics are scalars (means over the updates of the step), "time/update" and, where rollouts
        are collected before, "time/collect" seconds on the host. Raises ValueError where mini_batch
        does not divide the batch.
        """
        rows, mini_batch = batch["tokens"].shape[0], self.mini_batch
        if rows % mini_batch:
            raise ValueError(f"mini_batch must divide the batch. Got: {mini_batch=}, rows={rows}.")
        begin = time.perf_counter()
        experience = None
        if self.objective == "refine" and rows != self.micro_batch:
            experience = jax.block_until_ready(self.collect(state, batch))
        collected = time.perf_counter()
        updates = rows // mini_batch
        each = []
        for index in mini_batches(state.step, updates):
            state, metrics = self.update(state, batch, experience, index, updates)
            each.append(metrics)
        metrics = jax.block_until_ready(mean_metrics(each))
        times = {"time/update": time.perf_counter() - collected}
        if experience is not None:
            times["time/collect"] = collected - begin
        return state, metrics | times


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    config: RefineConfig,
    *,
    mini_batch: int,
    micro_batch: int,
    eos_id: int | Sequence[int] | None = None,
    max_documents: int = 1,
) -> TrainStep:
    """The training step of a configuration.

    mini_batch: rows of one optimizer update; divides the batch. micro_batch: rows of one forward
    and backward pass; divides mini_batch, else ValueError. eos_id: the token, or tokens, that
    rollouts never sample, if `config.forbid_eos`. max_documents: most documents packed into a row.
    """
    if mini_batch % micro_batch:
        raise ValueError(f"micro_batch must divide mini_batch. Got: {micro_batch=}, {mini_batch=}.")
    method = Method(model, config, eos_id=eos_id, max_documents=max_documents)

    @jax.jit
    def collect(state: TrainState, batch: Batch) -> Experience:
        rows = batch["tokens"].shape[0]
        keys = row_keys(state.key, state.step, rows)
        return collect_in_parts(method, state, batch, keys, rows // micro_batch)

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
    def update(state: TrainState, batch: Batch, experience, index, updates: int):
        rows = batch["tokens"].shape[0]
        keys = row_keys(state.key, state.step, rows) if experience is None else None
        part = jax.tree.map(lambda x: x[index], split_rows((batch, experience, keys), updates))
        parts = mini_batch // micro_batch
        gradients, metrics = _method_gradient(method, state, *part, parts)
        state, update_metrics = apply_update(optimizer, state, gradients)
        done = (index == updates - 1).astype(jnp.int32)
        state = dataclasses.replace(state, step=state.step + done)
        return state, _finish_moments(metrics) | update_metrics

    return TrainStep(collect, update, config.objective, mini_batch, micro_batch)


def make_eval_step(
    model: Model,
    config: RefineConfig,
    *,
    eos_id: int | Sequence[int] | None = None,
    max_documents: int = 1,
) -> Callable[..., tuple[Metrics, dict[str, jax.Array]]]:
    """`eval_step(params, batch, key, first=0)` -> sums over a held-out batch, and their origin.

    first: number of the batch's first row, which decides its draws together with the key.

    The sums: nll_sum, correct_sum, entropy_sum over token_count predicted tokens; reward_sum and
    reward_square_sum over rollout_count valid rollouts (sampled also for objective `ntp`, so that
    both objectives can be compared).
    What the method saw, for plots: entropy [B, T] (nats), mask [B, T], starts [B, R], valid [B, R],
    rewards [B, R], tokens [B, R, k] of the rollouts and truth [B, R, k]. One program gives both, as
    compiling it takes far longer than copying them.
    """
    config = dataclasses.replace(config, objective="refine", kl_coef=0.0)
    method = Method(model, config, eos_id=eos_id, max_documents=max_documents)

    @jax.jit
    def eval_step(params: Params, batch: Batch, key: jax.Array, first: int | jax.Array = 0):
        keys = row_keys(key, jnp.int32(0), batch["tokens"].shape[0], first)
        experience, trunk = method.collect(params, None, batch, keys)
        rewards = jnp.where(experience.valid, experience.rewards, 0.0)
        sums = {
            "nll_sum": trunk.nll_sum,
            "correct_sum": jnp.sum(trunk.stats.correct * trunk.weights),
            "entropy_sum": jnp.sum(trunk.stats.entropy * trunk.weights),
            "token_count": jnp.sum(trunk.weights),
            "reward_sum": jnp.sum(rewards),
            "reward_square_sum": jnp.sum(rewards**2),
            "rollout_count": jnp.sum(experience.valid),
        }
        layout = trunk.layout
        seen = {
            "entropy": trunk.stats.entropy,
            "mask": jnp.ones(trunk.weights.shape, bool) if layout is None else layout.mask,
            "starts": experience.starts,
            "valid": experience.valid,
            "rewards": experience.rewards,
            "tokens": experience.tokens,
            "truth": take_tokens(
                batch["tokens"], rollout_slots(experience.starts, config.rollout_length)
            ),
        }
        return sums, seen

    return eval_step
