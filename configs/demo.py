"""ReFINE mid-training in miniature: random weights, the Python standard library, a laptop CPU.

    python -m refine_jax.main --config=configs/demo.py --workdir=runs/demo

A LaCT model learns next-token prediction on the source files of the installed Python (tokenised
with the tokenizer of the published models), then goes on with ReFINE. Forms, joined by commas:

    demo.py:short      a minute, for a first look and for CI
    demo.py:deltanet   DeltaNet instead of LaCT

What to expect: see README.md.
"""

from ml_collections import ConfigDict

from refine_jax.config import defaults

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
    if unknown := forms - {"short", "deltanet"}:
        raise ValueError(f"demo.py has the forms short and deltanet. Got: {sorted(unknown)}.")
    config = defaults()
    config.model.fresh = dict(DELTANET if "deltanet" in forms else LACT)

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
    if "short" in forms:
        config.data.limit_documents = 150
        config.optimizer.warmup_steps = 2
        config.train.update(
            steps=12, warmup_ntp_steps=6, eval_every=6, eval_batches=1, checkpoint_every=6
        )
        config.train.log_every = 2
    return config
