"""How large the study is, in full and small."""

from __future__ import annotations

import dataclasses

from corpus import Shape
from lab import Sizes, Stage

MODELS = ("deltanet", "lact")


@dataclasses.dataclass(frozen=True)
class StudyPlan:
    """The study in one form.

    rates: to choose from; answer_rates: of post-training. ablations: names; None: all.
    """

    sizes: Sizes
    seeds: int
    ablation_seeds: int
    rates: tuple[float, ...]
    answer_rates: tuple[float, ...]
    ablations: tuple[str, ...] | None = None


def _fields(width: int, layers: int, chunk: int) -> dict:
    common = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 2 * width}
    lact = {
        "model_type": "lact_swiglu",
        "num_attn_heads": 4,
        "num_lact_heads": 2,
        "lact_chunk_size": chunk,
        "window_size": chunk,
        "w0_w2_low_rank": 16,
        "ttt_nope": True,
    }
    return {
        "deltanet": {"model_type": "delta_net", "num_heads": 2} | common,
        "lact": lact | common,
    }


_FACTS = Shape(128, (3, 4), 4)
_FULL = Sizes(
    fields=_fields(128, 2, 32),
    pretrain={
        "deltanet": (Stage(_FACTS, 8, 1600), Stage(Shape(256, (3, 6)), 8, 200)),
        "lact": (Stage(_FACTS, 8, 1800), Stage(Shape(256, (3, 6)), 8, 500)),
    },
    repeated={"deltanet": 0, "lact": 5},
    fast_rate=0.03,
    pretrain_rate={"deltanet": 3e-3, "lact": 1e-3},
    midtrain=Stage(Shape(512, (4, 8)), 8, 32),
    posttrain=Stage(Shape(252, (3, 6)), 16, 20),
    measured=(Shape(256, (4, 6)), Shape(512, (4, 8)), Shape(1024, (4, 8))),
    questions=Shape(252, (3, 6)),
)
_SMALL = dataclasses.replace(
    _FULL,
    fields=_fields(32, 1, 32),
    pretrain=dict.fromkeys(MODELS, (Stage(_FACTS, 2, 2),)),
    repeated={"deltanet": 0, "lact": 1},
    midtrain=Stage(Shape(192, (2, 3)), 2, 3),
    posttrain=Stage(Shape(60, (2, 3)), 2, 2),
    measured=(Shape(128, (2, 3)), Shape(192, (2, 3))),
    questions=Shape(60, (2, 3)),
    measured_rows=4,
    curve_rows=2,
    questions_asked=4,
    questions_adapted=8,
    curve_points=2,
)
SIZES = {
    "full": StudyPlan(_FULL, 5, 3, (1e-4, 3e-4, 1e-3), (3e-4, 1e-3)),
    "small": StudyPlan(_SMALL, 2, 1, (1e-3,), (1e-3,), ("reward=binary",)),
}
