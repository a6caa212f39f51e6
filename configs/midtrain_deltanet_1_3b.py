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
from refine_jax.recipes import midtrain


def get_config(arg: str | None = None) -> ConfigDict:
    """The paper's configuration; `arg` is None or "runlocal"."""
    return midtrain(
        "midtrain_deltanet_1_3b.py", arg, DELTANET_1_3B, num_hidden_layers=2, num_heads=2
    )
