"""Where rollouts start: one position a span, drawn by what the forward pass says of each slot.

Source: ReFINE (arXiv 2602.16704), section 3, and its published code, which draws by the entropy of
the next-token prediction. The entropy at slot t belongs to the prediction of token t+1, so choosing
slot p means that the rollout replaces the tokens from p+1 on; so it is with P_k at slot t, the
probability that a rollout of the tokens from t+1 on is right as a whole (`exact.py`).

Entropy sends rollouts to what cannot be known. P_k (1 - P_k), the variance of the whole-match
reward, sends them to what is sometimes right: only there a reward says something (VIP,
arXiv 2602.01601).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SELECTIONS = ("entropy", "uniform", "argmax", "argmin", "variance", "all")

# Variances below are taken for it, so that spans without any are drawn from uniformly. It is well
# above the rounding of 1 - P in float32, and 10,000 slots of it weigh little beside a single 0.25.
_LEAST_VARIANCE = 1e-6


class Selection(NamedTuple):
    """Rollout positions of rows of T tokens.

    starts: [B, c] int32, slot of the first of the k tokens that a rollout replaces; always in
        1..T-k (as far as T allows), so that it may be used as an index even where not valid.
    chosen: [B, c] int32, the slot whose entropy was chosen; -1 where the span is empty.
    valid: [B, c] bool, whether the rollout has a truth to be compared with: the tokens
        start-1..start+k-1 are real and of one document.
    """

    starts: jax.Array
    chosen: jax.Array
    valid: jax.Array


def smooth_entropy(entropy: jax.Array, rollout_length: int) -> jax.Array:
    """Average `entropy` [B, T] over k tokens (k + 1 if k is even) around each slot: [B, T].

    Zeros stand beyond both ends and count in the average. It runs over the whole row, so entropies
    at padding enter the averages next to it, as in the published code.
    """
    width = rollout_length + 1 - rollout_length % 2
    half = width // 2
    total = lax.reduce_window(
        entropy, 0.0, lax.add, (1, width), (1, 1), padding=((0, 0), (half, half))
    )
    return total / width


def assign_spans(mask: jax.Array, num_positions: int) -> jax.Array:
    """Assign every slot of `mask` [B, T] bool to a span 0..c-1, or to none (-1): [B, T] int32.

    The n real tokens of a row, in order, are cut into c spans of n // c tokens. The n % c tokens
    left at the end and padding belong to none; with n < c all spans are empty. Documents packed in
    a row count as one sequence.
    """
    count = jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.int32)
    size = count // num_positions
    rank = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    in_span = mask & (rank < size * num_positions)
    return jnp.where(in_span, rank // jnp.maximum(size, 1), -1)


def selection_scores(
    entropy: jax.Array,
    rollout_length: int,
    method: str,
    temperature: float = 1.0,
    probabilities: jax.Array | None = None,
) -> jax.Array:
    """Score slots for the choice inside a span, [B, T] float32, from `entropy` [B, T] (nats).

    For `entropy`, `uniform` and `variance` scores are the unnormalised log probabilities that slots
    are drawn with; for `argmax` and `argmin` the largest score wins, from the entropies as they are
    (the published code smooths them for drawing only). `variance` reads `probabilities` [B, T], P_k
    of each slot. `all` is for objectives that need no positions; rollouts that are made all the
    same, as in evaluations, start anywhere (`uniform`).
    """
    entropy = entropy.astype(jnp.float32)
    match method:
        case "entropy":
            return smooth_entropy(entropy, rollout_length) / temperature
        case "uniform" | "all":
            return jnp.zeros_like(entropy)
        case "variance":
            if probabilities is None:
                raise ValueError("selection 'variance' needs probabilities. Got: None.")
            variance = probabilities * (1.0 - probabilities)
            return jnp.log(jnp.maximum(variance, _LEAST_VARIANCE)) / temperature
        case "argmax":
            return entropy
        case "argmin":
            return -entropy
    raise ValueError(f"selection must be one of {SELECTIONS}. Got: {method!r}.")


def response_starts(
    chosen: jax.Array, mask: jax.Array, rollout_length: int, edge_margin: int = 20
) -> jax.Array:
    """Find the slots [B, c] where rollouts of `chosen` slots [B, c] start; `mask` [B, T] bool.

    One after the chosen slot, clamped to [s + margin, e - margin] where s..e-1 reach from the first
    to the last real token; the upper bound wins where they cross. The published code pads on the
    left only and uses the padded length for e; with padding on the right that would put starts
    outside of the text. A rollout longer than the margin keeps its own length from the end.
    """
    num_tokens = mask.shape[1]
    slots = jnp.arange(num_tokens, dtype=jnp.int32)
    real = mask.any(axis=1, keepdims=True)
    # By argmax, XLA would take seconds to fold what is constant where no row has padding.
    first = jnp.where(mask, slots, num_tokens - 1).min(axis=1, keepdims=True)
    end = jnp.where(mask, slots, 0).max(axis=1, keepdims=True) + 1
    first, end = jnp.where(real, first, 0), jnp.where(real, end, num_tokens)
    lower = first + edge_margin
    upper = end - max(edge_margin, rollout_length)
    return jnp.minimum(jnp.maximum(chosen + 1, lower), upper)


def rollout_slots(starts: jax.Array, rollout_length: int) -> jax.Array:
    """List the slots [B, c, k] that the rollouts from `starts` [B, c] stand for."""
    return starts[..., None] + jnp.arange(rollout_length, dtype=jnp.int32)


def has_truth(
    starts: jax.Array, mask: jax.Array, rollout_length: int, document: jax.Array | None = None
) -> jax.Array:
    """Whether rollouts from `starts` [B, c] have k true tokens to be compared with: [B, c] bool.

    The k tokens and the one before them must be real (`mask` [B, T] bool) and of one document
    (`document` [B, T] int32; None: a row is one document).
    """
    batch, num_tokens = mask.shape
    slots = rollout_slots(starts - 1, rollout_length + 1)
    inside = (slots >= 0) & (slots < num_tokens)
    row = jnp.arange(batch)[:, None, None]
    safe = jnp.clip(slots, 0, num_tokens - 1)
    ok = inside & mask[row, safe]
    if document is not None:
        owner = document[row, safe]
        ok &= owner == owner[..., :1]
    return jnp.all(ok, axis=-1)


def selectable(
    mask: jax.Array,
    *,
    num_positions: int,
    rollout_length: int,
    edge_margin: int = 20,
    document: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Find the slots that may be chosen, and the spans with a position whose rollout has a truth.

    A span's slots are those whose rollout, from where `response_starts` puts it, has k true tokens
    of one document; in a span without such, all of it. So which rollouts are valid depends on
    nothing that a model computes.

    mask: [B, T] bool, True at real tokens. document: [B, T] int32, for packed rows. Returns the
    slots of each span, [B, c, T] bool, and the spans [B, c] bool.
    """
    slots = jnp.broadcast_to(jnp.arange(mask.shape[1], dtype=jnp.int32), mask.shape)
    starts = response_starts(slots, mask, rollout_length, edge_margin)
    span = assign_spans(mask, num_positions)
    in_span = span[:, None, :] == jnp.arange(num_positions, dtype=jnp.int32)[:, None]
    has = in_span & has_truth(starts, mask, rollout_length, document)[:, None]
    valid = jnp.any(has, axis=-1)
    return jnp.where(valid[..., None], has, in_span), valid


