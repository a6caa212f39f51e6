"""Checkpoints of training runs: exact, atomic, asynchronous, and clear when they are damaged."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refine_jax.base.errors import CheckpointError
from refine_jax.checkpoint import CheckpointManager, arrays, steps, tree
from refine_jax.checkpoint import manager as manager_module
from refine_jax.checkpoint import model as model_module

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


def best_step(manager):
    """The step that a run's checkpoint is read from where the best one is asked for."""
    manager.wait()
    return model_module._choose_step(manager.directory, "best")[0]


def test_interval_keep_and_best(tmp_path):
    state = make_state(rows=2)
    options = {"save_every": 10, "keep": 2, "best_metric": "loss"}
    with open_manager(tmp_path, **options) as manager:
        losses = {10: 3.0, 20: 1.0, 30: float("nan"), 40: 2.0, 50: 2.5}
        for step in range(5, 55, 5):
            saved = manager.save(step, state, metrics={"loss": losses.get(step, 9.0)})
            assert saved == (step % 10 == 0)
        assert manager.steps() == [20, 40, 50]
        assert best_step(manager) == 20
        assert not manager.save(55, state)
        assert manager.save(55, state, force=True)
        assert manager.steps() == [20, 50, 55]
    with open_manager(tmp_path, **options) as manager:
        assert best_step(manager) == 20
        assert manager.save(50, state, force=True), "a step that is there stays as it is"


def test_a_higher_best_metric(tmp_path):
    options = {"keep": 1, "best_metric": "accuracy", "best_mode": "max"}
    with open_manager(tmp_path, **options) as manager:
        for step, accuracy in ((1, 0.1), (2, 0.7), (3, 0.6)):
            manager.save(step, make_state(rows=2), metrics={"accuracy": accuracy}, force=True)
        assert manager.steps() == [2, 3]
        assert best_step(manager) == 2


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
    flat = array.reshape(-1)
    parts = [tree.block_fingerprint(flat[i : i + 40], i, piece=9) for i in (0, 40, 80)]
    assert tree.fingerprints({"x": array})["x"] == sum(parts) % 2**32 == want
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


@pytest.fixture
def two_steps(tmp_path):
    """A run's folder with steps 1 and 2, and its state."""
    state = make_state(rows=2)
    with open_manager(tmp_path, best_metric="loss") as manager:
        for step in (1, 2):
            manager.save(step, state, {"at": step}, {"loss": 3.0 - step}, force=True)
    return tmp_path, state


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


STRANGE = ("12", "007", "²", "١٢", "-3", "+4", "1" + 30 * "0", "3.0", "best")


def test_what_a_run_did_not_write_is_no_step_and_stays(tmp_path):
    """Folders, files and links with names of steps, of digits that are none, and of other kinds."""
    run, state = tmp_path / "run", make_state(rows=2)
    kept = {}
    for name in STRANGE:
        (run / name).mkdir(parents=True)
        (run / name / "notes.txt").write_text("mine")
        kept[f"{name}/notes.txt"] = b"mine"
    (run / "4").write_text("a file")
    (run / "5").symlink_to(tmp_path / "nowhere")
    options = {"save_every": 1, "keep": 1, "last_step": 3}
    with open_manager(run, **options) as manager:
        assert manager.steps() == [] and manager.restore_latest(abstract(state)) is None
        for step in (1, 2, 3):
            assert manager.save(step, state, {"at": step})
    with open_manager(run, **options) as manager:
        assert manager.steps() == [3]
        assert manager.restore_latest(abstract(state)).data_state == {"at": 3}
    files = files_of(run)
    assert kept.items() <= files.items() and files["4"] == b"a file"
    assert (run / "5").is_symlink()


def test_what_has_the_name_of_a_step_to_come_is_said_before_anything_is_written(tmp_path):
    (tmp_path / "12").mkdir()
    (tmp_path / "12" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=rf"{tmp_path / '12'} is no checkpoint.*Move it"):
        open_manager(tmp_path, last_step=12)
    assert files_of(tmp_path) == {"12/notes.txt": b"mine"}
    with (
        open_manager(tmp_path, last_step=11) as manager,
        pytest.raises(CheckpointError, match=r"12 is in the way.*Move it"),
    ):
        manager.save(12, make_state(rows=2), force=True)
    assert files_of(tmp_path)["12/notes.txt"] == b"mine"


