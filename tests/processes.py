"""What tests/phases/test_processes.py starts in processes of its own.

python tests/processes.py run SIGTERM_PROCESS SIGTERM_STEP FLAGS...
python tests/processes.py exchange FOLDER COORDINATOR NUM_PROCESSES PROCESS_ID
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from corpora import data_config

from refine_jax import distributed, main, parallel
from refine_jax.config import MeshConfig, PromptsConfig
from refine_jax.evaluation.runner import Predictions, evaluate
from refine_jax.phases import midtrain
from refine_jax.report.monitor import Monitor


def noted_rows(workdir: Path) -> list[np.ndarray]:
    """The batches [B, T] that the processes of `run` in a folder trained on, by step."""
    batches: list[dict[int, list]] = []
    for path in workdir.glob("rows-*.jsonl"):
        for step, line in enumerate(path.read_text().splitlines()):
            if step == len(batches):
                batches.append({})
            for row, tokens in json.loads(line).items():
                assert batches[step].setdefault(int(row), tokens) == tokens
    return [np.array([batch[row] for row in range(len(batch))]) for batch in batches]


def run(process: int, step: int) -> None:
    """`python -m refine_jax.main`, in which a process sends itself SIGTERM after a step.

    Each process also writes the rows that it trains on, see `noted_rows`.
    """
    record, place = Monitor.record, midtrain.MidtrainLoop.place

    def place_and_note(self, batch, dataset):
        if dataset is self.parts.training:
            rows = dict(zip(dataset.share, batch["tokens"].tolist(), strict=True))
            with (self.workdir / f"rows-{jax.process_index()}.jsonl").open("a") as file:
                file.write(json.dumps(rows) + "\n")
        return place(self, batch, dataset)

    def record_and_signal(self, done, metrics):
        record(self, done, metrics)
        if done == step and jax.process_index() == process:
            os.kill(os.getpid(), signal.SIGTERM)

    Monitor.record, midtrain.MidtrainLoop.place = record_and_signal, place_and_note
    sys.exit(main.main())


def exchange(folder: str, coordinator: str, num_processes: int, process_id: int) -> None:
    """Two processes of two devices: all that they exchange but training; then process 1 fails."""
    distributed.start(
        coordinator=coordinator, num_processes=num_processes, process_id=process_id, timeout=100
    )
    assert jax.process_count() == num_processes and jax.device_count() == 4
    assert distributed.gather(7 * process_id) == [0, 7]
    devices = jax.devices()
    turns = [devices[i] for i in (0, 2, 1, 3)]  # of process 0, 1, 0, 1
    for mesh, order, expected in (
        ({"data": 2, "fsdp": 2}, devices, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ({"data": 2, "fsdp": 2}, turns, [(0, 1, 4, 5), (2, 3, 6, 7)]),
        ({"fsdp": 2, "tensor": 2}, devices, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ({"fsdp": 2, "tensor": 2}, turns, [tuple(range(8))] * 2),
        ({"fsdp": 1, "sequence": 4}, devices, [tuple(range(8))] * 2),
        ({"fsdp": 4, "sequence": 1}, turns, [(0, 1, 4, 5), (2, 3, 6, 7)]),
    ):
        parallel.default_devices = lambda order=order: order
        with parallel.use_mesh(MeshConfig(**mesh)):
            share = parallel.rows_here(8)
            assert share == expected[process_id], (mesh, share)
            _check_batches(share)
            # Rows that the devices cannot share evenly are on all of them.
            assert parallel.rows_here(3) == (0, 1, 2)
    distributed.check_shared(folder)
    distributed.check_same("text", "equal")
    try:
        distributed.check_same("text", f"of {process_id}")
    except distributed.ProcessError as error:
        assert "1 of 2 differ from process 0" in str(error)
    else:
        raise AssertionError
    try:
        distributed.check_shared(os.path.join(folder, f"of-{process_id}"))
    except distributed.ProcessError as error:
        assert "Process 1 of 2 did not see" in str(error)
    else:
        raise AssertionError
    _check_evaluation(folder, process_id)
    print("exchanged", flush=True)
    if process_id == 1:
        raise KeyError("a bug")
    distributed.gather(0)  # waits for process 1
    raise AssertionError


def _check_batches(share: tuple[int, ...]) -> None:
    from refine_jax.data import load_prompts
    from refine_jax.data.prompts import trim_batch, trimmed_width
    from refine_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    options = data_config(
        source="recall", sequence_length=256, limit_documents=20, tokenizer="bytes"
    )
    corpus = load_prompts(options, PromptsConfig(max_answer_tokens=8), tokenizer)
    whole = iter(corpus.dataset("train", 8))
    dataset = corpus.dataset("train", 8, share)
    part = iter(dataset)
    for _ in range(4):
        expected, batch = next(whole), next(part)
        width = max(distributed.gather(trimmed_width(batch)))
        assert width == trimmed_width(expected)
        expected = trim_batch(expected, width)
        placed = parallel.place_rows(trim_batch(batch, width), share, 8)
        assert placed["tokens"].sharding.spec[0]
        for name, x in distributed.fetch(placed).items():
            assert x.dtype == expected[name].dtype
            np.testing.assert_array_equal(x, expected[name])


def _check_evaluation(folder: str, process_id: int) -> None:
    """Groups of questions are answered in turns, and every process has all answers."""
    names = [["a", "b"], ["c", "d"], ["e"], ["f", "g"], ["h", "i"]]
    question = partial(SimpleNamespace, set_name="set", tokens=(1, 2))
    groups = [[question(name=name) for name in group] for group in names]
    answered = []

    def answer(group):
        answered.append([question.name for question in group])
        return [{"id": question.name, "score": 0.5, "of": process_id} for question in group]

    with Predictions(Path(folder)) as predictions:
        stops = iter([False, True])
        answerer = SimpleNamespace(adapter=None, answer=answer)
        assert not evaluate(groups, answerer, predictions, stop=lambda: next(stops))
    with Predictions(Path(folder)) as predictions:
        assert list(predictions.records) == ["a", "b", "c", "d"]
        assert evaluate(groups, answerer, predictions)
        assert "".join(predictions.records) == "abcdefghi"
        assert [record["of"] for record in predictions.records.values()] == [
            0,
            0,
            1,
            1,
            0,
            1,
            1,
            0,
            0,
        ]
    assert answered == names[process_id::2]


if __name__ == "__main__":
    task, arguments = sys.argv[1], sys.argv[2:]
    if task == "run":
        sys.argv = [sys.argv[0], *arguments[2:]]
        run(int(arguments[0]), int(arguments[1]))
    else:
        coordinator, num_processes, process_id = (x.partition("=")[2] for x in arguments[1:])
        with distributed.ending_together():
            exchange(arguments[0], coordinator, int(num_processes), int(process_id))
