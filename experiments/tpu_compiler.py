"""The TPU compiler where there is no TPU, and a tool that reads its schedules."""

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

import jax

from refine_jax.base.files import path_flag
from refine_jax.compile_only.command import in_child
from refine_jax.compile_only.estimate.chips import Chip, parse_topology
from refine_jax.compile_only.estimate.cost import NO_ESTIMATE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOOL = ROOT.parent / "shared" / "tools" / "tpu_static.py"


# One device of each generation, by the topology that has no other.
_SINGLE = ("v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1")
CHIPS = {name: parse_topology(name).chip for name in _SINGLE}


@dataclasses.dataclass(frozen=True)
class Compiler:
    """How to compile: the Python that has jax and the project, libtpu if not its own, the tool."""

    python: str
    libtpu: str | None
    tool: Path | None
    timeout: float

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the processes that compile."""
        variables = {k: v for k, v in os.environ.items() if k != "TPU_LIBRARY_PATH"}
        return variables | ({"TPU_LIBRARY_PATH": self.libtpu} if self.libtpu else {})

    def compile(self, name: str, implementation: str, topology: str) -> dict:
        """{"vmem_bytes": ...} or {"error": ...}."""
        figures = in_child(
            {"case": name, "implementation": implementation, "topology": topology},
            (self.python, str(HERE / "tpu_compile.py")),
            environment=self.environment,
            timeout=self.timeout,
        )
        return {"error": figures["message"]} if "error" in figures else figures

    def estimate(self, case: str, settings: dict[str, str], topology: str) -> dict:
        """{"ms": ..., "kernels_ms": ..., "vmem_bytes": ..., "notes": [...]} or {"error": ...}.

        case: "module:function" in this folder; settings: the arguments of the function.
        """
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "report.json"
            command = [self.python, str(self.tool), case, "--topology", topology]
            for name, value in settings.items():
                command += ["--set", f"{name}={value}"]
            command += ["--timeout", str(self.timeout), "--json", str(out)]
            options = {"cwd": HERE, "env": self.environment, "capture_output": True, "text": True}
            try:
                done = subprocess.run(command, timeout=self.timeout, **options)
            except subprocess.TimeoutExpired:
                return {"error": f"no result after {self.timeout:.0f} s"}
            if not out.exists():
                return {"error": f"exit code {done.returncode}: {done.stderr.strip()[-1500:]}"}
            return read_estimate(json.loads(out.read_text(encoding="utf-8")), CHIPS[topology])


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
    if around > NO_ESTIMATE:  # as for some programs on a 7x
        notes += ["XLA gives no estimate of its own part"]
        return result | {"ms": None}
    return result | {"ms": 1e3 * (kernels + around) / chip.clock}


def last_line(error: str) -> str:
    """The line of a traceback that names the exception, or as much of the text as fits."""
    lines = [x for x in error.splitlines() if re.match(r"[\w.]*(Error|Exception)\b.*: ", x)]
    return " ".join((lines[-1] if lines else error).split())[:300]


def add_compiler_flags(flags: argparse.ArgumentParser) -> None:
    """The flags that `find_compiler` reads."""
    add = flags.add_argument
    add("--tool", type=path_flag, default=TOOL, metavar="PATH", help="default: %(default)s")
    add(
        "--make_env",
        type=path_flag,
        metavar="FOLDER",
        help="make an environment with libtpu and use it",
    )
    add("--libtpu", metavar="PATH", help="a libtpu.so; default: TPU_LIBRARY_PATH")
    add("--timeout", type=float, default=1200, metavar="S", help="for one program")


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
    tool = flags.tool.resolve()
    if not tool.is_file():
        tool = None
    libtpu = flags.libtpu or os.environ.get("TPU_LIBRARY_PATH")
    python = sys.executable
    if flags.make_env is not None:
        python, libtpu = make_environment(flags.make_env.resolve()), None
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
