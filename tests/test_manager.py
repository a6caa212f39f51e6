"""Checkpoints of training runs: exact, atomic, asynchronous, and clear when they are damaged."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refine_jax.base.errors import CheckpointError
from refine_jax.checkpoint import CheckpointManager, tree

CONFIG = json.dumps({"model_type": "delta_net", "hidden_size": 8})


def make_state(seed: int = 0, rows: int = 64) -> dict:
    """A state with all that training states hold: nested params, optimizer, keys, counters."""
    key = jax.random.key(seed)
    params = {
        "layers": {"attn": {"weight": jax.random.normal(key, (3, rows, 16))}},
        "norm": {"weight": jax.random.normal(key, (16,), jnp.bfloat16)},
    }
    return {
        "params": params,
        "opt_state": optax.adamw(1e-3).init(params),
        "key": key,
        "mask": jnp.array([True, False]),
        "step": jnp.int32(seed),
    }


def abstract(state):
    return jax.eval_shape(lambda: state)


def bits(leaf) -> bytes:
    leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return np.asarray(leaf).tobytes()


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert bits(a) == bits(b)


def open_manager(path: Path, **options) -> CheckpointManager:
    return CheckpointManager(path, config_json=CONFIG, **options)


def data_file(step: Path) -> Path:
    """The file that holds the bulk of a step's arrays."""
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_state_data_and_files_come_back_exactly(tmp_path):
    tokenizer = tmp_path / "mistral.model"
    tokenizer.write_bytes(b"\x00pieces\r\n")
    state, data = make_state(3), {"epoch": 1, "offsets": [4, None, "x"]}
    with open_manager(
        tmp_path / "run", run_config={"a": 1}, files={"tokenizer.model": tokenizer}
    ) as manager:
        assert manager.restore_latest(abstract(state)) is None
        assert manager.save(7, state, data, {"loss": 1.5}, force=True)
    with open_manager(tmp_path / "run") as manager:
        restored = manager.restore_latest(abstract(state))
    assert (restored.step, restored.data_state) == (7, data)
    assert_same(restored.state, state)
    key = restored.state["key"]
    assert jax.random.key_impl(key) == jax.random.key_impl(state["key"])
    np.testing.assert_array_equal(jax.random.bits(key, (4,)), jax.random.bits(state["key"], (4,)))
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    assert (tmp_path / "run" / "config.json").read_text() == CONFIG


def test_a_save_is_a_snapshot_although_the_state_is_donated(tmp_path):
    """The arrays are overwritten in place right after `save` returns, while it still writes."""
    state = {"w": jnp.arange(2_000_000, dtype=jnp.float32)}
    want = np.array(state["w"])
    update = jax.jit(lambda s: {"w": -s["w"] - 1}, donate_argnums=0)
    with open_manager(tmp_path) as manager:
        manager.save(1, state, force=True)
        for _ in range(3):
            state = update(state)
        jax.block_until_ready(state)
        restored = manager.restore(1, abstract(state)).state
    np.testing.assert_array_equal(restored["w"], want)


def test_restores_onto_another_sharding(tmp_path):
    """Saved from one layout of four devices, restored to others."""
    script = f"""
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from refine_jax.checkpoint import CheckpointManager, tree
        devices = np.array(jax.devices())
        assert devices.size == 4
        place = lambda n, spec: NamedSharding(Mesh(devices[:n], "x"), spec)
        w = jnp.arange(64 * 6, dtype=jnp.float32).reshape(64, 6)
        key = jax.device_put(jax.random.key(5), place(4, P()))
        sharded = jax.device_put(w, place(4, P("x")))
        assert int(tree._device_fingerprint(sharded)) == tree._host_fingerprint(np.asarray(w))
        manager = CheckpointManager({str(tmp_path)!r}, config_json="{{}}")
        manager.save(1, dict(w=sharded, key=key), force=True)
        for sharding in (place(2, P(None, "x")), place(1, P())):
            goal = dict(
                w=jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding),
                key=jax.ShapeDtypeStruct((), key.dtype, sharding=sharding.update(spec=P())),
            )
            got = manager.restore_latest(goal).state
            assert got["w"].sharding.is_equivalent_to(sharding, 2), got["w"].sharding
            np.testing.assert_array_equal(got["w"], w)
            assert got["key"].sharding.device_set == sharding.device_set
            np.testing.assert_array_equal(
                jax.random.key_data(got["key"]), jax.random.key_data(jax.random.key(5))
            )
        manager.close()
    """
    run_python(script, XLA_FLAGS="--xla_force_host_platform_device_count=4")


