"""Speed of the ops alone, beside the rate of a plain float32 matrix product on the same machine.

    python experiments/bench_ops.py --json

Every case runs in turns with a product of two 2048 x 2048 matrices (the plain rate) and with the
most frequent product of the op alone, at its size (what the op could reach at best): forward, and
forward + backward (gradients of all array arguments). Medians, and GFLOP/s by the floating point
operations of the matrix products in the op's chunked form (2 m n k a product; `flops` of its
specs); the backward pass of a product is two products, so forward + backward counts three times the
forward. What is computed again in the backward pass to save memory, inverses and elementwise work
take time but are not counted. `--chunk-size` tries other chunks of the delta rule, `--cases` picks.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import medians, report
from jax import lax

from refine_jax.kernels.delta_rule import delta_rule
from refine_jax.kernels.delta_rule.specs import BENCH_SPECS as DELTA_SPECS
from refine_jax.kernels.lact import lact
from refine_jax.kernels.lact.specs import BENCH_SPECS as LACT_SPECS

MATMUL = 2048
PRODUCTS = 16


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One op at one shape.

    forward: arrays -> output array, jit-able. arrays: a pytree of its arguments, all of
    them differentiated. flops: of the forward pass. product: (heads, rows, size) of the op's most
    frequent matrix product, [rows, size] times [size, size] for every head.
    """

    name: str
    shape: str
    forward: Callable[[Any], jax.Array]
    arrays: Any
    flops: int
    product: tuple[int, int, int]


def delta_case(spec, implementation: str | None, chunk_size: int | None) -> Benchmark:
    """The delta rule."""
    if chunk_size is not None:
        spec = dataclasses.replace(spec, chunk_size=chunk_size)
    arrays, options = spec.arguments()

    def forward(arrays):
        return delta_rule(**arrays, **options, implementation=implementation)[0]

    shape = (
        f"{spec.batch} x {spec.tokens} tokens, {spec.value_heads} heads "
        f"{spec.key_dim} x {spec.value_dim}, chunk {spec.chunk_size}"
    )
    product = (spec.value_heads, spec.chunk_size, spec.key_dim)
    return Benchmark(spec.name, shape, forward, arrays, spec.flops(), product)


def lact_case(implementation: str | None) -> Benchmark:
    """LaCT's fast weights with momentum, 8192 tokens of the published 760M model."""
    spec = LACT_SPECS[0]
    arrays, options = spec.arguments()

    def forward(arrays):
        return lact(*arrays, **options, implementation=implementation)[0]

    shape = (
        f"{spec.batch} x {spec.chunks * spec.chunk} tokens, {spec.heads} heads "
        f"{spec.dim} x {spec.hidden}, chunk {spec.chunk}"
    )
    product = (spec.heads, spec.chunk, spec.dim)
    return Benchmark(spec.name, shape, forward, arrays, spec.flops(), product)


def all_cases(flags: argparse.Namespace) -> list[Benchmark]:
    """The table of cases."""
    cases = [delta_case(spec, flags.implementation, flags.chunk_size) for spec in DELTA_SPECS]
    cases += [lact_case(flags.implementation)]
    return [case for case in cases if not flags.cases or case.name in flags.cases]


def measure(case: Benchmark, repeats: int) -> dict:
    """Milliseconds and GFLOP/s of one case and of the plain product beside it."""
    rng = np.random.default_rng(0)
    square = jnp.asarray(rng.standard_normal((MATMUL, MATMUL), dtype=np.float32))
    matmul = jax.jit(lambda x: x @ x)
    forward = jax.jit(case.forward)
    weights = jnp.asarray(
        rng.standard_normal(jax.eval_shape(case.forward, case.arrays).shape, dtype=np.float32)
    )
    heads, rows, size = case.product
    left = jnp.asarray(rng.standard_normal((heads, rows, size), dtype=np.float32))
    right = jnp.asarray(rng.standard_normal((heads, size, size), dtype=np.float32)) / size**0.5
    # Several in one program, as calling one takes about as long as a small product.
    product = jax.jit(
        lambda x, y: lax.fori_loop(
            0, PRODUCTS, lambda _, z: jnp.matmul(z, y, precision=lax.Precision.HIGHEST), x
        )
    )
    both = jax.jit(jax.value_and_grad(lambda arrays, w: jnp.vdot(case.forward(arrays), w)))
    times = medians(
        {
            "matmul": lambda: matmul(square),
            "product": lambda: product(left, right),
            "forward": lambda: forward(case.arrays),
            "forward_backward": lambda: both(case.arrays, weights),
        },
        repeats,
    )
    gflops = {
        "matmul": 2 * MATMUL**3 / times["matmul"] / 1e9,
        "product": 2 * heads * rows * size**2 * PRODUCTS / times["product"] / 1e9,
        "forward": case.flops / times["forward"] / 1e9,
        "forward_backward": 3 * case.flops / times["forward_backward"] / 1e9,
    }
    return {
        "case": case.name,
        "shape": case.shape,
        "forward_ms": 1e3 * times["forward"],
        "forward_backward_ms": 1e3 * times["forward_backward"],
        "forward_gflops": gflops["forward"],
        "forward_backward_gflops": gflops["forward_backward"],
        "matmul_gflops": gflops["matmul"],
        "product_gflops": gflops["product"],
        "forward_of_matmul": gflops["forward"] / gflops["matmul"],
        "forward_backward_of_matmul": gflops["forward_backward"] / gflops["matmul"],
    }


def main():
    """Run the cases, one after the other."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--cases", nargs="*", help="names of cases; all by default")
    flags.add_argument("--implementation", help="of the ops; the best one by default")
    flags.add_argument("--chunk-size", type=int, help="of the delta rule; that of its specs")
    flags.add_argument("--repeats", type=int, default=9, help="timed repeats of each")
    flags.add_argument("--json", action="store_true", help="print one JSON line last")
    flags = flags.parse_args()

    results = [measure(case, flags.repeats) for case in all_cases(flags)]
    lines = []
    for r in results:
        lines += [
            f"{r['case']}: {r['shape']}; plain matmul {r['matmul_gflops']:.0f} GFLOP/s, "
            f"own product alone {r['product_gflops']:.0f} GFLOP/s"
        ]
        for part in ("forward", "forward_backward"):
            lines += [
                f"  {part:17s} {r[part + '_ms']:8.1f} ms  {r[part + '_gflops']:6.1f} GFLOP/s  "
                f"{100 * r[part + '_of_matmul']:3.0f} % of the plain rate"
            ]
    result = {"device": jax.devices()[0].device_kind, "results": results}
    report(result, lines, flags.json)


if __name__ == "__main__":
    main()
