"""The vocabulary head in XLA: logits exist for one block of tokens at a time.

16K tokens of a 32,000-word vocabulary would take 2 GB a sequence.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.kernels.cross_entropy.reference import TokenStats
from refine_jax.kernels.device import backend
from refine_jax.kernels.numerics import by_rows


def _precision(x: jax.Array) -> lax.Precision:
    """Float32 products keep float32 accuracy on every device."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT


def logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Logits [..., V] in float32 of final hidden states [..., D]; head is [V, D]."""
    return lax.dot_general(
        hidden,
        head.astype(hidden.dtype),
        (((hidden.ndim - 1,), (1,)), ((), ())),
        precision=_precision(hidden),
        preferred_element_type=jnp.float32,
    )


def entropy(z: jax.Array) -> jax.Array:
    """Entropy in nats of softmax(z [..., V]): logsumexp(z) - sum(softmax(z) z)."""

    def rows(z):
        shifted = z - lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
        weights = jnp.exp(shifted)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return jnp.log(total) - jnp.sum(weights * shifted, axis=-1, keepdims=True) / total

    return by_rows(rows, z)[..., 0]


def log_prob(z: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probability of `tokens` [...] under softmax(z [..., V])."""
    chosen = jnp.take_along_axis(z, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(z, axis=-1)


def _token_blocks(array: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] -> [T / size, B * size, ...], zero-padded to a multiple of `size`.

    Every block has tokens of all rows, so that the batch axis can be sharded.
    """
    batch, length, *rest = array.shape
    count = -(-length // size)
    padding = [(0, 0), (0, count * size - length)] + [(0, 0)] * len(rest)
    blocks = jnp.pad(array, padding).reshape(batch, count, size, *rest)
    return jnp.moveaxis(blocks, 1, 0).reshape(count, batch * size, *rest)


def _join_blocks(blocks: jax.Array, batch: int, length: int) -> jax.Array:
    """Inverse of `_token_blocks`."""
    count, _, *rest = blocks.shape
    joined = jnp.moveaxis(blocks.reshape(count, batch, -1, *rest), 0, 1)
    return joined.reshape(batch, -1, *rest)[:, :length]


def _block_size(batch: int, length: int, block_tokens: int | None) -> int:
    """Tokens of a row in one block of about `block_tokens`.

    By default a block that stays in the caches of a CPU. Elsewhere a larger one: the gradient of
    the head, 262 MB of float32 for 32,000 words of width 2048, is read and written for every block.
    """
    if block_tokens is None:
        block_tokens = 512 if backend() == "cpu" else 2048
    return max(1, min(length, block_tokens // batch))


def _block_stats(hidden, head, targets, axis_name):
    """Stats [N] of hidden [N, D], and what their gradient needs.

    This is softmax [N, V] before division, its sum [N], and targets [N] as indices into V; they lie
    outside where another device of `axis_name` has the word.
    """
    z = logits(hidden, head)
    top = jnp.max(z, axis=-1, keepdims=True)
    if axis_name is not None:
        top = lax.pmax(top, axis_name)
        targets = targets - lax.axis_index(axis_name) * head.shape[0]
    shifted = z - top
    weights = jnp.exp(shifted)
    index = jnp.clip(targets, 0, head.shape[0] - 1)
    target = jnp.take_along_axis(shifted, index[..., None], axis=-1)[..., 0]
    total, product = jnp.sum(weights, axis=-1), jnp.sum(weights * shifted, axis=-1)
    if axis_name is not None:
        target = jnp.where(index == targets, target, 0.0)
        total, product, target = lax.psum((total, product, target), axis_name)
    log_total = jnp.log(total)
    stats = TokenStats(
        nll=log_total - target,
        entropy=log_total - product / total,
        correct=(target == 0).astype(jnp.float32),
    )
    return stats, weights, total, targets


def _block_gradient(h, operand, weight, exponentials, total, target):
    """Gradients of sum(weight * nll) by h [N, D] and operand [V, D], of what `_block_stats` gives
    beside the stats.
    """
    is_target = lax.broadcasted_iota(jnp.int32, exponentials.shape, 1) == target[..., None]
    scale = weight / total
    dz = exponentials * scale[..., None] - jnp.where(is_target, weight[..., None], 0.0)
    dz = dz.astype(h.dtype)
    einsum = functools.partial(
        jnp.einsum, precision=_precision(h), preferred_element_type=jnp.float32
    )
    return einsum("nv,vd->nd", dz, operand).astype(h.dtype), einsum("nv,nd->vd", dz, h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def next_token_loss_xla(hidden, head, targets, weights, block_tokens=None, axis_name=None):
    """`next_token_loss` of api.py.

    The gradient is formed in the forward pass, while a block's logits exist, so that they are
    never computed a second time.
    """
    size = _block_size(*targets.shape, block_tokens)

    def block(_, inputs):
        return None, _block_stats(inputs[0], head, inputs[1], axis_name)[0]

    blocks = _token_blocks(hidden, size), _token_blocks(targets, size)
    _, stats = lax.scan(block, None, blocks)
    stats = jax.tree.map(lambda x: _join_blocks(x, *targets.shape), stats)
    return jnp.sum(stats.nll * weights), stats


def _next_token_loss_forward(hidden, head, targets, weights, block_tokens, axis_name):
    size = _block_size(*targets.shape, block_tokens)
    operand = head.astype(hidden.dtype)

    def block(head_gradient, inputs):
        h, target, weight = inputs
        stats, *softmax = _block_stats(h, operand, target, axis_name)
        dh, dw = _block_gradient(h, operand, weight, *softmax)
        return head_gradient + dw, (stats, dh)

    blocks = jax.tree.map(lambda x: _token_blocks(x, size), (hidden, targets, weights))
    head_gradient, (stats, dh) = lax.scan(block, jnp.zeros(head.shape, jnp.float32), blocks)
    stats, dh = jax.tree.map(lambda x: _join_blocks(x, *targets.shape), (stats, dh))
    loss = jnp.sum(stats.nll * weights)
    return (loss, stats), (dh, head_gradient.astype(head.dtype))


def _next_token_loss_backward(block_tokens, axis_name, residuals, cotangents):
    del block_tokens
    scale, _ = cotangents  # the statistics are constants
    if axis_name is not None:
        # Each device has the cotangent of its own copy of the loss, all of which its words enter;
        # and the gradient of `hidden` that comes by way of its words.
        scale = lax.psum(scale, axis_name)
    dh, head_gradient = residuals
    return (
        dh * scale.astype(dh.dtype),
        head_gradient * scale.astype(head_gradient.dtype),
        None,
        None,
    )


next_token_loss_xla.defvjp(_next_token_loss_forward, _next_token_loss_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def reweighted_loss_xla(
    hidden, head, targets, weights, scales, weigh, reach, block_tokens=None, axis_name=None
):
    """`reweighted_loss` of api.py.

    As in `next_token_loss_xla` the gradient is formed while a block's logits exist. The weights of
    a block's tokens wait for the losses of the `reach` tokens after it, whose logits are computed
    twice.
    """
    _, stats = next_token_loss_xla(hidden, head, targets, weights, block_tokens, axis_name)
    return jnp.sum(stats.nll * (scales[0] * weights + scales[1] * weigh(stats.nll, weights))), stats


def _reweighted_loss_forward(
    hidden, head, targets, weights, scales, weigh, reach, block_tokens, axis_name
):
    rows, length = targets.shape
    size = max(_block_size(rows, length, block_tokens), reach)
    operand = head.astype(hidden.dtype)

    def block(carry, inputs):
        head_gradient, *before = carry
        (h, target, weight), ahead = inputs
        both = [jnp.concatenate(pair) for pair in zip((h, target), ahead, strict=False)]
        stats, *softmax = _block_stats(both[0], operand, both[1], axis_name)
        # [rows, reach + size + reach]: the tokens before the block, of it, and after it.
        near = [
            jnp.concatenate([x, mine.reshape(rows, -1), after.reshape(rows, -1)], axis=1)
            for x, mine, after in zip(
                before,
                (stats.nll[: len(h)], weight),
                (stats.nll[len(h) :], ahead[2]),
                strict=True,
            )
        ]
        more = weigh(*near)[:, reach : reach + size].reshape(-1)
        token_weight = scales[0] * weight + scales[1] * more
        dh, dw = _block_gradient(h, operand, token_weight, *(x[: len(h)] for x in softmax))
        last = [x[:, size : size + reach] for x in near]
        stats = jax.tree.map(lambda x: x[: len(h)], stats)
        return (head_gradient + dw, *last), (stats, dh, token_weight)

    arrays = hidden, targets, weights
    blocks = jax.tree.map(lambda x: _token_blocks(x, size), arrays)
    ahead = jax.tree.map(lambda x: _first_of_next(x, rows, reach), blocks)
    none = jnp.zeros((rows, reach), jnp.float32)
    carry = jnp.zeros(head.shape, jnp.float32), none, none
    (head_gradient, *_), found = lax.scan(block, carry, (blocks, ahead))
    stats, dh, token_weights = jax.tree.map(lambda x: _join_blocks(x, rows, length), found)
    loss = jnp.sum(stats.nll * token_weights)
    return (loss, stats), (dh, head_gradient.astype(head.dtype))


def _first_of_next(blocks: jax.Array, rows: int, reach: int) -> jax.Array:
    """Of blocks [n, rows * size, ...] the first `reach` tokens of the one after each: zeros after
    the last. [n, rows * reach, ...]
    """
    following = jnp.concatenate([blocks[1:], jnp.zeros_like(blocks[:1])])
    of_rows = following.reshape(len(blocks), rows, -1, *blocks.shape[2:])[:, :, :reach]
    return of_rows.reshape(len(blocks), rows * reach, *blocks.shape[2:])


def _reweighted_loss_backward(weigh, reach, block_tokens, axis_name, residuals, cotangents):
    del weigh, reach
    gradients = _next_token_loss_backward(block_tokens, axis_name, residuals, cotangents)
    return (*gradients, None)


reweighted_loss_xla.defvjp(_reweighted_loss_forward, _reweighted_loss_backward)


def token_log_probs_xla(hidden, head, tokens, block_tokens=None):
    """`token_log_probs` of api.py; the backward pass computes the logits again."""
    batch = tokens.shape[0]
    flat_tokens = tokens.reshape(batch, -1)
    size = _block_size(*flat_tokens.shape, block_tokens)

    @jax.checkpoint
    def block(inputs):
        z = logits(inputs[0], head)
        return log_prob(z, inputs[1]), entropy(z)

    flat_hidden = hidden.reshape(batch, flat_tokens.shape[1], hidden.shape[-1])
    blocks = _token_blocks(flat_hidden, size), _token_blocks(flat_tokens, size)
    outputs = lax.map(block, blocks)
    return jax.tree.map(
        lambda x: _join_blocks(x, *flat_tokens.shape).reshape(tokens.shape), outputs
    )
