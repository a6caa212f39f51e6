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
from refine_jax.config import defaults


def get_config(arg: str | None = None) -> ConfigDict:
    """The paper's test-time training with a reset for each prompt; `arg` names forms."""
    forms = set(arg.split(",")) if arg else set()
    if unknown := forms - {"official", "ntp", "runlocal"}:
        raise ValueError(
            "testtime_ruler_qa.py has the forms official, ntp and runlocal. "
            f"Got: {sorted(unknown)}."
        )
    config = defaults()
    config.phase = "testtime"
    config.model.checkpoint = "checkpoints/lact-760m"
    config.model.remat = "full"
    config.data.tokenizer = "mistral-v1"
    config.refine.update(
        reward="binary", num_positions=8, rollout_length=5, lambda_sft=1.0, lambda_rl=0.4
    )
    config.optimizer.update(
        learning_rate=1e-6, schedule="constant", weight_decay=0.01, clip_norm=0.2
    )
    config.testtime.update(reset="example", steps=1, copies=1)
    config.evaluate.update(
        tasks="ruler_squadqa", lengths="4096,8192,16384", samples=200, ruler_qa="refine"
    )
    if "official" in forms:
        config.testtime.update(reset="never", batch_size=8, mini_batch_size=4, micro_batch_size=1)
    if "ntp" in forms:
        config.refine.objective = "ntp"
    if "runlocal" in forms:
        config.model.checkpoint = None
        config.model.remat = "none"
        config.model.fresh = dict(TINY_DELTANET)
        config.optimizer.learning_rate = 1e-3
        config.testtime.steps = 2
        config.generation.max_new_tokens = 8
        config.evaluate.update(tasks="niah_single_1", lengths="320", samples=8)
    return config
