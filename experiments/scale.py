"""What the published models need of TPU slices, compiled ahead of time: tables for scale.md.

    TPU_LIBRARY_PATH=.../libtpu.so python experiments/scale.py --out=runs/scale
    python experiments/scale.py --out=runs/scale --tables        # of what is there already
    python experiments/scale.py --out=runs/scale --only=lengths/lact_760m

Every case is a configuration of `configs/` with other settings, of which the programs of a training
step are compiled as `--compile_only` does it. A case takes minutes; its figures are kept as
OUT/GROUP/MODEL/NAME.json, and cases that have theirs are not compiled again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# As early as this: where libtpu is installed, jax looks for a TPU when it starts.
os.environ["JAX_PLATFORMS"] = "cpu"

from refine_jax.architectures import QWEN3_5
from refine_jax.base.errors import ConfigError
from refine_jax.base.files import path_flag
from refine_jax.compile_only.advice import advise
from refine_jax.compile_only.command import check_libtpu, compile_programs
from refine_jax.compile_only.estimate.chips import GIB, parse_topology
from refine_jax.config import Config

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"deltanet_1_3b": "DeltaNet-1.3B", "lact_760m": "LaCT-760M"}
HYBRIDS = {f"qwen3_5:{size}": f"Qwen3.5-{size.upper()}" for size in QWEN3_5}
PROGRAMS = ("update", "ntp_update")


@dataclasses.dataclass(frozen=True)
class ScaleCase:
    """A configuration for a slice.

    model: FILE or FILE:FORM of configs/midtrain_FILE.py. settings: of the configuration, by dotted
    names.
    """

    group: str
    model: str
    topology: str
    settings: dict[str, Any]
    name: str = ""

    def file(self, out: Path) -> Path:
        """Where its figures are."""
        name = self.name or self.topology.replace(":", "-")
        return out / self.group / self.model.replace(":", "-") / f"{name}.json"

    def config(self) -> Config:
        """The configuration."""
        file, _, form = self.model.partition(":")
        path = ROOT / "configs" / f"midtrain_{file}.py"
        values = runpy.run_path(str(path))["get_config"](form or None)
        for name, value in self.settings.items():
            section, field = name.split(".")
            values[section][field] = value
        return Config.from_dict(values)


def mesh(**sizes: int) -> dict[str, int]:
    """Settings of the mesh."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1} | sizes
    return {f"mesh.{name}": size for name, size in sizes.items()}


def rows(batch: int, mini_batch: int, micro_batch: int = 1) -> dict[str, int]:
    """Settings of the batch."""
    sizes = {"batch_size": batch, "mini_batch_size": mini_batch, "micro_batch_size": micro_batch}
    return {f"train.{name}": size for name, size in sizes.items()}


# The paper's batches, of 128 rows in mini-batches of 32, 16K tokens each.
SLICES = {
    "deltanet_1_3b": {
        "v5e:4x4": mesh(fsdp=16),
        "v5p:4x4x4": mesh(fsdp=32, sequence=2),
        "v5p:2x2x1": mesh(fsdp=4) | rows(128, 32, 2),
        "v6e:4x4": mesh(fsdp=16),
        "v5e:16x16": mesh(fsdp=32, sequence=8),
    },
    "lact_760m": {
        "v5e:4x4": mesh(fsdp=16),
        "v5p:4x4x4": mesh(fsdp=32, sequence=2),
        "v5p:2x2x1": mesh(fsdp=4) | rows(128, 32, 2),
        "v6e:4x4": mesh(fsdp=16),
        "v5e:16x16": mesh(fsdp=32, tensor=4, sequence=2),
    },
}

