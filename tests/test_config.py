"""The configuration: what it accepts, and what its errors say."""

import dataclasses
import importlib.util
import time
import typing
from pathlib import Path

import numpy as np
import pytest

from refine_jax.architectures import QWEN3_5
from refine_jax.base.errors import ConfigError
from refine_jax.config import (
    SECTIONS,
    Config,
    ModelConfig,
    RefineConfig,
    defaults,
)
from refine_jax.data.tokenizer import load_tokenizer
from refine_jax.models.config import model_config

CONFIGS = Path(__file__).parents[1] / "configs"
FORMS = {
    "demo": (None, "short", "scratch", "scratch,short", "scratch,deltanet"),
    "compare": ("deltanet-1.3b", "lact-760m", "qwen3.5-0.8b", "runlocal"),
    "midtrain_lact_760m": (None, "runlocal"),
    "midtrain_deltanet_1_3b": (None, "runlocal"),
    "midtrain_qwen3_5": (None, *QWEN3_5, "runlocal", "9b,runlocal"),
    "posttrain_qwen3_5": (None, "sft", "4b,grpo", "runlocal", "27b,nested_sft,runlocal"),
    "testtime_qwen3_5": (None, "2b,ntp", "official", "runlocal"),
    "eval_qwen3_5": (None, "4b", "runlocal"),
    "testtime_ruler_qa": (None, "official", "ntp", "runlocal"),
    "eval_ruler": (None, "runlocal"),
    "posttrain_lact_760m": (None, "sft", "nested_sft", "grpo", "runlocal", "grpo,runlocal"),
    "posttrain_deltanet_1_3b": (None, "sft", "nested_sft", "grpo", "runlocal"),
}


def valid():
    config = defaults()
    config.model.fresh = {"model_type": "delta_net", "hidden_size": 16}
    return config


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_defaults_are_the_papers():
    refine = Config.from_dict(valid()).refine
    assert (refine.num_positions, refine.rollout_length, refine.rollouts_per_position) == (8, 5, 1)
    assert (refine.lambda_sft, refine.lambda_rl, refine.reward) == (1.0, 0.2, "cosine")
    assert (refine.clip_low, refine.clip_high, refine.dual_clip) == (0.2, 0.2, 3.0)


def test_dict_round_trip():
    config = valid()
    config.train.mini_batch_size = 32
    config.optimizer.clip_norm = None
    config = Config.from_dict(config)
    assert Config.from_dict(config.to_dict()) == config


def test_batches_resolve_to_the_larger():
    config = valid()
    config.train.update(batch_size=12, mini_batch_size=6)
    train = Config.from_dict(config).train
    assert (train.mini_batch, train.micro_batch, train.updates_per_step) == (6, 6, 2)


def test_whole_numbers_pass_as_floats_and_nothing_else_is_converted():
    assert isinstance(RefineConfig(lambda_rl=1).lambda_rl, float)
    with pytest.raises(ConfigError, match=r"rollout_length must be a whole number. Got: 5.0"):
        RefineConfig(rollout_length=5.0)
    with pytest.raises(ConfigError, match=r"num_positions must be a whole number. Got: True"):
        RefineConfig(num_positions=True)
    with pytest.raises(ConfigError, match=r"lambda_rl must be finite. Got: nan"):
        RefineConfig(lambda_rl=float("nan"))


@pytest.mark.parametrize(
    ("section", "field", "value", "words"),
    [
        ("refine", "reward", "cosin", ["'cosine', 'binary', 'hybrid'", "Did you mean 'cosine'?"]),
        ("refine", "clip_low", 0, ["config.refine.clip_low", "more than 0", "Got: 0"]),
        ("refine", "rollout_length", 21, ["edge_margin", "Got: rollout_length=21, edge_margin=20"]),
        ("refine", "num_positions", 4000, ["num_positions", "sequence_length=16384", "<= 16344"]),
        ("data", "min_tokens", 79, ["min_tokens=79", "80 tokens are needed", "<= 39"]),
        ("data", "sequence_length", 1, ["config.data.sequence_length", "at least 2"]),
        ("train", "mini_batch_size", 3, ["divide config.train.batch_size", "batch_size=128"]),
        ("train", "warmup_ntp_steps", 101, ["at most config.train.steps", "steps=100"]),
        ("train", "best_metric", "loss", ["eval_every"]),
        ("optimizer", "warmup_steps", 101, ["at most config.train.steps"]),
        ("optimizer", "learning_rate", "fast", ["a number", "Got: 'fast'"]),
    ],
)
def test_errors_name_the_field_what_was_got_and_what_is_allowed(section, field, value, words):
    values = valid().to_dict()
    values[section][field] = value
    with pytest.raises(ConfigError) as error:
        Config.from_dict(values)
    assert field in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("reset", ["batch", "never"])
