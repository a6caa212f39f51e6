"""How long Pallas kernels take, of which the compiler says nothing.

A static replay of a kernel's schedule (`experiments/tpu_kernels.py`) takes minutes. What it found
for the shapes of the published models is kept here as a share of the chip's peak: operations as
`flops.count_flops` counts them, by the seconds of the replay. Kernels scale with their operations
as long as their blocks stay the same.
"""

from collections.abc import Iterable

from refine_jax.compile_only.estimate.chips import Chip
from refine_jax.compile_only.estimate.flops import Kernel

# Kernels, known by the beginning of their names, reach these shares of the peak in these cases: the
# delta rule with 16 heads of 128 over 8192 tokens; LaCT-760M over 16,384 tokens; the head's loss of
# width 2048 and 32,000 words; window attention with a window of 2048 and 24 heads of 64 in groups
# of 128 (products of splash attention are as large); what 8 forks of 5 tokens read, and their
# attention to a row.
_SHARES = {
    "delta_rule_forward": {"v5e": 0.76, "v5p": 0.74, "v6e": 0.23},
    "delta_rule_backward": {"v5e": 0.66, "v5p": 0.64, "v6e": 0.20},
    "lact_forward": {"v5e": 0.85, "v5p": 0.85, "v6e": 0.41},
    "lact_inputs_forward": {"v5e": 0.25, "v5p": 0.28, "v6e": 0.11},
    "lact_inputs_": {"v5e": 0.16, "v5p": 0.18, "v6e": 0.073},
    "lact_outputs_backward": {"v5e": 0.0037, "v5p": 0.0037, "v6e": 0.0008},
    "lact_": {"v5e": 0.81, "v5p": 0.79, "v6e": 0.39},
    "fork_reads_attention": {"v5e": 0.20, "v5p": 0.19, "v6e": 0.049},
    "fork_reads_weights": {"v5e": 0.013, "v5p": 0.016, "v6e": 0.0049},
    "fork_attention_forward": {"v5e": 0.44, "v5p": 0.43, "v6e": 0.085},
    "fork_attention_backward": {"v5e": 0.63, "v5p": 0.62, "v6e": 0.126},
    "cross_entropy": {"v5e": 0.87, "v5p": 0.85, "v6e": 0.66},
    "window_attention_forward": {"v5e": 0.63, "v5p": 0.63, "v6e": 0.25},
    "window_attention_": {"v5e": 0.88, "v5p": 0.88, "v6e": 0.34},
    "splash_mha_fwd": {"v5e": 0.68, "v5p": 0.66, "v6e": 0.25},
    "splash_": {"v5e": 0.46, "v5p": 0.46, "v6e": 0.17},
}
# Some generations have no figures of their own, and some kernels have none at all.
_LIKE = {"v4": "v5e", "tpu7x": "v6e"}
_DEFAULT = 0.3


class KernelTimes:
    """Seconds of Pallas calls of a program.

    kernels: those of its jaxpr.
    """

    def __init__(self, kernels: Iterable[Kernel], generation: str, chip: Chip):
        self._flops: dict[tuple, float] = {}
        self._largest: dict[str, float] = {}
        for kernel in kernels:
            self._flops[kernel.name, kernel.shapes] = kernel.flops
            self._largest[kernel.name] = max(self._largest.get(kernel.name, 0.0), kernel.flops)
        self._generation, self._chip = _LIKE.get(generation, generation), chip

    def share(self, name: str) -> float:
        """Look up the share of the peak at which the kernel of this name runs."""
        known = next((shares for start, shares in _SHARES.items() if name.startswith(start)), {})
        return known.get(self._generation, _DEFAULT)

    def __call__(self, name: str, shapes: tuple, moved: float) -> float:
        """Estimate seconds of one call, of results of these shapes, that moves so many bytes."""
        flops = self._flops.get((name, shapes), self._largest.get(name, 0.0))
        seconds = flops / (self._chip.flops * self.share(name))
        return max(seconds, moved / self._chip.bandwidth)
