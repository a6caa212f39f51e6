"""Rollouts from many positions of a row, forked from one forward pass over it.

Letters: B rows, T tokens, R = c * n forks of a row, k tokens a rollout.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.generation.sampling import as_ends
from refine_jax.kernels.device import backend
from refine_jax.models.head import logits, token_log_probs
from refine_jax.models.transformer import Model, Params, State, Trace, TracedForks
from refine_jax.parallel import constrain, take_tokens
from refine_jax.refine.grpo import gradient_energy, sum_squared_probs

# Longest rollouts, in tokens, of which every step reads all tokens so far once more.
_READ_AGAIN = 16


class Forks(NamedTuple):
    """States that rollouts continue, and the true tokens that they are compared with."""

    starts: jax.Array  # [B, R] int32, slot of the first token
    valid: jax.Array  # [B, R] bool, whether the k true tokens are real and of one document
    last_hidden: jax.Array  # [B, R, D], predicts the first token
    state: State | TracedForks  # leaves [L, B, R, ...]
    true_tokens: jax.Array  # [B, R, k] int32
    true_hidden: jax.Array  # [B, R, k, D]
    counted: jax.Array | None = None  # [B, R, k] bool, tokens that count; None: all of them


class Experience(NamedTuple):
    """Rollouts with their rewards; constants for the gradient."""

    starts: jax.Array  # [B, R] int32, as in `Forks`
    valid: jax.Array  # [B, R] bool
    tokens: jax.Array  # [B, R, k] int32
    rewards: jax.Array  # [B, R]
    advantages: jax.Array  # [B, R, k], or [B, R, 1] where all tokens of a rollout have one
    old_log_probs: jax.Array  # [B, R, k], of the policy that rolled out
    ref_log_probs: jax.Array | None  # [B, R, k], of the initial policy
    counted: jax.Array | None = None  # [B, R, k] bool, as in `Forks`


class Scores(NamedTuple):
    """What the policy says of given rollouts."""

    log_probs: jax.Array  # [B, R, k] float32, nats
    entropies: jax.Array  # [B, R, k] float32, nats, of the distributions that predict the tokens
    hidden: jax.Array  # [B, R, k, D], final-norm states after reading each rollout token
    true_log_probs: jax.Array | None  # [B, R, k], of the true tokens at the same places
    energy: jax.Array | None  # [B, R, k], of the gradient up to each token (`gradient_energy`)


def fork_rollouts(
    model: Model,
    params: Params,
    hidden: jax.Array,
    trace: Trace,
    starts: jax.Array,
    rollout_length: int,
    *,
    copies: int = 1,
    in_place: bool = False,
) -> tuple[jax.Array, State | TracedForks]:
    """Fork for rollouts of k tokens, `copies` from every start, one after the other.

    hidden [B, T, D], trace: of the forward pass over the rows. starts: [B, P] int32 >= 1, slot of
    the rollouts' first token. in_place: whether the trace may stand for the states where that is
    cheaper; it then lives as long as they would.

    Returns the hidden states [B, R, D] that predict the first tokens, and the R = P copies states.
    """
    last_hidden = jnp.repeat(take_tokens(hidden, starts - 1), copies, axis=1)
    if in_place and rollout_length <= _READ_AGAIN and model.reads_traces(rollout_length):
        return last_hidden, TracedForks(trace, jnp.repeat(starts, copies, axis=1))
    state = model.fork(params, trace, starts, horizon=rollout_length, copies=copies)
    return last_hidden, state


def sample_rollouts(
    model: Model,
    params: Params,
    last_hidden: jax.Array,
    state: State | TracedForks,
    keys: jax.Array,
    *,
    rollout_length: int,
    temperature: float = 1.0,
    forbidden_token: int | Sequence[int] | None = None,
) -> jax.Array:
    """Sample k tokens from the policy at every fork.

    last_hidden [B, R, D], state: as `fork_rollouts` gives them. keys: [B] random keys, one a row.
    temperature: 0 takes the likeliest token. forbidden_token: one or several that are never
    sampled (the published code forbids the end of sequence, so that all rollouts have k tokens).

    Returns tokens [B, R, k] int32.
    """
    head = model.head(params)
    forks = jnp.arange(last_hidden.shape[1])
    fork_keys = jax.vmap(lambda key: jax.vmap(lambda r: jax.random.fold_in(key, r))(forks))(keys)

    def sample(last_hidden, index):
        z = constrain(logits(last_hidden, head), "batch")
        for token in as_ends(forbidden_token):
            z = z.at[..., token].set(-jnp.inf)
        if temperature == 0:
            return jnp.argmax(z, axis=-1).astype(jnp.int32)
        step_keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, index)))(fork_keys)
        return jax.vmap(jax.vmap(jax.random.categorical))(step_keys, z / temperature).astype(
            jnp.int32
        )

    if isinstance(state, TracedForks) or _reads_again(model, rollout_length):
        return _sample_from_fork(model, params, last_hidden, state, sample, rollout_length)

    def step(carry, index):
        last_hidden, state = carry
        tokens = sample(last_hidden, index)
        new_hidden, state = model.extend(params, tokens[..., None], state)
        return (new_hidden[:, :, 0], state), tokens

    carry = last_hidden, state
    (last_hidden, _), tokens = lax.scan(step, carry, jnp.arange(rollout_length - 1))
    final = sample(last_hidden, rollout_length - 1)
    return jnp.concatenate([jnp.moveaxis(tokens, 0, -1), final[..., None]], axis=-1)


def _reads_again(model: Model, rollout_length: int) -> bool:
    """Whether every step reads all tokens so far once more, and writes no states.

    On an accelerator reading states and parameters takes the time, as much for one token as for
    several; on a CPU computing does.
    """
    in_place = backend() == "cpu" or not model.writes_much
    return not in_place and rollout_length <= _READ_AGAIN


def _sample_from_fork(model, params, last_hidden, state, sample, rollout_length):
    """Sample by continuing the fork with all k tokens each step; those to come are not used."""

    def step(carry, index):
        last_hidden, tokens = carry
        tokens = tokens.at[:, :, index].set(sample(last_hidden, index))
        hidden, _ = model.run_forks(params, tokens[:, :, :-1], state)
        return (lax.dynamic_index_in_dim(hidden, index, axis=2, keepdims=False), tokens), None

    tokens = jnp.zeros((*last_hidden.shape[:2], rollout_length), jnp.int32)
    carry = last_hidden, tokens
    (last_hidden, tokens), _ = lax.scan(step, carry, jnp.arange(rollout_length - 1))
    return tokens.at[:, :, -1].set(sample(last_hidden, rollout_length - 1))


def score_rollouts(
    model: Model,
    params: Params,
    hidden: jax.Array,
    trace: Trace,
    starts: jax.Array,
    tokens: jax.Array,
) -> Scores:
    """Score rollouts `tokens` [B, R, k] from `starts` [B, P], each that of R / P in succession.

    Differentiable in params, hidden and trace: with hidden and trace from a differentiated forward
    pass, the gradient is that of running every prefix with its rollout on its own.
    """
    fork_hidden = model.forward_forks(params, trace, starts, tokens)
    copies = tokens.shape[1] // starts.shape[1]
    last_hidden = jnp.repeat(take_tokens(hidden, starts - 1), copies, axis=1)
    return scores_of(model, params, last_hidden, fork_hidden, tokens)


def scores_of(
    model: Model,
    params: Params,
    last_hidden: jax.Array,
    hidden: jax.Array,
    tokens: jax.Array,
    *,
    true_tokens: jax.Array | None = None,
    with_energy: bool = False,
) -> Scores:
    """Score rollouts `tokens` [B, R, k] by hidden states; differentiable.

    last_hidden: [B, R, D], before the rollouts. hidden: [B, R, k, D], of their tokens. true_tokens:
    [B, R, k] int32, for `true_log_probs`. with_energy: whether `energy` is wanted.
    """
    # The token before each one predicts it.
    predictors = jnp.concatenate([last_hidden[:, :, None], hidden[:, :, :-1]], axis=2)
    head, true_log_probs, energy = model.head(params), None, None
    log_probs, entropies = token_log_probs(predictors, head, tokens)
    if true_tokens is not None:
        true_log_probs, _ = token_log_probs(predictors, head, true_tokens)
    if with_energy:
        squares = sum_squared_probs(logits(predictors, head))
        energy = lax.stop_gradient(gradient_energy(log_probs, squares))
    return Scores(log_probs, entropies, hidden, true_log_probs, energy)
