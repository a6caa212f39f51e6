"""List the commands, and run each by its name: `refine-jax NAME`, `python -m refine_jax NAME`.

`refine-jax train FLAGS` is `python -m refine_jax.main FLAGS`, and so on: modules run as they are.
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from refine_jax.base.errors import complain, run_command


class _Entry(NamedTuple):
    module: str
    what: str
    usage: str
    flag: str = ""  # that the name of the command stands for


COMMANDS = {
    "train": _Entry("main", "train as a configuration says", "--config=FILE --workdir=DIR"),
    "evaluate": _Entry("main", "score answers to RULER, LongBench", "--config=FILE --workdir=DIR"),
    "fit": _Entry(
        "main", "say if a run fits TPUs", "--config=FILE --topology=NAME", "--compile_only"
    ),
    "report": _Entry("report", "make the page of runs again, at any time", "RUN [RUN ...]"),
    "generate": _Entry("generate", "continue prompts", "--checkpoint=DIR"),
    "convert": _Entry("convert", "from and to Hugging Face folders", "from_hf|to_hf SRC DST"),
    "position": _Entry("evaluation.position", "loss by length of context", "--checkpoint=DIR"),
    "harness": _Entry("lm_harness", "tasks of lm-eval", "--checkpoint=DIR --tasks=A,B"),
    "prepare": _Entry("data.prepare", "tokenise documents once, for many runs", "--out=DIR"),
    "tasks": _Entry("data.tasks.generate", "write the examples of tasks to files", "--out=DIR"),
}
"""By name: the module below `refine_jax` that is run, and what the list says."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, whose name comes first; without one, print the list. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    program = "refine-jax" if Path(sys.argv[0]).name == "refine-jax" else "python -m refine_jax"
    if not arguments or arguments[0].lstrip("-") in ("help", "h"):
        return run_command(lambda: print(_list(program)))
    name, *left = arguments
    if name not in COMMANDS:
        from refine_jax.settings import suggestion

        return complain(
            f"There is no command {name[:100]!r}.{suggestion(name, COMMANDS)} `{program}` lists "
            "the commands."
        )
    entry = COMMANDS[name]
    sys.argv = [f"{program} {name}", *filter(None, [entry.flag]), *left]
    runpy.run_module(f"refine_jax.{entry.module}", run_name="__main__")
    return 0


def _list(program: str) -> str:
    lines = [f"usage: {program} COMMAND ...", ""]
    lines += [f"  {name:10}{entry.what:42}{entry.usage}" for name, entry in COMMANDS.items()]
    return "\n".join([*lines, "", f"{program} COMMAND --help says more."])


if __name__ == "__main__":
    sys.exit(main())
