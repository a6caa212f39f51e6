"""One ReFINE step: select, roll out, reward, advantage, loss, update.

A batch of B rows is one *step*. Its rollouts are collected with the parameters at its start; then
each of its mini-batches makes one optimizer update, whose gradient is accumulated over
micro-batches. Where a batch is a single micro-batch, rollouts and gradient share one forward pass:
the policy that rolls out is then the one that is updated.

Rows come as {"tokens": [B, T] int32, "segments": [B, T] int32}; segment 0 is padding, each other
number a document. Without "segments" every row is one document that fills it.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from refine_jax.config import RefineConfig
from refine_jax.models.head import TokenStats, next_token_loss
from refine_jax.models.layout import Layout
from refine_jax.models.transformer import Model, Params, Trace
from refine_jax.refine.grpo import aggregate, group_advantages, kl_penalty, policy_loss
from refine_jax.refine.rewards import rollout_rewards
from refine_jax.refine.rollout import Scores, sample_rollouts, score_rollouts, take_slots
from refine_jax.refine.selection import rollout_slots, select_positions

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


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


class Trunk(NamedTuple):
    """The one forward pass over whole rows."""

    hidden: jax.Array  # [B, T, D]
    trace: Trace | None
    layout: Layout | None
    nll_sum: jax.Array  # scalar, over the predicted tokens
    stats: TokenStats  # [B, T] each
    weights: jax.Array  # [B, T] float32, 1 where the next token is predicted


class Experience(NamedTuple):
    """Rollouts with their rewards; constants for the gradient. R = c * n."""

    starts: jax.Array  # [B, R] int32, slot of the first token
    valid: jax.Array  # [B, R] bool, whether there is a truth to compare with
    tokens: jax.Array  # [B, R, k] int32
    rewards: jax.Array  # [B, R]
    advantages: jax.Array  # [B, R]
    old_log_probs: jax.Array  # [B, R, k], of the policy that rolled out
    ref_log_probs: jax.Array | None  # [B, R, k], of the initial policy


def _layout(batch: Batch, max_documents: int) -> Layout | None:
    segments = batch.get("segments")
    return None if segments is None else Layout.from_segments(segments, max_documents)


def _target_weights(tokens: jax.Array, layout: Layout | None) -> jax.Array:
    """[B, T] float32: 1 where slot t and its target t + 1 are real and of one document."""
    if layout is None:
        return jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0.0)
    same = layout.document[:, 1:] == layout.document[:, :-1]
    has_target = layout.mask[:, 1:] & layout.mask[:, :-1] & same
    return jnp.pad(has_target, ((0, 0), (0, 1))).astype(jnp.float32)


def run_trunk(
    model: Model, params: Params, batch: Batch, *, with_trace: bool, max_documents: int = 1
) -> Trunk:
    """Forward pass, next-token loss and entropies of a batch."""
    tokens = batch["tokens"]
    layout = _layout(batch, max_documents)
    weights = _target_weights(tokens, layout)
    hidden, trace = model.forward(params, tokens, layout, with_trace=with_trace)
    targets = jnp.roll(tokens, -1, axis=1)
    nll_sum, stats = next_token_loss(hidden, model.head(params), targets, weights)
    return Trunk(hidden, trace, layout, nll_sum, stats, weights)


def roll_out(
    model: Model,
    params: Params,
    trunk: Trunk,
    keys: jax.Array,
    config: RefineConfig,
    eos_id: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Select positions and sample from them: starts [B, R], valid [B, R], tokens [B, R, k].

    keys: [B], one a row. Nothing here is differentiated.
    """
    params, trunk = lax.stop_gradient((params, trunk))
    layout = trunk.layout
    select_keys, sample_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    selection = select_positions(
        select_keys,
        trunk.stats.entropy,
        jnp.ones(trunk.weights.shape, bool) if layout is None else layout.mask,
        num_positions=config.num_positions,
        rollout_length=config.rollout_length,
        method=config.selection,
        temperature=config.selection_temperature,
        edge_margin=config.edge_margin,
        document=None if layout is None else layout.document,
    )
    repeat = functools.partial(jnp.repeat, repeats=config.rollouts_per_position, axis=1)
    starts, valid = repeat(selection.starts), repeat(selection.valid)
    tokens = sample_rollouts(
        model,
        params,
        trunk.hidden,
        trunk.trace,
        starts,
        sample_keys,
        rollout_length=config.rollout_length,
        temperature=config.sampling_temperature,
        forbidden_token=eos_id if config.forbid_eos else None,
    )
    return starts, valid, tokens


