"""config.json of models: every field has a type and a range, and what matters is not ignored."""

import json
import time

import goldens
import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refine_jax.base.errors import ModelConfigError
from refine_jax.base.files import parse_object
from refine_jax.checkpoint.tree import abstract_params
from refine_jax.config import ModelConfig as ModelSettings
from refine_jax.models.config import LaCTConfig, model_config, unused_fields
from refine_jax.phases.setup import load_start

# The fields that are read and what the published configuration classes give where they are absent;
# initializer_range, which is for new weights alone, is one for all families of ours.
SHARED = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DELTA = SHARED | {
    "use_short_conv": True,
    "conv_size": 4,
    "allow_neg_eigval": False,
}
DEFAULTS = {
    "lact_swiglu": SHARED
    | {
        "num_hidden_layers": 24,
        "num_attn_heads": 32,
        "num_lact_heads": 4,
        "inter_multi": 1,
        "lact_chunk_size": 2048,
        "window_size": 2048,
        "qkv_bias": False,
        "attn_qk_norm": False,
        "qkv_silu": True,
        "no_v_silu": False,
        "lr_dim": 1,
        "lr_parameterization": "mamba",
        "use_muon": False,
        "use_momentum": True,
        "learnable_ttt_scale": True,
        "ttt_loss_type": "dot_product",
        "ttt_prenorm": False,
        "ttt_nope": False,
        "w0_w2_low_rank": -1,
        "fw_init_gain": 0.5,
        "rope_theta": 10000.0,
        "use_fused_kernel": False,
    },
    "delta_net": DELTA
    | {
        "num_hidden_layers": 24,
        "num_heads": 16,
        "expand_k": 1.0,
        "expand_v": 1.0,
        "use_gate": False,
        "use_beta": True,
        "qk_norm": "l2",
        "qk_activation": "silu",
    },
    "gated_deltanet": DELTA
    | {
        "num_hidden_layers": 21,
        "num_heads": 6,
        "num_v_heads": None,
        "head_dim": 256,
        "expand_v": 2.0,
        "use_gate": True,
    },
}
FAMILIES = list(DEFAULTS)
OURS = {"muon_dtype"}  # a field that the published code does not have

NESTED: list = []
for _ in range(900):
    NESTED = [NESTED]
NOT_NUMBERS = ["4", "", True, False, [4], [], {}, {"a": 1}, NESTED]
NOT_SIZES = [*NOT_NUMBERS, 4.0, 4.5, -1, -(10**30), 10**9, 2**31, 2**63, 10**400]
NOT_SIZES += [float("nan"), float("inf"), 1e400]
NOT_POSITIVE = [*NOT_NUMBERS, 0, -1, -1e-6, 1e-45, 1e40, 10**400, float("nan"), float("inf")]
NOT_TRUTHS = [0, 1, 1.0, "true", "", [], [True], {}, NESTED]
NOT_CHOICES = ["gelu", "SWISH", "", 0, 1, True, [], ["swish"], {}, NESTED]
NOT_TOKENS = [
    "2",
    "",
    True,
    2.0,
    -2,
    2**31,
    10**400,
    {},
    [None],
    [2, "3"],
    [[2]],
    [True],
    [2] * 10**6,
    NESTED,
]

ZERO_IS_ALLOWED = {"w0_w2_low_rank", "initializer_range", "fw_init_gain"}


