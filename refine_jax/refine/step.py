"""Training and evaluation steps: batches, mini-batches, micro-batches, updates.

A batch of B rows is one *step*. Each of its mini-batches makes one optimizer update, whose gradient
is accumulated over micro-batches. With `refine.rollouts` "update" a micro-batch rolls out in the
forward pass that its gradient goes back through: the policy that rolls out is the one that is
updated, the ratio of the two is exactly 1, and clipping never acts. With "batch", the published
algorithm, the rollouts of all rows come from the parameters at the start of the step. The two are
equal where a batch is one mini-batch. What happens to the rows is in `objective.py`.
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

from refine_jax.compiling import compiler_options
from refine_jax.config import RefineConfig
from refine_jax.models.trainable import join
from refine_jax.models.transformer import Model, Params, State
from refine_jax.parallel import axis_size, constrain_state, take_tokens
from refine_jax.refine.exact import match_probabilities
from refine_jax.refine.grpo import policy_weight
from refine_jax.refine.objective import Metrics, Objective
from refine_jax.refine.reading import Batch
from refine_jax.refine.rollout import Experience
from refine_jax.refine.selection import rollout_slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and what else it needs: a key, and what is not trained.

    params: those that are trained. frozen: the others; None: there are none.
    """

    params: Params
    opt_state: Any
    key: jax.Array  # constant; a step's draws come from (key, step)
    step: jax.Array  # int32, batches done
    skipped: jax.Array  # int32, updates skipped for non-finite gradients
    skipped_in_a_row: jax.Array  # int32
    reference_params: Params | None = None  # the initial policy, kept only for the KL term
    frozen: Params | None = None

    @property
    def model_params(self) -> Params:
        """All parameters of the model."""
        return join(self.params, self.frozen)

    @property
    def model_reference_params(self) -> Params | None:
        """All parameters of the initial policy; None: it is not kept."""
        return self.reference_params and join(self.reference_params, self.frozen)

    @classmethod
    def create(
        cls,
        params: Params,
        optimizer: optax.GradientTransformation,
        key: jax.Array,
        config: RefineConfig,
        frozen: Params | None = None,
    ) -> TrainState:
        """Make the state before the first step; the key is a scalar of jax.random."""
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
            frozen=frozen,
        )


def split_rows(tree: Any, parts: int) -> Any:
    """Cut leaves [B, ...] into [parts, B / parts, ...]; part i holds the rows i, i + parts, ...

    Strided, so that the parts of an array whose rows are spread over devices are spread as well.
    """
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), tree
    )