def test_copies_need_a_reset_for_each_example(reset):
    config = valid()
    config.testtime.update(reset=reset, copies=4)
    with pytest.raises(ConfigError, match=rf"Got: copies=4, reset='{reset}'"):
        Config.from_dict(config)


def test_micro_batch_must_divide_mini_batch():
    config = valid()
    config.train.update(batch_size=12, mini_batch_size=6, micro_batch_size=4)
    with pytest.raises(ConfigError, match=r"Got: micro_batch_size=4, mini_batch_size=6"):
        Config.from_dict(config)


def test_unknown_names_get_a_suggestion():
    values = valid().to_dict()
    with pytest.raises(ConfigError, match=r"config has no field 'optimiser'.*'optimizer'"):
        Config.from_dict(values | {"optimiser": {}})
    values["refine"]["rolout_length"] = 5
    with pytest.raises(ConfigError, match=r"config.refine has no field.*'rollout_length'\?"):
        Config.from_dict(values)


def test_a_model_is_needed():
    with pytest.raises(ConfigError, match=r"config.model needs `checkpoint`"):
        Config.from_dict(defaults())
    assert ModelConfig(checkpoint="folder").fresh is None


def test_short_rows_are_fine_without_rollouts():
    config = valid()
    config.data.sequence_length = 32
    config.refine.objective = "ntp"
    assert Config.from_dict(config).data.sequence_length == 32


@pytest.mark.parametrize(("name", "arg"), [(n, arg) for n, args in FORMS.items() for arg in args])
def test_config_files_are_valid(name, arg):
    Config.from_dict(load(name).get_config(arg))


@pytest.mark.parametrize("name", FORMS)
def test_config_files_refuse_unknown_forms(name):
    with pytest.raises(ValueError, match="runlocl"):
        load(name).get_config("runlocl")


@pytest.mark.parametrize(
    "name", ["midtrain_lact_760m", "midtrain_deltanet_1_3b", "midtrain_qwen3_5"]
)
def test_full_size_configs_carry_the_papers_numbers(name):
    config = Config.from_dict(load(name).get_config())
    train, optimizer, refine = config.train, config.optimizer, config.refine
    assert (train.batch_size, train.mini_batch) == (128, 32)
    assert config.data.sequence_length == 16384
    assert (optimizer.learning_rate, optimizer.schedule) == (1e-6, "constant")
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.01, 0.2)
    assert (optimizer.b1, optimizer.b2) == (0.9, 0.999)
    assert (refine.objective, refine.reward, refine.kl_coef) == ("refine", "cosine", 0.0)


@pytest.mark.parametrize("arg", ["0.8b,2b", "9b,runlocal,sft", "runlocal,runlocal", "", "9B"])
def test_sizes_of_qwen_that_there_are_not(arg):
    with pytest.raises(ValueError, match=r"has the sizes 0\.8b, 2b, 4b, 9b, 27b, and .*Got: '"):
        load("midtrain_qwen3_5").get_config(arg)


