"""Paths of buckets: spelled and failing as those of a disk; files, locks and lines in a bucket."""

import asyncio
import json
import pickle
import time
from types import SimpleNamespace

import pytest

from refine_jax.base import growing, lock
from refine_jax.base.errors import ConfigError, DataError, RunError, describe
from refine_jax.base.files import (
    append,
    check_output,
    check_writable,
    given_path,
    parse_object,
    path_of,
    read_json,
    read_lines,
    recover_lines,
    replacing,
    write_text,
)
from refine_jax.base.growing import Journal, Mirror, as_if_there
from refine_jax.base.lock import Lock
from refine_jax.base.remote import RemotePath, remote_path


@pytest.fixture
def impatient(monkeypatch):
    """The client of buckets waits a hundredth of its time before it tries again."""
    sleep = asyncio.sleep
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=lambda s: sleep(s / 100)))


def test_remote_paths_are_spelled_as_those_of_pathlib():
    run = RemotePath("memory://bucket/run")
    file = run / "a" / "b.txt"
    assert str(file) == "memory://bucket/run/a/b.txt" and str(file.relative_to(run)) == "a/b.txt"
    assert (file.name, file.suffix, file.parent.parent) == ("b.txt", ".txt", run)
    assert str(file.with_name("c")) == "memory://bucket/run/a/c" and file.is_relative_to(run)
    assert pickle.loads(pickle.dumps(file)) == file == path_of(str(file)) == path_of(file)
    file.write_bytes("è\n".encode())
    (run / "c").write_bytes(b"")
    assert [path.name for path in run.iterdir()] == ["a", "c"]
    assert (run.is_dir(), run.is_file(), file.is_file()) == (True, False, True)
    assert list(run.glob("*/*.txt")) == [file] and list(run.walk()) == [(file, 3), (run / "c", 0)]
    assert file.open().read() == file.read_text() == "è\n" and file.stat().st_size == 3
    with pytest.raises(OSError, match="objects are written whole"):
        file.open("a")
    for look in (file.with_name("no").read_bytes, file.with_name("no").stat, (run / "no").unlink):
        with pytest.raises(FileNotFoundError) as error:
            look()
        assert describe(error.value).startswith("cannot use memory://bucket/run/")


BAD = {
    "gs:/bucket/x": "a URL such as gs://bucket/folder. Got: 'gs:/bucket/x'",
    " gs://bucket": "a URL such as gs://bucket/folder",
    "gs://": "a URL such as gs://bucket/folder",
    "nosuch://bucket/x": "of a bucket (gs://, or one of fsspec's to read from)",
    "file:///x": "a URL such as gs://bucket/folder",
    "file://host/x": "of a file system or of a bucket",
    "memory://x/y": "memory:// gives data alone",
    "gs://bucket/a\0b": "a URL such as gs://bucket/folder",
}


@pytest.mark.parametrize("url", BAD)
def test_urls_that_name_nothing_are_one_message(url):
    with pytest.raises(ConfigError) as error:
        remote_path(url, "--x", write=True)
    assert str(error.value).startswith("--x must be a path") and BAD[url] in str(error.value)


