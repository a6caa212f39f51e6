"""Run a configuration: train a model, evaluate it, or say what the run would need of TPUs.

Every setting is a flag, --config.SECTION.FIELD=VALUE; docs/settings.md lists them. Fields of a
model that starts from random weights are --config.model.fresh.FIELD=VALUE. The same command
continues a run. The last line on standard output is a JSON object with the figures of the run. Exit
code 0: the run is complete, or SIGTERM or SIGINT stopped it after saving; 1: bad input or a failed
run, with one message on standard error. With --compile_only 0: all programs fit; 2: one does not;
3: one does not compile.

Examples:

    python -m refine_jax.main --config=configs/demo.py --workdir=runs/demo
    python -m refine_jax.main --config=configs/demo.py:short --workdir=runs/short \\
        --config.train.steps=20 --config.refine.reward=binary
    python -m refine_jax.main --config=configs/midtrain_lact_760m.py --compile_only \\
        --topology=v5p:4x4x4 --config.mesh.sequence=2
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from refine_jax.base.errors import USER_ERRORS, ConfigError, RunError, allow_interrupts, complain
from refine_jax.base.files import check_writable, given_path, path_of
from refine_jax.commands import Command, Options, say

if TYPE_CHECKING:
    from refine_jax.config import Config

# What takes long to import, jax above all, is imported where it is used: help and messages about
# flags come at once, and Ctrl-C is understood from the start.


def execute(
    values: Mapping | None,
    workdir: str | os.PathLike | None,
    *,
    debug: bool = False,
    join: Callable[[], None] = lambda: None,
    allow_change: Sequence[str] = (),
) -> int:
    """Run a configuration and print its figures; returns the exit code.

    values: a ConfigDict or nested dict of fields. workdir: folder of the run. debug: let errors of
    the user's input through, with their traceback. join: called before anything computes; joins the
    other processes. allow_change: settings that a run which is continued may change.
    """
    from refine_jax import distributed
    from refine_jax.config import Config

    try:
        if values is None or not workdir:
            raise ConfigError("Both --config=FILE and --workdir=DIR are needed.")
        workdir = given_path(workdir, "--workdir", write=True)
        config = Config.from_dict(values)
        join()
        distributed.check_same("configuration", json.dumps(config.to_dict(), sort_keys=True))
        if distributed.is_writer():
            check_writable(workdir, "--workdir")
        distributed.check_shared(workdir)
        keep_programs(workdir)
        phase = importlib.import_module(f"refine_jax.phases.{config.phase}")
        results = phase.run(config, workdir, **_permission(config, allow_change))
        distributed.say(json.dumps(results))
    except (*USER_ERRORS, RuntimeError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        if not isinstance(error, USER_ERRORS):
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            error = _out_of_memory(error, config)
        distributed.report_failure(error)
        if debug:
            raise
        return complain(error)
    return 0


def _out_of_memory(error: RuntimeError, config: Config) -> RunError:
    """What to do where a device has no room for a program's arrays."""
    said = str(error).strip().splitlines()[0]
    smaller = {
        "midtrain": "config.train.micro_batch_size",
        "posttrain": "config.train.micro_batch_size",
        "testtime": "config.testtime.micro_batch_size or config.testtime.copies",
        "evaluate": "config.evaluate.batch_size or config.generation.prefill_tokens",
        "compare": "config.train.micro_batch_size or config.evaluate.batch_size",
    }[config.phase]
    return RunError(
        f"The memory of a device is not enough ({said}). Lower {smaller}, or use more devices "
        "(config.mesh); --compile_only says what a run needs of TPUs, and what would help."
    )


def _permission(config: Config, allow_change: Sequence[str]) -> dict[str, Sequence[str]]:
    """What training phases are told of settings that may change; others cannot continue with any.

    Raises ConfigError: the phase keeps no state to go on with under other settings.
    """
    if not allow_change:
        return {}
    if config.phase not in ("midtrain", "posttrain"):
        raise ConfigError(
            "--allow_change is for runs that train: answers of one evaluation come from the same "
            f"settings. Got: config.phase={config.phase!r}. Choose another --workdir."
        )
    return {"allow_change": allow_change}


