"""ReFINE and next-token training side by side, from a small trained model, on a laptop CPU.

    python -m refine_jax.main --config=configs/demo.py --workdir=runs/demo

A DeltaNet of 145,000 parameters, which comes with the package (`refine_jax.small`), has learnt to
recall made-up facts, as many as its state holds. The demo asks it for facts, trains it further on
next tokens and with ReFINE, on the same documents, asks both, and at last trains a model on each of
some prompts before it answers them. runs/demo/report.html shows all of it. Forms, joined by commas:

    demo.py:short      a few steps, for CI
    demo.py:scratch    mid-training from random weights, on the source files of the installed
                       Python, with the tokenizer of the published models: every part at work, no
                       useful model; a LaCT of 8.7 M parameters, with `scratch,deltanet` a DeltaNet

What to expect: see README.md.
"""

from ml_collections import ConfigDict

from refine_jax.config import defaults
from refine_jax.presets import PRESETS
from refine_jax.small import folder

FORMS = ("deltanet", "scratch", "short")
LACT = {
    "model_type": "lact_swiglu",
    "vocab_size": 32000,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attn_heads": 4,
    "num_lact_heads": 2,
    "intermediate_size": 384,
    "lact_chunk_size": 128,
    "window_size": 128,
    "w0_w2_low_rank": 16,
    "rope_theta": 10000.0,
}
DELTANET = {
    "model_type": "delta_net",
    "vocab_size": 32000,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "intermediate_size": 384,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The demo; `arg` names forms, joined by commas."""
    forms = set(arg.split(",")) if arg else set()
    if unknown := forms - set(FORMS):
        raise ValueError(f"demo.py has the forms {', '.join(FORMS)}. Got: {sorted(unknown)}.")
    if "scratch" in forms:
        return _scratch(DELTANET if "deltanet" in forms else LACT, short="short" in forms)
    config = defaults()
    config.phase = "compare"
    config.model.checkpoint = folder("deltanet")
    config.data.update(source="recall", tokenizer="checkpoint", sequence_length=256)
    config.data.update(chunking="first", limit_documents=4000, holdout=0.02)
    # Rollouts as long as a number, and compared with others from the same position.
    config.refine.update({**PRESETS["low_noise"], "rollout_length": 4, "lambda_rl": 1.0})
    config.optimizer.update(learning_rate=1e-3, schedule="linear", clip_norm=1.0)
    config.train.update(steps=100, batch_size=8, eval_every=25, eval_batches=4)
    config.train.update(checkpoint_every=0, log_every=25)
    config.evaluate.update(tasks="recall", lengths="128", samples=512, batch_size=128)
    config.compare.adapted = 16
    config.testtime.steps = 4
    if "short" in forms:
        config.data.limit_documents = 200
        config.train.update(steps=4, batch_size=4, eval_every=2, eval_batches=1, log_every=2)
        config.evaluate.samples = 16
        config.compare.adapted = 2
        config.testtime.steps = 1
    return config


def _scratch(model: dict, *, short: bool) -> ConfigDict:
    """Mid-training from random weights."""
    config = defaults()
    config.model.fresh = dict(model)
    config.data.update(
        source="stdlib",
        tokenizer="mistral-v1",
        sequence_length=512,
        min_remainder=512,
        holdout=0.02,
    )
    config.refine.update(num_positions=8, rollout_length=5)
    config.optimizer.update(
        learning_rate=2e-3, schedule="cosine", final_fraction=0.1, warmup_steps=5, clip_norm=1.0
    )
    config.train.update(
        steps=60,
        warmup_ntp_steps=30,
        batch_size=4,
        eval_every=15,
        eval_batches=3,
        checkpoint_every=30,
        log_every=10,
    )
    if short:
        config.data.limit_documents = 150
        config.optimizer.warmup_steps = 2
        config.train.update(
            steps=12, warmup_ntp_steps=6, eval_every=6, eval_batches=1, checkpoint_every=6
        )
        config.train.log_every = 2
    return config
