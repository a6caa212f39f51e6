"""What the benchmarks share: small models, timing in turns, memory of compiled programs, output."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from refine_jax.kernels.device import backend
from refine_jax.models.config import model_config
from refine_jax.models.head import logits
from refine_jax.models.transformer import ComputePolicy, Model, Params

# About 4 layers of width 256 with the published vocabulary. LaCT's chunk and window are an eighth
# of 4096 tokens, as the published 2048 are of 16,384.
SMALL_MODELS = {
    "lact": {
        "model_type": "lact_swiglu",
        "num_attn_heads": 4,
        "num_lact_heads": 2,
        "lact_chunk_size": 512,
        "window_size": 512,
        "w0_w2_low_rank": 32,
    },
    "deltanet": {"model_type": "delta_net", "num_heads": 2},
    "gated_deltanet": {"model_type": "gated_deltanet", "num_heads": 2, "head_dim": 96},
    "hybrid": {  # three layers of the delta rule, one of attention
        "model_type": "qwen3_5_text",
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "intermediate_size": 704,
    },
}


def small_model(name: str, **fields) -> Model:
    """A model of 4 layers, width 256, vocabulary 32,000, in the device's default policy.

    fields: of its config.json, in place of those of `SMALL_MODELS`.
    """
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 32000}
    dtype = "float32" if backend() == "cpu" else "bfloat16"
    return Model(
        model_config(SMALL_MODELS[name] | sizes | fields), ComputePolicy(compute_dtype=dtype)
    )


def make_rerun(model: Model):
    """`rerun(params, tokens [B, T], last [B])` -> greedy tokens [B] after the slots `last`.

    Each call is a forward pass over all slots, as the published code generates from LaCT.
    """

    @jax.jit
    def rerun(params: Params, tokens: jax.Array, last: jax.Array) -> jax.Array:
        hidden, _ = model.forward(params, tokens)
        at_last = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return jnp.argmax(logits(at_last, model.head(params)), axis=-1)

    return rerun


def parser(description: str, *, repeats: int) -> argparse.ArgumentParser:
    """Flags that all benchmarks of models take."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--model", choices=sorted(SMALL_MODELS), default="lact")
    flags.add_argument(
        "--repeats", type=int, default=repeats, help="timed repeats; medians are reported"
    )
    flags.add_argument("--json", action="store_true", help="print one JSON line last")
    return flags


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call whose result is ready when it returns or when blocked on."""
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


def timings(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, run in turns after one warm-up: what disturbs one disturbs all."""
    times = {name: [] for name in runs}
    for index in range(repeats + 1):
        for name, run in runs.items():
            elapsed = seconds(run)
            if index:
                times[name].append(elapsed)
    return times


def medians(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, of its `timings`."""
    return {name: statistics.median(values) for name, values in timings(runs, repeats).items()}


def tree_bytes(tree) -> int:
    """Bytes of all arrays of a pytree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def program_bytes(jitted, *args) -> int:
    """Memory that one program needs: arguments, outputs that are not arguments, temporaries.

    By XLA's own plan of the compiled program (`memory_analysis`; its `peak_memory_in_bytes` leaves
    the temporaries out on CPU). Scratch that library calls allocate on their own is not in it.
    """
    plan = jitted.lower(*args).compile().memory_analysis()
    kept = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return plan.argument_size_in_bytes + kept + plan.temp_size_in_bytes


def report(result: dict, lines: list[str], as_json: bool) -> None:
    """Print readable lines, then, if asked for, the result as one JSON line."""
    print("\n".join(lines), flush=True)
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
