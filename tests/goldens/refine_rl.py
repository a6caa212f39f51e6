"""The method's functions as golden tests and tests of laws call them, and how draws are judged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from refine_jax.refine import grpo, selection

select = jax.jit(
    selection.select_positions,
    static_argnames=("num_positions", "rollout_length", "method", "temperature", "edge_margin"),
)


normalize = jax.jit(grpo.normalize_groups, static_argnames="normalize_std")


def chi_square_p_value(draws, probabilities, size):
    """p-value of `draws` [n, spans] against `probabilities` [spans, >= size]; rare ones pooled."""
    statistic, freedom = 0.0, 0
    for j, p in enumerate(probabilities):
        expected = p[:size] / p[:size].sum() * len(draws)
        counts = np.bincount(draws[:, j], minlength=size)
        assert counts.size == size
        rare = expected < 5
        if rare.any():
            expected = np.append(expected[~rare], expected[rare].sum())
            counts = np.append(counts[~rare], counts[rare].sum())
        statistic += ((counts - expected) ** 2 / expected).sum()
        freedom += expected.size - 1
    return scipy.stats.chi2.sf(statistic, freedom) if freedom else 1.0


def draw(entropy, mask, count, **options):
    """Selections [count, c] of one row, drawn `count` times."""
    keys = jax.random.split(jax.random.key(1), count)
    rows = [jnp.broadcast_to(jnp.asarray(x), (count, len(x))) for x in (entropy, mask)]
    return select(keys, *rows, **options)


def brute_force_valid(starts, mask, document, k):
    valid = np.zeros(starts.shape, bool)
    for (row, j), start in np.ndenumerate(starts):
        if start >= 1 and start + k <= mask.shape[1]:
            slots = slice(start - 1, start + k)
            owner = document[row, slots]
            valid[row, j] = mask[row, slots].all() and (owner == owner[0]).all()
    return valid


@functools.partial(jax.jit, static_argnames=("aggregation",))
def loss_and_gradient(log_probs, old_log_probs, advantages, mask, *, whole=None, **options):
    loss = functools.partial(grpo.policy_loss, mini_batch_mask=whole, **options)
    return jax.value_and_grad(loss, has_aux=True)(log_probs, old_log_probs, advantages, mask)