def select_positions(
    keys: jax.Array,
    entropy: jax.Array,
    mask: jax.Array,
    *,
    num_positions: int,
    rollout_length: int,
    method: str = "entropy",
    temperature: float = 1.0,
    edge_margin: int = 20,
    document: jax.Array | None = None,
    probabilities: jax.Array | None = None,
    counted: jax.Array | None = None,
) -> Selection:
    """Choose c rollout positions a row, one in each of c equal spans of its real tokens.

    keys: [B] random keys, one a row, so that a row's draw does not depend on the rows beside it
    (derive them from the row's index in the whole batch); unused by argmax and argmin. entropy: [B,
    T], nats, of the prediction of the next token. mask: [B, T] bool, True at real tokens.
    edge_margin: least distance of a start from either end of the text.

    method: `entropy` draws from softmax(smoothed entropy / temperature), `uniform` and `all` with
    equal probabilities; `argmax` and `argmin` take the (first) largest and smallest entropy;
    `variance` draws in proportion to (P_k (1 - P_k)) ** (1 / temperature).

    document: [B, T] int32, for packed rows: a rollout has a truth only in the document of the token
    before it. Slots whose rollout has none are chosen only where the whole span has no other
    (`selectable`); such a position is not valid.

    probabilities, counted: [B, T], needed by `variance`: P_k of each slot, and whether its window
    lies in one document (the last of `exact.match_probabilities`, and its second result). Slots
    that do not count, and those whose start the margins would move, are chosen only where their
    span has no others.

    Different spans can end up with one start, as in the published code. Raises ValueError for an
    unknown method.
    """
    num_tokens = entropy.shape[1]
    scores = selection_scores(entropy, rollout_length, method, temperature, probabilities)
    if method not in ("argmax", "argmin"):
        # The Gumbel trick: the spans are disjoint, so one noise vector serves all their draws.
        scores += jax.vmap(lambda key: jax.random.gumbel(key, (num_tokens,)))(keys)
    allowed, valid = selectable(
        mask,
        num_positions=num_positions,
        rollout_length=rollout_length,
        edge_margin=edge_margin,
        document=document,
    )
    if method == "variance":
        slots = jnp.arange(num_tokens, dtype=jnp.int32)[None]
        starts = response_starts(slots, mask, rollout_length, edge_margin)
        usable = allowed & (counted & (starts == slots + 1))[:, None, :]
        allowed = jnp.where(jnp.any(usable, axis=-1, keepdims=True), usable, allowed)
    chosen = jnp.argmax(jnp.where(allowed, scores[:, None, :], -jnp.inf), axis=-1)
    chosen = jnp.where(jnp.any(allowed, axis=-1), chosen.astype(jnp.int32), -1)
    starts = response_starts(chosen, mask, rollout_length, edge_margin)
    starts = jnp.clip(starts, 1, max(num_tokens - rollout_length, 1))
    return Selection(starts, chosen, valid)
