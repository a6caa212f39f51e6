"""The TPU kernels compiled ahead of time, with static estimates of their times. Needs no TPU.

    python experiments/tpu_kernels.py --topology v6e:1x1 --json --make_env ~/tpu-env
    python experiments/tpu_kernels.py --topology all --compile_only --libtpu path/to/libtpu.so

Every case of `tpu_cases.py` is compiled by libtpu, the TPU compiler, for the chip that --topology
describes. The tool that --tool names replays the schedules of the Pallas kernels and adds XLA's
estimate of everything around them; without it, or with --compile_only, the cases are compiled all
the same, and faults and VMEM are reported. Static estimates, no measurements: compare variants
rather than absolute times, most of all where XLA's own estimates come in.

Columns and keys of a case:

    ms             estimate of the whole program with the Pallas kernels
    kernels_ms     the part of it that is spent in them
    xla_ms         the same with implementation="xla"; equal where that is what runs on TPUs
    mxu_floor_ms   operations of the products that the op needs / bfloat16 peak
    hbm_floor_ms   bytes that must be read and written / bandwidth of the HBM
    mxu_fraction   mxu_floor_ms / ms
    vmem_bytes     scoped VMEM of the largest Pallas kernel

libtpu is taken from --make_env (an environment made, or brought up to date, in that folder), from
--libtpu, from TPU_LIBRARY_PATH or from the environment this runs in. A case that fails has an
"error" instead, the others still run, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import sys

# As early as this: where libtpu is installed, jax looks for a TPU when it starts.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from harness import report
from tpu_cases import CASES, Case
from tpu_compiler import CHIPS, Compiler, add_compiler_flags, find_compiler, last_line

from refine_jax.compile_only.estimate.chips import Chip


def floors(case: Case, chip: Chip) -> tuple[float, float]:
    """Milliseconds that the matrix units and the HBM need at least."""
    return 1e3 * case.flops / chip.flops, 1e3 * case.least_bytes() / chip.bandwidth


def estimate(name: str, implementation: str, compiler: Compiler, topology: str) -> dict:
    """What `Compiler.estimate` returns; without a tool what compiling alone tells."""
    if compiler.tool is None:
        unknown = {"ms": None, "kernels_ms": None, "notes": []}
        return unknown | compiler.compile(name, implementation, topology)
    settings = {"name": name, "implementation": implementation}
    return compiler.estimate("tpu_cases:case", settings, topology)


def figures(case: Case, compiler: Compiler, topology: str) -> dict:
    """The entry of a case: its figures, or {"error": ...}."""
    xla = estimate(case.name, "xla", compiler, topology)
    own = xla if case.kernel is None else estimate(case.name, case.kernel, compiler, topology)
    mxu, hbm = floors(case, CHIPS[topology])
    entry = {
        "ms": own.get("ms"),
        "kernels_ms": own.get("kernels_ms"),
        "xla_ms": xla.get("ms"),
        "mxu_floor_ms": mxu,
        "hbm_floor_ms": hbm,
        "mxu_fraction": mxu / own["ms"] if own.get("ms") else None,
        "vmem_bytes": own.get("vmem_bytes"),
    }
    if notes := sorted({*own.get("notes", ()), *xla.get("notes", ())}):
        entry["notes"] = notes
    if errors := {result["error"]: None for result in (own, xla) if "error" in result}:
        entry["error"] = "\n".join(errors)
    return entry


def line(name: str, entry: dict) -> str:
    """An entry for people."""

    def cell(value, form, scale=1):
        return f"{'-' if value is None else format(value / scale, form):>9s}"

    keys = ("ms", "kernels_ms", "xla_ms", "mxu_floor_ms", "hbm_floor_ms")
    times = (entry[key] for key in keys)
    cells = [cell(x, ".3f") for x in times]
    cells += [cell(entry["mxu_fraction"], ".1%"), cell(entry["vmem_bytes"], ".1f", 2**20)]
    remarks = [f"fault: {last_line(entry['error'])}"] if "error" in entry else []
    return f"{name:24s} {' '.join(cells)}  {'; '.join(remarks + entry.get('notes', []))}".rstrip()


_COLUMNS = ("ms", "kernels", "xla ms", "mxu ms", "hbm ms", "mxu", "VMEM MiB")
HEADER = f"{'case':24s} {' '.join(f'{name:>9s}' for name in _COLUMNS)}"


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = flags.add_argument
    add("--topology", choices=[*CHIPS, "all"], default="v6e:1x1", help="the chip, or all")
    add("--cases", nargs="+", choices=sorted(CASES), metavar="NAME", help="all by default")
    add("--compile_only", action="store_true", help="say of each case whether it compiles")
    add_compiler_flags(flags)
    add("--json", action="store_true", help="print one JSON line last")
    return flags.parse_args(words)


def run(flags: argparse.Namespace, compiler: Compiler) -> tuple[dict, list[str]]:
    """All that was asked for: {topology: {case: entry}}, and the entries that failed."""
    topologies = list(CHIPS) if flags.topology == "all" else [flags.topology]
    names = flags.cases or list(CASES)
    results, failed = {}, []
    for topology in topologies:
        print(f"{topology}, jax {jax.__version__}", flush=True)
        if not flags.compile_only:
            print(f"static estimates\n{HEADER}", flush=True)
        results[topology] = {}
        for name in names:
            if flags.compile_only:
                entry = compiler.compile(name, CASES[name].kernel or "xla", topology)
                fault = f"fault: {last_line(entry['error'])}" if "error" in entry else None
                text = f"{name:24s} {fault or 'compiled'}"
            else:
                entry = figures(CASES[name], compiler, topology)
                text = line(name, entry)
            print(text, flush=True)
            results[topology][name] = entry
            failed += [f"{name} on {topology}"] if "error" in entry else []
    return results, failed


def main() -> int:
    """Compile the cases, print the table and the JSON line; the exit code."""
    flags = parse()
    try:
        compiler = find_compiler(flags)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if compiler.tool is None and not flags.compile_only:
        print(f"No tool at {flags.tool}: compiling only. --tool names another.", file=sys.stderr)
    results, failed = run(flags, compiler)
    if flags.topology == "all":
        result = {"topologies": results}
    else:
        result = {"topology": flags.topology, "cases": results[flags.topology]}
    report(result, [f"failed: {', '.join(failed) or 'none'}"], flags.json)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
