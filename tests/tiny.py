"""Tiny models of every family with weights far from their initial values, for tests of laws."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax.config import RefineConfig
from refine_jax.models.config import model_config
from refine_jax.models.transformer import ComputePolicy, Model

# Of the kernels, to put other implementations through the same tests.
IMPLEMENTATION = os.environ.get("REFINE_IMPLEMENTATION")

_COMMON = {"vocab_size": 53, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
_LACT = _COMMON | {
    "model_type": "lact_swiglu",
    "num_attn_heads": 4,
    "num_lact_heads": 2,
    "lact_chunk_size": 8,
    "window_size": 6,
    "w0_w2_low_rank": 4,
}
_L, _F = "linear_attention", "full_attention"
_QWEN = _COMMON | {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "partial_rotary_factor": 0.5,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": [_L, _F, _L, _F],
}
_OLMO = _COMMON | {
    "model_type": "olmo_hybrid",
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 12,
    "layer_types": [_L, _L, _F],
}
_DELTA = _COMMON | {"model_type": "delta_net", "num_heads": 2}

CONFIGS = {
    "lact": _LACT,
    "lact_prenorm": _LACT
    | {"ttt_prenorm": True, "use_momentum": False, "w0_w2_low_rank": -1, "attn_qk_norm": True},
    "lact_muon": _LACT | {"use_muon": True, "muon_dtype": "float32", "inter_multi": 2},
    "deltanet": _DELTA,
    "deltanet_plain": _DELTA
    | {"use_short_conv": False, "use_gate": True, "expand_v": 2, "qk_activation": "relu"},
    "gated_deltanet": _COMMON
    | {"model_type": "gated_deltanet", "num_heads": 2, "head_dim": 8, "num_v_heads": 4},
    "qwen": _QWEN,
    "qwen_irregular": _QWEN | {"layer_types": [_F, _L, _F, _F], "num_key_value_heads": 1},
    "olmo": _OLMO,
    "deltanet_hybrid": _DELTA
    | {
        "num_hidden_layers": 3,
        "attn": {"layers": [1], "num_heads": 2, "window_size": 7, "qkv_bias": True},
    },
}


# Rollouts of several a position, with a reward of both kinds.
REFINE = RefineConfig(
    num_positions=2,
    rollouts_per_position=2,
    rollout_length=3,
    edge_margin=3,
    reward="hybrid",
    lambda_rl=0.7,
)


# As they are, 6e-8 of each parameter, a rounding, moves what follows by 2e-5: more than is tested.
_FACTORS = {"olmo": 0.5}


@functools.cache
def tiny(name: str, **changes):
    """(Model, params) of a family; `changes` are fields of its config."""
    model = Model(
        model_config(CONFIGS[name] | changes), ComputePolicy(implementation=IMPLEMENTATION)
    )
    params = jax.jit(model.init)(jax.random.key(0))
    leaves, structure = jax.tree.flatten(jax.device_get(params))
    noise = np.random.default_rng(len(name))

    def perturb(leaf):
        # Norm weights away from 1, biases from 0, projections large enough to matter.
        scale = 0.15 if leaf.ndim > 2 else 0.1
        return leaf + np.float32(scale * noise.standard_normal(leaf.shape))

    moved = jax.tree.unflatten(structure, [perturb(leaf) for leaf in leaves])
    return model, scaled(moved, _FACTORS.get(name, 1.0))


def scaled(params, factor: float):
    """Parameters times a factor, by numpy: jax would compile a program for each shape."""
    return jax.tree.map(lambda x: jnp.asarray(np.float32(factor) * np.asarray(x)), params)


def tokens(seed: int, *shape: int) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, 53, shape, np.int32)
