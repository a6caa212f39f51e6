"""RULER's needles (arXiv 2404.06654) at 4K to 64K tokens, answered by Qwen 3.5.

    python -m refine_jax.main --config=configs/eval_qwen3_5.py:0.8b \
        --workdir=runs/eval-qwen3.5-0.8b --config.model.checkpoint=checkpoints/qwen3.5-0.8b \
        --config.evaluate.essays=ESSAYS

The checkpoint: a folder made by refine_jax.convert, or the folder of a run; evaluate it before and
after training. ESSAYS: text files, as for `eval_ruler.py`. 100 samples of each of eight tasks and
four lengths: the 95 % interval is about +-10 points at most.

The sizes are `0.8b`, `2b`, `4b`, `9b` and `27b`. A checkpoint says itself which one it is: the size
counts where there is none, as for `--compile_only`.

Nobody reports these figures in this form, and we have not run these sizes ourselves.
`eval_qwen3_5.py:runlocal` evaluates a small random model on a CPU in a minute: recall is 0 there.
"""

from ml_collections import ConfigDict

from refine_jax.architectures import QWEN3_5
from refine_jax.recipes import evaluate, small_qwen3_5, split_size, with_own_tokenizer

FILE = "eval_qwen3_5.py"


def get_config(arg: str | None = None) -> ConfigDict:
    """Configure a size of `QWEN3_5`; `arg` is one (None: 0.8b), "runlocal", or both."""
    size, form, local = split_size(FILE, arg, QWEN3_5)
    config = evaluate(FILE, form, QWEN3_5[size], small_qwen3_5(size))
    if not local:
        config.evaluate.update(lengths="4096,16384,32768,65536", samples=100, batch_size=8)
    return with_own_tokenizer(config, local)
