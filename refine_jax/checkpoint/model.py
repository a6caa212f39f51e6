"""Models in folders, written alone, and read from there or from the folder of a run.

    config.json  tokenizer.model ...     the model, as in a Hugging Face folder
    params/                              its parameters

A run's folder (manager.py) holds steps in the place of `params`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from refine_jax.base.errors import CheckpointError
from refine_jax.base.files import given_path, json_field, parse_object, read_text, short, write_text
from refine_jax.base.hub import is_hub
from refine_jax.checkpoint import hub
from refine_jax.checkpoint.arrays import read_arrays, write_arrays
from refine_jax.checkpoint.folders import (
    CONFIG,
    FROZEN,
    PARAMS,
    RUN,
    ModelCheckpoint,
    companions,
    copy_files,
    has_tokenizer,
    new_folder,
)
from refine_jax.checkpoint.hf import read_hf
from refine_jax.checkpoint.peft import read_adapter
from refine_jax.checkpoint.steps import (
    FROZEN_FIX,
    STATE,
    check_newest,
    file_digests,
    find_best,
    find_steps,
    how_to_fix,
    read_config,
    read_run,
    read_step_metrics,
)
from refine_jax.checkpoint.tree import PyTree, abstract_params, flatten, nest
from refine_jax.models.config import model_config
from refine_jax.models.lora import LoRA, abstract_updates
from refine_jax.models.lora import merge as merge_updates
from refine_jax.models.trainable import join, split


def save_model(
    path: epath.PathLike,
    params: dict,
    config_json: str,
    files: Mapping[str, Path] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a model's folder: `params`, the text of its config.json, and {name: path} of files.

    The folder appears when it is complete; in a bucket it counts once config.json is there. Of
    several processes one calls this.
    Raises CheckpointError if it exists (with `overwrite`: if it is no checkpoint).
    """
    named = flatten(params)
    size = sum(leaf.nbytes for leaf in named.values())
    with new_folder(path, overwrite=overwrite, size=size) as folder:
        write_arrays(folder / PARAMS, named)
        copy_files(files or {}, folder)
        write_text(folder / CONFIG, config_json)


def load_model(
    path: epath.PathLike,
    *,
    step: int | str = "latest",
    shardings: PyTree | None = None,
    dtype: Any = None,
    merge: bool = True,
    adapter: epath.PathLike | None = None,
    in_memory: bool = True,
) -> ModelCheckpoint:
    """Read a model from its folder or from a training run's.

    path: written by `save_model` or CheckpointManager, a work folder with `checkpoints` in it, or a
        Hugging Face folder, which is read whole into memory: convert large ones; or
        hf://ORG/NAME[@REVISION], a model on the hub, which is converted into a cache once.
    step: of a run: "latest", "best" (by the run's best metric) or a number.
    shardings: like the params, where to put them; None gives numpy arrays.
    dtype: cast the parameters; None keeps those of the file.
    merge: add low-rank updates of a run to its weights; else they stand beside them (lora.py).
    adapter: folder of the peft package, whose updates are added to the weights as well.
    in_memory: read the parameters now; else those of a checkpoint without low-rank updates are
        `Streamed`, read where they are used.

    Raises CheckpointError: not a checkpoint, a corrupt one, or one whose arrays are not those of
    its config.json.
    """
    folder = checkpoint_folder(path).absolute()
    if (folder / "checkpoints" / CONFIG).exists():
        folder = folder / "checkpoints"
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"{path} is not a checkpoint: it has no {CONFIG}.")
    if (folder / PARAMS).exists() or (folder / RUN).exists():
        model = _load_own(folder, step, shardings, in_memory or adapter is not None)
    elif is_published(folder):
        model = _load_published(folder, shardings)
    else:
        raise CheckpointError(
            f"{path} is not a checkpoint: it has no {PARAMS} and no {RUN}, as those of this "
            "package have, and no weights (safetensors) of a Hugging Face folder."
        )
    params, lora = model.params, model.lora
    if lora is not None and (merge or adapter is not None):
        params, lora = merge_updates(params), None
    if adapter is not None:
        _, updates = read_adapter(adapter, model_config(dict(model.config)))
        params = merge_updates(join(params, updates))
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)
    return model._replace(params=params, lora=lora)


def checkpoint_folder(path: epath.PathLike) -> Path:
    """Find the folder of a checkpoint, on a disk or in a bucket; of a model on the hub, that of its
    conversion.

    Raises CheckpointError: it is a URL of another kind, or the hub does not give it.
    """
    if is_hub(path):
        return hub.cached(path, _convert)
    return given_path(path, "the checkpoint", CheckpointError, write=True)


