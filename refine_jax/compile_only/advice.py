"""What to change in a run that does not fit, the most effective first."""

from collections.abc import Iterator, Mapping

from refine_jax.base.errors import ConfigError
from refine_jax.compile_only.estimate.chips import GIB
from refine_jax.compile_only.report import Report
from refine_jax.models.config import model_config
from refine_jax.phases.setup import check_fits

# These programs have a backward pass.
_DIFFERENTIATED = ("update", "ntp_update", "answer_update", "adaptation")

# A change: the bytes that it saves on a chip, and what to change in words.
Change = tuple[float, str]


def advise(report: Report) -> list[str]:
    """List changes that would make the programs smaller; none where all fit."""
    failing = report.too_large
    if not failing:
        return []
    worst = max(failing, key=lambda program: program["memory"]["peak"])
    training = [p for p in failing if p["name"] not in ("prefill", "decode")]
    changes = [*_smaller_state(report)]
    if training:
        changes += _fewer_activations(report, training)
    changes += _smaller_generation(report, failing)
    changes.sort(key=lambda change: -change[0])
    over = (worst["memory"]["peak"] - report.topology.chip.hbm) / GIB
    end = f"a larger slice: {worst['name']} needs {over:.2f} GiB more a chip than there is"
    return [text for _, text in changes] + [end]


def advise_beside(report: Report) -> list[str]:
    """List changes that would make programs fit that the run is only compared with."""
    return [text for _, text in _smaller_generation(report, report.too_large_beside)]


def _smaller_state(report: Report) -> Iterator[Change]:
    """List changes of parameters and optimizer state."""
    mesh, facts, config = report.mesh, report.facts, report.config
    state = facts["params"] + facts["optimizer"]
    others = mesh["data"]
    if others > 1:
        saved = state * (1 - 1 / others)
        yield (
            saved,
            f"config.mesh.data=1, config.mesh.fsdp={mesh['fsdp'] * others}: parameters and "
            f"optimizer state take {saved / GIB:.2f} GiB less a chip",
        )
    if config.optimizer.first_moment_dtype is None and config.model.param_dtype == "float32":
        saved = facts["optimizer"] / 4
        yield (
            saved,
            f"config.optimizer.first_moment_dtype='bfloat16': {saved / GIB:.2f} GiB less a chip",
        )
    if config.model.param_dtype == "float32":
        yield (
            state / 2,
            "config.model.param_dtype='bfloat16': parameters, moments and gradients take half "
            f"({state / 2 / GIB:.2f} GiB less for the first two)",
        )


def _fewer_activations(report: Report, failing: list[dict]) -> Iterator[Change]:
    """List changes of the arrays between the layers, and of the states of forks."""
    mesh, config = report.mesh, report.config
    largest = max(failing, key=lambda program: program["memory"]["peak"])
    temporaries = largest["memory"]["temporaries"]
    shared = mesh["data"] * mesh["fsdp"]
    if config.phase == "testtime":
        section, rows = "testtime", config.testtime.micro_batch // shared
    else:
        section, rows = "train", min(config.train.micro_batch, config.train.mini_batch // shared)
    if rows > 1:
        fewer = rows // 2 * (shared if section == "testtime" else 1)
        yield (
            temporaries * (1 - rows // 2 / rows),
            f"config.{section}.micro_batch_size={fewer}: {rows // 2} of {rows} rows a chip at "
            "a time, and as much less for activations",
        )
    differentiated = [p["memory"]["temporaries"] for p in failing if p["name"] in _DIFFERENTIATED]
    if differentiated and config.model.remat != "full":
        yield (
            max(differentiated) * 0.6,
            "config.model.remat='full': a layer keeps only its input for the backward pass "
            f"(now {config.model.remat!r})",
        )
    if rows <= 1:
        yield from _shared_rows(report, section, temporaries, largest.get("states", 0))


def _shared_rows(
    report: Report, section: str, temporaries: float, states: float
) -> Iterator[Change]:
    """Give a row twice as many chips, which divide its tokens or its heads.

    section: that says how many rows are read at a time. states: bytes of decode states on a chip;
    they are made of heads, so that `tensor` divides them and `sequence` does not.
    """
    mesh, config = report.mesh, report.config
    given = next((name for name in ("fsdp", "data") if mesh[name] % 2 == 0), None)
    if given is None:
        return
    # There are half as many places for rows then, but still one row at each.
    if section == "testtime":
        micro_batch, rows = config.testtime.micro_batch, mesh["data"] * mesh["fsdp"] // 2
    else:
        micro_batch, rows = config.train.micro_batch, 1
    fewer = "" if micro_batch <= rows else f", config.{section}.micro_batch_size={rows}"
    # The loop over a rollout's tokens reads states and writes others.
    held = min(2 * states, temporaries)
    rest = temporaries - held
    whole = ", but have all of the decode states of its forks" if states else ""
    less = f"; decode states of forks take at least {states / 2 / GIB:.2f} GiB less a chip"
    for axis, saved, what in (
        ("tensor", held / 2 + rest / 3, f"heads, MLP and vocabulary{less if states else ''}"),
        ("sequence", rest / 2, f"the tokens of a row{whole}"),
    ):
        sizes = mesh | {axis: 2 * mesh[axis], given: mesh[given] // 2}
        if _divides(report, sizes):
            yield (
                saved,
                f"config.mesh.{axis}={sizes[axis]} with {given}={sizes[given]}{fewer}: "
                f"{sizes[axis]} chips share {what}",
            )


def _divides(report: Report, sizes: Mapping[str, int]) -> bool:
    """Tell whether a mesh of these sizes can run the model."""
    model = model_config(report.facts["model"])
    try:
        check_fits(sizes, tokens=report.config.data.sequence_length, model=model)
    except ConfigError:
        return False
    return True


def _smaller_generation(report: Report, failing: list[dict]) -> Iterator[Change]:
    """List changes of how prompts are read and answered."""
    config = report.config
    for program in failing:
        half = program["memory"]["temporaries"] / 2
        if program["name"] == "prefill":
            tokens = config.generation.prefill_tokens // 2
            yield (
                half,
                f"config.generation.prefill_tokens={tokens}: prompts are read in smaller parts",
            )
        if program["name"] == "decode":
            section = "testtime" if config.phase == "testtime" else "evaluate"
            yield half, f"a smaller config.{section}.batch_size: fewer states at once"
