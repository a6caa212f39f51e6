"""Are the GPU kernels right, and are they faster than XLA? One table, on a Hopper or Ampere card.

    python experiments/gpu_check.py --json
    JAX_PLATFORMS=cpu python experiments/gpu_check.py --interpret --json

The first command takes a GPU, the second one a CPU, where the kernels are interpreted at small
sizes and no times are taken. Every Pallas kernel for GPUs is run, of the delta rule and of LaCT,
forward and backward, in float32 and bfloat16, with packed rows; its values and gradients are
compared with `reference.py` of its op in float32 products, by their relative root mean square. So
is the attention of cuDNN, which full rows of hybrid models take, with XLA's. Then a small hybrid
model makes a ReFINE step and generates, with these kernels and with XLA's programs. Times are
medians of a forward pass and of one with its gradients, in turns with XLA.

What is wrong, or does not run, makes the exit code 1. What would begin later than --limit seconds
is left out, and said: compiling takes most of the time. No GPU was at hand when this was written:
only the second command has run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

if "--interpret" in sys.argv[1:]:
    # Of interpreted kernels XLA:CPU makes programs of many small loops, which it compiles for
    # minutes each where it optimizes them.
    _PLAIN = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        _PLAIN += " --xla_cpu_use_fusion_emitters=false"  # later ones lack the flag
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_PLAIN}".strip()

import jax
import jax.numpy as jnp
import numpy as np
from harness import medians, report, small_model

from refine_jax.config import OptimizerConfig, RefineConfig
from refine_jax.generation import Sampler, Sampling, decode, prefill, row_keys
from refine_jax.generation.engine import with_room
from refine_jax.kernels.delta_rule import delta_rule
from refine_jax.kernels.delta_rule.specs import BENCH_SPECS as DELTA_BENCH
from refine_jax.kernels.delta_rule.specs import DeltaSpec
from refine_jax.kernels.lact import lact
from refine_jax.kernels.lact.specs import BENCH_SPECS as LACT_BENCH
from refine_jax.kernels.lact.specs import LaCTSpec
from refine_jax.models.causal_attention import causal_attention
from refine_jax.models.transformer import ComputePolicy, Model
from refine_jax.refine.optimizer import make_optimizer
from refine_jax.refine.step import TrainState, make_train_step

KERNELS = "pallas_gpu"
# Relative root mean square of values and of gradients, as in tests/kernels.
TOLERANCES = {"float32": (1e-5, 1e-5), "bfloat16": (0.006, 0.008)}

PACKED = {"gated": True, "documents": 3, "initial_state": True}
DELTA = (
    DeltaSpec("packed", 500, 2, 2, 4, 128, 128, 64, save_every=128, **PACKED),
    DeltaSpec("K 96, V 192", 300, 1, 2, 2, 96, 192, 64, **PACKED),
    DeltaSpec("ungated, K 256", 200, 1, 1, 1, 256, 64, 64),
)
LACT = (
    LaCTSpec("packed", 3, 2, 2, 256, 384, 384, masked=True, resets=True),
    LaCTSpec("rates by channel", 2, 1, 1, 100, 128, 128, rate_channels=128),
)
SMALL_DELTA = (DeltaSpec("packed", 37, 1, 1, 2, 8, 12, 16, save_every=16, **PACKED),)
SMALL_LACT = (LaCTSpec("packed", 2, 1, 1, 20, 16, 16, masked=True, resets=True),)


@dataclasses.dataclass
class Row:
    """A line of the table. errors: (found, allowed) by name; times: ms by name, (kernel, XLA)."""

    name: str
    errors: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    times: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    failure: str = ""

    @property
    def is_right(self) -> bool:
        """Whether it ran, and all errors are small; one that is not finite is not."""
        return not self.failure and all(found <= most for found, most in self.errors.values())

    def cells(self) -> list[str]:
        """The line."""
        errors = ", ".join(f"{name} {found:.1e}" for name, (found, _) in self.errors.items())
        times = ", ".join(
            f"{name} {kernel:.2f} / {xla:.2f} ms = {kernel / xla:.2f}"
            for name, (kernel, xla) in self.times.items()
        )
        verdict = "right" if self.is_right else self.failure or "WRONG"
        return [self.name, verdict if self.errors or self.failure else "timed", errors, times]


def relative_rms(got: Any, want: Any) -> float:
    """The largest relative root mean square of the differences of arrays of two trees."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    found = 0.0
    for a, b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(b**2)), 1e-30)
        found = max(found, float(error)) if np.isfinite(error) else np.inf
    return found


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(function: Callable, arrays: Any) -> tuple[Any, Any]:
    """Values of a function, and gradients of a fixed weighting of them."""
    values, pullback = jax.vjp(function, arrays)
    leaves, structure = jax.tree.flatten(values)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    weights = [
        jax.random.normal(k, x.shape).astype(x.dtype) for k, x in zip(keys, leaves, strict=True)
    ]
    return values, pullback(jax.tree.unflatten(structure, weights))[0]


