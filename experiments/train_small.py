"""Train small models such as the one that comes with the package, from random weights.

    python experiments/train_small.py deltanet --workdir=runs/small
    python experiments/train_small.py lact --workdir=runs/small

The text is made up (`data.source=recall`): facts that are told, told again and asked for, so that
nothing has to be downloaded or licensed. The tokenizer is learnt from the same text, with a token
for each digit. A model is trained on next tokens by `refine_jax.phases.midtrain`, exported in
bfloat16 to WORKDIR/NAME-hf with its tokenizer and model card, and asked for facts as the demo asks.
The last line is a JSON object with its figures and the digest of its weights: on one machine and
one version of jax a second training gives the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import jax
from absl import logging

from refine_jax.base.files import write_text
from refine_jax.checkpoint import save_model
from refine_jax.config import Config, defaults
from refine_jax.convert import to_hf
from refine_jax.data.recall import RecallDocuments
from refine_jax.models.config import model_config
from refine_jax.models.transformer import Model
from refine_jax.phases import evaluate, midtrain

_COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
FIELDS = {
    "deltanet": {"model_type": "delta_net", "num_heads": 4, **_COMMON},
    "lact": {
        "model_type": "lact_swiglu",
        "num_attn_heads": 4,
        "num_lact_heads": 2,
        "lact_chunk_size": 32,
        "window_size": 64,
        "w0_w2_low_rank": 16,
        "ttt_nope": True,
        **_COMMON,
    },
}
TITLES = {"deltanet": "DeltaNet", "lact": "LaCT"}
LEARNING_RATES = {"deltanet": 4e-3, "lact": 3e-3}
STEPS = {"deltanet": 1500, "lact": 1500}
# LaCT's initial rates of 0.001 are made for chunks of 2048 tokens.
FAST_RATE = 0.03
LENGTH, ROWS, DOCUMENTS = 256, 8, 12_500
ASKED = 512  # questions of each length
PHRASES = ("The number of the", "What is the number of the", "? Answer:")


def train_tokenizer(folder: Path) -> None:
    """Learn a byte-level BPE tokenizer in which words, phrases and digits are one token each."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,  # more than there are words to learn
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    documents = RecallDocuments()
    tokenizer.train_from_iterator((documents[index] for index in range(500)), trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_text(folder / "tokenizer_config.json", json.dumps(names, indent=2) + "\n")


def write_start(name: str, folder: Path, tokenizer: Path) -> None:
    """Write the model with random weights, beside its tokenizer."""
    files = {path.name: path for path in tokenizer.iterdir()}
    size = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    fields = model_config(FIELDS[name] | {"vocab_size": size + len(PHRASES)}).to_hf()
    params = jax.jit(Model(model_config(fields)).init)(jax.random.key(0))
    if name == "lact":  # rates are softplus(projection + softplus^-1(0.001))
        shift = math.log(math.expm1(FAST_RATE) / math.expm1(0.001))
        params["layers"]["attn"]["lr_proj"]["bias"] += shift
    save_model(folder, params, json.dumps(fields, indent=2) + "\n", files, overwrite=True)


def configure(name: str, start: Path) -> Config:
    """The training run."""
    config = defaults()
    config.model.checkpoint = str(start)
    config.data.update(source="recall", tokenizer="checkpoint", sequence_length=LENGTH)
    config.data.update(chunking="first", limit_documents=DOCUMENTS, holdout=0.02)
    config.refine.objective = "ntp"
    config.optimizer.update(
        learning_rate=LEARNING_RATES[name], clip_norm=1.0, warmup_steps=STEPS[name] // 30
    )
    config.optimizer.update(schedule="cosine", final_fraction=0.02)
    config.train.update(steps=STEPS[name], batch_size=ROWS, eval_every=500, eval_batches=8)
    config.train.update(log_every=50, checkpoint_every=250)
    return Config.from_dict(config)


def ask(model: Path, workdir: Path) -> dict:
    """Answer prompts of two lengths; returns the figures of each set."""
    config = defaults()
    config.phase = "evaluate"
    config.model.checkpoint = str(model)
    config.data.tokenizer = "checkpoint"
    config.evaluate.update(tasks="recall", lengths="128,192", samples=ASKED, batch_size=64)
    return evaluate.run(Config.from_dict(config), workdir)["sets"]


def describe(name: str, run: dict, sets: dict, model: Path) -> dict:
    """The figures of the card and of the last line."""
    weights = (model / "model.safetensors").read_bytes()
    fields = json.loads((model / "config.json").read_text())
    abstract = Model(model_config(fields)).abstract_params()
    return {
        "model": name,
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(abstract)),
        "megabytes": round(sum(file.stat().st_size for file in model.iterdir()) / 1e6, 3),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "training_seconds": round(run["seconds_total"]),
        "held_out_loss": round(run["validation_loss_after"], 4),
        "held_out_accuracy": round(run["validation_accuracy_after"], 4),
        "recall": {
            set_name: [round(100 * figures[each], 1) for each in ("mean", "low", "high")]
            for set_name, figures in sets.items()
        },
    }


