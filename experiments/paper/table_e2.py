"""Table E.2 of the paper: the reward of test-time training, by the mean of 12 tasks of LongBench.

    python experiments/paper/table_e2.py --documents=CORPUS --longbench=data/longbench \
        --lact=checkpoints/lact-760m --deltanet=checkpoints/deltanet-1.3b
    python experiments/paper/table_e2.py --small

The ReFINE mid-trained model without test-time training, with next-token loss (SFT), with ReFINE by
cosine similarity, and by exact matches (binary), the paper's choice. Data: see table_5.py; --reset:
see table_4.py.
"""

import sys

import plan
from produce import main

# Test-time training and its reward.
ROWS = {"-": ("", {}), "SFT": ("ntp", {})}
ROWS |= {"ReFINE, cosine": ("refine", {"reward": "cosine"}), "ReFINE, binary": ("refine", {})}
PUBLISHED = {"lact": (16.9, 17.0, 17.5, 18.0), "deltanet": (17.0, 16.5, 17.6, 17.9)}


def describe(paper: plan.Paper) -> plan.Table:
    """Values of all rows."""
    values = []
    for model in paper.models:
        for (label, (ttt, changes)), number in zip(ROWS.items(), PUBLISHED[model], strict=True):
            runs = paper.longbench(model, paper.midtrain(model, "refine"), ttt, **changes)
            sources = tuple(plan.set_score(run, task) for task, run in runs.items())
            row = f"{plan.TITLES[model]}: {label}"
            values.append(plan.Value(row, "LongBench mean", sources, number))
    return plan.Table("Table E.2: reward of test-time training, per cent", tuple(values))


if __name__ == "__main__":
    sys.exit(main(describe, "table_e2", __doc__))
