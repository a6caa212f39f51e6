"""The paper's training runs (ReFINE, arXiv 2602.16704), of any architecture: for configs/.

Each takes the name of the configuration file and its form, `model.fresh`, and the fields of that
which make the model small for the form `runlocal`. What is not set here, such as the tokenizer and
the optimizer, has its default, which is the paper's.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from refine_jax.config import defaults

POSTTRAIN_FORMS = ("nested_refine", "nested_sft", "sft", "grpo", "runlocal")


def midtrain(name: str, form: str | None, fresh: Mapping[str, Any], **small: Any) -> ConfigDict:
    """Configure mid-training on 96 * 128 sequences of 16,384 tokens. form: None or "runlocal"."""
    if form not in (None, "runlocal"):
        raise ValueError(f"{name} has the form runlocal. Got: {form!r}.")
    config = _start(fresh)
    config.data.update(source="data/long-documents", chunking="first", holdout=0.01)
    config.refine.reward = "cosine"
    config.train.update(steps=96, batch_size=128, mini_batch_size=32)
    config.train.update(eval_every=24, eval_batches=32, checkpoint_every=8)
    if form == "runlocal":
        config.model.fresh.update(hidden_size=128, intermediate_size=256, **small)
        config.data.update(source="stdlib", sequence_length=512, limit_documents=150, holdout=0.05)
        config.train.update(steps=10, batch_size=8, mini_batch_size=4, micro_batch_size=2)
        config.train.update(eval_every=0, eval_batches=4, checkpoint_every=5)
        config.optimizer.learning_rate = 1e-3
    return config


def posttrain(
    name: str, form: str | None, fresh: Mapping[str, Any], source: str, **small: Any
) -> ConfigDict:
    """Configure post-training on 25 * 64 prompts of `source`. form: of `POSTTRAIN_FORMS`, joined by
    commas.
    """
    forms = set(form.split(",")) if form else set()
    if unknown := forms - set(POSTTRAIN_FORMS):
        known = ", ".join(POSTTRAIN_FORMS)
        raise ValueError(f"{name} has the forms {known}. Got: {sorted(unknown)}.")
    if len(variants := sorted(forms - {"runlocal"})) > 1:
        raise ValueError(f"{name} takes one form beside runlocal. Got: {variants}.")
    config = _start(fresh)
    config.phase = "posttrain"
    config.data.update(source=source, holdout=0.05)
    config.posttrain.nested = not forms & {"sft", "grpo"}
    config.posttrain.answers = "grpo" if "grpo" in forms else "sft"
    config.refine.update(objective="ntp" if "nested_sft" in forms else "refine", reward="hybrid")
    config.train.update(steps=25, batch_size=64, mini_batch_size=16)
    config.train.update(eval_every=5, eval_batches=80, checkpoint_every=5)
    if "runlocal" in forms:
        config.model.fresh.update(hidden_size=64, intermediate_size=128, **small)
        config.model.remat = "none"
        config.data.update(source="recall", sequence_length=256, limit_documents=500)
        config.prompts.max_answer_tokens = 16
        config.posttrain.samples = 4
        config.train.update(steps=10, batch_size=8, mini_batch_size=4, micro_batch_size=4)
        config.train.update(eval_every=5, eval_batches=4, checkpoint_every=5)
        config.optimizer.learning_rate = 1e-3
    return config


def _start(fresh: Mapping[str, Any]) -> ConfigDict:
    """State what both phases have in common."""
    config = defaults()
    config.model.update(fresh=dict(fresh), remat="full")
    config.refine.update(num_positions=8, rollout_length=5, lambda_sft=1.0, lambda_rl=0.2)
    config.train.update(micro_batch_size=1, log_every=1)
    return config
