"""Argument specs of the next-token loss: one list for tests and benchmarks."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class CrossEntropySpec:
    """Shapes of one call of `next_token_loss`; `arguments` draws its arrays.

    confident: hidden states point at the target's row, so that gradients nearly cancel.
    """

    name: str
    tokens: int
    batch: int = 1
    size: int = 32
    vocabulary: int = 300
    confident: bool = False

    def arguments(self, dtype: str = "float32", seed: int = 0) -> tuple:
        """(hidden, head, targets, weights)."""
        rng = np.random.default_rng([seed, self.tokens])
        rows = (self.batch, self.tokens)
        hidden = rng.standard_normal((*rows, self.size), dtype=np.float32)
        head = rng.standard_normal((self.vocabulary, self.size), dtype=np.float32)
        head *= 2 / self.size**0.5
        targets = rng.integers(0, self.vocabulary, rows)
        # Half of the targets are the likeliest word.
        likeliest = (hidden @ head.T).argmax(-1)
        targets = np.where(rng.random(rows) < 0.5, likeliest, targets)
        if self.confident:
            hidden = hidden / 4 + 3 * head[targets]
        weights = rng.random(rows, dtype=np.float32) * (rng.random(rows) < 0.9)
        return (
            jnp.asarray(hidden, dtype),
            jnp.asarray(head),
            jnp.asarray(targets, jnp.int32),
            jnp.asarray(weights, jnp.float32),
        )

    def flops(self) -> int:
        """Floating point operations of loss and gradient: three products of 2 T D V."""
        return 3 * 2 * self.batch * self.tokens * self.size * self.vocabulary


TEST_SPECS = (
    CrossEntropySpec("one_token", 1, vocabulary=129),
    CrossEntropySpec("ragged_rows", 37, batch=2),
    CrossEntropySpec("confident", 40, confident=True),
)

BENCH_SPECS = (CrossEntropySpec("ce_entropy", 16384, 1, 2048, 32000),)