def malformed(name: str, default: object) -> list:
    """Values that the field must not have, by the type of its default."""
    if name.endswith("_token_id"):
        return NOT_TOKENS
    if isinstance(default, bool):
        return NOT_TRUTHS
    if isinstance(default, str):
        return NOT_CHOICES
    if isinstance(default, float) or name in ("hidden_ratio", "inter_multi"):
        values = NOT_POSITIVE
        if name in ZERO_IS_ALLOWED:
            values = [value for value in values if value not in (0, 1e-45) or value is False]
        return values
    if name == "w0_w2_low_rank":
        return [*(value for value in NOT_SIZES if value != -1 or value is True), -2]
    return [*NOT_SIZES, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_checked(family):
    """The message names the family and the field, and is short whatever the value is."""
    for name, default in DEFAULTS[family].items():
        for value in malformed(name, default):
            with pytest.raises(ModelConfigError) as failure:
                model_config({"model_type": family, name: value})
            message = str(failure.value)
            assert message.startswith(f"{family}: {name} must be "), message
            assert f"Got: {name}=" in message and len(message) < 300, message


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_the_published_ones_and_null_means_them(family):
    config = model_config({"model_type": family})
    read = config.to_hf()
    assert read.keys() - {"model_type", "architectures"} - OURS == DEFAULTS[family].keys()
    assert {name: read[name] for name in DEFAULTS[family]} == DEFAULTS[family]
    for name in DEFAULTS[family].keys() - {"bos_token_id", "eos_token_id", "window_size"}:
        assert model_config({"model_type": family, name: None}) == config, name


def test_null_where_the_published_code_gives_it_a_meaning():
    assert model_config({"model_type": "delta_net", "eos_token_id": None}).eos_token_id is None
    assert model_config({"model_type": "delta_net", "bos_token_id": None}).bos_token_id is None
    with pytest.raises(ModelConfigError, match=r"window_size must be a number: attention to all"):
        model_config({"model_type": "lact_swiglu", "window_size": None})


@pytest.mark.parametrize("model_type", ["llama", "", None, 3, True, ["delta_net"], {}, NESTED])
def test_an_unknown_model_type(model_type):
    with pytest.raises(ModelConfigError, match="model_type must be one of"):
        model_config({"model_type": model_type})


def test_silu_is_swish_and_numbers_may_be_whole():
    for family in FAMILIES:
        fields = {"hidden_act": "silu", "norm_eps": 1, "hidden_ratio": 2, "initializer_range": 0}
        config = model_config({"model_type": family} | fields)
        assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize("ends", [[2, 3], [2], [], 7, None, -1])
def test_end_tokens_may_be_several(ends):
    config = model_config({"model_type": "delta_net", "eos_token_id": ends})
    assert config.eos_token_id == (tuple(ends) if isinstance(ends, list) else ends)
    again = json.loads(json.dumps(config.to_hf()))
    assert again["eos_token_id"] == ends and model_config(again) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attn_heads": 3}, "num_attn_heads must be a divisor of hidden_size=2048"),
        ({"num_lact_heads": 3}, "num_lact_heads must be a divisor"),
        ({"num_attn_heads": 2048}, "such that heads are even"),
        ({"inter_multi": 1e-3}, "inter_multi must be such that a fast weight has a width from 1"),
        ({"hidden_size": 2**20, "inter_multi": 1000}, "hidden_ratio must be such that the MLP"),
        (
            {"hidden_size": 2**20, "inter_multi": 1000, "intermediate_size": 1},
            "inter_multi must be such that a fast weight",
        ),
        ({"lr_dim": 2}, "lr_dim must be one of"),
    ],
)
def test_lact_sizes_that_do_not_fit(changes, words):
    with pytest.raises(ModelConfigError, match=words):
        model_config({"model_type": "lact_swiglu"} | changes)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("delta_net", {"num_heads": 3}, "expand_k must be such that num_heads=3 divides 2048"),
        ("delta_net", {"expand_v": 1000}, "expand_v must be such that its projection"),
        ("delta_net", {"hidden_size": 1, "expand_k": 0.001}, "expand_k must be such that"),
        ("gated_deltanet", {"num_v_heads": 7}, "num_v_heads must be a multiple of num_heads=6"),
        ("gated_deltanet", {"head_dim": 5, "expand_v": 1.5}, "expand_v must be such that head_dim"),
        ("gated_deltanet", {"head_dim": 2**19}, "head_dim must be such that q_proj has a width"),
        ("gated_deltanet", {"expand_v": 1000}, "expand_v must be such that v_proj has a width"),
    ],
)
def test_delta_sizes_that_do_not_fit(family, changes, words):
    with pytest.raises(ModelConfigError, match=words):
        model_config({"model_type": family} | changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_sizes_are_described_at_once(family):
    """What is allowed costs no more the larger it is: nothing is allocated and no layer is run."""
    sizes = {"vocab_size": 2**24, "hidden_size": 2**20, "num_hidden_layers": 2**10}
    sizes |= {"intermediate_size": 2**20, "head_dim": 2**20, "expand_v": 1, "num_heads": 1}
    sizes |= {"num_attn_heads": 2**10, "num_lact_heads": 2**10, "w0_w2_low_rank": 2**20}
    started = time.process_time()
    shapes = abstract_params({"model_type": family} | sizes)
    assert time.process_time() - started < 10
    assert shapes["lm_head.weight"].shape == (2**24, 2**20)


# ---- Positions ----

V5 = {"rope_theta": 1e6, "rope_type": "default"}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 1000000},
        {"rope_parameters": V5},
        {"rope_parameters": V5, "rope_theta": 1000000},
        {"rope_parameters": V5, "rope_theta": None, "rope_scaling": None},
        {"rope_parameters": V5 | {"partial_rotary_factor": 1.0}, "partial_rotary_factor": 1},
        {"rope_parameters": {"rope_theta": 1e6}},
        {"rope_scaling": V5},
        {"rope_scaling": {"type": "default", "factor": 1.0}, "rope_theta": 1e6},
        {"rope_scaling": {"rope_type": None, "factor": None}, "rope_theta": 1e6},
        {"rope_scaling": {}, "rope_parameters": {}, "rope_theta": 1e6},
    ],
)
def test_positions_are_read_where_they_stand(fields):
    fields |= {"model_type": "lact_swiglu", "max_position_embeddings": 7}
    assert model_config(fields).rope_theta == 1e6
    assert unused_fields(fields) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling.type must be default"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rope_scaling.rope_type must be"),
        ({"rope_scaling": {"factor": 8.0}}, r"rope_scaling.factor must be 1"),
        ({"rope_scaling": {"factor": True}}, r"rope_scaling.factor must be 1"),
        ({"rope_scaling": {"mrope_section": [2, 1, 1]}}, r"rope_scaling.mrope_section must be abs"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object or null"),
        ({"rope_parameters": 1e6}, "rope_parameters must be an object or null"),
        ({"rope_parameters": [V5]}, "rope_parameters must be an object or null"),
        ({"rope_parameters": V5 | {"rope_type": "llama3"}}, r"rope_parameters.rope_type must be"),
        ({"rope_parameters": {"full_attention": V5}}, r"rope_parameters.full_attention must be"),
        ({"rope_parameters": V5, "rope_theta": 1e4}, r"rope_parameters.rope_theta must be 10000.0"),
        ({"rope_parameters": {"rope_theta": None}}, r"rope_parameters.rope_theta must be a number"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta must be a number from 1"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta must be a number from 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor must be 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
    ],
)
def test_other_positions_are_refused_by_name(fields, words):
    with pytest.raises(ModelConfigError, match=words):
        model_config({"model_type": "lact_swiglu"} | fields)
    # DeltaNet has no positions: there these fields change nothing, and are said to be unused.
    for family in ("delta_net", "gated_deltanet"):
        assert model_config({"model_type": family} | fields) == model_config({"model_type": family})
        assert unused_fields({"model_type": family} | fields) == list(fields)


