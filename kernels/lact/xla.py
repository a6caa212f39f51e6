"""The LaCT fast-weight op in XLA, and its parts as the decode path needs them.

Letters as in reference.py. Operands of the matrix products have the dtype of q, k, v (bfloat16 or
float32); products accumulate in float32, and weights, momentum and their gradients are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.kernels.device import backend
from refine_jax.kernels.lact.reference import (
    EPS,
    NEWTON_SCHULZ,
    PLAIN,
    FastState,
    Options,
    Weights,
)
from refine_jax.kernels.numerics import dot, safe_norm


def row_norms(weights: Weights) -> Weights:
    """Norms of the rows of the initial weights, [..., F, 1], [..., d, 1], [..., F, 1]."""
    return Weights(*map(safe_norm, weights))


def fresh_state(weights: Weights, use_momentum: bool, options: Options) -> FastState:
    """The state at the start of a document, of initial weights [..., H, F, d], [..., H, d, F]."""
    return FastState(
        weights,
        Weights(*map(jnp.zeros_like, weights)) if use_momentum else None,
        weights if options.prenorm else None,
    )


def apply_fast_weights(weights: Weights, q: jax.Array) -> jax.Array:
    """`W1 (silu(W0 q) * (W2 q))` for q [..., H, C, d]; result as q, in its dtype."""
    gate = dot("...cd,...fd->...cf", q, weights.w0, q.dtype)
    up = dot("...cd,...fd->...cf", q, weights.w2, q.dtype)
    return dot("...cf,...df->...cd", jax.nn.silu(gate) * up, weights.w1, q.dtype).astype(q.dtype)


def update_sums(weights: Weights, k: jax.Array, v: jax.Array, rates: jax.Array) -> Weights:
    """The gradient-ascent step `d/dW sum_t rate_t <f(k_t), v_t>` of the tokens given.

    k, v: [..., H, C, d]. rates: [..., H, C, 3, E] float32, for W0, W1, W2; 0 leaves a token out.
    With E > 1 they are one a channel: of the hidden for W1, of the key for W0 and W2.
    """
    rate0, rate1, rate2 = rates[..., 0, :], rates[..., 1, :], rates[..., 2, :]
    gate = dot("...cd,...fd->...cf", k, weights.w0, k.dtype)
    up = dot("...cd,...fd->...cf", k, weights.w2, k.dtype)
    error = dot("...cd,...df->...cf", v, weights.w1, k.dtype)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = error * up * (sigmoid + silu * (1 - sigmoid))
    d_up = error * silu
    k0 = k2 = k
    if rates.shape[-1] == 1:
        d_gate, d_up = d_gate * rate0, d_up * rate2
    else:
        k0, k2 = k * rate0, k * rate2
    return Weights(
        dot("...cf,...cd->...fd", d_gate, k0, k.dtype),
        dot("...cd,...cf->...df", v, silu * up * rate1, k.dtype),
        dot("...cf,...cd->...fd", d_up, k2, k.dtype),
    )


def newton_schulz(g: jax.Array, dtype: str) -> jax.Array:
    """Five Newton-Schulz steps towards the orthogonal factor of g [..., rows, columns] float32.

    With dtype "bfloat16" the input and every intermediate result are rounded to bfloat16, as in
    the reference; by `reduce_precision`, which XLA may not take out as it may a pair of casts.
    """
    if g.shape[-2] > g.shape[-1]:
        return newton_schulz(g.mT, dtype).mT
    operand = jnp.dtype(dtype)

    def low(x):
        return lax.reduce_precision(x, 8, 7) if operand == jnp.bfloat16 else x

    x = low(g)
    norm = low(safe_norm(x.reshape(*x.shape[:-2], 1, -1)))
    x = low(x / low(norm + 1e-7))

    def iterate(x, coefficients):
        a, b, c = coefficients
        xx = low(dot("...ij,...kj->...ik", x, x, operand))
        y = low(low(b * xx) + low(dot("...ij,...jk->...ik", low(c * xx), xx, operand)))
        return low(low(a * x) + low(dot("...ij,...jk->...ik", y, x, operand))), None

    return lax.scan(iterate, x, jnp.asarray(NEWTON_SCHULZ))[0]


def apply_update(
    state: FastState,
    sums: Weights,
    momentum_mean: jax.Array | None,
    norms: Weights,
    options: Options,
) -> FastState:
    """The state after the update that `sums` and the mean momentum [..., H] of a chunk make.

    norms: `row_norms` of the initial weights.
    """
    step, momentum = sums, None
    if momentum_mean is not None:
        mean = momentum_mean[..., None, None]
        step = momentum = jax.tree.map(lambda d, last: d + mean * last, sums, state.momentum)
    if options.muon is not None:
        if options.fused:
            both = newton_schulz(jnp.concatenate([step.w0, step.w2], -2), options.muon)
            d0, d2 = jnp.split(both, 2, axis=-2)
        else:
            d0, d2 = (newton_schulz(d, options.muon) for d in (step.w0, step.w2))
        step = Weights(d0, newton_schulz(step.w1, options.muon), d2)
    base = jax.tree.map(jnp.add, state.accumulator if options.prenorm else state.weights, step)

    def rescale(w, norm):
        if options.fused and not options.prenorm:
            return w * (norm * lax.rsqrt(jnp.sum(w * w, -1, keepdims=True) + EPS))
        return w * (norm / (safe_norm(w) + EPS))

    weights = jax.tree.map(rescale, base, norms)
    return FastState(weights, momentum, base if options.prenorm else None)


def _heads_one_by_one(q: jax.Array, weights: Weights) -> bool:
    """Whether a head's [C, F] is enough work for the device.

    On CPUs one head after the other then stays in the cache; accelerators want all at once.
    """
    return backend() == "cpu" and q.shape[3] * weights.w1.shape[-1] >= 1 << 16


def _one_by_one(function, *arguments):
    """`function` of arrays [B, H, ...] by a loop over the B * H heads."""
    lead = jax.tree.leaves(arguments)[0].shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arguments)
    out = lax.map(lambda args: function(*args), flat)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), out)


def by_heads(function: Callable, q: jax.Array, weights: Weights) -> Callable:
    """`function` of arrays [B, H, ...] of one chunk, in the way that suits the device.

    It keeps nothing but its arguments for the backward pass. q, weights: as `lact` gets them.
    """
    function = jax.checkpoint(function)
    if _heads_one_by_one(q, weights):
        return functools.partial(_one_by_one, function)
    return function


def lact_xla(q, k, v, rates, momentum, weights, **keywords) -> tuple[jax.Array, FastState]:
    """Run `lact` of api.py, with its shapes: q [B, N, H, C, d] and so on.

    What a chunk's backward pass needs is computed again from its weights.
    """
    read_chunk = by_heads(apply_fast_weights, q, weights)

    def read(weights, q):
        if q.shape[1] == 1:
            return read_chunk(*jax.tree.map(lambda x: x[:, 0], (weights, q)))[:, None]
        return _by_chunk(lax.map(lambda chunk: read_chunk(*chunk), _by_chunk((weights, q))))

    sums = by_heads(update_sums, q, weights)
    return lact_by_parts(read, sums, q, k, v, rates, momentum, weights, **keywords)


def lact_by_parts(
    read, sums, q, k, v, rates, momentum, weights, *, mask=None, reset=None, options=PLAIN
) -> tuple[jax.Array, FastState]:
    """Run `lact` of api.py by the functions of `scan_chunks`."""
    rates, mean = mask_slots(rates, momentum, mask)
    tokens = q, k, v, rates, mean
    return scan_chunks(read, sums, *tokens, weights, reset=reset, options=options)


def mask_slots(
    rates: jax.Array,
    momentum: jax.Array | None,
    mask: jax.Array | None,
    total: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> tuple[jax.Array, jax.Array | None]:
    """Leave the slots without a token out of rates and momentum, with the shapes of api.py.

    total: sums [B, N, ...] over the devices that share the slots of a chunk.

    Returns the rates [B, N, H, C, 3, E], 0 where mask is False, and the mean of the momentum over
    the tokens of every chunk [B, N, H], None without momentum.
    """
    mean = None
    if momentum is not None:
        live = jnp.ones((), bool) if mask is None else mask[:, :, None, :]
        count = momentum.shape[3] if mask is None else jnp.maximum(total(live.sum(-1)), 1)
        mean = total(jnp.where(live, momentum, 0.0).sum(-1)) / count
    if mask is not None:
        rates = jnp.where(mask[:, :, None, :, None, None], rates, 0.0)
    return rates, mean


def scan_chunks(
    read, sums, q, k, v, rates, mean, weights, *, reset, options
) -> tuple[jax.Array, FastState]:
    """Scan over the updates of all chunks but the last, then read every chunk with its weights.

    Arrays and results are those of api.py, with the rates in any form [B, N, H, ...] that `sums`
    takes, 0 where there is no token, and the mean momentum [B, N, H] of every chunk.

    read: `apply_fast_weights` for all chunks, weights [B, N, H, ...] and q [B, N, H, C, d].
    sums: `update_sums` for one chunk. Neither should keep [C, F] arrays for the backward pass.
    """
    state, update = chunk_updates(sums, weights, q.shape[0], mean is not None, options)
    states = jax.tree.map(lambda x: x[None], state)
    if q.shape[1] > 1:
        # The update after the last chunk is never made here: what follows may be nothing.
        chunks = _by_chunk(jax.tree.map(lambda x: x[:, :-1], (k, v, rates, mean)))
        again = None if reset is None else reset[:, 1:].T
        _, later = lax.scan(lambda *x: (update(*x),) * 2, state, (*chunks, again))
        states = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), states, later)
    states = _by_chunk(states)
    return read(states.weights, q), states


def chunk_updates(
    sums: Callable[[Weights, jax.Array, jax.Array, jax.Array], Weights],
    weights: Weights,
    num_rows: int,
    use_momentum: bool,
    options: Options,
) -> tuple[FastState, Callable[[FastState, tuple], FastState]]:
    """Return the state of B rows at the start of a document, and the update after a chunk.

    sums: as in `scan_chunks`. weights: initial ones [H, ...].

    The update takes the state [B, H, ...] of a chunk, its k, v [B, H, C, d], rates and mean
    momentum [B, H], and whether the next chunk starts a document ([B], or None: it does not). It
    returns the state of the next chunk.
    """
    norms = row_norms(weights)
    fresh = jax.tree.map(
        lambda w: jnp.broadcast_to(w, (num_rows, *w.shape)).astype(jnp.float32),
        fresh_state(weights, use_momentum, options),
    )

    # Apart from the sums: its derivative needs their values, and they would be computed again.
    @jax.checkpoint
    def next_state(state, step, mean):
        return apply_update(state, step, mean, norms, options)

    def update(state, chunk):
        k, v, rates, mean, again = chunk
        state = next_state(state, sums(state.weights, k, v, rates), mean)
        if again is None:
            return state
        again = again[:, None, None, None]
        return jax.tree.map(lambda a, b: jnp.where(again, a, b), fresh, state)

    return fresh, update


def _by_chunk(tree):
    """Swap rows and chunks: arrays [B, N, ...] to [N, B, ...], and back."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tree)
