"""What is printed of the compiled programs, for people and as JSON."""

import dataclasses
from typing import Any

from refine_jax.compile_only.estimate.chips import GIB, Topology
from refine_jax.config import Config
from refine_jax.parallel import AXES

_SHOWN_BUFFERS = 5
_BESIDE = " (to compare with, not a part of the run)"
_MEMORY = ("arguments", "outputs", "aliased", "temporaries", "code", "resident", "peak")


@dataclasses.dataclass
class Report:
    """All figures: `facts` of the run, and one dict a program (`child.compile_program`)."""

    config: Config
    topology: Topology
    facts: dict[str, Any]
    programs: list[dict[str, Any]]

    @property
    def run_programs(self) -> list[dict]:
        """The programs that the run itself needs."""
        return [program for program in self.programs if not program.get("compared")]

    @property
    def too_large(self) -> list[dict]:
        """The programs of the run that compile and do not fit."""
        return [p for p in self.run_programs if not p.get("fits", True) and "error" not in p]

    @property
    def too_large_beside(self) -> list[dict]:
        """The programs that would not fit, though the run does without them."""
        return [p for p in self.programs if p.get("compared") and not p["fits"]]

    @property
    def fits(self) -> bool:
        """Whether all programs of the run fit."""
        return all(program.get("fits", False) for program in self.run_programs)

    @property
    def mesh(self) -> dict[str, int]:
        """Sizes of the mesh's axes."""
        return self.facts["mesh"] or dict.fromkeys(AXES, 1)

    @property
    def tokens(self) -> int:
        """Tokens of a training step."""
        return self.config.train.batch_size * self.config.data.sequence_length

    def step(self) -> dict[str, float | None]:
        """Estimates of a training step; None where a program has none.

        seconds, tokens_per_second, mfu: of the run's objective. ntp_seconds: of next-token training
        with the same batches. ratio: of the two.
        """
        steps = [program for program in self.run_programs if program.get("runs")]
        seconds = _total(steps, "seconds")
        estimates = {"seconds": seconds, "tokens_per_second": None, "mfu": None}
        if seconds:
            operations = sum(program["runs"] * program["model_flops"] for program in steps)
            estimates["tokens_per_second"] = self.tokens / seconds
            estimates["mfu"] = operations / seconds / self.topology.chip.flops
        ntp = [p | {"runs": 1} for p in self.programs if p["name"] == "ntp_update"]
        estimates["ntp_seconds"] = _total(ntp, "seconds")
        known = seconds and estimates["ntp_seconds"] and self.config.phase == "midtrain"
        estimates["ratio"] = seconds / estimates["ntp_seconds"] if known else None
        return estimates

    def heading(self) -> str:
        """Say what is compiled for what."""
        chip, facts = self.topology.chip, self.facts
        mesh = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        return (
            f"{facts['model_type']}, {facts['parameter_count'] / 1e6:,.1f} M parameters, compiled "
            f"for {self.topology}: {self.topology.devices} devices of {size(chip.hbm)} HBM, "
            f"{chip.flops / 1e12:,.0f} bfloat16 TFLOP/s; mesh {mesh}\n"
            f"per chip: parameters {size(facts['params'])}, optimizer {size(facts['optimizer'])} "
            f"({self.config.model.param_dtype})"
        )

    def to_json(self, advice: list[str]) -> dict[str, Any]:
        """Give all figures, and what would help a run that does not fit (`advice.advise`)."""
        return {
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "devices": self.topology.devices,
            "chip": dataclasses.asdict(self.topology.chip),
            "config": self.config.to_dict(),
            **{key: value for key, value in self.facts.items() if key != "programs"},
            "mesh": self.mesh,
            "fits": self.fits,
            "step": self.step(),
            "programs": self.programs,
            "advice": advice,
        }


def _total(programs: list[dict], key: str) -> float | None:
    """Sum over the programs' runs; None for no programs or an unknown value."""
    values = [program.get(key) for program in programs]
    if not values or None in values:
        return None
    return sum(program["runs"] * value for program, value in zip(programs, values, strict=True))


def size(number: float) -> str:
    """Write bytes for people."""
    if number >= GIB / 10:
        return f"{number / GIB:.2f} GiB"
    return f"{number / (1 << 20):.1f} MiB"


def amount(number: float, unit: str) -> str:
    """Write a large number for people: 3.21 TFLOP."""
    for limit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(number) >= limit:
            return f"{number / limit:.2f} {letter}{unit}"
    return f"{number:.0f} {unit}"


