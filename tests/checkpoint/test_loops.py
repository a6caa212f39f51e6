"""What Orbax's threads would print when a save or a restore fails: nothing, the command says it."""

import asyncio
import gc
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from refine_jax.base.errors import CheckpointError
from refine_jax.checkpoint import arrays
from refine_jax.checkpoint.arrays import read_arrays, write_arrays

# So many arrays that others are under way when the first one fails.
ARRAYS = {f"w{i}": np.full((200, 300), i, np.float32) for i in range(40)}


def truncate(folder: Path) -> None:
    """Cut the files of the arrays in half."""
    for path in (folder / "d").iterdir():
        os.truncate(path, path.stat().st_size // 2)


def test_commands_say_one_message_of_a_damaged_checkpoint(tmp_path):
    """Several at once, so that their threads are late in every way."""
    config = {"model_type": "delta_net", "hidden_size": 64, "num_heads": 1, "vocab_size": 259}
    config |= {"num_hidden_layers": 2, "intermediate_size": 64}
    script = f"""
        import json, sys
        import jax
        from refine_jax.checkpoint import save_model
        from refine_jax.models.config import model_config
        from refine_jax.models.transformer import Model
        config = json.loads({json.dumps(config)!r})
        params = jax.jit(Model(model_config(config)).init)(jax.random.key(0))
        save_model({str(tmp_path / "model")!r}, params, json.dumps(config))
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    made = [sys.executable, "-c", textwrap.dedent(script)]
    subprocess.run(made, env=environment, check=True, timeout=120)
    truncate(tmp_path / "model" / "params")
    command = [sys.executable, "-m", "refine_jax.generate", "--prompt=x", "--tokenizer=bytes"]
    command.append(f"--checkpoint={tmp_path / 'model'}")
    pipe = subprocess.PIPE
    runs = [
        subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
        for _ in range(3)
    ]
    for run in runs:
        out, err = run.communicate(timeout=120)
        assert (run.returncode, out) == (1, "")
        # A busy machine may be told that it compiles; then there is one message.
        (message,) = [line for line in err.splitlines() if not line.startswith("compiling ")]
        assert message.startswith(f"error: {tmp_path / 'model/params'} is corrupt or incomplete")


def test_a_restore_that_fails_leaves_no_task_behind(tmp_path, capfd, monkeypatch):
    """In one process, many times over; nothing is printed, nor left to the garbage collector."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    monkeypatch.setattr(threading, "excepthook", said.append)
    write_arrays(tmp_path / "arrays", ARRAYS)
    truncate(tmp_path / "arrays")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for sharding in (None, device) * 4:
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for name, leaf in ARRAYS.items()
        }
        with pytest.raises(CheckpointError, match="corrupt or incomplete"):
            read_arrays(tmp_path / "arrays", wanted, fix="Copy it again.")
        gc.collect()
    assert said == []
    assert capfd.readouterr() == ("", "")


def test_a_loop_ends_its_tasks_before_it_closes():
    arrays.quiet_orbax()
    ended = []

    async def late() -> None:
        await asyncio.sleep(0.05)
        ended.append(1)
        raise OSError("nobody asks for it")

    async def fail() -> None:
        await asyncio.gather(late(), asyncio.wait_for(asyncio.Future(), 0.01))

    loop = asyncio.new_event_loop()
    with pytest.raises(TimeoutError):
        try:
            loop.run_until_complete(fail())
        finally:
            loop.close()
    assert ended == [1] and loop.is_closed()
    loop.call_soon_threadsafe(ended.clear)  # a thread that is later still
    assert ended == [1]


def test_a_loop_does_not_wait_for_ever_nor_after_an_interrupt(monkeypatch, caplog):
    arrays.quiet_orbax()
    monkeypatch.setattr(arrays, "LOOP_SECONDS", 0.2)

    async def begin(failure: BaseException) -> None:
        asyncio.get_running_loop().kept = asyncio.ensure_future(asyncio.sleep(1000))
        await asyncio.sleep(0)  # it begins
        raise failure

    for failure, least, most in ((OSError(), 0.2, 5), (KeyboardInterrupt(), 0, 0.15)):
        loop = asyncio.new_event_loop()
        began = time.monotonic()
        with pytest.raises(type(failure)):
            try:
                loop.run_until_complete(begin(failure))
            finally:
                loop.close()
        assert least <= time.monotonic() - began < most
        del loop
        gc.collect()
    assert caplog.records == []  # "Task was destroyed but it is pending"


def test_what_orbax_logs_of_waits_and_failures_is_not_shown():
    """It is raised; and a second's wait on a busy machine is nothing to act on."""
    arrays.quiet_orbax()
    theirs = Path("/site-packages/orbax/checkpoint/_src/futures/future.py")
    ours = Path("/refine_jax/checkpoint/manager.py")
    fault = (OSError, OSError("full"), None)
    shown = []
    for path, level, error in (
        (theirs, logging.WARNING, None),
        (theirs, logging.ERROR, fault),
        (theirs, logging.ERROR, None),
        (ours, logging.WARNING, None),
        (ours, logging.ERROR, fault),
    ):
        record = logging.LogRecord("absl", level, str(path), 1, "waited", (), error)
        if logging.getLogger("absl").filter(record):
            shown.append((path, level))
    assert shown == [(theirs, logging.ERROR), (ours, logging.WARNING), (ours, logging.ERROR)]


def test_loops_are_made_as_before_only_once():
    arrays.quiet_orbax()
    make = asyncio.get_event_loop_policy().new_event_loop
    arrays.quiet_orbax()
    assert asyncio.get_event_loop_policy().new_event_loop is make
    assert asyncio.run(asyncio.sleep(0, "as ever")) == "as ever"
