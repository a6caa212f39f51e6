"""What devices tell each other about a sequence: halos and composed summaries."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sequences import AXIS, assert_equal, over_devices, tokens_at, with_gradients

from refine_jax.kernels.sequence import exclusive_prefix, halo


def test_halos_reach_over_several_devices():
    x = jnp.arange(2 * 24 * 3, dtype=jnp.float32).reshape(2, 24, 3)
    for rows in (1, 6, 7, 14, 23, 30):

        def plain(x, rows=rows):
            padded = jnp.pad(x, ((0, 0), (rows, 0), (0, 0)))
            return jnp.concatenate([padded[:, s : s + rows] for s in (0, 6, 12, 18)], axis=1)

        spread = over_devices(
            lambda x, rows=rows: halo(x, rows, AXIS), 4, tokens_at(1), tokens_at(1)
        )
        assert_equal(with_gradients(spread, x), with_gradients(plain, x), 1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_prefixes_keep_their_order(count, reverse):
    matrices = jnp.asarray(np.random.default_rng(0).normal(size=(count, 2, 2)), jnp.float32)
    first = jnp.asarray([[1.0, 2.0], [3.0, 5.0]])

    def plain(matrices, first):
        outs = [first]
        for matrix in (matrices[::-1] if reverse else matrices)[:-1]:
            outs.append(matrix @ outs[-1])
        return jnp.stack(outs[::-1] if reverse else outs)

    def composed(matrix, first):
        def combine(earlier, later):
            return later @ earlier

        return exclusive_prefix(combine, matrix[0], first, AXIS, reverse=reverse)[None]

    spread = over_devices(composed, count, (P(AXIS), P()), P(AXIS))
    got = with_gradients(spread, matrices, first)
    assert_equal(got, with_gradients(plain, matrices, first), 1e-6)
