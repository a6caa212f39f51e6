"""What tables and figures of the paper (arXiv 2602.16704) are made of: runs, and what they give.

A script describes a `Table` or a `Figure`; `Paper` makes the runs it needs from the configuration
files of this project, at the published sizes or small. Runs of one name are one run, also across
scripts: a mid-trained model is trained once for all tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import runpy
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import small
from ml_collections import ConfigDict

from refine_jax.config import Config
from refine_jax.settings import expand_flags

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TITLES = {"lact": "LaCT-760M", "deltanet": "DeltaNet-1.3B"}
MODELS = tuple(TITLES)
METHODS = {"": None, " + SFT MidTr": "ntp", " + ReFINE MidTr": "refine"}
"""Endings of the rows of Tables 3 and E.1, and how these are mid-trained."""
# In names of configuration files, and of the official code's data.
_CONFIG_NAMES = {"lact": "lact_760m", "deltanet": "deltanet_1_3b"}
_DATA_NAMES = {"lact": "lact", "deltanet": "delta_net"}
LENGTHS = (4096, 8192, 16384)
LONGBENCH = (
    *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "qmsum", "multi_news"),
    *("samsum", "trec", "triviaqa", "lcc", "repobench-p"),
)
# Test-time training as the paper does it; the rest of it are defaults.
_TTT = {
    "phase": "testtime",
    "model.remat": "full",
    "refine.rollouts": "batch",
    "refine.reward": "binary",
    "refine.lambda_rl": 0.4,
    "testtime.batch_size": 8,
    "testtime.mini_batch_size": 4,
    "testtime.micro_batch_size": 1,
}
# The paper trains 100 steps, evaluated every 10; Figures 4 and E.1 show three trials.
STEPS, EVERY, TRIALS = 100, 10, 3


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run in a folder of its own.

    name: of the folder. kind: "phase" (a configuration), "position" (next-token loss and accuracy),
    "entropy" (of a document's tokens) or "lm_eval". start: what the model comes from, a run or a
    checkpoint folder; None: a model with random weights. config: of a phase, the configuration file
    with its form. settings: of a phase, fields by "section.name"; else arguments.
    """

    name: str
    kind: str
    start: Run | str | None
    settings: Mapping[str, Any]
    config: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """A figure of a run: where it is in its results, and what it is multiplied with."""

    run: Run
    path: tuple[str, ...]
    scale: float = 100.0


@dataclasses.dataclass(frozen=True)
class Value:
    """A cell of a table: the mean of its sources, and what the paper has there."""

    row: str
    column: str
    sources: tuple[Source, ...]
    published: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the paper."""

    title: str
    values: tuple[Value, ...]

    def runs(self) -> Iterator[Run]:
        """Every run that a value comes from, often more than once."""
        return (source.run for value in self.values for source in value.sources)


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of a curve: each source is a trial."""

    x: float
    sources: tuple[Source, ...]
    published: float | None = None


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve of points."""

    panel: str
    label: str
    points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True)
class RunCurve:
    """A curve that one run has written: `read` makes [(x, y)] of its folder."""

    panel: str
    label: str
    run: Run
    read: Callable[[Path], list[tuple[float, float]]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of the paper. axes: {panel: (label of x, label of y)}."""

    title: str
    axes: Mapping[str, tuple[str, str]]
    curves: tuple[Series | RunCurve, ...]

    def runs(self) -> Iterator[Run]:
        """Every run that a curve comes from, often more than once."""
        for curve in self.curves:
            if isinstance(curve, RunCurve):
                yield curve.run
            else:
                yield from (source.run for point in curve.points for source in point.sources)


def set_score(run: Run, task: str, length: int | None = None) -> Source:
    """Mean score of one task, at one length, per cent."""
    name = task if length is None else f"{task}/{length}"
    return Source(run, ("sets", name, "mean"))


def by_length(
    row: str, column: str, sources: Mapping[int, Source], published: Iterator[float]
) -> list[Value]:
    """A column for each length, and one for their mean, with the next of the published numbers."""
    values = [
        Value(row, f"{column} {length}", (source,), next(published))
        for length, source in sources.items()
    ]
    return [*values, Value(row, f"{column} mean", tuple(sources.values()), next(published))]


