"""How large the study is, in full and small."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from corpus import Shape
from lab import Plan, Training
from tasks import SymbolTask, Task, TextTask


def make_task(name: str, workdir: Path, small: bool) -> Task:
    """The task of that name; the vocabulary of text is learnt once into the work folder."""
    if name != "text":
        facts = 10 if name == "symbols" else 12
        small_task = SymbolTask(keys=8, symbols=4, facts=facts // 3, length=32)
        return small_task if small else SymbolTask(facts=facts)
    shape = Shape(64, (2, 2), 2) if small else Shape(128, (3, 5), 3)
    return TextTask(workdir / "vocabulary.model", 512, shape)


def plan_of(task: str, family: str, small: bool) -> Plan:
    """The sizes of one family on one task."""
    text = task == "text"
    width = 16 if small else 64 if text else 32
    lact = family == "lact"
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": 1 if small else 2,
        "intermediate_size": 2 * width,
    }
    if lact:
        fields |= {
            "model_type": "lact_swiglu",
            "num_attn_heads": 2,
            "num_lact_heads": 1,
            "lact_chunk_size": 16,
            "window_size": 16,
            "ttt_nope": True,
        }
    else:
        # A state has hidden_size / num_heads numbers a channel: half as many where it is crowded.
        fields |= {"model_type": "delta_net", "num_heads": 4 if task in ("crowded", "half") else 2}
    if small:
        pretrain, arms, posttrain = Training(2, 4, 1e-3, 0.5), Training(2, 2), Training(2, 2)
        sizes = {"num_positions": 2, "edge_margin": 5}
        return Plan(fields, pretrain, arms, posttrain, sizes, 0.03 if lact else None, 8, 4, (1, 2))
    pretrain = Training(8, 20_000, 3e-3, 0.25) if text else Training(8, 8000, 5e-3, 0.25)
    sizes = {"num_positions": 8, "edge_margin": 5}
    if lact:
        pretrain = dataclasses.replace(pretrain, steps=2000)
    half = task == "half"
    arms, posttrain = Training(8, 800 if half else 400), Training(8, 100)
    # Base models that all seeds share: of `half` the one of `crowded` whose recall is nearest to
    # one half; of LaCT, whose steps are slower, a single one.
    bases = (1,) if half else (0,) if lact else ()
    return Plan(fields, pretrain, arms, posttrain, sizes, 0.03 if lact else None, bases=bases)
