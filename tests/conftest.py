"""Settings that must stand before jax starts."""

import contextlib
import ctypes
import gc
import math
import os
from importlib import metadata
from pathlib import Path

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
# With it, simulated devices came to wait for each other in different all-gathers (jaxlib 0.10.2).
_IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
# After 40 s, its default, a busy machine may be slow only.
_PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=500"
_FLAGS = [os.environ.get("XLA_FLAGS", ""), *_FAST_COMPILATION, _IN_ORDER, _PATIENCE]
os.environ["XLA_FLAGS"] = " ".join(_FLAGS).strip()

import jax  # noqa: E402
from absl import logging  # noqa: E402
from buckets import bucket  # noqa: E402, F401
from fake_hub import hub  # noqa: E402, F401
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

_COUNTS_PAGES = Path("/proc/self/statm").exists()
_VERBOSITY = logging.get_verbosity()

# Programs are traced into many small objects, which Python's collector would walk over and over:
# rarer collections save a tenth of the time. `forget_programs` collects what is left of a module.
gc.set_threshold(500_000, 20, 50)

# For this process alone: commands that tests start have one device.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session", autouse=True)
def one_device_by_default():
    """Runs of a test's own process use one device, as on a laptop, unless a test makes a mesh."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refine_jax.parallel.default_devices", lambda: jax.devices()[:1])
        yield


@pytest.fixture(autouse=True)
def warnings_are_logged():
    """Commands that a test of this process ran have chosen how much absl logs: start anew."""
    logging.set_verbosity(_VERBOSITY)


@pytest.fixture(scope="session", autouse=True)
def no_words_on_compilation():
    """Whether compilation takes long enough for a line depends on how busy the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refine_jax.compiling.PATIENCE", 3600.0)
        yield


def forget_programs():
    """Let go of what was compiled so far, and give its memory back."""
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # where the C library is another
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_module():
    """A module's programs are let go after it: those of all modules take gigabytes."""
    yield
    forget_programs()


@pytest.fixture
def programs_of_a_test():
    """For tests whose programs are large and their own: let go after each that leaves 2 GB."""
    yield
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if _COUNTS_PAGES else math.inf
    if pages * os.sysconf("SC_PAGE_SIZE") > 2e9:
        forget_programs()


# Workers take files in this order, so that none begins a long one when the others are done.
_LONGEST = (
    "refine/test_mesh.py",
    "models/test_laws.py",
    "refine/test_one_pass.py",
    "models/test_lact_forks.py",
    "phases/test_processes.py",
    "goldens/test_models.py",
)


def pytest_collection_modifyitems(items):
    """The longest files first; `--no-loadscope-reorder` keeps this order among workers."""
    order = {name: index for index, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get("/".join(item.path.parts[-2:]), len(order)))


def pytest_collection_finish():
    """What is imported stays: the collections after each module need not walk over it."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def settings_of_programs_kept():
    """Where jax keeps compiled programs is afterwards as before; jax itself keeps the folder."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture
def programs_kept_elsewhere():
    """For tests that say where compiled programs are kept, as scripts of experiments do."""
    with settings_of_programs_kept():
        yield


@pytest.fixture(scope="session")
def programs_folder(tmp_path_factory):
    """Where `compile_once` keeps compiled programs: one folder for all modules of a worker."""
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def compile_once(programs_folder):
    """Whole runs share their compiled programs, also between new objects and between modules."""
    with settings_of_programs_kept():
        if jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", programs_folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        yield


@pytest.fixture
def simulated_tpu(monkeypatch):
    """Kernels for TPUs run simulated: what they have not written is NaN, as are late copies."""
    from jax.experimental.pallas import tpu as pltpu

    from refine_jax.kernels import tpu

    monkeypatch.setattr(tpu, "interpret_mode", pltpu.InterpretParams)
