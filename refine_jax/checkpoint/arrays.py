"""Named arrays in an Orbax folder, with fingerprints that are checked on reading.

Orbax reads and writes many arrays side by side in an event loop that it closes at the first
failure. The others go on, and the threads of the storage drivers and the garbage collector would
print a traceback for each of them. Here a failure is raised, and says nothing by itself.
"""

import asyncio
import contextlib
import functools
import logging
import os
import sys
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from refine_jax.base.errors import CheckpointError, UserError
from refine_jax.checkpoint.streams import (
    BLOCK,
    Streamed,
    block_ranges,
    chunk_shape,
    index_of,
    streamed,
)
from refine_jax.checkpoint.tree import block_fingerprint, differences, fingerprints

_FINGERPRINTS, _DIGESTS = "fingerprints", "digests"
ROOM = 2 * BLOCK  # bytes of blocks that are written side by side
LOOP_SECONDS = 30.0  # within which the tasks that are left when a loop closes have to end


def save_args(
    named: Mapping[str, Any], digests: Mapping[str, str] | None = None
) -> ocp.args.CheckpointArgs:
    """Make what Orbax needs to save arrays by name, with their fingerprints.

    digests: of what else they belong to, by name; compared on reading.
    """
    notes = {_FINGERPRINTS: fingerprints(named), _DIGESTS: dict(digests or {})}
    return ocp.args.StandardSave(dict(named), custom_metadata=notes)


def write_arrays(folder: epath.PathLike, named: Mapping[str, Any]) -> None:
    """Write arrays by name to an Orbax folder, which is replaced if it is there.

    What is in no jax.Array is written in blocks: `Streamed` is never in memory as a whole.
    """
    quiet_orbax()
    named = {
        name: leaf if isinstance(leaf, jax.Array) else streamed(leaf)
        for name, leaf in named.items()
    }
    handlers = ocp.type_handlers.create_type_handler_registry(
        (Streamed, _BlockHandler()),
        (jax.Array, ocp.type_handlers.get_type_handler(jax.Array)),
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)
    args = ocp.args.PyTreeSave(named, custom_metadata={_FINGERPRINTS: fingerprints(named)})
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(epath.Path(folder), args=args, force=True)


class _BlockHandler(ocp.type_handlers.NumpyHandler):
    """Writes `Streamed` as Orbax writes numpy arrays, but in chunks, of which few are in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes, self._changed = 0, asyncio.Condition()

    async def _open_and_write(self, value: Streamed, tspec: dict, ts_context: ts.Context) -> None:
        chunk = chunk_shape(value.shape, value.dtype.itemsize)
        tspec["metadata"]["chunks"] = chunk
        array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        blocks = value.read()
        for _ in block_ranges(value.shape, value.dtype.itemsize):
            async with self._room(min(BLOCK, value.nbytes)):
                start, values = next(blocks)
                part = array[index_of(value.shape, start, start + values.size)]
                values = values.reshape(part.shape)
                await part.write(values, can_reference_source_data_indefinitely=True)
                del values

    @contextlib.asynccontextmanager
    async def _room(self, size: int) -> AsyncIterator[None]:
        """Wait until the blocks that are being written leave room for `size` bytes."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._bytes or self._bytes + size <= ROOM)
            self._bytes += size
        try:
            yield
        finally:
            async with self._changed:
                self._bytes -= size
                self._changed.notify_all()


