"""The arithmetic of one block of tokens in the Pallas TPU kernels of the LaCT op.

Update and gradients work feature-major, [F, T] with the tokens T along the lanes: then no product
needs a transposed operand that the matrix unit does not take as it is, the rates of tokens are
rows, and sums over F are sums over sublanes. Only the gradients of q, k, v are transposed at the
end. Weights come stacked, so that a product has as many rows as can be: `w02` [2F, d] is W0 over
W2, and W1 is kept as its transpose `w1t` [F, d].

Operands of products have the dtype of the tokens, sums and elementwise arithmetic are float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from refine_jax.kernels.tpu import nn, nt

LANES = 128


def _sigmoid(x):
    # One transcendental instead of the two of 1 / (1 + exp(-x)).
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def _silu_and_slope(x):
    sigmoid = _sigmoid(x)
    silu = x * sigmoid
    return sigmoid, silu, sigmoid + silu * (1 - sigmoid)


def _split(x: jax.Array, parts: int) -> list[jax.Array]:
    size = x.shape[0] // parts
    return [x[i * size : (i + 1) * size] for i in range(parts)]


def apply_block(q: jax.Array, w02: jax.Array, w1t: jax.Array) -> jax.Array:
    """`W1 (silu(W0 q) * (W2 q))` of q [T, d]; float32. Token-major: no operand is transposed."""
    hidden = w1t.shape[0]
    z = nt(q, w02)
    gate, up = z[:, :hidden], z[:, hidden:]
    return nn((gate * _sigmoid(gate) * up).astype(q.dtype), w1t)


def update_block(
    k: jax.Array, v: jax.Array, rates: jax.Array, w02: jax.Array, w1t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Left factors of the update sums of a block: `x02 k` is [2F, d], `x1 v` is [F, d].

    k, v: [T, d]. rates: [3, T] float32. Returns x02 [2F, T] and x1 [F, T] in the dtype of k.
    """
    gate, up = _split(nt(w02, k), 2)
    error = nt(w1t, v)
    _, silu, slope = _silu_and_slope(gate)
    x0 = error * up * slope * rates[0:1]
    x2 = error * silu * rates[2:3]
    x1 = silu * up * rates[1:2]
    return jnp.concatenate([x0, x2]).astype(k.dtype), x1.astype(k.dtype)


def apply_block_backward(
    q: jax.Array, d_out: jax.Array, w02: jax.Array, w1t: jax.Array, w02t: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Backward of `apply_block`: (dq [d, T] float32, z02 [2F, T], h [F, T]).

    `z02 q` and `h d_out` are the gradients of w02 and w1t.
    """
    gate, up = _split(nt(w02, q), 2)
    d_hidden = nt(w1t, d_out)
    _, silu, slope = _silu_and_slope(gate)
    z02 = jnp.concatenate([d_hidden * up * slope, d_hidden * silu]).astype(q.dtype)
    return nn(w02t, z02), z02, (silu * up).astype(q.dtype)


def update_block_backward(
    k: jax.Array,
    v: jax.Array,
    rates: jax.Array,
    stack: jax.Array,
    stack1: jax.Array,
    stack_t: jax.Array,
    stack1_t: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Backward of the update sums of a block, for the cotangents g0, g1, g2 of the sums.

    stack: [4F, d], of w0, w2, g0, g2. stack1: [2F, d], of w1t and g1^T. The others are their
    transposes. Returns dk, dv [d, T] float32, the gradients of the rates [3, T], and
    z02 [2F, T], z1 [F, T]: `z02 k` and `z1 v` are the gradients of w02 and w1t.
    """
    gate, up, a0, a2 = _split(nt(stack, k), 4)
    error, a1 = _split(nt(stack1, v), 2)
    sigmoid, silu, slope = _silu_and_slope(gate)
    curve = sigmoid * (1 - sigmoid) * (2 + gate * (1 - 2 * sigmoid))  # silu''
    up_slope, error_slope = up * slope, error * slope
    # The summands of the sums before their rates, in the order of the weights.
    y0, y1, y2 = error * up_slope, silu * up, error * silu
    d_rates = jnp.concatenate(
        [jnp.sum(y * a, 0, keepdims=True) for y, a in ((y0, a0), (y1, a1), (y2, a2))]
    )
    rate0, rate1, rate2 = rates[0:1], rates[1:2], rates[2:3]
    b0, b1, b2 = a0 * rate0, a1 * rate1, a2 * rate2
    d_gate = error * up * curve * b0 + up_slope * b1 + error_slope * b2
    d_up = error_slope * b0 + silu * b1
    d_error = up_slope * b0 + silu * b2
    z = jnp.concatenate([d_gate, d_up, y0 * rate0, y2 * rate2]).astype(k.dtype)
    z1 = jnp.concatenate([d_error, y1 * rate1]).astype(k.dtype)
    dk, dv = nn(stack_t, z), nn(stack1_t, z1)
    return dk, dv, d_rates, z[: z.shape[0] // 2], z1[: z1.shape[0] // 2]
