"""Evaluation: prompts of tasks are answered and the answers scored.

    WORKDIR/report.html  predictions.jsonl  results.json  scores.png  recall.png (needle tasks)
            evaluation.json

An interrupted evaluation continues from predictions.jsonl when it is started again.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from refine_jax import distributed
from refine_jax.base.errors import ConfigError
from refine_jax.base.files import given_path, read_json, short, write_text
from refine_jax.checkpoint.tree import fingerprints, flatten
from refine_jax.config import Config
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.evaluation.questions import (
    Question,
    digest,
    group_by_length,
    group_in_order,
    load_questions,
    shuffled,
)
from refine_jax.evaluation.runner import (
    FIELDS,
    PREDICTIONS,
    RECORD,
    Answerer,
    Predictions,
    evaluate,
)
from refine_jax.generation import CopiesGenerator, Generator, Sampling
from refine_jax.models.layout import row_length
from refine_jax.models.transformer import Model, Params
from refine_jax.parallel import use_mesh
from refine_jax.phases.setup import has_checkpoints, initial_params, only_run_in, prepare_model
from refine_jax.refine.adapt import Adapter
from refine_jax.report.page import write_evaluation


@dataclasses.dataclass(frozen=True)
class EvaluationParts:
    """What an evaluation is made of, before anything is written.

    record: all that its predictions depend on, as JSON values. notes: what of its data was left
    out, in sentences.
    """

    config: Config
    model: Model
    params: Params
    tokenizer: Tokenizer
    questions: list[Question]
    record: dict[str, Any]
    notes: Sequence[str] = ()


def prepare(config: Config, workdir: Path) -> EvaluationParts:
    """Load and check all that an evaluation needs; read files, write none.

    Raises:
      ConfigError, ModelConfigError, DataError, CheckpointError: What of the user's input is wrong.
    """
    if has_checkpoints(workdir):
        raise ConfigError(
            f"{workdir} holds a training run, which an evaluation would mix with its own files. "
            "Choose another --workdir, and name the run in config.model.checkpoint."
        )
    start, model, tokenizer = prepare_model(config, workdir)
    notes: list[str] = []
    questions = load_questions(
        config.evaluate,
        tokenizer,
        bos=config.data.add_bos,
        max_new_tokens=config.generation.max_new_tokens,
        report=notes.append,
    )
    params = initial_params(model, start, config)
    record = describe(config, model, params, tokenizer, questions)
    check_same_evaluation(record, workdir)
    return EvaluationParts(config, model, params, tokenizer, questions, record, notes)


def describe(
    config: Config,
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
) -> dict[str, Any]:
    """Record all that the predictions of an evaluation depend on, as JSON values.

    Of its data that is the content, not where it lies: files may move between two starts.
    """
    sections = config.to_dict()
    kept = ["evaluate", "generation"]
    if config.phase == "testtime":
        kept += ["testtime", "refine", "optimizer"]
    for path in ("data", "essays"):
        del sections["evaluate"][path]
    if not sections["testtime"]["answer_before"]:
        del sections["testtime"]["answer_before"]  # as in records of versions without it
    train = {"seed": config.train.seed}
    if config.phase == "testtime" and config.train.trainable != "all":
        train["trainable"] = config.train.trainable
    values = json.dumps(fingerprints(flatten(params)), sort_keys=True).encode()
    return {
        "phase": config.phase,
        "parameters": hashlib.blake2b(values, digest_size=16).hexdigest(),
        "compute_dtype": model.policy.compute_dtype,
        "tokenizer": tokenizer.fingerprint,
        "questions": digest(questions),
        # Of one end the tokenizer says all; so do the records of versions that knew no others.
        **({"ends": list(tokenizer.end_ids)} if len(tokenizer.end_ids) > 1 else {}),
        "data": {"add_bos": config.data.add_bos},
        "train": train,
        **{section: sections[section] for section in kept},
    }


def check_same_evaluation(mine: dict[str, Any], workdir: Path) -> None:
    """Refuse to continue an evaluation with something else.

    Raises ConfigError: the folder holds records of another configuration, model or tokenizer.
    """
    if not (workdir / PREDICTIONS).is_file():
        return
    advice = "Choose another --workdir, or"
    if not (workdir / RECORD).is_file():
        raise ConfigError(
            f"{workdir} holds {PREDICTIONS}, but no {RECORD}, which says what they were made with. "
            f"{advice} remove them."
        )
    try:
        before = _flat(read_json(workdir / RECORD, ConfigError))
    except ConfigError as reason:
        raise ConfigError(
            f"{reason} {advice} remove it with the {PREDICTIONS} beside it."
        ) from None
    if "questions" not in before:
        raise ConfigError(
            f"{workdir} holds an evaluation that an earlier version began: its {RECORD} does not "
            "say which questions were asked, so it cannot be continued. Choose another --workdir "
            f"to begin again and keep its answers, or remove {PREDICTIONS} and {RECORD} there."
        )
    after = _flat(mine)
    changed = [
        f"  {name}: was {short(before.get(name))}, got {short(after.get(name))}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
    if changed:
        raise ConfigError(
            f"{workdir} holds another evaluation. {advice} what it was started with:\n"
            + "\n".join(changed)
        )


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= {f"config.{name}.{field}": v for field, v in value.items()}
        else:
            flat[name] = value
    return flat


def run(config: Config, workdir: str | Path) -> dict:
    """Evaluate in the folder `workdir`, or go on evaluating, and report.

    Returns the figures of `refine_jax.evaluation.report.summarize`. After SIGTERM or SIGINT:
    {"interrupted": signal name, "done": examples with a record, "samples": all}. Raises
    ConfigError, ModelConfigError, DataError, CheckpointError: bad input; nothing was written.
    """
    workdir = given_path(workdir, "workdir", write=True).absolute()
    with only_run_in(workdir) as check, use_mesh(config.mesh, alone=True):
        parts = prepare(config, workdir)
        return run_parts(parts, workdir, make_answerer(parts), check)


def make_answerer(parts: EvaluationParts, adapter: Adapter | None = None) -> Answerer:
    """Make what answers the questions; with an `adapter`, its parameters do.

    Raises ConfigError: settings of `generation` that exclude each other.
    """
    options = parts.config.generation
    plain = Generator(parts.model, parts.tokenizer, prefill_tokens=options.prefill_tokens)
    generator: Generator = plain
    if adapter is not None and adapter.copies > 1:
        generator = CopiesGenerator(parts.model, parts.tokenizer, adapter.frozen)
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=parts.config.train.seed,
    )
    before = plain if adapter is not None and parts.config.testtime.answer_before else None
    return Answerer(parts.params, generator, sampling, adapter, before)


def run_parts(
    parts: EvaluationParts,
    workdir: Path,
    answerer: Answerer,
    check: Callable[[], None] = lambda: None,
) -> dict:
    """Answer, score and report; see `run`. check: called between groups; raises what ends it."""
    groups = make_groups(parts, answerer.adapter)
    workdir.mkdir(parents=True, exist_ok=True)
    distributed.check_same("model and questions", json.dumps([parts.record, len(groups)]))
    if distributed.is_writer():
        write_text(workdir / RECORD, json.dumps(parts.record, indent=2) + "\n")
    with distributed.Interrupt() as interrupt, Predictions(workdir, FIELDS) as predictions:
        predictions.check(parts.questions)
        introduce(parts, predictions, answerer.adapter)

        def stop() -> bool:
            check()
            return interrupt.agreed()

        if not evaluate(groups, answerer, predictions, stop=stop):
            done = len(predictions.records)
            distributed.say(
                f"{interrupt.signal}: {done} of {len(parts.questions)} examples are done. The same "
                "command continues the evaluation."
            )
            return {"interrupted": interrupt.signal, "done": done, "samples": len(parts.questions)}
        predictions.close()
        return write_evaluation([predictions.records[q.name] for q in parts.questions], workdir)


def make_groups(parts: EvaluationParts, adapter: Adapter | None) -> list[list[Question]]:
    """Group the questions that are answered together.

    Where questions do not depend on each other, those of a group have rows of one length, which
    then depends on each prompt alone.
    """
    options = parts.config.evaluate
    questions = shuffled(parts.questions, options.order_seed)
    if adapter is None:
        return group_by_length(questions, options.batch_size, row_length)
    if adapter.shares_parameters:
        return group_in_order(questions, adapter.group_size)
    return group_by_length(questions, adapter.group_size, row_length)


def introduce(parts: EvaluationParts, predictions: Predictions, adapter: Adapter | None) -> None:
    """Say what is evaluated, and on which devices."""
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(parts.params))
    sizes = sorted({len(question.tokens) for question in parts.questions})
    span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    cut = sum(question.cut > 0 for question in parts.questions)
    done = len(predictions.records)
    carried = adapter is not None and adapter.carries_over
    distributed.say(
        f"{parts.model.config.model_type}, {count / 1e6:,.1f} M parameters, "
        f"{parts.model.policy.compute_dtype} on {jax.devices()[0].device_kind}; "
        f"{len(parts.questions):,} prompts of {span} tokens"
        + (f", {cut:,} of them cut ({parts.config.evaluate.cut})" if cut else "")
        + (f"; {done:,} done before" if done else "")
        + (
            ", to which the model is adapted again: with config.testtime.reset='never' what "
            "follows depends on them"
            if done and carried
            else ""
        )
    )
    for note in parts.notes:
        distributed.say(f"note: {note}")
