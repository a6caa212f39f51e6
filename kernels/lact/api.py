"""The LaCT fast-weight op: choice of the implementation."""

from __future__ import annotations

import jax
from jax import lax

from refine_jax.kernels.device import backend
from refine_jax.kernels.lact.pallas_gpu import lact_pallas_gpu
from refine_jax.kernels.lact.pallas_tpu import lact_pallas_tpu
from refine_jax.kernels.lact.reference import (
    PLAIN,
    FastState,
    Options,
    Weights,
    lact_reference,
)
from refine_jax.kernels.lact.sequence import lact_sequence
from refine_jax.kernels.lact.xla import lact_xla

IMPLEMENTATIONS = {
    "reference": lact_reference,
    "xla": lact_xla,
    "pallas_tpu": lact_pallas_tpu,
    "pallas_gpu": lact_pallas_gpu,
}
# What the TPU's kernels take without padding. With padding XLA is as fast or faster: by static
# estimates 1.4 times as fast on v6e and 1.15 times on v5e at d = 320, F = 480.
_LANES = 128


def lact(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rates: jax.Array,
    momentum: jax.Array | None,
    weights: Weights,
    *,
    mask: jax.Array | None = None,
    reset: jax.Array | None = None,
    options: Options = PLAIN,
    implementation: str | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, FastState]:
    """Chunk by chunk: read `f(q)` with the fast weights, then update them from keys and values.

    q, k, v: [B, N, H, C, d] float32 or bfloat16, in chunks of C token slots.
    rates: [B, N, H, C, 3, E] float32, learning rates of W0, W1, W2; E is 1, or d (= F).
    momentum: [B, N, H, C] float32 in (0, 1), averaged over a chunk's tokens; None for no momentum.
    weights: initial w0, w2 [H, F, d] and w1 [H, d, F] float32. Their row norms are those every
        update restores.
    mask: [B, N, C] bool, True at tokens; other slots update nothing, and their output is undefined.
    reset: [B, N] bool, True where a chunk starts a new document (initial weights, no momentum).

    Returns out [B, N, H, C, d] in the dtype of q, and the FastState [B, N, H, ...] with which each
    chunk was read, i.e. before its own update. The update after the last chunk is not made:
    `update_sums` and `apply_update` make it when a next token comes.

    implementation: "reference", "xla", "pallas_tpu", "pallas_gpu" or None for the best one: the
        TPU kernels on TPU where d and F are multiples of 128 and C is at least 128, else XLA (the
        GPU kernels have not run on a GPU yet). A named one never falls back. Where their device is
        absent, kernels are interpreted (slow).
    axis_name: inside `jax.shard_map`, a mesh axis over whose S devices the slots of every chunk are
        spread: q, k, v, rates, momentum and mask are the device's own C / S slots of all N chunks;
        weights and reset are the same everywhere. N must be a multiple of S: the states
        returned are those of the device's own N / S chunks alone, [B, N / S, H, ...] (sequence.py).
        By "xla" only.
    Raises ValueError for shapes that do not fit or an implementation that is not available.
    Source: LaCT (arXiv 2505.23884), golden README section 5.
    """
    _check(q, k, v, rates, momentum, weights)
    options_of_call = {"mask": mask, "reset": reset, "options": options}
    if axis_name is not None and lax.axis_size(axis_name) > 1:
        _check_sequence(q, implementation, axis_name)
        arrays = q, k, v, rates, momentum, weights
        return lact_sequence(*arrays, **options_of_call, axis_name=axis_name)
    name = implementation or _best(q, weights)
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {sorted(IMPLEMENTATIONS)}. "
            f"Got: implementation={implementation!r}."
        )
    return IMPLEMENTATIONS[name](q, k, v, rates, momentum, weights, **options_of_call)


def _best(q: jax.Array, weights: Weights) -> str:
    """The implementation for this device; not the GPU kernels before they have run on a GPU."""
    chunk, d = q.shape[-2:]
    unpadded = chunk >= _LANES and d % _LANES == 0 and weights.w1.shape[-1] % _LANES == 0
    return "pallas_tpu" if backend() == "tpu" and unpadded else "xla"


def _check_sequence(q, implementation, axis_name):
    chunks, heads, devices = *q.shape[1:3], lax.axis_size(axis_name)
    if chunks % devices:
        raise ValueError(
            "The chunks must be a multiple of the devices that share them: each device keeps the "
            f"states of its own ones. Got: N={chunks} chunks over {devices} devices on the axis "
            f"{axis_name!r}. Add empty chunks at the end, with mask False."
        )
    if implementation not in (None, "xla"):
        raise ValueError(
            "Only 'xla' shares the slots of a chunk among devices. "
            f"Got: implementation={implementation!r}, H={heads} heads over {devices} devices on "
            f"the axis {axis_name!r}. Leave it None, or name 'xla'."
        )


def _check(q, k, v, rates, momentum, weights):
    heads, d = q.shape[2], q.shape[4]
    hidden = weights.w1.shape[-1]
    expected = {
        "k": (k, q.shape),
        "v": (v, q.shape),
        "rates": (rates, (*q.shape[:4], 3, rates.shape[-1])),
        "momentum": (momentum, q.shape[:4]),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}. Got: {list(array.shape)}.")
    for name, shape in {"w0": (heads, hidden, d), "w1": (heads, d, hidden)}.items():
        array = getattr(weights, name)
        if array.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}. Got: {list(array.shape)}.")
    if weights.w2.shape != weights.w0.shape:
        raise ValueError(f"w2 must be as w0. Got: {list(weights.w2.shape)}.")
    if rates.shape[-1] not in ({1, d} if hidden == d else {1}):
        raise ValueError(
            "rates must have 1 channel, or d where the hidden size F equals d. "
            f"Got: E={rates.shape[-1]}, d={d}, F={hidden}."
        )