# Hybrid models at 16K and 128K tokens, on the slices that people begin with and on the smallest
# ones that hold them. `tensor` shares the vocabulary's gradient and the states of forks, which are
# most of what a chip holds; `sequence` shares the tokens of long rows.
LORA = {"train.trainable": "lora", "model.lora_rank": 16}
HYBRID_SLICES = (
    ("0.8b", 16, "v5e:1x1", mesh()),
    ("0.8b", 16, "v5e:1x1", mesh() | LORA),
    ("0.8b", 16, "v6e:1x1", mesh()),
    ("0.8b", 16, "v6e:1x1", mesh() | LORA),
    ("0.8b", 16, "v5e:2x2", mesh(fsdp=4)),
    ("2b", 16, "v5e:2x4", mesh(fsdp=8)),
    ("2b", 16, "v6e:2x2", mesh(fsdp=4)),
    ("4b", 16, "v5e:2x4", mesh(fsdp=8)),
    ("4b", 16, "v6e:2x2", mesh(fsdp=4)),
    ("9b", 16, "v5p:2x2x1", mesh(fsdp=4)),
    ("2b", 16, "v5e:2x4", mesh(fsdp=4, tensor=2)),
    ("4b", 16, "v5e:4x4", mesh(fsdp=4, tensor=4)),
    ("4b", 16, "v6e:2x4", mesh(fsdp=4, tensor=2)),
    ("27b", 16, "v5p:4x4x4", mesh(fsdp=32, tensor=2)),
    ("2b", 16, "v5e:1x1", mesh() | LORA),
    ("2b", 16, "v5e:2x2", mesh(fsdp=4) | LORA),
    ("2b", 16, "v6e:1x1", mesh() | LORA),
    ("4b", 16, "v5e:2x2", mesh(fsdp=4) | LORA),
    ("4b", 16, "v6e:1x1", mesh() | LORA),
    ("4b", 16, "v6e:2x2", mesh(fsdp=4) | LORA),
    ("9b", 16, "v5p:1x1x1", mesh() | LORA),
    ("27b", 16, "v5p:2x2x1", mesh(fsdp=4) | LORA),
    ("27b", 16, "v5p:2x2x2", mesh(fsdp=4, tensor=2) | LORA),
    ("0.8b", 128, "v5e:2x4", mesh(fsdp=2, sequence=4)),
    ("0.8b", 128, "v5e:4x4", mesh(fsdp=2, sequence=8)),
    ("2b", 128, "v6e:2x2", mesh(fsdp=1, sequence=4)),
    ("2b", 128, "v5e:4x8", mesh(fsdp=4, sequence=8)),
    ("2b", 128, "v6e:4x4", mesh(fsdp=4, sequence=4)),
    ("4b", 128, "v5p:2x2x1", mesh(tensor=2, sequence=2)),
    ("9b", 128, "v5p:2x2x1", mesh(fsdp=2, sequence=2)),
    ("9b", 128, "v5p:2x2x4", mesh(fsdp=4, sequence=4)),
    ("27b", 128, "v5p:4x4x4", mesh(fsdp=8, tensor=2, sequence=4)),
    ("27b", 128, "v5p:4x4x8", mesh(fsdp=16, tensor=2, sequence=4)),
)


def hybrid_cases() -> Iterator[ScaleCase]:
    """Qwen 3.5."""
    for size, length, topology, settings in HYBRID_SLICES:
        shared = described(settings).replace(" x ", "-").replace(", ", "-").replace(" ", "")
        name = f"{length}K-{topology.replace(':', '-')}-{shared}"
        settings = settings | {"data.sequence_length": 1024 * length}
        yield ScaleCase("hybrid", f"qwen3_5:{size}", topology, settings, name=name)


