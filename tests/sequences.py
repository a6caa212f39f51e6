"""Ops over several simulated devices, a block of the tokens each, and how they are compared."""

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

AXIS = "sequence"


def over_devices(function, count, in_specs, out_specs):
    """`function` of local arrays, mapped over `count` devices along the axis "sequence"."""
    mesh = Mesh(np.array(jax.devices()[:count]), (AXIS,))
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def tokens_at(axis):
    """The spec of an array whose tokens lie along `axis`."""
    return P(*[None] * axis, AXIS)


def with_gradients(function, *arguments):
    """Outputs of `function`, and the gradients of a random weighted sum of all of them."""
    rng = np.random.default_rng(1)
    weights = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32), jax.eval_shape(function, *arguments)
    )

    @jax.jit
    def run(weights, *arguments):
        outs, pullback = jax.vjp(function, *arguments)
        return outs, pullback(weights)

    return run(weights, *arguments)


def assert_equal(got, want, tolerance=1e-5):
    """Every leaf within `tolerance` of its RMS, and every number of it of its largest."""
    flat, tree = jax.tree_util.tree_flatten_with_path(want)
    assert jax.tree.structure(got) == tree
    for (path, b), a in zip(flat, jax.tree.leaves(got), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        scale = np.sqrt(np.mean(b**2)) + 1e-30
        name = jax.tree_util.keystr(path)
        error = np.sqrt(np.mean((a - b) ** 2)) / scale
        assert error <= tolerance, f"{name}: {error:.2e}"
        largest = np.max(np.abs(a - b)) / max(scale, np.max(np.abs(b)))
        assert largest <= tolerance, f"{name}: {largest:.2e} of the largest"
