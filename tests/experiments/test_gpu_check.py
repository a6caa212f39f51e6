"""The check of the GPU kernels: in interpret mode, and that it finds what is wrong."""

import importlib.util
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

FOLDER = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    source = importlib.util.spec_from_file_location("gpu_check", FOLDER / "gpu_check.py")
    module = importlib.util.module_from_spec(source)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # dataclasses look there
    source.loader.exec_module(module)
    return module


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    return module.main()


def test_kernels_are_compared_with_their_reference(gpu_check, monkeypatch, capsys):
    only = "--only=LaCT, packed, float32"
    assert run(gpu_check, monkeypatch, "--interpret", "--json", only) == 0
    *_, line = capsys.readouterr().out.splitlines()
    (row,) = json.loads(line)["rows"]
    assert row["right"] and row["name"] == "LaCT, packed, float32"
    assert {*row["errors"]} == {"values", "gradients"}
    assert all(found < 1e-5 for found, _ in row["errors"].values())


def test_what_is_wrong_or_does_not_run_is_said(gpu_check, monkeypatch, capsys):
    def row(factor):
        def function(x):
            return jnp.sin(x)

        def other(x):
            return factor * jnp.sin(x)

        return gpu_check.compared("sine", other, function, jnp.arange(1.0, 9.0), "float32")

    def broken():
        raise RuntimeError("no such\nthing")

    cases = {"right": lambda: row(1.0), "wrong": lambda: row(1.01), "nan": lambda: row(jnp.nan)}
    cases["broken"] = broken
    monkeypatch.setattr(gpu_check, "checks", lambda *_: cases.items())
    assert run(gpu_check, monkeypatch, "--interpret", "--json") == 1
    *table, line = capsys.readouterr().out.splitlines()
    assert [each["right"] for each in json.loads(line)["rows"]] == [True, False, False, False]
    assert "| broken | does not run: RuntimeError: no such thing |  |  |" in table
    assert sum("| WRONG |" in each for each in table) == 2
    assert run(gpu_check, monkeypatch, "--interpret", "--only=right") == 0
    assert run(gpu_check, monkeypatch, "--interpret", "--limit=-1") == 0
    assert "left out after -1 s: right, wrong, nan, broken" in capsys.readouterr().out


def test_without_a_gpu_it_says_what_it_needs(gpu_check, monkeypatch, capsys):
    assert run(gpu_check, monkeypatch) == 1
    assert "needs a GPU, or --interpret with JAX_PLATFORMS=cpu. Got: cpu" in capsys.readouterr().err
