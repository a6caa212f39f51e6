"""Figure E.1 of the paper: next-token loss on Booksum in the course of mid-training.

    python experiments/paper/figure_e1.py --documents=CORPUS --booksum=BOOKSUM \
        --lact=checkpoints/lact-760m --deltanet=checkpoints/deltanet-1.3b
    python experiments/paper/figure_e1.py --small

From the runs of figure_4.py, which says what they need.
"""

import sys

import plan
from produce import main


def describe(paper: plan.Paper) -> plan.Figure:
    """Curves of both methods."""
    return plan.booksum_figure(
        paper, "Figure E.1: next-token loss on Booksum", "loss", "nats a token", scale=1.0
    )


if __name__ == "__main__":
    sys.exit(main(describe, "figure_e1", __doc__))
