"""Argument specs of what forks read: one list for tests and benchmarks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.kernels.fork_reads.reference import ForkRows, Reach


def _draw(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


@dataclasses.dataclass(frozen=True)
class RowSpec:
    """Shapes of one call of `attend_row`: some queries see nothing, none the last 128 keys."""

    name: str
    blocks: int
    count: int
    tokens: int
    rows: int = 1
    groups: int = 3
    size: int = 128
    scale: float = 0.1

    def arguments(self, dtype: str = "float32", seed: int = 0) -> tuple[tuple, Reach]:
        """(q, k, v, all differentiable; reach) of `attend_row`."""
        rng = np.random.default_rng([seed, self.tokens])
        places = self.blocks, self.rows, self.count
        last = rng.integers(-1, self.tokens - 300, places)
        first = last - rng.integers(-1, 600, places)
        shape = self.groups, self.count, self.size
        queries = _draw(rng, self.blocks, self.rows, *shape, dtype=dtype)
        shape = self.rows, self.groups, self.tokens, self.size
        row = (_draw(rng, *shape, dtype=dtype) for _ in "kv")
        return (queries, *row), Reach(*(jnp.asarray(x, jnp.int32) for x in (first, last)))


@dataclasses.dataclass(frozen=True)
class TraceSpec:
    """Shapes of one call of `attend_windows`, and of `read_weights`: six forks of two rows.

    The forks stand before any token, after few, deep in a row, in a later document, at its end.
    heads: n, side by side. count: S.
    """

    name: str
    tokens: int
    window: int
    heads: int
    count: int
    groups: int = 3
    size: int = 128
    fast_heads: int = 2
    dim: int = 128
    hidden: int = 256
    chunks: int = 3
    layers: int = 2
    rows: int = 2

    def where(self) -> ForkRows:
        """Places of the forks, in layer 1."""
        tokens = self.tokens
        last = [-1, 0, 5, tokens // 2 + 3, tokens - 9, tokens - 1]
        seen = [0, 1, 6, tokens // 2 + 4, 3, tokens]
        row, chunk = [0, 1, 1, 0, 1, 0], [0, 0, 2, 1, 1, 2]
        return ForkRows(*(jnp.asarray(x, jnp.int32) for x in (1, row, last, seen, chunk)))

    def window_arguments(self, dtype: str = "float32", seed: int = 0) -> tuple:
        """(new, row_k, row_v, where, window, heads) of `attend_windows`."""
        rng = np.random.default_rng([seed, self.tokens])
        new = tuple(_draw(rng, 6, self.groups, self.count, self.size, dtype=dtype) for _ in "qkv")
        shape = self.layers, self.rows, self.groups, self.tokens, self.size
        row = (_draw(rng, *shape, dtype=dtype) for _ in "kv")
        return new, *row, self.where(), self.window, self.heads

    def weight_arguments(self, dtype: str = "float32", seed: int = 0) -> tuple:
        """(q, weights, where) of `read_weights`; the weights are float32."""
        rng = np.random.default_rng([seed, self.count])
        q = _draw(rng, 6, self.fast_heads, self.count, self.dim, dtype=dtype)
        shapes = (self.hidden, self.dim), (self.dim, self.hidden), (self.hidden, self.dim)
        lead = self.layers, self.rows, self.chunks, self.fast_heads
        weights = tuple(_draw(rng, *lead, *shape) / shape[1] ** 0.5 for shape in shapes)
        return q, weights, self.where()


ROW_SPECS = (
    RowSpec("one_block", 1, 20, 1280, rows=2),
    RowSpec("more_queries_than_lanes", 3, 136, 1024),
    RowSpec("blocks", 2, 16, 1536, rows=2),
)
TRACE_SPECS = (
    TraceSpec("longer_than_the_row", 1280, 2048, 2, 5),
    TraceSpec("two_heads", 1024, 300, 2, 5),
    TraceSpec("four_heads", 1280, 300, 4, 1),
    TraceSpec("more_tokens_than_sublanes", 1024, 512, 1, 9),
    TraceSpec("two_tokens", 256, 2, 2, 5),
)
