"""How the next token is chosen: greedily, or drawn at a temperature among the likeliest tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.base.errors import ConfigError, RunError
from refine_jax.base.files import short, valid_unicode

_LEAST, _MOST = (float(x) for x in (jnp.finfo(jnp.float32).tiny, jnp.finfo(jnp.float32).max))
MAX_NEW_TOKENS = 1_000_000


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to generate; the default is greedy.

    temperature: 0 takes the most likely token; above, tokens are drawn from softmax(z / t). top_k:
    draw among the k most likely tokens only; None: among all. top_p: draw among the fewest most
    likely tokens whose probabilities, after temperature and top_k, sum to at least top_p; None:
    among all. max_new_tokens: most tokens of a row; 0 generates nothing. At most MAX_NEW_TOKENS.
    stop: strings that end a row; they are not part of its text. seed: of the draws, 0 <= seed <
    2**32.

    Raises ConfigError: a field that cannot work.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        # "\n" alone would pass as a sequence of strings.
        stops = isinstance(self.stop, list | tuple)
        object.__setattr__(self, "stop", tuple(self.stop) if stops else self.stop)
        numbers = [self.temperature, 1 if self.top_p is None else self.top_p]
        integers = [1 if self.top_k is None else self.top_k, self.max_new_tokens, self.seed]
        names = ["temperature", "top_p", "top_k", "max_new_tokens", "seed"]
        kinds = [Real] * 2 + [Integral] * 3
        for name, value, kind in zip(names, numbers + integers, kinds, strict=True):
            if not isinstance(value, kind) or isinstance(value, bool):
                what = "a number" if kind is Real else "a whole number"
                raise ConfigError(f"{name} must be {what}. Got: {name}={short(value)}.")
        drawn = self.temperature > 0
        for name, fits, allowed in (
            ("temperature", 0 <= self.temperature <= _MOST, "a number, at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1], or None"),
            (
                "max_new_tokens",
                0 <= self.max_new_tokens <= MAX_NEW_TOKENS,
                f"at least 0 and at most {MAX_NEW_TOKENS:,}",
            ),
            ("stop", stops and all(map(_can_be_met, self.stop)), "non-empty texts of Unicode"),
            ("seed", 0 <= self.seed < 2**32, "at least 0 and below 2**32"),
            ("top_k", drawn or self.top_k is None, "None at temperature 0, which draws nothing"),
            ("top_p", drawn or self.top_p is None, "None at temperature 0, which draws nothing"),
        ):
            if not fits:
                value = short(getattr(self, name))
                raise ConfigError(f"{name} must be {allowed}. Got: {name}={value}.")


def _can_be_met(stop: Any) -> bool:
    """Whether a stop string may occur in a text, which never holds a lone surrogate."""
    return isinstance(stop, str) and stop != "" and valid_unicode(stop) == stop


class Sampler(NamedTuple):
    """A `Sampling` as scalars of a compiled program: any values, one program.

    temperature: float32; 0 is greedy. top_k: int32, V or more for all. top_p: float32, 1 for all.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array

    @classmethod
    def of(cls, sampling: Sampling) -> Sampler:
        """Convert `sampling`."""
        everything = jnp.iinfo(jnp.int32).max
        return cls(
            jnp.float32(sampling.temperature),
            jnp.int32(everything if sampling.top_k is None else min(sampling.top_k, everything)),
            # At least one token is left, also where float32 would round to 0.
            jnp.float32(1.0 if sampling.top_p is None else max(sampling.top_p, _LEAST)),
        )


NOT_FINITE = -2
"""What stands for a token where the logits are not finite: nothing can be chosen among them."""


def not_finite(where: str) -> RunError:
    """Make the error for predictions that are NaN or infinite; `where` follows in its message."""
    return RunError(
        f"The model's predictions are not finite (NaN or infinite) {where}. Its parameters hold "
        "NaN, or are too large for its dtype: check the checkpoint, try compute_dtype float32 and, "
        "if the model was trained on the prompt, a smaller learning rate."
    )


def as_ends(end: int | Sequence[int] | None) -> tuple[int, ...]:
    """List the tokens that end a text, given as one, several or None."""
    if end is None:
        return ()
    return (end,) if isinstance(end, Integral) else tuple(end)


def row_keys(seed: int | jax.Array, ids: jax.Array) -> jax.Array:
    """Derive the random keys [B] of rows from the seed and the rows' ids [B] alone."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(ids)


def sample(z: jax.Array, keys: jax.Array, sampler: Sampler) -> jax.Array:
    """Choose a token [B] int32 for each row from logits z [B, V] float32; keys [B], one a draw.

    NOT_FINITE where a logit is NaN or infinite (-inf of some tokens excludes them).
    """

    def draw(z):
        # Shifted first: a tiny temperature must not overflow the largest logit.
        largest = z.max(axis=-1, keepdims=True)
        z = (z - largest) / sampler.temperature
        some = (sampler.top_k < z.shape[-1]) | (sampler.top_p < 1)
        z = lax.cond(some, lambda z: keep_likeliest(z, sampler), lambda z: z, z)
        return jax.vmap(jax.random.categorical)(keys, z), largest[:, 0]

    def take_best(z):
        best = jnp.argmax(z, axis=-1)
        return best, jnp.take_along_axis(z, best[:, None], axis=-1)[:, 0]

    # The largest logit is NaN if any of them is.
    tokens, largest = lax.cond(sampler.temperature > 0, draw, take_best, z)
    return jnp.where(jnp.isfinite(largest), tokens.astype(jnp.int32), NOT_FINITE)


def keep_likeliest(z: jax.Array, sampler: Sampler) -> jax.Array:
    """Set logits z [B, V] to -inf for the tokens that top_k and top_p leave out.

    Of equal logits the lower id is the likelier, so that top_k keeps exactly k tokens and top_k 1
    is greedy.
    """

    def keep(z):
        order = jnp.argsort(z, descending=True, stable=True)
        ranked = z[order]
        kept = jnp.arange(z.size) < sampler.top_k
        p = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf))
        likelier = jnp.cumsum(p) - p  # the probability of all that come before
        # Their rounded sum may reach 1 before the last token.
        kept &= (likelier < sampler.top_p) | (sampler.top_p >= 1)
        return jnp.where(jnp.zeros(z.shape, bool).at[order].set(kept), z, -jnp.inf)

    return jax.vmap(keep)(z)
