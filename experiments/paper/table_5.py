"""Table 5 of the paper: 12 tasks of LongBench after mid-training and test-time training.

    python experiments/paper/table_5.py --documents=CORPUS --longbench=data/longbench \
        --lact=checkpoints/lact-760m --deltanet=checkpoints/deltanet-1.3b
    python experiments/paper/table_5.py --small

Rows: mid-training (next token, ReFINE), then test-time training of the ReFINE mid-trained model by
the next token (SFT) and by ReFINE. data/longbench: the official repository's parquet files, with
prompts of at most 16,384 tokens. CORPUS: see table_3.py; --reset: see table_4.py.

Differences: the official code cuts every answer after 32 tokens; here each task has its budget.
"""

import sys

import plan
from produce import main

# Mid-training, test-time training; the tasks in the order of plan.LONGBENCH, and their mean.
ROWS = {
    "lact": (
        (None, "", (6.5, 10.5, 7.2, 11.7, 9.8, 13.6, 9.2, 14.2, 10.5, 8.0, 26.7, 29.7, 13.1)),
        ("ntp", "", (5.8, 10.1, 7.4, 12.6, 9.2, 13.1, 10.5, 13.8, 7.5, 12.2, 29.8, 30.1, 13.5)),
        (
            *("refine", ""),
            (6.5, 11.1, 12.6, 19.6, 18.0, 14.3, 15.9, 17.0, 11.0, 12.9, 32.9, 31.1, 16.9),
        ),
        (
            *("refine", "ntp"),
            (5.1, 12.6, 13.5, 15.9, 18.4, 13.2, 16.2, 17.4, 12.5, 16.2, 32.0, 31.4, 17.0),
        ),
        (
            *("refine", "refine"),
            (6.7, 14.5, 14.1, 18.4, 22.8, 13.9, 15.9, 17.4, 15.5, 11.8, 32.2, 32.3, 18.0),
        ),
    ),
    "deltanet": (
        (None, "", (6.5, 8.7, 10.0, 4.8, 6.4, 12.4, 16.3, 9.4, 17.7, 15.1, 33.8, 29.0, 14.2)),
        ("ntp", "", (5.7, 9.4, 8.3, 9.2, 8.6, 14.7, 16.1, 15.5, 22.9, 15.2, 33.1, 29.2, 15.7)),
        (
            *("refine", ""),
            (6.5, 9.5, 10.1, 9.6, 8.7, 15.2, 15.0, 16.2, 25.0, 21.4, 35.9, 31.1, 17.0),
        ),
        (
            *("refine", "ntp"),
            (7.2, 9.6, 10.5, 6.8, 7.2, 14.9, 16.2, 17.3, 28.0, 16.6, 34.1, 29.2, 16.5),
        ),
        (
            *("refine", "refine"),
            (7.5, 9.2, 11.5, 9.5, 8.6, 14.7, 16.1, 16.5, 31.5, 24.7, 35.2, 30.0, 17.9),
        ),
    ),
}
LABELS = {None: "-", "": "-", "ntp": "SFT", "refine": "ReFINE"}


def describe(paper: plan.Paper) -> plan.Table:
    """Values of all rows."""
    values = []
    for model in paper.models:
        for midtrain, ttt, published in ROWS[model]:
            start = paper.midtrain(model, midtrain)
            runs = paper.longbench(model, start, ttt)
            sources = {task: plan.set_score(run, task) for task, run in runs.items()}
            row = f"{plan.TITLES[model]}: {LABELS[midtrain]}, {LABELS[ttt]}"
            values += [
                plan.Value(row, task, (source,), number)
                for (task, source), number in zip(sources.items(), published, strict=False)
            ]
            values.append(plan.Value(row, "mean", tuple(sources.values()), published[-1]))
    return plan.Table("Table 5: LongBench, per cent (rows: MidTr, TTT)", tuple(values))


if __name__ == "__main__":
    sys.exit(main(describe, "table_5", __doc__))
