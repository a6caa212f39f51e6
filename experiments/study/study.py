"""A study on a CPU: does ReFINE help a small LaCT and a small DeltaNet to remember?

    python experiments/study/study.py                      # all; goes on where it was interrupted
    python experiments/study/study.py --small              # a few steps: does everything run?
    python experiments/study/study.py --report             # tables and curves of what is done
    python experiments/study/study.py --signals            # only how noisy each estimator is

Both models are pre-trained on short documents that are mostly facts, then mid-trained on longer
ones that are mostly source code (`corpus.py`), by next-token training (NTP) and by ReFINE, with the
same documents in the same order. Compared are models after equal steps and after equal time, five
seeds each; learning rates are chosen for each objective on other documents and another seed.
Ablations change one thing of ReFINE. Then the ReFINE models are post-trained on questions, and
adapted to each prompt before they answer it. The models run in processes of their own, each on its
share of the cores.

`--signals` pre-trains, or reuses, the base models and measures for each of ESTIMATORS how much of
its gradient is signal: one table, and last its figures as one line of JSON.

    WORKDIR/study.md  study.json  study.png    tables, figures, curves
    WORKDIR/MODEL/NAME.json  NAME.msgpack      what each run gave, and its parameters
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sizes import MODELS, SIZES, StudyPlan

from refine_jax.base.files import path_flag, write_bytes, write_text
from refine_jax.presets import PRESETS

if TYPE_CHECKING:
    from lab import Lab

ABLATIONS: dict[str, dict[str, Any]] = {
    "reward=binary": {"reward": "binary"},
    "reward=hybrid": {"reward": "hybrid"},
    "selection=uniform": {"selection": "uniform"},
    "selection=argmax": {"selection": "argmax"},
    "k=1": {"rollout_length": 1},
    "k=7": {"rollout_length": 7},
    "c=2": {"num_positions": 2},
    "n=4 a position, lambda_rl=1": {
        "rollouts_per_position": 4,
        "grouping": "position",
        "lambda_rl": 1.0,
    },
}
# Of these it is measured how much of the gradient is signal (whatever the weight lambda_rl), by
# what they change of the published estimator.
ESTIMATORS: dict[str, dict[str, Any]] = {
    "next-token": {"objective": "ntp"},
    "published": {},
    "reward=binary": ABLATIONS["reward=binary"],
    "reward=hybrid": ABLATIONS["reward=hybrid"],
    "reward=whole": {"reward": "whole"},
    "reward=prefix": {"reward": "prefix"},
    "reward=expected": {"reward": "expected"},
    "selection=uniform": ABLATIONS["selection=uniform"],
    "selection=argmax": ABLATIONS["selection=argmax"],
    "selection=variance": {"selection": "variance"},
    "credit=reward_to_go": {"credit": "reward_to_go"},
    "baseline=optimal_token": {"baseline": "optimal_token"},
    "n=4 a position": ABLATIONS["n=4 a position, lambda_rl=1"],
    "n=8, c=1, baseline=leave_one_out": {
        "rollouts_per_position": 8,
        "num_positions": 1,
        "baseline": "leave_one_out",
    },
    "preset=low_noise": PRESETS["low_noise"],
    "preset=exact": PRESETS["exact"],
} | {
    f"exact, {reward}, {selection}": {
        "estimator": "exact",
        "reward": reward,
        "selection": selection,
    }
    for reward in ("whole", "prefix")
    for selection in ("all", "entropy", "variance")
}
TUNING_SEED = 1000


class ResultStore:
    """Results of runs as JSON files, parameters beside them; a finished run is not repeated."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(
        self, name: str, settings: Mapping[str, Any], run: Callable[[], tuple[Any, dict]]
    ) -> dict[str, Any]:
        """What `run` gives as its second value, from the file if it was run with these settings."""
        from flax import serialization

        file = self.folder / f"{name}.json"
        settings = json.loads(json.dumps(settings))
        if file.is_file():
            record = json.loads(file.read_text(encoding="utf-8"))
            if record["settings"] == settings:
                return record["results"]
        params, results = run()
        if params is not None:
            write_bytes(self._params(name), serialization.to_bytes(params))
        record = {"settings": settings, "results": results}
        write_text(file, json.dumps(record))
        return results

    def params(self, name: str, like: Any) -> Any:
        """The parameters of a run that is done."""
        from flax import serialization

        return serialization.from_bytes(like, self._params(name).read_bytes())

    def _params(self, name: str) -> Path:
        return self.folder / f"{name}.msgpack"


