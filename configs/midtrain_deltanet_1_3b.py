"""ReFINE mid-training of DeltaNet-1.3B with the paper's numbers (arXiv 2602.16704): 16K tokens.

    python -m refine_jax.convert from_hf DELTANET_1_3B_HF_FOLDER checkpoints/deltanet-1.3b
    python -m refine_jax.main --config=configs/midtrain_deltanet_1_3b.py \
        --workdir=runs/deltanet-1.3b --config.model.checkpoint=checkpoints/deltanet-1.3b \
        --config.data.source=CORPUS

CORPUS: parquet, jsonl or text documents; those of at least 16,384 tokens are used. 96 steps of 128
sequences are 200M tokens, the paper's budget.

The paper reports after mid-training, against the untouched model, at 16K tokens: MK-NIAH 8.8 %
(3.4 %), MV-NIAH 4.0 % (2.0 %), HotpotQA 5.5 % (2.5 %), and a LongBench mean of 17.0 (14.2). We have
not run this size ourselves.

A checkpoint's own config.json replaces the `fresh` fields, which start the same architecture from
random weights. `midtrain_deltanet_1_3b.py:runlocal` runs the same code small, on a CPU, from random
weights and the source files of the Python standard library.
"""

from ml_collections import ConfigDict

from refine_jax.architectures import DELTANET_1_3B
from refine_jax.config import defaults


def get_config(arg: str | None = None) -> ConfigDict:
    """The paper's configuration; `arg` is None or "runlocal"."""
    if arg not in (None, "runlocal"):
        raise ValueError(f"midtrain_deltanet_1_3b.py has the form runlocal. Got: {arg!r}.")
    config = defaults()
    config.model.fresh = dict(DELTANET_1_3B)
    config.model.remat = "full"
    config.data.update(
        source="data/long-documents",
        tokenizer="mistral-v1",
        sequence_length=16384,
        chunking="first",
        holdout=0.01,
    )
    config.refine.update(
        reward="cosine", num_positions=8, rollout_length=5, lambda_sft=1.0, lambda_rl=0.2
    )
    config.optimizer.update(
        learning_rate=1e-6, schedule="constant", weight_decay=0.01, clip_norm=0.2
    )
    config.train.update(
        steps=96,
        batch_size=128,
        mini_batch_size=32,
        micro_batch_size=1,
        eval_every=24,
        eval_batches=32,
        checkpoint_every=8,
        log_every=1,
    )
    if arg == "runlocal":
        config.model.fresh.update(
            hidden_size=128, num_hidden_layers=2, num_heads=2, intermediate_size=256
        )
        config.data.update(source="stdlib", sequence_length=512, limit_documents=150, holdout=0.05)
        config.optimizer.learning_rate = 1e-3
        config.train.update(steps=10, batch_size=8, mini_batch_size=4, micro_batch_size=2)
        config.train.update(eval_every=0, eval_batches=4, checkpoint_every=5)
    return config
