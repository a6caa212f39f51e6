"""Window attention over the tokens of several devices: equal to one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sequences import AXIS, assert_equal, over_devices, tokens_at, with_gradients

from refine_jax.kernels.window_attention import pallas_tpu, splash, window_attention


def draw(length, count, seed=0, heads=2, dim=4):
    rng = np.random.default_rng(seed)
    shape = (count, 2, heads, length, dim)
    return [jnp.asarray(x) for x in rng.standard_normal(shape, np.float32)]


def packed(length):
    """Padding on both sides and between; documents that end at borders of blocks and within."""
    segments = np.zeros((2, length), np.int32)
    half, eighth = length // 2, length // 8
    segments[0, 3:half], segments[0, half : length - eighth - 1] = 1, 2
    segments[1, : eighth + 1], segments[1, 3 * eighth :] = 1, 2
    return jnp.asarray(segments)


# Windows of two tokens, inside a block, over several, and longer than the row.
@pytest.mark.parametrize(
    ("count", "length", "window", "implementation", "with_ids"),
    [
        (2, 64, 2, "xla", True),
        (2, 300, 9, "xla", True),
        (8, 64, 9, "xla", False),
        (8, 64, 30, "xla", True),
        (4, 48, 100, "xla", True),
        (2, 512, 70, "splash", False),  # in two pieces
        (4, 256, 150, "splash", True),
        (2, 512, 70, "pallas_tpu", False),
        (4, 256, 150, "pallas_tpu", True),
    ],
)
def test_equals_one_device(monkeypatch, count, length, window, implementation, with_ids):
    monkeypatch.setattr(splash, "_SPLASH_TOKENS", 128)
    monkeypatch.setattr(pallas_tpu, "_BLOCK", 128)
    ids = packed(length) if with_ids else None

    def run(ids, *arrays, axis_name=None):
        return window_attention(
            *arrays, window, ids, implementation=implementation, axis_name=axis_name
        )

    spread = over_devices(
        lambda ids, *arrays: run(ids, *arrays, axis_name=AXIS),
        count,
        (tokens_at(1), *[tokens_at(2)] * 3),
        tokens_at(2),
    )
    arrays = draw(length, 3)

    with jax.default_matmul_precision("highest"):
        got, want = (with_gradients(lambda *x, f=f: f(ids, *x), *arrays) for f in (spread, run))
    assert_equal(got, want)


def test_cudnn_takes_whole_rows():
    x = draw(64, 1)[0].astype(jnp.bfloat16)
    spread = over_devices(
        lambda x: window_attention(x, x, x, 8, implementation="cudnn", axis_name=AXIS),
        2,
        tokens_at(2),
        tokens_at(2),
    )
    with pytest.raises(ValueError, match=r"'cudnn': it takes whole rows.*axis_name.*Use 'xla'"):
        spread(x)
