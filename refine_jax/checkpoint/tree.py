"""A pytree as named arrays: names, comparison with what a file holds, fingerprints.

Checkpoints store a pytree as {name: array}, a leaf's name being its path joined by dots
(`params.layers.attn.qkv.weight`, `opt_state.0.mu.norm.weight`). So what is missing, unknown or of
another shape can be said by name, and a part of a checkpoint can be read without the rest.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from refine_jax.checkpoint.streams import streamed
from refine_jax.models.config import Architecture, model_config
from refine_jax.models.transformer import Model

PyTree = Any


def flatten(tree: PyTree) -> dict[str, Any]:
    """Name the leaves of `tree`, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    if len(named) != len(leaves):
        raise ValueError("Two leaves of the tree have the same name: a key must hold no dot.")
    return named


def unflatten(tree: PyTree, named: Mapping[str, Any]) -> PyTree:
    """Put the leaves of `named` into the structure of `tree`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [named[name] for name in flatten(tree)])


def nest(named: Mapping[str, Any]) -> dict:
    """Make a nested dict of dotted names."""
    root: dict = {}
    for name, leaf in named.items():
        *parents, last = name.split(".")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return root


def differences(expected: Mapping[str, tuple], got: Mapping[str, tuple]) -> list[str]:
    """Describe in a line every name that is missing, unknown or has another shape.

    expected, got: shapes by name.
    """
    lines = []
    for name in sorted(expected.keys() | got.keys()):
        if name not in got:
            lines.append(f"{name}: missing, expected {list(expected[name])}")
        elif name not in expected:
            lines.append(f"{name}: unknown, got {list(got[name])}")
        elif tuple(expected[name]) != tuple(got[name]):
            lines.append(f"{name}: expected {list(expected[name])}, got {list(got[name])}")
    return lines


def is_key(leaf: Any) -> bool:
    """Tell whether a leaf (or its abstract value) is a typed random key."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def plain_leaf(leaf: Any) -> Any:
    """Replace a typed random key, also an abstract one, by its data, which a file can hold."""
    if not is_key(leaf):
        return leaf
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.random.key_data(leaf)
    data = jax.eval_shape(jax.random.key_data, leaf)
    # A key's data has one axis more than the key; the sharding of the leading axes still holds.
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def typed_leaf(data: jax.Array, like: Any) -> jax.Array:
    """Undo `plain_leaf` of data [...]; `like` is the original leaf or its abstract value."""
    if not is_key(like):
        return data
    return jax.random.wrap_key_data(data, impl=_key_impl(like.shape, like.dtype))


@functools.cache
def _key_impl(shape: tuple[int, ...], dtype: Any) -> Any:
    # jax.random.key_impl takes arrays and tracers, not abstract values.
    kinds = []
    jax.eval_shape(
        lambda keys: kinds.append(jax.random.key_impl(keys)), jax.ShapeDtypeStruct(shape, dtype)
    )
    return kinds[0]


def fingerprints(named: Mapping[str, Any]) -> dict[str, int]:
    """Compute a 32-bit number of every array, which changes with any change of a single element.

    Storage formats check their indices but not their data: a flipped bit in a file would be loaded
    as another weight. The number is the sum of bits_i * (2 i + 1) modulo 2^32 over the elements'
    bits; odd factors keep every change of one of them. It does not depend on device or sharding.
    """
    numbers = {
        name: _host_fingerprint(leaf) if _on_host(leaf) else _device_fingerprint(leaf)
        for name, leaf in named.items()
    }
    return {name: int(number) for name, number in jax.device_get(numbers).items()}


def _host_fingerprint(leaf: Any) -> int:
    leaf = streamed(leaf)
    if leaf.fingerprint is not None:
        return leaf.fingerprint
    return sum(block_fingerprint(values, start) for start, values in leaf.read()) % 2**32


def _on_host(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and all(d.platform == "cpu" for d in leaf.devices())


def block_fingerprint(x: np.ndarray, begin: int, piece: int = 1 << 20) -> int:
    """Add up the terms of the elements `begin`, `begin` + 1, ... of an array, which are `x`."""
    bits = x.reshape(-1).view(f"uint{8 * min(x.dtype.itemsize, 4)}")
    begin *= bits.size // max(x.size, 1)
    total = 0
    for start in range(0, bits.size, piece):
        part = bits[start : start + piece].astype(np.uint32)
        first = (begin + start) % 2**32
        weights = np.arange(first, first + part.size, dtype=np.uint64).astype(np.uint32)
        weights = weights * np.uint32(2)
        total += int(np.sum(part * (weights + np.uint32(1)), dtype=np.uint32))
    return total % 2**32


@jax.jit
def _device_fingerprint(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * np.uint32(size) + lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def abstract_params(fields: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Describe the parameters of a model with these config.json fields: shapes and dtypes by name.

    Raises ModelConfigError for a model that is not known.
    """
    return shapes_of(model_config(dict(fields)))


@functools.cache
def shapes_of(config: Architecture) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes by name of the parameters of a model with this configuration."""
    return flatten(Model(config).abstract_params())
