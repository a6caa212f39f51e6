"""The delta rule over the tokens of several devices: equal to one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sequences import AXIS, assert_equal, over_devices, tokens_at, with_gradients

from refine_jax.kernels.delta_rule import delta_rule
from refine_jax.kernels.delta_rule.specs import DeltaSpec

_COMMON = {"tokens": 64, "initial_state": True, "chunk_size": 8}
UNGATED = DeltaSpec("ungated", beta_max=2.0, save_every=16, **_COMMON)
GATED = DeltaSpec("gated", value_heads=4, gated=True, save_every=8, **_COMMON)
DOCUMENTS = dataclasses.replace(GATED, name="documents", documents=4, normalize=True)
KERNEL = dataclasses.replace(
    DOCUMENTS, tokens=32, heads=1, value_heads=2, chunk_size=16, save_every=16
)


def documents(spec, count):
    """Starts at the borders of blocks, in their midst, and blocks without any; [B, T]."""
    block = spec.tokens // count
    starts = np.zeros((spec.batch, spec.tokens), bool)
    starts[0, [block, block + 3]] = True
    starts[1, [2, spec.tokens - block]] = True
    return jnp.asarray(np.cumsum(starts, axis=1) + 1, jnp.int32)


@pytest.mark.parametrize(
    ("count", "spec", "implementation"),
    [
        (2, DOCUMENTS, "reference"),
        (2, KERNEL, "pallas_tpu"),
        (4, UNGATED, "xla"),
        (8, GATED, "xla"),
        (8, DOCUMENTS, "xla"),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_equals_one_device(count, spec, implementation):
    arrays, options = spec.arguments()
    options |= {"implementation": implementation}
    document = documents(spec, count) if spec.documents > 1 else None
    arrays.pop("document", None)
    names = tuple(arrays)

    def run(document, *arrays, axis_name=None):
        arrays = dict(zip(names, arrays, strict=True))
        return delta_rule(**arrays, document=document, **options, axis_name=axis_name)

    specs = [P() if name == "initial_state" else tokens_at(1) for name in names]
    spread = over_devices(
        lambda document, *arrays: run(document, *arrays, axis_name=AXIS),
        count,
        (tokens_at(1), *specs),
        (tokens_at(1), P(), tokens_at(1)),
    )
    got, want = (
        with_gradients(lambda *x, f=f: f(document, *x), *arrays.values()) for f in (spread, run)
    )
    assert_equal(got, want)


def test_state_alone_of_a_sequence():
    arrays, options = GATED.arguments()
    arrays["q"] = None

    def run(axis_name, arrays):
        return delta_rule(**arrays, **options, axis_name=axis_name)[1]

    specs = {name: P() if name == "initial_state" else tokens_at(1) for name in arrays}
    spread = over_devices(lambda x: run(AXIS, x), 4, (specs,), P())
    assert_equal(jax.jit(spread)(arrays), jax.jit(lambda x: run(None, x))(arrays))


def test_blocks_end_where_states_are_saved():
    arrays, options = dataclasses.replace(GATED, save_every=32).arguments()
    del arrays["initial_state"]
    block = {name: x[:, :16] for name, x in arrays.items()}
    run = over_devices(lambda x: delta_rule(**x, **options, axis_name=AXIS)[0], 4, P(), P())
    with pytest.raises(ValueError, match=r"multiple of save_every .*save_every=32.*'sequence'"):
        run(block)
