"""How much of the gradient of an estimator is signal, and how much noise of what it draws."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from arms import Arm
from lab import TUNE, Lab

from refine_jax.models.transformer import Params


def gradients(lab: Lab, params: Params, arm: Arm, batches: int = 12, draws: int = 2) -> np.ndarray:
    """Gradients [batches, draws, P] float32 of batches of an arm's rows, P parameters in a row.

    The draws of a batch have its rows, and positions and rollouts of their own. ReFINE is measured
    without its next-token loss: the policy loss, or minus the expected reward.
    """
    config = arm.config(lab.plan.sizes)
    if config.objective == "refine":
        config = dataclasses.replace(config, lambda_sft=0.0)
    objective = lab.objective(config, arm.rule, 1.0)

    @jax.jit
    def gradient(params, tokens, key):
        batch = {"tokens": tokens}
        keys = jax.random.split(key, tokens.shape[0])
        tree, _ = objective.gradient(params, batch, objective.mini_batch(batch), keys=keys)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])

    found = []
    for number in range(batches):
        tokens = lab.task.documents(lab.plan.arms.rows, TUNE, 1, number).tokens
        keys = jax.random.split(jax.random.key(number), draws)
        found.append([np.asarray(gradient(params, tokens, key)) for key in keys])
    return np.stack(found)


def signal(policy: np.ndarray, next_token: np.ndarray) -> dict[str, float]:
    """How much the `gradients` of a policy say, and how they compare with the next-token loss'.

    {"signal": squared norm of the expected gradient, as a fraction of the expected squared norm
    (unbiased; 1: no noise), "same_rows": the same with the rows given, so that only the draw of
    positions and rollouts is noise, "signal_error", "same_rows_error": standard errors over
    batches, "norm_ratio": of the policy's gradients to those of the next-token loss, both root mean
    squares, "cosine": of the two mean gradients}
    """
    flat = [draws.reshape(-1, draws.shape[-1]).astype(np.float64) for draws in (policy, next_token)]
    squares = [np.mean(np.sum(draws**2, axis=1)) for draws in flat]
    means = [draws.mean(axis=0) for draws in flat]
    norms = [np.linalg.norm(mean) for mean in means]
    shares, errors = jackknife((flat[0] @ flat[0].T).reshape(2 * policy.shape[:2]))
    return {
        "signal": float(shares[0]),
        "signal_error": float(errors[0]),
        "same_rows": float(shares[1]),
        "same_rows_error": float(errors[1]),
        "norm_ratio": float(np.sqrt(squares[0] / squares[1])),
        # Without any rollout that was rewarded there is no direction.
        "cosine": float(means[0] @ means[1] / np.prod(norms)) if norms[0] else 0.0,
    }


def at_equal_cost(share: float, cost: float) -> float:
    """The share of signal if a step had only the rows that a step of next-token training pays for.

    cost: seconds of a step, as a multiple of next-token training's. Noise grows with it.
    """
    return share / (share + cost * (1.0 - share)) if share > 0 else share


def jackknife(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shares of signal, and their standard errors by leaving out one batch at a time."""
    batches = len(products)
    without = [
        _signal_shares(np.delete(np.delete(products, batch, axis=0), batch, axis=2))
        for batch in range(batches)
    ]
    return _signal_shares(products), np.sqrt((batches - 1) * np.var(without, axis=0))


def _signal_shares(products: np.ndarray) -> np.ndarray:
    """Shares of gradients' mean square that batches have in common, and draws of one batch.

    products: inner products [b, n, b, n] of the gradients of b batches, n draws of each. Those of
    two independent gradients have the squared norm of what both expect as their mean.
    """
    batches, draws = products.shape[:2]
    squares, same = np.einsum("bnbn->", products), np.einsum("bnbm->", products)
    if not squares:  # no rollout was rewarded
        return np.zeros(2)
    of_batches = (products.sum() - same) / ((batches - 1) * draws)
    of_draws = (same - squares) / (draws - 1)
    return np.array([of_batches, of_draws]) / squares
