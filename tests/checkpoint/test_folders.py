"""Folders that convert writes: there in full or not at all, and in the place of models only."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from refine_jax.base.errors import CheckpointError
from refine_jax.checkpoint import load_model, read_hf, save_model
from refine_jax.checkpoint.folders import copy_files, new_folder
from tests.checkpoint.test_convert import (
    LACT,
    assert_same_tensors,
    convert,
    fails,
    in_params,
    lact_tensors,
    make_run,
    read_tensors,
    write_source,
)

WEIGHTS = "model.safetensors"


def folders(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


MORE_THAN_A_MODEL = {
    "notes": (["thesis.tex", "notes.txt"], "more than a model: notes.txt, thesis.tex. It is not"),
    "many": (
        [f"{i}.txt" for i in range(9)],
        "more than a model: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt",
    ),
    "a git folder": ([".git/HEAD"], "more than a model: .git"),
    "code": (["train.py"], "more than a model: train.py"),
    "data": (["data.bin"], "more than a model: data.bin"),
    "other params": (["params/x"], "more than a model: params"),
    "a folder of tokenizers": (["tokenizers/x"], "more than a model: tokenizers"),
    "another config": (["config.json"], "no model that it describes"),
}


@pytest.mark.parametrize("case", MORE_THAN_A_MODEL)
def test_overwrite_removes_models_only(case, tmp_path, capsys):
    names, words = MORE_THAN_A_MODEL[case]
    source = write_source(tmp_path / "source", lact_tensors())
    target = write_source(tmp_path / "target", lact_tensors())
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text("{}")
    before = folders(target)
    assert words in fails(capsys, "from_hf", source, target, "--overwrite")
    assert folders(target) == before


def test_overwrite_removes_no_place_of_the_system(tmp_path, capsys, monkeypatch):
    source = write_source(tmp_path / "source", lact_tensors())
    model = tmp_path / "home" / "model"
    convert("from_hf", source, model)
    monkeypatch.chdir(model)
    assert "is the current folder" in fails(capsys, "from_hf", source, model, "--overwrite")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(model))
    assert "is your home folder" in fails(capsys, "from_hf", source, "~", "--overwrite")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "is a mount point" in fails(capsys, "from_hf", source, "/proc", "--overwrite")
    assert "choose another DST" in fails(capsys, "from_hf", source, "/", "--overwrite")
    (tmp_path / "link").symlink_to(model)
    assert "is not a folder" in fails(capsys, "from_hf", source, "link", "--overwrite")
    for inside in (source / "jax", source / "a" / "b"):
        assert "is inside of SRC" in fails(capsys, "from_hf", source, inside)
    make_run(tmp_path / "run", source)
    inside = tmp_path / "run" / "checkpoints" / "hf"
    assert "is inside of SRC" in fails(capsys, "to_hf", tmp_path / "run", inside)
    convert("to_hf", tmp_path / "run", tmp_path / "run" / "hf")
    load_model(model)
    convert("from_hf", source, tmp_path / "x" / ".." / "home" / "model", "--overwrite")


def test_code_of_a_model_is_overwritten_where_its_config_points_to_it(tmp_path):
    config = LACT | {"auto_map": {"AutoConfig": "modeling_lact.LaCTConfig"}}
    source = write_source(tmp_path / "source", lact_tensors(), config)
    (source / "modeling_lact.py").write_text("code = 1")
    for _ in range(2):
        convert("from_hf", source, tmp_path / "jax", "--overwrite")
        convert("to_hf", tmp_path / "jax", tmp_path / "back", "--overwrite")
    assert (tmp_path / "back" / "modeling_lact.py").read_text() == "code = 1"


def test_a_failed_conversion_leaves_nothing(tmp_path, capsys, monkeypatch):
    source = write_source(tmp_path / "source", lact_tensors())
    (tmp_path / "file").write_text("x")
    before = folders(tmp_path)
    assert "could not be written" in fails(capsys, "from_hf", source, tmp_path / "file" / "jax")
    assert "could not be written" in fails(capsys, "from_hf", source, "/proc/a/b/jax")
    assert "could not be written" in fails(capsys, "from_hf", source, tmp_path / ("x" * 250))

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("refine_jax.checkpoint.folders.replacing", full)
        assert "no space is left" in fails(capsys, "from_hf", source, tmp_path / "a" / "b" / "jax")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        for direction in ("from_hf",):
            message = fails(capsys, direction, source, tmp_path / "a" / "jax")
            assert "takes 0.00 GB, but 0.00 GB are free" in message
    assert folders(tmp_path) == before


def test_a_model_is_kept_when_its_successor_fails(tmp_path, capsys, monkeypatch):
    source = write_source(tmp_path / "source", lact_tensors())
    convert("from_hf", source, tmp_path / "jax")
    before = folders(tmp_path)
    rename = Path.rename

    def fails_once(self, target):
        if ".new-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails_once)
        message = fails(capsys, "from_hf", source, tmp_path / "jax", "--overwrite")
    assert "could not be written" in message and folders(tmp_path) == before
    load_model(tmp_path / "jax")


def test_a_full_disk_half_way_leaves_nothing(tmp_path):
    """A limit on the size of files makes the writers fail as a full disk does."""
    source = write_source(tmp_path / "source", lact_tensors())
    model = tmp_path / "jax"
    convert("from_hf", source, model)
    before = folders(tmp_path)
    program = (
        "import resource, signal, sys\n"
        "from refine_jax.convert import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "source, model, target = sys.argv[1:]\n"
        "sys.exit(2 * main(['from_hf', source, target]) + main(['to_hf', model, target]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, source, model, tmp_path / "a" / "b"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 3, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and all("could not be written" in error for error in errors)
    assert folders(tmp_path) == before


def test_new_folder_lets_faults_of_ours_through(tmp_path):
    with pytest.raises(TypeError), new_folder(tmp_path / "a" / "b"):
        raise TypeError("a fault")
    assert not list(tmp_path.iterdir())


def test_home_and_urls(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_source(tmp_path / "source", lact_tensors())
    convert("from_hf", "~/source", "~/jax")
    convert("to_hf", "~/jax", "~/back")
    assert (tmp_path / "back" / WEIGHTS).is_file()
    for src, dst, setting in (
        ("s3://bucket/model", "x", "SRC"),
        ("~/source", "s3://bucket/model", "DST"),
        ("~/source", "hf://org/model", "DST"),
    ):
        message = fails(capsys, "from_hf", src, dst)
        assert f"{setting} must be a path of a file system" in message
    with pytest.raises(CheckpointError, match="SRC must be a path"):
        read_hf("file:///model")


def test_a_source_of_the_wrong_kind_names_the_right_command(tmp_path, capsys):
    source = write_source(tmp_path / "source", lact_tensors())
    convert("from_hf", source, tmp_path / "jax")
    make_run(tmp_path / "run", source)
    for place in ("jax", "run", "run/checkpoints"):
        message = fails(capsys, "from_hf", tmp_path / place, tmp_path / "x")
        assert "convert to_hf SRC DST" in message
    assert "convert from_hf SRC DST" in fails(capsys, "to_hf", source, tmp_path / "x")
    assert "no such folder" in fails(capsys, "from_hf", tmp_path / "gone", tmp_path / "x")
    assert "it is a file" in fails(capsys, "from_hf", source / WEIGHTS, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("size", ["0", "0.5", "9" * 400, "9" * 300 + "GB", "-1", "1e3", "", "nan"])
def test_sizes_that_are_none(size, tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert("to_hf", tmp_path, tmp_path / "x", f"--max_shard_size={size}")
    message = capsys.readouterr().err.splitlines()[-1]
    assert "expected a size such as 5GB" in message and len(message) < 300


@pytest.mark.parametrize("size", ["1", "1KB", "999999999999GB"])
def test_extreme_shards_hold_the_same(size, tmp_path):
    tensors = lact_tensors()
    params = read_hf(write_source(tmp_path / "source", tensors)).params
    save_model(tmp_path / "jax", params, json.dumps(LACT))
    convert("to_hf", tmp_path / "jax", tmp_path / "back", "--max_shard_size", size)
    assert_same_tensors(read_tensors(tmp_path / "back"), tensors)
    params = read_hf(tmp_path / "back").params
    assert_same_tensors({name: in_params(params, name) for name in tensors}, tensors)


def test_files_are_not_written_through_links(tmp_path):
    """A link put where a copy will go is replaced, not followed."""
    (tmp_path / "victim").write_text("safe")
    (tmp_path / "source").write_text("new")
    target = tmp_path / "run"
    target.mkdir()
    (target / "tokenizer.json").symlink_to(tmp_path / "victim")
    copy_files({"tokenizer.json": tmp_path / "source"}, target)
    assert (tmp_path / "victim").read_text() == "safe"
    assert (target / "tokenizer.json").read_text() == "new"
    assert not (target / "tokenizer.json").is_symlink()
