"""What devices tell each other when a sequence is cut into blocks of tokens, one a device.

For use inside `jax.shard_map` over the mesh axis `axis_name`, along which the blocks follow each
other: device s of S holds tokens [s T / S, (s + 1) T / S). All of it is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Tree = TypeVar("Tree", bound=Any)

# Name (`jax.ad_checkpoint`) of what devices found out together and is small: worth keeping where
# all else is computed again.
KEPT = "sequence"


def shift(x: Tree, hops: int, axis_name: str) -> Tree:
    """`x` of the device `hops` before this one (behind it if negative); zeros where none is."""
    size = lax.axis_size(axis_name)
    pairs = [(i, i + hops) for i in range(size) if 0 <= i + hops < size]
    if not pairs:
        return jax.tree.map(jnp.zeros_like, x)
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, axis_name, pairs), x)


def halo(x: jax.Array, rows: int, axis_name: str, axis: int = 1) -> jax.Array:
    """Fetch the `rows` >= 1 entries along `axis` that stand before this device's block x [...].

    They come from as many devices as they reach over, each in one hop. Zeros stand for what would
    be before the first block.
    """
    block = x.shape[axis]
    parts = []
    for hops in range(-(-rows // block), 0, -1):
        taken = min(block, rows - (hops - 1) * block)
        last = lax.slice_in_dim(x, block - taken, block, axis=axis)
        parts.append(shift(last, hops, axis_name))
    return jnp.concatenate(parts, axis=axis)


def exchange(
    x: Tree,
    axis_name: str,
    *,
    split: int,
    join: int,
    members: list[list[int]] | None = None,
) -> Tree:
    """Every device gets its part of axis `split` from all, side by side along axis `join`.

    members: groups of devices that exchange among themselves; None: all do.
    """
    return jax.tree.map(
        lambda leaf: lax.all_to_all(
            leaf,
            axis_name,
            split_axis=split,
            concat_axis=join,
            axis_index_groups=members,
            tiled=True,
        ),
        x,
    )


def join_softmax(
    out: jax.Array, log_total: jax.Array, axis_name: str
) -> tuple[jax.Array, jax.Array]:
    """Attention to whole rows, of what each device found in its part of them.

    out: [..., L], by a softmax whose denominator has the log `log_total` [...]; where a device sees
    nothing, that is far below that of others. Returns both of the whole rows, on all devices.
    """
    top = lax.pmax(lax.stop_gradient(log_total), axis_name)
    weight = jnp.exp(log_total - top)
    total = lax.psum(weight, axis_name)
    out = lax.psum(weight[..., None] * out, axis_name) / total[..., None]
    return out, top + jnp.log(total)


def own_part(x: Tree, axis_name: str, axis: int) -> Tree:
    """This device's part along `axis` of arrays that are the same on all devices."""

    def part(leaf):
        size = leaf.shape[axis] // lax.axis_size(axis_name)
        return lax.dynamic_slice_in_dim(leaf, lax.axis_index(axis_name) * size, size, axis=axis)

    return jax.tree.map(part, x)


def exclusive_prefix(
    combine: Callable[[Tree, Tree], Tree],
    element: Tree,
    first: Tree,
    axis_name: str,
    *,
    reverse: bool = False,
) -> Tree:
    """`first` combined with the elements of all devices before this one, in their order.

    combine: associative, of (earlier, later). first: what the first device gets; the same tree as
    `element`, and only the first device's is used. reverse: the last device counts as the first.
    Doubles the distance in every round: 1 + ceil(log2 S) of them, no chain of waiting devices.
    """
    size = lax.axis_size(axis_name)
    place = lax.axis_index(axis_name)
    if reverse:
        place = size - 1 - place
    direction = -1 if reverse else 1

    def choose(condition, one, other):
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)

    element = choose(place == 0, first, shift(element, direction, axis_name))
    reach = 1
    while reach < size:
        earlier = shift(element, direction * reach, axis_name)
        element = choose(place >= reach, combine(earlier, element), element)
        reach *= 2
    return element
