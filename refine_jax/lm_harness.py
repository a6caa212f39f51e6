"""Evaluate a model on tasks of lm-evaluation-harness (pip install 'refine-jax[eval]').

Tasks are lm-eval's own, and those of the folder --include_path: names, groups, tags, patterns of
these ('local_*'), YAML files and folders of them. A task file can name Python functions, which run.
Their data comes from where they say, usually the Hugging Face hub; with HF_HUB_OFFLINE=1 from its
cache, or from local files that the tasks name. The last line on standard output is a JSON object
with the results; a table comes before it. If lm-eval fails after the model has answered, as a
metric may, the responses are kept in a file beside --output.

Examples:

    python -m refine_jax.lm_harness --checkpoint=checkpoints/lact-760m \\
        --tasks=lambada_openai,hellaswag,wikitext --output=results.json
    python -m refine_jax.lm_harness --checkpoint=runs/mine --step=best --include_path=my_tasks/ \\
        --tasks='my_*' --limit=100
    python -m refine_jax.lm_harness --checkpoint=checkpoints/qwen3.5-0.8b --tasks=ifeval \\
        --apply_chat_template
"""

import contextlib
import glob
import json
import logging as python_logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import logging

from refine_jax.base.errors import DataError, UserError, complain, describe
from refine_jax.base.files import check_output, local_path, path_of, write_text
from refine_jax.base.remote import RemotePath
from refine_jax.commands import Command, Options, step_argument
from refine_jax.settings import expand_flags


def evaluate(
    checkpoint: str,
    tasks: list[str],
    *,
    step: int | str = "latest",
    adapter: str | None = None,
    tokenizer: str | None = None,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    gen_kwargs: str | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    seed: int = 0,
    log_samples: bool = False,
    keep_in: str | Path | None = None,
) -> dict:
    """lm-eval's results of a checkpoint on tasks, as `lm_eval.simple_evaluate` returns them.

    The arguments are those of the command line (`--help`). keep_in: the folder for the model's
    responses if lm-eval fails after them, such as in a metric; None: that for temporary files.

    Raises:
      CheckpointError, DataError: No checkpoint; no such task; options that cannot work.
      ImportError: lm-eval is not installed.
    """
    from refine_jax.evaluation import harness  # first: it says what is missing

    # lm-eval would fork for its bootstrap; a child of JAX's threads may wait for ever.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    harness.check_options(batch_size, max_length, seed)
    if limit is not None and not (0 < limit < 1 or (1 <= limit < 2**53 and limit % 1 == 0)):
        raise DataError(
            f"limit must be a whole number, at least 1, or a fraction below 1. Got: {limit}."
        )
    if num_fewshot is not None and not 0 <= num_fewshot <= 10_000:
        raise DataError(f"num_fewshot must be from 0 to 10,000. Got: {num_fewshot}.")
    if include_path is not None:
        include_path = str(local_path(include_path, "include_path", DataError))
        if not Path(include_path).is_dir():
            raise DataError(f"include_path is no folder: {include_path}")
    loaded = _load_tasks(tasks, include_path)
    _check_generation(loaded, gen_kwargs)
    lm = harness.RefineLM.from_checkpoint(
        checkpoint,
        step=step,
        adapter=adapter,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
    )
    if apply_chat_template:
        from refine_jax.data.chat import load_chat_template

        load_chat_template(lm.tokenizer)  # said before any work
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    try:
        with _explained(f"evaluate {', '.join(tasks)}", ours=harness.__name__):
            return simple_evaluate(
                model=lm,
                tasks=loaded,
                task_manager=TaskManager(include_defaults=False),  # all tasks are there
                num_fewshot=num_fewshot,
                limit=limit,
                gen_kwargs=gen_kwargs,
                apply_chat_template=apply_chat_template,
                system_instruction=system_instruction,
                batch_size=batch_size,
                log_samples=log_samples,
            )
    except DataError as error:
        kept = _keep_responses(loaded, keep_in)
        if not kept:
            raise
        raise DataError(f"{str(error).removesuffix('.')}. {kept}") from error.__cause__


