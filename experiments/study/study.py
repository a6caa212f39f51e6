"""A study on a CPU: what does ReFINE add to models that next-token training no longer improves?

    python experiments/study/study.py                      # all; goes on where it was interrupted
    python experiments/study/study.py --task=symbols --family=deltanet --core
    python experiments/study/study.py --task=half --arms ntp "exact whole" published --seeds=3
    python experiments/study/study.py --signals            # only how noisy each estimator is
    python experiments/study/study.py --report             # tables of what is done
    python experiments/study/study.py --small              # a few steps: does everything run?

Base models of two families are trained on each task (`tasks.py`) until further next-token training
does not improve them. Every arm of `arms.py` then continues from the same models. A finished run is
a line of results.jsonl, beside this file, and is never repeated; a line says what it measured, with
which learning rate, seed and base model. Delete lines to run them again.

    --results FILE       what each run gave; study.png beside it: recall against loss, by weight
    --workdir DIR        DIR/TASK/FAMILY/base-SEED.msgpack, and compiled programs
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arms import ARMS, BEST, CORE, FINAL, SMALL, TEMPERATURES, Arm, Seeds

from refine_jax.base.files import path_flag, write_bytes

if TYPE_CHECKING:
    from lab import Lab

TASKS = ("symbols", "crowded", "half", "text")
FAMILIES = ("deltanet", "lact")
RESULTS = Path(__file__).with_name("results.jsonl")
Line = dict[str, Any]


class ResultStore:
    """Lines of a JSON-lines file, found by what was run; a finished run is not repeated."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def lines(self) -> list[Line]:
        """All lines, those of other processes among them."""
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        return [json.loads(line) for line in text.splitlines()]

    def find(self, **wanted: Any) -> list[Line]:
        """The lines with these values."""
        return [
            line
            for line in self.lines
            if all(line.get(name) == value for name, value in wanted.items())
        ]

    def get(self, what: Line, run: Callable[[], Line]) -> Line:
        """The line of the run `what`, with what `run` gives if there is none yet."""
        if found := self.find(**what):
            return found[0]
        begin = time.process_time()
        line = what | _rounded(run())
        line["cpu_seconds"] = round(time.process_time() - begin, 1)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        return line


def _rounded(line: Line) -> Line:
    return {
        name: _rounded(value)
        if isinstance(value, dict)
        else round(value, 6)
        if isinstance(value, float)
        else value
        for name, value in line.items()
    }


class Study:
    """The runs of one family on one task."""

    def __init__(self, lab: Lab, task: str, store: ResultStore, workdir: Path, seeds: Seeds):
        self.lab, self.store, self.seeds = lab, store, seeds
        self.common = {"task": task, "family": lab.family}
        self.folder = workdir / task / lab.family
        self._bases: dict[int, tuple[Any, str]] = {}

    def base(self, seed: int) -> tuple[Any, str]:
        """The base model of a seed and its fingerprint; trained where its file is not there."""
        from flax import serialization

        if bases := self.lab.plan.bases:
            seed = bases[seed % len(bases)]
        if seed not in self._bases:
            file = self.folder / f"base-{seed}.msgpack"
            if file.is_file():
                params = serialization.from_bytes(
                    self.lab.model.abstract_params(), file.read_bytes()
                )
            else:
                params = self.lab.pretrain(seed)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(file, serialization.to_bytes(params))
            self._bases[seed] = params, self.lab.fingerprint(params)
        params, name = self._bases[seed]
        what = self.common | {"kind": "base", "seed": seed, "base": name}
        self.store.get(what, lambda: {"measured": self.lab.measure(params)})
        return params, name

    def run(self, kind: str, name: str, rate: float, seed: int) -> Line:
        """One run of an arm: "saturation", "tune" or "final"."""
        params, base = self.base(seed)
        what = self.common | {"kind": kind, "arm": name, "rate": rate, "seed": seed, "base": base}

        def make() -> Line:
            from lab import MEASURE, TUNE

            if same := self.store.find(**what | {"kind": "saturation"}):
                return {"measured": same[0]["measured"]}
            trained = self.lab.continue_by(params, ARMS[name], rate, seed)
            stream = TUNE if kind == "tune" else MEASURE
            return {"measured": self.lab.measure(trained, stream)}

        return self.store.get(what, make)

    def rate(self, name: str) -> float:
        """The learning rate of an arm, chosen by recall on the tuning seeds."""
        name = ARMS[name].rate_of or name

        def recall(rate: float) -> float:
            runs = [self.run("tune", name, rate, seed) for seed in self.seeds.tuning]
            return sum(run["measured"]["recall_1"] for run in runs)

        return max(self.seeds.rates, key=recall)

    def saturation(self) -> None:
        """Continue next-token training at every rate, from every base."""
        for seed in self.seeds.final:
            for rate in self.seeds.rates:
                self.run("saturation", "ntp", rate, seed)

    def cooling(self) -> None:
        """Measure the base models at lower temperatures."""
        for seed in self.seeds.final:
            params, base = self.base(seed)
            for temperature in TEMPERATURES:
                what = {"kind": "cooled", "temperature": temperature, "seed": seed, "base": base}

                def make(params=params, temperature=temperature) -> Line:
                    return {"measured": self.lab.measure(self.lab.cooled(params, temperature))}

                self.store.get(self.common | what, make)

    def compare(self, names: Sequence[str]) -> None:
        """Tune arms and run their final seeds, arm by arm; then their costs."""
        for name in names:
            rate = self.rate(name)
            for seed in self.seeds.final:
                self.run("final", name, rate, seed)
            self.cost(name)

    def cost(self, name: str) -> None:
        """Measure a step of an arm against one of next-token training."""
        params, _ = self.base(self.seeds.tuning[0])
        rounds = self.seeds.rounds

        def make() -> Line:
            pair = {"ntp": ARMS["ntp"], name: ARMS[name]}
            seconds = self.lab.step_seconds(params, pair, rounds)
            return {"seconds": seconds, "ratio": seconds[name] / seconds["ntp"]}

        self.store.get(self.common | {"kind": "cost", "arm": name}, make)

    def signals(self, names: Sequence[str]) -> None:
        """How much of the gradient of each estimator is signal, in the tuning seed's base."""
        from signals import gradients, signal

        params, base = self.base(self.seeds.tuning[0])
        next_token = None
        for name in names:
            what = self.common | {"kind": "signal", "arm": name, "base": base}
            if self.store.find(**what):
                continue
            if next_token is None:
                next_token = gradients(self.lab, params, ARMS["ntp"])

            def make(name=name, next_token=next_token) -> Line:
                return signal(gradients(self.lab, params, ARMS[name]), next_token)

            self.store.get(what, make)
            self.cost(name)

    def answers(self) -> None:
        """Post-training and test-time training by the arms of BEST, and by next tokens."""
        methods: dict[str, Arm | None] = {"answers only": None}
        methods |= {name: ARMS[name] for name in ("ntp", *BEST)}

        def posttrained(name: str, rate: float, seed: int) -> tuple[Any, str]:
            params, base = self.base(seed)
            return self.lab.posttrain(params, methods[name], rate, seed), base

        def run(kind: str, name: str, rate: float, seed: int, tuning: bool, make) -> Line:
            what = self.common | {"kind": kind, "arm": name, "rate": rate, "seed": seed}
            return self.store.get(what, lambda: make(name, rate, seed, tuning))

        def all_seeds(kind: str, names, make) -> None:
            from lab import ASK, TUNE

            for name in names:
                tuned = {
                    rate: run(kind, name, rate, seed, TUNE, make)["recall"]
                    for rate in self.seeds.rates
                    for seed in self.seeds.tuning[:1]
                }
                rate = max(tuned, key=tuned.__getitem__)
                for seed in self.seeds.final:
                    run(kind, name, rate, seed, ASK, make)

        def post(name, rate, seed, stream) -> Line:
            params, base = posttrained(name, rate, seed)
            return {"base": base} | self.lab.answer(params, stream=stream)

        def adapt(name, rate, seed, stream) -> Line:
            params, base = posttrained("answers only", self._answer_rate(), seed)
            arm = methods[name]
            return {"base": base} | self.lab.adapt_and_answer(
                params, arm, rate, seed, stream=stream
            )

        all_seeds("posttrain", methods, post)
        all_seeds("testtime", ("ntp", *BEST), adapt)

    def _answer_rate(self) -> float:
        (line, *_) = self.store.find(
            **self.common, kind="posttrain", arm="answers only", seed=self.seeds.final[0]
        )
        return line["rate"]