def run_python(script: str, expect: int = 0, **environment) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == expect, done.stderr[-3000:]


def test_interval_keep_and_best(tmp_path):
    state = make_state(rows=2)
    options = {"save_every": 10, "keep": 2, "best_metric": "loss"}
    with open_manager(tmp_path, **options) as manager:
        losses = {10: 3.0, 20: 1.0, 30: float("nan"), 40: 2.0, 50: 2.5}
        for step in range(5, 55, 5):
            saved = manager.save(step, state, metrics={"loss": losses.get(step, 9.0)})
            assert saved == (step % 10 == 0)
        assert manager.steps() == [20, 40, 50]
        assert manager.best_step() == 20
        assert not manager.save(55, state)
        assert manager.save(55, state, force=True)
        assert manager.steps() == [20, 50, 55]
    with open_manager(tmp_path, **options) as manager:
        assert manager.best_step() == 20
        assert manager.save(50, state, force=True), "a step that is there stays as it is"


def test_a_higher_best_metric(tmp_path):
    options = {"keep": 1, "best_metric": "accuracy", "best_mode": "max"}
    with open_manager(tmp_path, **options) as manager:
        for step, accuracy in ((1, 0.1), (2, 0.7), (3, 0.6)):
            manager.save(step, make_state(rows=2), metrics={"accuracy": accuracy}, force=True)
        assert manager.steps() == [2, 3]
        assert manager.best_step() == 2


def test_damaged_metrics_are_one_clear_message(tmp_path):
    with open_manager(tmp_path, best_metric="loss") as manager:
        manager.save(1, {"w": jnp.ones(2)}, metrics={"loss": 1.0}, force=True)
    (tmp_path / "1" / "metrics" / "metrics").write_text("{")
    with pytest.raises(CheckpointError, match=f"{tmp_path / '1'} is corrupt.*Delete"):
        open_manager(tmp_path, best_metric="loss")


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "metadata", "data"])
def test_a_damaged_checkpoint_is_one_clear_message(tmp_path, damage):
    state = make_state()
    with open_manager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, state, {"at": step}, force=True)
    bulk = data_file(tmp_path / "2")
    content = bulk.read_bytes()
    if damage == "truncate":
        bulk.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        middle = len(content) // 2
        bulk.write_bytes(content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :])
    elif damage == "delete":
        bulk.unlink()
    elif damage == "metadata":
        (tmp_path / "2" / "state" / "_METADATA").write_text("{")
    else:
        (tmp_path / "2" / "data" / "metadata").write_text("{")
    with open_manager(tmp_path) as manager:
        with pytest.raises(CheckpointError) as failure:
            manager.restore_latest(abstract(state))
        assert_same(manager.restore(1, abstract(state)).state, state)
    message = str(failure.value)
    assert str(tmp_path / "2") in message and "corrupt" in message
    assert f"Delete {tmp_path / '2'} to continue from step 1" in message
    assert len(message) < 800 and "\n" not in message
    assert failure.value.__context__ is None or failure.value.__suppress_context__


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "bool"])
def test_fingerprints_agree_on_host_and_device_and_see_every_bit(dtype):
    rng = np.random.default_rng(0)
    array = np.asarray(jnp.asarray(rng.normal(size=(7, 3, 5)) * 9).astype(dtype))
    bits = array.reshape(-1).view(f"uint{8 * array.dtype.itemsize}").astype(object)
    want = sum(int(b) * (2 * i + 1) for i, b in enumerate(bits)) % 2**32
    assert tree._host_fingerprint(array) == tree._host_fingerprint(array, block=10) == want
    assert int(tree._device_fingerprint(array)) == want
    assert tree.fingerprints({"x": jnp.asarray(array), "y": array}) == {"x": want, "y": want}
    if dtype != "bool":
        for _ in range(50):
            raw = bytearray(array.tobytes())
            raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
            changed = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
            assert tree._host_fingerprint(changed) != want


