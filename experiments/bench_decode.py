"""Time and state of generation after contexts of different lengths.

    python experiments/bench_decode.py --model=lact --json

The context is read in pieces; from the state after 1K, 4K, 16K and 64K tokens, tokens are generated
greedily one at a time, the same number from each, in turns; medians are reported.
For LaCT that includes the fast-weight update that is due after each whole chunk. Re-running the
whole prefix, as the published code generates, means a forward pass over 16K tokens for one token.

    python experiments/bench_decode.py --model=hybrid --json

also says which share of a token's time is reading the context, as attention layers do, and what
forks of a row of 16K tokens cost in these layers: the time to make 1 to 8 of them, that of a token
of all, and the memory of each beside the row.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from harness import make_rerun, medians, parser, report, small_model, tree_bytes

from refine_jax.generation import (
    Prefix,
    Sampler,
    Sampling,
    advance,
    decode,
    empty_prefix,
    row_keys,
)
from refine_jax.generation.engine import with_room
from refine_jax.models.transformer import Model, Params

CONTEXTS = (1024, 4096, 16384, 65536)
RERUN = 16384
BLOCK = 1024
FORKS = (1, 2, 4, 8)


def prefixes_after(model: Model, params: Params, tokens: jax.Array) -> dict[int, Prefix]:
    """What is known after each of CONTEXTS tokens of `tokens` [1, T].

    Caches that grow with the context are not read but of zeros: that takes the same time a token.
    """
    if grows(model, params):
        empty = empty_prefix(model, params, 1)
        return {context: _zeros_after(model, empty, context) for context in (0, *CONTEXTS)}
    read = jax.jit(functools.partial(advance, model))
    prefix, every = empty_prefix(model, params, 1), jnp.ones((1,), bool)
    prefixes = {}
    for at in range(0, max(CONTEXTS), BLOCK):
        prefix = read(params, prefix, tokens[:, at : at + BLOCK], every)
        if at + BLOCK in CONTEXTS:
            prefixes[at + BLOCK] = prefix
    return prefixes


def grows(model: Model, params: Params) -> bool:
    """Say whether what a token costs grows with the context."""
    return model.capacity(empty_prefix(model, params, 1).state) is not None


def _zeros_after(model: Model, empty: Prefix, context: int) -> Prefix:
    """A prefix whose caches hold `context` tokens of zeros; counts are the integers of a state."""
    state = model.resize(empty.state, context)
    state = jax.tree.map(
        lambda x: jnp.full_like(x, context) if jnp.issubdtype(x.dtype, jnp.integer) else x, state
    )
    return empty._replace(state=state, length=jnp.full_like(empty.length, context))


def fork_costs(model: Model, params: Params, tokens: jax.Array, repeats: int) -> dict:
    """Seconds of making R forks of a row `tokens` [1, T] and of a token of all, for R of `FORKS`.

    Bytes are those of the forks' states beside what they share with the row.
    """
    run = jax.jit(functools.partial(model.forward, with_trace=True))
    trace = run(params, tokens)[1]
    row_bytes = tree_bytes(trace.layers)
    fork = jax.jit(functools.partial(model.fork, horizon=1))

    def positions(forks: int) -> jax.Array:
        return jnp.linspace(1, tokens.shape[1], forks).astype(jnp.int32)[None]

    makes = {forks: functools.partial(fork, params, trace, positions(forks)) for forks in FORKS}
    states = {forks: make() for forks, make in makes.items()}
    extend = jax.jit(model.extend)
    extends = {
        forks: functools.partial(extend, params, jnp.ones((1, forks, 1), jnp.int32), state)
        for forks, state in states.items()
    }
    return {
        "forks": list(FORKS),
        "seconds": list(medians(makes, repeats).values()),
        "token_seconds": list(medians(extends, repeats).values()),
        "bytes": [tree_bytes(state) - row_bytes for state in states.values()],
    }


def make_generate(model: Model, count: int):
    """`generate(params, prefix)` -> `count` greedy tokens [1, count]."""
    keys, sampler = row_keys(0, jnp.arange(1)), Sampler.of(Sampling())
    budgets = jnp.full((1,), count, jnp.int32)

    @jax.jit
    def generate(params: Params, prefix: Prefix) -> jax.Array:
        return decode(model, params, prefix, keys, sampler, budgets, block=count)[0]

    return generate


def main():
    """Measure and print."""
    flags = parser(__doc__, repeats=15)
    flags.add_argument("--generate", type=int, default=64, help="tokens generated per repeat")
    args = flags.parse_args()
    model = small_model(args.model)
    params = model.init(jax.random.key(0))
    shape = (1, max(CONTEXTS))
    tokens = jax.random.randint(jax.random.key(1), shape, 3, model.config.vocab_size)

    prefixes = prefixes_after(model, params, tokens)
    prefixes = {
        context: with_room(model, prefix, args.generate) for context, prefix in prefixes.items()
    }
    generate = make_generate(model, args.generate)
    runs = {
        context: functools.partial(generate, params, prefix) for context, prefix in prefixes.items()
    }
    last = jnp.full((1,), RERUN - 1)
    rerun = functools.partial(make_rerun(model), params, tokens[:, :RERUN], last)
    times = medians(runs, args.repeats)
    rerun_s = medians({"rerun": rerun}, args.repeats)["rerun"]

    per_token = {context: times[context] / args.generate for context in CONTEXTS}
    state_bytes = {context: tree_bytes(prefixes[context].state) for context in CONTEXTS}
    result = {
        "contexts": list(CONTEXTS),
        "seconds_per_token": list(per_token.values()),
        "state_bytes": list(state_bytes.values()),
        "flatness": max(per_token.values()) / min(per_token.values()),
        "speedup_over_rerun_16k": rerun_s / per_token[RERUN],
    }
    lines = [
        f"{context:>6} tokens: {per_token[context] * 1e3:7.3f} ms a token, "
        f"state {state_bytes[context] / 2**20:.2f} MiB"
        for context in CONTEXTS
    ]
    if 0 in times:
        alone = times[0] / args.generate
        shares = [1 - alone / per_token[context] for context in CONTEXTS]
        result["context_share"] = shares
        lines = [
            f"{line}, {share:.0%} of the time for reading the context"
            for line, share in zip(lines, shares, strict=True)
        ]
        kinds = ["full_attention"] * model.config.num_hidden_layers
        attention = small_model(args.model, layer_types=kinds)
        attention_params = attention.init(jax.random.key(0))
        costs = fork_costs(attention, attention_params, tokens[:, :RERUN], args.repeats)
        result["attention_forks"] = costs
        lines += [
            f"{forks:>6} forks of {RERUN} tokens, attention layers alone: {seconds * 1e3:.3f} ms, "
            f"a token {token * 1e3:.3f} ms, {size / forks / 2**10:.1f} KiB each beside the row"
            for forks, seconds, token, size in zip(*costs.values(), strict=True)
        ]
    lines.append(
        f"slowest / fastest {result['flatness']:.3f}; re-running {RERUN} tokens takes "
        f"{rerun_s:.3f} s, {result['speedup_over_rerun_16k']:.0f} x a token"
    )
    report(result, lines, args.json)


if __name__ == "__main__":
    main()
