"""The public functions of the delta rule, and the choice of an implementation."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.kernels.delta_rule.pallas_gpu import delta_rule_pallas_gpu
from refine_jax.kernels.delta_rule.pallas_tpu import delta_rule_pallas_tpu
from refine_jax.kernels.delta_rule.pallas_tpu_step import delta_step_pallas_tpu
from refine_jax.kernels.delta_rule.reference import delta_rule_reference
from refine_jax.kernels.delta_rule.sequence import delta_rule_sequence
from refine_jax.kernels.delta_rule.xla import delta_rule_xla, delta_step_xla
from refine_jax.kernels.device import backend
from refine_jax.kernels.numerics import l2_norm_fla

IMPLEMENTATIONS = {
    "reference": delta_rule_reference,
    "xla": delta_rule_xla,
    "pallas_tpu": delta_rule_pallas_tpu,
    "pallas_gpu": delta_rule_pallas_gpu,
}
STEP_IMPLEMENTATIONS = {"xla": delta_step_xla, "pallas_tpu": delta_step_pallas_tpu}

_CHUNK = 64  # tokens, where neither the caller nor a table of a kernel says otherwise
_KERNEL_TOKENS = 64  # of fewer, XLA's programs are as fast


def delta_rule(
    q: jax.Array | None,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    document: jax.Array | None = None,
    scale: float | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    save_every: int | None = None,
    implementation: str | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
    """The (gated) delta rule over whole sequences.

    With a state S [K, V] per value head, for every token in order (golden README, section 6):

        S <- exp(log_decay) S
        S <- S + k (beta (v - S^T k))^T
        out = scale S^T q

    Args:
      q, k: [B, T, H, K]; q None computes the state alone (out is then None).
      v: [B, T, Hv, V], Hv a multiple of H: value head i uses key head i // (Hv / H).
      beta: [B, T, Hv], how much of the error is written. Tokens that must change nothing (padding)
        have beta, k and log_decay 0.
      log_decay: [B, T, Hv], finite and at most 0; None for the ungated rule.
      initial_state: [B, Hv, K, V] float32 before token 0, of the document of token 0; zero if None.
      document: [B, T] int32; the state is set to zero where it changes between two tokens.
      scale: factor of the output; K**-0.5 if None.
      normalize: divide q and k by their norms first, `x * rsqrt(sum x^2 + 1e-6)`.
      chunk_size: tokens handled by one set of matrix products, a power of two; None leaves it to
        the implementation.
      save_every: keep the state before every block of so many tokens (a multiple of chunk_size);
        None keeps none.
      implementation: "reference", "xla", "pallas_tpu", "pallas_gpu" or None for the best one: the
        TPU kernels on TPU, else XLA (the GPU kernels have not run on a GPU yet). A named one never
        falls back. Where their device is absent, kernels are interpreted (slow).
      axis_name: inside `jax.shard_map`, the mesh axis over which the tokens are spread in blocks of
        T, in their order (sequence.py). initial_state is the one before the first block and the
        final state the one after the last, both the same on every device; all other arrays are
        those of the device's own block, and `document` counts on over blocks. T must be a multiple
        of save_every.

    Returns:
      out [B, T, Hv, V] in the dtype of v, the final state [B, Hv, K, V] float32, and the saved
      states [B, ceil(T / save_every), Hv, K, V] float32 or None. The first saved state is
      initial_state. A reset between blocks comes after the saved state, before the next token.

    Products have operands in the dtype of v (float32 or bfloat16) and float32 sums; states,
    decays and their gradients are float32.

    Raises:
      ValueError: shapes that do not fit, or an implementation that does not exist.
    """
    spread = axis_name is not None and lax.axis_size(axis_name) > 1
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {sorted(IMPLEMENTATIONS)}. "
            f"Got: implementation={implementation!r}."
        )
    _check(q, k, v, beta, log_decay, initial_state, document, chunk_size, save_every)
    if spread and save_every is not None and v.shape[1] % save_every:
        raise ValueError(
            "The tokens of a device must be a multiple of save_every where a sequence is spread "
            f"over devices. Got: v {v.shape}, save_every={save_every}, axis_name={axis_name!r}."
        )
    if initial_state is None:
        shape = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
        initial_state = jnp.zeros(shape, jnp.float32)
    name = implementation or _best(v, chunk_size, save_every)
    if name != "pallas_tpu":
        chunk_size = chunk_size or math.gcd(_CHUNK, save_every or _CHUNK)
    options = {
        "scale": k.shape[3] ** -0.5 if scale is None else scale,
        "chunk_size": chunk_size,
    }
    if name == "pallas_tpu":
        options["normalize"] = normalize
    elif normalize:
        q, k = (None if x is None else l2_norm_fla(x) for x in (q, k))
    run = functools.partial(IMPLEMENTATIONS[name], **options)
    if spread:
        run = functools.partial(delta_rule_sequence, run, axis_name=axis_name)
    return run(
        q,
        k,
        v,
        beta,
        log_decay,
        initial_state=initial_state.astype(jnp.float32),
        document=document,
        save_every=save_every,
    )


def _best(v: jax.Array, chunk_size: int | None, save_every: int | None) -> str:
    """The implementation for this device; not the GPU kernels before they have run on a GPU."""
    sizes = [size for size in (v.shape[1], chunk_size, save_every) if size is not None]
    large = min(sizes) >= _KERNEL_TOKENS
    return "pallas_tpu" if backend() == "tpu" and large else "xla"


def delta_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: jax.Array,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `delta_rule`, for decoding.

    q, k [B, H, K]; v [B, Hv, V]; beta, log_decay [B, Hv]; state [B, Hv, K, V] float32.
    implementation: "xla", "pallas_tpu" or None for the best one; a named one never falls back.
    Returns out [B, Hv, V] in the dtype of v and the new state.

    Raises:
      ValueError: an implementation that does not exist.
    """
    if implementation is None:
        implementation = "pallas_tpu" if backend() == "tpu" else "xla"
    if implementation not in STEP_IMPLEMENTATIONS:
        raise ValueError(
            f"implementation of delta_step must be None or one of {sorted(STEP_IMPLEMENTATIONS)}. "
            f"Got: implementation={implementation!r}."
        )
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    step = STEP_IMPLEMENTATIONS[implementation]
    return step(q, k, v, beta, log_decay, state=state, scale=scale)


