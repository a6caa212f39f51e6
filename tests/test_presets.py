"""Presets of `refine`: what they set, what wins beside them; what estimators need."""

import copy
import dataclasses
import pickle

import pytest
from tiny_runs import config_file, tiny_run

from refine_jax import config_files, main, presets
from refine_jax.base.errors import ConfigError
from refine_jax.config import Config, RefineConfig, defaults
from refine_jax.presets import PRESETS
from refine_jax.refine import exact, grpo, rewards, selection
from tests.test_commands import overridden


def refine_of(file, *flags, folder):
    """The section of a file whose get_config() has the lines `file`, and of flags; the notes."""
    path = folder / "file.py"
    lines = "\n".join(f"    {line}" for line in file)
    path.write_text(
        "from refine_jax.config import defaults\n\ndef get_config():\n    config = defaults()\n"
        f"    config.model.fresh.model_type = 'delta_net'\n{lines}\n    return config\n"
    )
    values = config_files.load_config(str(path))
    config_files.override(values, dict(flag.removeprefix("--").split("=") for flag in flags))
    return Config.from_dict(values).refine, presets.notes(values.refine)


def test_presets_are_fields_and_the_first_is_the_default():
    assert RefineConfig(**PRESETS["paper"]) == RefineConfig()
    # Given as a flag, it takes back all that another one has set.
    assert PRESETS["paper"].keys() >= PRESETS["exact"].keys() | PRESETS["low_noise"].keys()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("by_flag", [False, True])
def test_a_preset_is_replaced_by_its_values(name, by_flag, tmp_path):
    file = [] if by_flag else [f"config.refine.preset = {name!r}"]
    flags = [f"--config.refine.preset={name}"] if by_flag else []
    refine, notes = refine_of(file, *flags, folder=tmp_path)
    assert refine == RefineConfig(**PRESETS[name]) and not notes
    assert refine.preset is None


@pytest.mark.parametrize("order", [1, -1])
def test_values_beside_a_preset_win_and_are_said(order, tmp_path):
    """In any order, and also where one is the default."""
    lines = ["config.refine.preset = 'exact'", "config.refine.update(rollout_length=5)"]
    refine, notes = refine_of(lines[::order], folder=tmp_path)
    assert refine == RefineConfig(**PRESETS["exact"] | {"rollout_length": 5})
    (note,) = notes
    assert "'exact'" in note and "rollout_length=5 (not 3)" in note
    flags = ["--config.refine.preset=low_noise", "--config.refine.rollouts_per_position=1"]
    refine, notes = refine_of([], *flags[::order], folder=tmp_path)
    assert refine == RefineConfig(**PRESETS["low_noise"] | {"rollouts_per_position": 1})
    assert "rollouts_per_position=1 (not 8)" in notes[0] and len(notes) == 1


def test_flags_win_over_the_file(tmp_path):
    file = ["config.refine.preset = 'low_noise'", "config.refine.reward = 'cosine'"]
    refine, notes = refine_of(file, "--config.refine.preset=exact", folder=tmp_path)
    assert refine == RefineConfig(**PRESETS["exact"]) and not notes
    refine, notes = refine_of(file, "--config.refine.reward=prefix", folder=tmp_path)
    assert (refine.reward, refine.rollouts_per_position) == ("prefix", 8) and len(notes) == 1
    refine, notes = refine_of(file, "--config.refine.preset=none", folder=tmp_path)
    assert refine == RefineConfig() and not notes


def test_a_section_made_by_hand(tmp_path):
    file = [
        "from ml_collections import ConfigDict",
        "config = ConfigDict({'refine': {'preset': 'exact', 'rollout_length': 2}})",
        "config.model = {'fresh': {'model_type': 'delta_net'}}",
    ]
    refine, notes = refine_of(file, folder=tmp_path)
    assert refine == RefineConfig(**PRESETS["exact"] | {"rollout_length": 2}) and len(notes) == 1


def test_unknown_presets_are_refused():
    with pytest.raises(ConfigError, match=r"preset must be one of 'paper', .*'exact'\?"):
        overridden("--config.refine.preset=exakt")


