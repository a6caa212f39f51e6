"""The model card of a model that is pushed to the Hugging Face hub: how it was trained.

It is made of what the run recorded: its configuration, its step, its figures. Nothing of the
machine is in it: paths are left out, and only names of public things stay.
"""

import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refine_jax.base.errors import DataError
from refine_jax.base.files import parse_object, read_lines
from refine_jax.base.hub import MARK, is_hub
from refine_jax.checkpoint.folders import CHECKPOINTS, RUN, ModelCheckpoint
from refine_jax.checkpoint.steps import read_config
from refine_jax.config import SECTIONS
from refine_jax.models.hybrid_config import text_fields

PAPER = "2602.16704"
PRIVATE = "(not public)"
_NAMES = re.compile(r"stdlib|recall|mistral-v1|bytes|checkpoint|tfds:[A-Za-z]\w*(/[\w.+-]+)?")
_FOLDER = re.compile(r"(~|\.{0,2}/|[A-Za-z]:\\|[A-Za-z][A-Za-z0-9+.-]+:/)")
_REPOSITORY = re.compile(r"hf://(?:datasets/|models/)?([\w.-]+/[\w.-]+)")


def model_card(name: str, source: Path, model: ModelCheckpoint, dtype: str, parameters: int) -> str:
    """Write a model card in Markdown, with the fields that the hub reads at its head.

    name: ORG/NAME. source: the folder of the model or of the run. model: what was read from it.
    dtype: of the parameters that are pushed. parameters: how many.

    Raises CheckpointError: the record of the run is damaged.
    """
    source = source / CHECKPOINTS if (source / CHECKPOINTS / RUN).is_file() else source
    config = read_config(source) if (source / RUN).is_file() else {}
    kind = text_fields(model.config).get("model_type", "model")
    start = config.get("model", {}).get("checkpoint") or ""
    fields: dict[str, Any] = {
        "library_name": "refine-jax" if model.lora is None else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["refine", "fast-weights", kind, f"arxiv:{PAPER}"],
    }
    if is_hub(start):
        fields["base_model"] = hub_name(start)
    if is_hub(data := config.get("data", {}).get("source") or ""):
        fields["datasets"] = [hub_name(data)]
    what = "Low-rank updates of" if model.lora is not None else "A model of type"
    paper = f"[arXiv {PAPER}](https://arxiv.org/abs/{PAPER})"
    lines = [
        *("---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---", ""),
        *(MARK, "", f"# {name.partition('/')[2]}", ""),
        f"{what} `{kind}` with {parameters:,} parameters in {dtype}, written by refine_jax "
        f"{importlib.metadata.version('refine-jax')}, which trains fast-weight language models on "
        f"next sequences (ReFINE, {paper}).",
    ]
    if config:
        lines += ["", "## Training", "", *_training(config, model.step), *_figures(source, model)]
        public = json.dumps(public_config(config), indent=2, sort_keys=True, ensure_ascii=False)
        lines += ["", "## Configuration", "", *(f"    {line}" for line in public.splitlines())]
    if model.lora is None:
        lines += ["", "## Use", "", "    from refine_jax.checkpoint import load_model"]
        lines += ["", f'    model = load_model("hf://{name}")', "    model.config, model.params"]
    return "\n".join(lines) + "\n"


def hub_name(path: str) -> str:
    """Name the repository of a path on the hub, ORG/NAME; other texts stay as they are."""
    found = _REPOSITORY.match(path)
    return found[1] if found else path


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a configuration without the settings that name something of the machine."""
    made: dict[str, Any] = {}
    for section, values in config.items():
        if not isinstance(values, Mapping):
            made[section] = values
            continue
        known = getattr(SECTIONS.get(section), "__dataclass_fields__", {})
        made[section] = {
            name: PRIVATE
            if _is_private(value, name in known and bool(known[name].metadata["path"]))
            else value
            for name, value in values.items()
        }
    return made


def _is_private(value: Any, may_be_path: bool) -> bool:
    if not isinstance(value, str) or not value or is_hub(value) or _NAMES.fullmatch(value):
        return False
    return may_be_path or _FOLDER.match(value) is not None


def _training(config: Mapping[str, Any], step: int | None) -> list[str]:
    """Say in lines of a list what was trained, from what, on what."""

    def get(section: str, name: str) -> Any:
        return public_config(config).get(section, {}).get(name)

    rows, length = get("train", "batch_size"), get("data", "sequence_length")
    objective = get("refine", "objective")
    described = f"{config.get('phase', 'training')}, objective `{objective}`"
    lines = [f"* {described}, {step:,} steps of {rows:,} rows of {length:,} tokens"]
    start = get("model", "checkpoint")
    lines.append(f"* from `{start}`" if start else "* from random weights")
    lines.append(f"* on `{get('data', 'source')}`, with the tokenizer `{get('data', 'tokenizer')}`")
    rate, kind = get("optimizer", "learning_rate"), get("train", "trainable")
    lines.append(f"* learning rate {rate}; trained parameters: {kind}; seed {get('train', 'seed')}")
    return lines


def _figures(source: Path, model: ModelCheckpoint) -> list[str]:
    """Make a table of the run's held-out figures: before the first step, and up to this one."""
    path = source.parent / "metrics.jsonl"
    if not path.is_file():
        return []
    records, _ = read_lines(path, lambda line: parse_object(line, "it", DataError))
    rows: dict[str, list[str]] = {}
    for record in sorted(records, key=lambda record: record.get("step", 0)):
        step = record.get("step", 0)
        for name, value in record.items():
            if not name.startswith("eval/") or not isinstance(value, int | float):
                continue
            row = rows.setdefault(name.removeprefix("eval/"), ["", "", ""])
            if step == 0:
                row[0] = f"{value:.6g}"
            elif step <= (model.step or 0):
                row[1:] = [f"{value:.6g}", f"{step:,}"]
    if not rows:
        return []
    head = ["", "| held out | before | after | at step |", "|---|---|---|---|"]
    return [*head, *(f"| {name} | {' | '.join(row)} |" for name, row in sorted(rows.items()))]
