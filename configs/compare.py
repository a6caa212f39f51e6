"""From a checkpoint to a table: next-token training, ReFINE and its exact form at 16K tokens.

    python -m refine_jax.main --config=configs/compare.py:deltanet-1.3b \
        --workdir=runs/deltanet-1.3b --config.model.checkpoint=checkpoints/deltanet-1.3b \
        --config.data.source=CORPUS --config.evaluate.essays=ESSAYS

trains the checkpoint three times on the same 12,288 rows (as configs/midtrain_deltanet_1_3b.py does
once) and asks it, before and after, for RULER's needles (as configs/eval_ruler.py does): a table of
recall with the paired difference of each arm from next-token training, and a page. The models:

    compare.py:deltanet-1.3b   DeltaNet-1.3B, one of the paper's
    compare.py:lact-760m       LaCT-760M, the other
    compare.py:qwen3.5-0.8b    the text model of Qwen3.5-0.8B, which the paper does not train
    compare.py:runlocal        the small DeltaNet that comes with the package, on a CPU

CORPUS and ESSAYS: see the two files named above. experiments/replicate.md says in which order to do
what, how long it takes by the estimates, and what each outcome would mean. We have run none of
these but `runlocal`.
"""

from ml_collections import ConfigDict

from refine_jax.architectures import DELTANET_1_3B, LACT_760M, QWEN3_5_0_8B
from refine_jax.config import defaults
from refine_jax.recipes import midtrain
from refine_jax.small import folder

MODELS = {"deltanet-1.3b": DELTANET_1_3B, "lact-760m": LACT_760M, "qwen3.5-0.8b": QWEN3_5_0_8B}
NEEDLES = "niah_single_1,niah_multikey_1,niah_multiquery,niah_multivalue"  # the paper's Table 3


def get_config(arg: str | None = None) -> ConfigDict:
    """The comparison; `arg` is a model of `MODELS`, or "runlocal"."""
    if arg == "runlocal":
        return _local()
    if arg not in MODELS:
        raise ValueError(f"compare.py has the forms {', '.join(MODELS)}, runlocal. Got: {arg!r}.")
    config = midtrain("compare.py", None, MODELS[arg])
    config.phase = "compare"
    if arg.startswith("qwen"):
        config.data.update(tokenizer="checkpoint", add_bos=False)
    config.train.update(eval_every=24, checkpoint_every=8, keep_checkpoints=1)
    config.evaluate.update(tasks=NEEDLES, lengths="4096,8192,16384", samples=500, batch_size=16)
    config.compare.arms = "ntp,paper,exact"
    return config


def _local() -> ConfigDict:
    config = defaults()
    config.phase = "compare"
    config.model.checkpoint = folder("deltanet")
    config.data.update(source="recall", tokenizer="checkpoint", sequence_length=128)
    config.data.update(chunking="first", limit_documents=100)
    config.optimizer.update(learning_rate=1e-3, clip_norm=1.0)
    config.train.update(steps=2, batch_size=4, eval_every=1, eval_batches=1, checkpoint_every=0)
    config.evaluate.update(tasks="recall", lengths="128", samples=16, batch_size=16)
    config.compare.arms = "ntp,paper,exact"
    return config
