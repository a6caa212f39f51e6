"""LongBench, the English tasks (arXiv 2308.14508), as ReFINE (arXiv 2602.16704) evaluates them.

    python -m refine_jax.main --config=configs/eval_longbench.py --workdir=runs/eval-longbench \
        --config.model.checkpoint=checkpoints/lact-760m --config.evaluate.data=DATA

DATA: a folder with LongBench's own jsonl files, or parquet files with `prompt`, `answers`,
`max_gen_tokens` and `task`. The paper takes the rows whose prompts have at most 16,384 tokens;
here, longer ones are cut in the middle, as LongBench does it.

What the paper reports, means of 12 tasks: LaCT-760M 13.1, with SFT mid-training 13.5, with ReFINE
mid-training 16.9, and with test-time training by next-token loss 17.0, by ReFINE 18.0;
DeltaNet-1.3B 14.2, 15.7, 17.0, 16.5, 17.9. Two faults of the official code are not ours: it cuts
prompts on the right, where the question stands, and every answer after 32 tokens. gov_report and
musique, English tasks that the paper leaves out, can be added to --config.evaluate.tasks.

For test-time training: --config.phase=testtime, and the settings of configs/testtime_ruler_qa.py.

`eval_longbench.py:runlocal` takes 2 rows a task, at most 512 tokens of each and 8 new tokens, and a
small random model: a minute on a CPU once DATA is there.
"""

from ml_collections import ConfigDict

from refine_jax.architectures import TINY_DELTANET
from refine_jax.config import defaults

TASKS = (
    "narrativeqa,qasper,multifieldqa_en,hotpotqa,2wikimqa,qmsum,multi_news,samsum,trec,triviaqa,"
    "lcc,repobench-p"
)


def get_config(arg: str | None = None) -> ConfigDict:
    """The paper's evaluation; `arg` is None or "runlocal"."""
    if arg not in (None, "runlocal"):
        raise ValueError(f"eval_longbench.py has the form runlocal. Got: {arg!r}.")
    config = defaults()
    config.phase = "evaluate"
    config.model.checkpoint = "checkpoints/lact-760m"
    config.data.tokenizer = "mistral-v1"
    config.evaluate.update(
        tasks=TASKS, lengths="", data="data/longbench", max_tokens=16896, batch_size=8
    )
    if arg == "runlocal":
        config.model.checkpoint = None
        config.model.fresh = dict(TINY_DELTANET)
        config.generation.max_new_tokens = 8
        config.evaluate.update(samples=2, max_tokens=512)
    return config
