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
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

# As early as this: where libtpu is installed, jax looks for a TPU when it starts.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from harness import report
from tpu_cases import CASES, Case

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOOL = ROOT.parent / "shared" / "tools" / "tpu_static.py"


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device of a TPU generation can do, by the published figures.

    flops: bfloat16 operations a second. bandwidth: of the HBM, bytes a second. clock: Hz.
    """

    flops: float
    bandwidth: float
    clock: float


# A v4 or v5p chip is one device of two cores, a 7x chip is two devices.
CHIPS = {
    "v4:1x1x1": Chip(275e12, 1228e9, 1.05e9),
    "v5e:1x1": Chip(197e12, 819e9, 1.5e9),
    "v5p:1x1x1": Chip(459e12, 2765e9, 1.75e9),
    "v6e:1x1": Chip(918e12, 1640e9, 1.75e9),
    "tpu7x:1x1x1": Chip(1153e12, 3690e9, 2.2e9),
}


@dataclasses.dataclass(frozen=True)
class Compiler:
    """How to compile: the Python that has jax and the project, libtpu if not its own, the tool."""

    python: str
    libtpu: str | None
    tool: Path | None
    timeout: float

    def _run(self, command: list[str], out: Path) -> dict:
        """Run a command that writes JSON to `out`; {"error": why} if it does not."""
        environment = {k: v for k, v in os.environ.items() if k != "TPU_LIBRARY_PATH"}
        if self.libtpu is not None:
            environment["TPU_LIBRARY_PATH"] = self.libtpu
        try:
            done = subprocess.run(
                [self.python, *command],
                cwd=HERE,
                env=environment,
                capture_output=True,
                text=True,
                timeout=self.timeout,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no result after {self.timeout:.0f} s"}
        if not out.exists():
            return {"error": f"exit code {done.returncode}: {done.stderr.strip()[-1500:]}"}
        return json.loads(out.read_text(encoding="utf-8"))

    def compile(self, name: str, implementation: str, topology: str) -> dict:
        """{"vmem_bytes": ...} or {"error": ...}."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "report.json"
            script = str(HERE / "tpu_compile.py")
            return self._run([script, name, implementation, topology, str(out)], out)

    def estimate(self, name: str, implementation: str, topology: str) -> dict:
        """{"ms": ..., "kernels_ms": ..., "vmem_bytes": ..., "notes": [...]} or {"error": ...}."""
        if self.tool is None:
            return {"ms": None, "kernels_ms": None, "notes": []} | self.compile(
                name, implementation, topology
            )
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "report.json"
            command = [str(self.tool), "tpu_cases:case", "--topology", topology]
            command += ["--set", f"name={name}", "--set", f"implementation={implementation}"]
            command += ["--timeout", str(self.timeout), "--json", str(out)]
            return read_estimate(self._run(command, out), CHIPS[topology])


# Libtpu says the largest number there is where it has no estimate, as for some programs on a 7x.
_NO_ESTIMATE = 1e15


def read_estimate(tool_report: dict, chip: Chip) -> dict:
    """What `Compiler.estimate` returns, of the tool's JSON."""
    if "error" in tool_report:
        message = tool_report.get("message", "").strip()
        return {"error": f"{tool_report['error']}: {message}" if message else tool_report["error"]}
    calls, notes = tool_report["calls"], []
    if any("cycles" not in call for call in calls):
        notes += ["a kernel without a schedule is left out"]
    if not all(call.get("complete", True) for call in calls):
        notes += ["a kernel was replayed in part"]
    if tool_report["unknown_trips"]:
        notes += [f"{tool_report['unknown_trips']} loops of unknown length counted once"]
    kernels, around = sum(x["runs"] * x.get("cycles", 0) for x in calls), tool_report["xla_cycles"]
    vmem = max((call["vmem"] for call in calls), default=0)
    result = {"kernels_ms": 1e3 * kernels / chip.clock, "vmem_bytes": vmem, "notes": notes}
    if around > _NO_ESTIMATE:
        notes += ["XLA gives no estimate of its own part"]
        return result | {"ms": None}
    return result | {"ms": 1e3 * (kernels + around) / chip.clock}


def floors(case: Case, chip: Chip) -> tuple[float, float]:
    """Milliseconds that the matrix units and the HBM need at least."""
    return 1e3 * case.flops / chip.flops, 1e3 * case.least_bytes() / chip.bandwidth


def figures(case: Case, compiler: Compiler, topology: str) -> dict:
    """The entry of a case: its figures, or {"error": ...}."""
    xla = compiler.estimate(case.name, "xla", topology)
    own = xla if case.kernel is None else compiler.estimate(case.name, case.kernel, topology)
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
    if errors := {found["error"]: None for found in (own, xla) if "error" in found}:
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


def last_line(error: str) -> str:
    """The line of a traceback that names the exception, or as much of the text as fits."""
    lines = [x for x in error.splitlines() if re.match(r"[\w.]*(Error|Exception)\b.*: ", x)]
    return " ".join((lines[-1] if lines else error).split())[:300]


_COLUMNS = ("ms", "kernels", "xla ms", "mxu ms", "hbm ms", "mxu", "VMEM MiB")
HEADER = f"{'case':24s} {' '.join(f'{name:>9s}' for name in _COLUMNS)}"


def make_environment(folder: Path) -> str:
    """An environment with this jax, its libtpu and this project in `folder`; its Python."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    wanted = [f"jax[tpu]=={jax.__version__}", "-e", str(ROOT)]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return str(python)


def find_compiler(flags: argparse.Namespace) -> Compiler:
    """The compiler that the flags ask for.

    Raises ValueError where there is no libtpu.
    """
    tool = None if flags.compile_only else flags.tool.expanduser().resolve()
    if tool is not None and not tool.is_file():
        print(f"No tool at {tool}: compiling only. --tool names another.", file=sys.stderr)
        tool = None
    libtpu = flags.libtpu or os.environ.get("TPU_LIBRARY_PATH")
    python = sys.executable
    if flags.make_env is not None:
        python, libtpu = make_environment(flags.make_env.expanduser().resolve()), None
    elif libtpu is not None:
        libtpu = str(Path(libtpu).expanduser().resolve())
        if not Path(libtpu).is_file():
            raise ValueError(f"--libtpu must name a libtpu.so. Got: {libtpu}.")
    elif importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "There is no libtpu here. Give --make_env FOLDER to have an environment with it made, "
            "or --libtpu PATH/libtpu.so."
        )
    return Compiler(python, libtpu, tool, flags.timeout)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = flags.add_argument
    add("--topology", choices=[*CHIPS, "all"], default="v6e:1x1", help="the chip, or all")
    add("--cases", nargs="+", choices=sorted(CASES), metavar="NAME", help="all by default")
    add("--compile_only", action="store_true", help="say of each case whether it compiles")
    add("--tool", type=Path, default=TOOL, metavar="PATH", help="default: %(default)s")
    add(
        "--make_env", type=Path, metavar="FOLDER", help="make an environment with libtpu and use it"
    )
    add("--libtpu", metavar="PATH", help="a libtpu.so; default: TPU_LIBRARY_PATH")
    add("--timeout", type=float, default=1200, metavar="S", help="for one program")
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
    results, failed = run(flags, compiler)
    if flags.topology == "all":
        result = {"topologies": results}
    else:
        result = {"topology": flags.topology, "cases": results[flags.topology]}
    report(result, [f"failed: {', '.join(failed) or 'none'}"], flags.json)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
