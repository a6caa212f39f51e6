"""Test-time training of Qwen 3.5 with ReFINE on RULER's question answering (arXiv 2602.16704).

    python -m refine_jax.main --config=configs/testtime_qwen3_5.py:0.8b \
        --workdir=runs/ttt-qwen3.5-0.8b --config.model.checkpoint=checkpoints/qwen3.5-0.8b \
        --config.evaluate.data=dev-v2.0.json

The settings are those of `testtime_ruler_qa.py`: each prompt is trained on (binary reward,
lambda_rl 0.4) by a copy of its own before it is answered. The data is SQuAD's file, or HotpotQA's
with --config.evaluate.tasks=ruler_hotpotqa.

The sizes are `0.8b`, `2b`, `4b`, `9b` and `27b`; the forms `official` and `ntp` of
`testtime_ruler_qa.py` come behind them, as in `testtime_qwen3_5.py:2b,ntp`. A copy is parameters
and two moments in float32: 8.4 GiB for 0.8B (`--compile_only` gives it for each size).

The paper trains no hybrid model: it reports nothing to expect here, and we have not run these sizes
ourselves. `testtime_qwen3_5.py:runlocal` runs the same code small, on a CPU: a random model, and
needles in prompts of 200 tokens, which need no data. Recall is 0.
"""

from ml_collections import ConfigDict

from refine_jax.architectures import QWEN3_5
from refine_jax.recipes import (
    TESTTIME_FORMS,
    small_qwen3_5,
    split_size,
    testtime,
    with_own_tokenizer,
)

FILE = "testtime_qwen3_5.py"


def get_config(arg: str | None = None) -> ConfigDict:
    """Configure a size of `QWEN3_5`; `arg` is one (None: 0.8b), forms, or both, with commas."""
    size, form, local = split_size(FILE, arg, QWEN3_5, TESTTIME_FORMS)
    return with_own_tokenizer(testtime(FILE, form, QWEN3_5[size], small_qwen3_5(size)), local)
