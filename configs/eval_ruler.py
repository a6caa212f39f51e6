"""RULER's needles (arXiv 2404.06654) at 4K, 8K and 16K tokens: Table 3 of ReFINE (2602.16704).

    python -m refine_jax.main --config=configs/eval_ruler.py --workdir=runs/eval-ruler \
        --config.model.checkpoint=checkpoints/lact-760m --config.evaluate.essays=ESSAYS

The checkpoint: a folder made by refine_jax.convert, or the folder of a run. ESSAYS: text files
(RULER takes Paul Graham's essays, which are not ours to pass on), for all tasks but niah_single_1
and niah_multikey_2 and 3. 500 samples of each task and length, as in the paper.

What the paper reports, recall in per cent at 4K / 8K / 16K (the 95 % interval is about +-4 points):

                      single          multi-key       multi-query     multi-value
    LaCT-760M         98.8 91.2 95.8  70.2 44.8 24.2  39.2 24.9 17.4  40.6 27.0 17.7
    + ReFINE          99.0 93.0 96.8  70.4 46.0 26.6  40.5 25.8 18.0  41.2 29.5 18.6
    DeltaNet-1.3B     100  100  100   23.6 17.8  3.4  27.7  3.9  1.8  23.9  5.4  2.0
    + ReFINE          100  100  99.8  25.0 21.4  8.8  37.3 18.8  3.6  29.0 20.4  4.0

"+ ReFINE" is after mid-training with it. The paper does not say which of RULER's three single and
multi-key tasks it takes; here are all eight. Its samples are others than ours, which depend on
nothing but the seed. We have not run these sizes. Making the 12,000 prompts takes about half an
hour of a CPU core before the first one is answered, most of it for those of essays.

`eval_ruler.py:runlocal` evaluates a small random model, or that of configs/demo.py:scratch with
--config.model.checkpoint=runs/scratch, on a CPU in a minute: recall is 0 there.
"""

from ml_collections import ConfigDict

from refine_jax.architectures import TINY_DELTANET
from refine_jax.recipes import evaluate


def get_config(arg: str | None = None) -> ConfigDict:
    """The paper's evaluation; `arg` is None or "runlocal"."""
    config = evaluate("eval_ruler.py", arg, None, TINY_DELTANET)
    if config.model.fresh is None:
        config.model.checkpoint = "checkpoints/lact-760m"
    return config
