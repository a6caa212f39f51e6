"""What is said while programs compile, what is counted, and XLA's banner, which is not shown."""

import os
import re
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax.sharding import AbstractDevice, AbstractMesh
from tiny_runs import tiny_run, write_documents

from refine_jax import compiling
from refine_jax.base.banner import split
from refine_jax.compiling import Compilations, announced
from refine_jax.config import Config
from refine_jax.kernels.device import compiled_for
from refine_jax.phases import midtrain

# As jaxlib 0.10.2 wrote them while it compiled for more than two minutes.
STARS = "*" * 32
BANNER = (
    "E1129 17:27:13.994674   12375 slow_operation_alarm.cc:73] \n"
    f"{STARS}\n"
    "[Compiling module jit_f for CPU] Very slow compile? If you want to file a bug, run with "
    "envvar XLA_FLAGS=--xla_dump_to=/tmp/foo and attach the results.\n"
    f"{STARS}\n"
)
AT_THE_END = BANNER.replace(
    "13.994674   12375 slow_operation_alarm.cc:73] ",
    "18.334068   12371 slow_operation_alarm.cc:140] The operation took 2m10.819098607s\n",
)
# Another alarm of the same file, which tells of a program that could be better.
FOLDING = (
    "E1129 17:27:13.994674   12375 slow_operation_alarm.cc:73] Constant folding an instruction is "
    "taking > 1s:\n\n  %pad.23 = f32[5,5] pad(...)\n\nThis isn't necessarily a bug; ...\n"
)
TRACEBACK = "Traceback (most recent call last):\n  File x\nValueError: é\n"
EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.mark.parametrize("banner", [BANNER, AT_THE_END])
def test_a_banner_is_cut_out_and_all_else_stays(banner):
    text = f"a\n{banner}b\n{banner}c\n{FOLDING}{TRACEBACK}d"
    assert split(text.encode()) == (f"a\nb\nc\n{FOLDING}{TRACEBACK}d".encode(), b"")


def test_a_banner_in_pieces_is_cut_out():
    head = BANNER.index("]") + 1
    for cut in range(head, len(BANNER)):
        out, kept = split(f"a\n{BANNER[:cut]}".encode())
        rest, kept = split(kept + f"{BANNER[cut:]}b\n".encode())
        assert out + rest == b"a\nb\n" and not kept


@pytest.mark.parametrize(
    ("kind", "sequence", "together"),
    [
        ("TPU v5", 2, False),
        ("TPU v6 lite", 2, False),
        ("TPU v5", 1, True),  # nothing is exchanged
        ("TPU v5 lite", 2, True),  # libtpu would end itself
    ],
)
def test_tokens_are_exchanged_beside_what_is_computed(kind, sequence, together):
    axes = ("data", "fsdp", "tensor", "sequence")
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1, 2, 1, sequence), axes, abstract_device=device)
    asked = None if together else {"xla_tpu_enable_async_all_to_all": True}
    with compiled_for("tpu"), jax.sharding.use_abstract_mesh(mesh):
        assert compiling.compiler_options() == asked
    with jax.sharding.use_abstract_mesh(mesh):  # on this machine
        assert compiling.compiler_options() is None


def filtered(body, *, returncode=0):
    """What arrives on standard error of a process that writes to its descriptor as C++ would."""
    program = (
        "import os, sys, time\nfrom refine_jax.base.banner import without_banner\n"
        f"BANNER, FOLDING = {BANNER!r}, {FOLDING!r}\n"
        "def write(text):\n    os.write(2, text.encode())\n" + textwrap.dedent(body)
    )
    process = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, timeout=60)
    assert process.returncode == returncode, process.stderr.decode()
    return process.stderr.decode()


def test_only_banners_are_missing_on_standard_error():
    got = filtered("""
        write("before\\n")
        with without_banner():
            write("first\\n")
            write(BANNER)
            write("unfinished")
            print(" of Python", file=sys.stderr)
            write(FOLDING + BANNER + "last")
        write(" after\\n" + BANNER)
    """)
    assert got == f"before\nfirst\nunfinished of Python\n{FOLDING}last after\n{BANNER}"


def test_nothing_is_lost_where_the_process_crashes():
    got = filtered(
        """
        with without_banner():
            write(BANNER + "what():  terminated\\n" + BANNER[:80])
            os.abort()
        """,
        returncode=-6,
    )
    assert got == "what():  terminated\n" + BANNER[:80]


