"""The same numbers on every mesh: losses, gradients, sampled tokens and positions."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from refine_jax.config import MeshConfig, RefineConfig
from refine_jax.models.transformer import Model
from refine_jax.parallel import AXES, make_mesh, place_rows, state_shardings
from refine_jax.presets import PRESETS
from refine_jax.refine.answers import AnswerMethod
from refine_jax.refine.objective import Objective
from refine_jax.refine.step import row_keys

pytestmark = pytest.mark.usefixtures("programs_of_a_test")

ROWS = 8
# 8 heads and a vocabulary that 8 devices can share.
SIZES = {"vocab_size": 56, "hidden_size": 32}
FAMILIES = {
    "lact": {"num_attn_heads": 8, "num_lact_heads": 8},
    "lact_prenorm": {"num_attn_heads": 8, "num_lact_heads": 8, "qkv_bias": True},
    "deltanet": {"num_heads": 8},
    "gated_deltanet": {"num_heads": 8, "num_v_heads": 8, "head_dim": 4},
    # Keys and values of attention have fewer heads than some meshes have devices for heads.
    "qwen": {
        "num_hidden_layers": 2,
        "layer_types": ("linear_attention", "full_attention"),
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 8,
    },
    "olmo": {
        "num_hidden_layers": 2,
        "layer_types": ("linear_attention", "full_attention"),
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
    },
}
MESHES = [f"{axis}={size}" for size in (2, 4, 8) for axis in AXES]
MESHES += ["data=2,fsdp=2", "fsdp=2,tensor=2", "data=2,tensor=4", "data=2,fsdp=2,tensor=2"]
MESHES += ["dcn_data=2,fsdp=2,tensor=2", "dcn_fsdp=2,sequence=2"]
MESHES += ["fsdp=2,sequence=2", "tensor=2,sequence=4", "fsdp=2,tensor=2,sequence=2"]
# What every change is tested on; the others, an hour of compilation, are marked slow.
COVERING = {
    ("lact", "fsdp=2,tensor=2,sequence=2"),
    ("deltanet", "dcn_data=2,fsdp=2,tensor=2"),
    ("qwen", "fsdp=2,tensor=2,sequence=2"),
}
# Each a program of its own: all in one compile for minutes on a busy machine.
OBJECTIVES = ("ntp", "refine", "batch", "exact", "answers", "policy")
CASES = [
    pytest.param(
        family,
        mesh,
        objective,
        marks=() if (family, mesh) in COVERING else pytest.mark.slow,
        id=f"{family}-{mesh}-{objective}",
    )
    for family in FAMILIES
    for mesh in MESHES
    for objective in OBJECTIVES
]
CONFIG = RefineConfig(
    reward="hybrid",
    grouping="position",
    num_positions=2,
    rollouts_per_position=2,
    rollout_length=3,
    edge_margin=3,
    lambda_rl=1.0,
    kl_coef=0.1,
)


def mesh_of(described: str):
    sizes = {name: int(size) for name, size in (part.split("=") for part in described.split(","))}
    config = MeshConfig(**dict.fromkeys((*AXES, "dcn_data"), 1) | sizes)
    return make_mesh(config, jax.devices()[: math.prod(sizes.values())])


def documents(length: int) -> dict[str, np.ndarray]:
    """Rows of one or two documents, some padded on either side."""
    segments = np.ones((ROWS, length), np.int32)
    segments[1, length - 20 :] = 2
    segments[2, length - 9 :] = 0
    segments[3, :7] = 0
    segments[5, length // 2 + 3 :] = 2
    return {"tokens": tiny.tokens(1, ROWS, length), "segments": segments}


def questions(length: int) -> dict[str, np.ndarray]:
    """Rows of prompts with answers of 1 to 4 tokens, then padding."""
    ends = length - 5 * np.arange(ROWS)[:, None]
    answers = 1 + np.arange(ROWS)[:, None] % 4
    slot = np.arange(length)
    return {
        "tokens": tiny.tokens(2, ROWS, length),
        "segments": (slot < ends).astype(np.int32),
        "answer_mask": ((slot < ends) & (slot >= ends - answers)).astype(np.int32),
    }


@functools.cache
def program(family: str, objective: str):
    """Loss, gradient and what was sampled, in one jitted function of parameters and rows."""
    model, params = tiny.tiny(family, **SIZES, **FAMILIES[family])
    if objective == "refine":  # what long rows are trained with
        model = Model(model.config, dataclasses.replace(model.policy, remat="full"))
    # As they are, 6e-8 of each parameter, a rounding, is 3e-5 of the gradient: more than is tested.
    params = tiny.scaled(params, 0.4)
    config = dataclasses.replace(CONFIG, objective="ntp" if objective == "ntp" else "refine")
    if objective == "exact":
        config = dataclasses.replace(config, kl_coef=0.0, **PRESETS["exact"])
    rows_objective = Objective(model, config, eos_id=2, max_documents=2)
    reference = tiny.scaled(params, 0.98)
    answers = AnswerMethod(model, CONFIG, max_answer_tokens=4, eos_id=2, pad_id=0)

    keys = row_keys(jax.random.key(7), jnp.int32(3), ROWS)

    def sample(params, rows, asked):
        """What the loss is given as it is: rollouts, or sampled answers with their advantages."""
        if objective == "batch":
            reading = rows_objective.read(params, rows)
            return rows_objective.roll_out(params, reading, rows, keys, reference)[0], None
        if objective == "policy":
            sampled = answers.sample(params, asked, keys, samples=2, temperature=1.0)
            return sampled, answers.advantages(jnp.mean(sampled.tokens % 7, axis=-1), sampled)
        return None, None

    def loss(params, asked, sampled, graded):
        if objective == "answers":
            return answers.nll(params, asked)[0] / ROWS
        rest = {"mini_batch_mask": sampled.mask}
        return answers.policy_loss(params, asked, sampled, graded, **rest)[0]

    def run(params, rows, asked):
        sampled, graded = jax.lax.stop_gradient(sample(params, rows, asked))
        if objective in ("answers", "policy"):
            return jax.value_and_grad(loss)(params, asked, sampled, graded), sampled
        gradient, metrics = rows_objective.gradient(
            params,
            rows,
            rows_objective.mini_batch(rows),
            keys=keys,
            experience=sampled,
            reference_params=reference,
        )
        return (metrics["loss/total"], gradient), sampled

    return jax.jit(run), params


@functools.cache
def on_one_device(family: str, objective: str, length: int):
    run, params = program(family, objective)
    return jax.device_get(run(params, documents(length), questions(length)))


@pytest.mark.parametrize(("family", "sizes", "objective"), CASES)
def test_losses_and_gradients_do_not_depend_on_the_mesh(family, sizes, objective):
    mesh = mesh_of(sizes)
    length = 64 * max(2, mesh.shape["sequence"])  # a device holds whole blocks of saved states
    (loss, gradients), sampled = on_one_device(family, objective, length)
    run, params = program(family, objective)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, state_shardings(params))
        rows, asked = place_rows(documents(length)), place_rows(questions(length))
        (found, found_gradients), again = jax.device_get(run(params, rows, asked))
    names = {"batch": ("starts", "valid", "tokens"), "policy": ("tokens",)}
    for name in names.get(objective, ()):
        np.testing.assert_array_equal(getattr(again, name), getattr(sampled, name))
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    for (path, one), many in zip(
        jax.tree_util.tree_leaves_with_path(gradients),
        jax.tree.leaves(found_gradients),
        strict=True,
    ):
        error = np.linalg.norm(many - one) / np.linalg.norm(one)
        assert error < 1e-5, (objective, jax.tree_util.keystr(path), error)
