"""Block sizes of the TPU kernels, searched by static schedule. Needs no TPU.

    python experiments/tune_tpu.py --topology all --make_env ~/tpu-env

Compiles every candidate of every op and shape for the chips of --topology (as tpu_kernels.py does;
the flags are the same) and writes the fastest into kernels/tpu_table.py, which the kernels read.
A candidate counts with the time inside its kernels, forward and backward (of LaCT, whose passes
have blocks of their own, those of the other pass do not change). Candidates that do not compile,
for want of vector memory most often, are left out; --topology, --ops and --sizes search a part, and
the rest of the table stays.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable

# As early as this: where libtpu is installed, jax looks for a TPU when it starts.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from tpu_compiler import CHIPS, ROOT, Compiler, add_compiler_flags, find_compiler, last_line

from refine_jax.kernels import tpu, tpu_table
from refine_jax.kernels.delta_rule import delta_rule
from refine_jax.kernels.lact import Weights, lact

TABLE = ROOT / "kernels" / "tpu_table.py"
Sizes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Search:
    """What to try for one op.

    sizes: shapes, as the op looks them up. candidates: of a shape, the blocks to try, the preferred
    first. program: of a shape, `(fn, args)` whose kernels run with the blocks of the table.
    """

    sizes: tuple[Sizes, ...]
    candidates: Callable[[Sizes], list[tuple]]
    program: Callable[[Sizes], tuple[Callable, tuple]]


def _forward_and_backward(function: Callable, args: tuple) -> tuple[Callable, tuple]:
    def both(cotangent, *args):
        out, pullback = jax.vjp(function, *args)
        return out, pullback(cotangent)

    return jax.jit(both), (jax.eval_shape(function, *args), *args)


def _delta_program(sizes: Sizes) -> tuple[Callable, tuple]:
    """2048 tokens of heads that have 2048 features in all, as in DeltaNet-1.3B.

    Without gates and with them: one entry of the table serves both, and both must fit.
    """
    key_dim, value_dim = sizes
    heads = 2048 // value_dim

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, 2048, heads, *shape), dtype)

    def run(q, k, v, beta, log_decay):
        options = {"normalize": True, "implementation": "pallas_tpu"}
        gated = delta_rule(q, k, v, beta, log_decay, **options)[0]
        return delta_rule(q, k, v, beta, **options)[0], gated

    rate = array(dtype=jnp.float32)
    args = array(key_dim), array(key_dim), array(value_dim), rate, rate
    return _forward_and_backward(run, args)


def _lact_program(sizes: Sizes, backward: bool) -> tuple[Callable, tuple]:
    """Three chunks of 2048 tokens, 4 heads, with momentum, as in LaCT-760M and LaCT-3B."""
    dim, hidden = sizes
    slots = (1, 3, 4, 2048)

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def run(*args):
        return lact(*args, implementation="pallas_tpu")[0]

    token = array(*slots, dim, dtype=jnp.bfloat16)
    weights = Weights(array(4, hidden, dim), array(4, dim, hidden), array(4, hidden, dim))
    args = token, token, token, array(*slots, 3, 1), array(*slots), weights
    return _forward_and_backward(run, args) if backward else (jax.jit(run), args)


SEARCHES = {
    # Heads a program, tokens a chunk, chunks a grid step.
    "delta_rule": Search(
        sizes=((64, 64), (128, 128), (256, 256)),
        candidates=lambda sizes: [
            (heads, chunk, 1)
            for chunk in (128, 64)
            for heads in (8, 4, 16, 2)
            if heads * sizes[1] <= 2048
        ],
        program=_delta_program,
    ),
    # Tokens of a grid step, tokens and hidden features of the parts it is computed in.
    "lact_forward": Search(
        sizes=((384, 384), (768, 768)),
        candidates=lambda sizes: [
            (block, sub, tile)
            for block, sub in ((1024, 256), (512, 256), (512, 512))
            for tile in ((384,) if sizes[1] == 384 else (384, 256))
        ],
        program=functools.partial(_lact_program, backward=False),
    ),
    "lact_backward": Search(
        sizes=((384, 384), (768, 768)),
        candidates=lambda sizes: [
            (block, block, tile)
            for block in (512, 256)
            for tile in ((384,) if sizes[1] == 384 else (384, 256))
        ],
        program=functools.partial(_lact_program, backward=True),
    ),
}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def candidate(op: str, sizes: str, blocks: str) -> tuple[Callable, tuple]:
    """`(fn, args)` of one candidate, the form that ahead-of-time tools take; "128,128", "8,128,1".

    The table of this process holds nothing else from now on.
    """
    tpu_table.BLOCKS[op] = {tpu.generation(): {_numbers(sizes): _numbers(blocks)}}
    return SEARCHES[op].program(_numbers(sizes))


def search(op: str, shapes: list[Sizes], topology: str, compiler: Compiler) -> dict[Sizes, tuple]:
    """The fastest blocks of each shape; shapes without a candidate that compiles are left out."""
    best = {}
    for sizes in shapes:
        times = {}
        for blocks in SEARCHES[op].candidates(sizes):
            words = {"op": op, "sizes": sizes, "blocks": blocks}
            words = {
                name: x if isinstance(x, str) else ",".join(map(str, x))
                for name, x in words.items()
            }
            estimate = compiler.estimate("tune_tpu:candidate", words, topology)
            if "error" in estimate:
                text = f"fault: {last_line(estimate['error'])}"
            else:
                times[blocks] = estimate["kernels_ms"]
                text = f"{times[blocks]:9.3f} ms  {estimate['vmem_bytes'] / 2**20:6.1f} MiB"
            print(f"{op:16s} {topology:12s} {sizes!s:14s} {blocks!s:16s} {text}", flush=True)
        if times:
            best[sizes] = min(times, key=times.get)
    return best


def write_table(blocks: dict) -> None:
    """Write the table as the module that the kernels read."""
    lines = [f'"""{tpu_table.__doc__}"""', "", "BLOCKS = {"]
    for op, generations in sorted(blocks.items()):
        lines += [f'    "{op}": {{']
        for generation, table in sorted(generations.items()):
            lines += [f'        "{generation}": {{']
            lines += [f"            {sizes}: {best}," for sizes, best in sorted(table.items())]
            lines += ["        },"]
        lines += ["    },"]
    TABLE.write_text("\n".join([*lines, "}", ""]), encoding="utf-8")


def main() -> int:
    """Search, write the table; the exit code."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--topology", choices=[*CHIPS, "all"], default="all")
    flags.add_argument("--ops", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    flags.add_argument("--sizes", type=_numbers, metavar="N,N", help="one shape; default: all")
    add_compiler_flags(flags)
    flags = flags.parse_args()
    try:
        compiler = find_compiler(flags)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if compiler.tool is None:
        print(f"The search needs the tool. Nothing at {flags.tool}.", file=sys.stderr)
        return 2
    for op in flags.ops:
        for topology in CHIPS if flags.topology == "all" else [flags.topology]:
            shapes = [x for x in SEARCHES[op].sizes if flags.sizes in (None, x)]
            fastest = search(op, shapes, topology, compiler)
            generation = topology.split(":")[0].removeprefix("tpu")
            tpu_table.BLOCKS.setdefault(op, {}).setdefault(generation, {}).update(fastest)
            write_table(tpu_table.BLOCKS)  # at once: an interrupted search keeps what it found
    return 0


if __name__ == "__main__":
    sys.exit(main())
