"""All commands are alike: their lists, pages of help and messages, by each way to call them."""

import importlib
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from refine_jax import config_files
from refine_jax.__main__ import COMMANDS
from refine_jax.config import Config
from refine_jax.generation import Sampling

ROOT = Path(__file__).parents[1]
MODULES = sorted({f"refine_jax.{entry.module}" for entry in COMMANDS.values()})
# What `refine-jax` is after an installation; at its end it says whether jax was imported.
SCRIPT = """
import sys
from refine_jax.__main__ import main
try:
    sys.exit(main())
finally:
    if "jax" in sys.modules:
        print("jax was imported", file=sys.stderr)
"""


def page_of(module: str) -> str:
    return importlib.import_module(module).command().page()


def examples_of(module: str) -> list[list[str]]:
    """The words of each command line on the page, without `python -m MODULE`."""
    text = page_of(module).partition("\nExamples:\n")[2].replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines() if line.strip()]
    assert all(words[:3] == ["python", "-m", module] for words in lines)
    return [words[3:] for words in lines]


def called(*command: str) -> tuple[int, str, str]:
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=60, env={"PYTHONPATH": str(ROOT)}
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("bin") / "refine-jax"
    path.write_text(SCRIPT)
    return str(path)


@pytest.mark.parametrize("module", MODULES)
def test_a_page_fits_one_screen_and_names_every_flag(module, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = page_of(module).splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    assert lines[0].startswith(f"usage: python -m {module} ")
    flags = importlib.import_module(module).command().flags
    named = re.findall(r"^  --(?:\[no\])?(\w+)", "\n".join(lines), re.M)
    assert named == list(flags) and all(flag.help for flag in flags.values())


@pytest.mark.parametrize("module", MODULES)
def test_examples_parse(module, monkeypatch):
    monkeypatch.chdir(ROOT)
    examples = examples_of(module)
    assert 2 <= len(examples) <= 3
    for words in examples:
        options = importlib.import_module(module).command().parse(words)
        if module == "refine_jax.main":
            values = config_files.load_config(options.config)
            config_files.override(values, options.settings)
            Config.from_dict(values)


@pytest.mark.parametrize("module", MODULES)
def test_a_mistyped_flag_is_one_line_with_a_suggestion(module, capsys):
    flag = max(importlib.import_module(module).command().flags, key=len)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main([f"--{flag[:-1]}=x"])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (1, "")
    assert err == (
        f"error: There is no flag --{flag[:-1]}. Did you mean '--{flag}'? --help lists the flags.\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_each_name_is_its_module(name, script):
    module = f"refine_jax.{COMMANDS[name].module}"
    code, page, err = called(sys.executable, "-m", module, "--help")
    assert (code, err) == (0, "")
    for program, start in (
        (f"refine-jax {name}", (script,)),
        (f"python -m refine_jax {name}", ("-m", "refine_jax")),
    ):
        expected = page.replace(f"python -m {module}", program)
        assert expected.startswith(f"usage: {program} ")
        assert called(sys.executable, *start, name, "--help") == (0, expected, "")
    wrong = called(sys.executable, "-m", module, "--xyzzy")
    assert wrong == (1, "", "error: There is no flag --xyzzy. --help lists the flags.\n")
    assert called(sys.executable, script, name, "--xyzzy") == wrong


def test_the_list_names_every_command_and_comes_at_once(script):
    started = time.perf_counter()
    code, listed, err = called(sys.executable, script)
    assert time.perf_counter() - started < 5  # a tenth of a second where nothing else runs
    assert (code, err) == (0, "")
    assert re.findall(r"^  (\w+) ", listed, re.M) == list(COMMANDS)
    assert max(map(len, listed.splitlines())) <= 100
    for arguments in (["--help"], ["help"]):
        assert called(sys.executable, script, *arguments) == (0, listed, "")
    assert called(sys.executable, "-m", "refine_jax")[1] == listed.replace(
        "refine-jax", "python -m refine_jax"
    )
    code, out, err = called(sys.executable, script, "trian", "--config=x")
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert err.startswith("error: There is no command 'trian'. Did you mean 'train'?")


def test_fit_compiles_only(script):
    """It is `--compile_only` of the same module, which asks for a configuration first."""
    code, out, err = called(sys.executable, script, "fit", "--topology=v5e:1x1")
    assert (code, out) == (1, "")
    assert "--compile_only needs --config=FILE" in err


def test_the_package_installs_the_script():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"refine-jax": "refine_jax.__main__:main"}


def test_defaults_of_flags_are_those_of_the_library():
    """Written down in the command, so that its page needs no jax."""
    from refine_jax import generate

    flags, defaults = generate.command().flags, Sampling()
    for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed"):
        assert flags[name].default == getattr(defaults, name)