class Paper:
    """Makes runs; `options` are those of the command line (`add_options`)."""

    def __init__(self, options: argparse.Namespace):
        expand_flags(vars(options), *_PATHS)
        self.options = options
        self.small = options.small
        self.workdir = Path(options.workdir).absolute()
        self.models: tuple[str, ...] = tuple(options.models)
        self.lengths = small.LENGTHS if options.small else LENGTHS
        self.longbench_tasks = small.LONGBENCH if options.small else LONGBENCH
        self.trials = small.TRIALS if options.small else TRIALS
        self.needle_lengths = small.NEEDLE_LENGTHS if options.small else LENGTHS
        steps, every = (small.STEPS, small.EVERY) if options.small else (STEPS, EVERY)
        self.curve_steps = tuple(range(0, steps + 1, every))

    def base(self, model: str) -> Run | str:
        """The published model; small: a model trained for a few steps on its next token."""
        if not self.small:
            return getattr(self.options, model)
        return self._phase(f"{model}/base", small.CONFIGS[model], None, small.base(model))

    def midtrain(
        self, model: str, method: str | None, *, seed: int = 0, **changes: Any
    ) -> Run | str:
        """Mid-train with `method`, "ntp" (the paper's SFT) or "refine"; None: the published model.

        changes: fields of `refine` other than the paper's (cosine reward, k 5, c 8, entropy).
        """
        if method is None:
            return self.base(model)
        paper = {"reward": "cosine", "rollout_length": 5, "num_positions": 8}
        paper |= {"selection": "entropy"}
        changes = {name: value for name, value in changes.items() if value != paper[name]}
        label = "".join(f"-{name}={value}" for name, value in changes.items())
        label += f"-seed={seed}" if seed else ""
        settings = {
            "refine.objective": method,
            "refine.rollouts": "batch",
            **{f"refine.{name}": value for name, value in changes.items()},
            "data.source": self.options.documents,
            "data.cache_dir": str(self.workdir / "tokens"),
            "train.seed": seed,
            "train.steps": self.curve_steps[-1],
            "train.checkpoint_every": self.curve_steps[1],
            # Figures 4 and E.1 measure every checkpoint of the paper's own setting.
            "train.keep_checkpoints": 1 if changes else len(self.curve_steps) - 1,
            **(small.midtrain() if self.small else {}),
        }
        config = f"midtrain_{_CONFIG_NAMES[model]}.py"
        return self._phase(f"{model}/midtrain-{method}{label}", config, self.base(model), settings)

    def posttrain(self, model: str, variant: str, task: str, length: int) -> Run:
        """Post-training of the ReFINE mid-trained model on a task at a length.

        variant: "sft", "nested_sft" or "nested_refine".
        """
        name = f"ruler_{task}_{_DATA_NAMES[model]}_{length}_1600_train.parquet"
        settings = {
            "data.source": str(Path(self.options.ruler_qa) / name),
            "data.sequence_length": length,
            **(small.posttrain() if self.small else {}),
        }
        return self._phase(
            f"{model}/posttrain-{variant}-{task}-{length}",
            f"posttrain_{_CONFIG_NAMES[model]}.py:{variant}",
            self.midtrain(model, "refine"),
            settings,
        )

    def needles(self, model: str, start: Run | str, tasks: Iterable[str]) -> Run:
        """Recall of needles."""
        settings = {
            "evaluate.tasks": ",".join(tasks),
            "evaluate.lengths": ",".join(map(str, self.needle_lengths)),
            "evaluate.essays": self.options.essays,
            **(small.evaluate() if self.small else {}),
        }
        return self._phase(
            f"{_evaluations(model, start)}/needles", "eval_ruler.py", start, settings
        )

    def ruler_qa(self, model: str, start: Run | str, task: str, length: int, ttt: str = "") -> Run:
        """Answers to a set of RULER's question answering; `ttt` is "", "ntp" or "refine"."""
        data = f"ruler_{task}_{_DATA_NAMES[model]}_{length}_200_test.parquet"
        settings = {
            "evaluate.tasks": f"ruler_{task}",
            "evaluate.lengths": str(length),
            "evaluate.samples": 200,
            "evaluate.data": str(Path(self.options.ruler_qa) / data),
            **({} if ttt else {"phase": "evaluate"}),
        }
        if self.small:
            settings |= small.evaluate() | {"evaluate.data": small.path(self.workdir, "ruler_qa")}
        name = f"{_evaluations(model, start)}/{task}-{length}"
        return self._answer(name, "testtime_ruler_qa.py", start, ttt, settings)

    def longbench(
        self, model: str, start: Run | str, ttt: str = "", **changes: Any
    ) -> dict[str, Run]:
        """{task: run} of LongBench, with test-time training `ttt`: "", "ntp" or "refine".

        One run for all tasks, but with test-time training one for each, as officially: without a
        reset nothing is carried from task to task then. changes: fields of `refine`.
        """
        settings = {
            "evaluate.data": self.options.longbench,
            **{f"refine.{name}": value for name, value in changes.items()},
        }
        if self.small:
            settings |= small.evaluate() | {"evaluate.data": small.path(self.workdir, "longbench")}
        tasks, folder = self.longbench_tasks, f"{_evaluations(model, start)}/longbench"
        if not ttt:
            settings["evaluate.tasks"] = ",".join(tasks)
            run = self._answer(folder, "eval_longbench.py", start, "", settings)
            return dict.fromkeys(tasks, run)
        label = "".join(f"-{name}={value}" for name, value in changes.items())
        return {
            task: self._answer(
                f"{folder}-{task}{label}",
                "eval_longbench.py",
                start,
                ttt,
                settings | {"evaluate.tasks": task},
            )
            for task in tasks
        }

    def longbench_mean(self, model: str, start: Run | str) -> Source:
        """Mean of all tasks of LongBench without test-time training, per cent."""
        return Source(self.longbench(model, start)[self.longbench_tasks[0]], ("mean",))

    def position(self, model: str, start: Run | str, step: int) -> Run:
        """Next-token loss and accuracy on Booksum after a training step; 0: before training."""
        arguments = {"source": self.options.booksum, "sequence_length": 16384, "min_tokens": 2}
        arguments |= {"cache_dir": str(self.workdir / "tokens")}
        arguments |= small.position() if self.small else {}
        if step:
            arguments["step"] = step
        else:
            start = self.base(model)
        name = f"{_evaluations(model, start)}/booksum" + (f"-{step}" if step else "")
        return Run(name, "position", start, arguments)

    def entropy(self, model: str) -> Run:
        """Entropies of the next token along one document, the same for every model."""
        arguments = {"source": self.options.documents, "sequence_length": 16384}
        arguments |= {"cache_dir": str(self.workdir / "tokens")}
        arguments |= small.position() if self.small else {}
        start = self.base(model)
        return Run(f"{_evaluations(model, start)}/entropy", "entropy", start, arguments)

    def lm_eval(self, model: str, start: Run | str, tasks: Iterable[str]) -> Run:
        """lm-eval's tasks of short context."""
        arguments: dict[str, Any] = {"tasks": sorted(set(tasks)), "batch_size": 16}
        if self.small:
            arguments |= small.lm_eval() | {"include_path": small.path(self.workdir, "lm_eval")}
        return Run(f"{_evaluations(model, start)}/lm_eval", "lm_eval", start, arguments)

    def _answer(
        self, name: str, config: str, start: Run | str, ttt: str, settings: Mapping[str, Any]
    ) -> Run:
        if not ttt:
            return self._phase(name, config, start, settings)
        name += f"-ttt-{ttt}-reset={self.options.reset}"
        settings = _TTT | {"refine.objective": ttt, "testtime.reset": self.options.reset} | settings
        settings |= small.testtime() if self.small else {}
        return self._phase(name, config, start, settings)

    def _phase(
        self, name: str, config: str, start: Run | str | None, settings: Mapping[str, Any]
    ) -> Run:
        return Run(name, "phase", start, settings, config)


