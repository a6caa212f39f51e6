"""Floors, flags and output of the ahead-of-time study of the TPU kernels."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))

import tpu_compiler
import tpu_kernels
import tune_tpu
from tpu_cases import CASES

from refine_jax.kernels import tpu, tpu_table

# Writes what the real tool writes; what it writes depends on the case alone.
STUB_TOOL = """
import json, sys
words = sys.argv
settings = dict(words[i + 1].split("=") for i, word in enumerate(words) if word == "--set")
xla, out = settings["implementation"] == "xla", words[words.index("--json") + 1]
if settings["name"] == "lact_decode":
    report = {"error": "compile", "message": "ValueError: no such kernel"}
else:
    kernel = {"runs": 2, "cycles": 750e3, "vmem": 4096, "complete": True}
    report = {"xla_cycles": 3e6 if xla else 1.5e6, "unknown_trips": 0}
    report["calls"] = [] if xla else [kernel]
json.dump(report, open(out, "w"))
"""


def run(monkeypatch, capsys, *words):
    """(exit code, JSON line, all that was printed)."""
    monkeypatch.setattr(sys, "argv", ["tpu_kernels.py", "--json", *map(str, words)])
    code = tpu_kernels.main()
    out = capsys.readouterr().out
    return code, json.loads(out.splitlines()[-1]), out


@pytest.fixture
def stubs(tmp_path):
    """Flags that name a stand-in for libtpu and one for the tool."""
    (tmp_path / "libtpu.so").touch()
    (tmp_path / "tool.py").write_text(STUB_TOOL)
    return "--libtpu", tmp_path / "libtpu.so", "--tool", tmp_path / "tool.py"


def test_figures_and_table(monkeypatch, capsys, stubs):
    words = (*stubs, "--topology", "v5e:1x1", "--cases", "delta_fwd_8k", "delta_decode")
    code, result, out = run(monkeypatch, capsys, *words)
    assert code == 0
    assert result["topology"] == "v5e:1x1"
    assert list(result["cases"]) == ["delta_fwd_8k", "delta_decode"]
    entry = result["cases"]["delta_fwd_8k"]
    assert set(entry) == {
        *("ms", "kernels_ms", "xla_ms", "mxu_floor_ms", "hbm_floor_ms"),
        *("mxu_fraction", "vmem_bytes"),
    }
    # 2 runs of 750,000 cycles and 1.5 million of XLA's, or 3 million, at 1.5 GHz.
    assert entry["ms"] == pytest.approx(2.0)
    assert entry["kernels_ms"] == pytest.approx(1.0)
    assert entry["xla_ms"] == pytest.approx(2.0)
    assert entry["mxu_fraction"] == pytest.approx(entry["mxu_floor_ms"] / 2)
    assert entry["vmem_bytes"] == 4096
    assert "delta_fwd_8k" in out.splitlines()[3]


def test_a_failing_case_does_not_stop_the_others(monkeypatch, capsys, stubs):
    words = (*stubs, "--cases", "lact_decode", "delta_fwd_8k")
    code, result, out = run(monkeypatch, capsys, *words)
    assert code == 1
    assert result["cases"]["lact_decode"]["error"] == "compile: ValueError: no such kernel"
    assert result["cases"]["lact_decode"]["ms"] is None
    assert result["cases"]["delta_fwd_8k"]["ms"] > 0
    assert "failed: lact_decode on v6e:1x1" in out


def test_a_tool_that_writes_nothing_is_reported(monkeypatch, capsys, stubs, tmp_path):
    (tmp_path / "tool.py").write_text("raise SystemExit('out of order')")
    code, result, _ = run(monkeypatch, capsys, *stubs, "--cases", "delta_decode")
    assert code == 1
    assert result["cases"]["delta_decode"]["error"] == "exit code 1: out of order"


def test_no_estimate_is_not_taken_for_one():
    report = {"calls": [], "xla_cycles": 2**64 - 1, "unknown_trips": 0}
    found = tpu_compiler.read_estimate(report, tpu_compiler.CHIPS["tpu7x:1x1x1"])
    assert found["ms"] is None
    assert found["notes"] == ["XLA gives no estimate of its own part"]


def test_flags(capsys, tmp_path):
    flags = tpu_kernels.parse(["--libtpu", str(tmp_path / "absent.so")])
    assert flags.cases is None
    with pytest.raises(ValueError, match=r"must name a libtpu.so. Got: .*absent.so"):
        tpu_compiler.find_compiler(flags)
    with pytest.raises(SystemExit):
        tpu_kernels.parse(["--cases", "no_such_case"])
    assert "no_such_case" in capsys.readouterr().err


def floors(name, topology):
    return tpu_kernels.floors(CASES[name], tpu_compiler.CHIPS[topology])


def test_floors_by_hand():
    # Per token and head 2 (2 64 128 + 2 64 128 + 3 128 128) = 163,840 operations, 16 heads of 8192
    # tokens, 197e12 a second; q, k, v and out of 2 bytes, beta and the final state of 4.
    flops = 163840 * 16 * 8192
    assert floors("delta_fwd_8k", "v5e:1x1")[0] == pytest.approx(1e3 * flops / 197e12)
    rows, beta = 2 * 8192 * 2048, 4 * 8192 * 16
    assert floors("delta_fwd_8k", "v5e:1x1")[1] == pytest.approx(1e3 * (4 * rows + beta) / 819e9)
    # Backward: q, k, v again, the cotangent, four gradients; two products for each product.
    mxu, hbm = floors("delta_fwdbwd_8k", "v5e:1x1")
    assert mxu == pytest.approx(3e3 * flops / 197e12)
    assert hbm == pytest.approx(1e3 * (11 * rows + 3 * beta) / 819e9)
    # 8 chunks read, 7 updated, 4 heads, C = 2048, d = F = 384.
    mxu, _ = floors("lact760m_fwd_16k", "v6e:1x1")
    assert mxu == pytest.approx(1e3 * 2 * 2048 * 384**2 * 4 * (8 * 3 + 7 * 6) / 918e12)
    # The state of 8 forks, in and out, and little else.
    _, hbm = floors("delta_decode", "v6e:1x1")
    assert hbm == pytest.approx(1e3 * 2 * 8 * 16 * 128 * 128 * 4 / 1640e9, rel=0.02)
    mxu, hbm = floors("ce_entropy", "v6e:1x1")
    assert mxu == pytest.approx(1e3 * 6 * 16384 * 2048 * 32000 / 918e12)
    head, hidden = 32000 * 2048 * 4, 16384 * 2048 * 2
    assert hbm == pytest.approx(1e3 * 2 * (head + hidden) / 1640e9, rel=0.01)


def test_an_exception_is_shown_by_its_own_line():
    error = "Traceback\n  File x\njax.errors.JaxRuntimeError: E1001: too\nlarge\n----\nmore"
    assert tpu_compiler.last_line(error) == "jax.errors.JaxRuntimeError: E1001: too"
    assert tpu_compiler.last_line("a\nb") == "a b"


def test_blocks_are_those_of_the_next_larger_shape(monkeypatch):
    shapes = {(64, 64): (1,), (128, 128): (2,), (256, 256): (3,)}
    table = {"v6e": shapes, "v4": {(128, 128): (4,)}}
    monkeypatch.setattr(tpu_table, "BLOCKS", {"op": table})
    for generation, sizes, expected in (
        ("v6e", (64, 64), 1),
        ("v6e", (64, 128), 2),
        ("v6e", (128, 256), 3),
        ("v6e", (512, 256), 3),
        ("v4", (64, 64), 4),
        ("v4", (256, 256), 4),
        ("v5e", (128, 128), 2),  # not searched: as a v6e
    ):
        monkeypatch.setattr(tpu, "generation", lambda generation=generation: generation)
        assert tpu.blocks("op", sizes) == (expected,)


# The fewer heads, the faster, but for a single one, which does not compile.
STUB_SEARCH = """
import json, sys
words = sys.argv
settings = dict(words[i + 1].split("=") for i, word in enumerate(words) if word == "--set")
heads = int(settings["blocks"].split(",")[0])
report = {"error": "compile", "message": "out of vmem"}
if heads > 1:
    call = {"runs": 1, "cycles": 1e6 * heads, "vmem": 0}
    report = {"calls": [call], "xla_cycles": 0, "unknown_trips": 0}
