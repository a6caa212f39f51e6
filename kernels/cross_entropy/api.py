"""The public functions of the vocabulary head, and the choice of an implementation."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import lax

from refine_jax.kernels.cross_entropy.pallas_tpu import (
    is_faster,
    next_token_loss_pallas_tpu,
    unsupported,
)
from refine_jax.kernels.cross_entropy.reference import TokenStats, next_token_loss_reference
from refine_jax.kernels.cross_entropy.xla import (
    next_token_loss_xla,
    reweighted_loss_xla,
    token_log_probs_xla,
)
from refine_jax.kernels.device import backend

IMPLEMENTATIONS = {
    "reference": next_token_loss_reference,
    "xla": next_token_loss_xla,
    "pallas_tpu": next_token_loss_pallas_tpu,
}

_FEW_TOKENS = 512  # of fewer, the kernels' blocks would be half empty


def next_token_loss(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    block_tokens: int | None = None,
    *,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, TokenStats]:
    """Weighted sum of next-token losses, with per-token statistics.

    hidden: [B, T, D] final hidden states, float32 or bfloat16, the dtype of the products' operands;
    head: [V, D]; targets: [B, T] int32, the token that follows each position; weights: [B, T]
    float32, 0 where there is nothing to predict. block_tokens: tokens for which arrays
    [block_tokens, V] exist at a time; None leaves it to the implementation.
    axis_name: mapped axis (`jax.shard_map`) whose devices share the vocabulary: `head` is then this
    device's block of it, in order; all else, targets too, is of the whole. Only in "xla".
    implementation: "reference", "xla", "pallas_tpu" or None for the best one; a named one never
    falls back.

    Returns `sum(weights * nll)` (nats) and TokenStats. Only the sum is differentiable, with respect
    to hidden and head.

    Raises:
      ValueError: shapes that do not fit, or an implementation that is not available.
    """
    _check(hidden, head, targets, weights)
    if implementation is None:
        on_tpu = backend() == "tpu" and targets.size >= _FEW_TOKENS
        best = on_tpu and axis_name is None and is_faster(hidden, head, block_tokens)
        implementation = "pallas_tpu" if best else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {sorted(IMPLEMENTATIONS)}. "
            f"Got: implementation={implementation!r}."
        )
    if axis_name is not None:
        if implementation != "xla":
            raise ValueError(
                "next_token_loss shares the vocabulary among devices (axis_name) only with "
                f"implementation 'xla'. Got: {implementation!r}."
            )
        return next_token_loss_xla(hidden, head, targets, weights, block_tokens, axis_name)
    if implementation == "pallas_tpu" and (reason := unsupported(hidden, head, block_tokens)):
        raise ValueError(f"next_token_loss has no 'pallas_tpu' form for this call: {reason}")
    return IMPLEMENTATIONS[implementation](hidden, head, targets, weights, block_tokens)


def reweighted_loss(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    scales: jax.Array,
    weigh: Callable[[jax.Array, jax.Array], jax.Array],
    reach: int,
    block_tokens: int | None = None,
    *,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, TokenStats]:
    """`next_token_loss` whose weights depend on the losses of tokens near each other.

    weigh: of nll and weights [B, S] of consecutive tokens to more weights [B, S], which are
        constants for the gradient. What it says of a token may depend on tokens at most `reach`
        (>= 1) away, and where it lacks some of these on anything. It must be hashable.
    scales: [2] float32. The weights are `scales[0] * weights + scales[1] * weigh(nll, weights)`.

    Other arguments, results and errors are those of `next_token_loss`. In "xla" the logits are
    computed once; the other implementations run twice, for the losses first.
    """
    arguments = hidden, head, targets, weights
    on_tpu = backend() == "tpu"
    if implementation == "xla" or axis_name is not None or (implementation is None and not on_tpu):
        _check(*arguments)
        return reweighted_loss_xla(*arguments, scales, weigh, reach, block_tokens, axis_name)
    options = {"block_tokens": block_tokens, "implementation": implementation}
    stats = lax.stop_gradient(next_token_loss(*arguments, **options)[1])
    token_weights = scales[0] * weights + scales[1] * weigh(stats.nll, weights)
    loss, _ = next_token_loss(hidden, head, targets, token_weights, **options)
    return loss, stats


def token_log_probs(
    hidden: jax.Array, head: jax.Array, tokens: jax.Array, block_tokens: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of given tokens and the entropies of their distributions.

    hidden: [B, ..., D] states that predict the tokens; head: [V, D]; tokens: [B, ...] int32.
    Returns two [B, ...] float32 arrays in nats, both differentiable. Rollouts are few tokens, for
    which reading the head is all the time there is: XLA's program is used on every device.
    """
    return token_log_probs_xla(hidden, head, tokens, block_tokens)


def _check(hidden, head, targets, weights):
    if hidden.ndim != 3 or head.ndim != 2 or hidden.shape[2] != head.shape[1]:
        raise ValueError(
            f"hidden must be [B, T, D] and head [V, D]. Got: {hidden.shape}, {head.shape}."
        )
    for name, array in {"targets": targets, "weights": weights}.items():
        if array.shape != hidden.shape[:2]:
            raise ValueError(
                f"{name} must be [B, T] = {hidden.shape[:2]} to go with hidden. Got: {array.shape}."
            )
