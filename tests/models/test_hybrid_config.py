"""config.json of hybrid models: nested and flat, patterns of layers, positions, what is refused."""

import json
import math

import goldens
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import CONFIGS

from refine_jax.architectures import QWEN3_5_0_8B, QWEN3_5_2B, QWEN3_5_4B, QWEN3_5_9B
from refine_jax.base.errors import ModelConfigError
from refine_jax.checkpoint.tree import abstract_params
from refine_jax.models.config import model_config, unused_fields

L, F = "linear_attention", "full_attention"
QWEN, OLMO = CONFIGS["qwen"], CONFIGS["olmo"]

# What the published configuration classes give where a field is absent.
DEFAULTS = {
    "qwen3_5_text": {
        "vocab_size": 248320,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "head_dim": 256,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "layer_types": [L, L, L, F] * 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "olmo_hybrid": {
        "vocab_size": 100352,
        "hidden_size": 3840,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 30,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "linear_conv_kernel_dim": 4,
        "linear_allow_neg_eigval": True,
        "layer_types": [L, L, L, F] * 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": 100257,
    },
}


@pytest.mark.parametrize("family", DEFAULTS)
def test_defaults_are_the_published_ones(family):
    written = model_config({"model_type": family}).to_hf()
    assert {name: written[name] for name in DEFAULTS[family]} == DEFAULTS[family]


def test_parameters_of_a_published_model():
    """Qwen3.5-0.8B, layer by layer: what its text model has of the folder's 0.87e9."""
    shapes = abstract_params(QWEN3_5_0_8B)
    wide, mlp = 1024, 3 * 1024 * 3584 + 2 * 1024
    linear = wide * (3 * 2048 + 2048 + 2 * 16) + 4 * 3 * 2048 + 2 * 16 + 128 + 2048 * wide
    full = wide * (2 * 2048 + 2 * 512) + 2048 * wide + 2 * 256
    want = 248320 * wide + 18 * (linear + mlp) + 6 * (full + mlp) + wide
    assert sum(math.prod(x.shape) for x in shapes.values()) == want
    assert 0.7e9 < want < 0.8e9


@pytest.mark.parametrize(
    ("fields", "billions"), [(QWEN3_5_2B, 1.88), (QWEN3_5_4B, 4.21), (QWEN3_5_9B, 8.95)]
)
def test_parameters_of_larger_models(fields, billions):
    """Of the text models alone, by hand."""
    wide, mlp = fields["hidden_size"], fields["intermediate_size"]
    values = 128 * fields["linear_num_value_heads"]
    queries, keys = (256 * fields[f"num_{of}_heads"] for of in ("attention", "key_value"))
    linear = wide * (2 * 2048 + 2 * values) + values * wide
    full = wide * (2 * queries + 2 * keys) + queries * wide
    layers = fields["num_hidden_layers"] * (3 * linear + full + 4 * 3 * wide * mlp) / 4
    heads = 1 if fields["tie_word_embeddings"] else 2
    found = sum(math.prod(x.shape) for x in abstract_params(fields).values())
    assert found == pytest.approx(layers + heads * 248320 * wide, rel=2e-3)
    assert found == pytest.approx(1e9 * billions, rel=2e-3)


def test_sizes_that_follow_from_others():
    olmo = model_config({"model_type": "olmo_hybrid"})
    assert (olmo.attention.head_dim, olmo.attention.num_kv_heads) == (128, 30)
    assert (olmo.linear.key_dim, olmo.linear.value_dim, olmo.linear.num_heads) == (96, 192, 30)
    assert olmo.linear.norm_eps == 1e-5 != olmo.norm_eps
    qwen = model_config({"model_type": "qwen3_5_text"})
    assert (qwen.attention.rotary_dim, qwen.attention.gated) == (64, True)


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        (QWEN | {"layer_types": None, "full_attention_interval": 2}, [L, F, L, F]),
        (QWEN | {"layer_types": None}, [L, L, L, F]),
        (QWEN | {"layer_types": [F] * 4}, [F] * 4),
        (OLMO | {"layer_types": None, "num_hidden_layers": 5}, [L, L, L, F, L]),
        (OLMO | {"layer_types": None, "num_hidden_layers": 3}, [L, L, F]),
        (CONFIGS["deltanet_hybrid"], [L, F, L]),
    ],
)
def test_patterns_of_layers(fields, want):
    config = model_config(fields)
    assert list(config.layer_kinds) == want
    shapes = abstract_params(fields)
    counts = {name.split(".")[1]: x.shape[0] for name, x in shapes.items() if "layers" in name}
    assert counts == {kind: want.count(kind) for kind in set(want)}


