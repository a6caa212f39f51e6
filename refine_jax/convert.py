"""Convert models between PyTorch (Hugging Face folders) and JAX (Orbax), bit for bit.

    python -m refine_jax.convert from_hf SRC DST     a Hugging Face folder -> a model checkpoint
    python -m refine_jax.convert to_hf   SRC DST     a model checkpoint or a training run -> back

SRC of `from_hf` holds config.json, the weights (safetensors, one file or shards; pytorch_model.bin
needs the extra [torch]) and tokenizer files. DST is what `config.model.checkpoint` takes. SRC of
`to_hf` may also be the work folder of a training run.

What a folder holds and no model of ours uses is printed ("not used: ..."); what would change the
function, weights that are not finite, and links that leave the folder are refused by name.
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from refine_jax.base.errors import CheckpointError, run_command
from refine_jax.base.files import local_path, short
from refine_jax.checkpoint import (
    load_model,
    read_hf,
    save_model,
    write_hf,
)
from refine_jax.checkpoint.folders import CONFIG, check_free
from refine_jax.commands import ArgumentParser

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def from_hf(src: str, dst: str, *, overwrite: bool = False, allow_nonfinite: bool = False) -> str:
    """Convert a Hugging Face folder to a model checkpoint.

    allow_nonfinite: take weights that are NaN or infinite.
    Returns a line that says what was written, and lines on what was left out.
    """
    source, target = _paths(src, dst, overwrite)
    model = read_hf(source, allow_nonfinite=allow_nonfinite)
    save_model(target, model.params, model.config_json, model.files, overwrite=overwrite)
    lines = [_summary(model.tensors, model.params, dst)]
    return "\n".join([*lines, *(f"not used: {line}" for line in model.left_out)])


def to_hf(
    src: str,
    dst: str,
    *,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    dtype: str | None = None,
    step: int | str = "latest",
) -> str:
    """Convert a checkpoint to a Hugging Face folder; returns a line that says what.

    dtype: cast the parameters ("float32", "bfloat16", "float16") and say so in config.json.
    step: of a training run: "latest", "best" or a number. allow_nonfinite: write parameters that
    are NaN or infinite, or become so in `dtype`.
    """
    source, target = _paths(src, dst, overwrite)
    model = load_model(source, step=step, dtype=dtype)
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
    return _summary(tensors, model.params, dst)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = vars(_parser().parse_args(arguments))
    # A conversion moves bytes: leave accelerators (and the time they take to start) alone.
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.FATAL)  # Orbax logs what its errors say
    convert = options.pop("convert")

    def work() -> None:
        with np.errstate(over="ignore"):  # of a cast, whose infinite values are named
            print(convert(**options))

    return run_command(work)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m refine_jax.convert", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="from_hf | to_hf")
    for function, title in ((from_hf, "PyTorch -> JAX"), (to_hf, "JAX -> PyTorch")):
        command = commands.add_parser(function.__name__, help=title, description=title)
        command.set_defaults(convert=function)
        command.add_argument("src", metavar="SRC", help="folder to read")
        command.add_argument("dst", metavar="DST", help="folder to write; must not exist")
        command.add_argument("--overwrite", action="store_true", help="replace a model at DST")
        command.add_argument(
            "--allow_nonfinite",
            action="store_true",
            help="convert weights that are NaN or infinite (default: refuse and name them)",
        )
    command.add_argument(
        "--max_shard_size",
        dest="max_shard_bytes",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="cut larger weights into shards (bytes, or a number with KB, MB, GB; default 5GB)",
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="cast the parameters (default: as they are)",
    )
    command.add_argument(
        "--step",
        type=step_argument,
        default="latest",
        help="of a training run: latest (default), best, or a number",
    )
    return parser


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * _UNITS[(match[2] or "").upper()] if match else 0
    if not 1 <= size < math.inf:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB or 500MB, got {short(text)}")
    return int(size)


def step_argument(text: str) -> int | str:
    """The step of a run, as command lines take it: "latest", "best" or a number."""
    if text in ("latest", "best"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected latest, best or a number, got {text!r}")
    return int(text)


def _paths(src: str, dst: str, overwrite: bool) -> tuple[Path, Path]:
    """SRC and DST as paths; raises CheckpointError for a wrong DST before any work is done."""
    source, target = (local_path(*named, CheckpointError) for named in ((src, "SRC"), (dst, "DST")))
    real, written = (Path(os.path.realpath(path)) for path in (source, target))
    if real.is_relative_to(written):
        raise CheckpointError(f"{dst} is SRC itself, or holds it: choose another DST.")
    run = real / "checkpoints"  # a run's work folder may take models beside them
    if written.is_relative_to(run if (run / CONFIG).is_file() else real):
        raise CheckpointError(f"{dst} is inside of SRC: choose another DST.")
    check_free(target, overwrite=overwrite)
    return source, target


def _summary(tensors: int, params: dict, dst: str) -> str:
    leaves = jax.tree.leaves(params)
    total = sum(leaf.size for leaf in leaves)
    dtypes = ", ".join(sorted({jnp.dtype(leaf.dtype).name for leaf in leaves}))
    return f"{dst}: {tensors} tensors, {total:,} parameters, {dtypes}"


if __name__ == "__main__":
    sys.exit(main())