def test_a_step_that_is_a_link_is_read_and_never_deleted(two_steps, tmp_path_factory):
    folder, state = two_steps
    moved = tmp_path_factory.mktemp("elsewhere") / "1"
    (folder / "1").rename(moved)
    (folder / "1").symlink_to(moved)
    before = files_of(moved)
    with open_manager(folder, keep=1, best_metric="loss") as manager:
        assert manager.steps() == [1, 2] and best_step(manager) == 2
        assert manager.restore(1, abstract(state)).data_state == {"at": 1}
        manager.save(3, state, metrics={"loss": 0.5}, force=True)
        assert manager.steps() == [1, 3]
    assert files_of(moved) == before and (folder / "1").is_symlink()


def test_only_half_written_saves_are_removed(two_steps):
    folder, _ = two_steps
    left = {"3.orbax-checkpoint-tmp": False, "3.orbax-checkpoint-tmp-1700000000": False}
    left |= {"my.orbax-checkpoint-tmp": True, "3.orbax-checkpoint-tmp.bak": True}
    for name in left:
        (folder / name / "state").mkdir(parents=True)
    target = folder / "precious"
    target.mkdir()
    (target / "file").touch()
    (folder / "9.orbax-checkpoint-tmp").symlink_to(target)
    with open_manager(folder):
        pass
    assert {name: (folder / name).exists() for name in left} == left
    assert (target / "file").exists() and (folder / "9.orbax-checkpoint-tmp").is_symlink()


def _empty(step):
    shutil.rmtree(step)
    step.mkdir()


BROKEN = {
    "empty": _empty,
    "no mark": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "no arrays": lambda step: shutil.rmtree(step / "state"),
    "no data": lambda step: shutil.rmtree(step / "data"),
    "no file of the data": lambda step: (step / "data" / "metadata").unlink(),
    "data list": lambda step: (step / "data" / "metadata").write_text("[]"),
    "data field": lambda step: (step / "data" / "metadata").write_text('{"x": 1}'),
    "data changed": lambda step: (step / "data" / "metadata").write_text('{"data": {"at": 7}}'),
    "data folder": lambda step: ((f := step / "data/metadata").unlink(), f.mkdir()),
    "arrays' notes": lambda step: (step / "state" / "_METADATA").write_text('{"custom": 3}'),
}


@pytest.mark.parametrize("damage", ["empty", "no mark", "no arrays", "no data"])
def test_an_older_step_of_which_a_part_is_there_does_not_count_and_stays(two_steps, damage):
    """As a crash or a copy leaves it: it is none of the `keep` newest, and nobody deletes it."""
    folder, state = two_steps
    BROKEN[damage](folder / "1")
    left = files_of(folder / "1")
    with open_manager(folder, keep=2) as manager:
        assert manager.steps() == [2] and manager.restore_latest(abstract(state)).step == 2
        for step in (3, 4):
            manager.save(step, state, {"at": step}, force=True)
        assert manager.steps() == [3, 4]
    assert (folder / "1").is_dir() and files_of(folder / "1") == left
    for step in ("3", "4"):
        shutil.rmtree(folder / step)
    with open_manager(folder, keep=2) as manager:
        message = f"{folder / '1'} is corrupt or incomplete.*Delete {folder / '1'} to start over"
        with pytest.raises(CheckpointError, match=message):
            manager.restore_latest(abstract(state))
    assert files_of(folder / "1") == left


@pytest.mark.parametrize("damage", BROKEN)
def test_every_damage_of_the_newest_step_names_the_older_one(two_steps, damage):
    folder, state = two_steps
    BROKEN[damage](folder / "2")
    with open_manager(folder) as manager:
        with pytest.raises(CheckpointError) as failure:
            manager.restore_latest(abstract(state))
        assert manager.restore(1, abstract(state)).data_state == {"at": 1}
    message = str(failure.value)
    assert f"Delete {folder / '2'} to continue from step 1" in message and "\n" not in message


@pytest.mark.parametrize(
    "content", ["[1]", "3", "NaN", '{"loss": "low"}', '{"loss": [1]}', '{"loss": null}', "\xff"]
)
def test_figures_of_other_types_name_the_older_step(two_steps, content):
    folder, _ = two_steps
    (folder / "2" / "metrics" / "metrics").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=rf"{folder / '2'} is corrupt.*continue from step 1"):
        open_manager(folder, best_metric="loss")


