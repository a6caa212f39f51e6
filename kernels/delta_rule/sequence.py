"""The delta rule over a sequence whose tokens are spread over devices.

The rule is affine in the state: a block of tokens makes A S + B of a state S [K, V], with A [K, K]
and B [K, V] of its own. Every device finds its (A, B) in one pass for the state alone, over values
with K more columns: these begin with the identity and write nothing. The pairs are composed by
doubling, so that no device waits for a chain of others, and the ordinary pass begins from the state
that it would have met on one device.

The cotangents of the states at the borders obey the transposed recurrence, g_s + A_s^T G_s, and are
composed the same way. What they add to the gradients of a block is the derivative of one more pass
for the state alone, so nothing is kept for the derivative of the K columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from refine_jax.kernels import sequence
from refine_jax.kernels.numerics import einsum, pad_axes


def delta_rule_sequence(
    run: Callable[..., tuple[jax.Array | None, jax.Array, jax.Array | None]],
    *arrays: jax.Array | None,
    initial_state: jax.Array,
    document: jax.Array | None,
    save_every: int | None,
    axis_name: str,
) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
    """Run `delta_rule` of api.py over the mesh axis `axis_name`, whose devices hold a block each.

    Arrays are those of this device's block: q or None, k [B, T, H, K], v [B, T, Hv, V], beta and
    log_decay, as in api.py.

    run: an implementation for one device, as (q, k, v, beta, log_decay, initial_state=, document=,
    save_every=).
    """
    begins = None
    if document is not None:
        before = sequence.halo(document, 1, axis_name)[:, 0]
        begins = (lax.axis_index(axis_name) > 0) & (before != document[:, 0])
    state = _state_before(run, axis_name, *arrays[1:], initial_state, document, begins)
    options = {"document": document, "save_every": save_every}
    out, final, saved = run(*arrays, initial_state=_reset(begins, state), **options)
    if begins is not None and saved is not None:
        saved = saved.at[:, 0].set(state)  # saved states are those before a reset
    is_last = lax.axis_index(axis_name) == lax.axis_size(axis_name) - 1
    return out, lax.psum(jnp.where(is_last, final, 0.0), axis_name), saved


def _reset(begins, state):
    """Zeros [B, Hv, K, V] for the rows in which a document begins with the block."""
    return state if begins is None else jnp.where(begins[:, None, None, None], 0.0, state)


def _product(a, b):
    return einsum("bhij,bhjv->bhiv", a, b, jnp.float32)


def _compose(earlier, later):
    """Two affine maps of the state, (A, B) each, one after the other."""
    a, b = later
    return _product(a, earlier[0]), _product(a, earlier[1]) + b


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _state_before(run, axis_name, k, v, beta, log_decay, initial_state, document, begins):
    """The state [B, Hv, K, V] before this device's block, not yet reset where a document begins."""
    return _state_before_forward(
        run, axis_name, k, v, beta, log_decay, initial_state, document, begins
    )[0]


def _state_before_forward(run, axis_name, k, v, beta, log_decay, initial_state, document, begins):
    value_dim, key_dim = v.shape[3], k.shape[3]
    identity = jnp.broadcast_to(jnp.eye(key_dim), (*initial_state.shape[:2], key_dim, key_dim))
    values = pad_axes(v, {3: (0, key_dim)})
    before = pad_axes(_reset(begins, identity), {3: (value_dim, 0)})
    options = {"initial_state": before, "document": document, "save_every": None}
    _, final, _ = run(None, k, values, beta, log_decay, **options)
    through, written = final[..., value_dim:], final[..., :value_dim]
    first = jnp.zeros_like(through), initial_state
    _, state = sequence.exclusive_prefix(_compose, (through, written), first, axis_name)
    # Few numbers: a checkpoint that keeps them need not make the pass, nor send, once more.
    through, state = (checkpoint_name(x, sequence.KEPT) for x in (through, state))
    residuals = k, v, beta, log_decay, document, begins, through, state
    return state, residuals


def _state_before_backward(run, axis_name, residuals, cotangent):
    k, v, beta, log_decay, document, begins, through, state = residuals
    first = jnp.zeros_like(through), jnp.zeros_like(cotangent)
    _, behind = sequence.exclusive_prefix(
        _compose, (through.mT, cotangent), first, axis_name, reverse=True
    )

    def final_state(*arrays):
        *arrays, state = arrays
        options = {"initial_state": _reset(begins, state), "document": document, "save_every": None}
        return run(None, *arrays, **options)[1]

    _, pullback = jax.vjp(final_state, k, v, beta, log_decay, state)
    *gradients, d_state = pullback(behind)
    is_first = lax.axis_index(axis_name) == 0
    d_initial = jnp.where(is_first, cotangent + d_state, 0.0)
    return *gradients, d_initial, None, None


_state_before.defvjp(_state_before_forward, _state_before_backward)
