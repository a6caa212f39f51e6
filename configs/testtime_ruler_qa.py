"""Test-time training with ReFINE on RULER's question answering (arXiv 2602.16704, Table 4).

    python -m refine_jax.main --config=configs/testtime_ruler_qa.py --workdir=runs/ttt-squadqa \
        --config.model.checkpoint=CHECKPOINT --config.evaluate.data=dev-v2.0.json
    python -m refine_jax.main --config=configs/testtime_ruler_qa.py --workdir=runs/ttt-hotpotqa \
        --config.model.checkpoint=CHECKPOINT --config.evaluate.tasks=ruler_hotpotqa \
        --config.evaluate.data=hotpot_dev_distractor_v1.json

CHECKPOINT: a folder made by refine_jax.convert, or of a (post-)training run. Data: the files of
SQuAD and HotpotQA, from which sets of any length are built, or parquet files of such sets. Each
prompt is trained on (binary reward, lambda_rl 0.4) before it is answered.

What the paper reports, per cent of 200 answers at 4K / 8K / 16K (the 95 % interval is about +-6):

                                     SQuADQA         HotpotQA
    LaCT-760M                        17.5 14.0  6.5  20.5 14.5 12.0
    + ReFINE in all three phases     45.5 25.5 10.0  28.5 25.5 15.0
    DeltaNet-1.3B                    11.0  5.0  2.0  10.0  3.0  2.5
    + ReFINE in all three phases     17.5 12.5  7.0  18.0 13.5  8.0

Forms, joined by commas:

    official   the official code's way: batches of 8, an update every 4 prompts, and never a reset,
               so that a score depends on all prompts before it
    ntp        next-token loss alone (the paper's SFT test-time training)
    runlocal   a small random model on needles in prompts of 200 tokens, which need no data: a
               minute on a CPU; --config.model.checkpoint=runs/scratch is a trained one (of
               configs/demo.py:scratch). Recall is 0

By default each prompt adapts a copy of its own, of which config.testtime.copies are held at once:
a copy is parameters and two moments in float32, 9 GB for LaCT-760M. We have not run these sizes.
"""

from ml_collections import ConfigDict

from refine_jax.architectures import TINY_DELTANET
from refine_jax.recipes import testtime


def get_config(arg: str | None = None) -> ConfigDict:
    """The paper's test-time training with a reset for each prompt; `arg` names forms."""
    config = testtime("testtime_ruler_qa.py", arg, None, TINY_DELTANET)
    if config.model.fresh is None:
        config.model.checkpoint = "checkpoints/lact-760m"
    return config
