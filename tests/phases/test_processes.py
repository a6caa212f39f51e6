"""Several real processes as one run, over the loopback interface; and how they are started."""

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent import futures
from pathlib import Path

import numpy as np
import processes
import pytest
from tiny_runs import WORDS, config_file, tiny_run, write_documents

from refine_jax import cluster, distributed
from refine_jax.base.errors import ConfigError
from refine_jax.checkpoint import load_model
from refine_jax.checkpoint.tree import flatten
from refine_jax.config import Config
from refine_jax.phases import midtrain
from refine_jax.report.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "processes.py"
STEPS, STOP = 6, 3

# Many processes on few cores: time to spare where other tests run beside them.
pytestmark = [pytest.mark.usefixtures("compile_once"), pytest.mark.timeout(1200)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def finish(commands, *, timeout=500, **variables):
    """[(exit code, standard output, standard error)] of commands run side by side; none is left.

    timeout: seconds, after which they are aborted and say where each of their threads is.
    """
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONFAULTHANDLER": "1", **variables}
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for command in commands
    ]
    late = threading.Timer(timeout, lambda: [p.send_signal(signal.SIGABRT) for p in running])
    late.start()
    with futures.ThreadPoolExecutor(len(running)) as pool:
        try:
            found = list(pool.map(lambda process: process.communicate(), running))
        finally:
            late.cancel()
            for process in running:
                process.kill()
    return [(p.returncode, *texts) for p, texts in zip(running, found, strict=True)]


def assert_codes(ended, *codes):
    for index, ((code, out, err), wanted) in enumerate(zip(ended, codes, strict=True)):
        if code != wanted:
            pytest.fail(f"Process {index} ended with {code}.\n{out}\n{err}", pytrace=False)


def finish_together(count, task, *arguments, **options):
    """`finish` for the processes of one run of tests/processes.py."""
    address = f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"
    ids = [f"--process_id={index}" for index in range(count)]
    return finish([[SCRIPT, task, *arguments, *address, each] for each in ids], **options)


def tiny(corpus):
    """Next-token steps, then ReFINE, on rows of 52 bytes."""
    changes = {
        "model": {"fresh": {"use_short_conv": False}},
        "data": {
            "source": str(corpus),
            "sequence_length": 52,
            "holdout": 0.2,
            "min_remainder": 52,
        },
        "train": {
            "steps": STEPS,
            "warmup_ntp_steps": STOP,
            "batch_size": 4,
            "micro_batch_size": 4,
            "eval_batches": 1,
            "checkpoint_every": 0,
            "log_every": 1,
            "evaluate": "niah_single_1,position",
        },
        "evaluate": {"lengths": "1024", "samples": 3, "batch_size": 1, "essays": "stdlib"},
        "generation": {"max_new_tokens": 2},
    }
    return tiny_run("midtrain", changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("corpus"))


def run_flags(config, workdir):
    """The flags of a run, with a configuration file."""
    return [f"--config={config_file(workdir.with_suffix('.py'), config)}", f"--workdir={workdir}"]


