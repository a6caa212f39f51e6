"""Where arrays live on several devices: the mesh, the rules, and what applies them.

A mesh has the axes

    data        rows of a batch; parameters are copies
    fsdp        rows of a batch; parameters and optimizer state are spread (ZeRO-3)
    tensor      heads, the hidden axis of the MLP, the vocabulary
    sequence    the tokens of a row, in contiguous blocks

and is ambient (`jax.set_mesh`): models and steps are written for whole arrays, say by logical names
how an array is to be spread (`constrain`), and run what XLA cannot divide by itself, such as
Pallas kernels, on each device's part (`over_shards`). Without an ambient mesh of several devices
all of this does nothing, and the programs are those of one device.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from refine_jax import distributed
from refine_jax.base.errors import ConfigError
from refine_jax.config import MeshConfig

AXES = ("data", "fsdp", "tensor", "sequence")

# Logical axis of an array -> the mesh axes that divide it.
RULES = {
    "batch": ("data", "fsdp"),
    "tokens": ("sequence",),
    # Continuations of a row, which the devices that share it share out.
    "forks": ("sequence",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    # A parameter whose outputs are several arrays side by side: a part of them is no part of each.
    "embed_only": ("fsdp", "tensor"),
}

# End of a parameter's name -> logical names of its last axes; leading axes (layers) and parameters
# that are not named, which are small, are copies. `embed` is gathered where a layer runs.
PARAMETERS = (
    (r"(embeddings|lm_head)/weight", ("vocab", "embed")),
    (r"(gate|up)_proj/weight", ("hidden", "embed")),
    (r"down_proj/weight", ("embed", "hidden")),
    (r"[qkvg]_proj/weight", ("heads", "embed")),
    (r"(qkv|in_proj_qkv)/weight", (None, "embed_only")),
    (r"in_proj_z/weight", ("heads", "embed")),
    (r"in_proj_[ab]/weight", (None, "embed")),
    (r"(o|out)_proj/weight", ("embed", "heads")),
    (r"[qkv]_conv1d/weight", ("heads", None, None)),
    (r"(lr|momentum|ttt_scale|a|b)_proj/weight", (None, "embed")),
    (r"attn/w1", ("heads", "embed", None)),
    (r"attn/w[02]", ("heads", None, "embed")),
    (r"w_left", ("heads", "embed", None)),
    (r"w_right", ("heads", None, "embed")),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of a configuration over `devices`.

    The devices of a process are neighbours along the last axes, where most is communicated.

    Raises ConfigError: the sizes do not make up the number of devices.
    """
    sizes = [getattr(config, name) for name in AXES]
    given = math.prod(size for size in sizes if size != -1)
    fits = len(devices) % given == 0 if -1 in sizes else len(devices) == given
    if not fits:
        described = ", ".join(f"{n}={s}" for n, s in zip(AXES, sizes, strict=True))
        raise ConfigError(
            "config.mesh: the sizes of the axes must multiply to the number of devices; one may be "
            f"-1, what is left. Got: {described} for {len(devices)} devices."
        )
    sizes = [len(devices) // given if size == -1 else size for size in sizes]
    # As `jax.make_mesh`, which refuses sizes that are no product of whole axes of a TPU's torus.
    array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def default_devices() -> list[jax.Device]:
    """The devices of a run: all."""
    return jax.devices()


@contextlib.contextmanager
def use_mesh(config: MeshConfig, *, alone: bool = False) -> Iterator[Mesh]:
    """The mesh of a configuration, ambient inside if it has several devices or replaces another.

    alone: of this process's devices only, where each of several processes works for itself.

    Raises ConfigError: the sizes do not make up the number of devices.
    """
    devices = default_devices()
    if alone:
        devices = [device for device in devices if device.process_index == jax.process_index()]
    mesh = make_mesh(config, devices)
    if not alone:
        distributed.connect(mesh)
    ambient = mesh.size > 1 or not jax.sharding.get_abstract_mesh().empty
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        yield mesh


def check_fits(sizes: Mapping[str, int], *, tokens: int, model: Any) -> None:
    """Refuse a mesh that cannot divide a model.

    sizes: of the mesh's axes. tokens: of a row. model: its configuration.

    Raises ConfigError: what does not divide.
    """
    names = ("num_heads", "num_value_heads", "num_attn_heads", "num_lact_heads")
    for name in (*names, "num_attention_heads"):
        heads = getattr(model, name, 0)
        if heads % sizes["tensor"]:
            raise ConfigError(
                "config.mesh.tensor must divide the heads of the model. Got: "
                f"tensor={sizes['tensor']}, {name}={heads}."
            )
    chunk = getattr(model, "lact_chunk_size", 0)
    if chunk % sizes["sequence"]:
        raise ConfigError(
            "config.mesh.sequence must divide lact_chunk_size: its devices share the tokens of "
            f"every chunk. Got: sequence={sizes['sequence']}, lact_chunk_size={chunk}."
        )
    if sizes["sequence"] > 1 and tokens % (sizes["sequence"] * model.token_multiple):
        raise ConfigError(
            "config.mesh.sequence gives every device the same number of tokens of a row, a "
            f"multiple of {model.token_multiple} for this model. Got: "
            f"sequence={sizes['sequence']}, sequence_length={tokens}."
        )


def axis_sizes() -> dict[str, int]:
    """Devices along each axis of the ambient mesh; all 1 without one."""
    return {name: axis_size(name) for name in AXES}


def axis_size(name: str) -> int:
    """Devices along an axis of the ambient mesh; 1 without one, and in a part of `over_shards`."""
    return jax.sharding.get_abstract_mesh().shape[name] if is_spread() else 1


def token_axis(tokens: int, multiple: int) -> str | None:
    """The mesh axis over which rows of `tokens` are spread, whole multiples each; None: they
    are not.
    """
    size = axis_size("sequence")
    return "sequence" if size > 1 and tokens % (size * multiple) == 0 else None


def is_spread() -> bool:
    """Whether there is an ambient mesh of several devices, and its axes are not yet mapped."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and not mesh.manual_axes


def _dividing(axes: Sequence[str], size: int, mesh: Any) -> tuple[str, ...] | None:
    """The first of some mesh axes, as many as together divide `size` evenly."""
    kept: tuple[str, ...] = ()
    for axis in axes:
        if size % math.prod([mesh.shape[name] for name in (*kept, axis)]):
            break
        kept = (*kept, axis)
    return kept or None


def partition_spec(shape: Sequence[int], logical: Sequence[str | None], mesh: Any) -> PartitionSpec:
    """How an array is spread. logical: names of its first axes; what does not divide is not."""
    return PartitionSpec(
        *(
            _dividing(RULES[name], size, mesh) if name else None
            for name, size in zip(logical, shape, strict=False)
        )
    )


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Spread x [...] by the logical names of its first axes; the others stay whole everywhere."""
    if not is_spread():
        return x
    spec = partition_spec(x.shape, logical, jax.sharding.get_abstract_mesh())
    return lax.with_sharding_constraint(x, spec)


def gather_axes(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Make x [...] whole along some axes on every device; the others stay spread as they are."""
    if not is_spread():
        return x
    spec = [None if axis in axes else PartitionSpec.UNCONSTRAINED for axis in range(x.ndim)]
    return lax.with_sharding_constraint(x, PartitionSpec(*spec))


def over_shards(
    function: Callable, in_axes: Sequence[Sequence[str | None]], out_axes: Any
) -> Callable:
    """`function` of whole arrays, run by each device on its part of them.

    in_axes: for each argument the logical names of the first axes of its arrays (an argument may
    be None or a tree of arrays). out_axes: such names, or a tuple of them for several results.
    A named axis must divide evenly, but for the batch and forks: of those that do not every device
    holds all.
    """

    @functools.wraps(function)
    def spread(*arguments):
        if not is_spread():
            return function(*arguments)
        mesh = jax.sharding.get_abstract_mesh()
        rules = dict(RULES)
        for axes, argument in zip(in_axes, arguments, strict=True):
            for name in {"batch", "forks"}.intersection(axes):
                if leaves := jax.tree.leaves(argument):
                    size = leaves[0].shape[axes.index(name)]
                    rules[name] = _dividing(RULES[name], size, mesh)

        def spec(axes):
            return PartitionSpec(*(rules[name] if name else None for name in axes))

        in_specs = tuple(map(spec, in_axes))
        out_specs = spec(out_axes) if _is_names(out_axes) else tuple(map(spec, out_axes))
        # Copies of a result are equal by construction; the check would have every kernel say so.
        mapped = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return mapped(*arguments)

    return spread


def _is_names(axes: Sequence) -> bool:
    return all(name is None or isinstance(name, str) for name in axes)


def _axes_of(path: Any) -> tuple[str | None, ...]:
    """Logical names of the last axes of the parameter, or optimizer moment, at a tree path."""
    name = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
    for pattern, axes in PARAMETERS:
        if re.search(rf"(^|/){pattern}$", name):
            return axes
    return ()


def _parameter_spec(path: Any, x: Any, mesh: Any, *, gathered: bool = False) -> PartitionSpec:
    axes = _axes_of(path)
    if gathered:
        axes = tuple(None if name in ("embed", "embed_only") else name for name in axes)
    return partition_spec(x.shape, (None,) * (x.ndim - len(axes)) + axes, mesh)


def state_shardings(tree: Any) -> Any:
    """Where parameters belong, or a state that holds such (moments of the optimizer).

    tree: of arrays or their shapes; a leaf is known by the end of its path. None without an ambient
    mesh, which means to jax: wherever it is put by default.
    """
    if not is_spread():
        return None
    mesh = jax.sharding.get_mesh()
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, _parameter_spec(path, x, mesh)), tree
    )


def constrain_state(tree: Any) -> Any:
    """A state spread as `state_shardings` says."""
    if not is_spread():
        return tree
    mesh = jax.sharding.get_abstract_mesh()
    return jax.tree_util.tree_map_with_path(
        lambda path, x: lax.with_sharding_constraint(x, _parameter_spec(path, x, mesh)), tree
    )


def gather_parameters(params: Any, dtype: Any = None) -> Any:
    """Parameters of a layer (or of the head) made whole along `embed`, for a computation.

    Their gradient is spread again at once, so that no device holds whole ones for long.
    dtype: what the computation takes the weights of linear maps in; they are sent as such.
    """
    if not is_spread():
        return params
    mesh = jax.sharding.get_abstract_mesh()

    def gather(path, x):
        specs = [_parameter_spec(path, x, mesh, gathered=whole) for whole in (True, False)]
        if specs[0] == specs[1]:
            return x
        is_linear = dtype is not None and getattr(path[-1], "key", None) == "weight"
        return _gather(x.astype(dtype) if is_linear else x, *specs)

    return jax.tree_util.tree_map_with_path(gather, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, whole: PartitionSpec, spread: PartitionSpec) -> jax.Array:
    del spread
    return lax.with_sharding_constraint(x, whole)


def _gather_forward(x, whole, spread):
    return _gather(x, whole, spread), None


def _gather_backward(whole, spread, residuals, gradient):
    del whole, residuals
    return (lax.with_sharding_constraint(gradient, spread),)


_gather.defvjp(_gather_forward, _gather_backward)


def _rows_sharding(rows: int) -> NamedSharding:
    mesh = jax.sharding.get_mesh()
    return NamedSharding(mesh, partition_spec((rows,), ("batch",), mesh))


def rows_here(rows: int) -> tuple[int, ...]:
    """Which of the B rows of a batch the devices of this process hold, ascending: 0 .. B - 1.

    Devices of several processes may hold the same rows, and those of one need not be neighbours.
    All without an ambient mesh.
    """
    if not is_spread():
        return tuple(range(rows))
    parts = _rows_sharding(rows).addressable_devices_indices_map((rows,)).values()
    return tuple(sorted({row for (part,) in parts for row in range(rows)[part]}))


def place_rows(
    batch: Mapping[str, Any], share: Sequence[int] | None = None, rows: int | None = None
) -> dict[str, Any]:
    """A batch's arrays [B, ...] on the devices of the ambient mesh, rows over data and fsdp.

    share: rows of the batch, ascending, that the arrays hold, of which this process needs those of
    `rows_here`; None: all. rows: B, where there is a share.
    """
    if not is_spread():
        return dict(batch)

    def place(x) -> jax.Array:
        x = np.asarray(x)
        total = len(x) if rows is None else rows
        here = np.arange(total) if share is None else np.asarray(share)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            return x[np.searchsorted(here, np.arange(total)[index[0]])]

        shape = (total, *x.shape[1:])
        return jax.make_array_from_callback(shape, _rows_sharding(total), part)

    return {name: place(x) for name, x in batch.items()}


def place_state(tree: Any, shardings: Any) -> Any:
    """Arrays of this host, equal on all processes, where `state_shardings` says."""
    if shardings is None or jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(x, sharding: NamedSharding) -> jax.Array:
        # `jax.device_put` would send all values to all processes, to compare them.
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, shardings)


def take_tokens(x: jax.Array, index: jax.Array, *rest: str | None) -> jax.Array:
    """`x` [B, T, ...] at `index` [B, ...] row by row: [B, *index.shape[1:], *x.shape[2:]].

    rest: logical names of the axes of x behind its first two, along which devices keep what they
    have. Of tokens that are spread, what each device has is added up: nothing is gathered.
    """
    tokens = x.shape[1]
    size = axis_size("sequence")
    out_axes = ("batch", *[None] * (index.ndim - 1), *rest)
    if size == 1 or tokens % size:
        take = over_shards(_take, (("batch", None, *rest), ("batch",)), out_axes)
        return take(x, index)

    def take_part(x, index):
        local = index - lax.axis_index("sequence") * x.shape[1]
        here = (local >= 0) & (local < x.shape[1])
        taken = _take(x, local)
        taken = jnp.where(here.reshape(*here.shape, *[1] * (taken.ndim - here.ndim)), taken, 0)
        return lax.psum(taken, "sequence")

    return over_shards(take_part, (("batch", "tokens", *rest), ("batch",)), out_axes)(x, index)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.vmap(lambda row, i: jnp.take(row, i, axis=0, mode="clip"))(x, index)


def take_slabs(x: jax.Array, start: jax.Array, size: int, *rest: str | None) -> jax.Array:
    """Tokens start [B, R] ... start + size - 1 of x [B, T, ...]: [B, R, size, ...].

    rest: as of `take_tokens`. Slabs must lie inside the rows. Devices that share the rows' tokens
    share out the forks, where their numbers divide.
    """
    name = _slab_axis(x, size)

    def take(x, start):
        begin, behind = _slab_here(x, start, size, name)

        def slab(index):
            row, fork = index // start.shape[1], index % start.shape[1]
            origin = (row, begin[row, fork], *[0] * (x.ndim - 2))
            tokens = lax.dynamic_slice(x, origin, (1, size, *x.shape[2:]))[0]
            return tokens if name is None else _moved(tokens, -behind[row, fork])

        # One by one: all at once would be a gather, whose result XLA fills with zeros first.
        slabs = lax.map(slab, jnp.arange(start.size)).reshape(*start.shape, size, *x.shape[2:])
        if name is None:
            return slabs
        if forks is None:
            return lax.psum(slabs, name)
        return lax.psum_scatter(slabs, name, scatter_dimension=1, tiled=True)

    forks = None if name is None or start.shape[1] % axis_size(name) else "forks"
    tokens = ("batch", name and "tokens", *rest)
    return over_shards(take, (tokens, ("batch",)), ("batch", forks, None, *rest))(x, start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def tap_slabs(
    x: jax.Array, start: jax.Array, size: int, rest: tuple[str | None, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Return x [B, T, ...] and `take_slabs` of it, [B, R, size, ...].

    The gradient of the slabs is added, in place, to that of the x that is returned. The gradient
    of `take_slabs` alone is an array of zeros as large as x, which XLA then adds to the other.
    """
    return x, take_slabs(x, start, size, *rest)


def _tap_forward(x, start, size, rest):
    return tap_slabs(x, start, size, rest), start


def _tap_backward(size, rest, start, cotangents):
    name = _slab_axis(cotangents[0], size)

    def add(x, slabs, start):
        begin, behind = _slab_here(x, start, size, name)

        def one(index, x):
            row, fork = index // start.shape[1], index % start.shape[1]
            slab = slabs[row, fork] if name is None else _moved(slabs[row, fork], behind[row, fork])
            origin = (row, begin[row, fork], *[0] * (x.ndim - 2))
            old = lax.dynamic_slice(x, origin, (1, *slab.shape))
            return lax.dynamic_update_slice(x, old + slab.astype(x.dtype), origin)

        return lax.fori_loop(0, start.size, one, x)

    tokens = ("batch", name and "tokens", *rest)
    add = over_shards(add, (tokens, ("batch", None, None, *rest), ("batch",)), tokens)
    return add(*cotangents, start), None


tap_slabs.defvjp(_tap_forward, _tap_backward)


def _slab_axis(x: jax.Array, size: int) -> str | None:
    """The mesh axis over which tokens of x [B, T, ...] are spread and slabs are cut there."""
    name = token_axis(x.shape[1], 1)
    return None if name is None or x.shape[1] // axis_size(name) < size else name


def _slab_here(x, start, size: int, name: str | None) -> tuple[jax.Array, jax.Array]:
    """The slab of this device that begins where the wanted one does, or nearest: [B, R] each.

    Where it begins, and by how many tokens the wanted one begins behind it.
    """
    if name is None:
        return start, jnp.zeros_like(start)
    start = start - lax.axis_index(name) * x.shape[1]
    begin = jnp.clip(start, 0, x.shape[1] - size)
    return begin, jnp.clip(start - begin, -size, size)


def _moved(slab: jax.Array, by: jax.Array) -> jax.Array:
    """Tokens of a slab [size, ...] moved up by as many places; zeros come after them."""
    size = slab.shape[0]
    beside = jnp.pad(slab, ((size, size), *[(0, 0)] * (slab.ndim - 1)))
    return lax.dynamic_slice_in_dim(beside, size - by, size)
