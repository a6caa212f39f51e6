"""Test-time training: the model is adapted to prompts, then answers them; scored as `evaluate` is.

What it is trained with is in the sections `refine`, `optimizer` and `testtime`; when the trained
parameters come back is `testtime.reset` (`refine_jax.refine.adapt`).
"""

from pathlib import Path

import jax

from refine_jax.base.errors import ConfigError
from refine_jax.base.files import given_path
from refine_jax.config import Config
from refine_jax.parallel import use_mesh
from refine_jax.phases.evaluate import EvaluationParts, make_answerer, prepare, run_parts
from refine_jax.phases.setup import only_run_in
from refine_jax.refine.adapt import Adapter
from refine_jax.refine.optimizer import make_optimizer

# Apart from the streams of random numbers of the other phases, which share the seed.
_STREAM = 3


def make_adapter(parts: EvaluationParts) -> Adapter:
    """Make what adapts the model to prompts, as the configuration says."""
    config, options = parts.config, parts.config.testtime
    batches, updates = 1, 1
    if options.reset != "example":
        updates = options.batch_size // options.mini_batch_size
    if options.reset == "never":
        batches = -(-len(parts.questions) // options.batch_size)
    return Adapter(
        parts.model,
        parts.params,
        make_optimizer(config.optimizer, steps=options.steps * batches, updates_per_step=updates),
        config.refine,
        options,
        key=jax.random.fold_in(jax.random.key(config.train.seed), _STREAM),
        eos_id=parts.tokenizer.end_ids,
        pad_id=parts.tokenizer.pad_id,
        trainable=config.train.trainable,
    )


def run(config: Config, workdir: str | Path) -> dict:
    """Adapt, answer and report, or go on with it.

    Arguments, result and errors are those of `refine_jax.phases.evaluate.run`; the figures say what
    adaptation cost.
    """
    workdir = given_path(workdir, "workdir", write=True).absolute()
    if jax.process_count() > 1 and config.testtime.reset == "never":
        raise ConfigError(
            "config.testtime.reset='never' adapts to one batch after the other, which several "
            f"processes cannot share. Got: {jax.process_count()} processes. Use 'example' or "
            "'batch', or one process."
        )
    with only_run_in(workdir) as check, use_mesh(config.mesh, alone=True):
        parts = prepare(config, workdir)
        return run_parts(parts, workdir, make_answerer(parts, make_adapter(parts)), check)