@pytest.mark.parametrize("size", QWEN3_5)
def test_a_small_qwen_has_the_layers_of_the_large_one(size):
    """Its kinds of layers, and how many heads share a key."""

    def model(arg):
        config = Config.from_dict(load("midtrain_qwen3_5").get_config(arg))
        return config, model_config(dict(config.model.fresh))

    (large, made), (local, small) = model(size), model(f"{size},runlocal")
    assert made.layer_kinds[:4] == small.layer_kinds
    assert made.layer_kinds == made.layer_kinds[:4] * (made.num_hidden_layers // 4)
    values, queries = (
        {each.linear.num_value_heads / each.linear.num_heads for each in (made, small)},
        {each.attention.num_heads / each.attention.num_kv_heads for each in (made, small)},
    )
    sharing = {"27b": (3.0, 6.0), "4b": (2.0, 4.0), "9b": (2.0, 4.0)}.get(size, (1.0, 4.0))
    assert (values, queries) == ({sharing[0]}, {sharing[1]})
    assert made.tie_word_embeddings == small.tie_word_embeddings
    # The published tokenizer has no bos; the small model's is that of Mistral.
    assert (large.data.tokenizer, large.data.add_bos) == ("checkpoint", False)
    assert load_tokenizer(local.data.tokenizer).vocab_size == small.vocab_size


@pytest.mark.parametrize("name", ["posttrain_lact_760m", "posttrain_deltanet_1_3b"])
def test_post_training_configs_carry_the_papers_numbers(name):
    config = Config.from_dict(load(name).get_config())
    assert (config.train.batch_size, config.train.mini_batch) == (64, 16)
    assert (config.refine.reward, config.refine.lambda_sft, config.refine.lambda_rl) == (
        *("hybrid", 1.0, 0.2),
    )
    assert config.optimizer.learning_rate == 1e-6
    rows = {
        None: (True, "refine", "sft"),
        "nested_sft": (True, "ntp", "sft"),
        "sft": (False, "refine", "sft"),
        "grpo": (False, "refine", "grpo"),
    }
    for form, expected in rows.items():
        config = Config.from_dict(load(name).get_config(form))
        posttrain = config.posttrain
        assert (posttrain.nested, config.refine.objective, posttrain.answers) == expected
    with pytest.raises(ValueError, match=r"one form beside runlocal\. Got: \['grpo', 'sft'\]"):
        load(name).get_config("sft,grpo,runlocal")


@pytest.mark.parametrize(
    ("section", "field", "value", "words"),
    [
        ("data", "pack", True, "config.prompts says"),
        ("train", "warmup_ntp_steps", 2, "is for mid-training. Got: 2"),
        ("posttrain", "mini_batch_size", 3, "must divide config.train.batch_size"),
        ("prompts", "max_answer_tokens", 16333, "must hold 80 tokens of a prompt"),
        ("posttrain", "samples", 1, "at least 2"),
        ("prompts", "cut", "right", "'middle', 'left'"),
    ],
)
def test_settings_that_post_training_refuses(section, field, value, words):
    values = valid().to_dict() | {"phase": "posttrain"}
    values[section][field] = value
    with pytest.raises(ConfigError) as error:
        Config.from_dict(values)
    assert field in str(error.value) and words in str(error.value)


def test_the_divergence_belongs_to_the_prompts():
    values = valid().to_dict() | {"phase": "posttrain"}
    values["refine"]["kl_coef"] = 0.1
    assert Config.from_dict(values).refine.kl_coef == 0.1
    values["posttrain"]["nested"] = False
    with pytest.raises(ConfigError, match=r"kl_coef=0.1, nested=False"):
        Config.from_dict(values)


def test_scores_of_answers_are_of_post_training():
    config = valid()
    config.train.update(best_metric="score", eval_every=1)
    with pytest.raises(ConfigError, match=r"it needs phase 'posttrain'. Got: 'midtrain'"):
        Config.from_dict(config)
    config.phase = "posttrain"
    assert Config.from_dict(config).train.best_metric == "score"


def numbers_of(kind):
    """(section, field) of every setting of a type."""
    return [
        (name, field.name)
        for name, section in SECTIONS.items()
        for field in dataclasses.fields(section)
        if kind
        in (
            typing.get_type_hints(section)[field.name],
            *typing.get_args(typing.get_type_hints(section)[field.name]),
        )
    ]


def refused(section, field, value):
    """The message for a value; it names the setting."""
    with pytest.raises(ConfigError) as error:
        SECTIONS[section](**{field: value})
    assert f"config.{section}.{field}" in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


@pytest.mark.parametrize(("section", "field"), numbers_of(int))
def test_whole_numbers_have_both_ends(section, field):
    allowed = SECTIONS[section].__dataclass_fields__[field].metadata
    low, high = allowed["low"], allowed["high"]
    assert low is not None and high is not None and low < high < 2**53
    for value in (low, high, np.int64(high), np.uint8(2)):
        if section != "mesh" or value != low:
            got = getattr(SECTIONS[section](**{field: value}), field)
            assert got == value and type(got) is int
    for value in (low - 1, high + 1, -(2**63), 2**63, 10**30, 10**5000, -(10**5000)):
        assert "must be at " in refused(section, field, value)
    for value in (True, np.True_, 2.0, float("inf"), "3", b"3", [3], np.array([3]), 3 + 0j):
        assert "must be a whole number" in refused(section, field, value)


@pytest.mark.parametrize(("section", "field"), numbers_of(float))
def test_numbers_are_finite_and_have_both_ends(section, field):
    allowed = SECTIONS[section].__dataclass_fields__[field].metadata
    low = allowed["above"] if allowed["low"] is None else allowed["low"]
    high = allowed["high"]
    assert low is not None and high is not None
    # As float32, on which everything is computed.
    assert np.isfinite(np.float32(high)) and (low == 0 or np.float32(low) > 0)
    for value in (high, np.float32(high / 2), np.float64(high)):
        assert type(getattr(SECTIONS[section](**{field: value}), field)) is float
    for value in (np.nextafter(low, -1), 1.01 * high, 10**400, -(10**400), 1e308, -1e308):
        refused(section, field, value)
    for value in (float("nan"), float("inf"), -float("inf"), np.float32("nan")):
        assert "must be finite" in refused(section, field, value)
    for value in (True, "0.5", None if allowed["low"] == 0 else "nan", [0.5]):
        assert "must be a number" in refused(section, field, value)


def test_there_is_no_negative_zero():
    rate = SECTIONS["optimizer"](learning_rate=-0.0).learning_rate
    assert str(rate) == "0.0"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.batch_size": 2**20}, "train.batch_size=1048576, data.sequence_length=16384"),
        (
            {"data.sequence_length": 2**26},
            "train.batch_size * data.sequence_length must be at most",
        ),
        (
            {
                "train.batch_size": 2**20,
                "data.sequence_length": 4096,
                "refine.num_positions": 512,
                "refine.rollouts_per_position": 4096,
            },
            "refine.num_positions=512, refine.rollouts_per_position=4096",
        ),
        ({"mesh.data": 2**20, "mesh.tensor": 2**20}, "devices in all. Got: 1,099,511,627,776"),
        ({"evaluate.lengths": "4096,1" + "0" * 30}, "config.evaluate.lengths must be whole"),
        ({"evaluate.lengths": "\u00b2"}, "config.evaluate.lengths must be whole"),
        ({"generation.temperature": 1e-30}, "config.generation.temperature must be 0"),
        ({"data.pack": True, "data.max_documents": 16385}, "config.data.max_documents must be at"),
        (
            {
                "phase": "posttrain",
                "posttrain.answers": "grpo",
                "posttrain.samples": 4096,
                "train.batch_size": 128,
            },
            "posttrain.samples=4096",
        ),
    ],
)
def test_what_no_memory_holds_is_refused(changes, words):
    values = valid().to_dict()
    for name, value in changes.items():
        section, _, field = name.partition(".")
        if field:
            values[section][field] = value
        else:
            values[section] = value
    begin = time.monotonic()
    with pytest.raises(ConfigError) as error:
        Config.from_dict(values)
    assert words in str(error.value) and time.monotonic() - begin < 1


def test_fields_of_a_fresh_model_are_json_values():
    fresh = {"model_type": "delta_net", "hidden_size": np.int64(16), "norm_eps": np.float32(0.5)}
    got = ModelConfig(fresh=fresh | {"attn": {"layers": (0, np.int32(1))}}).fresh
    assert got == {**fresh, "attn": {"layers": [0, 1]}}
    assert type(got["hidden_size"]) is int and type(got["norm_eps"]) is float
    for value, words in (
        (float("nan"), "config.model.fresh.x must be finite"),
        ({1: 2}, "config.model.fresh.x: names of fields must be strings. Got: 1."),
        ([{"a": {3}}], "config.model.fresh.x.0.a must be a JSON value"),
        (len, "config.model.fresh.x must be a JSON value"),
    ):
        with pytest.raises(ConfigError) as error:
            ModelConfig(fresh={"x": value})
        assert words in str(error.value)