def judge(
    trunk: Trunk,
    batch: Batch,
    starts: jax.Array,
    valid: jax.Array,
    tokens: jax.Array,
    scores: Scores,
    config: RefineConfig,
    ref_log_probs: jax.Array | None = None,
) -> Experience:
    """Rewards against the true continuation, and advantages within each group."""
    hidden, scores = lax.stop_gradient((trunk.hidden, scores))
    slots = rollout_slots(starts, config.rollout_length)
    rewards = rollout_rewards(
        config.reward,
        scores.hidden,
        take_slots(hidden, slots),
        tokens,
        take_slots(batch["tokens"], slots),
    )
    group = (starts.shape[0], config.num_positions, config.rollouts_per_position)
    advantages = group_advantages(
        rewards.reshape(group),
        valid.reshape(group),
        grouping=config.grouping,
        normalize_std=config.normalize_std,
    ).reshape(starts.shape)
    return Experience(starts, valid, tokens, rewards, advantages, scores.log_probs, ref_log_probs)


class Method:
    """The losses of one configuration, as pure functions of parameters and rows."""

    def __init__(
        self, model: Model, config: RefineConfig, *, eos_id: int | None, max_documents: int
    ):
        self.model = model
        self.config = config
        self.eos_id = eos_id
        self.max_documents = max_documents

    def trunk(self, params: Params, batch: Batch) -> Trunk:
        """The forward pass that the objective needs."""
        return run_trunk(
            self.model,
            params,
            batch,
            with_trace=self.config.objective == "refine",
            max_documents=self.max_documents,
        )

    def score(self, params: Params, trunk: Trunk, starts: jax.Array, tokens: jax.Array) -> Scores:
        """Log-probabilities and hidden states of rollouts."""
        return score_rollouts(self.model, params, trunk.hidden, trunk.trace, starts, tokens)

    def reference_log_probs(
        self, reference_params: Params | None, batch: Batch, starts: jax.Array, tokens: jax.Array
    ) -> jax.Array | None:
        """[B, R, k] of the initial policy, where the KL term asks for them."""
        if self.config.kl_coef == 0:
            return None
        reference = self.trunk(reference_params, batch)
        return lax.stop_gradient(self.score(reference_params, reference, starts, tokens).log_probs)

    def gather(
        self,
        params: Params,
        reference_params: Params | None,
        trunk: Trunk,
        batch: Batch,
        keys: jax.Array,
    ) -> tuple[Experience, Scores]:
        """Select, roll out, reward, advantage. The scores are differentiable, the rest is not."""
        starts, valid, tokens = roll_out(self.model, params, trunk, keys, self.config, self.eos_id)
        scores = self.score(params, trunk, starts, tokens)
        ref_log_probs = self.reference_log_probs(reference_params, batch, starts, tokens)
        rollouts = starts, valid, tokens
        return judge(trunk, batch, *rollouts, scores, self.config, ref_log_probs), scores

    def collect(
        self, params: Params, reference_params: Params | None, batch: Batch, keys: jax.Array
    ) -> tuple[Experience, Trunk]:
        """The experience of some rows, with keys [B], and the forward pass it comes from."""
        trunk = self.trunk(params, batch)
        return self.gather(params, reference_params, trunk, batch, keys)[0], trunk

    def loss(
        self,
        params: Params,
        batch: Batch,
        experience: Experience | None,
        *,
        keys: jax.Array | None = None,
        reference_params: Params | None = None,
        token_count: jax.Array,
        valid: jax.Array | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """Loss of a micro-batch, as its share of the mini-batch's; losses and metrics add up.

        experience: of these rows; None: roll out now, with `keys` [B].
        token_count: predicted tokens of the mini-batch. valid: [mini-batch, R] bool, of its
        rollouts; None where the rows are the whole mini-batch.
        """
        config = self.config
        trunk = self.trunk(params, batch)
        ntp = trunk.nll_sum / token_count
        metrics = {
            "loss/ntp": ntp,
            "accuracy": jnp.sum(trunk.stats.correct * trunk.weights) / token_count,
            "entropy/mean": jnp.sum(trunk.stats.entropy * trunk.weights) / token_count,
        }
        if config.objective == "ntp":
            return ntp, {"loss/total": ntp} | metrics

        if experience is None:
            experience, scores = self.gather(params, reference_params, trunk, batch, keys)
        else:
            scores = self.score(params, trunk, experience.starts, experience.tokens)

        k = config.rollout_length
        mask = _token_mask(experience.valid, k)
        whole = mask if valid is None else _token_mask(valid, k)
        policy, policy_metrics = policy_loss(
            scores.log_probs.reshape(-1, k),
            experience.old_log_probs.reshape(-1, k),
            experience.advantages.reshape(-1, 1),
            mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            aggregation=config.loss_aggregation,
            mini_batch_mask=whole,
        )
        entropies = scores.entropies.reshape(-1, k)
        metrics |= {f"policy/{name}": value for name, value in policy_metrics.items()}
        metrics["policy/entropy"] = aggregate(entropies, mask, "token-mean", whole)
        metrics["loss/policy"] = policy
        total = config.lambda_sft * ntp + config.lambda_rl * policy
        if config.kl_coef > 0:
            penalty = kl_penalty(
                scores.log_probs.reshape(-1, k),
                experience.ref_log_probs.reshape(-1, k),
                config.kl_type,
            )
            metrics["loss/kl"] = aggregate(penalty, mask, config.loss_aggregation, whole)
            total += config.lambda_rl * config.kl_coef * metrics["loss/kl"]
        metrics["loss/total"] = total
        return total, metrics | _reward_shares(experience, mask, whole)


def _token_mask(valid: jax.Array, rollout_length: int) -> jax.Array:
    """[B, R] bool -> [B * R, k] float32."""
    return jnp.repeat(valid.reshape(-1, 1), rollout_length, axis=1).astype(jnp.float32)


def _reward_shares(experience: Experience, mask: jax.Array, whole: jax.Array) -> Metrics:
    """First and second moments of rewards and advantages, which add up over micro-batches."""

    def mean(x):
        return aggregate(jnp.broadcast_to(x.reshape(-1, 1), mask.shape), mask, "token-mean", whole)

    return {
        "reward/mean": mean(experience.rewards),
        "reward/square": mean(experience.rewards**2),
        "advantage/mean": mean(experience.advantages),
        "advantage/square": mean(experience.advantages**2),
        "rollouts/valid": jnp.sum(experience.valid) / (whole.shape[0]),
    }


def _finish_moments(metrics: Metrics) -> Metrics:
    """Second moments become standard deviations."""
    metrics = dict(metrics)
    for name in ("reward", "advantage"):
        if f"{name}/square" in metrics:
            square, mean = metrics.pop(f"{name}/square"), metrics[f"{name}/mean"]
            metrics[f"{name}/std"] = jnp.sqrt(jnp.maximum(square - mean**2, 0.0))
    return metrics


def _split(tree: Any, parts: int) -> Any:
    """Leaves [B, ...] -> [parts, B / parts, ...]; part i holds the rows i, i + parts, ...

    Strided, so that the parts of an array whose rows are spread over devices are spread as well.
    """
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), tree
    )


