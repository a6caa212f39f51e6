"""Generation by several copies of a model at once, each with parameters of its own."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.data.tokenizer import Tokenizer
from refine_jax.generation.engine import Prefix, advance, decode, prefill
from refine_jax.generation.generator import BLOCK, Generator
from refine_jax.models.trainable import join
from refine_jax.models.transformer import Model, Params


class CopiesGenerator(Generator):
    """A Generator whose `params` have leaves [n, ...]: copy i reads and continues row i.

    shared: the parameters that all copies have in common; None: there are none.

    It takes at most n prompts at a time; they are read in one pass, so they should be of similar
    length. Up to rounding, rows are what a Generator makes of them with their copy alone.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, shared: Params | None = None):
        super().__init__(model, tokenizer, prefill_tokens=np.iinfo(np.int32).max)
        programs = (functools.partial(program, shared) for program in copies_programs(model))
        self._prefill, self._advance, self._decode = programs


def copies_programs(model: Model) -> tuple[Callable, Callable, Callable]:
    """Compile prefill, advance and decode of a CopiesGenerator; `shared` comes before `params`."""

    def of_copy(run, shared, **options):
        return lambda own, *rest: run(model, join(own, shared), *rest, **options)

    def prefill_each(shared, params, tokens, lengths):
        vmapped, params = jax.vmap(of_copy(prefill, shared)), _for_rows(params, len(tokens))
        return _join(vmapped(params, tokens[:, None], lengths[:, None]))

    def advance_each(shared, params, prefix, tokens, taken):
        vmapped, params = jax.vmap(of_copy(advance, shared)), _for_rows(params, len(tokens))
        return _join(vmapped(params, _split(prefix), tokens[:, None], taken[:, None]))

    def decode_each(shared, params, prefix, keys, sampler, budgets):
        # All rows go on as far as the longest budget, which leaves the loop's end common to them:
        # ends of their own would copy the states in every step. The caller cuts the rows.
        vmapped = jax.vmap(of_copy(decode, shared, block=BLOCK), (0, 0, 0, None, None))
        params = _for_rows(params, len(budgets))
        common = jnp.max(budgets, keepdims=True)
        tokens, prefix = vmapped(params, _split(prefix), keys[:, None], sampler, common)
        return tokens[:, 0], _join(prefix)

    return (
        jax.jit(prefill_each),
        jax.jit(advance_each, donate_argnums=2),
        jax.jit(decode_each, donate_argnums=2),
    )


def _for_rows(params: Params, rows: int) -> Params:
    """Take as many copies as there are rows: those beyond the last one are filling."""
    copies = len(jax.tree.leaves(params)[0])
    if copies == rows:
        return params
    return jax.tree.map(lambda x: x[np.minimum(np.arange(rows), copies - 1)], params)


def _split(prefix: Prefix) -> Prefix:
    """Split n rows into n prefixes of one row, on a leading axis."""
    state = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], prefix.state)
    return Prefix(state, prefix.hidden[:, None], prefix.length[:, None])


def _join(prefixes: Prefix) -> Prefix:
    """Undo `_split`."""
    state = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 0], 0, 1), prefixes.state)
    return Prefix(state, prefixes.hidden[:, 0], prefixes.length[:, 0])
