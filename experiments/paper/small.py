"""The small form of the paper's runs: tiny models, a few steps, made-up data; no results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jaxlib

# Tokens of prompt and answer: of questions, and of needles.
LENGTHS = (256,)
NEEDLE_LENGTHS = (512,)
LONGBENCH = ("qasper", "lcc")
STEPS, EVERY, TRIALS = 2, 1, 2
CONFIGS = {"lact": "demo.py:scratch", "deltanet": "demo.py:scratch,deltanet"}
# Unoptimised machine code: tiny models run for less time than their programs take to optimise.
XLA_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if jaxlib.__version__.startswith("0.10."):
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"  # later ones lack the flag

_SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
_FRESH = {
    "lact": {
        "num_attn_heads": 2,
        "num_lact_heads": 1,
        "lact_chunk_size": 64,
        "window_size": 64,
        "w0_w2_low_rank": 4,
    },
    "deltanet": {"num_heads": 1},
}
_BATCHES = {
    "model.remat": "none",
    "optimizer.learning_rate": 1e-3,
    "train.batch_size": 4,
    "train.mini_batch_size": 2,
    "train.micro_batch_size": 2,
    "train.eval_every": 0,
    "train.eval_batches": 1,
    "train.log_every": 0,
}
_DOCUMENTS = {
    "data.source": "stdlib",
    "data.limit_documents": 40,
    "data.sequence_length": 256,
    "data.holdout": 0.1,
}


def base(model: str) -> dict[str, Any]:
    """The model that stands for the published one."""
    return {
        **{f"model.fresh.{name}": size for name, size in (_FRESH[model] | _SIZES).items()},
        "refine.objective": "ntp",
        **_BATCHES,
        **_DOCUMENTS,
        "data.min_remainder": 256,
        # Enough for losses and entropies that differ from token to token.
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 0,
        "train.warmup_ntp_steps": 0,
        "train.batch_size": 2,
        "train.steps": 15,
        "train.checkpoint_every": 0,
    }


def midtrain() -> dict[str, Any]:
    """Changes to mid-training."""
    return _BATCHES | _DOCUMENTS


def posttrain() -> dict[str, Any]:
    """Changes to post-training: on made-up facts."""
    return _BATCHES | {
        "data.source": "recall",
        "data.limit_documents": 60,
        "data.holdout": 0.1,
        "prompts.max_answer_tokens": 16,
        "train.steps": 2,
        "train.checkpoint_every": 0,
    }


def evaluate() -> dict[str, Any]:
    """Changes to what answers questions."""
    return {
        "evaluate.samples": 2,
        "evaluate.essays": "stdlib",
        "evaluate.batch_size": 2,
        "generation.max_new_tokens": 4,
        # The likeliest texts of these models are line breaks alone.
        "generation.temperature": 1.0,
    }


def testtime() -> dict[str, Any]:
    """Changes to test-time training."""
    return {
        "optimizer.learning_rate": 1e-3,
        "model.remat": "none",
        "testtime.batch_size": 2,
        "testtime.mini_batch_size": 2,
    }


def position() -> dict[str, Any]:
    """Changes to measurements along documents."""
    return {"source": "stdlib", "limit_documents": 4, "sequence_length": 256, "batch_size": 2}


def lm_eval() -> dict[str, Any]:
    """Changes to lm-eval's tasks, which are read from made-up files."""
    return {"batch_size": 2}


def path(workdir: Path, name: str) -> str:
    """Where `write_data` puts made-up data."""
    return str(workdir / "made-up" / name)


def write_data(workdir: Path) -> None:
    """Questions about made-up facts in the formats of RULER, LongBench and lm-eval."""
    from refine_jax.data.recall import RecallPrompts
    from refine_jax.data.tokenizer import load_tokenizer

    prompts = RecallPrompts(160, load_tokenizer("mistral-v1"))
    qa = {"ruler_squadqa": [{"max_seq_length": length} for length in LENGTHS]}
    for name, tasks in (("ruler_qa", qa), ("longbench", {task: [{}] for task in LONGBENCH})):
        for task, variants in tasks.items():
            for fields in variants:
                rows = [{"task": task, **_question(prompts, task, n), **fields} for n in range(2)]
                file = "-".join([task, *map(str, fields.values())]) + ".jsonl"
                _write_lines(Path(path(workdir, name)) / file, rows)
    _write_lm_eval(Path(path(workdir, "lm_eval")), prompts)


def _question(prompts, task: str, index: int) -> dict[str, Any]:
    prompt, answers = prompts[index]
    # Similarity to a line is hardly ever zero, in contrast to right answers of these models.
    return {"prompt": prompt, "answers": prompt.splitlines()[:1] if task == "lcc" else answers}


_CHOICE = """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list:
- {metric: acc, aggregation: mean, higher_is_better: true}
- {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
_GENERATE = """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
_LM_EVAL = {
    "wikitext": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    "lambada_openai": """output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
metric_list:
- {metric: perplexity, aggregation: perplexity, higher_is_better: false}
- {metric: acc, aggregation: mean, higher_is_better: true}
""",
    **dict.fromkeys(("fda", "swde"), _GENERATE),
    **dict.fromkeys(("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"), _CHOICE),
}


def _write_lm_eval(folder: Path, prompts) -> None:
    rows = [
        {"question": prompt, "choices": [*answers, "0000"]}
        for prompt, answers in (prompts[index] for index in range(2))
    ]
    data = (folder / "questions.jsonl").absolute()
    _write_lines(data, rows)
    for task, text in _LM_EVAL.items():
        head = (
            f"task: {task}\ndataset_path: json\ntest_split: test\n"
            f'dataset_kwargs: {{data_files: {{test: "{data}"}}}}\ntarget_delimiter: " "\n'
        )
        (folder / f"{task}.yaml").write_text(head + text, encoding="utf-8")


def _write_lines(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