def test_attention_of_several_forms():
    first = {"layers": [0], "num_heads": 2}
    second = {"layers": [2], "num_heads": 4, "num_kv_heads": 2, "window_size": 5}
    config = model_config(CONFIGS["deltanet"] | {"num_hidden_layers": 3, "attn": [first, second]})
    assert config.layer_kinds == (F, L, f"{F}_1")
    assert config.layer_config(f"{F}_1").window == 5
    assert model_config(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("attn", [None, []])
def test_no_attention_is_the_plain_model(attn):
    plain = model_config(CONFIGS["deltanet"])
    assert model_config(CONFIGS["deltanet"] | {"attn": attn}) == plain
    assert plain.layer_kinds is None and "attn" not in plain.to_hf()


def test_a_nested_config_is_that_of_its_text():
    nested = {
        "model_type": "qwen3_5",
        "text_config": QWEN | {"tie_word_embeddings": False},
        "vision_config": {"depth": 2},
        "image_token_id": 7,
        "tie_word_embeddings": True,
    }
    config = model_config(nested)
    assert config.tie_word_embeddings and config.hidden_size == 16
    assert unused_fields(nested) == []
    nested["text_config"] |= {"later": 1}
    assert unused_fields(nested | {"more": 2}) == ["text_config.later", "more"]
    again = json.loads(json.dumps(config.to_hf()))
    assert again["text_config"]["model_type"] == "qwen3_5_text"
    assert model_config(again) == config


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({"rope_theta": None}, None),
        ({"rope_parameters": {"rope_theta": None, "rope_type": "default"}}, None),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 500000}, 5e5),
        ({"rope_parameters": None}, 1e4),
        ({"rope_parameters": {}}, 1e4),
        ({"rope_theta": 7.0, "rope_scaling": None}, 7.0),
    ],
)
def test_positions(fields, theta):
    assert model_config(OLMO | fields).rope_theta == theta


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (QWEN | {"rope_theta": None}, "rope_theta must be a number"),
        (QWEN | {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type must be"),
        (QWEN | {"rope_parameters": {"factor": 4}}, "rope_parameters.factor must be 1"),
        (QWEN | {"rope_parameters": 3}, "rope_parameters must be an object or null"),
        (
            QWEN | {"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 1e5},
            "rope_parameters.rope_theta must be 100000.0, as it is elsewhere",
        ),
        (QWEN | {"partial_rotary_factor": 0.15}, "an even part of a head"),
        (QWEN | {"layer_types": [L]}, "layer_types must be a list of num_hidden_layers=4 names"),
        (QWEN | {"layer_types": [L, F, "mamba", F]}, "layer_types must be a list"),
        (QWEN | {"num_key_value_heads": 3}, "num_key_value_heads must be a divisor"),
        (QWEN | {"linear_num_value_heads": 3}, "linear_num_value_heads must be a multiple of"),
        (OLMO | {"num_attention_heads": 3}, "num_attention_heads must be a divisor"),
        (OLMO | {"rms_norm_eps": -1}, "rms_norm_eps must be a number"),
        (QWEN | {"num_experts": 8}, "num_experts must be null: mixtures of experts are not"),
        (QWEN | {"quantization_config": {}}, "quantization_config must be null"),
        ({"model_type": "qwen3_5_moe"}, "mixtures of experts are not supported; the dense"),
        ({"model_type": "qwen3_5", "text_config": 3}, "text_config must be an object"),
        (
            {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_moe_text"}},
            "text_config.model_type must be qwen3_5_text",
        ),
        (
            CONFIGS["deltanet"] | {"attn": {"layers": [2], "num_heads": 2}},
            "attn.layers must be numbers of layers below num_hidden_layers=2",
        ),
        (
            CONFIGS["deltanet"] | {"attn": [{"layers": [1], "num_heads": 2}] * 2},
            "attn.layers must be layers named once each",
        ),
        (CONFIGS["deltanet"] | {"attn": {"num_heads": 2}}, "attn.layers must be a list"),
        (
            CONFIGS["deltanet"] | {"attn": {"layers": [1], "num_heads": 3}},
            "attn.num_heads must be such that hidden_size=16",
        ),
        (
            CONFIGS["deltanet"] | {"attn": {"layers": [1], "num_heads": 2, "window_size": 0}},
            "attn.window_size must be a whole number",
        ),
        (CONFIGS["deltanet"] | {"attn": "all"}, "attn must be null, an object or a list"),
    ],
)
def test_what_is_refused_is_named(fields, words):
    with pytest.raises(ModelConfigError) as failure:
        model_config(fields)
    assert words in str(failure.value) and len(str(failure.value)) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = sorted({*QWEN, *OLMO, "attn", "rope_theta", "rope_parameters", "text_config"})
SPECS = st.dictionaries(
    st.sampled_from(["layers", "num_heads", "window_size", "rope_theta"]),
    JSON | st.lists(st.integers(0, 3), max_size=3) | st.integers(0, 8),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(["qwen", "olmo", "deltanet_hybrid", "nested"]),
    changes=st.dictionaries(st.sampled_from(NAMES), JSON | SPECS | st.integers(0, 64), max_size=3),
)
def test_any_json_is_a_model_or_one_message(name, changes):
    """What is accepted survives being written and read again; its layers can be told."""
    nested = {"model_type": "qwen3_5", "text_config": QWEN}
    fields = (nested if name == "nested" else CONFIGS[name]) | changes
    try:
        config = model_config(fields)
        unused_fields(fields)
    except ModelConfigError as error:
        assert len(str(error)) < 1000
        return
    assert model_config(json.loads(json.dumps(config.to_hf(), allow_nan=False))) == config
    assert hash(config) == hash(model_config(config.to_hf()))
    kinds = config.layer_kinds
    assert kinds is None or len(kinds) == config.num_hidden_layers


@pytest.mark.parametrize("folder", goldens.model_folders() or ["absent"])
def test_published_configs_have_nothing_unused(folder):
    published = json.loads(goldens.require(folder, "config.json").read_text())
    assert unused_fields(published) == []
