"""PNG plots of a run: its training curves, and one sequence with its rollouts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from refine_jax.base.figures import BLUE, GREEN, GREY, ORANGE, finish, new_figure, save_figure
from refine_jax.report.metrics import TaskKind, is_refine, task_figures, write_results

TRAINING_PLOT = "training.png"


def write_report(
    workdir: Path, history: Sequence[Mapping], results: Mapping, *, clip_norm: float | None
) -> None:
    """Save the training curves and the figures of a run, training.png and results.json.

    results: As `refine_jax.report.metrics.summarize` makes them of the history. history, clip_norm:
    as of `plot_training`.
    """
    plot_training(workdir / TRAINING_PLOT, history, clip_norm=clip_norm)
    write_results(workdir, results)


def plot_training(path: Path, history: Sequence[Mapping], *, clip_norm: float | None) -> None:
    """Plot the records of `metrics.jsonl`: losses, rewards, gradients, speed.

    path: PNG file to write.
    history: records, one a step (`refine_jax.report.monitor.Monitor.history`).
    clip_norm: largest gradient norm that is not clipped, drawn as a line; None: none.
    """
    training = [record for record in history if "time/step" in record]
    if not training:
        return
    tasks = task_figures(history)
    rows = 3 if any(tasks.values()) else 2
    figure, axes = new_figure(rows, 3, (15, 3.75 * rows))
    (loss, accuracy, reward), (gradient, entropy, speed) = axes[:2]
    for axis in axes.flat:
        axis.set_xlabel("training step")
        _shade_warmup(axis, training)

    # Post-training evaluates on answers, and trains on prompts and answers.
    answers = any("eval/exact" in record for record in history)
    held_out = "answers, held-out" if answers else "held-out"
    _curve(loss, training, "loss/ntp", BLUE, "prompts" if answers else "training")
    _curve(loss, training, "answer/loss", GREEN, "answers")
    _points(loss, history, "eval/prompt_loss", GREY, "prompts, held-out")
    _points(loss, history, "eval/loss", ORANGE, held_out)
    finish(loss, "Next-token loss", "nats a token")

    _points(accuracy, history, "eval/accuracy", ORANGE, held_out, scale=100)
    _points(accuracy, history, "eval/exact", BLUE, "whole answers, held-out", scale=100)
    finish(accuracy, "Next-token accuracy", "tokens predicted right (%)")

    band = _band(reward, training, "reward/mean", "reward/std", GREEN)
    _curve(reward, training, "reward/mean", GREEN, f"training{' (band: deviation)' * band}")
    _curve(reward, training, "policy/expected_match", GREEN, "expected, of the training rows")
    _points(reward, history, "eval/reward", ORANGE, "held-out")
    _curve(reward, training, "answer/score", GREY, "score of sampled answers")
    _points(reward, history, "eval/score", BLUE, "score of answers, held-out")
    finish(reward, "Reward of the rollouts", "reward")

    _curve(gradient, training, "grad/norm", BLUE, "before clipping")
    if clip_norm is not None:
        gradient.axhline(clip_norm, color=GREY, linestyle="--", label=f"clipped to {clip_norm:g}")
    gradient.set_yscale("log")
    gradient.yaxis.set_major_formatter("{x:g}")
    gradient.yaxis.set_minor_formatter("{x:g}")
    gradient.tick_params(axis="y", which="minor", labelsize=7)
    finish(gradient, "Gradient", "global L2 norm")

    _curve(entropy, training, "entropy/mean", BLUE, "training")
    _points(entropy, history, "eval/entropy", ORANGE, "held-out")
    finish(entropy, "Entropy of the prediction", "nats a token")

    _stack_times(speed, training)
    finish(speed, "Time of a step", "seconds")
    if rows == 3:
        _draw_tasks(axes[2], history, tasks)
    save_figure(figure, path)


def _draw_tasks(axes, history: Sequence[Mapping], tasks: Mapping[TaskKind, list[str]]) -> None:
    """Draw what tasks gave while training, a kind in each of the first two axes."""
    for axis, (kind, names) in zip(axes, tasks.items(), strict=False):
        for number, name in enumerate(names):
            label = name.removeprefix(kind.prefix)
            _points(axis, history, name, f"C{number % 10}", label, kind.scale)
        axis.set_visible(bool(names))
        finish(axis, kind.title, kind.unit)
    axes[-1].set_visible(False)


def plot_rollouts(
    path: Path,
    entropy: np.ndarray,
    starts: np.ndarray,
    rewards: np.ndarray,
    *,
    length: int,
    reward_name: str,
    texts: Sequence[tuple[str, str]] | None = None,
) -> None:
    """Plot one sequence: its entropy, where rollouts start, and the reward of each.

    path: PNG file to write. entropy: [T] nats of the prediction at each token, NaN where there is
    no real token. starts: [c] index of the first token of the rollouts of each position. rewards:
    [c, n] their rewards. length: tokens of a rollout. reward_name: what the reward compares, for
    the label. texts: c pairs (true continuation, first rollout), listed under the plot if given.
    """
    c, n = rewards.shape
    rows = 3 if texts else 2
    heights = [3.2, 2.0] + [0.26 * (c + 1.5)] * (rows - 2)
    figure, axes = new_figure(rows, 1, (14, sum(heights) + 0.8), height_ratios=heights)
    line, bars = axes[0, 0], axes[1, 0]
    tokens = np.arange(len(entropy))
    line.plot(tokens, entropy, color=BLUE, linewidth=0.5, alpha=0.45)
    smooth = running_mean(entropy, max(5, len(entropy) // 100))
    line.plot(tokens, smooth, color=BLUE, linewidth=1.4, label="entropy (thick: running mean)")
    top = np.nanmax(entropy)
    for index, start in enumerate(starts):
        line.axvspan(start, start + max(length, len(entropy) / 400), color=ORANGE, alpha=0.7, lw=0)
        line.annotate(
            str(index + 1),
            (start, top * 1.04),
            color=ORANGE,
            ha="center",
            va="bottom",
            fontsize=10,
            annotation_clip=False,
        )
    line.plot([], [], color=ORANGE, linewidth=4, alpha=0.7, label=f"rollouts of {length} tokens")
    line.set_xlim(0, len(entropy) - 1)
    line.set_ylim(0, top * 1.04)
    line.set_xlabel("token of the sequence")
    finish(line, "Where the model is unsure, and the chosen positions", "entropy (nats)", pad=18)

    width = 0.8 / n
    colours = [GREEN if value >= rewards.mean() else GREY for value in rewards.flat]
    offsets = (np.arange(n) - (n - 1) / 2) * width
    places = (np.arange(c)[:, None] + offsets).ravel()
    bars.bar(places, rewards.ravel(), width * 0.92, color=colours)
    for place, value in zip(places, rewards.flat, strict=True):
        bars.annotate(
            f"{value:.2f}",
            (place, max(value, 0)),
            ha="center",
            va="bottom",
            fontsize=9 if c * n <= 16 else 6,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
        )
    bars.axhline(rewards.mean(), color=ORANGE, linestyle="--", label=f"mean {rewards.mean():.3f}")
    bars.axhline(0, color="black", linewidth=0.8)
    bars.margins(y=0.15)
    bars.set_xticks(range(c), [f"{i + 1}\n@{start}" for i, start in enumerate(starts)])
    bars.set_xlabel("position: number and first token of its rollouts")
    finish(bars, "Reward of each rollout (green: above the mean)", f"{reward_name} reward")
    if texts:
        _list_texts(axes[2, 0], texts)
    save_figure(figure, path)


def _series(records: Sequence[Mapping], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(steps), np.asarray(values, np.float64)


def _curve(axis, records, name: str, colour: str, label: str) -> None:
    """Draw a line; with many steps a pale one and its running mean."""
    steps, values = _series(records, name)
    if not len(steps):
        return
    many = len(steps) > 60
    axis.plot(
        steps,
        values,
        color=colour,
        linewidth=0.8 if many else 1.6,
        alpha=0.35 if many else 1.0,
        marker="o" if len(steps) < 3 else None,
        label=None if many else label,
    )
    if many:
        smooth = running_mean(values, len(steps) // 20)
        axis.plot(steps, smooth, color=colour, linewidth=1.8, label=f"{label}, running mean")


def _band(axis, records, mean: str, deviation: str, colour: str) -> bool:
    """Draw a band around a curve; returns whether there is one."""
    steps, centre = _series(records, mean)
    same, spread = _series(records, deviation)
    drawn = len(steps) > 0 and np.array_equal(steps, same)
    if drawn:
        axis.fill_between(steps, centre - spread, centre + spread, color=colour, alpha=0.12, lw=0)
    return drawn


def _points(axis, records, name: str, colour: str, label: str, scale: float = 1) -> None:
    steps, values = _series(records, name)
    if len(steps):
        axis.plot(steps, values * scale, "o-", color=colour, linewidth=1.2, label=label)


def _shade_warmup(axis, training) -> None:
    """Mark the next-token warm-up of a run that has ReFINE steps after it."""
    first = next((r["step"] for r in training if is_refine(r)), None)
    if first is not None and first > training[0]["step"]:
        axis.axvspan(training[0]["step"], first, color=GREY, alpha=0.12, lw=0)
        axis.text(
            training[0]["step"],
            0.02,
            " next-token warm-up",
            color=GREY,
            fontsize=8,
            transform=axis.get_xaxis_transform(),
        )


def _stack_times(axis, training) -> None:
    """Stack seconds of a step by part; steps that compile reach beyond the range shown."""
    steps = np.asarray([record["step"] for record in training])
    parts = {
        "data": ("time/data", GREY),
        "collect rollouts": ("time/collect", GREEN),
        "update": ("time/update", BLUE),
        "answers": ("time/answers", ORANGE),
        "sample answers": ("time/sample", "#c9a227"),
    }
    values = {
        label: np.asarray([record.get(name) or 0.0 for record in training])
        for label, (name, _) in parts.items()
    }
    totals = np.sum(list(values.values()), axis=0)
    # Leave out parts that take no visible time, as where no experience is collected.
    values = {label: part for label, part in values.items() if part.max() > 1e-3 * totals.max()}
    axis.stackplot(
        steps,
        list(values.values()),
        labels=list(values),
        colors=[parts[label][1] for label in values],
        alpha=0.75,
    )
    refine = np.asarray([is_refine(record) for record in training])
    kinds = [totals[kind] for kind in (refine, ~refine) if kind.any()]
    axis.set_ylim(0, 1.8 * max(np.median(kind) for kind in kinds) or 1)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Compute centred means over `width` entries; over fewer at the ends and around NaN."""
    width = max(1, width)
    kernel, known = np.ones(width), np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel, "full")
    count = np.convolve(known.astype(float), kernel, "full")
    first = (width - 1) // 2
    window = slice(first, first + len(values))
    with np.errstate(invalid="ignore"):
        return np.where(known, total[window] / count[window], np.nan)


def _list_texts(axis, texts) -> None:
    axis.axis("off")
    axis.set_title("True continuation, and the first rollout", fontsize=12, loc="left")
    axis.set_ylim(len(texts), 0)
    axis.set_xlim(0, 1)
    for row, (truth, rollout) in enumerate(texts):
        for place, text, colour in (
            (0.0, str(row + 1), ORANGE),
            (0.03, truth, "black"),
            (0.5, rollout, BLUE),
        ):
            axis.text(
                place,
                row + 0.5,
                text,
                color=colour,
                family="monospace",
                fontsize=9,
                va="center",
                parse_math=False,  # two dollar signs of a text are no formula
            )
