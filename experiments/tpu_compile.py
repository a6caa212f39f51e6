"""Compile one case of `tpu_cases.py` ahead of time for a TPU that need not be there.

`tpu_kernels.py` runs this in a process of its own, since a fault inside libtpu ends the process:

    python experiments/tpu_compile.py TASK.json RESULT.json

TASK: {"case", "implementation", "topology"}. RESULT: {"vmem_bytes": scoped VMEM of the largest
Pallas kernel}, or {"error", "message"}. XLA_FLAGS names a folder for XLA's dumps.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from refine_jax.compile_only import child
from refine_jax.compile_only.estimate.chips import parse_topology
from refine_jax.kernels.device import compiled_for

_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1"[^}]*"size":"(\d+)"')


def compile_case(task: dict) -> dict:
    """The figures of a task; what is wrong with the program is raised."""
    import tpu_cases

    device = child.devices_of(parse_topology(task["topology"]))[0]
    sharding = SingleDeviceSharding(device)
    with compiled_for("tpu"), child.ambient(Mesh(np.array([device]), "data")):
        function, args = tpu_cases.case(task["case"], task["implementation"])
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
        )
        lowered = function.lower(*placed)
    lowered.compile()
    return {"vmem_bytes": largest_kernel(child.dump_folder())}


def largest_kernel(folder: Path) -> int:
    """Scoped VMEM in bytes of the largest Pallas kernel in XLA's dumps in `folder`; 0 if none."""
    sizes = [0]
    for path in folder.glob("*after_codegen.txt"):
        for line in path.read_text(errors="replace").splitlines():
            if 'custom_call_target="tpu_custom_call"' in line and (size := _VMEM.search(line)):
                sizes.append(int(size[1]))
    return max(sizes)


if __name__ == "__main__":
    child.main(*sys.argv[1:], work=compile_case)
