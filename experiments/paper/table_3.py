"""Table 3 of the paper: recall of needles (RULER) after mid-training, at 4K, 8K and 16K tokens.

    python experiments/paper/table_3.py --documents=CORPUS --essays=ESSAYS \
        --lact=checkpoints/lact-760m --deltanet=checkpoints/deltanet-1.3b
    python experiments/paper/table_3.py --small

Rows: the published model, mid-trained on the next token (SFT), mid-trained with ReFINE; 100 steps
of 128 sequences of 16,384 tokens each. 500 samples of every task and length. The paper does not say
which of RULER's three single and multi-key tasks it takes. Its single and multi-key numbers are all
multiples of 0.2 %, hence one task of 500 samples and no mean over three; the first is taken here.
Its samples, made by lm-eval, are others than ours.

CORPUS: documents of at least 16,384 tokens (the paper: Long-Data-Collections). ESSAYS: text files;
RULER takes Paul Graham's essays.
"""

import sys

import plan
from produce import main

COLUMNS = {
    "S-NIAH": "niah_single_1",
    "MK-NIAH": "niah_multikey_1",
    "MQ-NIAH": "niah_multiquery",
    "MV-NIAH": "niah_multivalue",
}
# Of each column: at 4K, 8K and 16K tokens, and the mean.
PUBLISHED = {
    ("lact", ""): (
        *(98.8, 91.2, 95.8, 95.3, 70.2, 44.8, 24.2, 46.2),
        *(39.2, 24.9, 17.4, 27.1, 40.6, 27.0, 17.7, 28.4),
    ),
    ("lact", " + SFT MidTr"): (
        *(98.4, 90.8, 97.6, 95.6, 70.6, 45.0, 24.2, 46.6),
        *(40.7, 25.2, 17.4, 27.8, 41.7, 26.3, 17.7, 28.5),
    ),
    ("lact", " + ReFINE MidTr"): (
        *(99.0, 93.0, 96.8, 96.3, 70.4, 46.0, 26.6, 47.7),
        *(40.5, 25.8, 18.0, 28.1, 41.2, 29.5, 18.6, 29.8),
    ),
    ("deltanet", ""): (
        *(100.0, 100.0, 100.0, 100.0, 23.6, 17.8, 3.4, 14.9),
        *(27.7, 3.9, 1.8, 11.1, 23.9, 5.4, 2.0, 10.4),
    ),
    ("deltanet", " + SFT MidTr"): (
        *(100.0, 100.0, 100.0, 100.0, 23.8, 19.2, 7.8, 16.9),
        *(33.2, 16.8, 3.5, 17.8, 28.3, 19.3, 3.7, 17.1),
    ),
    ("deltanet", " + ReFINE MidTr"): (
        *(100.0, 100.0, 99.8, 99.9, 25.0, 21.4, 8.8, 18.4),
        *(37.3, 18.8, 3.6, 19.9, 29.0, 20.4, 4.0, 17.8),
    ),
}


def describe(paper: plan.Paper) -> plan.Table:
    """Values of all rows."""
    values = []
    for model in paper.models:
        for label, method in plan.METHODS.items():
            start = paper.midtrain(model, method)
            run = paper.needles(model, start, COLUMNS.values())
            row = plan.TITLES[model] + label
            published = iter(PUBLISHED[model, label])
            for column, task in COLUMNS.items():
                sources = {n: plan.set_score(run, task, n) for n in paper.needle_lengths}
                values += plan.by_length(row, column, sources, published)
    return plan.Table("Table 3: needles in a haystack, recall in per cent", tuple(values))


if __name__ == "__main__":
    sys.exit(main(describe, "table_3", __doc__))
