"""Argument specs of the LaCT op: one list for tests and benchmarks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.kernels.lact.reference import Options, Weights


@dataclasses.dataclass(frozen=True)
class LaCTSpec:
    """Shapes and options of one call of `lact`; `arguments` draws its arrays.

    empty: a chunk without a token. rate: largest learning rate.
    """

    name: str
    chunks: int = 3
    batch: int = 1
    heads: int = 2
    chunk: int = 4
    dim: int = 6
    hidden: int = 6
    rate_channels: int = 1
    momentum: bool = True
    masked: bool = False
    empty: int | None = None
    resets: bool = False
    options: Options = Options()  # noqa: RUF009 (frozen)
    rate: float = 0.1

    def weights(self, rng: np.random.Generator) -> Weights:
        """Draw random matrices [H, F, d], [H, d, F], [H, F, d]."""
        shapes = (self.hidden, self.dim), (self.dim, self.hidden), (self.hidden, self.dim)
        draw = (
            rng.standard_normal((self.heads, *shape), np.float32) / shape[1] ** 0.5
            for shape in shapes
        )
        return Weights(*map(jnp.asarray, draw))

    def arguments(self, dtype: str = "float32", seed: int = 0) -> tuple[tuple, dict]:
        """(arrays and weights, all differentiable; keyword arguments) of `lact`."""
        rng = np.random.default_rng(seed)
        slots = (self.batch, self.chunks, self.heads, self.chunk)

        def normal(*shape):
            return rng.standard_normal((*slots, *shape), np.float32)

        def unit(x):
            return x / np.linalg.norm(x, axis=-1, keepdims=True)

        tokens = (unit(normal(self.dim)), unit(normal(self.dim)), normal(self.dim))
        tokens = tuple(jnp.asarray(x, dtype) for x in tokens)
        rates = self.rate * rng.random((*slots, 3, self.rate_channels), np.float32)
        momentum = rng.random(slots, np.float32) if self.momentum else None
        rates, momentum = jax.tree.map(jnp.asarray, (rates, momentum))
        keywords: dict = {"options": self.options}
        if self.masked:
            mask = rng.random((self.batch, self.chunks, self.chunk)) < 0.7
            if self.empty is not None:
                mask[:, self.empty] = False
            keywords["mask"] = jnp.asarray(mask)
        if self.resets:
            keywords["reset"] = jnp.asarray(rng.random((self.batch, self.chunks)) < 0.4)
        return (*tokens, rates, momentum, self.weights(rng)), keywords

    def flops(self) -> int:
        """Floating point operations of the forward pass (2 m n k a matrix product).

        A chunk is read by 3 products of 2 C d F operations a head, and its update takes 6; the
        last chunk makes none. Newton-Schulz and elementwise work are not counted.
        """
        products = 3 * self.chunks + 6 * (self.chunks - 1)
        return 2 * self.batch * self.heads * self.chunk * self.dim * self.hidden * products


TEST_SPECS = (
    LaCTSpec("one_chunk", chunks=1),
    LaCTSpec("plain", chunks=4, momentum=False, hidden=9),
    LaCTSpec("rate_channels", rate_channels=6),
    LaCTSpec("masked_reset", batch=2, chunks=5, masked=True, empty=1, resets=True),
    LaCTSpec("reset", batch=2, resets=True),
    LaCTSpec("prenorm", options=Options(prenorm=True), masked=True, resets=True),
    LaCTSpec("muon", batch=2, options=Options(muon="float32"), hidden=9),
    LaCTSpec("fused_muon", chunk=8, options=Options(muon="float32", fused=True), hidden=4),
    LaCTSpec("fused", chunk=7, options=Options(fused=True), dim=5, hidden=130),
)

# The published 760M and 3B models.
BENCH_SPECS = (
    LaCTSpec("lact", 4, 1, 4, 2048, 384, 384, rate=0.002),
    LaCTSpec("lact_3b", 4, 1, 4, 2048, 768, 768, rate=0.002),
)