@dataclasses.dataclass(frozen=True)
class StudyStart:
    """What the runs of one model start from.

    base: parameters of the pre-trained model. settings: what made it, and the study's sizes.
    """

    lab: Lab
    records: ResultStore
    base: Any
    settings: dict[str, Any]


def begin(name: str, plan: StudyPlan, workdir: Path) -> StudyStart:
    """Pre-train one model, unless that is done."""
    import jax
    from corpus import FactCorpus, train_vocabulary
    from lab import Lab

    # Programs recur when a study goes on.
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    sizes = plan.sizes
    vocabulary = workdir / "vocabulary.model"
    if not vocabulary.is_file():
        train_vocabulary(vocabulary, sizes.vocabulary)
    lab = Lab(name, sizes, FactCorpus(vocabulary))
    records = ResultStore(workdir / name)
    made_of = {
        "fields": sizes.fields[name],
        "vocabulary": sizes.vocabulary,
        "stages": [dataclasses.asdict(stage) for stage in sizes.pretrain[name]],
        "rate": sizes.pretrain_rate[name],
        "repeated": sizes.repeated[name],
        "fast_rate": sizes.fast_rate,
        "jax": jax.__version__,
    }
    records.get("base", made_of, lab.pretrain)
    own = {"fields": {}, "pretrain": {}, "repeated": {}, "pretrain_rate": {}}  # in `made_of`
    settings = made_of | {"sizes": dataclasses.asdict(dataclasses.replace(sizes, **own))}
    return StudyStart(lab, records, records.params("base", lab.model.abstract_params()), settings)


def measure_signals(start: StudyStart) -> None:
    """How much of the gradient of each of ESTIMATORS is signal, in the base model."""
    from refine_jax.config import RefineConfig

    lab, base = start.lab, start.base
    configs = {name: RefineConfig(**values) for name, values in ESTIMATORS.items()}
    next_token = functools.cache(lambda: lab.gradients(base, configs["next-token"]))
    for name, config in configs.items():

        def measure(name=name, config=config):
            return None, lab.signal(name, lab.gradients(base, config), next_token())

        start.records.get(f"share-{name}", start.settings | dataclasses.asdict(config), measure)


