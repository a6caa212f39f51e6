"""What a run needs of a TPU slice, found by compiling it ahead of time where there is no TPU."""

from refine_jax.compile_only.command import run

__all__ = ["run"]
