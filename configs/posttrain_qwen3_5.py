"""Post-training of Qwen 3.5 (0.8B to 27B) on prompts or conversations, with the paper's numbers.

    python -m refine_jax.main --config=configs/posttrain_qwen3_5.py:0.8b \
        --workdir=runs/qwen3.5-0.8b-chat --config.model.checkpoint=checkpoints/qwen3.5-0.8b \
        --config.data.source=CONVERSATIONS

from a folder of refine_jax.convert, or of a run of `midtrain_qwen3_5.py`. CONVERSATIONS: jsonl or
parquet files with a column `messages` of role and content, which the checkpoint's chat template
renders; every answer of the assistant is trained on. For files with a prompt and an answer:
--config.prompts.messages_field='' (docs/training.md). Answers have at most 512 tokens in all.

The sizes are `0.8b`, `2b`, `4b`, `9b` and `27b`. The forms behind them are those of
`posttrain_lact_760m.py`: nested ReFINE by default, `nested_sft`, `sft` and `grpo`; the last takes
prompts and answers alone, as answers are scored:

    posttrain_qwen3_5.py:4b,sft

The paper trains no hybrid model: it reports nothing to expect here, and we have not run these sizes
ourselves. `posttrain_qwen3_5.py:runlocal` (or `:9b,sft,runlocal`) runs the same code small, on a
CPU, from random weights, on made-up questions about lists of facts.
"""

from ml_collections import ConfigDict

from refine_jax.architectures import QWEN3_5
from refine_jax.recipes import (
    POSTTRAIN_FORMS,
    posttrain,
    small_qwen3_5,
    split_size,
    with_own_tokenizer,
)

FILE = "posttrain_qwen3_5.py"


def get_config(arg: str | None = None) -> ConfigDict:
    """Configure a size of `QWEN3_5`; `arg` is one (None: 0.8b), forms, or both, with commas."""
    size, form, local = split_size(FILE, arg, QWEN3_5, POSTTRAIN_FORMS)
    config = posttrain(FILE, form, QWEN3_5[size], "data/conversations", **small_qwen3_5(size))
    if not local:
        config.prompts.max_answer_tokens = 512
        if config.posttrain.answers == "sft":
            config.prompts.messages_field = "messages"
    return with_own_tokenizer(config, local)
