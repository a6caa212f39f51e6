"""Meshes: which devices lie along which axes, on one slice and on several."""

import dataclasses

import jax
import numpy as np
import pytest

from refine_jax.base.errors import ConfigError
from refine_jax.config import MeshConfig
from refine_jax.parallel import AXES, make_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh needs to know of a device of a TPU."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0

    @property
    def coords(self):
        return [self.id % 2, self.id // 2 % 2, 0]


def two_slices():
    """Two slices of 2 x 2, listed in turns."""
    chips = [Chip(10 * index + number, index) for index in range(2) for number in range(4)]
    return chips[::2] + chips[1::2]


def slices_of(mesh):
    """The slice of each device of a mesh, as an array of its shape."""
    return np.vectorize(lambda device: device.slice_index)(mesh.devices)


def mesh_of(config, devices, monkeypatch):
    """A mesh of devices that are not jax's own."""
    made = []
    monkeypatch.setattr("refine_jax.parallel.Mesh", lambda array, *_, **__: made.append(array))
    make_mesh(config, devices)
    return made[0]


@pytest.mark.parametrize(
    ("settings", "shape", "axis"),
    [
        ({}, (2, 4, 1, 1), 0),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 2, 1), 0),
        ({"dcn_data": 1, "dcn_fsdp": 2, "tensor": 2}, (1, 4, 2, 1), 1),
        ({"dcn_data": 1, "dcn_fsdp": -1, "data": 2, "fsdp": 2}, (2, 4, 1, 1), 1),
    ],
)
def test_slices_lie_along_the_axis_asked_for(settings, shape, axis, monkeypatch):
    devices = mesh_of(MeshConfig(**settings), two_slices(), monkeypatch)
    assert devices.shape == shape
    numbers = np.vectorize(lambda device: device.slice_index)(devices)
    first, second = np.split(numbers, 2, axis)
    assert (first == 0).all() and (second == 1).all()


def test_devices_that_know_of_no_slices_are_cut_into_parts_of_their_list():
    config = MeshConfig(dcn_data=2, fsdp=2, tensor=2)
    mesh = make_mesh(config, jax.devices()[:8])
    ids = [[device.id for device in part.flat] for part in mesh.devices]
    first = jax.devices()[0].id
    assert ids == [list(range(first, first + 4)), list(range(first + 4, first + 8))]
    assert dict(mesh.shape) == dict(zip(AXES, (2, 2, 2, 1), strict=True))
    along = make_mesh(MeshConfig(dcn_data=1, dcn_fsdp=2, data=2, fsdp=2), jax.devices()[:8])
    assert dict(along.shape) == dict(zip(AXES, (2, 4, 1, 1), strict=True))
    inside = {tuple(sorted(d.id - first for d in along.devices[:, :2].flat))}
    assert inside == {(0, 1, 2, 3)}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dcn_data": 3}, r"dcn_data=3.* for 8 devices of 2 slice"),
        ({"dcn_data": 1}, r"dcn_data=1, dcn_fsdp=1 for 8 devices of 2 slice"),
        ({"fsdp": 8}, r"fsdp=8.* for 4 devices in each of 2 slices"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, said, monkeypatch):
    with pytest.raises(ConfigError, match=said):
        mesh_of(MeshConfig(**settings), two_slices(), monkeypatch)


@pytest.mark.parametrize("settings", [{"dcn_data": 0}, {"dcn_fsdp": -1}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match="only one may be -1"):
        MeshConfig(**settings)
