"""The LaCT fast-weight op: its types and its specification.

A SwiGLU network `f(z) = W1 (silu(W0 z) * (W2 z))` per head whose weights change once a chunk: every
chunk first reads (`f(q)` with the weights as they are), then writes (one step on its keys and
values). Source: LaCT (arXiv 2505.23884), the `lact_llm` code and ReFINE's checkpoints.

Letters: B batch, N chunks, H heads, C chunk, d key and value dim, F hidden, E rate channels.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
EPS = 1e-5


class Weights(NamedTuple):
    """One array per matrix of the fast network: w0, w2 [..., F, d], w1 [..., d, F]."""

    w0: jax.Array
    w1: jax.Array
    w2: jax.Array


class FastState(NamedTuple):
    """The fast network between two updates; float32, leaves [..., H, F, d] or [..., H, d, F].

    weights: what is applied and differentiated.
    momentum: the momentum sum after the last update; None without momentum.
    accumulator: the un-normalised weights M of the prenorm variant; None in the others.
    """

    weights: Weights
    momentum: Weights | None = None
    accumulator: Weights | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """Variants of the update.

    prenorm: normalise an accumulator `M` for use instead of rescaling the weights themselves.
    muon: orthogonalise the step by Newton-Schulz in this dtype, "float32" or "bfloat16".
    fused: as the reference's fused kernel: eps inside the root of the row rescaling (postnorm
        only), and W0 and W2 orthogonalised as one stacked matrix.
    """

    prenorm: bool = False
    muon: str | None = None
    fused: bool = False

    def __post_init__(self):
        if self.muon not in (None, "float32", "bfloat16"):
            raise ValueError(
                f"muon must be None, 'float32' or 'bfloat16'. Got: muon={self.muon!r}."
            )


PLAIN = Options()


def lact_reference(
    q, k, v, rates, momentum, weights, *, mask=None, reset=None, options=PLAIN
) -> tuple[jax.Array, FastState]:
    """The specification of `lact` (see api.py), chunk after chunk in plain float32 formulas."""
    live = jnp.ones(q.shape[:2] + q.shape[3:4], bool) if mask is None else mask  # [B, N, C]
    reset = jnp.zeros(q.shape[:2], bool) if reset is None else reset
    initial = Weights(*(jnp.broadcast_to(w, q.shape[:1] + w.shape) for w in weights))
    fresh = FastState(
        initial,
        None if momentum is None else Weights(*map(jnp.zeros_like, initial)),
        initial if options.prenorm else None,
    )

    def chunk_step(state, chunk):
        q, k, v, rates, momentum, live, reset = chunk
        state = jax.tree.map(lambda a, b: jnp.where(reset[:, None, None, None], a, b), fresh, state)
        w0, w1, w2 = state.weights
        z0, z2 = (jnp.einsum("bhcd,bhfd->bhcf", q, w) for w in (w0, w2))
        out = jnp.einsum("bhcf,bhdf->bhcd", jax.nn.silu(z0) * z2, w1)

        rates = jnp.where(live[:, None, :, None, None], rates, 0)
        rate0, rate1, rate2 = jnp.moveaxis(rates, -2, 0)  # [B, H, C, E]
        g, m = (jnp.einsum("bhcd,bhfd->bhcf", k, w) for w in (w0, w2))
        e = jnp.einsum("bhcd,bhdf->bhcf", v, w1)
        sigmoid = jax.nn.sigmoid(g)
        slope = sigmoid * (1 + g * (1 - sigmoid))  # of silu, at g
        step = Weights(
            jnp.einsum("bhcf,bhcd->bhfd", e * m * slope, rate0 * k),
            jnp.einsum("bhcd,bhcf->bhdf", v, rate1 * g * sigmoid * m),
            jnp.einsum("bhcf,bhcd->bhfd", e * g * sigmoid, rate2 * k),
        )
        mean = None
        if momentum is not None:
            count = jnp.maximum(live.sum(-1), 1)[:, None]
            mean = jnp.where(live[:, None], momentum, 0).sum(-1) / count
        return _update(state, step, mean, initial, options), (out, state)

    chunks = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, rates, momentum, live, reset))
    _, results = jax.lax.scan(chunk_step, fresh, chunks)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), results)


def newton_schulz_reference(g: jax.Array, dtype: str) -> jax.Array:
    """Five Newton-Schulz steps towards the orthogonal factor of `g` [..., rows, columns]."""
    if g.shape[-2] > g.shape[-1]:
        return newton_schulz_reference(g.mT, dtype).mT

    def low(x):
        return jax.lax.reduce_precision(x, 8, 7) if dtype == "bfloat16" else x

    x = low(g)
    square = jnp.sum(x * x, (-2, -1), keepdims=True)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    x = low(x / low(low(norm) + 1e-7))

    def iterate(x, coefficients):
        a, b, c = coefficients
        xx = low(x @ x.mT)
        y = low(low(b * xx) + low(low(c * xx) @ xx))
        return low(low(a * x) + low(y @ x)), None

    return jax.lax.scan(iterate, x, jnp.asarray(NEWTON_SCHULZ))[0]


def _norm(w: jax.Array, eps_inside: bool = False) -> jax.Array:
    square = jnp.sum(w * w, -1, keepdims=True)
    if eps_inside:
        return jnp.sqrt(square + EPS)
    # The gradient of the norm at zero counts as 0.
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _update(state, step, mean, initial, options):
    momentum = None
    if mean is not None:
        mean = mean[..., None, None]
        step = Weights(*(d + mean * last for d, last in zip(step, state.momentum, strict=True)))
        momentum = step
    if options.muon and options.fused:
        both = newton_schulz_reference(jnp.concatenate([step.w0, step.w2], -2), options.muon)
        d0, d2 = jnp.split(both, 2, -2)
        step = Weights(d0, newton_schulz_reference(step.w1, options.muon), d2)
    elif options.muon:
        step = Weights(*(newton_schulz_reference(d, options.muon) for d in step))
    base = state.accumulator if options.prenorm else state.weights
    base = Weights(*(w + d for w, d in zip(base, step, strict=True)))
    rows = Weights(*map(_norm, initial))
    if options.fused and not options.prenorm:
        weights = Weights(*(w / _norm(w, True) * n for w, n in zip(base, rows, strict=True)))
    else:
        weights = Weights(*(w / (_norm(w) + EPS) * n for w, n in zip(base, rows, strict=True)))
    return FastState(weights, momentum, base if options.prenorm else None)
