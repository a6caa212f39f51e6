"""Nested ReFINE post-training of LaCT-760M with the paper's numbers (arXiv 2602.16704).

    python -m refine_jax.main --config=configs/posttrain_lact_760m.py \
        --workdir=runs/lact-760m-squadqa --config.model.checkpoint=runs/lact-760m \
        --config.data.source=data/ruler/ruler_squadqa_lact_16384_1600_train.parquet

from the mid-trained model of `midtrain_lact_760m.py` and a file of prompts and answers: 1,600
of them are 25 steps of 64, one pass, as in the official code. The rows that the paper's Table 4
compares are forms, as is GRPO on sampled answers, which the official code offers:

    posttrain_lact_760m.py              nested ReFINE
    posttrain_lact_760m.py:nested_sft   next-token loss on the prompts, then SFT
    posttrain_lact_760m.py:sft          SFT on the answers alone
    posttrain_lact_760m.py:grpo         GRPO, the score of sampled answers as reward

The paper reports, for nested ReFINE followed by ReFINE at test time, at 4K, 8K and 16K tokens, with
the untouched model in brackets: SQuADQA 45.5/25.5/10.0 (17.5/14.0/6.5), HotpotQA 28.5/25.5/15.0
(20.5/14.5/12.0). We have not run this size ourselves.

`posttrain_lact_760m.py:runlocal` (or `:sft,runlocal` and so on) runs the same code small, on a
CPU, from random weights, on made-up questions about lists of facts. With `:grpo` nothing moves
there: no answer of a random model scores, so all advantages are 0. It needs a model that answers
sometimes, such as the result of `:sft`.
"""

from ml_collections import ConfigDict

from refine_jax.architectures import LACT_760M
from refine_jax.config import defaults

FORMS = ("nested_refine", "nested_sft", "sft", "grpo", "runlocal")


def get_config(arg: str | None = None) -> ConfigDict:
    """The paper's configuration; `arg` names forms, joined by commas."""
    forms = set(arg.split(",")) if arg else set()
    if unknown := forms - set(FORMS):
        raise ValueError(
            f"posttrain_lact_760m.py has the forms {', '.join(FORMS)}. Got: {sorted(unknown)}."
        )
    if len(variants := sorted(forms - {"runlocal"})) > 1:
        raise ValueError(f"posttrain_lact_760m.py takes one form beside runlocal. Got: {variants}.")
    config = defaults()
    config.phase = "posttrain"
    config.model.fresh = dict(LACT_760M)
    config.model.remat = "full"
    config.data.update(
        source="data/ruler/ruler_squadqa_lact_16384_1600_train.parquet",
        tokenizer="mistral-v1",
        sequence_length=16384,
        holdout=0.05,
    )
    config.prompts.update(answer_field="answer", max_answer_tokens=32, cut="middle")
    config.posttrain.update(nested=not forms & {"sft", "grpo"}, metric="ruler_qa_refine")
    config.posttrain.answers = "grpo" if "grpo" in forms else "sft"
    config.refine.update(
        objective="ntp" if "nested_sft" in forms else "refine",
        reward="hybrid",
        num_positions=8,
        rollout_length=5,
        lambda_sft=1.0,
        lambda_rl=0.2,
    )
    config.optimizer.update(
        learning_rate=1e-6, schedule="constant", weight_decay=0.01, clip_norm=0.2
    )
    config.train.update(
        steps=25,
        batch_size=64,
        mini_batch_size=16,
        micro_batch_size=1,
        eval_every=5,
        eval_batches=80,
        checkpoint_every=5,
        log_every=1,
    )
    if "runlocal" in forms:
        config.model.fresh.update(
            hidden_size=64,
            num_hidden_layers=2,
            num_attn_heads=4,
            num_lact_heads=2,
            intermediate_size=128,
            lact_chunk_size=64,
            window_size=64,
            w0_w2_low_rank=8,
        )
        config.model.remat = "none"
        config.data.update(source="recall", sequence_length=256, limit_documents=500)
        config.prompts.max_answer_tokens = 16
        config.posttrain.samples = 4
        config.optimizer.learning_rate = 1e-3
        config.train.update(steps=10, batch_size=8, mini_batch_size=4, micro_batch_size=4)
        config.train.update(eval_every=5, eval_batches=4, checkpoint_every=5)
    return config
