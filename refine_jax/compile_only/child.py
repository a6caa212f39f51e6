"""Compile one program of a run for a slice, in a process of its own.

    python -m refine_jax.compile_only.child TASK.json RESULT.json

A fault inside libtpu ends the process, and jax must be told before it starts that there is no TPU.
TASK: {"config", "topology", "program", "plan", "debug"}; with plan, stop before code is made.
RESULT: the figures of `compile_program`, or {"error": "input" or "compile", "message"}.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, Mesh

from refine_jax.base.errors import ConfigError, UserError
from refine_jax.compile_only.estimate import hlo
from refine_jax.compile_only.estimate.chips import Topology, parse_topology
from refine_jax.compile_only.estimate.cost import Estimator
from refine_jax.compile_only.estimate.flops import count_flops
from refine_jax.compile_only.estimate.kernel_time import KernelTimes
from refine_jax.compile_only.estimate.memory import Memory, read_assignment
from refine_jax.compile_only.estimate.network import Network
from refine_jax.compile_only.programs import programs_of_run
from refine_jax.compile_only.programs.run import AbstractRun, Program
from refine_jax.config import Config
from refine_jax.kernels.device import compiled_for
from refine_jax.parallel import make_mesh
from refine_jax.phases.setup import check_mesh

_SHOWN_BUFFERS = 12


def devices_of(topology: Topology) -> list[jax.Device]:
    """Describe the devices to compile for.

    Raises ConfigError: libtpu has no such slice.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **topology.options
        ).devices
    except Exception as error:
        message = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        raise ConfigError(f"libtpu cannot describe {topology.name}: {message}") from error


def ambient(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Trace as on the devices of a mesh: it is ambient, and kernels see the kind of its devices.

    Nothing can be computed inside, only traced.
    """
    if mesh.size > 1:
        return jax.set_mesh(mesh)
    device = mesh.devices.item()
    described = AbstractDevice(device.device_kind, device.num_cores, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=described))


def bytes_of(tree: Any) -> int:
    """Count the bytes of a tree of arrays on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if not hasattr(leaf, "dtype"):
            continue
        shape, sharding = leaf.shape, getattr(leaf, "sharding", None)
        if sharding is not None:
            shape = sharding.shard_shape(shape)
        random_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        total += math.prod(shape) * (8 if random_key else leaf.dtype.itemsize)
    return total


def _unused(traced, args: tuple) -> int:
    """Count the bytes of arguments that a program does not read: jax does not pass them on."""
    jaxpr = getattr(traced.jaxpr, "jaxpr", traced.jaxpr)
    used = {id(var) for equation in jaxpr.eqns for var in equation.invars}
    used |= {id(var) for var in jaxpr.outvars}
    leaves = [leaf for leaf in jax.tree.leaves(args) if hasattr(leaf, "dtype")]
    spare = zip(jaxpr.invars[-len(leaves) :], leaves, strict=True)
    return sum(bytes_of(leaf) for var, leaf in spare if id(var) not in used)


def _resident(program: Program, traced) -> int:
    """Count bytes in memory beside a program's arguments, outputs and temporaries."""
    beside = bytes_of(program.resident)
    arguments = {id(leaf) for leaf in jax.tree.leaves(program.args)}
    shared = [x for x in jax.tree.leaves(program.resident) if id(x) in arguments]
    return beside - bytes_of(shared) + _unused(traced, program.args)


def _plan(lowered, dump: Path) -> str:
    """Compile until all arrays have their places in memory; returns the compiler's error, if any.

    What then goes on in the background, making code, takes most of the time: end the process.
    """
    errors: list[str] = []

    def compile_it() -> None:
        try:
            lowered.compile()
        except Exception as error:
            errors.append(str(error))

    thread = threading.Thread(target=compile_it, daemon=True)
    thread.start()
    size = 0
    while thread.is_alive():
        thread.join(0.5)
        written = [x.stat().st_size for x in dump.rglob("*.after_optimizations_after_buffer_*.txt")]
        if written and max(written) == size:
            break  # it does not grow any more
        size = max(written, default=0)
    return errors[0] if errors else ""


def compile_program(
    run: AbstractRun, name: str, topology: Topology, dump: Path, devices, *, plan: bool = False
) -> dict:
    """Trace, compile and examine one program. plan: without making code (`_plan`).

    Returns JSON values: bytes, operations and seconds of one run on one chip; "memory" with its
    parts; "states", bytes of the decode states of forks among the temporaries; "fits"; "cost" (None
    where the compiler gave up before it had times).
    """
    program = programs_of_run(run)[name]()
    begin = time.perf_counter()
    traced = program.function.trace(*program.args)
    flops, kernels = count_flops(traced.jaxpr)
    lowered = traced.lower()
    lowered_at = time.perf_counter()
    compiled, message = None, ""
    if plan:
        message = _plan(lowered, dump)
    else:
        try:
            compiled = lowered.compile()
        except Exception as error:
            message = str(error)
    if message and ("RESOURCE_EXHAUSTED" not in message or "HBM" not in message.upper()):
        raise RuntimeError(message)
    seconds = time.perf_counter() - lowered_at
    module = hlo.parse(_dumped(dump, compiled))
    assigned = _largest(dump, "*.after_optimizations-buffer-assignment.txt")
    memory, buffers = read_assignment(assigned, module)
    if not assigned:  # the arguments alone were too much
        memory = Memory(bytes_of(program.args), 0, 0, 0)
    if compiled is not None:
        # Take nothing else of the analysis: its temporaries also count values that only pass
        # through VMEM.
        code = compiled.memory_analysis().generated_code_size_in_bytes
        memory = dataclasses.replace(memory, code=code)
    chip = topology.chip
    coordinates = [tuple(device.coords)[: len(topology.sizes)] for device in devices]
    slices = [device.slice_index for device in devices] if topology.slices > 1 else ()
    torus = topology.sizes, topology.wraps, chip.link
    network = Network(coordinates, *torus, slices, chip.dcn)
    times = KernelTimes(kernels, topology.generation, chip)
    cost = Estimator(module, chip, network, times).run()
    resident = _resident(program, traced)
    peak = memory.peak + resident
    return {
        "name": program.name,
        "meaning": program.meaning,
        "runs": program.runs,
        "compared": program.compared,
        "fits": not message and peak <= chip.hbm,
        "planned": plan,
        "memory": dataclasses.asdict(memory) | {"resident": resident, "peak": peak},
        "states": bytes_of(program.states),
        "model_flops": program.model_flops / len(devices),
        "flops": flops / len(devices),
        "bytes": cost.bytes,
        "collectives": {
            kind: {"count": cost.counts[kind], "bytes": cost.sent[kind]} for kind in cost.counts
        },
        "seconds": None if message else cost.seconds,
        "parts": {
            "kernels": cost.kernels,
            "xla": cost.xla,
            "waits": cost.waits,
            "links": cost.links,
            "dcn": cost.dcn,
            "rare": cost.rare,
        },
        "unknown_loops": cost.unknown,
        "buffers": [dataclasses.asdict(buffer) for buffer in buffers[:_SHOWN_BUFFERS]],
        "trace_seconds": lowered_at - begin,
        "compile_seconds": seconds,
        "compiler_message": _first_line(message),
    }


def dump_folder() -> Path:
    """Name the folder of XLA's dumps, as the process that started this one gave it."""
    return Path(re.search(r"--xla_dump_to=(\S+)", os.environ["XLA_FLAGS"])[1])


def _dumped(dump: Path, compiled) -> str:
    """Read the optimized HLO: what the compiler dumped after or before it made code."""
    for stage in ("after_codegen", "oom_intermediate_module", "after_optimizations"):
        if text := _largest(dump, f"*.{stage}.txt"):
            return text
    return "" if compiled is None else compiled.as_text()


def _largest(dump: Path, pattern: str) -> str:
    """Read the largest file of that name: the program's, not that of some constant; or ""."""
    files = list(dump.rglob(pattern))
    if not files:
        return ""
    return max(files, key=lambda path: path.stat().st_size).read_text(errors="replace")


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0] if lines else ""


