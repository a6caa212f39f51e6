"""ReFINE mid-training of Qwen 3.5 (0.8B to 27B) at 16K tokens, with the paper's numbers.

    python -m refine_jax.convert from_hf QWEN3_5_0_8B_HF_FOLDER checkpoints/qwen3.5-0.8b
    python -m refine_jax.main --config=configs/midtrain_qwen3_5.py:0.8b \
        --workdir=runs/qwen3.5-0.8b --config.model.checkpoint=checkpoints/qwen3.5-0.8b \
        --config.data.source=CORPUS

The sizes are `0.8b`, `2b`, `4b`, `9b` and `27b`. CORPUS: parquet, jsonl or text documents; those of
at least 16,384 tokens are used. 96 steps of 128 sequences are 200M tokens, the paper's budget
(arXiv 2602.16704). To know which slice a size fits on, and how long a step takes there, before
renting it:

    python -m refine_jax.main --config=configs/midtrain_qwen3_5.py:0.8b --compile_only --plan \
        --topology=v5e:2x2

By this estimate (jax 0.10.2) an update of 0.8B takes 11.2 GiB of the 15.75 GiB of a chip there, and
one of 2B 22.1 of the 31.25 GiB of a chip of a v6e:2x2 (docs/fit.md). Larger sizes share heads and
vocabulary, too (config.mesh.tensor).

The paper trains no hybrid model: it reports nothing to expect here, and we have not run these sizes
ourselves. Look at the loss by position and at RULER before and after a run (docs/evaluation.md).

The tokenizer is the checkpoint's, which has no begin-of-sequence token. Its vision tower and
multi-token head are kept and written back, not trained. A checkpoint's own config.json replaces the
`fresh` fields, which start the same text model from random weights. `midtrain_qwen3_5.py:runlocal`,
or `:9b,runlocal` for the proportions of another size, runs the same code small, on a CPU, from
random weights and the source files of the Python standard library.
"""

from ml_collections import ConfigDict

from refine_jax.architectures import QWEN3_5
from refine_jax.recipes import midtrain, small_qwen3_5, split_size, with_own_tokenizer

FILE = "midtrain_qwen3_5.py"


def get_config(arg: str | None = None) -> ConfigDict:
    """Configure a size of `QWEN3_5`; `arg` is one (None: 0.8b), "runlocal", or both."""
    size, form, local = split_size(FILE, arg, QWEN3_5)
    config = midtrain(FILE, form, QWEN3_5[size], **small_qwen3_5(size))
    return with_own_tokenizer(config, local)
