"""Files that a run reads back: lines that are no records, fields of other types, missing ones."""

import dataclasses
import json
import tracemalloc

import pytest
from tiny_runs import tiny_run

from refine_jax.base.errors import CheckpointError, ConfigError, DataError
from refine_jax.base.files import parse_object, read_lines, recover_lines, spans
from refine_jax.checkpoint.steps import read_config, write_run
from refine_jax.config import Config
from refine_jax.evaluation.runner import FIELDS, Predictions
from refine_jax.phases import loop
from refine_jax.phases.changes import check_same_run
from refine_jax.phases.setup import has_checkpoints, load_start
from refine_jax.report.metrics import METRICS_FILE, read_metrics, summarize
from refine_jax.report.monitor import Monitor

NO_RECORDS = {
    "cut off": b'{"step": 3, "loss',
    "not UTF-8": b'{"step": 3, "a": "\xff"}',
    "a number": b"3",
    "a list": b"[3]",
    "null": b"null",
    "no step": b'{"loss/ntp": 1.0}',
    "step true": b'{"step": true}',
    "step text": b'{"step": "3"}',
    "step 3.0": b'{"step": 3.0}',
    "step negative": b'{"step": -3}',
    "step huge": b'{"step": 1' + b"0" * 30 + b"}",
    "step of digits": b'{"step": ' + b"9" * 5000 + b"}",
    "a text": b'{"step": 3, "loss/ntp": "low"}',
    "NaN": b'{"step": 3, "loss/ntp": NaN}',
    "huge": b'{"step": 3, "loss/ntp": 1' + b"0" * 400 + b"}",
    "nested": b"[" * 100000,
    "twice": b'{"step": 2, "loss/ntp": 7.0}',
    "zeros": b"\0" * 512,
}


def line(step):
    return json.dumps({"step": step, "loss/ntp": 9.0 - step, "time/total": 2.0 * step}).encode()


@pytest.mark.parametrize("name", NO_RECORDS)
def test_a_line_that_is_no_record_is_kept_aside_and_said_and_the_others_stay(
    name, tmp_path, capsys
):
    path = tmp_path / METRICS_FILE
    bad = NO_RECORDS[name]
    path.write_bytes(b"\n".join([line(0), line(1), line(2), bad, line(4), line(5), line(6), b""]))
    with Monitor(tmp_path, steps=9, start=5, log_every=0) as monitor:
        assert [record["step"] for record in monitor.history] == [0, 1, 2, 4, 5]
        assert summarize(monitor.history)["seconds_total"] == 10.0
        monitor.record(6, {"loss/ntp": 1.0})
    assert path.read_bytes().splitlines()[:5] == [line(i) for i in (0, 1, 2, 4, 5)]
    assert (tmp_path / f"{METRICS_FILE}.dropped").read_bytes() == bad + b"\n"
    out = capsys.readouterr().out
    assert "left out line 4 (" in out and f"kept in {METRICS_FILE}.dropped" in out
    assert "lacks step 3 of the 5 done before" in out and len(out) < 700
    # What is not a run's own file is read the same way, and stays as it is.
    path.write_bytes(bad + b"\n" + line(1))
    if name != "twice":
        assert read_metrics(path)[-1] == json.loads(line(1))


def test_steps_out_of_order_are_sorted_and_a_second_damage_is_added(tmp_path, capsys):
    path = tmp_path / METRICS_FILE
    path.write_bytes(b"\n".join([line(2), line(1), b"x", b"", line(3)]))
    for more in (b"", b"\ny\nz"):
        path.write_bytes(path.read_bytes() + more)
        with Monitor(tmp_path, steps=9, start=3, log_every=0) as monitor:
            assert [record["step"] for record in monitor.history] == [1, 2, 3]
    assert (tmp_path / f"{METRICS_FILE}.dropped").read_bytes() == b"x\ny\nz\n"
    assert "lacks" not in capsys.readouterr().out


def test_a_lost_file_of_metrics_is_said(tmp_path, capsys):
    with Monitor(tmp_path, steps=9, start=7, log_every=0):
        pass
    assert "metrics.jsonl lacks steps 1 to 7 of the 7 done before" in capsys.readouterr().out


def test_a_whole_file_of_metrics_is_continued_without_a_word(tmp_path, capsys):
    (tmp_path / METRICS_FILE).write_bytes(b"\n".join(line(i) for i in range(5)))
    with Monitor(tmp_path, steps=9, start=3, log_every=0):
        pass
    assert capsys.readouterr().out == "" and len(list(tmp_path.glob("*.dropped"))) == 0


def test_spans():
    assert spans([3]) == "3" and spans([1, 2, 3, 5, 8, 9]) == "1 to 3, 5, 8 to 9"
    assert spans(range(0, 100, 2), 2) == "0, 2 and others up to 98"


