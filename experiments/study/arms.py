"""What the study compares, declared before its final seeds are run.

An arm is a configuration of the library's training step, or next-token training whose tokens weigh
by a rule. Every arm starts from the same saturated models and reads the same rows in the same
order. Learning rates are chosen for each arm, on the tuning seeds, by greedy recall on held-out
rows of their own. An arm that differs from another in one setting may have its rate
(`rate_of`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from refine_jax.config import RefineConfig
from refine_jax.presets import PRESETS


@dataclasses.dataclass(frozen=True)
class Seeds:
    """Seeds of the compared and of the tuning runs, learning rates to choose from, and rounds in
    which costs are measured.
    """

    final: tuple[int, ...]
    tuning: tuple[int, ...]
    rates: tuple[float, ...]
    rounds: int


FINAL = Seeds(final=(0, 1, 2, 3, 4), tuning=(1000,), rates=(3e-4, 1e-3, 3e-3), rounds=16)
SMALL = Seeds(final=(0, 1), tuning=(1000,), rates=(1e-3,), rounds=1)

# Rules that could explain a gain away. The loss is that of next-token training plus lambda_rl times
# the mean over tokens of what the rule says of p, the probability of the true token.
RULES = {
    "p": "p, which is the exact objective for k = 1",
    "p^3": "p cubed",
    "1-p": "1 - p, the focal loss's weight",
    "smoothing": "the mean of all words' negative log-probabilities (label smoothing)",
    "oracle": "1 for tokens of values that were mentioned before, else 0",
}


# Of sampling, without any training: what sharper distributions alone do.
TEMPERATURES = (0.9, 0.8, 0.65, 0.5)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to continue training.

    fields: what differs from the defaults of the section `refine`. rule: of RULES, in place of a
    policy loss. times: steps, as a multiple of the plan's. rate_of: the arm whose learning rate is
    used; None: its own is chosen.
    """

    fields: dict[str, Any]
    rule: str | None = None
    times: int = 1
    rate_of: str | None = None

    def config(self, sizes: dict[str, Any]) -> RefineConfig:
        """The section `refine` of the arm; sizes: of the rollouts, unless the arm says others."""
        return RefineConfig(**sizes | self.fields)


def _ntp(times: int) -> Arm:
    return Arm({"objective": "ntp"}, times=times, rate_of=None if times == 1 else "ntp")


def _rule(rule: str, weight: float, rate_of: str | None = None) -> Arm:
    return Arm({"objective": "ntp", "lambda_rl": weight}, rule=rule, rate_of=rate_of)


def _exact(weight: float = 10.0, rate_of: str | None = "exact whole", **fields: Any) -> Arm:
    return Arm(PRESETS["exact"] | {"lambda_rl": weight} | fields, rate_of=rate_of)


def _rollouts(rate_of: str | None = "published", **fields: Any) -> Arm:
    return Arm(PRESETS["paper"] | fields, rate_of=rate_of)


_GROUPS_OF_8 = {
    "num_positions": 2,
    "rollouts_per_position": 8,
    "grouping": "position",
    "baseline": "leave_one_out",
}
_LOO = "published, n=8 leave-one-out"
_LOW_NOISE = PRESETS["low_noise"] | {"num_positions": 2, "lambda_rl": 30.0}
# In the order in which they are run.
ARMS: dict[str, Arm] = {
    "ntp": _ntp(1),
    "exact whole": _exact(rate_of=None),
    "weight p": _rule("p", 10.0),
    "oracle": _rule("oracle", 10.0),
    "published": _rollouts(rate_of=None),
    _LOO: _rollouts(rate_of=None, **_GROUPS_OF_8),
    "ntp, 2 x steps": _ntp(2),
    "exact prefix": _exact(rate_of=None, reward="prefix"),
    # The trade against the next-token loss.
    "exact whole, lambda_rl=1": _exact(1.0),
    "exact whole, lambda_rl=3": _exact(3.0),
    "exact whole, lambda_rl=30": _exact(30.0),
    "weight p, lambda_rl=3": _rule("p", 3.0, "weight p"),
    "weight p, lambda_rl=30": _rule("p", 30.0, "weight p"),
    "oracle, lambda_rl=3": _rule("oracle", 3.0, "oracle"),
    "oracle, lambda_rl=30": _rule("oracle", 30.0, "oracle"),
    "published, lambda_rl=0.05": _rollouts(lambda_rl=0.05),
    "published, lambda_rl=1": _rollouts(lambda_rl=1.0),
    # Rollouts have 1 / k of the weight that the exact objective has.
    "low_noise": Arm(_LOW_NOISE),
    "weight p^3": _rule("p^3", 10.0, "weight p"),
    "weight 1-p": _rule("1-p", 1.0),
    "label smoothing": _rule("smoothing", 0.1),
    "exact whole, k=2": _exact(rollout_length=2),
    "exact whole, k=4": _exact(rollout_length=4),
    "exact whole, k=5": _exact(rollout_length=5),
    "ntp, 4 x steps": _ntp(4),
    "ntp, 8 x steps": _ntp(8),
    "exact whole, entropy": _exact(selection="entropy"),
    "exact whole, variance": _exact(selection="variance"),
    "exact prefix, variance": _exact(selection="variance", reward="prefix"),
    "published, k=3": _rollouts(rollout_length=3),
    "published, reward=binary": _rollouts(reward="binary"),
    "published, reward=whole, k=3": _rollouts(reward="whole", rollout_length=3),
    "published, reward=expected": _rollouts(reward="expected"),
    "published, reward to go": _rollouts(credit="reward_to_go"),
    "published, optimal token": _rollouts(baseline="optimal_token"),
    "published, uniform": _rollouts(selection="uniform"),
    "published, variance": _rollouts(selection="variance"),
    "published, argmax": _rollouts(selection="argmax"),
    "published, c=2": _rollouts(num_positions=2),
    "published, reward=edit": _rollouts(reward="edit"),
    "published, reward=pooled_cosine": _rollouts(reward="pooled_cosine"),
    "published, adaptive k": _rollouts(
        rollout_lengths="adaptive", loss_aggregation="seq-mean-token-mean"
    ),
    "low_noise, reward=edit": Arm(_LOW_NOISE | {"reward": "edit"}, rate_of="low_noise"),
    "published, n=4": _rollouts(rollouts_per_position=4, grouping="position"),
}
CORE = tuple(ARMS)[:6]
"""The arms of the core table."""
BEST = ("exact whole", "exact prefix")
"""The arms that are also used in post-training and at test time."""