def compared(name: str, function: Callable, reference: Callable, arrays: Any, dtype: str) -> Row:
    """Values and gradients of `function` against those of `reference`, both of a tree of arrays."""
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    with jax.default_matmul_precision("highest"):
        want = with_gradients(reference, exact)
    got = with_gradients(function, arrays)
    most = TOLERANCES[dtype]
    parts = zip(("values", "gradients"), got, want, most, strict=True)
    return Row(
        f"{name}, {dtype}", {part: (relative_rms(a, b), limit) for part, a, b, limit in parts}
    )


def timed(name: str, functions: dict[str, Callable], arrays: Any, repeats: int) -> Row:
    """Milliseconds of the forward pass and of one with gradients, kernel beside XLA."""
    runs = {}
    for key, function in functions.items():
        runs[key, "forward"] = functools.partial(jax.jit(function), arrays)
        runs[key, "with gradients"] = functools.partial(with_gradients, function, arrays)
    times = {key: 1e3 * value for key, value in medians(runs, repeats).items()}
    kernel, xla = functions
    parts = ("forward", "with gradients")
    return Row(name, times={part: (times[kernel, part], times[xla, part]) for part in parts})


def delta_call(spec: DeltaSpec, implementation: str, document: jax.Array | None) -> Callable:
    """The delta rule of the other arrays of a spec."""
    _, options = spec.arguments()

    def call(arrays):
        found = delta_rule(**arrays, document=document, **options, implementation=implementation)
        return [x for x in found if x is not None]

    return call


def lact_call(keywords: dict, implementation: str) -> Callable:
    """LaCT of arrays; outputs of masked slots are undefined."""
    mask = keywords.get("mask")

    def call(arrays):
        out, trace = lact(*arrays, **keywords, implementation=implementation)
        return (out if mask is None else jnp.where(mask[:, :, None, :, None], out, 0)), trace

    return call


def delta_row(spec: DeltaSpec, dtype: str) -> Row:
    """The delta rule's kernels against its reference."""
    arrays, _ = spec.arguments(dtype)
    document = arrays.pop("document", None)
    calls = (delta_call(spec, name, document) for name in (KERNELS, "reference"))
    return compared(f"delta rule, {spec.name}", *calls, arrays, dtype)


def lact_row(spec: LaCTSpec, dtype: str) -> Row:
    """LaCT's kernels against its reference."""
    arrays, keywords = spec.arguments(dtype)
    calls = (lact_call(keywords, name) for name in (KERNELS, "reference"))
    return compared(f"LaCT, {spec.name}", *calls, arrays, dtype)