def test_long_lines_and_files_take_no_more_memory_than_their_records(tmp_path):
    path = tmp_path / "lines"
    with path.open("wb") as file:
        for _ in range(40):
            file.write(b"[" * 10**6)
        file.write(b'\n{"a": 1}\n')
    tracemalloc.start()
    said = []
    records = recover_lines(path, lambda text: parse_object(text, "it", DataError), said.append)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert records == [{"a": 1}] and "line 1" in said[0]
    # Of 40 MB: a line is held once while it is read, then it is copied in pieces.
    assert (tmp_path / "lines.dropped").stat().st_size == 40 * 10**6 + 1
    records, bad = read_lines(path, lambda text: text, longest=1000)
    assert records == [b'{"a": 1}\n'] and [b.number for b in bad] == [1]
    assert "longer than 1,000 bytes" in bad[0].reason and peak < 200e6


def prediction(name, **changes):
    values = {str: "x", int: 1, float: 0.5, list: ["y"], dict: {}}
    record = {field: values[kind] for field, kind in FIELDS.items()} | {"id": name} | changes
    return json.dumps(record).encode()


@pytest.mark.parametrize(
    "bad",
    [
        b'{"id": "b", "sco',
        b"\xff\xfe",
        b"[1]",
        b"7",
        b'{"score": 1.0}',
        b'{"id": "b", "score": 1.0}',
        prediction(3),
        prediction(["b"]),
        prediction("b", score=None),
        prediction("b", score="1"),
        prediction("b", score=True),
        prediction("b", score=7),
        prediction("b", set=4),
        prediction("b", metadata=[1]),
        prediction("b", adapt=3),
        prediction("b", adapt={"seconds": "long"}),
        prediction("a", score=1.0),
    ],
)
def test_an_answer_that_is_no_record_is_given_again_and_the_others_stay(bad, tmp_path, capsys):
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(b"\n".join([prediction("a"), bad, prediction("c"), b""]))
    with Predictions(tmp_path, FIELDS) as predictions:
        assert list(predictions.records) == ["a", "c"]
        assert predictions.records["a"]["score"] == 0.5
    assert path.read_bytes().splitlines() == [prediction("a"), prediction("c")]
    assert (tmp_path / "predictions.jsonl.dropped").read_bytes() == bad + b"\n"
    assert "left out line 2 (" in capsys.readouterr().out


def make_step(folder, names=("state", "data", "_CHECKPOINT_METADATA")):
    for name in names:
        (folder / name).mkdir(parents=True)


def test_what_counts_as_checkpoints(tmp_path):
    folder = tmp_path / "checkpoints"
    assert not has_checkpoints(tmp_path)
    for name in ("²", "007", "-1", "x"):
        make_step(folder / name)
    make_step(folder / "12", ["notes"])
    (folder / "5").write_text("")
    assert not has_checkpoints(tmp_path)
    make_step(folder / "3")
    assert has_checkpoints(tmp_path)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"config": 3}', '{"config": {"train": "x"}}', None]
)
def test_settings_of_a_run_that_cannot_be_read_are_one_message(tmp_path, content):
    folder = tmp_path / "checkpoints"
    make_step(folder / "3")
    if content is not None:
        (folder / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run\.json") as failure:
        check_same_run(Config.from_dict(tiny_run("midtrain")), tmp_path)
    assert "\n" not in str(failure.value)


def test_steps_without_the_description_of_their_model_are_one_message(tmp_path):
    make_step(tmp_path / "checkpoints" / "3")
    config = Config.from_dict(tiny_run("midtrain"))
    with pytest.raises(CheckpointError, match=r"holds saved steps but no config\.json.*Put it"):
        load_start(dataclasses.replace(config.model), tmp_path)


@pytest.mark.parametrize("name", ["predictions.jsonl", "evaluation.json"])
def test_a_run_is_not_started_in_the_folder_of_an_evaluation(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"holds an evaluation .{name}"):
        check_same_run(Config.from_dict(tiny_run("midtrain")), tmp_path)


def test_what_the_message_about_run_json_advises_works(tmp_path):
    """The line of the digest is removed, as a person does it."""
    write_run(tmp_path, {"best_mode": "min", "config": {"train": {"seed": 1}}})
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(CheckpointError, match='remove the line "digest"'):
        read_config(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if '"digest"' not in line))
    assert read_config(tmp_path) == {"train": {"seed": 2}}


def test_the_peak_of_the_fullest_device_is_kept_where_devices_say_it(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    devices = [Device({"peak_bytes_in_use": 5}), Device({"peak_bytes_in_use": 9}), Device(None)]
    monkeypatch.setattr(loop.jax, "local_devices", lambda: devices)
    assert loop._peak_memory() == 9
    monkeypatch.setattr(loop.jax, "local_devices", lambda: devices[2:])
    assert loop._peak_memory() == 0
