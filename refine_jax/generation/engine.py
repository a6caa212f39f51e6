"""Generation: read prompts once into states of fixed size, then extend the states by tokens.

Pure functions; `Generator` calls them for prompts of any number and lengths. Letters: B rows,
T tokens, S tokens of one extend, n tokens of one block, D model dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from refine_jax.generation.sampling import Sampler, as_ends, sample
from refine_jax.models.head import logits
from refine_jax.models.transformer import Model, Params, State


class Prefix(NamedTuple):
    """What a model keeps of B sequences of unequal length.

    Its size depends on B alone, but for models with full attention, whose states have room for some
    tokens (`with_room`).

    state: decode states, every leaf [L, B, 1, ...]. hidden: [B, D] final-norm output at the last
    token read, which predicts the next. length: [B] int32, tokens read.
    """

    state: State
    hidden: jax.Array
    length: jax.Array


def empty_prefix(model: Model, params: Params, rows: int) -> Prefix:
    """Make the Prefix before any token; its `hidden` predicts nothing yet."""
    return Prefix(
        model.init_state(params, (rows, 1)),
        jnp.zeros((rows, model.config.hidden_size), model.dtype),
        jnp.zeros((rows,), jnp.int32),
    )


def with_room(model: Model, prefix: Prefix, num_new: int) -> Prefix:
    """The Prefix with room for `num_new` more tokens in each row. Not inside `jax.jit`."""
    return prefix._replace(state=model.with_room(prefix.state, num_new))


def take_rows(prefix: Prefix, rows: jax.Array) -> Prefix:
    """Take `rows` [R] int32 of a Prefix; a row may be taken any number of times."""
    return Prefix(
        jax.tree.map(lambda x: x[:, rows], prefix.state), prefix.hidden[rows], prefix.length[rows]
    )


def gather_rows(prefixes: tuple[Prefix, ...], rows: jax.Array) -> Prefix:
    """Take `rows` [n] int32 of all prefixes, counted through them one after the other."""
    whole = Prefix(
        jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *(p.state for p in prefixes)),
        jnp.concatenate([p.hidden for p in prefixes]),
        jnp.concatenate([p.length for p in prefixes]),
    )
    return take_rows(whole, rows)


def prefill(model: Model, params: Params, tokens: jax.Array, lengths: jax.Array) -> Prefix:
    """Read whole prompts in one forward pass.

    tokens: [B, T] int32, padded on the right: the models are causal, so what follows a prompt's end
    changes nothing before it. lengths: [B] int32 >= 1. Pure.
    """
    hidden, trace = model.forward(params, tokens, with_trace=True)
    state = model.fork(params, trace, lengths[:, None])
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return Prefix(state, last, lengths)


def advance(
    model: Model, params: Params, prefix: Prefix, tokens: jax.Array, taken: jax.Array
) -> Prefix:
    """Read S more tokens, tokens [B, S] int32, in the rows that `taken` [B] bool names. Pure.

    The Prefix has room for them (`with_room`).
    """
    hidden, state = model.extend(params, tokens[:, None], prefix.state)

    def choose(new, old, axis):
        shape = [1] * new.ndim
        shape[axis] = -1
        return jnp.where(taken.reshape(shape), new, old)

    return Prefix(
        jax.tree.map(lambda new, old: choose(new, old, 1), state, prefix.state),
        choose(hidden[:, 0, -1], prefix.hidden, 0),
        prefix.length + jnp.where(taken, tokens.shape[1], 0),
    )


def decode(
    model: Model,
    params: Params,
    prefix: Prefix,
    keys: jax.Array,
    sampler: Sampler,
    budgets: jax.Array,
    *,
    block: int,
    end: int | tuple[int, ...] | None = None,
) -> tuple[jax.Array, Prefix]:
    """Generate up to `block` tokens a row, for which the Prefix has room (`with_room`).

    Pure; one program for any sampler and budgets.

    keys: [B], one a row (`row_keys`). A draw depends on the row's key and on how many tokens its
    sequence has, on nothing else: two blocks of 8 draw what one of 16 does. budgets: [B] int32,
    most tokens of each row; no more steps are made than the largest asks for. end: the token or
    tokens after which a row has no more; when all rows have ended, nothing more is computed. None:
    no such token; then vmapping over params leaves the loop's end common to all.

    Returns tokens [B, block] int32, -1 where a row has none and NOT_FINITE where its logits are not
    finite, and the Prefix after as many tokens as the longest row has. Rows that ended before it
    are of no further use (`Generator.extend` continues them from their own tokens).
    """
    head = model.head(params)
    ends = as_ends(end)

    def running(carry):
        index, alive, _, _ = carry
        return (index < block) & jnp.any(alive)

    def step(carry):
        index, alive, tokens, prefix = carry
        draws = jax.vmap(jax.random.fold_in)(keys, prefix.length)
        new = sample(logits(prefix.hidden, head), draws, sampler)
        read = jnp.maximum(new, 0)[:, None, None]  # NOT_FINITE is no token
        hidden, state = model.extend(params, read, prefix.state)
        tokens = lax.dynamic_update_index_in_dim(tokens, jnp.where(alive, new, -1), index, 0)
        alive = alive & (index + 1 < budgets)
        for token in ends:
            alive = alive & (new != token)
        return index + 1, alive, tokens, Prefix(state, hidden[:, 0, 0], prefix.length + 1)

    tokens = jnp.full((block, budgets.shape[0]), -1, jnp.int32)
    carry = jnp.int32(0), budgets > 0, tokens, prefix
    _, _, tokens, prefix = lax.while_loop(running, step, carry)
    return tokens.T, prefix