def merge_rows(tree: Any) -> Any:
    """Undo `split_rows`."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def row_keys(key: jax.Array, step: jax.Array, rows: int, first: int | jax.Array = 0) -> jax.Array:
    """Derive the keys [B] of the rows from `first` on, by (key, step, row) alone.

    So a row draws the same however rows are grouped or placed.
    """
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda row: jax.random.fold_in(step_key, row))(first + jnp.arange(rows))


def accumulate(
    gradient: Callable[..., tuple[Params, Metrics]], params: Params, rows: Any, parts: int
) -> tuple[Params, Metrics]:
    """Sum `gradient(params, rows)` and its metrics over `parts` micro-batches of the rows.

    Those of the micro-batches must add up to those of all rows.
    """
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


def apply_update(
    optimizer: optax.GradientTransformation, state: TrainState, gradients: Params
) -> tuple[TrainState, Metrics]:
    """Make one optimizer update; where the gradient is not finite, skip and count it."""
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


def update_in_turn(
    update: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    state: TrainState,
    rows: Any,
    mini_batch: int,
) -> tuple[TrainState, Metrics]:
    """Run `update(state, rows)` on every mini-batch of rows [B, ...], one after the other.

    Metrics are means over the updates; counts ("update/...") are those after the last. Raises
    ValueError where mini_batch does not divide B.
    """
    total = jax.tree.leaves(rows)[0].shape[0]
    if total % mini_batch:
        raise ValueError(f"mini_batch must divide the batch. Got: {mini_batch=}, rows={total}.")
    frozen = state.frozen  # not carried by the loop, which would copy it

    def one(state, rows):
        state, metrics = update(dataclasses.replace(state, frozen=frozen), rows)
        return dataclasses.replace(state, frozen=None), metrics

    state = dataclasses.replace(state, frozen=None)
    state, metrics = lax.scan(one, state, split_rows(rows, total // mini_batch))
    return dataclasses.replace(state, frozen=frozen), {
        name: values[-1] if name.startswith("update/") else jnp.mean(values, axis=0)
        for name, values in metrics.items()
    }


def _finish_moments(metrics: Metrics) -> Metrics:
    """Turn second moments into standard deviations."""
    metrics = dict(metrics)
    for name in ("reward", "advantage"):
        if f"{name}/square" in metrics:
            square, mean = metrics.pop(f"{name}/square"), metrics[f"{name}/mean"]
            metrics[f"{name}/std"] = jnp.sqrt(jnp.maximum(square - mean**2, 0.0))
    return metrics


@jax.named_scope("update")
def _update(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    parts: int,
    state: TrainState,
    inputs: tuple[Batch, jax.Array, Experience | None],
    *,
    steps: int | None = None,
) -> tuple[TrainState, Metrics]:
    """Update on one mini-batch, over `parts` micro-batches.

    inputs: rows, their keys [M], and their rollouts; None: they roll out here. steps: of the run.
    """
    weight = policy_weight(objective.config, state.step, steps)
    whole = objective.mini_batch(inputs[0], weight)

    def gradient(params, rows):
        batch, keys, experience = rows
        return objective.gradient(
            params,
            batch,
            whole,
            keys=keys,
            experience=experience,
            reference_params=state.model_reference_params,
            frozen=state.frozen,
        )

    gradients, metrics = accumulate(gradient, state.params, inputs, parts)
    state, update_metrics = apply_update(optimizer, state, gradients)
    return state, _finish_moments(metrics) | update_metrics


def update_rows(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    *,
    steps: int | None = None,
) -> tuple[TrainState, Metrics]:
    """Do one step on rows that are a single mini-batch and micro-batch, as a `TrainStep` does.

    Pure, to be jitted or vmapped by the caller. steps: see `make_train_step`.
    """
    keys = row_keys(state.key, state.step, batch["tokens"].shape[0])
    state, metrics = _update(objective, optimizer, 1, state, (batch, keys, None), steps=steps)
    return dataclasses.replace(state, step=state.step + 1), metrics


def collect(objective: Objective, state: TrainState, batch: Batch, micro_batch: int) -> Experience:
    """Roll out from all rows of a batch by the parameters of `state`, over micro-batches.

    Reading the parameters takes nearly all the time of so few tokens. So the rows of several
    micro-batches roll out together: as many as have states of a quarter of one's trace at most.
    """
    params, rows = state.model_params, batch["tokens"].shape[0]
    keys, parts = row_keys(state.key, state.step, rows), rows // micro_batch
    group = states_together(objective, params, batch, parts)[0]

    def fork(inputs):
        batch, keys = inputs
        forks = objective.fork(params, objective.read(params, batch), batch, keys)
        # The rows of states come second; `merge_rows` takes them first.
        return forks._replace(state=jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), forks.state))

    def together(inputs):
        batch, keys = inputs
        forks = merge_rows(lax.map(fork, split_rows(inputs, group)))
        forks = forks._replace(state=jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), forks.state))

        def of_micro_batch(inputs):
            return objective.reference_log_probs(state.model_reference_params, *inputs)

        def reference(tokens):
            inputs = split_rows((batch, forks.starts, tokens), group)
            return merge_rows(lax.map(of_micro_batch, inputs))

        gathered = objective.model.gather(params)
        return objective.continue_forks(gathered, forks, keys, reference)[0]

    return merge_rows(lax.map(together, split_rows((batch, keys), parts // group)))


def states_together(
    objective: Objective, params: Params, batch: Batch, parts: int
) -> tuple[int, State]:
    """Count the `parts` of a batch that roll out together; with the shapes of one part's states.

    Computes nothing; leaves may be shapes. The number divides `parts`.
    """

    def sizes(params, batch):
        batch = jax.tree.map(lambda x: x[0], split_rows(batch, parts))
        keys = jax.random.split(jax.random.key(0), batch["tokens"].shape[0])
        reading = objective.read(params, batch)
        return reading.trace.layers, objective.fork(params, reading, batch, keys).state

    layers, states = jax.eval_shape(sizes, params, batch)
    trace, state = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (layers, states)
    )
    # Traces are spread over the axis `sequence`, states are not.
    most = max(trace // (4 * state * axis_size("sequence")), 1)
    group = max(group for group in range(1, parts + 1) if parts % group == 0 and group <= most)
    return group, states


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A training step, `train_step(state, batch)` -> state, metrics.

    run(state, batch, experience) -> state, metrics: the compiled step; it gives the state's buffers
    away. collect(state, batch) -> experience: the compiled rollouts, where these are timed apart;
    None: `run` includes them.
    """

    run: Callable
    collect: Callable | None = None

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """Run one step; it gives the state's buffers away.

        Metrics are scalars: means over the updates of the step, and seconds on the host
        ("time/update", "time/collect" where that is timed apart). Raises ValueError where
        mini_batch does not divide the batch.
        """
        begin = time.perf_counter()
        experience, times = None, {}
        if self.collect is not None:
            experience = jax.block_until_ready(self.collect(state, batch))
            times["time/collect"] = time.perf_counter() - begin
        state, metrics = jax.block_until_ready(self.run(state, batch, experience))
        total = time.perf_counter() - begin
        return state, metrics | times | {"time/update": total - times.get("time/collect", 0.0)}


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    config: RefineConfig,
    *,
    mini_batch: int,
    micro_batch: int,
    eos_id: int | Sequence[int] | None = None,
    max_documents: int = 1,
    steps: int | None = None,
    time_rollouts: bool = False,
) -> TrainStep:
    """Make the training step of a configuration, one compiled program.

    mini_batch: rows of one optimizer update; divides the batch. micro_batch: rows of one forward
    and backward pass; divides mini_batch, else ValueError. eos_id, max_documents: see `Objective`.
    steps: training steps of the run, needed where `lambda_rl` follows a schedule. time_rollouts:
    with `config.rollouts` "batch", collect them in a program of their own, to know its time.
    """
    if mini_batch % micro_batch:
        raise ValueError(f"micro_batch must divide mini_batch. Got: {micro_batch=}, {mini_batch=}.")
    objective = Objective(model, config, eos_id=eos_id, max_documents=max_documents)
    collects = objective.rolls_out and config.rollouts == "batch"
    roll_out = functools.partial(collect, objective, micro_batch=micro_batch)
    parts = mini_batch // micro_batch
    update = functools.partial(_update, objective, optimizer, parts, steps=steps)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=compiler_options())
    def run(state: TrainState, batch: Batch, experience: Experience | None = None):
        if collects and experience is None:
            experience = roll_out(state, batch)
        keys = row_keys(state.key, state.step, batch["tokens"].shape[0])
        state, metrics = update_in_turn(update, state, (batch, keys, experience), mini_batch)
        return dataclasses.replace(state, step=state.step + 1), metrics

    return TrainStep(run, jax.jit(roll_out) if collects and time_rollouts else None)