def ablation(
    paper: Paper, field: str, published: Mapping[str, Mapping[str, float]]
) -> tuple[Value, ...]:
    """Values of LongBench after mid-training with each choice of a field of `refine`.

    published: {model: {choice: what the paper has}}.
    """
    values = []
    for model in paper.models:
        for choice, number in published[model].items():
            mean = paper.longbench_mean(model, paper.midtrain(model, "refine", **{field: choice}))
            row = f"{TITLES[model]}: {choice}"
            values.append(Value(row, "LongBench mean", (mean,), number))
    return tuple(values)


def booksum_figure(
    paper: Paper, title: str, figure: str, unit: str, scale: float = 100.0
) -> Figure:
    """A figure of Booksum ("loss" or "accuracy") after every tenth step, in several trials."""
    curves = []
    for model in paper.models:
        for method, label in (("ntp", "SFT"), ("refine", "ReFINE")):
            points = []
            for step in paper.curve_steps:
                trained = [paper.midtrain(model, method, seed=seed) for seed in range(paper.trials)]
                runs = [paper.position(model, start, step) for start in trained]
                sources = [Source(run, ("all", figure, "mean"), scale) for run in runs]
                points.append(Point(step, tuple(sources)))
            curves.append(Series(TITLES[model], label, tuple(points)))
    axes = {TITLES[model]: ("training step", unit) for model in paper.models}
    return Figure(title, axes, tuple(curves))


