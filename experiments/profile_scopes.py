"""Shares of a training step that selection, fork, rollout, score and update take, from a trace.

Reads what `train.profile` wrote, by xprof (`pip install xprof`), on any device:

    python -m refine_jax.main --config=configs/demo.py --workdir=runs/demo \\
        --config.train.profile=50:52
    python experiments/profile_scopes.py runs/demo

An operation counts for the innermost scope that it was made in; `update` is all of a step that is
in none of the others: forward and backward passes, head, optimizer. Operations that contain others,
such as loops, count by what is in them. The last line is JSON.
"""

import argparse
import collections
import json
import re
import sys
from pathlib import Path

import jax

SCOPES = ("selection", "fork", "rollout", "score", "update")


def scopes_of(program: str) -> dict[str, str | None]:
    """Innermost scope of each instruction of a program, an HloProto as text; None: in none."""
    scopes: dict[str, str | None] = {}
    name = None
    for line in program.splitlines():
        # Four spaces are the fields of an instruction or of a program's part; six, its metadata.
        if line.startswith("      name: ") and (found := re.match(r' {6}name: "(.*)"$', line)):
            name = found[1]
        elif "op_name: " in line and name is not None:
            path = re.findall(r"\w+", line.split("op_name: ", 1)[1])
            scopes[name] = next((word for word in reversed(path) if word in SCOPES), None)
            name = None
    return scopes


def contains_others(event: str) -> bool:
    """Whether the time of an operation is that of others, which stand in the trace themselves."""
    return event.startswith(("while", "call", "conditional"))


def shares(folder: Path) -> dict[str, float]:
    """Seconds of each scope in the newest trace of a run's folder, and of what is in none."""
    try:
        from xprof.convert import raw_to_tool_data
    except ImportError:
        sys.exit("traces are read by the package xprof: pip install -e '.[profile]'")
    files = sorted(folder.glob("profile/**/*.xplane.pb"))
    if not files:
        sys.exit(f"{folder} has no trace: train with --config.train.profile=FIRST:LAST.")
    raw_to_tool_data.xspace_to_tool_names([str(files[-1])])  # unpacks the programs, too
    trace = jax.profiler.ProfileData.from_file(str(files[-1]))
    seconds: collections.Counter = collections.Counter()
    programs: dict[str, dict[str, str | None]] = {}
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" not in stats or contains_others(event.name):
                    continue
                program = f"{stats['hlo_module']}({stats['program_id']})"
                if program not in programs:
                    options = {"type": "pbtxt", "module_name": program}
                    text, _ = raw_to_tool_data.xspace_to_tool_data(
                        [str(files[-1])], "graph_viewer", {"graph_viewer_options": options}
                    )
                    programs[program] = scopes_of(bytes(text).decode())
                scope = programs[program].get(stats["hlo_op"])
                seconds[scope or "no scope"] += event.duration_ns / 1e9
    return dict(seconds)


def main() -> None:
    """Print a table of the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="work folder of a run with a trace")
    seconds = shares(parser.parse_args().folder)
    total = sum(seconds.values())
    for name in (*SCOPES, "no scope"):
        part = seconds.get(name, 0.0)
        print(f"{name:12} {part:10.4f} s {100 * part / total:6.1f} %")
    print(json.dumps({"seconds": seconds, "shares": {n: s / total for n, s in seconds.items()}}))


if __name__ == "__main__":
    main()
