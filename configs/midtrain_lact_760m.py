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
from refine_jax.recipes import midtrain


def get_config(arg: str | None = None) -> ConfigDict:
    """The paper's configuration; `arg` is None or "runlocal"."""
    return midtrain(
        "midtrain_lact_760m.py",
        arg,
        LACT_760M,
        num_hidden_layers=2,
        num_attn_heads=4,
        w0_w2_low_rank=8,
        lact_chunk_size=128,
        window_size=128,
    )
