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
from refine_jax.parallel import AXES, make_mesh, place_rows, state_shardings
from refine_jax.refine.answers import AnswerMethod
from refine_jax.refine.method import Method
from refine_jax.refine.step import row_keys

ROWS = 8
# 8 heads and a vocabulary that 8 devices can share.
SIZES = {"vocab_size": 56, "hidden_size": 32}
FAMILIES = {
    "lact": {"num_attn_heads": 8, "num_lact_heads": 8},
    "lact_prenorm": {"num_attn_heads": 8, "num_lact_heads": 8, "qkv_bias": True},
    "deltanet": {"num_heads": 8},
    "gated_deltanet": {"num_heads": 8, "num_v_heads": 8, "head_dim": 4},
}
MESHES = [f"{axis}={size}" for size in (2, 4, 8) for axis in AXES]
MESHES += ["data=2,fsdp=2", "fsdp=2,tensor=2", "data=2,tensor=4", "data=2,fsdp=2,tensor=2"]
MESHES += ["fsdp=2,sequence=2", "tensor=2,sequence=4", "fsdp=2,tensor=2,sequence=2"]
# What every change is tested on; the others, an hour of compilation, are marked slow.
COVERING = {
    ("lact", "fsdp=2,tensor=2,sequence=2"),
    ("deltanet", "data=2,fsdp=2,tensor=2"),
}
CASES = [
    pytest.param(
        family,
        mesh,
        marks=() if (family, mesh) in COVERING else pytest.mark.slow,
        id=f"{family}-{mesh}",
    )
    for family in FAMILIES
    for mesh in MESHES
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
    config = MeshConfig(**{name: sizes.get(name, 1) for name in AXES})
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
def program(family: str):
    """All objectives of a family in one jitted function of parameters and rows."""
    model, params = tiny.tiny(family, **SIZES, **FAMILIES[family])
    # As they are, 6e-8 of each parameter, a rounding, is 3e-5 of the gradient: more than is tested.
    params = jax.tree.map(lambda x: 0.4 * x, params)
    methods = {
        objective: Method(
            model,
            dataclasses.replace(CONFIG, objective=objective),
            eos_id=2,
            max_documents=2,
        )
        for objective in ("ntp", "refine")
    }
    reference = jax.tree.map(lambda x: 0.98 * x, params)
    answers = AnswerMethod(model, CONFIG, max_answer_tokens=4, eos_id=2, pad_id=0)

    def losses(params, rows, asked):
        keys = row_keys(jax.random.key(7), jnp.int32(3), ROWS)
        token_count = jnp.float32(rows["tokens"].size)
        experience, _ = methods["refine"].collect(params, reference, rows, keys)
        sampled = answers.sample(params, asked, keys, samples=2, temperature=1.0)
        graded = answers.advantages(jnp.mean(sampled.tokens % 7, axis=-1), sampled)
        experience, sampled, graded = jax.lax.stop_gradient((experience, sampled, graded))

        def objective(params, name):
            if name == "answers":
                return answers.nll(params, asked)[0] / ROWS
            if name == "policy":
                rest = {"mini_batch_mask": sampled.mask}
                return answers.policy_loss(params, asked, sampled, graded, **rest)[0]
            given = experience if name == "refine" else None
            return methods[name].loss(params, rows, given, token_count=token_count)[0]

        names = ("ntp", "refine", "answers", "policy")
        found = {name: jax.value_and_grad(objective)(params, name) for name in names}
        return found, (experience, sampled)

    return jax.jit(losses), params


@functools.cache
def on_one_device(family: str, length: int):
    run, params = program(family)
    return jax.device_get(run(params, documents(length), questions(length)))


@pytest.mark.parametrize(("family", "sizes"), CASES)
def test_losses_and_gradients_do_not_depend_on_the_mesh(family, sizes):
    mesh = mesh_of(sizes)
    length = 64 * max(2, mesh.shape["sequence"])  # a device holds whole blocks of saved states
    expected, (rollouts, answers) = on_one_device(family, length)
    run, params = program(family)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, state_shardings(params))
        rows, asked = place_rows(documents(length)), place_rows(questions(length))
        found, (sampled, answered) = jax.device_get(run(params, rows, asked))
    for name in ("starts", "valid", "tokens"):
        np.testing.assert_array_equal(getattr(sampled, name), getattr(rollouts, name))
    np.testing.assert_array_equal(answered.tokens, answers.tokens)
    for objective, (loss, gradients) in expected.items():
        np.testing.assert_allclose(found[objective][0], loss, rtol=1e-5)
        for (path, one), many in zip(
            jax.tree_util.tree_leaves_with_path(gradients),
            jax.tree.leaves(found[objective][1]),
            strict=True,
        ):
            error = np.linalg.norm(many - one) / np.linalg.norm(one)
            assert error < 1e-5, (objective, jax.tree_util.keystr(path), error)
