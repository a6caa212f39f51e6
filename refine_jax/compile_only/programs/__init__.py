"""The programs of a run, by its phase.

What a phase compiles while it runs is built here from the configuration alone: neither documents
nor parameters are read, of a checkpoint only its config.json. Training ends with a model that is to
generate, so that reading a prompt and answering are compiled too, to compare with.
"""

from collections.abc import Callable

from refine_jax.compile_only.programs.generation import adaptation_programs, generation_programs
from refine_jax.compile_only.programs.run import AbstractRun, Program
from refine_jax.compile_only.programs.training import answer_programs, evaluation, training_programs


def programs_of_run(run: AbstractRun) -> dict[str, Callable[[], Program]]:
    """List what makes each program, by name; call it where the devices' mesh is ambient."""
    phase, programs = run.config.phase, {}
    if phase == "midtrain" or (phase == "posttrain" and run.config.posttrain.nested):
        programs |= training_programs(run)
    if phase == "posttrain":
        programs |= answer_programs(run)
    if phase in ("midtrain", "posttrain"):
        programs["evaluation"] = lambda: evaluation(run)
    if phase == "testtime":
        programs |= adaptation_programs(run)
    return programs | generation_programs(run)