def stages(study: Study, args: argparse.Namespace) -> Iterator[Callable[[], None]]:
    """What is run, the most important first."""
    if args.signals:
        yield lambda: study.signals(args.arms or tuple(ARMS))
        return
    if args.arms:
        yield lambda: study.compare(args.arms)
        return
    yield study.saturation
    yield study.cooling
    yield lambda: study.compare(CORE)
    if not args.core:
        yield lambda: study.compare(tuple(ARMS))
        yield lambda: study.signals(tuple(ARMS))
        yield study.answers


def main() -> int:
    """The command."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--workdir", type=path_flag, help="default: runs/study, or runs/study-small")
    flags.add_argument("--results", type=path_flag, help="default: results.jsonl beside this file")
    flags.add_argument("--task", choices=TASKS, help="only this task")
    flags.add_argument("--family", choices=FAMILIES, help="only this family")
    flags.add_argument("--core", action="store_true", help="only saturation and the core arms")
    flags.add_argument("--arms", nargs="+", choices=tuple(ARMS), help="only these arms")
    flags.add_argument("--seeds", type=int, help="only so many of the final seeds")
    flags.add_argument("--signals", action="store_true", help="only the shares of signal")
    flags.add_argument("--small", action="store_true", help="tiny models, a few steps")
    flags.add_argument("--report", action="store_true", help="only the tables of what is done")
    args = flags.parse_args()
    workdir = args.workdir or Path("runs/study-small" if args.small else "runs/study")
    results = args.results or (workdir / "results.jsonl" if args.small else RESULTS)
    if not args.report:
        workdir.mkdir(parents=True, exist_ok=True)
        run(args, workdir, results)
    from report import plot_trade, report

    lines = ResultStore(results).lines
    print(report(lines))
    plot_trade(lines, results.with_name("study.png"))
    return 0


def run(args: argparse.Namespace, workdir: Path, results: Path) -> None:
    """All runs that are not done yet."""
    if args.small:
        # Unoptimised machine code: its programs run for less time than they take to optimise.
        flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    import jax
    from lab import Lab
    from plans import make_task, plan_of

    # Programs recur when a study goes on.
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    store = ResultStore(results)
    seeds = SMALL if args.small else FINAL
    seeds = dataclasses.replace(seeds, final=seeds.final[: args.seeds])
    for task in [args.task] if args.task else TASKS:
        made = make_task(task, workdir, args.small)
        studies = [
            Study(Lab(family, plan_of(task, family, args.small), made), task, store, workdir, seeds)
            for family in ([args.family] if args.family else FAMILIES)
        ]
        for stage in zip(*(stages(study, args) for study in studies), strict=True):
            for of_family in stage:
                of_family()


if __name__ == "__main__":
    sys.exit(main())
