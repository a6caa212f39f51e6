"""Every mixer has the members of the protocol, with the same arguments."""

import inspect

import pytest

from refine_jax.models.block import MIXERS
from refine_jax.models.mixer import Mixer

# What a mixer may leave out, and the member that says so.
OPTIONAL = {
    "normed": "TRACES_INPUTS",
    "extend_in_place": "WRITES_MUCH",
    "extend_layer": "GROWS",
    "grown": "GROWS",
}
REPLACED = {"advance": "GROWS"}


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=lambda mixer: mixer.__name__)
def test_a_mixer_has_the_members_of_the_protocol(mixer):
    for name, annotation in Mixer.__annotations__.items():
        assert name == "config" or isinstance(getattr(mixer, name), (bool, tuple)), annotation
    members = [name for name, x in vars(Mixer).items() if not isinstance(x, (bool, tuple))]
    members = [name for name in members if not name.startswith("_")]
    assert "forward" in members
    for name in members:
        own = getattr(mixer, name) is not getattr(Mixer, name)
        if name in OPTIONAL:
            assert own == getattr(mixer, OPTIONAL[name]), name
        if name in REPLACED and getattr(mixer, REPLACED[name]):
            assert not own, name
        expected = inspect.signature(getattr(Mixer, name)).parameters
        found = inspect.signature(getattr(mixer, name)).parameters
        assert list(found) == list(expected), name
        for parameter in expected:
            assert found[parameter].default == expected[parameter].default, (name, parameter)
            assert found[parameter].kind == expected[parameter].kind, (name, parameter)
