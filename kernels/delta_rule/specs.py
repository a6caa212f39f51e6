"""Argument specs of the delta rule: one list for tests and benchmarks."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class DeltaSpec:
    """Shapes and options of one call of `delta_rule`; `arguments` draws its arrays."""

    name: str
    tokens: int
    batch: int = 2
    heads: int = 2
    value_heads: int = 2
    key_dim: int = 8
    value_dim: int = 12
    chunk_size: int = 16
    gated: bool = False
    strong_decay: bool = False
    initial_state: bool = False
    documents: int = 1
    beta_max: float = 1.0
    save_every: int | None = None
    normalize: bool = False

    def arguments(self, dtype: str = "float32", seed: int = 0) -> tuple[dict, dict]:
        """(arrays, static options) for `delta_rule`; arrays that are not used are left out."""
        rng = np.random.default_rng([seed, self.tokens])
        rows = (self.batch, self.tokens)

        def normal(*shape):
            return rng.standard_normal(shape, dtype=np.float32)

        def unit(x):
            return x / np.linalg.norm(x, axis=-1, keepdims=True)

        norm = (lambda x: x) if self.normalize else unit
        arrays = {
            "q": norm(normal(*rows, self.heads, self.key_dim)),
            # Half of each key is shared: correlated keys make the triangular systems matter.
            "k": norm(normal(*rows, self.heads, self.key_dim) + 1.0),
            "v": normal(*rows, self.value_heads, self.value_dim),
        }
        arrays = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
        beta = self.beta_max / (1 + np.exp(-normal(*rows, self.value_heads)))
        arrays["beta"] = jnp.asarray(beta, jnp.float32)
        if self.gated:
            log_decay = -np.exp(normal(*rows, self.value_heads) - 1)
            if self.strong_decay:
                # Tokens that forget everything beside tokens that forget nothing.
                log_decay = np.where(rng.random(log_decay.shape) < 0.2, -300.0, log_decay * 1e-3)
            arrays["log_decay"] = jnp.asarray(log_decay, jnp.float32)
        if self.initial_state:
            shape = (self.batch, self.value_heads, self.key_dim, self.value_dim)
            arrays["initial_state"] = jnp.asarray(normal(*shape))
        if self.documents > 1:
            cuts = np.sort(rng.integers(1, self.tokens, (self.batch, self.documents - 1)), axis=1)
            document = (np.arange(self.tokens)[None, :, None] >= cuts[:, None]).sum(-1)
            arrays["document"] = jnp.asarray(document, jnp.int32)
        options = {
            "chunk_size": self.chunk_size,
            "save_every": self.save_every,
            "normalize": self.normalize,
        }
        return arrays, options

    def flops(self) -> int:
        """Floating point operations of the forward pass in chunks (2 m n k a matrix product).

        For every token and value head, with chunk C: K C each for q k^T and k k^T, C V each for
        the inverse times the errors and for P U, K V each for k S, q S and k^T U, times 2.
        Inverting the C x C matrices (about 4 C^2 / 3) and elementwise work are not counted.
        """
        c, k, v = self.chunk_size, self.key_dim, self.value_dim
        per_token = 2 * (2 * c * k + 2 * c * v + 3 * k * v)
        return per_token * self.batch * self.tokens * self.value_heads


_C = 16

TEST_SPECS = (
    *(DeltaSpec(f"ungated_{n}", tokens=n) for n in (1, _C - 1, _C, _C + 1, 3 * _C + 7)),
    DeltaSpec("initial_state", tokens=37, initial_state=True, save_every=_C),
    DeltaSpec("negative_eigenvalues", tokens=37, beta_max=2.0),
    DeltaSpec(
        "documents", tokens=61, value_heads=4, documents=5, initial_state=True, save_every=2 * _C
    ),
    DeltaSpec("gated", tokens=55, value_heads=4, gated=True, initial_state=True, save_every=2 * _C),
    DeltaSpec("normalized", tokens=37, heads=1, value_heads=2, gated=True, normalize=True),
    DeltaSpec("strong_decay", tokens=48, gated=True, strong_decay=True, initial_state=True),
    DeltaSpec(
        "value_groups", tokens=61, value_heads=6, gated=True, documents=4, initial_state=True
    ),
    DeltaSpec("long_chunk", tokens=130, chunk_size=64, key_dim=32, value_dim=16, save_every=128),
)

BENCH_SPECS = (
    DeltaSpec("delta", 4096, 1, 16, 16, 128, 128, chunk_size=64),
    DeltaSpec("gated_delta", 4096, 1, 16, 16, 128, 128, chunk_size=64, gated=True),
)
