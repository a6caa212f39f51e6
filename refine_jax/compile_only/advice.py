"""What to change in a run that does not fit, the most effective first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refine_jax.compile_only.chips import GIB

if TYPE_CHECKING:
    from refine_jax.compile_only.report import Report


def advise(report: Report) -> list[str]:
    """Changes that would make the programs smaller; empty where all fit."""
    failing = [p for p in report.run_programs if not p.get("fits", True) and "error" not in p]
    if not failing:
        return []
    found: list[tuple[float, str]] = []
    worst = max(failing, key=lambda program: program["memory"]["peak"])
    found += _smaller_state(report)
    temporaries = worst["memory"]["temporaries"]
    if any(program["name"] not in ("prefill", "decode") for program in failing):
        found += _fewer_activations(report, temporaries)
    found += _smaller_generation(report, failing)
    found.sort(key=lambda each: -each[0])
    over = (worst["memory"]["peak"] - report.topology.chip.hbm) / GIB
    end = f"a larger slice: {worst['name']} needs {over:.2f} GiB more a chip than there is"
    return [text for _, text in found] + [end]


def _smaller_state(report: Report) -> list[tuple[float, str]]:
    """(bytes saved, what to do) about parameters and optimizer state."""
    mesh, facts, config = report.mesh, report.facts, report.config
    state, found = facts["params"] + facts["optimizer"], []
    others = mesh["data"]
    if others > 1:
        saved = state * (1 - 1 / others)
        found.append(
            (
                saved,
                f"config.mesh.data=1, config.mesh.fsdp={mesh['fsdp'] * others}: parameters and "
                f"optimizer state take {saved / GIB:.2f} GiB less a chip",
            )
        )
    if config.optimizer.first_moment_dtype is None and config.model.param_dtype == "float32":
        saved = facts["optimizer"] / 4
        found.append(
            (
                saved,
                "config.optimizer.first_moment_dtype='bfloat16': "
                f"{saved / GIB:.2f} GiB less a chip",
            )
        )
    if config.model.param_dtype == "float32":
        found.append(
            (
                state / 2,
                "config.model.param_dtype='bfloat16': parameters, moments and gradients take half "
                f"({state / 2 / GIB:.2f} GiB less for the first two)",
            )
        )
    return found


def _fewer_activations(report: Report, temporaries: float) -> list[tuple[float, str]]:
    """About the arrays between the layers."""
    mesh, config, found = report.mesh, report.config, []
    shared = mesh["data"] * mesh["fsdp"]
    if config.phase == "testtime":
        section, rows = "testtime", config.testtime.micro_batch // shared
    else:
        section, rows = "train", min(config.train.micro_batch, config.train.mini_batch // shared)
    if rows > 1:
        fewer = rows // 2 * (shared if section == "testtime" else 1)
        found.append(
            (
                temporaries * (1 - rows // 2 / rows),
                f"config.{section}.micro_batch_size={fewer}: {rows // 2} of {rows} rows a chip at "
                "a time, and as much less for activations",
            )
        )
    if config.model.remat != "full":
        found.append(
            (
                temporaries * 0.6,
                "config.model.remat='full': a layer keeps only its input for the backward pass "
                f"(now {config.model.remat!r})",
            )
        )
    if rows <= 1 and shared > 1:
        half = mesh["fsdp"] // 2 or 1
        found.append(
            (
                temporaries / 2,
                f"config.mesh.sequence={2 * mesh['sequence']} with fsdp={half}: two chips share "
                "the tokens of a row",
            )
        )
        found.append(
            (
                temporaries / 3,
                f"config.mesh.tensor={2 * mesh['tensor']} with fsdp={half}: two chips share heads, "
                "MLP and vocabulary",
            )
        )
    return found


def _smaller_generation(report: Report, failing: list[dict]) -> list[tuple[float, str]]:
    """About reading prompts and generating."""
    found, config = [], report.config
    for program in failing:
        temporaries = program["memory"]["temporaries"]
        if program["name"] == "prefill":
            tokens = config.generation.prefill_tokens // 2
            found.append(
                (
                    temporaries / 2,
                    f"config.generation.prefill_tokens={tokens}: prompts are read in smaller parts",
                )
            )
        if program["name"] == "decode":
            section = "testtime" if config.phase == "testtime" else "evaluate"
            found.append(
                (temporaries / 2, f"a smaller config.{section}.batch_size: fewer states at once")
            )
    return found
