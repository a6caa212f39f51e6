"""The lock of a run's folder: one of two runs, with real processes, killed ones and other hosts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import config_file, tiny_run

from refine_jax.base import lock
from refine_jax.base.errors import RunError
from refine_jax.base.lock import Lock

# Takes the lock of a folder at a given time, says so, and holds it until its input ends.
_HOLD = """
import sys, time
from refine_jax.base.errors import RunError
from refine_jax.base.lock import Lock

time.sleep(max(0, float(sys.argv[2]) - time.time()))
try:
    with Lock(sys.argv[1], say=lambda text: print("said", text, flush=True)):
        print("held", flush=True)
        sys.stdin.read()
except RunError as error:
    print("refused", error, flush=True)
"""


def hold(folder, start=0.0):
    return subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder), str(start)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def edit(folder, **changes):
    """The lock in a folder as if somebody else had written it, with its time unchanged."""
    path = folder / ".lock"
    times = path.stat()
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def age(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.mark.parametrize("dead", [False, True])
def test_of_two_that_start_at_once_one_holds_the_lock(tmp_path, dead):
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        if dead:
            killed = hold(folder)
            assert killed.stdout.readline() == "held\n"
            killed.kill()
            killed.wait()
        both = [hold(folder, time.time() + 0.25) for _ in range(2)]
        words = []
        for process in both:
            line = process.stdout.readline()
            if line.startswith("said"):
                assert dead and f"process {killed.pid} on host {socket.gethostname()}" in line
                line = process.stdout.readline()
            words.append(line.split(maxsplit=1))
        assert sorted(word[0] for word in words) == ["held", "refused"], words
        (refusal,) = (word[1] for word in words if word[0] == "refused")
        (owner,) = (p for p, word in zip(both, words, strict=True) if word[0] == "held")
        assert f"process {owner.pid} on host" in refusal and "UTC" in refusal
        for process in both:
            process.communicate()
        assert not folder.exists() or files(folder) == []


def test_a_killed_owner_is_replaced_at_once_also_before_it_is_reaped(tmp_path):
    (tmp_path / "notes").touch()
    killed = hold(tmp_path)
    assert killed.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=rf"in use.*process {killed.pid} on.*kill {killed.pid}"):
        Lock(tmp_path).take()
    killed.kill()
    said = []
    begin = time.monotonic()
    while not said:  # until the signal has worked
        try:
            with Lock(tmp_path, said.append):
                assert files(tmp_path) == [".lock", "notes"]
        except RunError:
            assert time.monotonic() < begin + 5
    killed.wait()
    assert said == [
        f"Took over the lock of process {killed.pid} on host {socket.gethostname()}, which is gone."
    ]
    assert files(tmp_path) == ["notes"]


def test_a_process_number_that_was_used_again_is_another_process(tmp_path):
    with Lock(tmp_path):
        edit(tmp_path, started=12, token="x")
        said = []
        with Lock(tmp_path, said.append):
            assert len(said) == 1


@pytest.mark.parametrize("changes", [{"boot": "another"}, {"pid_namespace": 5}, {"boot": None}])
def test_owners_elsewhere_are_known_by_their_signs_of_life(tmp_path, changes):
    owner = Lock(tmp_path)
    owner.take()
    edit(tmp_path, **changes, host="elsewhere", pid=1)
    age(tmp_path / ".lock", 50)
    with pytest.raises(RunError, match="process 1 on host elsewhere"):
        Lock(tmp_path).take()
    age(tmp_path / ".lock", 70)
    said = []
    with Lock(tmp_path, said.append):
        assert said == ["Took over the lock of process 1 on host elsewhere, which is gone."]
        # It wakes up and notices, and leaves the lock to the other.
        with pytest.raises(RunError, match="taken"):
            owner.check()
        owner.release()
        assert files(tmp_path) == [".lock"]


def test_the_owner_gives_signs_of_life_and_puts_a_lock_that_was_removed_back(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with Lock(tmp_path) as owner:
        age(tmp_path / ".lock", 1000)
        begin = time.monotonic()
        while time.time() - (tmp_path / ".lock").stat().st_mtime > 100:
            assert time.monotonic() < begin + 10
            time.sleep(0.02)
        (tmp_path / ".lock").unlink()
        owner.check()
        with pytest.raises(RunError, match="in use"):
            Lock(tmp_path).take()
    assert files(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"pid": true}', b"x" * 10**6])
def test_a_damaged_lock_waits_for_signs_of_life(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with pytest.raises(RunError, match=r"\.lock.*[Rr]emove"):
        Lock(tmp_path).take()
    age(tmp_path / ".lock", 70)
    said = []
    with Lock(tmp_path, said.append):
        assert said == ["Took over the lock of an unknown process, which is gone."]


def test_a_link_or_folder_of_its_name_is_refused_and_left(tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    for make in (
        lambda path: path.symlink_to(target),
        lambda path: path.symlink_to(tmp_path / "nowhere"),
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),
    ):
        folder = tmp_path / "run"
        folder.mkdir()
        make(folder / ".lock")
        with pytest.raises(RunError, match=r"\.lock is no lock of a run"):
            Lock(folder).take()
        assert files(folder) == [".lock"]
        (folder / ".lock").rmdir() if (folder / ".lock").is_dir() else (folder / ".lock").unlink()
        folder.rmdir()
    assert target.read_text() == "precious" and files(tmp_path) == ["target"]


def test_a_folder_that_cannot_be_one_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(RunError, match=rf"cannot write in .*{folder}"):
            Lock(folder).take()


def test_a_lock_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with Lock(tmp_path) as owner:
        owner.check()
        with pytest.raises(RunError, match="in use"):
            Lock(tmp_path).take()
    assert files(tmp_path) == []


def test_a_second_run_is_refused_with_one_message_and_the_first_goes_on(tmp_path):
    """Real commands; the second is refused before it has read any data."""
    config = tiny_run("midtrain", {"data": {"source": str(tmp_path / "nowhere")}})
    flags = [
        f"--config={config_file(tmp_path / 'a.py', config)}",
        f"--workdir={tmp_path / 'run'}",
    ]
    first = hold(tmp_path / "run")
    assert first.stdout.readline() == "held\n"
    done = subprocess.run(
        [sys.executable, "-m", "refine_jax.main", *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        timeout=200,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert f"in use by another run: process {first.pid} on host" in done.stderr
    assert files(tmp_path / "run") == [".lock"]
    first.send_signal(signal.SIGINT)
    first.communicate()
