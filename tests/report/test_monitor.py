"""What a run reports: its metrics file, closing table and plots."""

import json

import numpy as np
import pytest

from refine_jax.report.metrics import METRICS_FILE, read_metrics, summarize, table, write_results
from refine_jax.report.monitor import Monitor, duration
from refine_jax.report.plots import plot_rollouts, plot_training, running_mean


def history(steps=12, warmup=4):
    """Records of a run: losses fall, rewards rise, the first step of each kind is slow."""
    records = [{"step": 0, "eval/loss": 9.0, "eval/accuracy": 0.0, "time/total": 1.0}]
    for step in range(1, steps + 1):
        record = {"step": step, "loss/ntp": 9.0 - step / 10, "grad/norm": 1.0 / step}
        record |= {"entropy/mean": 5.0, "tokens_per_second": 100.0 * step, "update/skipped": 1}
        record |= {"time/data": 0.0, "time/update": 1.0 + 50.0 * (step in (1, warmup + 1))}
        if step > warmup:
            record |= {"reward/mean": step / 100, "reward/std": 0.01, "time/collect": 0.5}
        record["time/step"] = record["time/update"] + record.get("time/collect", 0.0)
        record["time/total"] = 2.0 * step
        records.append(record)
    records[-1] |= {"eval/loss": 7.5, "eval/accuracy": 0.25, "eval/reward": 0.5}
    return records


def test_records_are_on_disk_when_record_returns(tmp_path):
    with Monitor(tmp_path, steps=3, log_every=0) as monitor:
        monitor.record(1, {"loss": np.float32(0.5), "count": np.int32(3), "bad": float("nan")})
        (record,) = read_metrics(tmp_path / METRICS_FILE)
        assert record.pop("time/total") >= 0
        assert record == {"step": 1, "loss": 0.5, "count": 3, "bad": None}


def test_resuming_drops_what_came_after_the_checkpoint_and_a_torn_line(tmp_path):
    lines = [json.dumps({"step": step, "time/total": 10.0 * step}) for step in range(5)]
    (tmp_path / METRICS_FILE).write_text("\n".join(lines) + '\n{"step": 5, "los')
    with Monitor(tmp_path, steps=9, start=3, log_every=0) as monitor:
        assert [record["step"] for record in monitor.history] == [0, 1, 2, 3]
        monitor.record(4, {"loss": 1.0})
    records = read_metrics(tmp_path / METRICS_FILE)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    # The clock goes on from the record of the restored step.
    assert 30.0 <= records[-1]["time/total"] < 40.0
    assert not (tmp_path / (METRICS_FILE + ".part")).exists()


def test_lines_come_every_log_every_steps_at_evaluations_and_at_the_end(tmp_path, capsys):
    with Monitor(tmp_path, steps=7, log_every=3) as monitor:
        for step in range(1, 8):
            evaluation = {"eval/loss": 2.0} if step == 4 else {}
            monitor.record(step, {"loss/ntp": 1.5, "time/step": 2.0} | evaluation)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["3/7", "4/7", "6/7", "7/7"]
    assert "loss 1.500" in lines[0] and lines[0].endswith("8 s left")
    assert "val loss 2.000" in lines[1]


def test_the_time_left_is_without_compilation(tmp_path, capsys):
    with Monitor(tmp_path, steps=11, log_every=1) as monitor:
        monitor.record(1, {"time/step": 62.0, "time/compile": 60.0})
        monitor.record(2, {"time/step": 2.0})
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("  20 s left") and second.endswith("  18 s left")


def test_summary_compares_before_and_after_and_leaves_compilation_out():
    results = summarize(history(steps=32, warmup=4))
    assert (results["validation_loss_before"], results["validation_loss_after"]) == (9.0, 7.5)
    assert results["validation_accuracy_after"] == 0.25
    assert results["validation_reward_before"] is None
    assert results["mean_reward_first_10"] == pytest.approx(np.mean(np.arange(5, 15)) / 100)
    assert results["mean_reward_last_10"] == pytest.approx(np.mean(np.arange(23, 33)) / 100)
    assert (results["ntp_steps"], results["refine_steps"]) == (4, 28)
    assert (results["step_seconds_ntp"], results["step_seconds_refine"]) == (1.0, 1.5)
    assert (results["steps"], results["seconds_total"]) == (32, 64.0)
    assert results["skipped_updates"] == 1


def test_summary_of_a_plain_run_has_no_rewards():
    results = summarize(history(steps=3, warmup=3))
    assert results["mean_reward_first_10"] is None and results["step_seconds_refine"] is None
    assert "ReFINE step" not in table(results)