def make_eval_step(
    model: Model,
    config: RefineConfig,
    *,
    eos_id: int | Sequence[int] | None = None,
    max_documents: int = 1,
) -> Callable[..., tuple[Metrics, dict[str, jax.Array]]]:
    """Make `eval_step(params, batch, key, first=0)` -> sums over a held-out batch, and their
    origin.

    first: number of the batch's first row, which decides its draws together with the key.

    The sums: nll_sum, correct_sum, entropy_sum over token_count predicted tokens; reward_sum and
    reward_square_sum over rollout_count valid rollouts (sampled also for objective `ntp`, so that
    both objectives can be compared). What the method saw, for plots and pages: entropy [B, T]
    (nats), match [B, T] (the probability that a rollout of the k tokens after a slot is right as a
    whole), mask [B, T], starts, valid and rewards [B, R], advantages [B, R, k or 1], tokens of the
    rollouts and truth [B, R, k]; and the sums but those of entropy and squares for each row alone,
    such as row_nll_sum [B]. One program gives both, as compiling it takes far longer than copying
    them.
    """
    changes = {"objective": "refine", "estimator": "rollouts", "kl_coef": 0.0}
    config = dataclasses.replace(config, **changes)
    objective = Objective(model, config, eos_id=eos_id, max_documents=max_documents)

    @jax.jit
    def eval_step(params: Params, batch: Batch, key: jax.Array, first: int | jax.Array = 0):
        keys = row_keys(key, jnp.int32(0), batch["tokens"].shape[0], first)
        reading = objective.read(params, batch)
        experience, *_ = objective.roll_out(params, reading, batch, keys, None)
        rewards = jnp.where(experience.valid, experience.rewards, 0.0)
        stats, weights = reading.stats, reading.weights
        match, _ = match_probabilities(-stats.nll, weights, config.rollout_length)
        sums = {
            "nll_sum": reading.nll_sum,
            "correct_sum": jnp.sum(stats.correct * weights),
            "entropy_sum": jnp.sum(stats.entropy * weights),
            "token_count": jnp.sum(weights),
            "reward_sum": jnp.sum(rewards),
            "reward_square_sum": jnp.sum(rewards**2),
            "rollout_count": jnp.sum(experience.valid),
        }
        layout = reading.layout
        seen = {
            "entropy": stats.entropy,
            "mask": jnp.ones(weights.shape, bool) if layout is None else layout.mask,
            "starts": experience.starts,
            "valid": experience.valid,
            "rewards": experience.rewards,
            "tokens": experience.tokens,
            "truth": take_tokens(
                batch["tokens"], rollout_slots(experience.starts, config.rollout_length)
            ),
            "match": match[..., -1],
            "advantages": experience.advantages,
            "row_token_count": jnp.sum(weights, axis=1),
            "row_nll_sum": jnp.sum(stats.nll * weights, axis=1),
            "row_correct_sum": jnp.sum(stats.correct * weights, axis=1),
            "row_reward_sum": jnp.sum(rewards, axis=1),
            "row_rollout_count": jnp.sum(experience.valid, axis=1),
        }
        return sums, seen

    return eval_step
