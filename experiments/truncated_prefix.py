"""The ReFINE step by truncated prefixes: every prefix runs on its own, from its first token.

This is the algorithm of the paper's published code, without forks: forward passes over the whole
rows for the entropies, a generation from every prefix, a forward pass over every prefix with its
rollout for rewards and old log-probabilities, and forward and backward passes over all of them and
over the rows for the update. It is the independent check of the step in `refine_jax.refine`, and
the baseline of `bench_refine_step.py`, where it is given its best case: prefixes keep their own
lengths (the published code pads each to the full row), and generation is cached.

Rows are full: one document each, no padding. Given the keys that the package's step uses for its
rows, it draws the same positions and the same rollouts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from refine_jax.config import RefineConfig
from refine_jax.models.head import logits, next_token_loss, token_log_probs
from refine_jax.models.transformer import Model, Params
from refine_jax.refine.grpo import group_advantages, policy_loss
from refine_jax.refine.rewards import token_rewards
from refine_jax.refine.rollout import Experience
from refine_jax.refine.selection import select_positions


class TruncatedPrefixStep:
    """One update of rows [B, T]; programs are compiled for the length of each prefix.

    All sizes are as in the package: c positions, n rollouts each, R = c * n, k tokens a rollout.
    Raises ValueError for an objective other than `refine` and for a KL term.
    """

    def __init__(
        self,
        model: Model,
        optimizer: optax.GradientTransformation,
        config: RefineConfig,
        *,
        eos_id: int | None = None,
    ):
        if config.objective != "refine" or config.kl_coef:
            raise ValueError(
                "truncated prefixes implement objective='refine' without a KL term. "
                f"Got: objective={config.objective!r}, kl_coef={config.kl_coef}."
            )
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.forbidden = eos_id if config.forbid_eos else None
        self.read_rows = jax.jit(self._read_rows)
        self.select = jax.jit(self._select)
        self.generate = jax.jit(self._generate)
        self.score = jax.jit(self._score)
        self.judge = jax.jit(self._judge)
        self.ntp_gradient = jax.jit(jax.value_and_grad(self._ntp_loss))
        self.add_policy_gradient = jax.jit(self._add_policy_gradient, donate_argnums=0)
        self.apply = jax.jit(self._apply, donate_argnums=(0, 1))

    def collect(self, params: Params, tokens: jax.Array, keys: jax.Array) -> Experience:
        """Select, roll out, reward, advantage: `tokens` [B, T] int32, `keys` [B]."""
        select_keys, sample_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        hidden, entropy = self.read_rows(params, tokens)
        starts, valid = self.select(select_keys, entropy)
        rollouts, log_probs, states = [], [], []
        for row, fork in np.ndindex(starts.shape):
            prefix = tokens[row : row + 1, : int(starts[row, fork])]
            key = jax.random.fold_in(sample_keys[row], fork)
            rollout = self.generate(params, prefix, key)
            scores = self.score(params, jnp.concatenate([prefix, rollout], axis=1))
            rollouts.append(rollout)
            log_probs.append(scores[0])
            states.append(scores[1])
        join = functools.partial(_join, shape=starts.shape)
        rewards, advantages = self.judge(
            tokens, hidden, starts, valid, join(rollouts), join(states)
        )
        return Experience(starts, valid, join(rollouts), rewards, advantages, join(log_probs), None)

    def gradient(
        self, params: Params, tokens: jax.Array, experience: Experience
    ) -> tuple[jax.Array, Params]:
        """Total loss and its gradient, accumulated prefix by prefix."""
        total, gradients = self.ntp_gradient(params, tokens)
        sequences = self.sequences(tokens, experience.starts, experience.tokens)
        forks = np.ndindex(experience.starts.shape)
        for (row, fork), sequence in zip(forks, sequences, strict=True):
            gradients, total = self.add_policy_gradient(
                (gradients, total),
                params,
                sequence,
                experience.old_log_probs[row, fork][None],
                experience.advantages[row, fork][None, None],
                experience.valid[row, fork][None],
                experience.valid,
            )
        return total, gradients

    def sequences(
        self, tokens: jax.Array, starts: jax.Array, rollouts: jax.Array
    ) -> list[jax.Array]:
        """The prefixes with their rollouts [B, R, k]: B * R arrays [1, S + k]."""
        return [
            jnp.append(tokens[row, : int(starts[row, fork])], rollouts[row, fork])[None]
            for row, fork in np.ndindex(starts.shape)
        ]

    def __call__(
        self, params: Params, opt_state, tokens: jax.Array, keys: jax.Array
    ) -> tuple[Params, object, jax.Array]:
        """One update of `params` and `opt_state`, whose buffers it takes over; also the loss."""
        experience = self.collect(params, tokens, keys)
        total, gradients = self.gradient(params, tokens, experience)
        params, opt_state = self.apply(params, opt_state, gradients)
        return params, opt_state, total

    def _read_rows(self, params, tokens):
        """Final hidden states [B, T, D] and entropies [B, T] of whole rows."""
        hidden, _ = self.model.forward(params, tokens)
        _, stats = next_token_loss(
            hidden, self.model.head(params), tokens, jnp.ones(tokens.shape, jnp.float32)
        )
        return hidden, stats.entropy

    def _select(self, keys, entropy):
        """Starts and whether they are valid, [B, R]."""
        config = self.config
        selection = select_positions(
            keys,
            entropy,
            jnp.ones(entropy.shape, bool),
            num_positions=config.num_positions,
            rollout_length=config.rollout_length,
            method=config.selection,
            temperature=config.selection_temperature,
            edge_margin=config.edge_margin,
        )
        repeat = functools.partial(jnp.repeat, repeats=config.rollouts_per_position, axis=1)
        return repeat(selection.starts), repeat(selection.valid)

    def _generate(self, params, prefix, key):
        """Sample k tokens [1, k] after `prefix` [1, S] with a decode state."""
        model, head = self.model, self.model.head(params)
        hidden, trace = model.forward(params, prefix, with_trace=True)
        state = model.fork(params, trace, jnp.full((1, 1), prefix.shape[1], jnp.int32))

        def sample(last, index):
            z = logits(last, head)[0, 0] / self.config.sampling_temperature
            if self.forbidden is not None:
                z = z.at[self.forbidden].set(-jnp.inf)
            token = jax.random.categorical(jax.random.fold_in(key, index), z)
            return token.astype(jnp.int32)

        def decode(carry, index):
            last, state = carry
            token = sample(last, index)
            extended, state = model.extend(params, token.reshape(1, 1, 1), state)
            return (extended[:, 0], state), token

        final = self.config.rollout_length - 1
        (last, _), tokens = lax.scan(decode, (hidden[:, -1:], state), jnp.arange(final))
        return jnp.append(tokens, sample(last, final))[None]

    def _score(self, params, sequence):
        """Log-probabilities [1, k] and states [1, k, D] of the last k tokens of [1, S + k]."""
        k = self.config.rollout_length
        hidden, _ = self.model.forward(params, sequence)
        log_probs, _ = token_log_probs(
            hidden[:, -k - 1 : -1], self.model.head(params), sequence[:, -k:]
        )
        return log_probs, hidden[:, -k:]

    def _judge(self, tokens, hidden, starts, valid, rollouts, states):
        """Rewards and advantages [B, R]."""
        config = self.config
        row = jnp.arange(starts.shape[0])[:, None, None]
        slots = starts[..., None] + jnp.arange(config.rollout_length)
        rewards = token_rewards(
            config.reward, states, hidden[row, slots], rollouts, tokens[row, slots]
        ).mean(-1)
        group = (starts.shape[0], config.num_positions, config.rollouts_per_position)
        advantages = group_advantages(
            rewards.reshape(group),
            valid.reshape(group),
            grouping=config.grouping,
            normalize_std=config.normalize_std,
        )
        return rewards, advantages.reshape(starts.shape)

    def _ntp_loss(self, params, tokens):
        """Weighted mean next-token loss of full rows."""
        hidden, _ = self.model.forward(params, tokens)
        weights = jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0.0)
        targets = jnp.roll(tokens, -1, axis=1)
        total, _ = next_token_loss(hidden, self.model.head(params), targets, weights)
        return self.config.lambda_sft * total / jnp.sum(weights)

    def _policy_share(self, params, sequence, old_log_probs, advantages, valid, all_valid):
        """One rollout's share of the weighted policy loss."""
        config = self.config
        k = config.rollout_length
        log_probs, _ = self._score(params, sequence)
        loss, _ = policy_loss(
            log_probs,
            old_log_probs,
            advantages,
            jnp.repeat(valid[:, None], k, axis=1),
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            aggregation=config.loss_aggregation,
            mini_batch_mask=jnp.repeat(all_valid.reshape(-1, 1), k, axis=1),
        )
        return config.lambda_rl * loss

    def _add_policy_gradient(self, sums, params, *inputs):
        gradients, total = sums
        share, gradient = jax.value_and_grad(self._policy_share)(params, *inputs)
        return jax.tree.map(jnp.add, gradients, gradient), total + share

    def _apply(self, params, opt_state, gradients):
        updates, opt_state = self.optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state


def _join(parts: list[jax.Array], shape: tuple[int, int]) -> jax.Array:
    """B * R arrays [1, ...] -> [B, R, ...]."""
    return jnp.concatenate(parts).reshape(*shape, *parts[0].shape[1:])
