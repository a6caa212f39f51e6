"""What one chip of a TPU generation has, and the names of slices.

The figures are those that Google publishes (cloud.google.com/tpu/docs: v4, v5e, v5p, v6e, tpu7x).
"""

import dataclasses
import math
import re
from typing import Any

from refine_jax.base.errors import ConfigError
from refine_jax.base.files import short
from refine_jax.settings import suggestion

GIB = 1 << 30
MOST_SLICES = 256


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as programs see it.

    flops: bfloat16 operations a second. hbm: bytes that libtpu lets a program use, a little less
    than what is sold. bandwidth: of the HBM, bytes a second. link: bytes a second that one link to
    a neighbour carries in one direction; the published figure of a chip divided by its links. axes:
    of the torus. clock: Hz. dcn: bytes a second that the data-centre network takes from a device.
    """

    flops: float
    hbm: float
    bandwidth: float
    link: float
    axes: int
    clock: float
    dcn: float


# A v4 or v5p chip is one device of two cores; a 7x chip is two devices, and its links are shared.
CHIPS = {
    "v4": Chip(275e12, 30.75 * GIB, 1228e9, 50e9, 3, 1.05e9, 6.25e9),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 50e9, 2, 1.5e9, 3.125e9),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 100e9, 3, 1.75e9, 6.25e9),
    "v6e": Chip(918e12, 31.25 * GIB, 1640e9, 100e9, 2, 1.75e9, 12.5e9),
    "tpu7x": Chip(1153e12, 94.75 * GIB, 3690e9, 50e9, 3, 2.2e9, 6.25e9),
}
_DEVICES_A_CHIP = {"tpu7x": 2}
EXAMPLES = "v5e:4x4, v5e:16x16, v5p:2x2x1, v5p:4x4x4, v6e:4x4"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of one kind: `name` as libtpu knows it, its generation, its chips along each axis, and
    how many such slices there are.
    """

    name: str
    generation: str
    sizes: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} slices of {self.name}"

    @property
    def chip(self) -> Chip:
        """What each device has."""
        return CHIPS[self.generation]

    @property
    def devices(self) -> int:
        """Devices of all slices."""
        return self.slices * math.prod(self.sizes) * _DEVICES_A_CHIP.get(self.generation, 1)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether the ends of each axis are linked: in whole cubes of 4x4x4, or 16 in a row."""
        if self.chip.axes == 3:
            return (all(size % 4 == 0 for size in self.sizes),) * 3
        return tuple(size == 16 for size in self.sizes)

    @property
    def options(self) -> dict:
        """What libtpu must be told besides the name."""
        options: dict[str, Any] = {}
        if self.slices > 1:
            options["num_slices"] = self.slices
        if math.prod(self.sizes) == 1:
            options["chips_per_host_bounds"] = [1, 1, 1]
        if self.generation == "v4":
            options["chip_config_name"] = "megacore"  # both cores are one device
        return options


def parse_topology(name: str | None, slices: int = 1) -> Topology:
    """Parse the name of a slice, as v5p:4x4x4, of which there are `slices`.

    Raises ConfigError: no such generation, or sizes that it does not have.
    """
    if not 1 <= slices <= MOST_SLICES:
        raise ConfigError(f"--slices must be from 1 to {MOST_SLICES}. Got: {slices}.")
    match = re.fullmatch(r"(\w+):([0-9]{1,4}(?:x[0-9]{1,4})+)", name or "")
    generation = match[1] if match else ""
    if generation not in CHIPS:
        near = suggestion((name or "").partition(":")[0].lower(), CHIPS)
        raise ConfigError(
            f"--topology must be GENERATION:SIZES with one of {', '.join(CHIPS)}, for example "
            f"{EXAMPLES}. Got: {short(name)}.{near}"
        )
    sizes = tuple(map(int, match[2].split("x")))
    if len(sizes) != CHIPS[generation].axes or 0 in sizes:
        example = "4x4x4" if CHIPS[generation].axes == 3 else "4x4"
        raise ConfigError(
            f"--topology: {generation} has {CHIPS[generation].axes} sizes of at least 1, for "
            f"example {generation}:{example}. Got: {name!r}."
        )
    return Topology(name, generation, sizes, slices)
