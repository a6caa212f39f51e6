"""Named sets of values of the section `refine`, and which values win beside one.

    config.refine.preset = "exact"            # in a configuration file
    --config.refine.preset=exact              # as a flag

A value that the file sets itself wins over the file's preset, a flag over both. A preset given as a
flag wins over the file, as flags do. `Config.from_dict` replaces a preset by its values, so that
the configuration of a run, as it is recorded and compared, says what was computed.
"""

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

PRESETS: dict[str, dict[str, Any]] = {
    # The published estimator (ReFINE, arXiv 2602.16704): the defaults.
    "paper": {
        "estimator": "rollouts",
        "selection": "entropy",
        "reward": "cosine",
        "rollout_length": 5,
        "rollouts_per_position": 1,
        "grouping": "sequence",
        "normalize_std": True,
        "credit": "sequence",
        "baseline": "group",
    },
    # No rollouts: the probability that one of three tokens would be right as a whole, at every
    # position. Windows that are longer than what can be predicted say little.
    "exact": {
        "estimator": "exact",
        "selection": "all",
        "reward": "whole",
        "rollout_length": 3,
    },
    # Rollouts whose gradient is unbiased, from where the outcome is open.
    "low_noise": {
        "estimator": "rollouts",
        "selection": "variance",
        "reward": "whole",
        "rollout_length": 3,
        "rollouts_per_position": 8,
        "grouping": "position",
        "normalize_std": False,
        "credit": "reward_to_go",
        "baseline": "leave_one_out",
    },
}


class GivenFields(ConfigDict):
    """The fields of a section, and in `given` the names of those that a user has set.

    given: names of those among `values`; what is set later is added.
    """

    def __init__(self, values: Mapping | None = None, given: Collection[str] = (), **options):
        object.__setattr__(self, "given", set())
        super().__init__(values, **options)
        object.__setattr__(self, "given", set(given))

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.given.add(key)

    def __setstate__(self, state):
        super().__setstate__(state)  # which sets all fields
        object.__setattr__(self, "given", set(state["given"]))

    def copy_and_resolve_references(self, visit_map=None):
        """A copy without references, of which the same fields were set."""
        copy = super().copy_and_resolve_references(visit_map)
        object.__setattr__(copy, "given", set(self.given))
        return copy


def expand(fields: Mapping) -> dict[str, Any]:
    """The fields of the section `refine` with the values of its preset, which is then None.

    fields: `GivenFields`, whose `given` fields win over the preset, or another mapping, all fields
        of which do. A preset that is not known stays: the checks of the configuration refuse it.
    """
    values = dict(fields)
    chosen = PRESETS.get(_preset_of(fields))
    if chosen is None:
        return values
    given = getattr(fields, "given", fields)
    values |= {name: value for name, value in chosen.items() if name not in given}
    return values | {"preset": None}


def notes(fields: Mapping) -> list[str]:
    """A line on the values that win over the preset of the section `refine`; none without any."""
    chosen = PRESETS.get(_preset_of(fields), {})
    values = expand(fields)
    kept = [name for name, value in chosen.items() if values[name] != value]
    if not kept:
        return []
    won = ", ".join(f"{name}={values[name]!r} (not {chosen[name]!r})" for name in kept)
    preset = _preset_of(fields)
    return [f"config.refine.preset={preset!r} with {won}: values that are given beside it count."]


def _preset_of(fields: Mapping) -> str | None:
    preset = fields.get("preset")
    return preset if isinstance(preset, str) else None
