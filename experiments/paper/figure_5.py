"""Figure 5 of the paper: tokens of a rollout k and positions of a sequence c in mid-training.

    python experiments/paper/figure_5.py --documents=CORPUS --longbench=data/longbench \
        --lact=checkpoints/lact-760m --deltanet=checkpoints/deltanet-1.3b
    python experiments/paper/figure_5.py --small

Mean of 12 tasks of LongBench for k in 1, 3, 5, 7 and c in 2, 4, 6, 8 (the values marked on the
paper's axes); the small form takes every other one. The numbers in the paper's text are shown
beside ours. Data: see table_5.py.
"""

import sys

import plan
from produce import main

PANELS = {"k": ("rollout_length", (1, 3, 5, 7)), "c": ("num_positions", (2, 4, 6, 8))}
PUBLISHED = {
    "lact": {("k", 5): 16.9, ("c", 2): 16.5, ("c", 8): 16.9},
    "deltanet": {("k", 5): 17.0, ("c", 2): 16.3, ("c", 8): 17.0},
}


def describe(paper: plan.Paper) -> plan.Figure:
    """A curve for each model in both panels."""
    curves = []
    for panel, (field, choices) in PANELS.items():
        choices = choices[1::2] if paper.small else choices
        for model in paper.models:
            points = []
            for choice in choices:
                run = paper.longbench_mean(
                    model, paper.midtrain(model, "refine", **{field: choice})
                )
                points.append(plan.Point(choice, (run,), PUBLISHED[model].get((panel, choice))))
            curves.append(plan.Series(panel, plan.TITLES[model], tuple(points)))
    axes = {"k": ("tokens of a rollout", "LongBench mean (%)")}
    axes |= {"c": ("positions of a sequence", "LongBench mean (%)")}
    return plan.Figure("Figure 5: rollout length and positions", axes, tuple(curves))


if __name__ == "__main__":
    sys.exit(main(describe, "figure_5", __doc__))
