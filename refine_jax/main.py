"""Run a configuration from the command line:

    python -m refine_jax.main --config=configs/demo.py --workdir=runs/demo
    python -m refine_jax.main --config=configs/demo.py:short --workdir=runs/short \
        --config.train.steps=20 --config.refine.reward=binary

    python -m refine_jax.main --config=configs/midtrain_lact_760m.py --compile_only \
        --topology=v5p:4x4x4 --config.mesh.sequence=2

compiles the programs of the run for that TPU slice on a machine without TPUs, prints what they need
of a chip and an estimate of the time, and runs nothing: exit code 0 if all fit, 2 if one does not,
3 if one does not compile.

A run is continued by its own command. To change a setting on purpose from there on:
--allow_change=optimizer.learning_rate (README.md says what may change).

On a TPU pod, under SLURM or Open MPI: the same command on every host. Other processes are told
their numbers: --coordinator=HOST:PORT --num_processes=P --process_id=I (`refine_jax.distributed`).

Exit code 0: the run is complete, or SIGTERM or SIGINT stopped it after saving (the same command
continues it). Exit code 1: bad input or a failed run, with one message on standard error. The last
line on standard output is a JSON object with the figures of the run.
"""

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from refine_jax import distributed
from refine_jax.base.errors import USER_ERRORS, ConfigError, complain, escape_output
from refine_jax.config import Config, check_flag_names

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Configuration file, with its form after a colon: configs/demo.py:short"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if it is not there.")
_COMPILE_ONLY = flags.DEFINE_bool(
    "compile_only", False, "Compile the run for --topology and say whether it fits; run nothing."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "With --compile_only: a TPU slice, as v5e:4x4 or v5p:4x4x4."
)
_PLAN = flags.DEFINE_bool(
    "plan",
    False,
    "With --compile_only: stop before code is made. Far sooner done; memory and transfers are the "
    "same to a few percent, times are rougher, and kernels are not compiled.",
)
_JSON = flags.DEFINE_string(
    "json", None, "With --compile_only: a file for all figures; default WORKDIR/compile_only.json."
)
_ALLOW_CHANGE = flags.DEFINE_multi_string(
    "allow_change",
    [],
    "Settings of an interrupted run to change on purpose, joined by commas: "
    "optimizer.learning_rate,train.steps. They are kept in checkpoints/run.json.",
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show where an error came from.")
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    distributed.MODES,
    "Several processes, as the cluster's environment names them. auto: on a TPU pod, and where "
    "SLURM or Open MPI started several; on: always; off: never.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT where process 0 listens; with num_processes and process_id."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def execute(
    values: Mapping | None,
    workdir: str | None,
    *,
    debug: bool = False,
    join: Callable[[], None] = lambda: None,
    allow_change: Sequence[str] = (),
) -> int:
    """Run a configuration and print its figures; returns the exit code.

    Args:
      values: A ConfigDict or nested dict of fields.
      workdir: Folder of the run.
      debug: Let errors of the user's input through, with their traceback.
      join: Called before anything computes; joins the other processes.
      allow_change: Settings that a run which is continued may change.
    """
    try:
        if values is None or not workdir:
            raise ConfigError("Both --config=FILE and --workdir=DIR are needed.")
        config = Config.from_dict(values)
        join()
        distributed.check_same("configuration", json.dumps(config.to_dict(), sort_keys=True))
        distributed.check_shared(workdir)
        keep_programs(workdir)
        phase = importlib.import_module(f"refine_jax.phases.{config.phase}")
        results = phase.run(config, workdir, **_permission(config, allow_change))
    except USER_ERRORS as error:
        if debug:
            raise
        distributed.report_failure(error)
        return complain(error)
    distributed.say(json.dumps(results))
    return 0


def _permission(config: Config, allow_change: Sequence[str]) -> dict[str, Sequence[str]]:
    """What training phases are told of settings that may change; others cannot continue with any.

    Raises:
      ConfigError: The phase keeps no state to go on with under other settings.
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
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu":
        folder = Path(workdir).expanduser().absolute() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def compile_for(
    values: Mapping | None,
    topology: str | None,
    workdir: str | None,
    file: str | None,
    *,
    plan: bool = False,
    debug: bool = False,
) -> int:
    """Compile a configuration for a TPU slice and print what it needs; returns the exit code.

    Args:
      values: A ConfigDict or nested dict of fields.
      topology: The slice, as v5p:4x4x4.
      workdir: An optional folder for compile_only.json, made if it is not there.
      file: Another file for the same, optional.
      plan: Stop before code is made.
      debug: Let errors of the user's input through, with their traceback.
    """
    try:
        if values is None:
            raise ConfigError("--compile_only needs --config=FILE and --topology=NAME.")
        out = Path(file).expanduser() if file else None
        if out is None and workdir:
            Path(workdir).expanduser().mkdir(parents=True, exist_ok=True)
            out = Path(workdir).expanduser() / "compile_only.json"
        command = importlib.import_module("refine_jax.compile_only.command")
        return command.run(Config.from_dict(values), topology, out, plan=plan, debug=debug)
    except USER_ERRORS as error:
        if debug:
            raise
        return complain(error)


def main(argv: Sequence[str]) -> None:
    """Run the configuration of the flags, and exit."""
    escape_output()
    if len(argv) > 1:
        got = " ".join(argv[1:])
        sys.exit(complain(f"Arguments must be flags, --name=value. Got: {got}."))
    # absl's default shows what libraries log for each other, hundreds of lines a checkpoint.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    if _COMPILE_ONLY.value:
        sys.exit(
            compile_for(
                _CONFIG.value,
                _TOPOLOGY.value,
                _WORKDIR.value,
                _JSON.value,
                plan=_PLAN.value,
                debug=_DEBUG.value,
            )
        )
    join = functools.partial(
        distributed.start,
        _DISTRIBUTED.value,
        coordinator=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
    )
    with distributed.ending_together():
        sys.exit(
            execute(
                _CONFIG.value,
                _WORKDIR.value,
                debug=_DEBUG.value,
                join=join,
                allow_change=_ALLOW_CHANGE.value,
            )
        )


def parse_flags(argv: Sequence[str]) -> list[str]:
    """The arguments that are no flags; exits with 1 and a message for flags that are wrong."""
    try:
        check_flag_names(argv)
        _check_file(argv)
        rest = flags.FLAGS(list(argv))
        # A file that cannot be loaded is noticed only where its values are used.
        if _CONFIG.value is not None:
            _ = _CONFIG.value.train
        return rest
    except (KeyError, AttributeError) as error:
        message = (
            f"The configuration file sets no field {error.args[0]}, which a --config. flag names. "
            "Fields of a fresh model are set in the file before flags can change them."
        )
    except (flags.Error, ConfigError, OSError) as error:
        message = str(error).strip()
        if "Traceback" in message:  # of the configuration file; its last line says it all
            message = f"The configuration file failed: {message.splitlines()[-1]}"
    sys.exit(complain(message))


def _check_file(argv: Sequence[str]) -> None:
    for argument in argv:
        name, _, value = argument.lstrip("-").partition("=")
        path = value.partition(":")[0]
        if name == "config" and path and not Path(path).is_file():
            raise ConfigError(f"There is no configuration file {path!r}.")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