json.dump(report, open(words[words.index("--json") + 1], "w"))
"""


def test_the_search_writes_the_fastest_that_compiles(monkeypatch, capsys, stubs, tmp_path):
    (tmp_path / "tool.py").write_text(STUB_SEARCH)
    sizes = ((64, 64), (128, 128))
    candidates = {sizes[0]: [(4, 9), (2, 9), (1, 9)], sizes[1]: [(1, 9)]}
    search = tune_tpu.Search(sizes, candidates.get, program=None)
    monkeypatch.setattr(tune_tpu, "SEARCHES", {"op": search})
    monkeypatch.setattr(tune_tpu, "TABLE", tmp_path / "table.py")
    monkeypatch.setattr(tpu_table, "BLOCKS", {"op": {"v4": {(64, 64): (7, 7)}}, "other": {}})
    words = ["tune_tpu.py", *stubs, "--ops", "op", "--topology", "tpu7x:1x1x1"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    assert tune_tpu.main() == 0
    assert "fault: compile: out of vmem" in capsys.readouterr().out
    written = {}
    exec((tmp_path / "table.py").read_text(), written)
    expected = {"v4": {(64, 64): (7, 7)}, "7x": {(64, 64): (2, 9)}}
    assert written["BLOCKS"] == {"op": expected, "other": {}}


@pytest.mark.skipif(
    not os.environ.get("TPU_LIBRARY_PATH") and importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, in this environment or as TPU_LIBRARY_PATH",
)
def test_compiles_with_libtpu(monkeypatch, capsys):
    code, result, out = run(monkeypatch, capsys, "--compile_only", "--cases", "delta_decode")
    assert code == 0, out
    assert result["cases"]["delta_decode"]["vmem_bytes"] >= 0