def test_table_shows_before_after_and_change(tmp_path):
    results = summarize(history())
    lines = table(results).splitlines()
    (loss,) = [line.split() for line in lines if line.startswith("validation loss")]
    assert loss[-3:] == ["9.0000", "7.5000", "-1.5000"]
    (reward,) = [line.split() for line in lines if line.startswith("validation mean reward")]
    assert reward[-3:] == ["-", "0.5000", "-"]
    write_results(tmp_path, results)
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_post_training_says_what_is_of_answers_and_what_of_prompts(tmp_path, capsys):
    after = {"eval/loss": 3.0, "eval/prompt_loss": 4.0, "eval/exact": 0.5}
    records = [{"step": 0, "time/total": 0.0, **after, "eval/loss": 5.0}]
    step = {"loss/ntp": 6.0, "answer/loss": 7.0, "reward/mean": 0.5, "time/answers": 1.0}
    with Monitor(tmp_path, steps=1, log_every=1) as monitor:
        for number, record in enumerate((records[0], step | after | {"time/step": 2.0})):
            monitor.record(number, record)
        lines = capsys.readouterr().out.splitlines()
        text = table(summarize(monitor.history))
    assert lines[0] == "step 0/1  val answer loss 5.000"
    assert "prompt loss 6.000" in lines[1] and "  answer loss 7.000" in lines[1]
    loss = text.splitlines()[2]
    assert loss.startswith("answers' loss") and loss.split()[-1] == "-2.0000"
    # What there is no figure of has no line, nor have the ends of ten steps or fewer.
    assert "prompts' loss" in text and "entropy" not in text and "first 10" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7260, "2 h 1 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def testrunning_mean_is_the_mean_of_what_is_known():
    values = np.random.default_rng(0).normal(size=20)
    values[[3, 4, 11]] = np.nan
    got = running_mean(values, 5)
    for index, value in enumerate(values):
        window = values[max(0, index - 2) : index + 3]
        want = np.nan if np.isnan(value) else np.nanmean(window)
        np.testing.assert_allclose(got[index], want, rtol=1e-12)


def pixels(path):
    from matplotlib.image import imread

    return imread(path)


def test_training_plot_draws_each_kind_of_run(tmp_path):
    for steps, warmup in ((12, 4), (100, 0), (1, 1)):
        plot_training(tmp_path / "plot.png", history(steps, warmup), clip_norm=0.2)
        image = pixels(tmp_path / "plot.png")
        assert image.shape[:2] == (825, 1650)
        assert 0.01 < np.mean(image[..., :3].min(-1) < 0.9) < 0.6
        (tmp_path / "plot.png").unlink()
    plot_training(tmp_path / "plot.png", history()[:1], clip_norm=None)
    assert not (tmp_path / "plot.png").exists()


def legends(monkeypatch, tmp_path, records):
    """{title: the entries of the legend} of the training plot."""
    from refine_jax.report import plots

    found = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: found.append(figure))
    plot_training(tmp_path / "plot.png", records, clip_norm=None)
    return {
        axis.get_title(loc="left"): [text.get_text() for text in axis.get_legend().get_texts()]
        for axis in found[0].axes
        if axis.get_legend() is not None
    }


def test_legends_name_what_is_there_alone(monkeypatch, tmp_path):
    plain = history(warmup=12)
    for record in plain:
        record.pop("eval/reward", None)
    shown = legends(monkeypatch, tmp_path, plain)
    assert shown["Time of a step"] == ["update"]  # and no time for data
    assert "Reward of the rollouts" not in shown
    # Versions before this one recorded the microseconds that collecting nothing took.
    old = [record | {"time/collect": 2e-6} for record in history() if record["step"]]
    assert legends(monkeypatch, tmp_path, old)["Time of a step"] == ["update"]
    assert legends(monkeypatch, tmp_path, history())["Time of a step"] == [
        *("collect rollouts", "update"),
    ]
    alone = [
        {name: value for name, value in record.items() if name != "reward/std"}
        for record in history()
    ]
    assert legends(monkeypatch, tmp_path, alone)["Reward of the rollouts"][0] == "training"


def test_rollout_plot_marks_the_positions_where_they_are(tmp_path):
    """The orange of a position stands over its tokens, and nowhere else."""
    from refine_jax.report.plots import ORANGE

    entropy = np.linspace(1, 3, 400)
    entropy[390:] = np.nan
    for start in (40, 300):
        starts, rewards = np.array([start]), np.array([[0.25, 0.75]])
        plot_rollouts(
            tmp_path / "plot.png", entropy, starts, rewards, length=20, reward_name="cosine"
        )
        image = pixels(tmp_path / "plot.png")[..., :3]
        top = image[60 : image.shape[0] // 3]
        colour = np.array([int(ORANGE[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        blend = 0.7 * colour + 0.3
        columns = np.flatnonzero((np.abs(top - blend).max(-1) < 0.02).mean(0) > 0.5)
        width = image.shape[1]
        assert start / 400 - 0.02 < columns.min() / width < columns.max() / width
        assert columns.max() / width < (start + 20) / 400 + 0.08


@pytest.mark.filterwarnings("error")
def test_texts_may_hold_dollar_signs_and_any_language(tmp_path):
    arguments = (np.ones(50), np.array([3]), np.ones((1, 1)))
    texts = [("a$_b^^$", "$$\\frac$"), ("\u6df7\uc8fc", "\U0001f40b")]
    plot_rollouts(tmp_path / "plot.png", *arguments, length=5, reward_name="cosine", texts=texts)
    assert (tmp_path / "plot.png").exists()
