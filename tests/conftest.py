"""Settings that must stand before jax starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The programs of these tests are tiny and many: unoptimised machine code computes the same numbers
# and compiles three times as fast.
_FAST_COMPILATION = "--xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FAST_COMPILATION}".strip()