def write_card(name: str, figures: dict, model: Path) -> None:
    """Write the model card, README.md."""
    fields = json.loads((model / "config.json").read_text())
    recall = "\n".join(
        f"| recall, prompts of {set_name.partition('/')[2]} tokens | "
        f"{mean:.1f} % ({low:.1f} to {high:.1f}) |"
        for set_name, (mean, low, high) in figures["recall"].items()
    )
    lines = f"""---
license: apache-2.0
library_name: refine-jax
tags: [{fields["model_type"]}, fast-weights]
---

# A small {TITLES[name]} that recalls made-up facts

{figures["parameters"]:,} parameters in bfloat16, {fields["num_hidden_layers"]} layers of width
{fields["hidden_size"]}, a vocabulary of {fields["vocab_size"]} tokens. It is made to be looked
at: it knows nothing but sentences such as

    The number of the blue lamp is 4071.

    What is the number of the blue lamp? Answer: 4071

and it keeps some, not all, of the numbers that it has read in its fast weights. It comes with the
package, as `refine_jax.small.folder("{name}")`.

* **Data**: documents of `refine_jax.data.recall`, made from a seed. No text of others is in it.
* **Training**: next tokens, {STEPS[name]:,} steps of {ROWS} rows of {LENGTH} tokens
  ({STEPS[name] * ROWS * LENGTH / 1e6:.1f} million tokens), AdamW, {LEARNING_RATES[name]} at its
  peak, by `python experiments/train_small.py {name}`.
* **Licence**: Apache-2.0, as the package.

| figure | value |
|---|---|
| held-out loss | {figures["held_out_loss"]:.4f} nats a token |
| held-out accuracy | {100 * figures["held_out_accuracy"]:.2f} % |
{recall}

Recall: share of {ASKED} questions about one of the facts in the prompt that greedy decoding answers
right, all four digits (95 % interval). Most of the loss is numbers and names that are told for the
first time, which nobody could know.
"""
    write_text(model / "README.md", lines)


def main() -> None:
    """Train one model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=tuple(FIELDS))
    parser.add_argument("--workdir", type=Path, default=Path("runs/small"))
    parser.add_argument("--steps", type=int, help="fewer, to see whether everything runs")
    options = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    name, folder = options.name, options.workdir
    if options.steps:
        STEPS[name] = options.steps
    tokenizer, start, model = folder / "tokenizer", folder / f"{name}-start", folder / f"{name}-hf"
    train_tokenizer(tokenizer)
    write_start(name, start, tokenizer)
    run = midtrain.run(configure(name, start), folder / name)
    if "interrupted" in run:
        return
    print(to_hf(str(folder / name), str(model), dtype="bfloat16", overwrite=True))
    figures = describe(name, run, ask(model, folder / f"{name}-answers"), model)
    write_card(name, figures, model)
    print(json.dumps(figures))


if __name__ == "__main__":
    sys.exit(main())
