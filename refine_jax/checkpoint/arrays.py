"""Named arrays in an Orbax folder, with fingerprints that are checked on reading."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from refine_jax.base.errors import CheckpointError
from refine_jax.checkpoint.tree import differences, fingerprints

_FINGERPRINTS = "fingerprints"


def save_args(named: Mapping[str, Any]) -> ocp.args.CheckpointArgs:
    """What Orbax needs to save arrays by name, their fingerprints with them."""
    return ocp.args.StandardSave(dict(named), custom_metadata={_FINGERPRINTS: fingerprints(named)})


def write_arrays(folder: epath.PathLike, named: Mapping[str, Any]) -> None:
    """Write arrays by name to a new Orbax folder."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(epath.Path(folder), args=save_args(named))


def read_arrays(
    folder: epath.PathLike, abstract: Mapping[str, Any], *, part: str = "", fix: str
) -> dict[str, Any]:
    """Read arrays by name.

    abstract: for each name a `jax.ShapeDtypeStruct`. With a sharding it is read as a jax.Array
        placed so, without one as a numpy array; the dtype is that of the file.
    part: read the arrays whose names begin so, and leave the others alone.
    fix: what the user can do about a damaged folder; ends the error message.

    Raises:
      CheckpointError: The folder is damaged, or does not hold exactly what `abstract` names.
    """
    folder = epath.Path(folder)
    try:
        metadata = ocp.PyTreeCheckpointHandler().metadata(folder)
        stored = {name: leaf for name, leaf in metadata.tree.items() if name.startswith(part)}
        shapes = {name: tuple(leaf.shape) for name, leaf in stored.items()}
        recorded = metadata.custom_metadata[_FINGERPRINTS]
    except Exception as error:  # Orbax lets through whatever its parsers and drivers raise.
        raise damaged(folder, error, fix) from None
    wrong = differences({name: tuple(leaf.shape) for name, leaf in abstract.items()}, shapes)
    if wrong:
        raise CheckpointError(
            f"{folder} does not hold what the configuration asks for:\n  " + "\n  ".join(wrong)
        )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            arrays = checkpointer.restore(
                folder,
                args=ocp.args.PyTreeRestore(
                    item=stored,
                    restore_args={name: _restore_args(abstract[name]) for name in stored},
                    partial_restore=True,
                ),
            )
        found = fingerprints(arrays)
        changed = [name for name in arrays if found[name] != recorded.get(name)]
    except Exception as error:
        raise damaged(folder, error, fix) from None
    if changed:
        raise damaged(folder, f"the values of {', '.join(changed)} are not those saved", fix)
    return arrays


def damaged(folder: epath.PathLike, reason: Any, fix: str) -> CheckpointError:
    """The error for a checkpoint that is corrupt or incomplete, in one line."""
    if isinstance(reason, Exception):
        # Storage drivers chain every layer's status into one very long line.
        text = " ".join(str(reason).split()).split(" See full TensorStore details")[0]
        reason = f"{type(reason).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"
    return CheckpointError(f"{folder} is corrupt or incomplete ({reason}). {fix}")


def _restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape)
