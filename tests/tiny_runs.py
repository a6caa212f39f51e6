"""Settings and documents of whole runs that take seconds, and what is left of a run to compare."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from refine_jax.config import defaults
from refine_jax.report.metrics import read_metrics

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven")


def tiny_run(phase: str, *changes: Mapping[str, Mapping[str, Any]]) -> ConfigDict:
    """A run of one layer on bytes, two rollouts of two tokens a row, with a high learning rate.

    changes: {section: {field: value}}, the last one wins. Fields that do not exist are taken, too,
    as from a user who gets a name wrong.
    """
    config = defaults()
    config.phase = phase
    config.model.fresh = {
        "model_type": "delta_net",
        "vocab_size": 259,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_heads": 1,
        "intermediate_size": 8,
    }
    config.data.tokenizer = "bytes"
    config.refine.update(num_positions=2, rollout_length=2)
    config.optimizer.update(learning_rate=1e-2, clip_norm=1.0)
    for sections in changes:
        for section, fields in sections.items():
            with config.unlocked():
                config[section].update(fields)
    return config


def config_file(path: Path, config: ConfigDict) -> Path:
    """The configuration as a file that a user would write."""
    path.write_text(
        "from refine_jax.config import defaults\n\n\ndef get_config(arg=None):\n"
        f"    config = defaults()\n    config.update({config.to_dict()!r})\n"
        "    return config\n",
        encoding="utf-8",
    )
    return path


def write_documents(folder: Path) -> Path:
    """Sixteen documents of forty words."""
    for index in range(16):
        words = np.random.default_rng(index).choice(WORDS, 40)
        (folder / f"{index:02}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


def comparable(workdir: Path) -> list[dict[str, Any]]:
    """What a run computed, without how long it took."""
    return [
        {k: v for k, v in record.items() if not k.startswith("time/") and k != "tokens_per_second"}
        for record in read_metrics(workdir / "metrics.jsonl")
    ]
