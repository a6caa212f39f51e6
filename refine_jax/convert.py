"""Convert models between PyTorch (Hugging Face folders) and JAX (Orbax), bit for bit.

from_hf makes a checkpoint, which `config.model.checkpoint` takes, of a folder with config.json, the
weights (safetensors, one file or shards; pytorch_model.bin needs the extra [torch]) and tokenizer
files, or of hf://ORG/NAME[@REVISION], a model on the Hugging Face hub. to_hf makes such a folder of
a model checkpoint or of a training run's work folder, and with --push puts it there.

A run that trains low-rank updates becomes an adapter of the peft package, or with --merge a model;
from_hf adds an adapter to the weights of a checkpoint (--base).

What a folder holds and no model of ours uses is printed ("not used: ..."); what would change the
function, weights that are not finite, and links that leave the folder are refused by name.

Examples:

    python -m refine_jax.convert from_hf downloads/LaCT-760M checkpoints/lact-760m
    python -m refine_jax.convert to_hf runs/lact-760m converted/lact --step=best --dtype=bfloat16
    python -m refine_jax.convert to_hf runs/lact-760m converted/lact --push=ORG/NAME
"""

import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
from absl import logging

from refine_jax.base.errors import CheckpointError, ConfigError
from refine_jax.base.files import given_path, local_path, short
from refine_jax.base.hub import is_hub, model_repository, repository_name
from refine_jax.commands import Command, Options, step_argument

# What takes long to import, jax above all, is imported where it is used: help comes at once.

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def from_hf(
    src: str,
    dst: str,
    *,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    base: str | None = None,
) -> str:
    """Convert a Hugging Face folder, or an adapter of the peft package, to a model checkpoint.

    allow_nonfinite: take weights that are NaN or infinite. base: the checkpoint or run to whose
    weights an adapter is added.
    Returns a line that says what was written, and lines on what was left out.
    """
    from refine_jax.checkpoint import load_model, read_hf, save_model
    from refine_jax.checkpoint.peft import is_adapter

    source, target = _paths(src, dst, overwrite, from_hub=True)
    if is_adapter(source):
        if base is None:
            raise CheckpointError(
                f"{src} is an adapter: name the checkpoint that it belongs to, --base=DIR, as "
                "from_hf made it of the model."
            )
        added = load_model(base, adapter=source)
        save_model(target, added.params, added.config_json, added.files, overwrite=overwrite)
        return _summary(len(added.params), added.params, dst)
    if base is not None:
        raise CheckpointError(f"--base is for an adapter, which {src} is not.")
    model = read_hf(source, allow_nonfinite=allow_nonfinite, in_memory=False)
    save_model(target, model.params, model.config_json, model.files, overwrite=overwrite)
    lines = [_summary(model.tensors, model.params, dst)]
    return "\n".join([*lines, *(f"not used: {line}" for line in model.left_out)])


def to_hf(
    src: str,
    dst: str,
    *,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    max_shard_bytes: int | None = None,
    dtype: str | None = None,
    step: int | str = "latest",
    merge: bool = False,
    base: str | None = None,
    push: str | None = None,
) -> str:
    """Convert a checkpoint to a Hugging Face folder; returns lines that say what.

    Of a run that trains low-rank updates it is an adapter of the peft package.

    max_shard_bytes: cut larger weights into shards; None: as those of a hybrid model were,
    else 5 GB. dtype: cast the parameters ("float32", "bfloat16", "float16") and say so there.
    step: of a training run: "latest", "best" or a number. allow_nonfinite: write parameters that
    are NaN or infinite, or become so in `dtype`. merge: add low-rank updates to the weights. base:
    name or path of the model that an adapter says it belongs to; None: what the run started from.
    push: put the folder and a model card into the repository ORG/NAME on the hub, as one commit;
    one that is not there is made, private. The folder stays whatever becomes of that.
    """
    from refine_jax.checkpoint import hub, load_model, write_hf
    from refine_jax.checkpoint.card import hub_name
    from refine_jax.checkpoint.model import is_published
    from refine_jax.checkpoint.peft import write_adapter
    from refine_jax.models.config import model_config

    if push is not None:
        push = repository_name(push, "--push", CheckpointError)
        local_path(dst, "DST, which --push sends on,", CheckpointError)
    source, target = _paths(src, dst, overwrite)
    if is_published(source):
        raise CheckpointError(
            f"{src} is a Hugging Face folder already. A checkpoint of this package is made of it "
            "by `python -m refine_jax.convert from_hf SRC DST`."
        )
    if push is not None:
        hub.prepare_push(push)
    model = load_model(source, step=step, dtype=dtype, merge=merge, in_memory=False)
    if model.lora is not None:
        config = model_config(model.config)
        name = hub_name(model.base if base is None else base)
        if push is not None and base is None and not is_hub(model.base):
            raise CheckpointError(
                "--push of an adapter needs --base=ORG/NAME, the model that others find it with. "
                f"Got: a run that started from {model.base or 'random weights'!r}."
            )
        tensors = write_adapter(
            target, model.params, model.lora, config, base=name, overwrite=overwrite
        )
        line = f"{dst}: {tensors} tensors of low-rank updates, rank {model.lora.rank}"
        return _pushed(line, push, source, target, model)
    config_json = model.config_json
    if dtype is not None:
        name = "dtype" if "dtype" in model.config else "torch_dtype"
        config_json = json.dumps(model.config | {name: dtype}, indent=2, sort_keys=True) + "\n"
    tensors = write_hf(
        target,
        model.params,
        config_json,
        model.files,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
    )
    return _pushed(_summary(tensors, model.params, dst), push, source, target, model)


