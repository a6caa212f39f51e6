"""Table 7 of the paper: how positions are chosen in mid-training, by the mean of LongBench.

    python experiments/paper/table_7.py --documents=CORPUS --longbench=data/longbench \
        --lact=checkpoints/lact-760m --deltanet=checkpoints/deltanet-1.3b
    python experiments/paper/table_7.py --small

In each span: uniformly, where the entropy is largest or smallest, or drawn by entropy, the paper's
choice. Data: see table_5.py.
"""

import sys

import plan
from produce import main

PUBLISHED = {
    "lact": {"uniform": 16.2, "argmax": 16.4, "argmin": 16.6, "entropy": 16.9},
    "deltanet": {"uniform": 15.9, "argmax": 16.7, "argmin": 16.8, "entropy": 17.0},
}


def describe(paper: plan.Paper) -> plan.Table:
    """Values of all rows."""
    values = plan.ablation(paper, "selection", PUBLISHED)
    return plan.Table("Table 7: selection of positions, LongBench mean in per cent", values)


if __name__ == "__main__":
    sys.exit(main(describe, "table_7", __doc__))
