"""LaCT's fast weights over the tokens of several devices: equal to one device."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P
from sequences import AXIS, assert_equal, over_devices, tokens_at, with_gradients

from refine_jax.kernels.lact import Options, lact
from refine_jax.kernels.lact.specs import LaCTSpec

_COMMON = {"chunks": 8, "chunk": 8, "batch": 2}
# Two heads: pairs of devices exchange slots for heads, two devices need no more. Else none do.
ALL = LaCTSpec("all", masked=True, empty=1, resets=True, **_COMMON)
PRENORM = LaCTSpec(
    "prenorm", options=Options(prenorm=True), masked=True, rate_channels=6, resets=True, **_COMMON
)
PLAIN = LaCTSpec("plain", momentum=False, hidden=9, **_COMMON | {"batch": 1, "heads": 3})
FUSED = LaCTSpec(
    "fused_muon",
    options=Options(muon="float32", fused=True),
    hidden=4,
    **_COMMON | {"chunks": 4, "heads": 1},
)


def value_and_gradients(spec, count):
    """With `count` None on one device."""
    arrays, keywords = spec.arguments()
    mask, reset = (keywords.get(name) for name in ("mask", "reset"))

    def run(fixed, arrays, axis_name=None):
        mask, reset = fixed
        out, states = lact(
            *arrays,
            mask=mask,
            reset=reset,
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
            ((tokens_at(2), P()), (*[slots] * 5, P())),
            (slots, tokens_at(1)),
        )
    return with_gradients(lambda arrays: run((mask, reset), arrays), arrays)


@pytest.mark.parametrize(
    ("count", "spec"),
    [(8, ALL), (2, PRENORM), (4, PLAIN), (2, FUSED)],
    ids=lambda x: getattr(x, "name", x),
)
def test_equals_one_device(count, spec):
    # Newton-Schulz amplifies rounding.
    tolerance = 1e-4 if spec.options.muon else 1e-5
    assert_equal(value_and_gradients(spec, count), value_and_gradients(spec, None), tolerance)


def sizes(jaxpr, local=False):
    """Elements of every array inside the `shard_map`s of a jaxpr: those of one device."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if local:
            yield from (x.aval.size for x in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner, local or name == "shard_map")


def test_no_device_holds_the_states_of_all_chunks():
    """Neither forward nor backward: N / S of its own, and one before each of S blocks."""
    count, spec = 4, dataclasses.replace(PLAIN, chunks=32, chunk=4, batch=1, dim=16, hidden=16)
    (*arrays, weights), _ = spec.arguments()
    slots = tokens_at(3)
    spread = over_devices(
        lambda *x: lact(*x, axis_name=AXIS), count, (*[slots] * 5, P()), (slots, tokens_at(1))
    )

    def total(*arguments):
        return sum(x.sum() for x in jax.tree.leaves(spread(*arguments)))

    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2, 3, 5)))(*arrays, weights)
    own = spec.chunks // count * weights.w0.size
    assert max(sizes(jaxpr.jaxpr)) == own > spec.chunks * spec.heads * spec.dim


def test_errors_name_what_was_got():
    def run(implementation=None, **changes):
        arrays, _ = dataclasses.replace(PLAIN, **changes).arguments()
        over_devices(
            lambda *x: lact(*x, implementation=implementation, axis_name=AXIS)[0],
            4,
            (*[tokens_at(3)] * 5, P()),
            tokens_at(3),
        )(*arrays)

    with pytest.raises(ValueError, match=r"multiple of the devices.*N=6 chunks over 4 devices"):
        run(chunks=6)
    with pytest.raises(ValueError, match="implementation='pallas_tpu', H=3 heads over 4"):
        run("pallas_tpu")
