"""Command lines: flags, help, settings as flags, configuration files, how commands end."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import config_file, tiny_run

from refine_jax import config_files, main
from refine_jax.base.errors import ConfigError, ModelConfigError
from refine_jax.config import Config, defaults
from refine_jax.data import prepare
from refine_jax.data.tasks import generate as tasks

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"}


def overridden(*arguments, fresh=None):
    """The configuration that flags make of one of a tiny model."""
    values = tiny_run("midtrain")
    if fresh is not None:
        values.model.fresh = fresh
    options = main.command().parse(arguments)
    config_files.override(values, options.settings)
    return Config.from_dict(values)


@pytest.mark.parametrize(
    ("arguments", "field", "expected"),
    [
        (["--config.train.steps=7"], "train.steps", 7),
        (["--config.train.steps", "7"], "train.steps", 7),
        (["-config.train.steps=0x10"], "train.steps", 16),
        (["--config.train.steps=7", "--config.train.steps=8"], "train.steps", 8),
        (["--config.optimizer.learning_rate=3"], "optimizer.learning_rate", 3.0),
        (["--config.optimizer.clip_norm=None"], "optimizer.clip_norm", None),
        (["--config.train.mini_batch_size=64"], "train.mini_batch_size", 64),
        (["--config.data.pack"], "data.pack", True),
        (["--noconfig.data.add_bos"], "data.add_bos", False),
        (["--config.data.add_bos=False"], "data.add_bos", False),
        (["--config.data.files=a=b"], "data.files", "a=b"),
        (["--config.data.tokenizer="], None, "data.tokenizer must not be empty"),
        (["--config.train.steps=many"], None, "--config.train.steps=many must be a whole number"),
        (["--config.train.steps=1e3"], None, "must be a whole number"),
        (["--config.train.steps"], None, "--config.train.steps needs a value"),
        (["--config.train.steps", "--plan"], None, "--config.train.steps needs a value"),
        (["--config.optimizer.b1=high"], None, "must be a number"),
        (["--config.optimizer.b1=nan"], None, "config.optimizer.b1 must be finite"),
        (["--config.data.pack=perhaps"], None, "must be true or false"),
        (["--config.train.stepz=1"], None, "Did you mean 'steps'?"),
        (["--config.trian.steps=1"], None, "Did you mean 'train'?"),
        (["--config.train=1"], None, "config.train holds fields"),
        (["--config.train.steps.x=1"], None, "config.train.steps has no fields"),
        (["--noconfig.train.steps"], None, "There is no flag --noconfig.train.steps"),
        (["--workdir"], None, "--workdir needs a value"),
        (["--workdir", "--plan"], None, "--workdir needs a value"),
        (["stray"], None, "Arguments must be flags"),
        (["--num_processes=two"], None, "--num_processes=two"),
        (["--distributed=maybe"], None, "auto|on|off"),
        (["--flagfile=/no/such/file"], None, "/no/such/file"),
    ],
)
def test_settings_by_flag(arguments, field, expected):
    if field is None:
        with pytest.raises(ConfigError) as error:
            overridden(*arguments)
        assert expected in str(error.value)
        return
    value = overridden(*arguments)
    for name in field.split("."):
        value = getattr(value, name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("tie_word_embeddings=True", True),
        ("norm_eps=1", 1.0),
        ("intermediate_size=64", 64),
        ("intermediate_size=None", None),
        ("hidden_act=silu", "silu"),
    ],
)
def test_fields_of_a_fresh_model_that_the_file_does_not_set(flag, expected):
    """Those that the file sets, too: hidden_ratio is a whole number there."""
    fresh = {"model_type": "delta_net", "hidden_ratio": 4}
    ratio = "--config.model.fresh.hidden_ratio=2.5"
    got = overridden(f"--config.model.fresh.{flag}", ratio, fresh=fresh).model.fresh
    assert got == fresh | {"hidden_ratio": 2.5, flag.split("=")[0]: expected}
    assert type(got[flag.split("=")[0]]) is type(expected)


def test_the_family_decides_which_fields_a_fresh_model_has():
    window = "--config.model.fresh.window_size=64"
    with pytest.raises(ConfigError, match=r"\(delta_net\) has no field 'window_size'"):
        overridden(window)
    lact = "--config.model.fresh.model_type=lact_swiglu"
    assert overridden(window, lact).model.fresh["window_size"] == 64
    assert overridden(lact, window, fresh={}).model.fresh["model_type"] == "lact_swiglu"
    with pytest.raises(ConfigError, match="Did you mean 'tie_word_embeddings'"):
        overridden("--config.model.fresh.tie_word_embedings=True")
    with pytest.raises(ConfigError, match=r"set --config\.model\.fresh\.model_type, too"):
        overridden(window, fresh={})
    with pytest.raises(ModelConfigError, match="model_type must be one of"):
        overridden("--config.model.fresh.model_type=llama", window)


@pytest.mark.parametrize(
    ("flag", "near"),
    [("profile", ""), ("workdri", "--workdir"), ("verbosity", ""), ("jsn", "--json")],
)
def test_suggestions_are_flags_of_ours(flag, near):
    with pytest.raises(ConfigError) as error:
        overridden(f"--{flag}=x")
    suggested = re.findall(r"Did you mean '(.*?)'", str(error.value))
    assert suggested == ([near] if near else [])
    assert f"no flag --{flag}" in str(error.value)


@pytest.mark.parametrize("module", [main, prepare, tasks], ids=lambda module: module.__name__)
def test_help_is_the_docstring_with_its_lines_then_our_flags(module, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    page = capsys.readouterr().out
    examples = [line for line in module.__doc__.splitlines() if "python -m refine_jax" in line]
    assert examples and set(examples) <= set(page.splitlines())
    named = re.findall(r"^  --(?:\[no\])?(\w+)", page, re.M)
    assert named == list(module.command().flags)
    assert max(map(len, page.splitlines())) <= 100
    for name in ("verbosity", "pdb", "flagfile", "profile"):
        assert name not in named


FILES = {
    "syntax": ("def get_config(:\n", "line 1 is not valid Python: invalid syntax"),
    "no function": ("x = 1\n", "defines no function get_config()"),
    "no form": ("def get_config():\n    return 1\n", "takes no form"),
    "none": ("def get_config(arg):\n    pass\n", "Got: None: is a return missing?"),
    "dict": ("def get_config(arg):\n    return {}\n", "must return the ConfigDict"),
    "raises": (
        "def get_config(arg):\n    raise KeyError('x')\n",
        "failed in line 2: KeyError: x",
    ),
    "exits": ("def get_config(arg):\n    exit(0)\n", "failed in line 2: SystemExit: 0"),
    "import": ("import no_such_module\n", "failed in line 1: ModuleNotFoundError"),
    "endless": ("def get_config(arg):\n    return get_config(arg)\n", "RecursionError"),
    "bytes": (b"\xff\n", "is not valid Python"),
    "field": (
        "from refine_jax.config import defaults\n"
        "def get_config(arg):\n    c = defaults()\n    c.train.stepz = 1\n    return c\n",
        'failed in line 4: AttributeError: Key "stepz" does not exist',
    ),
    "section": (
        "from ml_collections import ConfigDict\n"
        "def get_config(arg):\n    return ConfigDict({'train': 3})\n",
        "config.train must hold fields. Got: 3.",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_configuration_file_that_makes_none_is_one_message(case, tmp_path, capsys):
    content, words = FILES[case]
    file = tmp_path / "c.py"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main.main([f"--config={file}:form", f"--workdir={tmp_path / 'run'}"]) == 1
    captured = capsys.readouterr()
    assert (
        words in captured.err and captured.err.startswith("error: ") and str(file) in captured.err
    )
    assert captured.err.count("\n") == 1 and len(captured.err) < 1000 and not captured.out
    assert not (tmp_path / "run").exists()


def test_what_is_no_configuration_file_is_one_message(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "config.json").write_text("{}")
    for name, words in (
        ("pipe.py", "must name a Python file"),
        ("folder.py", "is a folder"),
        ("config.json", "must name a Python file"),
        ("nowhere.py", "There is no configuration file"),
    ):
        assert main.main([f"--config={tmp_path / name}", "--workdir=x"]) == 1
        assert words in capsys.readouterr().err
    assert main.main(["--config=gs://bucket/c.py:short", "--workdir=x"]) == 1
    assert "--config must be a path of a file system" in capsys.readouterr().err


def test_what_a_configuration_file_leaves_out_or_prints(tmp_path, capsys):
    file = tmp_path / "c.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    print('text')\n"
        "    return ConfigDict({'model': {'fresh': {'model_type': 'delta_net'}}})\n"
    )
    values = config_files.load_config(str(file))
    assert capsys.readouterr() == ("", "text\n")
    expected = defaults()
    expected.model.fresh = {"model_type": "delta_net"}
    assert Config.from_dict(values) == Config.from_dict(expected)
    config_files.override(values, {"config.train.mini_batch_size": "64"})
    assert Config.from_dict(values).train.mini_batch_size == 64


def test_flags_that_mean_nothing_here_are_refused(tmp_path, capsys):
    for arguments, words in (
        (["--config.train.steps=3"], "--config.train.steps changes a configuration"),
        ([f"--config={ROOT}/configs/demo.py", "--json=x"], "--json goes with --compile_only"),
        ([f"--config={ROOT}/configs/demo.py"], "Both --config=FILE and --workdir=DIR"),
    ):
        assert main.main(arguments) == 1
        assert words in capsys.readouterr().err


def test_a_flag_given_twice_is_told(tmp_path, capsys):
    file = config_file(tmp_path / "c.py", tiny_run("midtrain"))
    arguments = [f"--config={file}", "--config.train.steps=3", "--config.train.steps=4"]
    assert main.main(arguments) == 1  # for want of a --workdir
    assert "note: --config.train.steps is given twice, '3' and '4': the last" in (
        capsys.readouterr().err
    )


def start(*arguments):
    command = [sys.executable, "-m", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=ENVIRONMENT)


@pytest.mark.parametrize("library", ["_yaml", "jaxlib"])
def test_ctrl_c_while_a_command_starts_is_one_line(library, tmp_path):
    """Also in the middle of imports, where an extension module would crash."""
    process = start("refine_jax.main", "--config=configs/demo.py", f"--workdir={tmp_path / 'run'}")
    maps, until = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
    while library not in maps.read_text() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_an_output_that_nobody_reads_ends_a_command_quietly(tmp_path):
    program = (
        "import sys\n"
        "from refine_jax.base.errors import run_command\n"
        "def work():\n"
        "    print('first', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    print('second', flush=True)\n"
        "sys.exit(run_command(work))\n"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.write("go on\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "refine_jax.main", "--help"],
            stdout=full,
            stderr=pipe,
            text=True,
            cwd=ROOT,
            env=ENVIRONMENT,
        )
    assert done.returncode == 1 and "no space is left" in done.stderr
    assert "Traceback" not in done.stderr
