"""lm-eval through our adapter against lm-eval's own Hugging Face model, on one tiny checkpoint.

Needs the extras [eval] and [torch], and the packages transformers and accelerate.
"""

import json
import os

import numpy as np
import pytest
from chats import REASONING, tokenizer_folder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")
pytest.importorskip("accelerate")
pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'refine-jax[eval]'")

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from refine_jax.convert import from_hf
from refine_jax.evaluation.harness import RefineLM

TASKS = {
    "choice": (
        "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: 0\n"
        "metric_list: [{metric: acc}]\nnum_fewshot: 1\n"
        "fewshot_config: {sampler: first_n}\n"
    ),
    "begun": (  # the answer goes on with a text that is given
        "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: 0\n"
        "metric_list: [{metric: acc}]\ngen_prefix: 'The answer is'\n"
    ),
    "rolling": (
        "output_type: loglikelihood_rolling\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: byte_perplexity}]\n"
    ),
    "generate": (
        "output_type: generate_until\ndoc_to_target: ''\nmetric_list: [{metric: exact_match}]\n"
        "generation_kwargs: {until: ['e', '\\n\\n'], max_gen_toks: 24, do_sample: false}\n"
    ),
}
ROWS = [
    {"text": "Who is the user?", "choices": ["This is us.", "Nobody", " is"]},
    {"text": "  What is 2 + 2, and why?\n", "choices": ["4", "four because it is"]},
    {"text": "Is it", "choices": ["is", "is it", "it is who?"]},
]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hugging Face folder of a random Qwen 3.5 with large weights, and its tokenizer."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

    folder = tokenizer_folder(tmp_path_factory.mktemp("published") / "hf", REASONING)
    sizes = {"vocab_size": 268, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 8, "linear_value_head_dim": 12}
    ends = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    (end,) = (token["id"] for token in ends if token["content"] == "<|im_end|>")
    config = Qwen3_5TextConfig(
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        eos_token_id=end,
        bos_token_id=None,
        pad_token_id=None,
        **(sizes | heads | linear),
    )
    torch.manual_seed(3)
    model = qwen.Qwen3_5ForCausalLM._from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(torch.randn(x.shape) * 0.3 if x.ndim > 1 else x + torch.randn(x.shape) * 0.3)
    model.save_pretrained(folder)
    from_hf(str(folder), str(folder.parent / "jax"))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, lines in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: local_{name}\ndataset_path: json\ntest_split: test\nfewshot_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            f"doc_to_text: '{{{{text}}}}'\n{lines}"
        )
    return TaskManager(include_path=str(folder), include_defaults=False)


def answers(lm, tasks, **options) -> dict:
    """What a model answered to each document, by task."""
    results = simple_evaluate(
        model=lm,
        tasks=[f"local_{name}" for name in TASKS],
        task_manager=tasks,
        bootstrap_iters=0,
        **options,
    )
    return {
        task: [sample["resps"] for sample in sorted(samples, key=lambda each: each["doc_id"])]
        for task, samples in results["samples"].items()
    }


@pytest.mark.parametrize("chat", [False, True])
def test_answers_are_those_of_the_hf_model(chat, published, tasks):
    options = {}
    if chat:
        options = {"apply_chat_template": True, "system_instruction": "Be brief, user."}
    theirs = HFLM(pretrained=str(published), dtype="float32", device="cpu", batch_size=1)
    want = answers(theirs, tasks, **options)
    got = answers(RefineLM.from_checkpoint(str(published.parent / "jax")), tasks, **options)
    assert len({text for [[text]] in want["local_generate"]}) > 1
    assert got.pop("local_generate") == want.pop("local_generate")
    for task, documents in want.items():
        for mine, others in zip(got[task], documents, strict=True):
            pairs = zip(mine, others, strict=True)
            for [ours], [expected] in pairs:
                a, b = np.atleast_1d(ours), np.atleast_1d(expected)
                np.testing.assert_allclose(a, b, atol=2e-4, err_msg=task)
