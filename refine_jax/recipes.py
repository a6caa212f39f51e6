"""The paper's runs (ReFINE, arXiv 2602.16704), of any architecture: for configs/.

Each takes the name of the configuration file and its form, `model.fresh`, and the fields of that
which make the model small for the form `runlocal`. What is not set here, such as the tokenizer and
the optimizer, has its default, which is the paper's.
"""

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from refine_jax.architectures import QWEN3_5
from refine_jax.config import defaults

POSTTRAIN_FORMS = ("nested_refine", "nested_sft", "sft", "grpo", "runlocal")
TESTTIME_FORMS = ("official", "ntp", "runlocal")
NEEDLES = (
    "niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multikey_2,niah_multikey_3,"
    "niah_multiquery,niah_multivalue"
)


def midtrain(name: str, form: str | None, fresh: Mapping[str, Any], **small: Any) -> ConfigDict:
    """Configure mid-training on 96 * 128 sequences of 16,384 tokens. form: None or "runlocal"."""
    _forms(name, form, ("runlocal",))
    config = _start(fresh)
    config.data.update(source="data/long-documents", chunking="first", holdout=0.01)
    config.refine.reward = "cosine"
    config.train.update(steps=96, batch_size=128, mini_batch_size=32)
    config.train.update(eval_every=24, eval_batches=32, checkpoint_every=8)
    if form == "runlocal":
        config.model.fresh.update({"hidden_size": 128, "intermediate_size": 256} | small)
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
    forms = _forms(name, form, POSTTRAIN_FORMS)
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
        config.model.fresh.update({"hidden_size": 64, "intermediate_size": 128} | small)
        config.model.remat = "none"
        config.data.update(source="recall", sequence_length=256, limit_documents=500)
        config.prompts.max_answer_tokens = 16
        config.posttrain.samples = 4
        config.train.update(steps=10, batch_size=8, mini_batch_size=4, micro_batch_size=4)
        config.train.update(eval_every=5, eval_batches=4, checkpoint_every=5)
        config.optimizer.learning_rate = 1e-3
    return config


def testtime(
    name: str, form: str | None, fresh: Mapping[str, Any] | None, small: Mapping[str, Any]
) -> ConfigDict:
    """Configure test-time training on RULER's question answering, with a reset for each prompt.

    form: of `TESTTIME_FORMS`, joined by commas. fresh: None where a checkpoint says what the model
    is. small: the whole model of "runlocal".
    """
    forms = _forms(name, form, TESTTIME_FORMS)
    config = _start(fresh)
    config.phase = "testtime"
    config.refine.update(reward="binary", lambda_rl=0.4)
    config.testtime.update(reset="example", steps=1, copies=1)
    config.evaluate.update(
        tasks="ruler_squadqa", lengths="4096,8192,16384", samples=200, ruler_qa="refine"
    )
    if "official" in forms:
        config.testtime.update(reset="never", batch_size=8, mini_batch_size=4, micro_batch_size=1)
    if "ntp" in forms:
        config.refine.objective = "ntp"
    if "runlocal" in forms:
        config.model.remat = "none"
        config.model.fresh = dict(small)
        config.optimizer.learning_rate = 1e-3
        config.testtime.steps = 2
        config.generation.max_new_tokens = 8
        config.evaluate.update(tasks="niah_single_1", lengths="320", samples=8)
    return config


def evaluate(
    name: str, form: str | None, fresh: Mapping[str, Any] | None, small: Mapping[str, Any]
) -> ConfigDict:
    """Configure RULER's needles at 4K, 8K and 16K tokens; arguments as in `testtime`."""
    forms = _forms(name, form, ("runlocal",))
    config = defaults()
    config.phase = "evaluate"
    config.model.fresh = fresh and dict(fresh)
    config.evaluate.update(tasks=NEEDLES, lengths="4096,8192,16384", samples=500, batch_size=16)
    if forms:
        config.model.fresh = dict(small)
        config.evaluate.update(tasks="niah_single_1,niah_multikey_2", lengths="512,1024", samples=4)
        config.generation.max_new_tokens = 16
    return config


def split_size(
    name: str, arg: str | None, sizes: Collection[str], forms: Collection[str] = ("runlocal",)
) -> tuple[str, str | None, bool]:
    """Split the form of a file for several sizes, SIZE or SIZE,FORM,...: the first size if none.

    Returns the size, the rest of the form, and whether that has "runlocal". Raises ValueError for
    what is neither a size nor one of `forms`.
    """
    size, *given = [next(iter(sizes))] if arg is None else arg.split(",")
    if size not in sizes:
        size, given = next(iter(sizes)), [size, *given]
    if not {*given} <= {*forms} or len({*given}) < len(given):
        raise ValueError(
            f"{name} has the sizes {', '.join(sizes)}, and {', '.join(forms)} alone or after one "
            f"(9b,runlocal). Got: {arg!r}."
        )
    return size, ",".join(given) or None, "runlocal" in given


def small_qwen3_5(size: str) -> dict[str, Any]:
    """Four layers of Qwen 3.5 in the proportions of a size, for Mistral's tokenizer."""
    large = QWEN3_5[size]
    return large | {
        "vocab_size": 32000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": large["num_attention_heads"] // large["num_key_value_heads"],
        "num_key_value_heads": 1,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": (
            2 * large["linear_num_value_heads"] // large["linear_num_key_heads"]
        ),
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "eos_token_id": 2,
    }


def _forms(name: str, form: str | None, known: Collection[str]) -> set[str]:
    """Split a form; raises ValueError where a part is not `known`."""
    forms = set(form.split(",")) if form else set()
    if unknown := forms - {*known}:
        raise ValueError(f"{name} has the forms {', '.join(known)}. Got: {sorted(unknown)}.")
    return forms


def with_own_tokenizer(config: ConfigDict, local: bool) -> ConfigDict:
    """Take the checkpoint's tokenizer, without a begin-of-sequence token, but in "runlocal"."""
    if not local:
        config.data.update(tokenizer="checkpoint", add_bos=False)
    return config


def _start(fresh: Mapping[str, Any] | None) -> ConfigDict:
    """State what the phases that train have in common."""
    config = defaults()
    config.model.remat = "full"
    config.model.fresh = fresh and dict(fresh)
    config.refine.update(num_positions=8, rollout_length=5, lambda_sft=1.0, lambda_rl=0.2)
    config.train.update(micro_batch_size=1, log_every=1)
    return config