# ---- What is not supported, and what is not used ----


@pytest.mark.parametrize(
    ("families", "name", "value", "neutral"),
    [
        (FAMILIES, "quantization_config", {"quant_method": "gptq"}, None),
        (FAMILIES, "hidden_act", "gelu", "silu"),
        (FAMILIES, "rms_norm_eps", 1e-5, 1e-6),
        (FAMILIES[1:], "conv_bias", True, False),
        (FAMILIES[1:], "share_conv_kernel", True, False),
        (FAMILIES[1:], "norm_first", True, False),
        (FAMILIES[1:], "use_rope", True, False),
        (FAMILIES[1:], "attnres_block_size", 4, None),
        (["delta_net"], "qk_norm", "softmax", "sum"),
        (["gated_deltanet"], "use_mamba_gate", False, True),
        (["gated_deltanet"], "use_residual", True, False),
        (["lact_swiglu"], "ttt_loss_type", "l2", "dot_product"),
        (["lact_swiglu"], "lr_parameterization", "none", "mamba"),
    ],
)
def test_another_function_is_refused_by_name(families, name, value, neutral):
    for family in families:
        with pytest.raises(ModelConfigError, match=f"{family}: {name} must be ") as failure:
            model_config({"model_type": family, name: value})
        assert f"Got: {name}=" in str(failure.value)
        for accepted in (neutral, None):
            fields = {"model_type": family, name: accepted}
            model_config(fields)
            assert unused_fields(fields) == []


