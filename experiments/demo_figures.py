"""README's figures of the demo, from a run of it:

    python -m refine_jax.main --config=configs/demo.py --workdir=runs/demo
    python experiments/demo_figures.py runs/demo

writes what README.md quotes to experiments/demo.json, with the versions it was measured with, and
prints the text, which goes into README.md as it is (tests/test_docs.py compares).
"""

import json
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from refine_jax.report.metrics import RESULTS_FILE

FILE = Path(__file__).with_name("demo.json")
KEPT = ("seconds", "processor_seconds", "scores", "differences", "adapted")
ARMS = {"before": "before", "ntp": "next-token training", "refine": "ReFINE"}
ROWS = (
    ("held-out loss (nats)", "validation_loss", "{:.4f}"),
    ("held-out reward (rollouts right as a whole)", "validation_reward", "{:.3f}"),
)


def figures(workdir: Path) -> dict[str, Any]:
    """What README quotes of the demo's run in `workdir`, as JSON values."""
    results = json.loads((workdir / RESULTS_FILE).read_text(encoding="utf-8"))
    names = {f"{name}_{when}" for _, name, _ in ROWS for when in ("before", "after")}
    names |= {"steps"}
    return {
        "python": platform.python_version(),
        "jax": metadata.version("jax"),
        **{name: results[name] for name in KEPT},
        "training": {
            arm: {name: found[name] for name in sorted(names)}
            for arm, found in results["training"].items()
        },
    }


def text(run: Mapping[str, Any]) -> str:
    """The paragraph and the table of README.md."""
    training, (scores,) = run["training"], run["scores"].values()
    cells = [f"{100 * scores[arm]:.1f} %" for arm in ARMS]
    table = [f"| | {' | '.join(ARMS.values())} |", "|---|---|---|---|"]
    table.append(f"| facts recalled | {' | '.join(cells)} |")
    for label, name, form in ROWS:
        values = [training["ntp"][f"{name}_before"]]
        values += [training[arm][f"{name}_after"] for arm in ("ntp", "refine")]
        table.append(f"| {label} | {' | '.join(map(form.format, values))} |")
    (difference,), (adapted,) = run["differences"], run["adapted"]
    return (
        f"From a run of {run['processor_seconds']:.0f} s of processor time, most of it compilation "
        f"(Python {run['python']}, jax {run['jax']}),\n"
        f"with {training['ntp']['steps']} steps an arm:\n\n"
        + "\n".join(table)
        + f"\n\nReFINE minus next-token training: {_points(difference)}\n"
        f"Trained on the prompt minus not: {_points(adapted)}"
    )


def _points(found: Mapping[str, Any]) -> str:
    difference, low, high = (100 * found[name] for name in ("difference", "low", "high"))
    return (
        f"{difference:+.1f} points of recall (95 % interval {low:+.1f} to {high:+.1f}, "
        f"{found['samples']} questions)."
    )


def main() -> None:
    """Keep the figures of the run that the command names, and print the text."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    run = figures(Path(sys.argv[1]))
    FILE.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    print(text(run))


if __name__ == "__main__":
    main()
