"""Figure E.2 of the paper: entropy of the next token along one document.

    python experiments/paper/figure_e2.py --documents=CORPUS \
        --lact=checkpoints/lact-760m --deltanet=checkpoints/deltanet-1.3b
    python experiments/paper/figure_e2.py --small

Of both published models, on the same 16,384 tokens: the first document of CORPUS that is so long
(the paper takes one at random, and does not say which).
"""

import json
import sys
from pathlib import Path

import plan
from produce import main


def read_entropy(folder: Path) -> list[tuple[float, float]]:
    """Entropies in nats by token."""
    values = json.loads((folder / "results.json").read_text(encoding="utf-8"))["entropy"]
    return list(enumerate(values))


def describe(paper: plan.Paper) -> plan.Figure:
    """A panel for each model."""
    curves = [
        plan.RunCurve(plan.TITLES[model], "entropy", paper.entropy(model), read_entropy)
        for model in paper.models
    ]
    axes = {plan.TITLES[model]: ("token", "entropy (nats)") for model in paper.models}
    return plan.Figure("Figure E.2: entropy of the next token", axes, tuple(curves))


if __name__ == "__main__":
    sys.exit(main(describe, "figure_e2", __doc__))
