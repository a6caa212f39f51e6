"""Paths, wherever a user gives one: `~` is expanded, URLs are read where that is possible."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from corpora import data_config
from tiny_runs import config_file, tiny_run, write_documents

from refine_jax import convert, generate, lm_harness, main
from refine_jax.base.errors import USER_ERRORS, CheckpointError, ConfigError, UserError
from refine_jax.base.files import check_output, check_writable, local_path
from refine_jax.checkpoint import load_model, read_hf, save_model
from refine_jax.config import SECTIONS, Config
from refine_jax.data import load_corpus, prepare
from refine_jax.data.sources import find_files
from refine_jax.data.tasks import generate as tasks
from refine_jax.data.tasks import load_examples
from refine_jax.data.tokenizer import load_tokenizer
from refine_jax.evaluation import position
from refine_jax.phases.changes import check_same_run

# What is no URL of a store, wherever it stands, and where writing is possible.
NO_STORES = ("file:///x", "gs:/b/x", " gs://bucket/x", "nosuch://x/y")
NOT_WRITTEN = (*NO_STORES, "https://host/x")
ON_DISKS = {"data.tfds_data_dir"}

# Text that names no file.
NO_PATHS = {
    *("model.lora_targets", "data.text_field", "data.files", "data.tfds_split"),
    *("prompts.prompt_field", "prompts.messages_field"),
    *("prompts.answer_field", "posttrain.metric", "evaluate.tasks", "evaluate.lengths"),
    *("compare.arms", "train.evaluate", "train.profile", "train.project", "train.trackers"),
}
TEXTS = {
    f"{name}.{field.name}"
    for name, section in SECTIONS.items()
    for field in dataclasses.fields(section)
    if "str" in str(field.type) and not field.metadata["choices"]
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home folder, and a current folder that must stay empty."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert not list((tmp_path / "here").iterdir())


def setting(name, value):
    section, _, field = name.partition(".")
    return getattr(SECTIONS[section](**{field: value}), field)


@pytest.mark.parametrize("name", sorted(TEXTS - NO_PATHS))
def test_settings_that_are_paths(name, home):
    on_disk = name in ON_DISKS
    written = name in ("data.cache_dir", "model.checkpoint")
    bad = NOT_WRITTEN if on_disk or written else NO_STORES
    for url in (*bad, "tfds:gs://bucket/x", *(["gs://bucket/x"] if on_disk else [])):
        with pytest.raises(ConfigError) as error:
            setting(name, url)
        assert f"config.{name} must be a path" in str(error.value), url
    if not on_disk:
        assert setting(name, "gs://bucket/~x") == "gs://bucket/~x"
    assert setting(name, "~/x/*.jsonl") == f"{home}/x/*.jsonl"
    assert setting(name, Path("a/b")) == "a/b"
    # Names, and paths that need nothing, are recorded as they were given.
    for text in ("stdlib", "tfds:wiki40b/en", "recall", "mistral-v1", "./a//b/", "a~b", "c:x"):
        assert setting(name, text) == text
    assert setting(name, "tfds:~/x") == f"tfds:{home}/x"
    with pytest.raises(ConfigError, match=f"config.{name}='~no_such_user/x': there is no home"):
        setting(name, "~no_such_user/x")
    with pytest.raises(ConfigError, match="null character"):
        setting(name, "a\0b")


def test_settings_that_are_no_paths_stay_as_they_are():
    assert NO_PATHS < TEXTS
    assert setting("data.files", "~*.py") == "~*.py"


def test_a_run_that_recorded_the_tilde_is_continued(home, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "1").mkdir(parents=True)
    changes = {"model": {"checkpoint": "~/x"}}
    config = Config.from_dict(tiny_run("midtrain", changes))
    record = config.to_dict()
    record["model"]["checkpoint"] = "~/x"
    (run / "checkpoints" / "run.json").write_text(json.dumps({"config": record}))
    check_same_run(config, run)


BYTES = load_tokenizer("bytes")
LIBRARY = {
    "load_model": load_model,
    "save_model": lambda path: save_model(path, {"w": np.zeros(1)}, "{}"),
    "read_hf": read_hf,
    "load_tokenizer": load_tokenizer,
    "source": lambda path: load_corpus(data_config(source=path), BYTES),
    "cache_dir": lambda path: data_config(cache_dir=path),
    "find_files": find_files,
    "data": lambda path: load_examples("lcc", tokenizer=BYTES, data=path),
    "essays": lambda path: load_examples(
        "niah_single_2", length=500, samples=1, tokenizer=BYTES, essays=path
    ),
    "prepare": lambda path: prepare.prepare(data_config(tokenizer="bytes"), path),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_functions_that_take_paths(name, home):
    for url in ("gs:/bucket/x", "file:/x"):
        with pytest.raises(UserError, match="must be a path"):
            LIBRARY[name](url)
    try:
        LIBRARY[name]("~/no/such.model")
    except USER_ERRORS as error:
        assert str(home) in str(error) or "~/no/such.model" in str(error)
    assert not Path("~").exists()


def command_lines(path):
    """{name of the flag: (a command, its arguments)}, with everything else in order."""
    checkpoint = ["--checkpoint=x", "--prompt=a"]
    every = {
        "convert SRC": (convert.main, ["from_hf", path, "new"]),
        "convert DST": (convert.main, ["from_hf", "x", path]),
        "to_hf SRC": (convert.main, ["to_hf", path, "new"]),
        "to_hf DST": (convert.main, ["to_hf", "x", path]),
        "generate --checkpoint": (generate.main, ["--checkpoint", path, "--prompt=a"]),
        "generate --prompt_file": (generate.main, [*checkpoint, "--prompt_file", path]),
        "lm_harness --checkpoint": (lm_harness.main, ["--checkpoint", path, "--tasks=a"]),
        "position --checkpoint": (position.main, ["--checkpoint", path]),
        "prepare --out": (prepare.main, ["--out", path, "--tokenizer=bytes"]),
        "tasks --out": (tasks.main, ["--out", path, "--tokenizer=bytes"]),
    }
    for flag in ("tokenizer", "load_state", "save_state"):
        every[f"generate --{flag}"] = (generate.main, [*checkpoint, f"--{flag}", path])
    for flag in ("include_path", "output", "tokenizer"):
        arguments = ["--checkpoint=x", "--tasks=a", f"--{flag}={path}"]
        every[f"lm_harness --{flag}"] = (lm_harness.main, arguments)
    for flag in ("source", "tokenizer", "output"):
        every[f"position --{flag}"] = (position.main, ["--checkpoint=x", f"--{flag}={path}"])
    for flag in ("source", "tokenizer", "tfds_data_dir"):
        every[f"prepare --{flag}"] = (prepare.main, ["--out=x", f"--{flag}={path}"])
    for flag in ("data", "essays", "tokenizer"):
        every[f"tasks --{flag}"] = (tasks.main, ["--out=x", f"--{flag}={path}"])
    return every


@pytest.mark.parametrize("name", command_lines(""))
def test_flags_that_are_paths(name, capsys):
    command, arguments = command_lines("gs:/bucket/x")[name]
    assert command(arguments) == 1
    captured = capsys.readouterr()
    flag = name.split()[1]
    assert captured.err.startswith(f"error: {flag} must be a path")
    assert captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize("flag", ["workdir", "json", "config"])
def test_flags_of_main_that_are_paths(flag, tmp_path, capsys, home):
    file = config_file(home / "c.py", tiny_run("midtrain"))
    given = {"config": "~/c.py", "workdir": str(tmp_path / "run")} | {flag: "s3://bucket/x"}
    only = ["--compile_only", "--topology=v5e:1x1"] if flag == "json" else []
    assert main.main([*(f"--{name}={value}" for name, value in given.items()), *only]) == 1
    assert f"error: --{flag} must be a path of a file system" in capsys.readouterr().err
    assert file.exists() and not (tmp_path / "run").exists()


def test_a_source_in_the_home_folder_is_read(home):
    write_documents(home)
    options = data_config(source="~/*.txt", sequence_length=52, tokenizer="bytes")
    assert options.source == f"{home}/*.txt"
    assert load_corpus(options, BYTES).dataset("train", 1).batches is None
    assert len(find_files("~")) == 16


BAD_FOLDERS = {
    "a file": (lambda d: d / "file", "It is a file"),
    "a file inside": (lambda d: d / "file" / "run", "a part of this path is a file"),
    "a broken link": (lambda d: d / "link", "a link to a folder that is not there"),
    "a link in a circle": (lambda d: d / "circle" / "run", "circle"),
    "too long": (lambda d: d / ("x" * 300), "the name is too long"),
    "too deep": (lambda d: d / "/".join(["x" * 90] * 50), "the name is too long"),
    "of the system": (lambda d: Path("/proc/run"), "nothing can be written there"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_work_folder_that_cannot_be_written_is_one_message(case, tmp_path, capsys, home):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    before = sorted(tmp_path.rglob("*"))
    make, words = BAD_FOLDERS[case]
    assert main.execute(tiny_run("midtrain"), str(make(tmp_path))) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: --workdir='/") and words in captured.err
    assert "Errno" not in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert sorted(tmp_path.rglob("*")) == before


def test_what_may_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    check_writable(tmp_path / "there", "--x")
    check_writable(tmp_path / "new" / "and" / "deeper", "--x")
    check_output(tmp_path / "there" / "file.json", "--x")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ConfigError, match=r"--x=.* must name a file. It is a folder"):
        check_output(tmp_path / "there", "--x")
    with pytest.raises(ConfigError, match=r"no regular file"):
        check_output(Path("/dev/null"), "--x")
    with pytest.raises(ConfigError, match=r"There is no folder"):
        check_output(tmp_path / "no" / "file.json", "--x")
    with pytest.raises(ConfigError, match="--x must not be empty"):
        local_path("", "--x")


def test_no_array_is_written_to_a_path_with_a_backslash(tmp_path):
    """The library that stores arrays takes it for a slash."""
    with pytest.raises(ConfigError, match=r"--workdir=.* must not hold a backslash"):
        check_writable(tmp_path / "a\\b", "--workdir")
    with pytest.raises(CheckpointError, match="must not hold a backslash"):
        save_model(tmp_path / "a\\b", {}, "{}")
    assert not list(tmp_path.glob("a*"))
