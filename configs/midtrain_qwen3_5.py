"""ReFINE mid-training of Qwen 3.5 (0.8B, 2B, 4B or 9B) at 16K tokens, with the paper's numbers.

    python -m refine_jax.convert from_hf QWEN3_5_0_8B_HF_FOLDER checkpoints/qwen3.5-0.8b
    python -m refine_jax.main --config=configs/midtrain_qwen3_5.py:0.8b \
        --workdir=runs/qwen3.5-0.8b --config.model.checkpoint=checkpoints/qwen3.5-0.8b \
        --config.data.source=CORPUS

The sizes are `0.8b`, `2b`, `4b` and `9b`. CORPUS: parquet, jsonl or text documents; those of at
least 16,384 tokens are used. 96 steps of 128 sequences are 200M tokens, the paper's budget
(arXiv 2602.16704). To know which slice a size fits on, and how long a step takes there, before
renting it:

    python -m refine_jax.main --config=configs/midtrain_qwen3_5.py:0.8b --compile_only --plan \
        --topology=v5e:4x4

By this estimate (jax 0.10.2) an update of 0.8B takes 13.7 GiB of the 15.75 GiB of a chip there. One
of 4B would take 32.5 GiB: it needs larger chips, or more of them that share a row.

The paper trains no hybrid model: it reports nothing to expect here, and we have not run these sizes
ourselves. Look at the loss by position and at RULER before and after a run (docs/evaluation.md).

The tokenizer is the checkpoint's, which has no begin-of-sequence token. Its vision tower and
multi-token head are kept and written back, not trained. A checkpoint's own config.json replaces the
`fresh` fields, which start the same text model from random weights. `midtrain_qwen3_5.py:runlocal`,
or `:9b,runlocal` for the proportions of another size, runs the same code small, on a CPU, from
random weights and the source files of the Python standard library.
"""

from ml_collections import ConfigDict

from refine_jax.architectures import QWEN3_5_0_8B, QWEN3_5_2B, QWEN3_5_4B, QWEN3_5_9B
from refine_jax.recipes import midtrain

SIZES = {"0.8b": QWEN3_5_0_8B, "2b": QWEN3_5_2B, "4b": QWEN3_5_4B, "9b": QWEN3_5_9B}


def get_config(arg: str | None = None) -> ConfigDict:
    """Configure a size of `SIZES`; `arg` is one (None: 0.8b), "runlocal", or both with a comma."""
    forms = ["0.8b"] if arg is None else arg.split(",")
    local = forms[-1] == "runlocal"
    sizes = (forms[:-1] or ["0.8b"]) if local else forms
    if len(sizes) != 1 or sizes[0] not in SIZES:
        raise ValueError(
            f"midtrain_qwen3_5.py has the sizes {', '.join(SIZES)}, and runlocal alone or after "
            f"one (9b,runlocal). Got: {arg!r}."
        )
    fresh = SIZES[sizes[0]]
    config = midtrain(
        "midtrain_qwen3_5.py",
        "runlocal" if local else None,
        fresh,
        vocab_size=32000,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2 * fresh["linear_num_value_heads"] // fresh["linear_num_key_heads"],
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        eos_token_id=2,
    )
    if not local:
        config.data.update(tokenizer="checkpoint", add_bos=False)
    return config