def assert_same_metrics(records, expected):
    """One record a step, with the numbers of one process."""
    assert [record["step"] for record in records] == [record["step"] for record in expected]
    for record, wanted in zip(records, expected, strict=True):
        assert record.keys() == wanted.keys()
        for name, value in wanted.items():
            if not name.startswith("time/") and name != "tokens_per_second":
                assert record[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (name, wanted)


def test_runs_of_one_two_and_four_processes_are_the_same(corpus, tmp_path):
    """A run of four is stopped by a SIGTERM to one of them, and continued by two, and by one."""
    config = Config.from_dict(tiny(corpus))
    midtrain.run(config, tmp_path / "whole")
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    rows = iter(midtrain.prepare(config, tmp_path / "whole").training)
    batches = [next(rows)["tokens"] for _ in range(STEPS)]

    four = tmp_path / "four"
    ended = finish_together(
        4, "run", 2, STOP, *run_flags(tiny(corpus), four), "--config.mesh.data=2"
    )
    assert_codes(ended, 0, 0, 0, 0)
    assert json.loads(ended[0][1].splitlines()[-1]) == {"interrupted": "SIGTERM", "step": STOP}
    printed = [out.splitlines() for _, out, _ in ended]
    assert f"SIGTERM: saved step {STOP} of {STEPS}" in printed[0][-2]
    assert printed[1:] == [[]] * 3
    assert_same_metrics(read_metrics(four / "metrics.jsonl"), records[: STOP + 1])
    np.testing.assert_array_equal(processes.noted_rows(four), batches[:STOP])

    # Other numbers of processes and devices on other meshes: fsdp=2, where it was data=2, fsdp=2.
    two, one = tmp_path / "two", tmp_path / "one"
    for folder in (two, one):
        shutil.copytree(four, folder, ignore=shutil.ignore_patterns("rows-*"))
    ended = finish_together(2, "run", 0, -1, *run_flags(tiny(corpus), two))
    assert_codes(ended, 0, 0)
    results = json.loads(ended[0][1].splitlines()[-1])
    assert json.loads((two / "results.json").read_text()) == results
    assert f"continuing after step {STOP}" in ended[0][1] and "rows" not in ended[1][1]
    np.testing.assert_array_equal(processes.noted_rows(two), batches[STOP:])
    midtrain.run(config, one)
    for folder in (two, one):
        assert_same_metrics(read_metrics(folder / "metrics.jsonl"), records)
        for name in ("training.png", "rollouts.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")


def other_phase(name, folder):
    """A run of another phase than mid-training, as `tiny`."""
    config = tiny(folder)
    config.phase = name.partition("-")[0]
    if name == "midtrain-lora":
        (folder / "corpus").mkdir()
        config.data.source = str(write_documents(folder / "corpus"))
        config.model.update(lora_rank=2)
        config.train.update(steps=2, warmup_ntp_steps=0, evaluate="", trainable="lora")
        return config
    if config.phase == "posttrain":
        config.data.update(source="recall", limit_documents=40, sequence_length=256)
        config.data.min_remainder = None
        config.prompts.max_answer_tokens = 8
        config.posttrain.update(answers=name.partition("-")[2], samples=2, mini_batch_size=2)
        config.train.update(steps=2, warmup_ntp_steps=0, mini_batch_size=2)
        config.train.micro_batch_size = 1
        return config
    rows = [
        {"task": "lcc", "prompt": " ".join(WORDS[i : i + 5]), "answers": [WORDS[i]]}
        for i in range(6)
    ]
    path = folder / "code.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.evaluate.update(tasks="lcc", data=str(path), batch_size=2)
    config.generation.max_new_tokens = 8
    config.refine.edge_margin = 3
    config.testtime.update(steps=2, batch_size=2, mini_batch_size=2)
    return config


def answers_of(workdir):
    """What a run answered, by id, without what that took."""
    if (workdir / "answers.jsonl").exists():
        return (workdir / "answers.jsonl").read_text()
    answers = {record.pop("id"): record for record in read_metrics(workdir / "predictions.jsonl")}
    for record in answers.values():
        del record["seconds_read"], record["seconds_generate"]
        for name in ("seconds", "compiled"):
            record.get("adapt", {}).pop(name, None)
        if "adapt" in record:
            record["adapt"]["loss"] = pytest.approx(record["adapt"]["loss"], rel=1e-5)
    return answers


@pytest.mark.slow
@pytest.mark.parametrize(
    "phase", ["midtrain-lora", "posttrain-sft", "posttrain-grpo", "evaluate", "testtime"]
)
def test_other_phases_over_two_processes_are_those_of_one(phase, tmp_path):
    config = other_phase(phase, tmp_path)
    module = importlib.import_module(f"refine_jax.phases.{config.phase}")
    module.run(Config.from_dict(config), tmp_path / "one")
    ended = finish_together(2, "run", 0, -1, *run_flags(config, tmp_path / "two"))
    assert_codes(ended, 0, 0)
    if config.train.trainable == "lora":  # updates, and the weights that one process wrote
        runs = [load_model(tmp_path / name, merge=False) for name in ("two", "one")]
        for name, x in flatten(runs[0].params).items():
            np.testing.assert_allclose(x, flatten(runs[1].params)[name], atol=1e-6, err_msg=name)
    else:
        assert answers_of(tmp_path / "two") == answers_of(tmp_path / "one")
    if config.phase in ("midtrain", "posttrain"):
        records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "one")]
        assert_same_metrics(*records)
    else:
        found, expected = (
            json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "one")
        )
        assert found["sets"] == expected["sets"] and found["mean"] == expected["mean"]