def _merge(tree: Any) -> Any:
    """Inverse of `_split`."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def _row_keys(key: jax.Array, step: jax.Array, rows: int) -> jax.Array:
    """[B] keys that depend on (key, step, row) alone, however the rows are grouped or placed."""
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda row: jax.random.fold_in(step_key, row))(jnp.arange(rows))


def _apply_update(
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
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + bad,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )
    metrics = {
        "grad/norm": norm,
        "update/skipped": state.skipped,
        "update/skipped_in_a_row": state.skipped_in_a_row,
    }
    return state, metrics


def _accumulated_gradient(method: Method, state: TrainState, batch, experience, keys, parts: int):
    """Gradient and metrics of a mini-batch, over `parts` micro-batches."""
    layout = _layout(batch, method.max_documents)
    token_count = jnp.maximum(jnp.sum(_target_weights(batch["tokens"], layout)), 1.0)
    gradient = jax.grad(method.loss, has_aux=True)
    options = {"token_count": token_count, "reference_params": state.reference_params}
    if parts == 1:
        return gradient(state.params, batch, experience, keys=keys, **options)
    options["valid"] = None if experience is None else experience.valid

    def micro_batch(total, inputs):
        rows, rows_experience = inputs
        share = gradient(state.params, rows, rows_experience, **options)
        return jax.tree.map(jnp.add, total, share), None

    inputs = _split((batch, experience), parts)
    first = jax.tree.map(lambda x: x[0], inputs)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda x: gradient(state.params, *x, **options), first),
    )
    return lax.scan(micro_batch, zeros, inputs)[0]


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    config: RefineConfig,
    *,
    mini_batch: int,
    micro_batch: int,
    eos_id: int | None = None,
    max_documents: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """The training step of a configuration.

    mini_batch: rows of one optimizer update; divides the batch. micro_batch: rows of one forward
    and backward pass; divides mini_batch. eos_id: the token that rollouts never sample, if
    `config.forbid_eos`. max_documents: most documents packed into a row.

    Returns `train_step(state, batch) -> state, metrics`; it gives the state's buffers away.
    Metrics are scalars (means over the updates of the step), "time/collect" and "time/update"
    seconds on the host. Raises ValueError where sizes do not divide.
    """
    if mini_batch % micro_batch:
        raise ValueError(f"micro_batch must divide mini_batch. Got: {micro_batch=}, {mini_batch=}.")
    method = Method(model, config, eos_id=eos_id, max_documents=max_documents)
    ntp = config.objective == "ntp"

    @jax.jit
    def collect(state: TrainState, batch: Batch) -> Experience:
        rows = batch["tokens"].shape[0]
        inputs = _split((batch, _row_keys(state.key, state.step, rows)), rows // micro_batch)

        def one(inputs):
            return method.collect(state.params, state.reference_params, *inputs)[0]

        return _merge(lax.map(one, inputs))

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
    def update(state: TrainState, batch: Batch, experience, index, updates: int):
        rows = batch["tokens"].shape[0]
        keys = _row_keys(state.key, state.step, rows) if experience is None else None
        part = jax.tree.map(lambda x: x[index], _split((batch, experience, keys), updates))
        parts = mini_batch // micro_batch
        gradients, metrics = _accumulated_gradient(method, state, *part, parts)
        state, update_metrics = _apply_update(optimizer, state, gradients)
        done = (index == updates - 1).astype(jnp.int32)
        state = dataclasses.replace(state, step=state.step + done)
        return state, _finish_moments(metrics) | update_metrics

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        rows = batch["tokens"].shape[0]
        if rows % mini_batch:
            raise ValueError(f"mini_batch must divide the batch. Got: {mini_batch=}, rows={rows}.")
        begin = time.perf_counter()
        experience = None
        if not ntp and rows != micro_batch:
            experience = jax.block_until_ready(collect(state, batch))
        collected = time.perf_counter()
        updates = rows // mini_batch
        each = []
        for index in range(updates):
            state, metrics = update(state, batch, experience, jnp.int32(index), updates)
            each.append(metrics)
        metrics = jax.tree.map(lambda *x: sum(x) / len(x), *each)
        metrics |= {name: each[-1][name] for name in metrics if name.startswith("update/")}
        jax.block_until_ready(metrics)
        times = {
            "time/collect": collected - begin,
            "time/update": time.perf_counter() - collected,
        }
        return state, metrics | times

    return train_step


def make_eval_step(
    model: Model, config: RefineConfig, *, eos_id: int | None = None, max_documents: int = 1
) -> Callable[[Params, Batch, jax.Array], tuple[Metrics, dict[str, jax.Array]]]:
    """`eval_step(params, batch, key)` -> sums over a held-out batch, and what they come from.

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
    def eval_step(params: Params, batch: Batch, key: jax.Array):
        keys = _row_keys(key, jnp.int32(0), batch["tokens"].shape[0])
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
            "truth": take_slots(
                batch["tokens"], rollout_slots(experience.starts, config.rollout_length)
            ),
        }
        return sums, seen

    return eval_step
