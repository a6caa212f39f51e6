"""The kind of device that programs are made for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

_target: str | None = None


def backend() -> str:
    """The kind of device that programs run on, or are compiled for: "cpu", "gpu" or "tpu".

    All choices between implementations ask here. It is jax's default backend, unless
    `compiled_for` says that another machine will run what is traced.
    """
    return jax.default_backend() if _target is None else _target


@contextlib.contextmanager
def compiled_for(name: str) -> Iterator[None]:
    """Within it, `backend` is `name`, whatever devices this machine has.

    What jax has traced before keeps the choices of that time.
    """
    global _target
    before, _target = _target, name
    try:
        yield
    finally:
        _target = before