def test_lines_arrive_at_once():
    """Also unfinished ones, while the process goes on."""
    got = filtered("""
        read, write_end = os.pipe()
        saved = os.dup(2)
        os.dup2(write_end, 2)
        with without_banner():
            write("progress 1")
            import select
            assert select.select([read], [], [], 20)[0]
            text = os.read(read, 100)
        os.write(saved, text)
    """)
    assert got == "progress 1"


def test_standard_error_may_be_closed():
    assert filtered("os.close(2)\nwith without_banner():\n    pass") == ""


@pytest.fixture
def said(monkeypatch):
    """The lines said, where a fiftieth of a second of compilation is long."""
    monkeypatch.setattr(compiling, "PATIENCE", 0.02)
    return []


def pretend(seconds, inner=0):
    """The events of a program whose compilation takes so long, with others traced within."""
    monitoring.record_scalar(EVENT, 0.0)
    for _ in range(inner):
        pretend(seconds / inner)
    if not inner:
        time.sleep(seconds)
    monitoring.record_event_duration_secs(EVENT, seconds)


def test_what_takes_long_is_announced_while_it_lasts(said):
    with Compilations(said.append) as compilations:
        with compilations.of("the step"):
            monitoring.record_scalar(EVENT, 0.0)
            deadline = time.monotonic() + 20
            while not said and time.monotonic() < deadline:
                time.sleep(0.01)
            assert said == ["compiling the step; this may take minutes"]
            monitoring.record_event_duration_secs(EVENT, 0.1)
            pretend(0.05)  # more of the same
        assert said[1:] == ["compiled in 0 s"]
    assert 0.05 < compilations.seconds < 20


def test_what_is_quick_or_has_no_name_is_not_announced(said, monkeypatch):
    with Compilations(said.append) as compilations:
        pretend(0.1)
        monkeypatch.setattr(compiling, "PATIENCE", 30.0)
        with compilations.of("the step"):
            pretend(0.0)
            time.sleep(0.1)  # the program runs
    assert not said


def test_programs_traced_within_others_are_counted_once(said):
    with Compilations() as compilations:
        pretend(0.3, inner=3)
    assert 0.3 <= compilations.seconds < 0.6
    before = compilations.seconds
    pretend(0.1)
    assert compilations.seconds == before


def test_a_real_program_is_counted_when_it_first_runs():
    program = jax.jit(lambda x: jnp.sin(x) @ x)
    with Compilations() as compilations:
        program(jnp.ones((8, 8)))
        first = compilations.seconds
        program(jnp.ones((8, 8)))
        assert compilations.seconds == first > 0


def test_the_banner_is_caught_in_long_compilations_only(monkeypatch):
    monkeypatch.setattr(compiling, "_ALARM", 0.05)
    entered = []

    class Filter:
        def __enter__(self):
            entered.append("in")

        def __exit__(self, *_):
            entered.append("out")

    monkeypatch.setattr(compiling, "without_banner", Filter)
    with Compilations():
        pretend(0.0)
        assert not entered
        monitoring.record_scalar(EVENT, 0.0)
        deadline = time.monotonic() + 20
        while not entered and time.monotonic() < deadline:
            time.sleep(0.01)
        assert entered == ["in"]
        monitoring.record_event_duration_secs(EVENT, 0.1)
        assert entered == ["in", "out"]
    assert os.fstat(2)


def test_a_command_says_it_once_on_standard_error(said, capsys):
    with announced():
        pretend(0.1)
        pretend(0.1)
        time.sleep(0.05)
    output = capsys.readouterr()
    assert (
        output.err == "compiling the model's programs; this may take minutes\n" and not output.out
    )


def test_a_run_says_what_it_compiles_and_how_long_it_took(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compiling, "PATIENCE", 0.0)
    (tmp_path / "corpus").mkdir()
    source = str(write_documents(tmp_path / "corpus"))
    data = {"source": source, "sequence_length": 52, "holdout": 0.2}
    train = {"steps": 1, "batch_size": 4, "eval_batches": 1}
    values = tiny_run("midtrain", {"train": train, "data": data, "refine": {"objective": "ntp"}})
    midtrain.run(Config.from_dict(values), tmp_path / "run")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("compil")]
    programs = ("the evaluation", "the training step (next token)")
    assert said[::2] == [f"compiling {what}; this may take minutes" for what in programs]
    assert all(re.fullmatch(r"compiled in \d+ s", line) for line in said[1::2]) and len(said) == 4
