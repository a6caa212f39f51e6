"""Kill runs of every phase at random moments, start them again, and compare bit for bit.

    python tests/soak.py --kills=48 --seed=0 --json
    python tests/soak.py --kills=20 --bucket --faults=0.02

Each kind of run is first done without interruption. Then it is killed again and again, by SIGKILL
or SIGTERM, after a random time or while a checkpoint is being written, until it is complete; its
metrics, predictions and final parameters must be those of the first. Exit code 0: they are. With
--bucket these runs are in a bucket (`buckets.py`), the first ones on a disk; --faults is the
probability that a request fails.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from buckets import Bucket
from tiny_runs import WORDS, comparable, config_file, tiny_run, write_documents

from refine_jax.base.files import path_of
from refine_jax.checkpoint import load_model
from refine_jax.checkpoint.steps import find_steps
from refine_jax.report.metrics import read_metrics

ROOT = Path(__file__).parents[1]
STEPS = 30
PATIENCE = 900  # seconds of one start of a run, on a busy machine
KINDS = ("midtrain", "midtrain-2", "posttrain", "evaluate", "testtime")
"""Phases, with the number of processes where it is not one."""


def make_config(kind: str, folder: Path):
    """A run of seconds that saves after every other step."""
    phase = kind.partition("-")[0]
    changes: dict[str, dict[str, Any]] = {
        "data": {"source": str(folder / "corpus"), "sequence_length": 52, "holdout": 0.2},
        "train": {"steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "eval_batches": 1},
    }
    changes["data"]["min_remainder"] = 52
    changes["train"] |= {"checkpoint_every": 2, "log_every": 1, "warmup_ntp_steps": STEPS // 2}
    if phase == "posttrain":
        changes["data"] = {"source": "recall", "limit_documents": 40, "sequence_length": 256}
        changes["train"] |= {"warmup_ntp_steps": 0, "mini_batch_size": 4}
        changes["prompts"] = {"max_answer_tokens": 8}
    if phase in ("evaluate", "testtime"):
        changes["evaluate"] = {"tasks": "lcc", "data": str(folder / "code.jsonl"), "batch_size": 2}
        changes["generation"] = {"max_new_tokens": 8}
        changes["refine"] = {"edge_margin": 3}
        changes["testtime"] = {"steps": 2, "batch_size": 2, "mini_batch_size": 2}
    return tiny_run(phase, changes)


def write_inputs(folder: Path) -> None:
    """Documents to train on, and questions."""
    (folder / "corpus").mkdir()
    write_documents(folder / "corpus")
    with (folder / "code.jsonl").open("w", encoding="utf-8") as file:
        for index in range(60):
            words = np.random.default_rng(index).choice(WORDS, 5)
            row = {"task": "lcc", "prompt": " ".join(words), "answers": [str(words[0])]}
            file.write(json.dumps(row) + "\n")


def start(kind: str, config: Path, workdir: Path, out: Path, cache: Path, **variables: str):
    """The processes of a run; their output goes to files that are named after `out`."""
    count = int(kind.partition("-")[2] or 1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles faster
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
        **variables,
    }
    command = [sys.executable, "-m", "refine_jax.main", f"--config={config}"]
    command.append(f"--workdir={workdir}")
    processes = []
    for index in range(count):
        address = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
        address.append(f"--process_id={index}")
        with (
            Path(f"{out}.out{index}").open("wb") as output,
            Path(f"{out}.err{index}").open("wb") as err,
        ):
            processes.append(
                subprocess.Popen(
                    command + (address if count > 1 else []),
                    stdout=output,
                    stderr=err,
                    cwd=ROOT,
                    env=environment,
                )
            )
    return processes


def finish(processes: list[subprocess.Popen]) -> list[int]:
    """Exit codes, once all have ended; none is left."""
    try:
        return [process.wait(PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def complain_unless(codes: list[int], allowed: tuple[int, ...], out: Path) -> None:
    """End with what a run printed if an exit code is none of those allowed."""
    if not set(codes) <= set(allowed):
        text = "".join(p.read_text(errors="replace") for p in out.parent.glob("*.err*"))
        raise SystemExit(f"{out.name} ended with {codes}, not {allowed}.\n{text[-3000:]}")


def half_written(workdir: Path) -> list[Path]:
    """What saves that are under way, or were killed, have written."""
    folder = workdir / "checkpoints"
    if isinstance(folder, Path):
        return list(folder.glob("*.orbax-checkpoint-tmp*"))
    saved = find_steps(folder).saved
    steps = [path for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    return [path for path in steps if int(path.name) not in saved]


def records_of(workdir: Path) -> int:
    """Steps, or questions, that are done."""
    names = ("metrics.jsonl", "predictions.jsonl")
    return sum(p.read_bytes().count(b"\n") for n in names if (p := workdir / n).exists())


def kill(
    processes, workdir: Path, out: Path, draw: random.Random, total: int
) -> dict[str, Any] | None:
    """Kill one process of a run of `total` records; returns how, None where it ended before."""
    name = draw.choice(("SIGKILL", "SIGKILL", "SIGTERM"))
    have = records_of(workdir)
    goal = draw.randint(have, max(have, total - 3))
    saving = draw.random() < 0.6 and not (workdir / "predictions.jsonl").exists()
    wait, victim = draw.uniform(0, 0.1), draw.choice(processes)
    pause = 0.0005 if isinstance(workdir, Path) else 0.05
    deadline = time.monotonic() + PATIENCE
    while all(process.poll() is None for process in processes):
        if b"parameters" in Path(f"{out}.out0").read_bytes() and records_of(workdir) >= goal:
            if not saving:
                time.sleep(wait)
                break
            if half_written(workdir):
                break
        if time.monotonic() > deadline:
            raise SystemExit(f"{workdir.name} did not end within {PATIENCE} s.")
        time.sleep(pause)
    if any(process.poll() is not None for process in processes):
        complain_unless(finish(processes), (0,), out)
        return None
    number = getattr(signal, name)
    victim.send_signal(number)
    codes = finish(processes)
    # The others of a process that was killed end by themselves, jax's coordinator by an abort.
    complain_unless(codes, (0,) if name == "SIGTERM" else (-9, 1, -6, 0), out)
    return {"signal": name, "half_written": len(half_written(workdir))}


def results_of(workdir: Path) -> Any:
    """What a run computed, without how long it took, its final parameters as bytes."""
    if (workdir / "checkpoints").exists():
        loaded = load_model(workdir)
        values = {
            jax.tree_util.keystr(path): leaf.tobytes()
            for path, leaf in jax.tree_util.tree_leaves_with_path(loaded.params)
        }
        return comparable(workdir), loaded.step, values
    answers = read_metrics(workdir / "predictions.jsonl")
    for record in answers:
        del record["seconds_read"], record["seconds_generate"]
        for name in ("seconds", "compiled"):
            record.get("adapt", {}).pop(name, None)
    return sorted(answers, key=lambda record: record["id"])


def soak(kills: int, seed: int, kinds=KINDS, say=print, bucket=None) -> dict[str, Any]:
    """Kill runs; returns how often, and what differed from runs that were not interrupted.

    bucket: where those that are killed are, None: on a disk.
    """
    draw, variables = random.Random(seed), {} if bucket is None else bucket.environment
    done: dict[str, Any] = {"kills": 0, "SIGKILL": 0, "SIGTERM": 0, "half_written": 0}
    done |= {"taken_over": 0, "runs": 0, "differences": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        for index, kind in enumerate(kinds):
            share = kills // len(kinds) + (index < kills % len(kinds))
            home = folder / kind
            home.mkdir()
            config = config_file(home / "config.py", make_config(kind, folder))
            cache = folder / "compiled"
            for run in ("first", "whole"):  # the second compiles nothing
                ended = finish(start(kind, config, home / run, home / run, cache))
                complain_unless(ended, (0,), home / run)
            whole, total, killed = results_of(home / "whole"), records_of(home / "whole"), 0
            if results_of(home / "first") != whole:
                done["differences"].append(f"{kind}: two runs that nothing interrupts")
            while killed < share:
                out, complete, last = home / f"run{done['runs']}", False, None
                workdir = out if bucket is None else path_of(bucket / f"{kind}/{out.name}")
                done["runs"] += 1
                while not complete:
                    processes = start(kind, config, workdir, out, cache, **variables)
                    if killed == share:
                        complain_unless(finish(processes), (0,), out)
                        how, complete = None, True
                    else:
                        how = kill(processes, workdir, out, draw, total)
                        complete = how is None
                    said = b"Took over the lock" in Path(f"{out}.out0").read_bytes()
                    done["taken_over"] += said
                    if last == "SIGTERM" and said:
                        done["differences"].append(f"{kind}: a lock was left after SIGTERM")
                    last = how and how["signal"]
                    if how:
                        killed, done["kills"] = killed + 1, done["kills"] + 1
                        done[how["signal"]] += 1
                        done["half_written"] += how["half_written"] > 0
                        say(f"{kind}: {how['signal']}, {how['half_written']} half-written")
                if results_of(workdir) != whole:
                    done["differences"].append(f"{kind}: run {workdir.name}, seed {seed}")
                shutil.rmtree(workdir) if bucket is None else workdir.rmtree()
    return done


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of run, joined by commas")
    parser.add_argument("--bucket", action="store_true", help="the runs are in a bucket")
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests that fail")
    parser.add_argument("--json", action="store_true", help="print the figures as the last line")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if options.bucket:
        bucket = Bucket()
        os.environ.update(bucket.environment)
        with bucket.flaky(options.faults, options.seed):
            done = soak(options.kills, options.seed, kinds, bucket=bucket)
        done |= {"requests": bucket.requests.total(), "faults": bucket.faults}
        bucket.close()
    else:
        done = soak(options.kills, options.seed, kinds)
    print(json.dumps(done) if options.json else f"{done}")
    return 1 if done["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
