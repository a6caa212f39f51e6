"""Nested ReFINE post-training of LaCT-760M with the paper's numbers (arXiv 2602.16704).

    python -m refine_jax.main --config=configs/posttrain_lact_760m.py \
        --workdir=runs/lact-760m-squadqa --config.model.checkpoint=runs/lact-760m \
        --config.data.source=data/ruler/ruler_squadqa_lact_16384_1600_train.parquet

from the mid-trained model of `midtrain_lact_760m.py` and a file of prompts and answers: 1,600
of them are 25 steps of 64, one pass, as in the official code. The rows that the paper's Table 4
compares are forms, as is GRPO on sampled answers, which the official code offers:

    posttrain_lact_760m.py              nested ReFINE
    posttrain_lact_760m.py:nested_sft   next-token loss on the prompts, then SFT
    posttrain_lact_760m.py:sft          SFT on the answers alone
    posttrain_lact_760m.py:grpo         GRPO, the score of sampled answers as reward

The paper reports, for nested ReFINE followed by ReFINE at test time, at 4K, 8K and 16K tokens, with
the untouched model in brackets: SQuADQA 45.5/25.5/10.0 (17.5/14.0/6.5), HotpotQA 28.5/25.5/15.0
(20.5/14.5/12.0). We have not run this size ourselves.

`posttrain_lact_760m.py:runlocal` (or `:sft,runlocal` and so on) runs the same code small, on a
CPU, from random weights, on made-up questions about lists of facts. With `:grpo` nothing moves
there: no answer of a random model scores, so all advantages are 0. It needs a model that answers
sometimes, such as the result of `:sft`.
"""

from ml_collections import ConfigDict

from refine_jax.architectures import LACT_760M
from refine_jax.recipes import posttrain


def get_config(arg: str | None = None) -> ConfigDict:
    """The paper's configuration; `arg` names forms, joined by commas."""
    return posttrain(
        "posttrain_lact_760m.py",
        arg,
        LACT_760M,
        "data/ruler/ruler_squadqa_lact_16384_1600_train.parquet",
        num_hidden_layers=2,
        num_attn_heads=4,
        num_lact_heads=2,
        lact_chunk_size=64,
        window_size=64,
        w0_w2_low_rank=8,
    )
