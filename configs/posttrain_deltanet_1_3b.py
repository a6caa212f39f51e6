"""Nested ReFINE post-training of DeltaNet-1.3B with the paper's numbers (arXiv 2602.16704).

    python -m refine_jax.main --config=configs/posttrain_deltanet_1_3b.py \
        --workdir=runs/deltanet-1.3b-squadqa --config.model.checkpoint=runs/deltanet-1.3b \
        --config.data.source=data/ruler/ruler_squadqa_delta_net_16384_1600_train.parquet

from the mid-trained model of `midtrain_deltanet_1_3b.py` and a file of prompts and answers: 1,600
of them are 25 steps of 64, one pass, as in the official code. The rows that the paper's Table 4
compares are forms, as is GRPO on sampled answers, which the official code offers:

    posttrain_deltanet_1_3b.py              nested ReFINE
    posttrain_deltanet_1_3b.py:nested_sft   next-token loss on the prompts, then SFT
    posttrain_deltanet_1_3b.py:sft          SFT on the answers alone
    posttrain_deltanet_1_3b.py:grpo         GRPO, the score of sampled answers as reward

The paper reports, for nested ReFINE followed by ReFINE at test time, at 4K, 8K and 16K tokens, with
the untouched model in brackets: SQuADQA 17.5/12.5/7.0 (11.0/5.0/2.0), HotpotQA 18.0/13.5/8.0
(10.0/3.0/2.5). We have not run this size ourselves.

`posttrain_deltanet_1_3b.py:runlocal` (or `:sft,runlocal` and so on) runs the same code small, on a
CPU, from random weights, on made-up questions about lists of facts. With `:grpo` nothing moves
there: no answer of a random model scores, so all advantages are 0. It needs a model that answers
sometimes, such as the result of `:sft`.
"""

from ml_collections import ConfigDict

from refine_jax.architectures import DELTANET_1_3B
from refine_jax.recipes import posttrain


def get_config(arg: str | None = None) -> ConfigDict:
    """The paper's configuration; `arg` names forms, joined by commas."""
    return posttrain(
        "posttrain_deltanet_1_3b.py",
        arg,
        DELTANET_1_3B,
        "data/ruler/ruler_squadqa_delta_net_16384_1600_train.parquet",
        num_hidden_layers=2,
        num_heads=2,
    )
