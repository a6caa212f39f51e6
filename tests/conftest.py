"""Settings that must stand before jax starts."""

import os
from importlib import metadata

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The programs of these tests are tiny and many: unoptimised machine code computes the same numbers
# and compiles several times as fast.
_FAST_COMPILATION = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if metadata.version("jaxlib").startswith("0.10."):
    _FAST_COMPILATION.append("--xla_cpu_use_fusion_emitters=false")  # later ones lack the flag
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FAST_COMPILATION]).strip()

# Interpreted kernels take seconds each to compile. These cases pass through all of their code; the
# others differ in shapes and combinations, and run where REFINE_EVERY_KERNEL_CASE is set.
_KERNEL_CASES = (
    "test_implementation_equals_reference[pallas_tpu-ungated_17-float32]",
    "test_implementation_equals_reference[pallas_tpu-value_groups-float32]",
    "test_implementation_equals_reference[pallas_tpu-normalized-float32]",
    "test_implementation_equals_reference[pallas_tpu-gated-bfloat16]",
    "test_implementation_equals_reference[pallas_gpu-value_groups-float32]",
    "test_implementation_equals_reference[pallas_gpu-gated-bfloat16]",
    "test_matches_the_specification[masked_reset-pallas_tpu]",
    "test_matches_the_specification[muon-pallas_tpu]",
    "test_matches_the_specification[masked_reset-pallas_gpu]",
    "test_bfloat16_operands[pallas_tpu]",
)
_SLOW_KERNEL_TESTS = (
    "test_blocks_of_tokens_and_little_memory",
    "test_tiles_of_the_hidden_axis",
    "test_lact_of_several_blocks",
)


def pytest_collection_modifyitems(items):
    if os.environ.get("REFINE_EVERY_KERNEL_CASE"):
        return
    skip = pytest.mark.skip(reason="a further kernel case: set REFINE_EVERY_KERNEL_CASE=1")
    for item in items:
        further = "pallas_" in item.name and item.name not in _KERNEL_CASES
        if further or item.name.partition("[")[0] in _SLOW_KERNEL_TESTS:
            item.add_marker(skip)