def duration(seconds: float | None) -> str:
    """Write seconds for people."""
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def line(program: dict, topology: Topology) -> str:
    """Write a program in one line."""
    if "error" in program:
        return f"{program['name']:15s} does not compile: {program['message']}"
    chip, peak = topology.chip, program["memory"]["peak"]
    verdict = "fits" if program["fits"] else "DOES NOT FIT"
    if program["compared"] and not program["fits"]:
        verdict = "(too large)"  # the run itself does without it
    seconds = program["seconds"]
    used = program["model_flops"] / seconds / chip.flops if seconds else None
    share = f"{used:.0%} of peak" if used is not None else "-"
    done = "planned" if program.get("planned") else "compiled"
    return (
        f"{program['name']:15s} {verdict:12s} {size(peak):>10s} of {size(chip.hbm)}   "
        f"{duration(seconds):>10s}  {share:>12s}   {done} in "
        f"{program['compile_seconds']:.0f} s   {program['meaning']}"
        f"{_BESIDE if program['compared'] else ''}"
    )


def text(report: Report, advice: list[str], compared_advice: list[str]) -> str:
    """Write everything else, which is printed after the lines of the programs.

    advice: changes that would make the run fit. compared_advice: changes that would make the
    programs fit that are only compared with.
    """
    parts = [_details(program) for program in report.programs if "error" not in program]
    step = report.step()
    if step["seconds"] is not None:
        parts.append(
            f"training step (static estimate): {duration(step['seconds'])}, "
            f"{step['tokens_per_second']:,.0f} tokens/s, model FLOPs utilisation "
            f"{step['mfu']:.1%}"
        )
        if step["ratio"] is not None:
            parts.append(
                f"next-token training alone: {duration(step['ntp_seconds'])} a step; ReFINE takes "
                f"{step['ratio']:.2f} times as long"
            )
    broken = [program["name"] for program in report.run_programs if "error" in program]
    if broken:
        parts.append(f"does not compile: {', '.join(broken)}")
    elif report.fits:
        parts.append(f"fits {report.topology}")
    else:
        names = [program["name"] for program in report.run_programs if not program["fits"]]
        changes = "\n".join(f"  {change}" for change in advice)
        parts.append(
            f"does not fit {report.topology}: {', '.join(names)}. What would help:\n{changes}"
        )
    if report.too_large_beside:
        names = ", ".join(program["name"] for program in report.too_large_beside)
        beside = f"not a part of the run, and too large for this slice: {names}"
        parts.append("; ".join([beside, *compared_advice]))
    return "\n".join(["", *parts])


def _details(program: dict) -> str:
    memory = program["memory"]
    held = ", ".join(f"{name} {size(memory[name])}" for name in _MEMORY if memory[name])
    runs = f", {program['runs']} a step" if program["runs"] else ""
    note = _BESIDE if program["compared"] else ""
    sent = program["collectives"]
    transfers = ", ".join(
        f"{kind} {figures['count']:,} x, {amount(figures['bytes'], 'B')}"
        for kind, figures in sent.items()
    )
    lines = [
        f"{program['name']}: {program['meaning']}{runs}{note}",
        f"  memory       {held}",
        f"  work         {amount(program['flops'], 'FLOP')} "
        f"({amount(program['model_flops'], 'FLOP')} of the model), "
        f"{amount(program['bytes'], 'B')} of HBM traffic",
        f"  collectives  {transfers or 'none'}",
    ]
    if program["seconds"] is not None:
        parts = program["parts"]
        unknown, rare = program["unknown_loops"], parts.get("rare", 0)
        counted = f"; {unknown} loops of unknown length counted once" if unknown else ""
        if rare > 0.01 * program["seconds"]:
            counted += f"; {duration(rare)} more where conditions take their longer branches"
        dcn = parts.get("dcn", 0)
        between = f", between slices {duration(dcn)}" if dcn else ""
        lines.append(
            f"  estimate     {duration(program['seconds'])}: kernels {duration(parts['kernels'])}, "
            f"XLA {duration(parts['xla'])}, waits for transfers {duration(parts['waits'])} (links "
            f"busy {duration(parts['links'])}{between}){counted}"
        )
    elif program["compiler_message"]:
        lines.append(f"  compiler     {program['compiler_message']}")
    for buffer in program["buffers"][:_SHOWN_BUFFERS]:
        lines.append(
            f"  buffer       {size(buffer['bytes']):>10s}  {buffer['shape']}  {buffer['source']}"
        )
    return "\n".join(lines) + "\n"
