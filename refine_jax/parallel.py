"""Where arrays live on several devices: the mesh, the rules, and what applies them.

A mesh has the axes

    data        rows of a batch; parameters are copies
    fsdp        rows of a batch; parameters and optimizer state are spread (ZeRO-3)
    tensor      heads, the hidden axis of the MLP, the vocabulary
    sequence    the tokens of a row, in contiguous blocks

Several TPU slices, which the data-centre network joins, share the axes `data` or `fsdp`.

and is ambient (`jax.set_mesh`): models and steps are written for whole arrays, say by logical names
how an array is to be spread (`constrain`), and run what XLA cannot divide by itself, such as
Pallas kernels, on each device's part (`over_shards`). Without an ambient mesh of several devices
all of this does nothing, and the programs are those of one device.
"""

import contextlib
import dataclasses
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

# Mesh axes divide arrays by the logical names of their axes: {logical axis: mesh axes}.
RULES = {
    "batch": ("data", "fsdp"),
    "tokens": ("sequence",),
    # The devices that share a row share out its continuations.
    "forks": ("sequence",),
    "heads": ("tensor",),
    # Heads of fast weights, of which the devices that share a row take some for all its tokens.
    "fast_heads": ("tensor", "sequence"),
    "hidden": ("tensor",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    # Where a parameter's outputs are several arrays side by side, a part of them is no part of
    # each.
    "embed_only": ("fsdp", "tensor"),
}

# The end of a parameter's name decides the logical names of its last axes. Every device has all of
# leading axes (layers) and of small parameters, which are not named here. `embed` is gathered where
# a layer runs.
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

    The devices of a process are neighbours along the last axes, where most is communicated. An axis
    that goes over several slices has the devices of a slice side by side.

    Raises ConfigError: the sizes do not make up the number of devices or of slices.
    """
    across = _slices(config, devices)
    sizes = [getattr(config, name) for name in AXES]
    given = math.prod(size for size in sizes if size != -1)
    count = len(devices) // math.prod(across)
    fits = count % given == 0 if -1 in sizes else count == given
    if not fits:
        described = ", ".join(f"{n}={s}" for n, s in zip(AXES, sizes, strict=True))
        slices = f" in each of {math.prod(across)} slices" if math.prod(across) > 1 else ""
        raise ConfigError(
            "config.mesh: the sizes of the axes must multiply to the number of devices; one may be "
            f"-1, what is left. Got: {described} for {count} devices{slices}."
        )
    sizes = [count // given if size == -1 else size for size in sizes]
    # As `jax.make_mesh`, which refuses sizes that are no product of whole axes of a TPU's torus.
    options = {"allow_split_physical_axes": True}
    if math.prod(across) == 1:
        array = mesh_utils.create_device_mesh(sizes, devices, **options)
    elif _count_slices(devices) > 1:
        array = mesh_utils.create_hybrid_device_mesh(sizes, across, devices, **options)
    else:  # devices that know of no slices, such as simulated ones: parts of their list
        parts = np.array(devices).reshape(*across, *sizes)
        order = [axis for pair in zip(range(4), range(4, 8), strict=True) for axis in pair]
        array = parts.transpose(order).reshape(np.multiply(across, sizes))
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _count_slices(devices: Sequence[jax.Device]) -> int:
    """How many slices the devices say that they are of; 1 where they do not say."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def _slices(config: MeshConfig, devices: Sequence[jax.Device]) -> tuple[int, int, int, int]:
    """Slices along each axis of the mesh."""
    sizes = [config.dcn_data, config.dcn_fsdp]
    there = _count_slices(devices)
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(there // given, 1)
    asked = math.prod(sizes)
    if there not in (1, asked) or len(devices) % asked:
        raise ConfigError(
            "config.mesh: dcn_data and dcn_fsdp must multiply to the number of slices, which have "
            f"equally many devices; one may be -1, what is left. Got: dcn_data={config.dcn_data}, "
            f"dcn_fsdp={config.dcn_fsdp} for {len(devices)} devices of {there} slice(s)."
        )
    return (*sizes, 1, 1)


def default_devices() -> list[jax.Device]:
    """List the devices of a run: all."""
    return jax.devices()


@contextlib.contextmanager
def use_mesh(config: MeshConfig, *, alone: bool = False) -> Iterator[Mesh]:
    """Make the mesh of a configuration ambient, if it has several devices or replaces another.

    alone: of this process's devices only, where each of several processes works for itself.

    Raises ConfigError: the sizes do not make up the number of devices.
    """
    devices = default_devices()
    if alone:
        config = dataclasses.replace(config, dcn_data=1, dcn_fsdp=1)  # a process is of one slice
        devices = [device for device in devices if device.process_index == jax.process_index()]
    mesh = make_mesh(config, devices)
    if not alone:
        distributed.connect(mesh)
    ambient = mesh.size > 1 or not jax.sharding.get_abstract_mesh().empty
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        yield mesh


def axis_sizes() -> dict[str, int]:
    """Count the devices along each axis of the ambient mesh; all 1 without one."""
    return {name: axis_size(name) for name in AXES}


def axis_size(name: str) -> int:
    """Count devices along an axis of the ambient mesh; 1 without, and inside `over_shards`."""
    return jax.sharding.get_abstract_mesh().shape[name] if is_spread() else 1


def token_axis(tokens: int, multiple: int) -> str | None:
    """Name the mesh axis that divides rows of `tokens` into whole multiples; None: none."""
    size = axis_size("sequence")
    return "sequence" if size > 1 and tokens % (size * multiple) == 0 else None


def is_spread() -> bool:
    """Tell whether there is an ambient mesh of several devices whose axes are not yet mapped."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and not mesh.manual_axes


def _dividing(axes: Sequence[str], size: int, mesh: Any) -> tuple[str, ...] | None:
    """Take the first of some mesh axes, as many as together divide `size` evenly."""
    kept: tuple[str, ...] = ()
    for axis in axes:
        if size % math.prod([mesh.shape[name] for name in (*kept, axis)]):
            break
        kept = (*kept, axis)
    return kept or None


def partition_spec(shape: Sequence[int], logical: Sequence[str | None], mesh: Any) -> PartitionSpec:
    """Say how an array is spread.

    logical: Names of its first axes. An axis that its devices do not divide evenly stays whole.
    """
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
    """Make `function` of whole arrays run by each device on its part of them.

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
    """Find logical names of the last axes of a parameter, or of its moment, at a tree path."""
    name = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
    # An update B A of a weight [out, in]: A [r, in] and B [out, r] are spread as the weight is.
    linear, _, update = name.rpartition("/")
    if update in ("lora_A", "lora_B"):
        size_out, size_in = _axes_of([f"{linear}/weight"]) or (None, None)
        return (None, size_in) if update == "lora_A" else (size_out, None)
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
    """Say where parameters belong, or a state that holds such (moments of the optimizer).

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
    """Spread a state as `state_shardings` says."""
    if not is_spread():
        return tree
    mesh = jax.sharding.get_abstract_mesh()
    return jax.tree_util.tree_map_with_path(
        lambda path, x: lax.with_sharding_constraint(x, _parameter_spec(path, x, mesh)), tree
    )


def gather_parameters(params: Any, dtype: Any = None) -> Any:
    """Make parameters of a layer (or of the head) whole along `embed`, for a computation.

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
    """List which of the B rows of a batch the devices of this process hold, ascending: 0 .. B - 1.

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
    """Place a batch's arrays [B, ...] on the devices of the ambient mesh, rows over data and fsdp.

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
    """Place arrays of this host, equal on all processes, where `state_shardings` says."""
    if shardings is None or jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(x, sharding: NamedSharding) -> jax.Array:
        # `jax.device_put` would send all values to all processes, to compare them.
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, shardings)


def take_tokens(x: jax.Array, index: jax.Array, *rest: str | None) -> jax.Array:
    """Take `x` [B, T, ...] at `index` [B, ...] row by row: [B, *index.shape[1:], *x.shape[2:]].

    rest: logical names of the axes of x behind its first two, along which devices keep what they
    have. Of tokens that are spread, what each device has is added up: nothing is gathered.
    """
    tokens = x.shape[1]
    size = 1 if "fast_heads" in rest else axis_size("sequence")
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