def _keep_responses(loaded: Sequence, folder: str | Path | None) -> str:
    """Write what the model answered to a new file; returns a sentence on it, "" without answers."""
    from lm_eval.utils import handle_non_serializable

    lines = [
        json.dumps(
            {
                "task": request.task_name,
                "doc_id": request.doc_id,
                "request_type": request.request_type,
                "arguments": request.args,
                "resps": request.resps,
            },
            default=handle_non_serializable,
        )
        for item in loaded
        for task in _leaves(item)
        for request in getattr(task, "instances", ())  # which it may not have come to
        if request.resps
    ]
    if not lines:
        return ""
    if isinstance(folder, RemotePath):  # these go to the machine's folder of temporary files
        folder = None
    try:
        number, path = tempfile.mkstemp(prefix="responses-", suffix=".jsonl", dir=folder)
        with open(number, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
    except OSError as error:
        return f"The model's responses could not be kept: {describe(error)}"
    return f"The model's responses to {len(lines):,} requests are kept in {path}."


_LOADING = (
    ". Look at the task's YAML, its templates and its data. A field that is missing, a choice or a "
    "data set that is empty, and half of a surrogate pair (\\ud83d alone) in JSON cannot be loaded."
)


def _load_tasks(names: Sequence[str], include_path: str | None) -> list:
    """lm-eval's tasks and groups of these names, patterns, YAML files and folders of such files.

    Raises DataError: one is not there, or lm-eval cannot load it or its data.
    """
    from lm_eval.tasks import TaskManager

    def find(manager: TaskManager) -> dict[str, list[str]]:
        return {name: _matches(name, manager) for name in names}

    # lm-eval takes up to a minute to index its own tasks: only where one of them, a group that may
    # hold them, or a pattern that may fit them, is meant.
    index = _held_back("lm_eval.tasks._index", level=python_logging.DEBUG)
    with index as said, _explained("index its tasks"):
        manager = TaskManager(include_path=include_path, include_defaults=False)
        known = {*manager.all_subtasks}
        if not all(name in known or Path(name).exists() for name in names):
            manager = TaskManager(include_path=include_path)
        matches_of = find(manager)
    missing = [name for name, matches in matches_of.items() if not matches]
    if missing or not names:
        lines = [" ".join(record.getMessage().split()) for record in said]
        mine = [line for line in lines if line.startswith("Skip ") and f" {include_path}" in line]
        raise DataError(
            f"lm-eval has no task {', '.join(missing) or '(none was named)'}. `lm_eval ls tasks` "
            "lists those it has; --include_path names a folder with others."
            + "".join(f" It does not read {line.removeprefix('Skip ')}." for line in set(mine[:5]))
        )
    loaded = []
    for name in dict.fromkeys(match for matches in matches_of.values() for match in matches):
        held = _held_back("datasets", "lm_eval")
        with held as said, _no_bars(), _explained(f"load the task {name}", _LOADING, said=said):
            one = manager.load(name)
            inner = {child for children in one["group_map"].values() for child in children}
            groups = [group for key, group in one["groups"].items() if key not in inner]
            loaded += groups or one["tasks"].values()
    # What generates comes last: a choice that cannot be scored is found before that work.
    return sorted(loaded, key=lambda item: any(_generates(task) for task in _leaves(item)))


def _leaves(item) -> list:
    """The tasks of a task or a group."""
    return item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]


def _generates(task) -> bool:
    return getattr(getattr(task, "config", None), "output_type", None) == "generate_until"


def _matches(name: str, manager) -> list[str]:
    """What a name of --tasks stands for: names of the index, or YAML files, as lm-eval has it."""
    if name.endswith(".yaml"):
        return sorted(glob.glob(name))
    tasks = sorted(manager.match_tasks([name]))
    if not tasks and Path(name).is_file():
        return [name]
    if not tasks and Path(name).is_dir():
        return sorted(map(str, Path(name).glob("*.yaml")))
    return tasks


def _check_generation(loaded: Sequence, gen_kwargs: str | None) -> None:
    """Raise DataError for generation arguments that do not work, before anything is generated."""
    from lm_eval.utils import simple_parse_args_string

    from refine_jax.evaluation.harness import read_sampling

    with _explained("read gen_kwargs"):
        given = simple_parse_args_string(gen_kwargs)
    read_sampling(given)
    for task in filter(_generates, (task for item in loaded for task in _leaves(item))):
        try:
            read_sampling({**(task.config.generation_kwargs or {}), **given})
        except UserError as reason:
            raise DataError(f"task {task.config.task}: {reason}") from None


