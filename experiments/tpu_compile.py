"""Compile one case of `tpu_cases.py` ahead of time for a TPU that need not be there.

    python experiments/tpu_compile.py CASE IMPLEMENTATION TOPOLOGY OUT

`tpu_kernels.py` runs this in a process of its own, since a fault inside libtpu ends the process.
OUT receives one JSON object: {"vmem_bytes": scoped VMEM of the largest Pallas kernel} or
{"error": why}. libtpu is that of the environment, or the file TPU_LIBRARY_PATH names.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path

# What libtpu must be told where there is no TPU: no lock file, no cloud metadata server, no logs.
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1"[^}]*"size":"(\d+)"')


def describe(topology: str):
    """The device to compile for; `topology` as v6e:1x1, a single chip."""
    from jax.experimental import topologies

    options = {"chips_per_host_bounds": [1, 1, 1]}
    if topology.startswith("v4"):
        options["chip_config_name"] = "megacore"  # both cores are one device
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    return found.devices[0]


def compile_case(name: str, implementation: str, topology: str) -> None:
    """Compile; what is wrong with the program is raised."""
    import jax
    import tpu_cases
    from refine_jax.kernels.device import compiled_for

    target = describe(topology)
    sharding = jax.sharding.SingleDeviceSharding(target)
    described = jax.sharding.AbstractDevice(target.device_kind, target.num_cores, platform="tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=described)
    # Kernels ask the mesh for the generation of the TPU.
    with compiled_for("tpu"), jax.sharding.use_abstract_mesh(mesh):
        function, args = tpu_cases.case(name, implementation)
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
        )
        lowered = function.lower(*placed)
    lowered.compile()


def largest_kernel(folder: str) -> int:
    """Scoped VMEM in bytes of the largest Pallas kernel in XLA's dumps in `folder`; 0 if none."""
    sizes = [0]
    for path in Path(folder).glob("*after_codegen.txt"):
        for line in path.read_text(errors="replace").splitlines():
            if 'custom_call_target="tpu_custom_call"' in line and (found := _VMEM.search(line)):
                sizes.append(int(found[1]))
    return max(sizes)


def main(name: str, implementation: str, topology: str, out: str) -> None:
    """Compile the case and write `out`."""
    os.environ.update(SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_dump_to={folder}".strip()
        try:
            compile_case(name, implementation, topology)
            report = {"vmem_bytes": largest_kernel(folder)}
        except Exception as error:
            report = {"error": f"{type(error).__name__}: {error}"}
    Path(out).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