def read_arrays(
    folder: epath.PathLike,
    abstract: Mapping[str, Any],
    *,
    part: str = "",
    digests: Mapping[str, str | None] | None = None,
    in_memory: bool = True,
    fix: str,
) -> dict[str, Any]:
    """Read arrays by name.

    abstract: for each name a `jax.ShapeDtypeStruct`. With a sharding it is read as a jax.Array
        placed so, without one as a numpy array; the dtype is that of the file.
    part: read the arrays whose names begin so, and leave the others alone.
    digests: of files beside them, {path: digest, None where there is none}. Those that were saved
        under the name of such a file are compared.
    in_memory: read the arrays now; else return them as `Streamed`, whose values are checked when
        they have been read.
    fix: what the user can do about a damaged folder; ends the error message.

    Raises CheckpointError: the folder is damaged, does not hold exactly what `abstract` names, or
    was saved beside other files.
    """
    folder = epath.Path(folder)
    quiet_orbax()
    try:
        metadata = ocp.PyTreeCheckpointHandler().metadata(folder)
        stored = {name: leaf for name, leaf in metadata.tree.items() if name.startswith(part)}
        shapes = {name: tuple(leaf.shape) for name, leaf in stored.items()}
        recorded = metadata.custom_metadata[_FINGERPRINTS]
        beside = dict(metadata.custom_metadata.get(_DIGESTS, {}))  # versions before saved none
    except Exception as error:  # Orbax lets through whatever its parsers and drivers raise.
        raise damaged(folder, error, fix) from None
    for path, known in (digests or {}).items():
        if beside.get(epath.Path(path).name, known) == known:
            continue
        if epath.Path(path).parent == folder.parent:
            raise damaged(path, "it is not the one that was saved", fix)
        raise CheckpointError(
            f"{path} {'is missing' if known is None else 'was changed'}: {folder.parent} was saved "
            "with another one, which decides what it computes. Put that back from a copy."
        )
    wrong = differences({name: tuple(leaf.shape) for name, leaf in abstract.items()}, shapes)
    if wrong:
        raise CheckpointError(
            f"{folder} does not hold what the configuration asks for:\n  " + "\n  ".join(wrong)
        )
    if not in_memory:
        return {
            name: _stored(folder, name, leaf, recorded.get(name), fix)
            for name, leaf in stored.items()
        }
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
        actual = fingerprints(arrays)
        changed = [name for name in arrays if actual[name] != recorded.get(name)]
    except Exception as error:
        raise damaged(folder, error, fix) from None
    if changed:
        raise damaged(folder, f"the values of {', '.join(changed)} are not those saved", fix)
    return arrays


def _stored(folder: epath.Path, name: str, leaf: Any, recorded: int | None, fix: str) -> Streamed:
    """Make an array that is read from an Orbax folder chunk by chunk, in the order of memory."""
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    path = str(folder)
    base = f"{path}/" if "://" in path else f"file://{urllib.parse.quote(path)}/"
    store = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": name}}

    def read() -> Iterator[tuple[int, np.ndarray]]:
        total = 0
        try:
            array = ts.open(store, open=True, read=True).result()
            chunk = array.chunk_layout.read_chunk.shape
            for start, stop in block_ranges(shape, dtype.itemsize, chunk):
                values = array[index_of(shape, start, stop)].read().result().reshape(-1)
                total += block_fingerprint(values, start)
                yield start, values
        except Exception as error:
            raise damaged(folder, error, fix) from None
        if total % 2**32 != recorded:
            raise damaged(folder, f"the values of {name} are not those saved", fix)

    return Streamed(shape, dtype, read, recorded)


def damaged(folder: epath.PathLike, reason: Any, fix: str) -> CheckpointError:
    """Make the error for a checkpoint that is corrupt or incomplete, in one line."""
    if isinstance(reason, Exception):
        reason = shorten(reason)
    return CheckpointError(f"{folder} is corrupt or incomplete ({reason}). {fix}")


def shorten(error: Exception) -> str:
    """Say an error of storage in one line: drivers chain the status of every layer."""
    text = " ".join(str(error).split()).split(" See full TensorStore details")[0]
    if isinstance(error, UserError):
        return text.removesuffix(".")
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


def _restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape)


def quiet_orbax() -> None:
    """Let event loops finish their tasks before they close; hide Orbax's warnings and failures.

    Call it before Orbax saves or restores; more than once is as good as once.
    """
    logging.getLogger("absl").addFilter(_is_wanted)
    policy = asyncio.get_event_loop_policy()
    if getattr(policy.new_event_loop, "func", None) is not _new_event_loop:
        policy.new_event_loop = functools.partial(_new_event_loop, policy.new_event_loop)


def _new_event_loop(make: Callable[[], asyncio.AbstractEventLoop]) -> asyncio.AbstractEventLoop:
    loop = make()
    loop.close = functools.partial(_close, loop, loop.close)
    return loop


def _close(loop: asyncio.AbstractEventLoop, close: Callable[[], None]) -> None:
    interrupted = not isinstance(sys.exception(), Exception | None)
    try:
        if not (interrupted or loop.is_closed() or loop.is_running()):
            tasks = asyncio.all_tasks(loop)
            if tasks:
                loop.run_until_complete(asyncio.wait(tasks, timeout=LOOP_SECONDS))
    finally:
        # Tasks that end still later, or have failed unseen, have nobody left to tell.
        loop.set_exception_handler(_ignore)
        loop.call_soon_threadsafe = _ignore
        close()


def _ignore(*_: Any, **__: Any) -> None:
    pass


def _is_wanted(record: logging.LogRecord) -> bool:
    # Orbax's warnings are advice on how this package uses it, such as after a second's wait.
    unwanted = record.exc_info or record.levelno == logging.WARNING
    return not (unwanted and f"{os.sep}orbax{os.sep}" in record.pathname)