def study(name: str, plan: StudyPlan, workdir: Path) -> None:
    """All runs of one model, in an order in which each finds what it starts from."""
    from lab import POSTTRAINING, TUNE

    from refine_jax.config import RefineConfig

    start = begin(name, plan, workdir)
    lab, records, base, common = start.lab, start.records, start.base, start.settings
    sizes, like = plan.sizes, lab.model.abstract_params()
    records.get("before", common, lambda: (None, lab.measure(base)))
    measure_signals(start)

    def midtrain(run: str, config: RefineConfig, rate: float, seed: int, keep=False, **options):
        def make():
            params, results = lab.midtrain(base, config, rate, seed, **options)
            return params if keep else None, results

        settings = common | dataclasses.asdict(config) | {"rate": rate, "seed": seed} | options
        return records.get(run, settings, make)

    configs = {name: RefineConfig(objective=name) for name in ("ntp", "refine")}
    ablations = {n: ABLATIONS[n] for n in (ABLATIONS if plan.ablations is None else plan.ablations)}
    steps, rates = sizes.midtrain.steps, {}
    for objective, config in configs.items():
        runs = {
            rate: midtrain(f"tune-{objective}-{rate:g}", config, rate, TUNING_SEED, stream=TUNE)
            for rate in plan.rates
        }
        loss = f"loss_{sizes.midtrain.shape.length}"
        rates[objective] = min(runs, key=lambda rate: runs[rate]["measured"][str(steps)][loss])
    configured = {name: (config, rates[name]) for name, config in configs.items()}
    settings = common | {"rates": dict(rates)}
    cost = records.get("cost", settings, lambda: (None, lab.step_seconds(base, configured)))
    # As many steps of next-token training as take the time of ReFINE's.
    equal = round(steps * min(max(cost["refine"] / cost["ntp"], 1.0), sizes.longest))
    chosen = {"rates": rates, "step_seconds": cost, "steps": steps, "equal_compute_steps": equal}

    for seed in range(plan.seeds):
        more = {"steps": equal, "marks": [steps, equal]}
        midtrain(f"mid-ntp-{seed}", configs["ntp"], rates["ntp"], seed, **more)
        midtrain(f"mid-refine-{seed}", configs["refine"], rates["refine"], seed, keep=True)

    starts = {s: records.params(f"mid-refine-{s}", like) for s in range(plan.seeds)}
    for seed, start in starts.items():
        settings = common | {"start": chosen}
        records.get(f"post-none-{seed}", settings, lambda p=start: (None, lab.answers(p)))

    def all_seeds(run: str, tried: str, choices: tuple[float, ...], train) -> None:
        """Choose a rate on other questions, then train with it; train(start, rate, seed)."""

        def get(label: str, rate: float, make) -> dict[str, Any]:
            return records.get(label, common | {"rate": rate, "start": chosen}, make)

        def tune(rate: float) -> float:
            def make():
                return None, train(0, rate, TUNING_SEED, stream=TUNE)[1]

            return get(f"tune-{tried}-{rate:g}", rate, make)["recall"]

        rate = max(choices, key=tune)
        rates[tried] = rate
        for seed in range(plan.seeds):
            get(f"{run}-{seed}", rate, lambda s=seed: train(s, rate, s))

    for variant in POSTTRAINING:

        def posttrain(start, rate, seed, variant=variant, **options):
            return lab.posttrain(starts[start], variant, rate, seed, **options)

        all_seeds(f"post-{variant}", variant, plan.answer_rates, posttrain)

    trained = {s: records.params(f"post-nested_refine-{s}", like) for s in range(plan.seeds)}
    for objective in configs:

        def testtime(start, rate, seed, objective=objective, **options):
            return None, lab.testtime(trained[start], objective, rate, seed, **options)

        all_seeds(f"testtime-{objective}", f"testtime-{objective}", plan.rates, testtime)

    write_text(workdir / name / "chosen.json", json.dumps(chosen))
    for seed in range(plan.ablation_seeds):
        for ablation, change in ablations.items():
            config = dataclasses.replace(configs["refine"], **change)
            midtrain(f"ablation-{ablation}-{seed}", config, rates["refine"], seed)


def _start(name: str, share: set[int] | None, arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, __file__, f"--model={name}", *arguments]
    limit = None if share is None else (lambda: os.sched_setaffinity(0, share))
    return subprocess.Popen(command, preexec_fn=limit)


def main() -> int:
    """The command."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--workdir", type=path_flag, help="default: runs/study, or runs/study-small")
    flags.add_argument("--model", choices=MODELS, help="only the runs of this model, and no report")
    flags.add_argument("--small", action="store_true", help="tiny models, a few steps")
    flags.add_argument("--report", action="store_true", help="only the tables and curves")
    flags.add_argument(
        "--signals",
        action="store_true",
        help="only how much of each estimator's gradient is signal",
    )
    args = flags.parse_args()
    form = "small" if args.small else "full"
    workdir = args.workdir or Path("runs/study-small" if args.small else "runs/study")
    workdir.mkdir(parents=True, exist_ok=True)
    if args.small:
        # Unoptimised machine code: its programs run for less time than they take to optimise.
        flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    if args.model:
        if args.signals:
            measure_signals(begin(args.model, SIZES[form], workdir))
        else:
            study(args.model, SIZES[form], workdir)
        return 0
    if not args.report:
        from corpus import train_vocabulary

        if not (workdir / "vocabulary.model").is_file():
            train_vocabulary(workdir / "vocabulary.model", SIZES[form].sizes.vocabulary)
        shares = [None] * len(MODELS)
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            if len(cores) >= len(MODELS):
                shares = [set(cores[i :: len(MODELS)]) for i in range(len(MODELS))]
        arguments = [f"--workdir={workdir}"] + ["--small"] * args.small
        arguments += ["--signals"] * args.signals
        started = [
            _start(name, share, arguments) for name, share in zip(MODELS, shares, strict=True)
        ]
        failed = [process.args for process in started if process.wait() != 0]
        if failed:
            print(f"error: failed: {failed}", file=sys.stderr)
            return 1
    from report import report, report_signals

    if args.signals:
        print(report_signals(workdir, SIZES[form], ESTIMATORS))
    else:
        print(report(workdir, SIZES[form], ABLATIONS, ESTIMATORS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