def test_processes_read_the_rows_of_their_devices_and_fail_together(tmp_path):
    flags = {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"}
    ended = finish_together(2, "exchange", tmp_path, **flags)
    assert_codes(ended, 1, 1)
    assert all("exchanged" in out for _, out, _ in ended), ended
    assert ended[0][2].splitlines()[-1] == "error: process 1 failed: KeyError: 'a bug'"
    assert ended[1][2].splitlines()[-1] == "KeyError: 'a bug'"
    (predictions,) = tmp_path.iterdir()
    assert [record["id"] for record in read_metrics(predictions)] == list("abcdefghi")


_TOGETHER = """
import os, signal, sys
from refine_jax import distributed

with distributed.ending_together():
    distributed.start(coordinator=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    assert distributed.gather(1) == [1, 1]
    if sys.argv[2] == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.gather(2)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_a_message(victim):
    address = f"127.0.0.1:{free_port()}"
    ended = finish([["-c", _TOGETHER, address, index, victim] for index in range(2)])
    assert ended[victim][0] == -signal.SIGKILL
    code, _, err = ended[1 - victim]
    if victim == 0 and code == -signal.SIGABRT:  # jax may notice first that its coordinator is gone
        assert "most likely indicates that another task died" in err
    else:
        assert code == 1, err
        assert "another process was killed or its host is gone" in err.splitlines()[-1]


_LISTENING = """
import os, socket, sys
from refine_jax import distributed

index = int(sys.argv[2])
distributed.start(coordinator=sys.argv[1], num_processes=2, process_id=index, timeout=100)
mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{fd}")}
assert distributed.gather(index) == [0, 1]
for kind, size in (("tcp", 8), ("tcp6", 32)):
    for line in open(f"/proc/net/{kind}").readlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
            host, port = fields[1].split(":")
            packed = b"".join(bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, size, 8))
            family = socket.AF_INET if size == 8 else socket.AF_INET6
            print(socket.inet_ntop(family, packed), int(port, 16), flush=True)
