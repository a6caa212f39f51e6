"""ReFINE mid-training of LaCT-760M with the paper's numbers (arXiv 2602.16704): 16K tokens.

    python -m refine_jax.convert from_hf LACT_760M_HF_FOLDER checkpoints/lact-760m
    python -m refine_jax.main --config=configs/midtrain_lact_760m.py --workdir=runs/lact-760m \
        --config.model.checkpoint=checkpoints/lact-760m --config.data.source=CORPUS

CORPUS: parquet, jsonl or text documents; those of at least 16,384 tokens are used. 96 steps of 128
sequences are 200M tokens, the paper's budget (about 24 hours on eight L40 with the official code).

The paper reports after mid-training, against the untouched model, at 16K tokens: MK-NIAH 26.6 %
(24.2 %), MV-NIAH 18.6 % (17.7 %), HotpotQA 12.5 % (12.0 %), and a LongBench mean of 16.9 (13.1). We
have not run this size ourselves.

A checkpoint's own config.json replaces the `fresh` fields, which start the architecture of LaCT's
published 760M configuration (lact_llm/configs/760M_lact_swiglu_nh4_fwlow_rank_momentum.json, with
momentum and without Muon) from random weights. `midtrain_lact_760m.py:runlocal` runs the same code
small, on a CPU, from random weights and the source files of the Python standard library.
"""

from ml_collections import ConfigDict

from refine_jax.architectures import LACT_760M
from refine_jax.config import defaults


def get_config(arg: str | None = None) -> ConfigDict:
    """The paper's configuration; `arg` is None or "runlocal"."""
    if arg not in (None, "runlocal"):
        raise ValueError(f"midtrain_lact_760m.py has the form runlocal. Got: {arg!r}.")
    config = defaults()
    config.model.fresh = dict(LACT_760M)
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
            hidden_size=128, num_hidden_layers=2, num_attn_heads=4, w0_w2_low_rank=8
        )
        config.model.fresh.update(intermediate_size=256, lact_chunk_size=128, window_size=128)
        config.data.update(source="stdlib", sequence_length=512, limit_documents=150, holdout=0.05)
        config.optimizer.learning_rate = 1e-3
        config.train.update(steps=10, batch_size=8, mini_batch_size=4, micro_batch_size=2)
        config.train.update(eval_every=0, eval_batches=4, checkpoint_every=5)
    return config