def test_norm_eps_holds_where_both_names_are_there():
    fields = {"model_type": "delta_net", "norm_eps": 1e-5, "rms_norm_eps": 1e-6}
    assert model_config(fields).norm_eps == 1e-5


@pytest.mark.parametrize("folder", goldens.model_folders() or ["absent"])
def test_published_configs_have_nothing_unused(folder):
    published = json.loads(goldens.require(folder, "config.json").read_text())
    assert unused_fields(published) == []
    fields = published | {"use_output_norm": False, "chunk_size": 64, "dropout": 0.1}
    if "attention_bias" not in published:  # a setting of other families
        fields["attention_bias"] = True
    assert model_config(fields) == model_config(published)
    assert unused_fields(fields | {"later": None}) == ["chunk_size", "dropout"]


# ---- Whoever makes a configuration ----


def test_a_fresh_model_is_checked_alike(tmp_path):
    for change, words in (
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 1024"),
        ({"hidden_size": 64.0}, "hidden_size must be a whole number"),
        ({"norm_eps": -1.0}, "norm_eps must be a number"),
        ({"attn": {"layers": [0]}}, "attn.num_heads must be a whole number"),
    ):
        settings = ModelSettings(fresh={"model_type": "delta_net"} | change)
        with pytest.raises(ModelConfigError, match=words):
            load_start(settings, tmp_path)
    with pytest.raises(ModelConfigError, match="norm_eps must be a number"):
        LaCTConfig(norm_eps=0.0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = sorted({name for fields in DEFAULTS.values() for name in fields})
PLACES = st.sampled_from(
    [*NAMES, "rope_scaling", "rope_parameters", "attn", "rms_norm_eps", "other"]
)
POSITIONS = st.dictionaries(st.sampled_from(["rope_theta", "rope_type", "factor"]), JSON)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(FAMILIES),
    changes=st.dictionaries(PLACES, JSON | POSITIONS | st.integers(0, 64), max_size=4),
)
def test_any_json_is_a_model_or_one_message(family, changes):
    """What is accepted survives being written and read again; its shapes can be told."""
    try:
        config = model_config({"model_type": family} | changes)
        unused_fields({"model_type": family} | changes)
    except ModelConfigError as error:
        assert len(str(error)) < 1000
        return
    text = json.dumps(config.to_hf(), allow_nan=False)
    assert model_config(parse_object(text, "config.json", ModelConfigError)) == config
    assert hash(config) == hash(model_config(config.to_hf()))
    assert min(config.mlp_size, config.token_multiple, config.num_hidden_layers) >= 1


def test_shapes_of_a_small_model_of_each_family():
    sizes = {"vocab_size": 1, "hidden_size": 2, "num_hidden_layers": 1, "intermediate_size": 1}
    sizes |= {"num_heads": 1, "num_attn_heads": 1, "num_lact_heads": 1, "head_dim": 1}
    for family in FAMILIES:
        for shape in jax.tree.leaves(abstract_params({"model_type": family} | sizes)):
            assert 0 not in shape.shape