def test_what_is_recorded_says_the_values():
    values = tiny_run("midtrain")
    values.refine.preset = "low_noise"
    config = Config.from_dict(values)
    record = config.to_dict()
    assert record["refine"]["preset"] is None and record["refine"]["rollouts_per_position"] == 8
    assert Config.from_dict(record) == config


def test_copies_know_what_was_given():
    values = defaults()
    values.refine.preset = "exact"
    values.refine.rollout_length = 5
    expected = RefineConfig(**PRESETS["exact"] | {"rollout_length": 5})
    others = (
        copy.deepcopy(values),
        pickle.loads(pickle.dumps(values)),
        values.copy_and_resolve_references(),
    )
    for other in others:
        assert RefineConfig(**presets.expand(other.refine)) == expected


def test_a_section_by_itself_takes_values():
    with pytest.raises(ConfigError, match=r"takes PRESETS\['exact'\]"):
        RefineConfig(preset="exact")


# Settings and what they name


def test_choices_are_what_the_functions_know():
    fields = {field.name: field.metadata["choices"] for field in dataclasses.fields(RefineConfig)}
    assert fields["selection"] == selection.SELECTIONS
    assert fields["reward"] == (
        *rewards.REWARDS,
        *rewards.ROLLOUT_REWARDS,
        rewards.EXPECTED,
    )
    assert fields["grouping"] == grpo.GROUPINGS
    assert fields["credit"] == grpo.CREDITS
    assert fields["baseline"] == grpo.BASELINES
    assert fields["preset"] == tuple(PRESETS)
    assert set(exact.MATCH_REWARDS) <= set(fields["reward"])


EXACT = PRESETS["exact"]


@pytest.mark.parametrize(
    ("refine", "words"),
    [
        (EXACT | {"reward": "cosine"}, ["reward='whole' or 'prefix'", "Got: reward='cosine'"]),
        (EXACT | {"reward": "expected"}, ["Got: reward='expected'"]),
        (EXACT | {"kl_coef": 0.1}, ["config.refine.kl_coef", "Got: kl_coef=0.1"]),
        ({"selection": "all"}, ["config.refine.estimator='exact'", "Got: estimator='rollouts'"]),
        (EXACT | {"rollout_lengths": "adaptive"}, ["rollout_lengths='adaptive'", "makes none"]),
        ({"rollout_lengths": "adaptive"}, ["seq-mean-token-mean", "Got: 'token-mean'"]),
        ({"entropy_budget": 0}, ["config.refine.entropy_budget must be more than 0"]),
        (EXACT | {"rollout_length": 65, "edge_margin": 99}, ["at most 64", "rollout_length=65"]),
        (
            {"selection": "variance", "rollout_length": 65, "edge_margin": 99},
            ["selection='variance'", "at most 64"],
        ),
        ({"lambda_rl_until": 0}, ["config.refine.lambda_rl_until must be more than 0"]),
        ({"lambda_rl_until": 1.5}, ["config.refine.lambda_rl_until must be at most 1"]),
        ({"rollouts": "step"}, ["'update', 'batch'"]),
    ],
)
def test_what_does_not_fit_is_refused(refine, words):
    values = tiny_run("midtrain", {"refine": refine})
    with pytest.raises(ConfigError) as error:
        Config.from_dict(values)
    for word in words:
        assert word in str(error.value)


def test_exact_expectations_of_chosen_positions_are_allowed():
    for name in ("entropy", "variance"):
        values = tiny_run("midtrain", {"refine": EXACT | {"selection": name, "reward": "prefix"}})
        assert Config.from_dict(values).refine.selection == name


def test_the_command_says_what_wins(tmp_path, capsys):
    path = config_file(tmp_path / "file.py", tiny_run("midtrain"))
    flags = ("--config.refine.preset=exact", "--config.refine.reward=cosine")
    assert main.main([f"--config={path}", f"--workdir={tmp_path / 'run'}", *flags]) == 1
    said = capsys.readouterr().err
    assert "note: config.refine.preset='exact' with reward='cosine' (not 'whole')" in said
    assert "needs config.refine.reward='whole' or 'prefix'" in said
