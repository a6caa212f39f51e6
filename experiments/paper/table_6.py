"""Table 6 of the paper: the reward of mid-training, by the mean of 12 tasks of LongBench.

    python experiments/paper/table_6.py --documents=CORPUS --longbench=data/longbench \
        --lact=checkpoints/lact-760m --deltanet=checkpoints/deltanet-1.3b
    python experiments/paper/table_6.py --small

Exact matches of tokens (binary) against cosine similarities of hidden states, the paper's choice.
Data: see table_5.py.
"""

import sys

import plan
from produce import main

PUBLISHED = {
    "lact": {"binary": 16.6, "cosine": 16.9},
    "deltanet": {"binary": 16.5, "cosine": 17.0},
}


def describe(paper: plan.Paper) -> plan.Table:
    """Values of all rows."""
    values = plan.ablation(paper, "reward", PUBLISHED)
    return plan.Table("Table 6: reward of mid-training, LongBench mean in per cent", values)


if __name__ == "__main__":
    sys.exit(main(describe, "table_6", __doc__))
