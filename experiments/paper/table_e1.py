"""Table E.1 of the paper: tasks of short context after mid-training, by lm-evaluation-harness.

    pip install -e '.[eval]'
    python experiments/paper/table_e1.py --documents=CORPUS \
        --lact=checkpoints/lact-760m --deltanet=checkpoints/deltanet-1.3b
    python experiments/paper/table_e1.py --small

lm-eval loads the data of its tasks from the Hugging Face hub (HF_HUB_OFFLINE=1: from its cache);
the small form has tasks of the same names with made-up questions. CORPUS: see table_3.py.

The paper gives the metrics, not the tasks' full names in lm-eval. LAMBADA is taken to be
lambada_openai, Wikitext's perplexity that of words. The mean is that of the last six columns, as
the paper's numbers say.
"""

import sys

import plan
from produce import main

# Column: task and metric in lm-eval, metric in the small form, factor.
COLUMNS = {
    "Wiki ppl": ("wikitext", "word_perplexity,none", "", 1.0),
    "LMB ppl": ("lambada_openai", "perplexity,none", "", 1.0),
    "FDA": ("fda", "contains,none", "exact_match,none", 100.0),
    "SWDE": ("swde", "contains,none", "exact_match,none", 100.0),
    "LMB": ("lambada_openai", "acc,none", "", 100.0),
    "PIQA": ("piqa", "acc,none", "", 100.0),
    "HellaSwag": ("hellaswag", "acc_norm,none", "", 100.0),
    "WinoGrande": ("winogrande", "acc,none", "", 100.0),
    "ARC-e": ("arc_easy", "acc,none", "", 100.0),
    "ARC-c": ("arc_challenge", "acc_norm,none", "", 100.0),
}
AVERAGED = 6
PUBLISHED = {
    ("lact", ""): (20.8, 29.8, 36.7, 66.0, 32.4, 67.5, 41.5, 53.4, 48.4, 27.6, 45.1),
    ("lact", " + SFT MidTr"): (20.7, 28.9, 37.2, 66.2, 32.9, 67.4, 41.4, 52.5, 48.4, 27.1, 45.0),
    ("lact", " + ReFINE MidTr"): (
        *(20.8, 30.2, 36.1, 66.5, 32.3, 67.3, 41.4, 52.8, 48.8, 27.5, 45.0),
    ),
    ("deltanet", ""): (16.7, 14.7, 18.0, 54.4, 43.0, 70.8, 50.5, 53.7, 58.3, 25.9, 50.4),
    ("deltanet", " + SFT MidTr"): (
        *(16.8, 15.3, 17.7, 54.5, 42.7, 71.1, 50.1, 53.8, 58.4, 26.4, 50.4),
    ),
    ("deltanet", " + ReFINE MidTr"): (
        *(16.8, 15.6, 17.5, 54.5, 42.2, 71.1, 50.2, 53.6, 58.1, 26.2, 50.2),
    ),
}


def describe(paper: plan.Paper) -> plan.Table:
    """Values of all rows."""
    values = []
    for model in paper.models:
        for label, method in plan.METHODS.items():
            start = paper.midtrain(model, method)
            run = paper.lm_eval(model, start, [task for task, *_ in COLUMNS.values()])
            row, numbers = plan.TITLES[model] + label, PUBLISHED[model, label]
            sources = []
            for task, metric, small_metric, scale in COLUMNS.values():
                metric = (small_metric if paper.small else "") or metric
                sources.append(plan.Source(run, ("results", task, metric), scale))
            values += [
                plan.Value(row, column, (source,), number)
                for column, source, number in zip(COLUMNS, sources, numbers, strict=False)
            ]
            values.append(plan.Value(row, "mean", tuple(sources[-AVERAGED:]), numbers[-1]))
    return plan.Table("Table E.1: short contexts, per cent (ppl: perplexity)", tuple(values))


if __name__ == "__main__":
    sys.exit(main(describe, "table_e1", __doc__))
