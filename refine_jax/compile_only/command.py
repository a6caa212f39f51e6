"""`--compile_only`: every program of a run compiled for a slice, and the verdict.

Each program is compiled in a process of its own (`child.py`), one after the other: libtpu, the TPU
compiler, runs on any Linux machine.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from refine_jax.base.errors import ConfigError
from refine_jax.base.files import check_output, write_text
from refine_jax.compile_only.advice import advise, advise_beside
from refine_jax.compile_only.estimate.chips import Topology, parse_topology
from refine_jax.compile_only.report import Report, line, text
from refine_jax.config import Config

NOT_FITTING = 2
FAILED = 3

# Where there is no TPU, libtpu and jax must be told to use no lock file, no cloud metadata server
# and no logs; and no cache, as a program that comes from a cache leaves no dumps.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}


def run(
    config: Config,
    topology: str | None,
    out: Path | None = None,
    *,
    slices: int = 1,
    plan: bool = False,
    debug: bool = False,
) -> int:
    """Compile the programs of a run and print what they need; returns the exit code.

    config: the run. topology: the slice, as v5p:4x4x4. out: a file for all figures as JSON. slices:
    how many such slices. plan: stop before code is made, which takes most of the time
    (`estimate/cost.py` says how times are estimated then). debug: let the processes print where an
    error came from.

    Returns:
      0: all fits. `NOT_FITTING`: a program of the run does not. `FAILED`: one does not compile.

    Raises ConfigError: no such slice, no libtpu, or a mesh that the run does not fit.
    """
    slice_ = parse_topology(topology, slices)
    if config.phase == "compare":  # its programs are those of training, and of what is trained
        config = dataclasses.replace(config, phase="midtrain")
    if out is not None:
        check_output(out, "--json")
    check_libtpu()
    say = functools.partial(print, flush=True)
    report = compile_programs(config, slice_, plan=plan, debug=debug, say=say)
    advice = advise(report)
    say(text(report, advice, advise_beside(report)))
    if out is not None:
        write_text(out, json.dumps(report.to_json(advice), indent=1) + "\n")
    if any("error" in program for program in report.run_programs):
        return FAILED
    return 0 if report.fits else NOT_FITTING


def compile_programs(
    config: Config,
    topology: Topology,
    names: Iterable[str] | None = None,
    *,
    plan: bool = False,
    debug: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Compile programs of a run, by default all, one after the other; `say` prints their lines.

    Raises ConfigError: a mesh that the run does not fit.
    """
    task = {"config": config.to_dict(), "topology": topology.name, "slices": topology.slices}
    task |= {"plan": plan, "debug": debug}
    facts = in_child(task | {"program": None})
    if "error" in facts:
        raise ConfigError(facts["message"])
    report = Report(config, topology, facts, [])
    say(report.heading())
    for name in facts["programs"] if names is None else names:
        program = in_child(task | {"program": name}) | {"name": name}
        program.pop("facts", None)
        report.programs.append(program)
        say(line(program, topology))
    return report


def check_libtpu() -> None:
    """Raise ConfigError where there is no TPU compiler."""
    named = os.environ.get("TPU_LIBRARY_PATH")
    if named is not None and not Path(named).expanduser().is_file():
        raise ConfigError(f"TPU_LIBRARY_PATH must name a libtpu.so. Got: {named}.")
    if named is None and importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "--compile_only needs libtpu, the compiler for TPUs, which runs on any Linux machine "
            "and is not installed here. Install it with pip install -e '.[tpu]' (or pip install "
            "libtpu), or name a libtpu.so in the environment variable TPU_LIBRARY_PATH."
        )


def in_child(
    task: dict,
    program: tuple[str, ...] = (sys.executable, "-m", "refine_jax.compile_only.child"),
    *,
    environment: Mapping[str, str] = os.environ,
    timeout: float | None = None,
) -> dict:
    """Do a task in a process of its own; returns its JSON, or {"error", "message"}.

    program: command line of the process, to which files for task and result are added (`child.py`).
    environment: its variables, to which those are added that libtpu needs. timeout: in seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("task.json", "result.json")]
        files[0].write_text(json.dumps(task), encoding="utf-8")
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}/hlo".strip()
        try:
            done = subprocess.run(
                [*program, *map(str, files)],
                env={**environment, **_ENVIRONMENT, "XLA_FLAGS": flags},
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return {"error": "compile", "message": f"no result after {timeout:.0f} s"}
        if files[1].exists():
            return json.loads(files[1].read_text(encoding="utf-8"))
    ended = f"exit code {done.returncode}"
    if done.returncode < 0:
        ended = f"ended by {signal.Signals(-done.returncode).name}"
    return {"error": "compile", "message": f"{ended}: {done.stderr.strip()[-2000:]}"}
