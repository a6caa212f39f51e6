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

from refine_jax.report.metrics import METRICS_FILE, RESULTS_FILE, read_metrics

FILE = Path(__file__).with_name("demo.json")
ROWS = (
    ("held-out loss (nats)", "eval/loss", "{:.3f}"),
    ("held-out accuracy", "eval/accuracy", "{:.1%}"),
    ("held-out reward (cosine)", "eval/reward", "{:.3f}"),
)


def figures(workdir: Path) -> dict[str, Any]:
    """What README quotes of the demo's run in `workdir`, as JSON values."""
    evaluated = [r for r in read_metrics(workdir / METRICS_FILE) if "eval/loss" in r]
    results = json.loads((workdir / RESULTS_FILE).read_text(encoding="utf-8"))
    return {
        "python": platform.python_version(),
        "jax": metadata.version("jax"),
        "seconds_total": results["seconds_total"],
        "step_seconds_ntp": results["step_seconds_ntp"],
        "step_seconds_refine": results["step_seconds_refine"],
        "evaluations": [{n: r[n] for n in ("step", *(row[1] for row in ROWS))} for r in evaluated],
    }


def text(run: Mapping[str, Any]) -> str:
    """The paragraph and the table of README.md."""
    at = {record["step"]: record for record in run["evaluations"]}
    table = [
        "| | at random | after 30 next-token steps | after 30 ReFINE steps |",
        "|---|---|---|---|",
    ]
    for label, name, form in ROWS:
        values = (form.format(at[step][name]).replace("%", " %") for step in (0, 30, 60))
        table.append(f"| {label} | {' | '.join(values)} |")
    minutes, seconds = divmod(round(run["seconds_total"]), 60)
    return (
        f"From a run on two cores (Python {run['python']}, whose library is the data, jax "
        f"{run['jax']}):\n{minutes} min {seconds} s of training, "
        f"{run['step_seconds_ntp']:.1f} s a next-token step and "
        f"{run['step_seconds_refine']:.1f} s a ReFINE step,\non 12 held-out rows:\n\n"
        + "\n".join(table)
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