def cases() -> Iterator[ScaleCase]:
    """All, those that say most first."""
    yield from hybrid_cases()
    for model, slices in SLICES.items():
        for topology, settings in slices.items():
            yield ScaleCase("slices", model, topology, settings)
    # Heads shared before tokens.
    settings = mesh(fsdp=32, tensor=2)
    yield ScaleCase("slices", "lact_760m", "v5p:4x4x4", settings, name="v5p-4x4x4-tensor")
    # The smallest slices: those that hold the state, and what is next to them.
    for topology, fsdp in (("v5p:1x1x1", 1), ("v6e:2x2", 4), ("v5e:2x2", 4), ("v5e:2x4", 8)):
        for model in MODELS:
            yield ScaleCase("smallest", model, topology, mesh(fsdp=fsdp))
    yield ScaleCase("smallest", "lact_760m", "v6e:1x1", mesh())
    for model in MODELS:
        # Of 64 chips as many share a row as leaves 16K tokens to each; of LaCT's at most as many as
        # it has fast-weight heads: further ones would add up what they make of every chunk. Only
        # with those do the rollouts of rows of 1M tokens fit.
        most = 64 if model == "deltanet_1_3b" else 4
        for length in (16, 64, 256, 1024):
            sequence = min(length // 16, most)
            tensor = 2 if model == "lact_760m" and length == 1024 else 1
            fsdp = 64 // sequence // tensor
            settings = mesh(fsdp=fsdp, tensor=tensor, sequence=sequence) | rows(2 * fsdp, fsdp)
            settings["data.sequence_length"] = 1024 * length
            yield ScaleCase("lengths", model, "v5p:4x4x4", settings, name=f"{length}K")
    # As many chips as heads: a next-token update alone fits.
    settings = mesh(fsdp=16, sequence=4) | rows(32, 16) | {"data.sequence_length": 1024 * 1024}
    yield ScaleCase("lengths", "lact_760m", "v5p:4x4x4", settings, name="1024K-sequence")
    for model in MODELS:
        shared = "sequence" if model == "deltanet_1_3b" else "tensor"
        yield ScaleCase("chips", model, "v5e:8x8", mesh(fsdp=32, **{shared: 2}))
    settings = mesh() | rows(2, 1) | {"data.sequence_length": 128 * 1024}
    yield ScaleCase("one_chip", "lact_760m", "v5p:1x1x1", settings, name="128K")


def compile_case(case: ScaleCase, *, plan: bool) -> dict[str, Any]:
    """Its figures: of the run, of its programs, of a training step."""
    try:
        topology = parse_topology(case.topology)
        report = compile_programs(case.config(), topology, PROGRAMS, plan=plan)
    except ConfigError as error:
        return {"error": str(error)}
    figures = report.to_json(advise(report))
    return figures | {"settings": case.settings, "tokens": report.tokens, "planned": plan}


def described(settings: dict[str, Any]) -> str:
    """The mesh in short."""
    sizes = {name.removeprefix("mesh."): size for name, size in settings.items() if "mesh" in name}
    text = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1"
    text += ", LoRA" if settings.get("train.trainable") == "lora" else ""
    micro = settings.get("train.micro_batch_size", 1)
    return text + (f", {micro} rows at a time" if micro > 1 else "")


def row(case: ScaleCase, figures: dict[str, Any]) -> list[str]:
    """A line of a table."""
    head = [case.name or case.topology, described(case.settings)]
    if "error" in figures:
        return [*head, figures["error"], *[""] * 9]
    failed = [p for p in figures["programs"] if "error" in p]
    if failed:
        return [*head, f"{failed[0]['name']} does not compile", *[""] * 9]
    chip = parse_topology(case.topology).chip
    programs = {program["name"]: program for program in figures["programs"]}
    peaks = [programs[name]["memory"]["peak"] / GIB for name in PROGRAMS]
    most = max(peaks) * GIB
    seconds = sum(p["trace_seconds"] + p["compile_seconds"] for p in figures["programs"])
    step = figures["step"]
    sent = sum(
        p["runs"] * kind["bytes"] for p in figures["programs"] for kind in p["collectives"].values()
    )
    cells = [
        " / ".join(f"{peak:.1f}" for peak in peaks),
        f"{most / chip.hbm:.0%}" if most <= chip.hbm else "does not fit",
        f"{seconds:.0f}",
    ]
    if step["seconds"] is None or step["ntp_seconds"] is None:
        ntp = "-" if step["ntp_seconds"] is None else f"{step['ntp_seconds']:.2f}"
        return [*head, *cells, "-", ntp, *["-"] * 5]
    per_token = 1e6 * step["seconds"] / figures["tokens"]
    return [
        *head,
        *cells,
        f"{step['seconds']:.2f}",
        f"{step['ntp_seconds']:.2f}",
        f"{step['ratio']:.2f}",
        f"{sent / 1e9:.0f}",
        f"{step['mfu']:.0%}",
        f"{step['tokens_per_second']:,.0f}",
        f"{per_token:.2f}",
    ]


HEADING = (
    "case",
    "mesh",
    "GiB a chip: ReFINE / NTP",
    "of HBM",
    "compiled, s",
    "step, s",
    "NTP, s",
    "ratio",
    "sent a chip, GB",
    "MFU",
    "tokens/s",
    "us a token",
)


def table(lines: list[list[str]]) -> str:
    """Markdown."""
    body = [HEADING, ["---"] * len(HEADING), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in body)


def main() -> None:
    """Compile what is missing, then print the tables."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--out", type=path_flag, required=True, help="folder of the figures")
    flags.add_argument("--only", default="", help="beginning of GROUP/MODEL/NAME")
    flags.add_argument("--plan", action="store_true", help="stop before code is made (docs/fit.md)")
    flags.add_argument("--tables", action="store_true", help="compile nothing")
    options = flags.parse_args()
    if not options.tables:
        check_libtpu()
    chosen = [
        case
        for case in cases()
        if str(case.file(Path())).removesuffix(".json").startswith(options.only)
    ]
    if not chosen:
        names = ", ".join(dict.fromkeys(str(case.file(Path()).parent) for case in cases()))
        flags.error(f"--only must begin a case of {names}. Got: {options.only!r}.")
    for case in chosen:
        file = case.file(options.out)
        if not options.tables and not file.exists():
            figures = compile_case(case, plan=options.plan)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
            print(" ".join([case.group, case.model, *row(case, figures)]), flush=True)
    for group, model in dict.fromkeys((case.group, case.model) for case in chosen):
        lines = [
            row(case, json.loads(case.file(options.out).read_text(encoding="utf-8")))
            for case in chosen
            if (case.group, case.model) == (group, model) and case.file(options.out).exists()
        ]
        if lines:
            print(f"\n{group}, {(MODELS | HYBRIDS)[model]}\n\n{table(lines)}")


if __name__ == "__main__":
    main()
