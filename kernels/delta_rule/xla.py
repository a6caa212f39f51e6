"""The delta rule in chunks (WY form), for any device that XLA compiles for.

Inside a chunk of C tokens, with state S before it (float32), the increments u_r of

    S_r = a_r S_{r-1} + k_r u_r^T,     u_r = beta_r (v_r - a_r S_{r-1}^T k_r)

solve a unit lower triangular system (Yang et al., arXiv 2406.06484 and 2412.06464):

    (I + A) U = beta (v - g k S),      A_ri = beta_r D_ri k_r.k_i  (i < r)
    O = scale (g q S + P U),           P_ri = D_ri q_r.k_i         (i <= r)
    S <- g_C S + (D_C k)^T U

D_ri is the decay between tokens i and r (product of a_j, i < j <= r), g_r the decay from the start
of the chunk; both are 0 across a document boundary. A scan goes over blocks of chunks; what does
not depend on S is computed for all chunks of a block at once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from refine_jax.kernels import numerics

# Diagonal blocks up to this size are inverted by full masked products, larger ones blockwise.
_INVERSE_BASE = 16


def delta_rule_xla(
    q, k, v, beta, log_decay, *, initial_state, document, scale, chunk_size, save_every
):
    """`delta_rule` of api.py; `save_every` must be a multiple of `chunk_size`."""
    batch, tokens, value_heads = beta.shape
    chunk = min(chunk_size, _power_of_two(tokens))
    block = max(chunk, min(save_every or chunk, -(-tokens // chunk) * chunk))
    blocks = -(-tokens // block)

    def cut(x):
        """[B, T, ...] -> [blocks, B, G, C, ...]; padding has k = beta = log_decay = 0."""
        x = numerics.pad_axes(x, {1: (0, blocks * block - tokens)})
        x = x.reshape(batch, blocks, block // chunk, chunk, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    inputs = {"k": cut(k), "v": cut(v), "beta": cut(beta)}
    if q is not None:
        inputs["q"] = cut(q)
    if log_decay is not None:
        inputs["log_decay"] = cut(log_decay)
    if document is not None:
        before = jnp.concatenate([document[:, :1], document[:, :-1]], axis=1)
        inputs["reset"] = cut(document != before)

    # The backward pass computes a block again from its state: states of every chunk, masks and
    # inverses of all chunks would take several times the memory of q, k and v.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state, xs):
        new, out = _block(state, scale=scale, **xs)
        return new, (out, None if save_every is None else state)

    final, (out, states) = lax.scan(step, initial_state, inputs)
    if out is not None:
        out = jnp.moveaxis(out, 0, 1).reshape(batch, blocks * block, value_heads, -1)
        out = out[:, :tokens]
    return out, final, None if states is None else jnp.moveaxis(states, 0, 1)


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def _block(state, k, v, beta, q=None, log_decay=None, reset=None, *, scale):
    """One block of G chunks.

    state [B, Hv, K, V]; k, q [B, G, C, H, K]; v [B, G, C, Hv, V]; beta, log_decay [B, G, C, Hv];
    reset [B, G, C] bool, True where a document starts. Returns the new state and the output
    [B, G, C, Hv, V] in v's dtype (None without q).
    """
    chunk, group = k.shape[2], v.shape[3] // k.shape[3]
    dot = functools.partial(numerics.dot, dtype=v.dtype)

    def per_key_head(x):
        return jnp.moveaxis(x, 3, 1)

    def per_value_head(x):
        return x if group == 1 else jnp.repeat(x, group, axis=1)

    k, v, beta = per_key_head(k), per_key_head(v), per_key_head(beta).astype(jnp.float32)
    lower = np.tril(np.ones((chunk, chunk), np.bool_))
    between = from_start = None
    if log_decay is not None or reset is not None:
        log_decay = None if log_decay is None else per_key_head(log_decay).astype(jnp.float32)
        between, from_start = _decays(log_decay, reset, chunk)

    def scores(x, mask):
        product = per_value_head(dot("bhgik,bhgjk->bhgij", x, k))
        return jnp.where(mask, product if between is None else product * between, 0.0)

    a = beta[..., None] * scores(k, lower & ~np.eye(chunk, dtype=np.bool_))
    inverse = lax.stop_gradient(invert_unit_lower(lax.stop_gradient(a)))
    if q is not None:
        q = per_key_head(q)
        p = scores(q, lower)
        q = per_value_head(q)
    k = per_value_head(k)
    k_end = k if between is None else k * between[..., -1, :, None]

    outs = []
    for c in range(k.shape[2]):

        def recall(x, state=state, c=c):
            seen = dot("bhck,bhkv->bhcv", x[:, :, c], state)
            return seen if from_start is None else seen * from_start[:, :, c, :, None]

        error = beta[:, :, c, :, None] * (v[:, :, c] - recall(k))
        u = _solve(v.dtype, a[:, :, c], inverse[:, :, c], error)
        if q is not None:
            out = (recall(q) + dot("bhij,bhjv->bhiv", p[:, :, c], u)) * scale
            outs.append(jnp.moveaxis(out, 2, 1).astype(v.dtype))
        if from_start is not None:
            state = state * from_start[:, :, c, -1, None, None]
        state = state + dot("bhck,bhcv->bhkv", k_end[:, :, c], u)
    return state, jnp.stack(outs, axis=1) if outs else None


def _decays(log_decay, reset, chunk):
    """Decay between tokens j <= i of a chunk [B, Hv, G, C, C] and since its start [B, Hv, G, C].

    log_decay [B, Hv, G, C] or None; reset [B, G, C] or None (Hv is then 1). What crosses a reset is
    0; above the diagonal the numbers have no meaning. Sums of logs run over the tokens in between
    only: differences of running sums would lose digits after a strong decay.
    """
    between = from_start = 1.0
    if log_decay is not None:
        lower = np.tril(np.ones((chunk, chunk), np.float32))
        after = log_decay[..., None] * np.tril(lower, -1)
        between = jnp.exp(jnp.matmul(lower, after, precision=lax.Precision.HIGHEST))
        from_start = jnp.exp(jnp.cumsum(log_decay, axis=-1))
    if reset is not None:
        documents = jnp.cumsum(reset[:, None], axis=-1, dtype=jnp.int32)
        between = jnp.where(documents[..., :, None] == documents[..., None, :], between, 0.0)
        from_start = jnp.where(documents == 0, from_start, 0.0)
    return between, from_start


def border_decays(
    log_decay: jax.Array | None, segment: jax.Array | None, shape: tuple[int, ...], axis: int
) -> tuple[jax.Array, jax.Array]:
    """Decays from the start of a chunk through each of its tokens, and from each to its end.

    log_decay: float32 of `shape`, with the tokens of a chunk along `axis`, or None. segment: int32,
    broadcastable to it, resets since the start of the chunk, or None. What crosses one is 0.

    Returns two arrays of `shape`, float32.
    """
    from_start = to_end = jnp.ones(shape, jnp.float32)
    if log_decay is not None:
        # Summed without the token itself: taking it off again would lose digits.
        after = lax.slice_in_dim(log_decay, 1, None, axis=axis)
        after = numerics.pad_axes(after, {axis: (0, 1)})
        from_start = jnp.exp(lax.cumsum(log_decay, axis=axis))
        to_end = jnp.exp(lax.cumsum(after, axis=axis, reverse=True))
    if segment is not None:
        last = lax.slice_in_dim(segment, -1, None, axis=axis)
        from_start = jnp.where(segment == 0, from_start, 0.0)
        to_end = jnp.where(segment == last, to_end, 0.0)
    return from_start, to_end


def invert_unit_lower(a: jax.Array) -> jax.Array:
    """`(I + a)^-1` for strictly lower triangular `a` [..., C, C] with C a power of two; float32.

    Doubles the size of inverted diagonal blocks, X <- X - X a_l X with a_l the blocks to be joined:
    matrix products only, and no number larger than those of the inverse itself (powers of `a`
    overflow, substitution goes row by row).
    """
    size = a.shape[-1]
    block = min(size, _INVERSE_BASE)
    x = _invert_masked(_blocks(a, block, 0, 1))
    while block < size:
        pairs = x.reshape(*x.shape[:-3], size // (2 * block), 2, block, block)
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        corner = -_product(_product(second, _blocks(a, block, 1, 2)), first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        x = jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        block *= 2
    return x.reshape(a.shape)


def _blocks(a, size, below, step):
    """Blocks (i + below, i) of `a`, for every step-th i: [..., n, size, size]."""
    starts = range(0, a.shape[-1] - below * size, step * size)
    return jnp.stack(
        [a[..., i + below * size : i + (below + 1) * size, i : i + size] for i in starts], axis=-3
    )


def _invert_masked(a):
    """The same doubling with whole matrices and masks: fewer, larger products for small `a`."""
    index = np.arange(a.shape[-1])
    x = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
    block = 1
    while block < a.shape[-1]:
        pair, odd = index // (2 * block), index // block % 2
        joined = (pair[:, None] == pair) & (odd[:, None] > odd)
        a_l = jnp.where(joined, a, 0.0)
        x = x - (a_l if block == 1 else _product(_product(x, a_l), x))
        block *= 2
    return x


def _product(a, b):
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(dtype, a, inverse, error):
    """u with (I + a) u = error, given the inverse (taken as a constant by the gradient).

    With z the solution of the transposed system for the cotangent of u, the gradients are z for
    `error` and -z u^T for `a`; nothing is differentiated through the inversion.
    """
    del a
    return numerics.einsum("bhij,bhjv->bhiv", inverse, error, dtype)


def _solve_forward(dtype, a, inverse, error):
    u = _solve(dtype, a, inverse, error)
    return u, (inverse, u)


def _solve_backward(dtype, residuals, g):
    inverse, u = residuals
    z = numerics.einsum("bhij,bhiv->bhjv", inverse, g, dtype)
    return -numerics.einsum("bhiv,bhjv->bhij", z, u, dtype), jnp.zeros_like(inverse), z


_solve.defvjp(_solve_forward, _solve_backward)


def delta_step_xla(q, k, v, beta, log_decay, *, state, scale):
    """`delta_step` of api.py."""
    group = v.shape[1] // k.shape[1]
    dtype = v.dtype
    q, k = (jnp.repeat(x, group, axis=1) if group > 1 else x for x in (q, k))
    q, k, v, beta = (x.astype(jnp.float32) for x in (q, k, v, beta))
    if log_decay is not None:
        state = state * jnp.exp(log_decay)[..., None, None]

    def recall(state, x):
        # A sum of products rather than a matmul: a vector times a matrix is bound by memory.
        product = numerics.drop_unit_axes(state, 3) * numerics.drop_unit_axes(x, 2)[..., None]
        return jnp.sum(product, axis=-2).reshape(v.shape)

    error = v - recall(state, k)
    state = state + k[..., None] * (beta[..., None] * error)[..., None, :]
    return (recall(state, q) * scale).astype(dtype), state
