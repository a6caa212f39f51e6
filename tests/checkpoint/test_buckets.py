"""Checkpoints in buckets: steps that are there when they are whole, models that are replaced."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIGS

from refine_jax.base.errors import CheckpointError
from refine_jax.base.files import path_of
from refine_jax.base.remote import RemotePath
from refine_jax.checkpoint import CheckpointManager, folders, load_model, save_model, write_hf
from refine_jax.checkpoint.steps import find_steps
from refine_jax.convert import from_hf, to_hf
from refine_jax.models.config import model_config
from refine_jax.models.transformer import Model

CONFIG = json.dumps({"model_type": "delta_net", "hidden_size": 8})


def state(step):
    return {"w": jnp.arange(6.0).reshape(2, 3) + step, "step": jnp.int32(step)}


def open_manager(folder, **options):
    return CheckpointManager(folder, config_json=CONFIG, **options)


def copy_objects(source, target):
    for file, _ in source.walk():
        file.copy(target / file.relative_to(source))


def test_a_step_is_there_when_it_is_whole(bucket):
    folder = path_of(bucket / "steps")
    with open_manager(folder, keep=2) as manager:
        for step in (1, 2, 3):
            manager.save(step, state(step), {"row": step}, force=True)
    assert find_steps(folder).saved == [2, 3]
    # What a save that was killed leaves: Orbax writes the time of the end last.
    copy_objects(folder / "3", folder / "4")
    record = json.loads((folder / "4" / "_CHECKPOINT_METADATA").read_bytes())
    record["commit_timestamp_nsecs"] = None
    (folder / "4" / "_CHECKPOINT_METADATA").write_bytes(json.dumps(record).encode())
    copy_objects(folder / "3" / "state", folder / "5" / "state")
    # What somebody keeps there stays.
    (folder / "6" / "notes.txt").write_bytes(b"mine")
    assert find_steps(folder)._asdict() == {
        "saved": [2, 3],
        "linked": [],
        "broken": [],
        "other": [6],
    }
    with open_manager(folder, keep=2, last_step=5) as manager:
        assert not (folder / "4").exists() and not (folder / "5").exists()
        assert (folder / "6" / "notes.txt").is_file()
        restored = manager.restore_latest(jax.eval_shape(lambda: state(0)))
        assert (restored.step, restored.data_state) == (3, {"row": 3})
        np.testing.assert_array_equal(restored.state["w"], state(3)["w"])
        manager.save(4, state(4), {"row": 4}, force=True)
    assert find_steps(folder).saved == [3, 4]


def test_a_step_that_was_copied_in_part_or_damaged_is_refused(bucket):
    folder = path_of(bucket / "damaged")
    with open_manager(folder) as manager:
        for step in (1, 2):
            manager.save(step, state(step), force=True)
    (folder / "2" / "state").rmtree()
    abstract = jax.eval_shape(lambda: state(0))
    with open_manager(folder) as manager, pytest.raises(CheckpointError, match=r"it has no state"):
        manager.restore_latest(abstract)
    copy_objects(folder / "1" / "state", folder / "2" / "state")
    (arrays,) = [path for path, size in (folder / "2" / "state" / "d").walk()]
    arrays.write_bytes(arrays.read_bytes()[:-10])
    with open_manager(folder) as manager, pytest.raises(CheckpointError, match=r"is corrupt"):
        manager.restore_latest(abstract)


def test_steps_move_between_a_bucket_and_a_disk(bucket, tmp_path):
    folder, abstract = path_of(bucket / "moved"), jax.eval_shape(lambda: state(0))
    with open_manager(tmp_path / "disk") as manager:
        manager.save(1, state(1), force=True)
    for file in sorted((tmp_path / "disk").rglob("*")):
        if file.is_file():
            (folder / file.relative_to(tmp_path / "disk").as_posix()).upload(file)
    with open_manager(folder) as manager:
        assert manager.restore_latest(abstract).step == 1
        manager.save(2, state(2), force=True)
    for file, _ in folder.walk():
        target = tmp_path / "back" / str(file.relative_to(folder))
        target.parent.mkdir(parents=True, exist_ok=True)
        file.download(target)
    with open_manager(tmp_path / "back") as manager:
        assert manager.restore_latest(abstract).step == 2


@pytest.fixture(scope="module")
def model():
    """(text of config.json, parameters) of a tiny model."""
    fields = CONFIGS["deltanet"]
    params = jax.jit(Model(model_config(fields)).init)(jax.random.key(0))
    return json.dumps(fields), jax.tree.map(np.asarray, params)


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_models_are_written_read_and_replaced(bucket, model, monkeypatch):
    folder, (config_json, params) = path_of(bucket / "models") / "ours", model
    save_model(folder, params, config_json)
    assert_same(load_model(folder).params, params)
    with pytest.raises(CheckpointError, match=r"exists. Choose another name"):
        save_model(folder, params, config_json)
    doubled = jax.tree.map(lambda x: 2 * x, params)

    def fail(*_):
        raise OSError(5, "the connection is gone")

    with monkeypatch.context() as patched:
        patched.setattr("refine_jax.checkpoint.model.copy_files", fail)
        with pytest.raises(
            CheckpointError, match=r"could not be written: .*the connection is gone"
        ):
            save_model(folder, doubled, config_json, overwrite=True)
    assert_same(load_model(folder).params, params)
    copies = iter(range(3))

    def copy(self, target):
        if next(copies, None) is None:
            fail()
        original(self, target)

    with monkeypatch.context() as patched:
        original = RemotePath.copy
        patched.setattr(RemotePath, "copy", copy)
        with pytest.raises(CheckpointError, match="All of it is in gs://bucket") as error:
            save_model(folder, doubled, config_json, overwrite=True)
    kept = path_of(re.search(r"is in (\S+):", str(error.value))[1])
    assert_same(load_model(kept).params, doubled)
    with pytest.raises(CheckpointError, match=f"it has no {folders.CONFIG}"):
        load_model(folder)
    folder.rmtree()
    kept.rmtree()
    save_model(folder, params, config_json)
    save_model(folder, doubled, config_json, overwrite=True)
    assert_same(load_model(folder).params, doubled)
    assert [path.name for path in folder.parent.iterdir()] == ["ours"]
    (folder / "notes.txt").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"holds more than a model: notes.txt"):
        save_model(folder, params, config_json, overwrite=True)


def test_models_are_converted_from_buckets_to_buckets(bucket, model, tmp_path):
    config_json, params = model
    write_hf(tmp_path / "published", params, config_json)
    shutil.copytree(tmp_path / "published", tmp_path / "copy")
    for file in (tmp_path / "published").iterdir():
        path_of(bucket / f"published/{file.name}").upload(file)
    line = from_hf(bucket / "published", bucket / "converted")
    assert line.startswith("gs://bucket/converted: ")
    assert_same(load_model(bucket / "converted").params, params)
    assert_same(load_model(bucket / "published").params, params)
    to_hf(bucket / "converted", bucket / "back")
    for file in (tmp_path / "published").iterdir():
        assert path_of(bucket / f"back/{file.name}").read_bytes() == file.read_bytes(), file.name
    with pytest.raises(CheckpointError, match=r"is SRC itself, or holds it"):
        from_hf(bucket / "published", bucket / "published", overwrite=True)
    with pytest.raises(CheckpointError, match=r"s3:// gives data alone|a package is missing"):
        load_model("s3://bucket/model")
    (path_of(bucket / "published") / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match=r"gs://bucket/published/model.safetensors"):
        load_model(bucket / "published")