def test_a_package_that_is_missing_is_one_message(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for url, fix in (("gs://bucket/x", "'refine-jax[gcs]'"), ("abfs://container/x", "adlfs")):
        with pytest.raises(ConfigError) as error:
            given_path(url, "--x")
        text = str(error.value)
        assert text.startswith(f"--x={url}: {url.partition(':')[0]}:// needs the package ")
        assert f"which is not installed: pip install {fix}" in text


def test_stores_that_refuse_are_one_message(monkeypatch):
    class Refusing:
        def __getattr__(self, name):
            def refuse(*_, **__):
                raise OSError(f"Forbidden: b/x/o\nno storage.objects.{name} access")

            return refuse

    monkeypatch.setattr("refine_jax.base.remote._file_system", lambda scheme: Refusing())
    with pytest.raises(ConfigError) as error:
        check_writable(RemotePath("gs://bucket/run"), "--workdir")
    text = str(error.value)
    assert text.startswith("--workdir='gs://bucket/run': nothing can be written there: Forbidden")
    assert "gcloud auth application-default login" in text and "\n" not in text


def test_files_are_written_whole_or_not_at_all(bucket):
    folder = path_of(bucket / "files")
    check_writable(folder, "--workdir")
    check_output(folder / "new" / "page.html", "--out")
    assert not folder.exists()
    with pytest.raises(ConfigError, match="there is no bucket elsewhere"):
        check_writable(RemotePath("gs://elsewhere/run"), "--workdir")
    write_text(folder / "a.json", '{"a": 1}')
    with pytest.raises(ZeroDivisionError), replacing(folder / "a.json") as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert read_json(folder / "a.json", DataError) == {"a": 1}
    with pytest.raises(ConfigError, match="It is a file"):
        check_writable(folder / "a.json", "--workdir")


def test_lines_are_written_from_time_to_time(bucket, monkeypatch):
    path, clock = path_of(bucket / "lines/metrics.jsonl"), [0.0]
    monkeypatch.setattr(growing.time, "monotonic", lambda: clock[0])
    with Journal(path, ["0\n"]) as journal:
        journal.add("1\n", "2\n")
        assert path.read_bytes() == b"0\n"
        clock[0] = growing.FLUSH
        journal.add("3\n")
        assert path.read_bytes() == b"0\n1\n2\n3\n"
        journal.add("4\n")
        journal.flush()
        assert path.read_bytes().endswith(b"4\n")
        journal.add("5\n")
    assert path.read_bytes() == b"0\n1\n2\n3\n4\n5\n"


def test_lines_that_are_no_records_are_kept_beside(bucket):
    path, said = path_of(bucket / "bad/metrics.jsonl"), []
    write_text(path, '{"a": 1}\nnonsense\n{"a": 2}\n{"a')

    def parse(line):
        return parse_object(line, "it", DataError)

    for _ in range(2):
        assert recover_lines(path, parse, said.append) == [{"a": 1}, {"a": 2}]
    assert path.with_name("metrics.jsonl.dropped").read_bytes() == 2 * b'nonsense\n{"a\n'
    assert said[0] == said[1] and "lines 2" not in said[0] and "left out line 2" in said[0]
    append(path, b"\n")
    assert len(read_lines(path, parse)[1]) == 2


def test_libraries_write_to_a_folder_that_is_copied(bucket):
    folder = path_of(bucket / "mirrored")
    write_text(folder / "data.db", "before")
    with Mirror(folder) as mirror:
        assert mirror.path.name == "mirrored" and mirror.fetch("data.db").read_text() == "before"
        requests = bucket.requests.total()
        mirror.upload()
        assert bucket.requests.total() == requests
        (mirror.path / "events").mkdir()
        (mirror.path / "events" / "1").write_text("x")
        mirror.upload()
        assert (folder / "events" / "1").read_text() == "x"
        (mirror.path / "data.db").write_text("after")
    assert (folder / "data.db").read_text() == "after" and not mirror.path.exists()
    with pytest.raises(DataError) as error, as_if_there(folder) as copy:
        raise DataError(f"{copy / 'data.db'} is damaged.")
    assert str(error.value) == f"{folder / 'data.db'} is damaged."


def edit(folder, **changes):
    """The lock in a folder as if somebody else had written it."""
    path = folder / ".lock"
    path.write_bytes(json.dumps(json.loads(path.read_bytes()) | changes).encode())


def test_one_of_two_runs_gets_the_lock_of_a_bucket(bucket):
    folder, said = path_of(bucket / "locked"), []
    with Lock(folder) as first:
        for _ in range(3):
            first._touch()
        with pytest.raises(RunError, match="is in use by another run"):
            Lock(folder).take()
        first.check()
    assert not folder.exists()
    # Of a process of this machine that is gone: taken over at once.
    gone = Lock(folder)
    gone.take()
    gone._stop.set()
    edit(folder, pid=2**22 - 1, started=1)
    with Lock(folder, said.append) as second:
        second.check()
        assert len(said) == 1 and "which is gone" in said[0]
        # Whoever is taken over notices it, and cannot write over the other's lock.
        edit(folder, token="other")
        second._touch()
        with pytest.raises(RunError, match=r"has taken .* over"):
            second.check()
        assert read_json(folder / ".lock", DataError)["token"] == "other"
    assert (folder / ".lock").exists()


def test_the_lock_of_a_silent_host_is_taken_over_after_a_minute(bucket, monkeypatch):
    folder = path_of(bucket / "silent")
    silent = Lock(folder)
    silent.take()
    silent._stop.set()
    edit(folder, host="elsewhere", boot="another")
    with pytest.raises(RunError, match="on host elsewhere"):
        Lock(folder).take()
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    time.sleep(0.01)
    with Lock(folder, lambda text: None) as taken:
        taken.check()


def test_requests_that_fail_lose_nothing(bucket, impatient):
    folder = path_of(bucket / "flaky")
    before = bucket.faults.total()
    with bucket.flaky(0.25, seed=0), Journal(folder / "lines.jsonl") as journal:
        for number in range(12):
            content = bytes([number]) * 100
            (folder / str(number)).write_bytes(content)
            assert (folder / str(number)).read_bytes() == content
            journal.add(f"{number}\n")
            journal.flush()
            with Lock(folder / f"run-{number}") as held:
                held._touch()
                held.check()
        assert len(list(folder.walk())) == 13
        for number in range(12):
            (folder / str(number)).unlink(missing_ok=True)
    assert [path.name for path in folder.iterdir()] == ["lines.jsonl"]
    assert (folder / "lines.jsonl").read_text() == "".join(f"{n}\n" for n in range(12))
    assert bucket.faults.total() - before > 25 and len(bucket.faults) == 6