def attention_arrays(tokens: int) -> list[jax.Array]:
    """Queries, keys and values of 8 heads of 128 numbers, two of keys."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (1, 2, 4, tokens, 128), (1, 2, tokens, 128), (1, 2, tokens, 128)
    return [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]


def attention_call(implementation: str) -> Callable:
    """Causal attention of full rows."""
    return lambda arrays: causal_attention(*arrays, implementation=implementation)


def hybrid(implementation: str, *, interpret: bool) -> Model:
    """A model of three layers of the delta rule and one of attention."""
    sizes = {"hidden_size": 512, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    if interpret:
        kinds = ["linear_attention", "full_attention"]
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        sizes |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8}
        sizes |= {"layer_types": kinds, "vocab_size": 53, "num_attention_heads": 2}
    config = small_model("hybrid", **sizes).config
    dtype = "float32" if interpret else "bfloat16"
    return Model(config, ComputePolicy(compute_dtype=dtype, implementation=implementation))


def model_rows(interpret: bool, repeats: int) -> Iterator[Row]:
    """A ReFINE step and 64 tokens of a small hybrid, by the kernels and by XLA."""
    models = {name: hybrid(name, interpret=interpret) for name in (KERNELS, "xla")}
    params = jax.jit(models["xla"].init)(jax.random.key(0))
    rows, tokens, new = (1, 100, 4) if interpret else (2, 4096, 64)
    batch = jax.random.randint(
        jax.random.key(2), (rows, tokens), 3, models["xla"].config.vocab_size
    )
    documents = jnp.where(jnp.arange(tokens) < tokens // 3, 1, 2)
    batch = {"tokens": batch, "segments": jnp.broadcast_to(documents, batch.shape)}
    config = RefineConfig(num_positions=2, edge_margin=4)
    found, runs = {}, {}
    for name, model in models.items():
        optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), steps=1)
        step = make_train_step(
            model, optimizer, config, mini_batch=rows, micro_batch=rows, max_documents=2
        )

        def run(step=step, optimizer=optimizer):
            copy = jax.tree.map(jnp.copy, params)  # a step gives the buffers of its state away
            return step(TrainState.create(copy, optimizer, jax.random.key(5), config), batch)[1]

        metrics = run()
        found[name] = [metrics["loss/ntp"], metrics["grad/norm"]]
        runs[name] = run
    # Rollouts are drawn, and kernels round otherwise: these two do not depend on many of them.
    errors = {
        "loss and gradient norm": (relative_rms(*found.values()), 1e-4 if interpret else 0.02)
    }
    row = Row("hybrid model, a ReFINE step", errors)
    if not interpret:
        times = medians(runs, repeats)
        row.times = {"step": tuple(1e3 * times[name] for name in models)}
    yield row
    yield decode_row(models, params, batch["tokens"], new, None if interpret else repeats)


def decode_row(models: dict, params: Any, tokens: jax.Array, new: int, repeats: int | None) -> Row:
    """Tokens after whole rows; those of XLA are read again by the kernels to be compared."""
    rows, length = tokens.shape
    sampler, keys = Sampler.of(Sampling()), row_keys(0, jnp.arange(rows))
    lengths, budgets = jnp.full((rows,), length), jnp.full((rows,), new, jnp.int32)
    runs = {}
    for name, model in models.items():
        prefix = jax.jit(functools.partial(prefill, model))(params, tokens, lengths)
        prefix = with_room(model, prefix, new)
        generate = jax.jit(functools.partial(decode, model, block=new))
        runs[name] = functools.partial(generate, params, prefix, keys, sampler, budgets)
    written = runs["xla"]()[0]
    whole = jnp.concatenate([tokens, written], axis=1)
    after = [
        jax.jit(functools.partial(prefill, model))(params, whole, lengths + new).hidden
        for model in models.values()
    ]
    carried = runs["xla"]()[1].hidden
    dtype = models["xla"].policy.compute_dtype
    most = 1e-4 if dtype == "float32" else 0.05
    errors = {
        "hidden states": (relative_rms(*after), most),
        "carried states": (relative_rms(carried, after[0]), most),
    }
    row = Row(f"hybrid model, {new} tokens generated", errors)
    if repeats is not None:
        times = medians(runs, repeats)
        row.times = {"a token": tuple(1e3 * times[name] / new for name in models)}
    return row


def checks(interpret: bool, repeats: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, what makes rows of the table), those that say most first."""
    delta, fast = (SMALL_DELTA, SMALL_LACT) if interpret else (DELTA, LACT)
    for dtype in ("bfloat16", "float32"):
        for spec in delta:
            yield f"delta rule, {spec.name}, {dtype}", functools.partial(delta_row, spec, dtype)
        for spec in fast:
            yield f"LaCT, {spec.name}, {dtype}", functools.partial(lact_row, spec, dtype)
    yield "hybrid model", lambda: [*model_rows(interpret, repeats)]
    if interpret:
        return
    yield (
        "attention by cuDNN",
        lambda: compared(
            "attention by cuDNN",
            *map(attention_call, ("cudnn", "xla")),
            attention_arrays(1000),
            "bfloat16",
        ),
    )
    both = (KERNELS, "xla")
    for spec in DELTA_BENCH:
        arrays, _ = spec.arguments("bfloat16")
        calls = {name: delta_call(spec, name, None) for name in both}
        name = f"delta rule, {spec.name}, {spec.tokens} tokens"
        yield name, functools.partial(timed, name, calls, arrays, repeats)
    for spec in LACT_BENCH:
        arrays, keywords = spec.arguments("bfloat16")
        calls = {name: lact_call(keywords, name) for name in both}
        name = f"LaCT, {spec.name}, {spec.chunks * spec.chunk} tokens"
        yield name, functools.partial(timed, name, calls, arrays, repeats)
    calls = {name: attention_call(name) for name in ("cudnn", "xla")}
    name = "attention by cuDNN, 8192 tokens"
    yield name, functools.partial(timed, name, calls, attention_arrays(8192), repeats)


