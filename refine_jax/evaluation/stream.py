"""Next-token losses of texts of any length, with memory that does not depend on it.

A text is read in blocks of one size, each by extending the decode states that the block before it
left: one program for all of them, however long the text is.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.generation.sampling import not_finite
from refine_jax.models.head import next_token_loss
from refine_jax.models.transformer import Model, Params, State

BLOCK = 4096  # tokens


class Read(NamedTuple):
    """What is known of B texts after T tokens of each.

    nll, correct: [B, T] float32 on the host, losses (nats) and hits of the tokens after them.
    state: decode states after them, if T is a multiple of the block; else of no use.
    """

    nll: np.ndarray
    correct: np.ndarray
    state: State


class Reader:
    """Reads texts in blocks with one model: a program for every number of texts."""

    def __init__(self, model: Model, params: Params, *, block: int = BLOCK):
        """block: tokens of a text that are read at a time."""
        self.block = block
        self._model, self._params = model, params
        self._begin = jax.jit(
            lambda params, rows: model.init_state(params, (rows, 1)), static_argnums=1
        )
        self._step = jax.jit(functools.partial(_step, model), donate_argnums=1)

    def read(self, tokens: np.ndarray, state: State | None = None) -> Read:
        """Predict tokens[:, 1:] of `tokens` [B, T + 1] int32, T >= 1, each from all before it.

        state: of an earlier call, which is consumed, whose texts go on with the first token; None:
        the texts begin with it.

        Raises RunError if the model's predictions are not finite.
        """
        rows, count = tokens.shape[0], tokens.shape[1] - 1
        if state is None:
            state = self._begin(self._params, rows)
        state = self._model.with_room(state, -(-count // self.block) * self.block)
        pending: list[tuple[jax.Array, jax.Array]] = []
        results = []
        for start in range(0, count, self.block):
            part = np.zeros((rows, self.block + 1), np.int32)
            taken = tokens[:, start : start + self.block + 1]
            part[:, : taken.shape[1]] = taken  # causal: what follows the end changes nothing before
            *stats, state = self._step(self._params, state, part)
            pending.append(stats)
            if len(pending) > 1:  # one block ahead of the device, no more
                results.append(jax.device_get(pending.pop(0)))
        results += jax.device_get(pending)
        nll, correct = (np.concatenate(x, axis=1)[:, :count] for x in zip(*results, strict=True))
        if not np.isfinite(nll).all():
            raise not_finite(f"after {int(np.argmin(np.isfinite(nll).all(axis=0))) + 1} tokens")
        return Read(nll, correct, state)


def _step(model: Model, params: Params, state: State, tokens: jax.Array):
    """Compute nll, correct [B, S] of tokens [B, S + 1] but the first; state before the last."""
    hidden, state = model.extend(params, tokens[:, None, :-1], state)
    weights = jnp.zeros((tokens.shape[0], tokens.shape[1] - 1), jnp.float32)  # no sum is wanted
    _, stats = next_token_loss(
        hidden[:, 0],
        model.head(params),
        tokens[:, 1:],
        weights,
        implementation=model.policy.head_implementation,
    )
    return stats.nll, stats.correct, state