def _pushed(line: str, name: str | None, source: Path, target: Path, model) -> str:
    """Push a folder, if it is to be; returns the line on what was written, and the commit's."""
    if name is None:
        return line
    from refine_jax.checkpoint import hub
    from refine_jax.checkpoint.card import model_card

    count, dtypes = _sizes(model.params)
    card = model_card(name, source, model, dtypes, count)
    return f"{line}\npushed: {hub.push(target, name, card)}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command().run(run, arguments, imports=("jax", "refine_jax.checkpoint"))


def run(options: Options) -> None:
    """Do what the command line asks for; prints what was written."""
    import jax

    # A conversion moves bytes: leave accelerators (and the time they take to start) alone.
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.FATAL)  # Orbax logs what its errors say
    given = {name: getattr(options, name) for name in ("overwrite", "allow_nonfinite", "base")}
    if options.direction == "to_hf":
        given |= {"max_shard_bytes": options.max_shard_size, "dtype": options.dtype}
        given |= {"step": options.step, "merge": options.merge, "push": options.push}
    elif options.direction != "from_hf":
        raise ConfigError(f"from_hf or to_hf comes first. Got: {short(options.direction)}.")
    else:
        for name in ("max_shard_size", "dtype", "step", "merge", "push"):
            if name in options.given:
                raise ConfigError(f"--{name} goes with to_hf.")
    convert = {"from_hf": from_hf, "to_hf": to_hf}[options.direction]
    with np.errstate(over="ignore"):  # of a cast, whose infinite values are named
        print(convert(options.src, options.dst, **given))


def command() -> Command:
    """The command, its flags and its page of help."""
    words = {"SRC": "folder to read", "DST": "folder to write; must not exist"}
    made = Command(
        "refine_jax.convert",
        __doc__,
        "from_hf|to_hf SRC DST",
        words={"DIRECTION": "from_hf | to_hf: PyTorch -> JAX, or back", **words},
    )
    made.group("both ways")
    made.flag("overwrite", "replace a model at DST", bool, default=False)
    made.flag(
        "allow_nonfinite",
        "convert weights that are NaN or infinite (else they are refused by name)",
        bool,
        default=False,
    )
    made.flag("base", "adapter: from_hf adds it to this checkpoint; to_hf names it", metavar="DIR")
    made.group("to_hf")
    made.flag(
        "max_shard_size",
        "cut larger weights into shards: bytes, or a number with KB, MB, GB (default: as a hybrid "
        "model's were, else 5GB)",
        _size,
        metavar="SIZE",
    )
    dtypes = ("float32", "bfloat16", "float16")
    made.flag("dtype", "cast the parameters (default: as they are)", choices=dtypes)
    made.flag("step", "of a run: latest, best, or a number", step_argument, default="latest")
    made.flag("merge", "add low-rank updates to the weights", bool, default=False)
    made.flag("push", "put it on the Hugging Face hub, with a model card", metavar="ORG/NAME")
    return made


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * _UNITS[(match[2] or "").upper()] if match else 0
    if not 1 <= size < math.inf:
        raise ValueError(f"expected a size such as 5GB or 500MB, got {short(text)}")
    return int(size)


def _paths(src: str, dst: str, overwrite: bool, *, from_hub: bool = False) -> tuple[Path, Path]:
    """SRC and DST as paths; a SRC on the hub is fetched where `from_hub` allows it.

    Raises CheckpointError for a wrong DST before any work is done.
    """
    from refine_jax.checkpoint.folders import CONFIG, check_free
    from refine_jax.checkpoint.hub import fetch

    target = given_path(dst, "DST", CheckpointError, write=True)
    if is_hub(src) and from_hub:
        model_repository(src, "SRC", CheckpointError)
        check_free(target, overwrite=overwrite)
        return fetch(src, "SRC"), target
    source = given_path(src, "SRC", CheckpointError, write=True)
    real, written = map(_real, (source, target))
    if real.is_relative_to(written):
        raise CheckpointError(f"{dst} is SRC itself, or holds it: choose another DST.")
    run = real / "checkpoints"  # a run's work folder may take models beside them
    if written.is_relative_to(run if (run / CONFIG).is_file() else real):
        raise CheckpointError(f"{dst} is inside of SRC: choose another DST.")
    check_free(target, overwrite=overwrite)
    return source, target


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path)) if isinstance(path, Path) else path


def _summary(tensors: int, params: dict, dst: str) -> str:
    total, dtypes = _sizes(params)
    return f"{dst}: {tensors} tensors, {total:,} parameters, {dtypes}"


def _sizes(params: dict) -> tuple[int, str]:
    """How many parameters there are, and the names of their dtypes."""
    import jax

    leaves = jax.tree.leaves(params)
    return sum(leaf.size for leaf in leaves), ", ".join(sorted({x.dtype.name for x in leaves}))


if __name__ == "__main__":
    sys.exit(main())
