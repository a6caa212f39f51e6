"""Time and state of generation after contexts of different lengths.

    python experiments/bench_decode.py --model=lact --json

The context is read in pieces; from the state after 1K, 4K, 16K and 64K tokens, tokens are generated
greedily one at a time, the same number from each, in turns; medians are reported.
For LaCT that includes the fast-weight update that is due after each whole chunk. Re-running the
whole prefix, as the published code generates, means a forward pass over 16K tokens for one token.
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
from refine_jax.models.transformer import Model, Params

CONTEXTS = (1024, 4096, 16384, 65536)
RERUN = 16384
BLOCK = 1024


def prefixes_after(model: Model, params: Params, tokens: jax.Array) -> dict[int, Prefix]:
    """What is known after each of CONTEXTS tokens of `tokens` [1, T]."""
    read = jax.jit(functools.partial(advance, model))
    prefix, every = empty_prefix(model, params, 1), jnp.ones((1,), bool)
    prefixes = {}
    for at in range(0, max(CONTEXTS), BLOCK):
        prefix = read(params, prefix, tokens[:, at : at + BLOCK], every)
        if at + BLOCK in CONTEXTS:
            prefixes[at + BLOCK] = prefix
    return prefixes


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
    lines.append(
        f"slowest / fastest {result['flatness']:.3f}; re-running {RERUN} tokens takes "
        f"{rerun_s:.3f} s, {result['speedup_over_rerun_16k']:.0f} x a token"
    )
    report(result, lines, args.json)


if __name__ == "__main__":
    main()