def _convert(source: Path, target: Path) -> None:
    model = read_hf(source, in_memory=False)
    save_model(target, model.params, model.config_json, model.files)


def is_published(folder: Path) -> bool:
    """Whether a folder has the weights of a Hugging Face folder and is no checkpoint of ours."""
    own = any((folder / name).exists() for name in (PARAMS, RUN, "checkpoints"))
    return not own and any(folder.glob("model*.safetensors*"))


def _load_own(
    folder: Path, step: int | str, shardings: PyTree | None, in_memory: bool
) -> ModelCheckpoint:
    """Read a model from a folder of this package, with its updates; see `load_model`."""
    config_json = read_text(folder / CONFIG, CheckpointError)
    config = parse_object(config_json, folder / CONFIG, CheckpointError)
    abstract, lora, frozen, base = abstract_params(config), None, None, ""
    if (folder / PARAMS).exists():
        step, source, part, digests = None, folder / PARAMS, "", None
        fix = "Convert or copy it again."
    else:
        step, others = _choose_step(folder, step)
        source, part = folder / str(step) / STATE, f"{PARAMS}."
        fix = how_to_fix(folder / str(step), others)
        digests = {folder / name: saved for name, saved in file_digests(folder).items()}
        lora, trained, frozen, base = _parts_of_run(folder, abstract)
        abstract = flatten(trained)
    placed = flatten(shardings) if shardings is not None else {}

    def read(source, abstract, part: str, **options) -> dict:
        arrays = read_arrays(
            source,
            {
                part + name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed.get(name))
                for name, x in abstract.items()
            },
            part=part,
            in_memory=in_memory or lora is not None,
            **options,
        )
        return nest({name.removeprefix(part): leaf for name, leaf in arrays.items()})

    params = read(source, abstract, part, digests=digests, fix=fix)
    if frozen is not None:
        params = join(params, read(folder / FROZEN, flatten(frozen), "", fix=FROZEN_FIX))
    tokenizer = folder if has_tokenizer(folder) else None
    files = companions(folder)
    return ModelCheckpoint(
        config, config_json, params, tokenizer, files, step, lora=lora, base=base
    )


def _load_published(folder: Path, shardings: PyTree | None) -> ModelCheckpoint:
    """Read a model from a Hugging Face folder; arguments and errors as of `load_model`."""
    model = read_hf(folder)
    params = model.params
    if shardings is not None:
        params = jax.tree.map(jax.device_put, params, shardings)
    tokenizer = folder if has_tokenizer(folder) else None
    return ModelCheckpoint(model.config, model.config_json, params, tokenizer, model.files)


def read_lora(folder: Path) -> LoRA | None:
    """The low-rank updates that the run in a folder trains; None: it trains none.

    Raises CheckpointError: its run.json is damaged.
    """
    recorded = read_run(folder, verify=True).lora
    try:
        return None if recorded is None else LoRA.from_json(recorded)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{folder / RUN}: lora must be an object with rank, alpha and targets. "
            f"Got: {short(recorded)}."
        ) from None


def _parts_of_run(
    folder: Path, abstract: Mapping[str, Any]
) -> tuple[LoRA | None, PyTree, PyTree | None, str]:
    """The low-rank updates of a run, shapes of what it trains and of what is frozen, and its base.

    abstract: of the model's own parameters, by name.
    """
    lora, params, config = read_lora(folder), nest(abstract), read_config(folder)

    def text(section: str, name: str, default: str) -> str:
        where = f"{folder / RUN}: config.{section}"
        given = {"where": where, "error": CheckpointError, "default": default}
        return json_field(config.get(section, {}), name, str, **given)

    if lora is not None:
        params = join(params, abstract_updates(params, lora))
    kind = text("train", "trainable", "all")
    return lora, *split(params, kind), text("model", "checkpoint", "")


def _choose_step(folder: Path, step: int | str) -> tuple[int, list[int]]:
    """Choose the step to read; returns it and the other ones."""
    run, steps = read_run(folder, verify=True), find_steps(folder)
    saved = steps.saved
    if step in ("latest", "best"):
        check_newest(folder, steps)
    if not saved:
        raise CheckpointError(f"{folder} holds no finished checkpoint.")
    chosen = saved[-1] if step == "latest" else step
    if step == "best":
        figures = {number: read_step_metrics(folder, number, saved) for number in saved}
        chosen = find_best(figures, run.best_metric, run.best_mode)
        if chosen is None:
            raise CheckpointError(
                f"{folder} has no best step: no checkpoint was saved with a metric."
            )
    if chosen not in saved:
        raise CheckpointError(f"{folder} has no step {step}. Got: steps {saved}.")
    return chosen, [other for other in saved if other != chosen]