def _evaluations(model: str, start: Run | str) -> str:
    """Folder of the evaluations of a model."""
    name = start.name.removeprefix(f"{model}/") if isinstance(start, Run) else "published"
    return f"{model}/evaluations/{name}"


def in_order(runs: Iterable[Run]) -> list[Run]:
    """Each run once, after what it starts from."""
    ordered: dict[str, Run] = {}

    def add(run: Run) -> None:
        if run.name in ordered:
            return
        if isinstance(run.start, Run):
            add(run.start)
        ordered[run.name] = run

    for run in runs:
        add(run)
    return list(ordered.values())


def start_folder(run: Run, workdir: Path) -> str | None:
    """Where the model that a run starts from is."""
    return str(workdir / run.start.name) if isinstance(run.start, Run) else run.start


def build_config(run: Run, workdir: Path) -> Config:
    """The configuration of a phase.

    Raises:
      ConfigError: It is none.
    """
    name, _, form = run.config.partition(":")
    values = runpy.run_path(str(CONFIGS / name))["get_config"](form or None)
    values.model.checkpoint = start_folder(run, workdir)
    for path, value in run.settings.items():
        *sections, field = path.split(".")
        section: ConfigDict = values
        for part in sections:
            section = section[part]
        setattr(section, field, value)
    return Config.from_dict(values)


_PATHS = ("workdir", "lact", "deltanet", "documents", "booksum", "essays", "ruler_qa", "longbench")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags of every script."""
    add = parser.add_argument
    add("--small", action="store_true", help="tiny models, made-up data, minutes on a CPU")
    add("--list", action="store_true", help="list the runs, run nothing")
    add("--workdir", help="folder of all runs (default runs/paper, with --small runs/paper-small)")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="rows (default both)")
    add("--lact", default="checkpoints/lact-760m", help="made by refine_jax.convert")
    add("--deltanet", default="checkpoints/deltanet-1.3b", help="made by refine_jax.convert")
    add("--documents", default="data/long-documents", help="to mid-train on: >= 16,384 tokens each")
    add("--booksum", default="data/booksum", help="documents of Booksum")
    add("--essays", default="data/essays", help="text files that needles are hidden in")
    add("--ruler_qa", default="data/ruler", help="folder of the official data/ruler")
    add("--longbench", default="data/longbench", help="folder of the official data/longbench")
    add(
        "--reset",
        choices=("never", "batch", "example"),
        default="never",
        help="of test-time training; never (default) is what the published numbers come from",
    )