def main() -> int:
    """Check, print the table; returns the exit code."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--interpret", action="store_true", help="small, on a CPU")
    flags.add_argument("--only", default="", help="beginning of the names of cases")
    flags.add_argument("--repeats", type=int, default=7, help="timed repeats; medians are reported")
    flags.add_argument("--limit", type=float, default=420, help="seconds, after which none begins")
    flags.add_argument("--json", action="store_true", help="print one JSON line last")
    options = flags.parse_args()
    kind = jax.default_backend()
    if kind != ("cpu" if options.interpret else "gpu"):
        print(
            f"error: gpu_check needs a GPU, or --interpret with JAX_PLATFORMS=cpu. Got: {kind}.",
            file=sys.stderr,
        )
        return 1
    begin, table, late = time.monotonic(), [], []
    for name, check in checks(options.interpret, options.repeats):
        if not name.startswith(options.only):
            continue
        if time.monotonic() - begin > options.limit:
            late.append(name)
            continue
        try:
            found = check()
        except Exception as error:  # a kernel that does not compile is a line of the table
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            found = Row(name, failure=f"does not run: {text[:200]}")
        for row in found if isinstance(found, list) else [found]:
            table.append(row)
            print(f"{time.monotonic() - begin:5.0f} s  {'; '.join(filter(None, row.cells()))}")
    heading = ["case", "verdict", "relative errors", "kernel / XLA"]
    cells = [heading, ["---"] * 4, *(row.cells() for row in table)]
    lines = ["", jax.devices()[0].device_kind, ""] + [f"| {' | '.join(line)} |" for line in cells]
    lines += [f"left out after {options.limit:.0f} s: {', '.join(late)}"] if late else []
    result = {
        "device": jax.devices()[0].device_kind,
        "seconds": time.monotonic() - begin,
        "left_out": late,
        "rows": [dataclasses.asdict(row) | {"right": row.is_right} for row in table],
    }
    report(result, lines, options.json)
    return int(not all(row.is_right for row in table))


if __name__ == "__main__":
    sys.exit(main())
