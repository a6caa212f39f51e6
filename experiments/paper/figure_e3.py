"""Figure E.3 of the paper: mean and deviation of the cosine reward in the course of mid-training.

    python experiments/paper/figure_e3.py --documents=CORPUS \
        --lact=checkpoints/lact-760m --deltanet=checkpoints/deltanet-1.3b
    python experiments/paper/figure_e3.py --small

For rollouts of 3, 5 and 7 tokens, at every step. The runs are those of figure_5.py. CORPUS: see
table_3.py. The paper's text gives no numbers: mean and deviation stay stable over the steps, and
fall as rollouts get longer.
"""

import functools
import sys
from pathlib import Path

import plan
from produce import main

from refine_jax.report.metrics import read_metrics


def read_reward(folder: Path, name: str) -> list[tuple[float, float]]:
    """A figure of the rewards by training step."""
    records = read_metrics(folder / "metrics.jsonl")
    return [(record["step"], record[name]) for record in records if name in record]


def describe(paper: plan.Paper) -> plan.Figure:
    """Mean and deviation of each model, a curve for each rollout length."""
    curves, axes = [], {}
    for kind in ("mean", "std"):
        read = functools.partial(read_reward, name=f"reward/{kind}")
        for model in paper.models:
            panel = f"{plan.TITLES[model]} ({kind})"
            axes[panel] = ("training step", f"reward, {kind}")
            for k in (3, 5, 7):
                run = paper.midtrain(model, "refine", rollout_length=k)
                curves.append(plan.RunCurve(panel, f"k = {k}", run, read))
    return plan.Figure("Figure E.3: reward of the rollouts", axes, tuple(curves))


if __name__ == "__main__":
    sys.exit(main(describe, "figure_e3", __doc__))