def test_a_folder_that_may_not_be_read_names_the_older_step(two_steps, monkeypatch):
    """Permissions do not hold for root, who may run the tests."""
    folder, state = two_steps
    listdir = os.listdir

    def refuse(path="."):
        if Path(path) == folder / "2":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    with open_manager(folder) as manager:
        monkeypatch.setattr(os, "listdir", refuse)
        with pytest.raises(CheckpointError, match=r"2 is corrupt.*Permission denied.*step 1"):
            manager.restore_latest(abstract(state))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", CONFIG.replace("8", "9"), "config.json was changed"),
        ("tokenizer.model", "other pieces", "tokenizer.model was changed"),
        ("tokenizer.model", None, "tokenizer.model is missing"),
    ],
)
def test_a_step_is_of_its_model_and_tokenizer(tmp_path, name, content, words):
    tokenizer = tmp_path / "t.model"
    tokenizer.write_text("pieces")
    state, run = make_state(rows=2), tmp_path / "run"
    with open_manager(run, files={"tokenizer.model": tokenizer}) as manager:
        manager.save(1, state, force=True)
    (run / "config.json").write_text(CONFIG.replace(", ", ",\n  "))  # the same values
    with open_manager(run) as manager:
        assert manager.restore_latest(abstract(state)).step == 1
    (run / name).unlink()
    if content:
        (run / name).write_text(content)
    config = (run / "config.json").read_text()
    with (
        CheckpointManager(run, config_json=config) as manager,
        pytest.raises(CheckpointError, match=f"{run}/{words}.*Put that back"),
    ):
        manager.restore_latest(abstract(state))


def test_run_json_is_as_it_was_written_or_refused(two_steps):
    folder, _ = two_steps
    text = (folder / "run.json").read_text()
    for old, new in (('"min"', '"max"'), ('"loss"', '"accuracy"'), ("null", '{"a": 1}')):
        (folder / "run.json").write_text(text.replace(old, new))
        with pytest.raises(CheckpointError, match=r"run.json is not as.*remove the line"):
            open_manager(folder)
        fields = json.loads((folder / "run.json").read_text())
        del fields["digest"]  # as of versions before
        (folder / "run.json").write_text(json.dumps(fields))
        with open_manager(folder, run_config={"now": 2}):
            pass
        assert steps.read_run(folder, verify=True).config == {"now": 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"best_metric": 3}, "best_metric must be a string"),
        ({"best_mode": ["min"]}, "best_mode must be a string"),
        ({"best_mode": "most"}, "best_mode must be 'min' or 'max'"),
        ({"config": [1]}, "config must be an object"),
        ({"config": {"train": 3}}, "config.train must be an object"),
        ({"config": {"phase": {}}}, "config.phase must be a string"),
    ],
)
def test_fields_of_run_json_have_types(two_steps, change, words):
    folder, _ = two_steps
    (folder / "run.json").write_text(json.dumps(change))
    with pytest.raises(CheckpointError, match=f"run.json: {words}. Got: "):
        steps.read_config(folder)


def test_a_checkpoint_without_digests_is_restored(tmp_path, monkeypatch):
    """As versions before wrote them."""
    state = make_state(rows=2)
    save_args = arrays.save_args
    monkeypatch.setattr(manager_module, "save_args", lambda named, _: save_args(named))
    with open_manager(tmp_path) as manager:
        manager.save(1, state, {"at": 1}, force=True)
    (tmp_path / "run.json").write_text('{"best_metric": null, "best_mode": "min", "config": {}}')
    with open_manager(tmp_path) as manager:
        assert manager.restore_latest(abstract(state)).data_state == {"at": 1}


def test_after_a_failed_save_the_process_ends_at_once_with_one_message(tmp_path):
    """The folder becomes a file, as one that is unmounted or full refuses new folders and files."""
    script = f"""
        import pathlib, shutil, sys, time
        import jax
        import jax.numpy as jnp
        from refine_jax.base.errors import CheckpointError, complain
        from refine_jax.checkpoint import CheckpointManager
        folder = pathlib.Path({str(tmp_path)!r}) / "run"
        try:
            with CheckpointManager(folder, config_json={CONFIG!r}) as manager:
                manager.save(1, dict(w=jnp.ones(8)), force=True)
                manager.wait()
                how = {{how!r}}
                if how == "start":
                    shutil.rmtree(folder)
                    folder.write_text("")
                else:
                    import resource, signal
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
                w = jax.random.normal(jax.random.key(0), (9999,))
                manager.save(2, dict(w=w), force=True)
                for _ in range(1000):
                    time.sleep(0.01)
                    manager.check()
        except CheckpointError as error:
            print(time.time())
            sys.exit(complain(error))
    """
    for how in ("start", "later"):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script.replace("{how!r}", repr(how)))],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 1, done.stderr
        assert time.time() - float(done.stdout) < 10
        assert done.stderr.startswith("error: A checkpoint could not be saved in")
        assert done.stderr.count("\n") == 1
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        (tmp_path / "run").unlink(missing_ok=True)
