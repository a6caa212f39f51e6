"""Argument specs of window attention: one list for tests and benchmarks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class WindowAttentionSpec:
    """Shapes of one call of `window_attention`; `arguments` draws its arrays.

    heads: A, of which heads_per_group lie side by side. packed: rows of two documents with padding
    before, between and behind them.
    """

    name: str
    tokens: int
    window: int
    batch: int = 2
    heads: int = 2
    head_dim: int = 8
    heads_per_group: int = 1
    packed: bool = False

    def arguments(self, dtype: str = "float32", seed: int = 0) -> tuple[tuple, dict]:
        """(q, k, v, all differentiable; keyword arguments) of `window_attention`."""
        rng = np.random.default_rng([seed, self.tokens])
        groups, size = self.heads // self.heads_per_group, self.heads_per_group * self.head_dim
        shape = (3, self.batch, groups, self.tokens, size)
        arrays = tuple(jnp.asarray(x, dtype) for x in rng.standard_normal(shape, np.float32))
        keywords: dict[str, int | jax.Array] = {
            "window": self.window,
            "heads_per_group": self.heads_per_group,
        }
        if self.packed:
            inside = np.arange(2, self.tokens - 1)
            cuts = np.sort([rng.choice(inside, 3, replace=False) for _ in range(self.batch)])
            place = np.arange(self.tokens)
            count = (place >= cuts[:, :, None]).sum(1)
            # Rows of even number: padding on both sides; of odd number: between the documents.
            ids = np.where(np.arange(self.batch)[:, None] % 2, [0], count % 3)
            between = np.select([count == 0, count == 3], [1, 2], 0)
            ids = np.where(np.arange(self.batch)[:, None] % 2, between, ids)
            keywords["ids"] = jnp.asarray(ids, jnp.int32)
        return arrays, keywords

    def flops(self) -> int:
        """Floating point operations of the forward pass of rows of one document.

        Two products of 2 hd operations for every query and each key that it sees.
        """
        window = min(self.window, self.tokens)
        pairs = self.tokens * window - window * (window - 1) // 2
        return 2 * 2 * self.batch * self.heads * self.head_dim * pairs


TEST_SPECS = (
    WindowAttentionSpec("within_a_block", 50, 7, packed=True),
    WindowAttentionSpec("two_tokens", 150, 2, packed=True),
    WindowAttentionSpec("over_blocks", 300, 100, packed=True),
    WindowAttentionSpec("side_by_side", 290, 130, heads=4, heads_per_group=2, packed=True),
    WindowAttentionSpec("one_document", 290, 130, heads_per_group=2),
    WindowAttentionSpec("longer_than_the_row", 40, 100),
)

# LaCT-760M.
BENCH_SPECS = (WindowAttentionSpec("window_attention", 16384, 2048, 1, 24, 64, heads_per_group=2),)