@contextlib.contextmanager
def _explained(
    what: str, hint: str = "", *, ours: str = "", said: Sequence[python_logging.LogRecord] = ()
) -> Iterator[None]:
    """Turn what lm-eval and its libraries raise about tasks and their data into one message.

    what: what lm-eval was to do. hint: what the user can do. ours: the module of ours that it
    calls; what is raised in there is let through. said: what they have logged; the last error
    among it may name the file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # tasks are code and data of others, which raise anything
        frames = traceback.walk_tb(error.__traceback__)
        if ours and any(frame.f_globals.get("__name__") == ours for frame, _ in frames):
            raise
        reasons = []
        reason: BaseException | None = error
        while reason is not None and len(reasons) < 4:
            reasons.append((f"{type(reason).__name__}: ", _cut(str(reason))))
            reason = reason.__cause__
        errors = [record.getMessage() for record in said if record.levelno >= python_logging.ERROR]
        for line in errors[-1:]:
            # It repeats the reasons, and says of what file they are.
            reasons = [pair for pair in reasons if pair[1] not in line] + [("", _cut(line))]
        text = "; ".join(kind + message for kind, message in reasons)
        raise DataError(f"lm-eval cannot {what}: {text}{hint}") from error


def _cut(message: str) -> str:
    message = message.strip()
    return message if len(message) <= 500 else f"{message[:500]}..."


@contextlib.contextmanager
def _held_back(
    *names: str, level: int = python_logging.NOTSET
) -> Iterator[list[python_logging.LogRecord]]:
    """Collect what loggers of these names and below them say; after an error it is not shown.

    level: from which on they say it here; NOTSET: as everywhere.
    """
    said: list[python_logging.LogRecord] = []
    handler = python_logging.Handler()
    handler.emit = said.append
    loggers = [python_logging.getLogger(name) for name in names]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level or logger.level)
    try:
        yield said
    finally:
        for logger, (handlers, own_level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(own_level)
    for record in said:
        logger = python_logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the library `datasets` from drawing bars where no terminal shows them as such."""
    import datasets

    if datasets.are_progress_bars_disabled() or (sys.stderr and sys.stderr.isatty()):
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command().run(run, arguments, imports=("jax", "refine_jax.compiling"))


def run(options: Options) -> int | None:
    """Do what the command line asks for; prints tables and a line of JSON."""
    from refine_jax.compiling import announced

    logging.set_verbosity(logging.WARNING)
    given = {name: getattr(options, name) for name in command().flags}
    expand_flags(given, "checkpoint", "adapter", "tokenizer", "include_path", "output")
    output = given.pop("output")
    if output is not None:
        output = path_of(output)
        _check_output(output)
    try:
        with announced():
            results = evaluate(**given, keep_in=output and output.parent)
    except ImportError as error:
        return complain(error)
    _print(results)
    if output is not None:
        from lm_eval.utils import handle_non_serializable

        text = json.dumps(results, indent=2, default=handle_non_serializable)
        write_text(output, text + "\n")
    return None


def _print(results: dict) -> None:
    """lm-eval's tables, and the line of JSON."""
    from lm_eval.utils import handle_non_serializable, make_table

    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    summary = {"results": results["results"], "scoring": results["config"]["scoring"]}
    print(json.dumps(summary, default=handle_non_serializable), flush=True)


def _check_output(path: Path) -> None:
    """Say what is wrong with the file before hours of work."""
    check_output(path, "--output", DataError)
    if path.exists():
        raise DataError(f"{path} exists: choose another --output.")


def command() -> Command:
    """The command, its flags and its page of help."""
    made = Command("refine_jax.lm_harness", __doc__, "--checkpoint=DIR --tasks=A,B")
    flag = made.flag
    made.group("model")
    text = "made by refine_jax.convert, or a run's work folder"
    flag("checkpoint", text, metavar="DIR", needed=True)
    flag("step", "of a run: latest, best, or a number", step_argument, default="latest")
    flag("adapter", "of the peft package, to add to it", metavar="DIR")
    flag("tokenizer", "mistral-v1, bytes or a path (default: that of the checkpoint)")
    made.group("tasks")
    flag("tasks", "lm-eval's names", list, needed=True)
    flag("include_path", "folder with further tasks", metavar="DIR")
    flag("num_fewshot", "examples in front (default: the task's)", int)
    text = "prompts are messages of a chat, examples in front turns of it"
    flag("apply_chat_template", text, bool, default=False)
    flag("system_instruction", "text in front of each prompt, or its first message")
    flag("limit", "documents of each task, or a fraction of them if below 1", float)
    flag("gen_kwargs", "of generations, e.g. temperature=0.7,do_sample=True,max_gen_toks=64")
    made.group("computation and output")
    flag("batch_size", "rows at a time", int, default=8)
    flag("max_length", "most tokens of a request; longer ones are cut on the left", int)
    flag("seed", "of sampled generations", int, default=0)
    flag("output", "JSON file for lm-eval's results", metavar="FILE")
    flag("log_samples", "with every document and response", bool, default=False)
    return made


if __name__ == "__main__":
    sys.exit(main())
