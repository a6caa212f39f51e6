"""Figure 4 of the paper: next-token accuracy on Booksum in the course of mid-training.

    python experiments/paper/figure_4.py --documents=CORPUS --booksum=BOOKSUM \
        --lact=checkpoints/lact-760m --deltanet=checkpoints/deltanet-1.3b
    python experiments/paper/figure_4.py --small

Mid-training on the next token (SFT) and with ReFINE, every 10 of 100 steps; error bars from the
smallest to the largest of three trials, as in the paper, whose text gives no numbers. BOOKSUM:
documents of Booksum, of which the first 16,384 tokens are read. CORPUS: see table_3.py. Every tenth
checkpoint of six runs is kept: per run about 90 GB for LaCT-760M, 160 GB for DeltaNet-1.3B.
"""

import sys

import plan
from produce import main


def describe(paper: plan.Paper) -> plan.Figure:
    """Curves of both methods."""
    return plan.booksum_figure(
        paper, "Figure 4: next-token accuracy on Booksum", "accuracy", "tokens predicted right (%)"
    )


if __name__ == "__main__":
    sys.exit(main(describe, "figure_4", __doc__))