distributed.gather(0)
"""


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's table of sockets")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_local_processes_listen_on_the_loopback_interface_alone(host):
    """The coordinator, which obeys everyone, and the connections of gloo; nothing else is said."""
    port = free_port()
    commands = [["-c", _LISTENING, f"{host}:{port}", index] for index in range(2)]
    ended = finish(commands, timeout=200)
    assert_codes(ended, 0, 0)
    found = [[line.rsplit(" ", 1) for line in out.splitlines()] for _, out, _ in ended]
    loopback = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    for listening in found:
        assert listening and {address for address, _ in listening} <= loopback, found
    assert str(port) in [number for _, number in found[0]]
    assert [err for _, _, err in ended] == ["", ""]


def test_a_coordinator_listens_where_it_is_told(monkeypatch, capsys):
    """On all interfaces only where the host may be another machine to others, with a word."""
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    for address, addresses, expected in (
        ("127.0.0.1:8476", ["127.0.0.1"], "127.0.0.1:8476"),
        ("[::1]:8476", ["::1"], "[::1]:8476"),
        ("10.0.0.7:8476", ["10.0.0.7"], "10.0.0.7:8476"),
        ("this-host:8476", ["10.0.0.7"], "10.0.0.7:8476"),
        ("this-host:8476", ["10.0.0.7", "10.0.1.7"], "this-host:8476"),
    ):
        monkeypatch.setattr(cluster, "_can_bind", lambda host, port: True)
        assert cluster.bind_address(address, addresses) == expected
        assert capsys.readouterr().err == ""
    # Debian names the machine 127.0.1.1 in its own /etc/hosts; a load balancer is elsewhere.
    for addresses, mine in ((["127.0.1.1"], True), (["8.8.8.8"], False)):
        monkeypatch.setattr(
            cluster, "_can_bind", lambda host, port, mine=mine: mine or host == "0.0.0.0"
        )
        assert cluster.bind_address("some-host:8476", addresses) is None
        assert "listens on port 8476 of all its addresses" in capsys.readouterr().err
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "10.1.1.1:8476")
    assert cluster.bind_address("some-host:8476", ["8.8.8.8"]) is None
    assert capsys.readouterr().err == ""


def test_a_port_in_use_and_an_unknown_host_are_told():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        for address, words in (
            (f"127.0.0.1:{taken}", f"cannot listen on port {taken} of 127.0.0.1"),
            ("no-such-host.invalid:8476", "the host 'no-such-host.invalid' of process 0 is not"),
            ("256.256.256.256:8476", "is not known here"),
        ):
            with pytest.raises(ConfigError) as error:
                distributed.start(coordinator=address, num_processes=2, process_id=0)
            assert words in str(error.value) and address in str(error.value)


def test_a_process_without_the_others_says_so(tmp_path):
    start = (
        "from refine_jax import distributed; distributed.start("
        f"coordinator='127.0.0.1:{free_port()}', num_processes=2, process_id={{}}, timeout=2)"
    )
    ended = finish([["-c", start.format(1)]])
    assert ended[0][0] == 1
    assert ended[0][2].startswith("error: The other processes were not there within 2 s (this is")
    assert "process 1 of 2 at 127.0.0.1:" in ended[0][2]


@pytest.mark.parametrize(
    ("mode", "address", "words"),
    [
        ("auto", (None, 2, 0), "Missing: --coordinator. Got: --num_processes=2, --process_id=0."),
        ("auto", ("h:1", None, None), "Missing: --num_processes, --process_id. Got: --coord"),
        ("auto", ("host", 2, 0), "must be HOST:PORT of process 0. Got: 'host'"),
        ("auto", ("host:many", 2, 0), "must be HOST:PORT"),
        *(
            ("auto", (address, 2, 0), "must be HOST:PORT")
            for address in ("::1:80", "[::1]", "[host]:80", "h:0", "h:65536", ":80", "h:-1")
        ),
        *(
            ("auto", (address, 2, 0), "must be HOST:PORT")
            for address in ("http://h:80", "a b:80", "h:８０", "h:80 ", "", "h:" + "9" * 5000)
        ),
        ("auto", ("host:1", 10**9, 0), "--num_processes at most 65,536"),
        ("auto", ("host:1", 2, -1), "must be one of 0 .. num_processes - 1"),
        ("auto", ("host:1", 2, 2), "must be one of 0 .. num_processes - 1"),
        ("auto", ("host:1", 0, 0), "must be one of 0 .. num_processes - 1"),
        ("off", ("host:1", 2, 0), "--distributed=off excludes --coordinator"),
    ],
)
def test_incomplete_addresses_are_refused(mode, address, words):
    names = ("coordinator", "num_processes", "process_id")
    with pytest.raises(ConfigError) as error:
        distributed.start(mode, **dict(zip(names, address, strict=True)))
    assert words in str(error.value)


_SRUN = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "1"}
_HOSTS = {"TPU_WORKER_HOSTNAMES": "a,b"}


@pytest.mark.parametrize(
    ("environment", "tpu", "answer", "expected"),
    [
        ({}, False, "never asked", None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, False, "", "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False, "", None),
        (_SRUN | {"SLURM_STEP_NUM_TASKS": "4"}, False, "", "SLURM"),
        # A batch script outside of srun, and a step of one task.
        (_SRUN, False, "", None),
        (_SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, False, "", None),
        # A pod of Kubernetes may be a notebook.
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, "", None),
        (_HOSTS, True, "", "TPU pod"),
        (_HOSTS, False, "", None),
        (_HOSTS | {"JAX_PLATFORMS": "cpu"}, True, "", None),
        (_HOSTS | {"JAX_PLATFORMS": "tpu,cpu"}, True, "", "TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, "a,b", None),
        ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "a"}, True, "", "TPU slices"),
        ({}, True, "w0:7:10.0.0.1,w1:8:10.0.0.2", "TPU pod"),
        ({}, True, "w0:7:10.0.0.1", None),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, "a,b", None),
    ],
)
def test_only_signs_of_several_processes_count(monkeypatch, environment, tpu, answer, expected):
    asked = []
    monkeypatch.setattr(cluster, "_has_tpu", lambda: tpu)
    monkeypatch.setattr(cluster, "_ask_metadata", lambda: asked.append(1) or answer)
    assert cluster.find_cluster(environment) == expected
    assert not asked or tpu


def test_one_process_starts_nothing_and_agrees_with_itself(tmp_path):
    distributed.start()  # neither waits nor asks
    assert distributed.is_writer() and distributed.gather(5) == [5]
    distributed.check_same("anything", "x")
    distributed.check_shared(tmp_path / "run")
    assert not list(tmp_path.iterdir())