def _check(q, k, v, beta, log_decay, initial_state, document, chunk_size, save_every):
    if k.ndim != 4 or v.ndim != 4 or k.shape[:2] != v.shape[:2] or v.shape[2] % k.shape[2]:
        raise ValueError(
            "k must be [B, T, H, K] and v [B, T, Hv, V] with Hv a multiple of H. "
            f"Got: k {k.shape}, v {v.shape}."
        )
    batch, tokens, value_heads, value_dim = v.shape
    if tokens < 1:
        raise ValueError(f"delta_rule needs at least one token. Got: v {v.shape}.")
    expected = {
        "q": (q, k.shape),
        "beta": (beta, (batch, tokens, value_heads)),
        "log_decay": (log_decay, (batch, tokens, value_heads)),
        "initial_state": (initial_state, (batch, value_heads, k.shape[3], value_dim)),
        "document": (document, (batch, tokens)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} to go with k {k.shape} and v {v.shape}. "
                f"Got: {array.shape}."
            )
    if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
        raise ValueError(f"chunk_size must be a power of two. Got: chunk_size={chunk_size}.")
    if save_every is not None and (save_every < 1 or save_every % (chunk_size or 1)):
        raise ValueError(
            "save_every must be a multiple of chunk_size. "
            f"Got: save_every={save_every}, chunk_size={chunk_size}."
        )