def test_another_state_is_listed_by_name(tmp_path):
    state = make_state()
    with open_manager(tmp_path) as manager:
        manager.save(1, state, force=True)
        other = abstract(state)
        other["params"]["norm"]["weight"] = jax.ShapeDtypeStruct((17,), jnp.bfloat16)
        other["extra"] = other.pop("mask")
        with pytest.raises(CheckpointError) as failure:
            manager.restore_latest(other)
        for line in (
            "params.norm.weight: expected [17], got [16]",
            "extra: missing, expected [2]",
            "mask: unknown, got [2]",
        ):
            assert line in str(failure.value)
        other = abstract(state)
        other["params"]["norm"]["weight"] = jax.ShapeDtypeStruct((16,), jnp.float32)
        with pytest.raises(CheckpointError, match=r"norm\.weight was saved as bfloat16.*float32"):
            manager.restore_latest(other)
        with pytest.raises(CheckpointError, match=r"no step 4\. Got: steps \[1\]"):
            manager.restore(4, abstract(state))


def test_an_interrupted_save_is_no_checkpoint(tmp_path):
    """The process dies when all is written and only the renaming to the final name is missing."""
    script = f"""
        import os, pathlib
        import jax.numpy as jnp
        from refine_jax.checkpoint import CheckpointManager
        manager = CheckpointManager({str(tmp_path)!r}, config_json={CONFIG!r})
        manager.save(1, dict(w=jnp.ones(8)), force=True)
        manager.wait()
        rename = os.rename
        def dies(source, target, **kwargs):
            if pathlib.Path(target).name == "2":
                os._exit(9)
            return rename(source, target, **kwargs)
        os.rename = dies
        manager.save(2, dict(w=jnp.zeros(8)), force=True)
        manager.wait()
    """
    run_python(script, expect=9)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("2.")], "nothing was left"
    with open_manager(tmp_path) as manager:
        assert manager.steps() == [1]
        state = {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}
        np.testing.assert_array_equal(manager.restore_latest(state).state["w"], np.ones(8))
        assert manager.save(2, {"w": jnp.zeros(8)}, force=True)
    assert {p.name for p in tmp_path.iterdir()} == {"1", "2", "config.json", "run.json"}


def test_a_failed_save_is_reported_and_leaves_the_last_one(tmp_path, monkeypatch):
    state = {"w": jnp.ones(8)}
    with open_manager(tmp_path) as manager:
        manager.save(1, state, force=True)
        manager.wait()

        def full(*_args, **_kwargs):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", full)
            manager.save(2, state, force=True)
            with pytest.raises(CheckpointError, match=r"could not be saved.*No space left"):
                manager.wait()
        assert manager.steps() == [1]
        assert manager.save(3, state, {"next": 4}, force=True)
        assert manager.restore_latest(abstract(state)).data_state == {"next": 4}
        with pytest.raises(TypeError, match="JSON"):
            manager.save(4, state, {"iterator": object()}, force=True)


def test_the_data_state_is_a_snapshot(tmp_path):
    state, data = {"w": jnp.ones(8)}, {"next": [1]}
    with open_manager(tmp_path) as manager:
        manager.save(1, state, data, force=True)
        data["next"].append(2)
        assert manager.restore(1, state).data_state == {"next": [1]}


def test_the_folder_of_another_model_is_refused(tmp_path):
    with open_manager(tmp_path):
        pass
    with pytest.raises(CheckpointError, match="another model"):
        CheckpointManager(tmp_path, config_json='{"model_type": "lact_swiglu"}')
    assert (tmp_path / "config.json").read_text() == CONFIG
