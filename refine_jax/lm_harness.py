"""Evaluate a model on tasks of lm-evaluation-harness (pip install 'refine-jax[eval]').

    python -m refine_jax.lm_harness --checkpoint=checkpoints/lact-760m \\
        --tasks=lambada_openai,hellaswag,wikitext --output=results.json

Tasks are lm-eval's own: names, groups, tags, YAML files, and those of the folder --include_path.
Their data comes from where they say, usually the Hugging Face hub; with HF_HUB_OFFLINE=1 from its
cache, or from local files that the tasks name. The last line on standard output is a JSON object
with the results; a table comes before it.
"""

import argparse
import json
import os
import sys
from collections.abc import Collection
from pathlib import Path

from absl import logging

from refine_jax.base.errors import USER_ERRORS, DataError, complain, escape_output
from refine_jax.compiling import announced
from refine_jax.convert import step_argument


def evaluate(
    checkpoint: str,
    tasks: list[str],
    *,
    step: int | str = "latest",
    tokenizer: str | None = None,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    gen_kwargs: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    seed: int = 0,
    log_samples: bool = False,
) -> dict:
    """lm-eval's results of a checkpoint on tasks, as `lm_eval.simple_evaluate` returns them.

    The arguments are those of the command line (`--help`).

    Raises:
      CheckpointError, DataError: No checkpoint; no such task; options that cannot work.
      ImportError: lm-eval is not installed.
    """
    from refine_jax.evaluation import harness  # first: it says what is missing

    # lm-eval would fork for its bootstrap; a child of JAX's threads may wait for ever.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    if include_path is not None and not Path(include_path).is_dir():
        raise DataError(f"include_path is no folder: {include_path}")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # lm-eval takes up to a minute to index its own tasks: only where one of them, or a group that
    # may hold them, is meant.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if _missing(tasks, manager.all_subtasks):
        manager = TaskManager(include_path=include_path)
    missing = _missing(tasks, manager.all_tasks)
    if missing or not tasks:
        raise DataError(
            f"lm-eval has no task {', '.join(missing) or '(none was named)'}. `lm_eval ls tasks` "
            "lists those it has; --include_path names a folder with others."
        )
    lm = harness.RefineLM.from_checkpoint(
        checkpoint,
        step=step,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
    )
    return simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        gen_kwargs=gen_kwargs,
        batch_size=batch_size,
        log_samples=log_samples,
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    escape_output()
    options = vars(_parser().parse_args(arguments))
    logging.set_verbosity(logging.WARNING)
    output = options.pop("output")
    try:
        _check_output(output)
        with announced():
            results = evaluate(**options)
        _print(results)
        if output is not None:
            from lm_eval.utils import handle_non_serializable

            text = json.dumps(results, indent=2, default=handle_non_serializable)
            output.write_text(text + "\n", encoding="utf-8")
    except (*USER_ERRORS, ImportError) as error:
        return complain(error)
    return 0


def _print(results: dict) -> None:
    """lm-eval's tables, and the line of JSON."""
    from lm_eval.utils import handle_non_serializable, make_table

    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    summary = {"results": results["results"], "scoring": results["config"]["scoring"]}
    print(json.dumps(summary, default=handle_non_serializable), flush=True)


def _missing(tasks: list[str], known: Collection[str]) -> list[str]:
    return [task for task in tasks if task not in known and not Path(task).is_file()]


def _check_output(path: Path | None) -> None:
    """Say what is wrong with the file before hours of work."""
    if path is None:
        return
    if path.exists():
        raise DataError(f"{path} exists: choose another --output.")
    if not path.parent.is_dir():
        raise DataError(f"{path.parent}, the folder of --output, does not exist.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m refine_jax.lm_harness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", required=True, help="made by refine_jax.convert, or a run's work folder"
    )
    parser.add_argument(
        "--tasks", required=True, type=_names, help="lm-eval's names, separated by commas"
    )
    parser.add_argument(
        "--step",
        default="latest",
        type=step_argument,
        help="of a run: latest, best or a number",
    )
    parser.add_argument(
        "--tokenizer", help="mistral-v1, bytes or a path (default: that of the checkpoint)"
    )
    parser.add_argument("--include_path", help="folder with further tasks")
    parser.add_argument("--num_fewshot", type=int, help="examples in front (default: the task's)")
    parser.add_argument(
        "--limit", type=float, help="documents of each task, or a fraction of them if below 1"
    )
    parser.add_argument(
        "--gen_kwargs", help="of generations, e.g. temperature=0.7,do_sample=True,max_gen_toks=64"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="rows at a time (default 8)")
    parser.add_argument(
        "--max_length", type=int, help="most tokens of a request; longer ones are cut on the left"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampled generations")
    parser.add_argument("--output", type=Path, help="JSON file for lm-eval's results")
    parser.add_argument(
        "--log_samples", action="store_true", help="with every document and response"
    )
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    sys.exit(main())
