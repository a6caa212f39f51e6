"""LaCT's fast weights over the tokens of several devices: equal to one device."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P
from refine_jax.kernels.lact import Options, lact
from refine_jax.kernels.lact.specs import Spec
from sequences import AXIS, assert_equal, over_devices, tokens_at, with_gradients

_COMMON = {"chunks": 8, "chunk": 8, "batch": 2}
ALL = Spec("all", masked=True, empty=1, resets=True, carried=True, row_weights=True, **_COMMON)
PRENORM = Spec(
    "prenorm", options=Options(prenorm=True), masked=True, rate_channels=6, resets=True, **_COMMON
)
PLAIN = Spec("plain", momentum=False, hidden=9, **_COMMON | {"batch": 1})
FUSED = Spec(
    "fused_muon", options=Options(muon="float32", fused=True), hidden=4, **_COMMON | {"chunks": 4}
)


def value_and_gradients(spec, count):
    """With `count` None on one device."""
    arrays, keywords = spec.arguments()
    mask, reset = (keywords.get(name) for name in ("mask", "reset"))

    def run(fixed, arrays, carry, axis_name=None):
        mask, reset = fixed
        out, states = lact(
            *arrays,
            mask=mask,
            reset=reset,
            carry=carry,
            options=spec.options,
            axis_name=axis_name,
        )
        if mask is not None:  # the output of masked slots is undefined
            out = jax.numpy.where(mask[:, :, None, :, None], out, 0)
        return out, states

    if count is not None:
        slots = tokens_at(3)
        run = over_devices(
            lambda *x, run=run: run(*x, axis_name=AXIS),
            count,
            ((tokens_at(2), P()), (*[slots] * 5, P()), P()),
            (slots, tokens_at(1)),
        )
    return with_gradients(
        lambda arrays, carry: run((mask, reset), arrays, carry), arrays, keywords.get("carry")
    )


@pytest.mark.parametrize(
    ("count", "spec"),
    [(8, ALL), (4, PRENORM), (2, PLAIN), (2, FUSED)],
    ids=lambda x: getattr(x, "name", x),
)
def test_equals_one_device(count, spec):
    # Newton-Schulz amplifies rounding.
    tolerance = 1e-4 if spec.options.muon else 1e-5
    assert_equal(value_and_gradients(spec, count), value_and_gradients(spec, None), tolerance)


def test_errors_name_what_was_got():
    arrays, _ = dataclasses.replace(PLAIN, chunks=6).arguments()

    def run(implementation=None):
        spread = over_devices(
            lambda *x: lact(*x, implementation=implementation, axis_name=AXIS)[0],
            4,
            (*[tokens_at(3)] * 5, P()),
            tokens_at(3),
        )
        spread(*arrays)

    with pytest.raises(ValueError, match=r"multiple of the devices.*N=6 chunks over 4 devices"):
        run()
    with pytest.raises(ValueError, match="implementation='pallas_tpu'"):
        run("pallas_tpu")