def keep_programs(workdir: str | os.PathLike) -> None:
    """Keep what is compiled for accelerators in WORKDIR/compiled, so that a run restarts quickly.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false none.
    Programs for a CPU are kept on demand only: they fit one model of processor.
    """
    import jax

    from refine_jax.kernels.device import backend

    if jax.config.jax_compilation_cache_dir is None and backend() != "cpu":
        folder = path_of(workdir).expanduser().absolute() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def compile_for(
    values: Mapping | None,
    topology: str | None,
    workdir: str | None,
    file: str | None,
    *,
    slices: int = 1,
    plan: bool = False,
    debug: bool = False,
) -> int:
    """Compile a configuration for a TPU slice and print what it needs; returns the exit code.

    values: a ConfigDict or nested dict of fields. topology: the slice, as v5p:4x4x4. workdir: an
    optional folder for compile_only.json, made if it is not there. file: another file for the same,
    optional. slices: how many such slices. plan: stop before code is made. debug: show where an
    error came from.
    """
    from refine_jax.config import Config

    if values is None:
        raise ConfigError("--compile_only needs --config=FILE and --topology=NAME.")
    config = Config.from_dict(values)
    out = given_path(file, "--json", write=True) if file else None
    if out is None and workdir:
        folder = given_path(workdir, "--workdir", write=True)
        check_writable(folder, "--workdir")
        folder.mkdir(parents=True, exist_ok=True)
        out = folder / "compile_only.json"
    command = importlib.import_module("refine_jax.compile_only.command")
    return command.run(config, topology, out, slices=slices, plan=plan, debug=debug)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. arguments: None: those of the process."""
    return command().run(run, arguments, imports=None)


def run(options: Options) -> int:
    """Do what the command line asks for; returns the exit code."""
    from absl import logging

    from refine_jax import config_files, presets
    from refine_jax.config import PHASES

    values = None
    if options.config is not None:
        values = config_files.load_config(options.config)
        config_files.override(values, options.settings)
        options.notes.extend(presets.notes(values.refine))
    elif options.settings:
        name = next(iter(options.settings))
        raise ConfigError(f"--{name} changes a configuration: name its --config=FILE.")
    say(options.notes)
    # absl's default shows what libraries log for each other, hundreds of lines a checkpoint.
    logging.set_verbosity(logging.WARNING)
    workdir, debug = options.workdir, options.debug
    if options.compile_only:
        return compile_for(
            values,
            options.topology,
            workdir,
            options.json,
            slices=1 if options.slices is None else options.slices,
            plan=options.plan,
            debug=debug,
        )
    for name in ("topology", "json", "plan", "slices"):
        if getattr(options, name):
            raise ConfigError(f"--{name} goes with --compile_only.")
    from refine_jax import distributed

    if values is not None and values.phase in PHASES:
        importlib.import_module(f"refine_jax.phases.{values.phase}")
    allow_interrupts()
    join = functools.partial(
        distributed.start,
        options.distributed,
        coordinator=options.coordinator,
        num_processes=options.num_processes,
        process_id=options.process_id,
    )
    try:
        with distributed.ending_together():
            allowed = options.allow_change
            sys.exit(execute(values, workdir, debug=debug, join=join, allow_change=allowed))
    except SystemExit as ended:
        return ended.code


def command() -> Command:
    """The command, its flags and its page of help."""
    made = Command("refine_jax.main", __doc__, "--config=FILE --workdir=DIR", settings=True)
    made.group("run")
    flag = made.flag
    flag("config", "configuration, with its form after a colon: configs/demo.py:short")
    flag("workdir", "folder of the run; made if it is not there", metavar="DIR")
    flag(
        "allow_change",
        "settings of an interrupted run to change on purpose, such as "
        "optimizer.learning_rate,train.steps; kept in checkpoints/run.json",
        list,
        default=[],
    )
    flag("debug", "show where an error came from", bool, default=False)
    made.group("what it needs of TPUs, without any")
    flag("compile_only", "compile the run's programs for --topology; no run", bool, default=False)
    flag("topology", "the TPU slice, as v5e:4x4 or v5p:4x4x4")
    flag("slices", "how many such slices the data-centre network joins (default: one)", int)
    flag(
        "plan",
        "stop before code is made: far sooner done; memory and transfers are the same to a few "
        "percent, times are rougher, and kernels are not compiled",
        bool,
        default=False,
    )
    flag("json", "a file for all figures, else in the --workdir", metavar="FILE")
    made.group("several processes; on a TPU pod or under SLURM or Open MPI they find each other")
    flag(
        "distributed",
        "auto: as the cluster's environment says; always; never",
        default="auto",
        choices=("auto", "on", "off"),
    )
    flag("coordinator", "where process 0 listens; needs the next two", metavar="HOST:PORT")
    flag("num_processes", "how many processes there are", int)
    flag("process_id", "which of them this is, from 0", int)
    return made


if __name__ == "__main__":
    code = main()
    if code:
        # Threads of libraries may wait for minutes for what will not come any more.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