def summary(run: AbstractRun) -> dict:
    """Describe what all programs share: the model; parameters and optimizer in bytes a chip."""
    params = run.params
    state = run.state if run.config.phase in ("midtrain", "posttrain", "testtime") else None
    count = sum(x.size for x in jax.tree.leaves(params))
    return {
        "model_type": run.model.config.model_type,
        "model": run.model.config.to_hf(),
        "parameter_count": int(count),
        "params": bytes_of(params),
        "optimizer": bytes_of(state.opt_state) if state is not None else 0,
    }


def work(task: dict) -> dict:
    """Compute the figures of a task."""
    config = Config.from_dict(task["config"])
    topology = parse_topology(task["topology"], task.get("slices", 1))
    devices = devices_of(topology)
    with compiled_for("tpu"), contextlib.ExitStack() as stack:
        run = AbstractRun(config, devices[0])
        spread = make_mesh(config.mesh, devices)
        stack.enter_context(ambient(spread))
        mesh = jax.sharding.get_abstract_mesh()
        sizes = dict(mesh.shape) if mesh.size > 1 else {}
        if sizes and config.phase in ("midtrain", "posttrain"):
            check_mesh(config, run.model)
        facts = summary(run) | {"mesh": sizes, "programs": list(programs_of_run(run))}
        if task["program"] is None:
            return facts
        plan = task.get("plan", False)
        # A program numbers its devices in the order of the mesh.
        order = list(spread.devices.flat)
        figures = compile_program(run, task["program"], topology, dump_folder(), order, plan=plan)
        return figures | {"facts": facts}


def main(task_file: str, result_file: str, work: Callable[[dict], dict] = work) -> None:
    """Do the task, by default that of `work`, and write its result."""
    task = json.loads(Path(task_file).read_text(encoding="utf-8"))
    try:
        result = work(task)
    except UserError as error:
        result = {"error": "input", "message": str(error)}
    except Exception as error:
        result = {"error": "compile", "message": f"{type(error).__name__}: {error}"}
        if task.get("debug"):
            raise
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")
    if task.get("plan"):
        os._exit(0)  # the compiler may still be at work


if __name__ == "__main__":
    main(*sys.argv[1:])
