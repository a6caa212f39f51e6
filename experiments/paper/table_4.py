"""Table 4 of the paper: RULER's question answering after each phase, at 4K, 8K and 16K tokens.

    python experiments/paper/table_4.py --documents=CORPUS --ruler_qa=data/ruler \
        --lact=checkpoints/lact-760m --deltanet=checkpoints/deltanet-1.3b
    python experiments/paper/table_4.py --small

Rows: mid-training (next token, ReFINE), then post-training of the ReFINE mid-trained model (SFT on
the answers, nested SFT, nested ReFINE), then test-time training of the last. As in the official
code there is a post-training for each task and length: 18 of a model. 200 answers of each set.

data/ruler: the official repository's, `ruler_TASK_MODEL_LENGTH_1600_train.parquet` and
`..._200_test.parquet`. CORPUS: see table_3.py. Published test-time training is never reset, so that
a score depends on the order of the prompts; --reset=example resets it for each. The small form
takes SQuADQA alone.
"""

import sys

import plan
from produce import main

TASKS = {"squadqa": "SQuADQA", "hotpotqa": "HotpotQA"}
# Mid-training, post-training and test-time training; SQuADQA and HotpotQA at 4K, 8K, 16K, mean.
ROWS = {
    "lact": (
        (None, "", "", (17.5, 14.0, 6.5, 12.7, 20.5, 14.5, 12.0, 15.7)),
        ("ntp", "", "", (19.5, 14.0, 6.0, 13.2, 21.5, 15.0, 12.0, 16.2)),
        ("refine", "", "", (20.5, 15.5, 8.0, 14.7, 23.0, 16.0, 12.5, 17.2)),
        ("refine", "sft", "", (30.5, 20.0, 7.5, 19.3, 25.0, 16.5, 11.5, 17.7)),
        ("refine", "nested_sft", "", (38.0, 20.0, 7.5, 21.8, 24.0, 16.0, 12.5, 17.5)),
        ("refine", "nested_refine", "", (43.5, 24.5, 8.5, 25.5, 27.0, 19.5, 13.0, 19.8)),
        ("refine", "nested_refine", "ntp", (43.5, 21.5, 8.5, 24.5, 26.5, 24.0, 13.0, 21.2)),
        ("refine", "nested_refine", "refine", (45.5, 25.5, 10.0, 27.0, 28.5, 25.5, 15.0, 23.0)),
    ),
    "deltanet": (
        (None, "", "", (11.0, 5.0, 2.0, 6.0, 10.0, 3.0, 2.5, 5.2)),
        ("ntp", "", "", (9.0, 6.0, 3.0, 6.0, 9.0, 8.0, 4.5, 7.2)),
        ("refine", "", "", (10.0, 6.5, 4.0, 6.8, 12.0, 9.5, 5.5, 9.0)),
        ("refine", "sft", "", (11.0, 7.0, 5.0, 7.7, 14.0, 11.0, 6.5, 10.5)),
        ("refine", "nested_sft", "", (12.0, 8.0, 5.0, 8.3, 16.5, 10.0, 7.5, 11.3)),
        ("refine", "nested_refine", "", (14.0, 10.5, 6.5, 10.3, 15.0, 11.0, 8.5, 11.5)),
        ("refine", "nested_refine", "ntp", (16.5, 10.5, 6.5, 11.2, 16.0, 10.5, 6.5, 11.0)),
        ("refine", "nested_refine", "refine", (17.5, 12.5, 7.0, 12.3, 18.0, 13.5, 8.0, 13.2)),
    ),
}
LABELS = {
    None: "-",
    "": "-",
    "ntp": "SFT",
    "sft": "SFT",
    "refine": "ReFINE",
    "nested_sft": "nested SFT",
    "nested_refine": "nested ReFINE",
}


def describe(paper: plan.Paper) -> plan.Table:
    """Values of all rows."""
    tasks = {"squadqa": TASKS["squadqa"]} if paper.small else TASKS
    values = []
    for model in paper.models:
        for midtrain, posttrain, ttt, numbers in ROWS[model]:
            phases = ", ".join(LABELS[phase] for phase in (midtrain, posttrain, ttt))
            published = iter(numbers)
            for task, column in tasks.items():
                sources = {}
                for length in paper.lengths:
                    start = paper.midtrain(model, midtrain)
                    if posttrain:
                        start = paper.posttrain(model, posttrain, task, length)
                    run = paper.ruler_qa(model, start, task, length, ttt)
                    sources[length] = plan.set_score(run, f"ruler_{task}", length)
                row = f"{plan.TITLES[model]}: {phases}"
                values += plan.by_length(row, column, sources, published)
    title = "Table 4: RULER's question answering, per cent (rows: MidTr, PostTr, TTT)"
    return plan.Table(title, tuple(values))


if __name__ == "__main__":
    sys.exit(main(describe, "table_4", __doc__))
