"""Low-rank updates of linear maps: derivatives by formula, several at once, names and patterns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import REFINE, tiny, tokens

from refine_jax.base.errors import ModelConfigError
from refine_jax.models.layers import Linear
from refine_jax.models.lora import LoRA, attach, choose_targets, init_updates, linear_maps, merge
from refine_jax.models.trainable import join, select, split
from refine_jax.models.transformer import Model
from refine_jax.refine.objective import Objective

pytestmark = pytest.mark.usefixtures("programs_of_a_test")


def with_updates(params, patterns="*", rank=3, alpha=6.0):
    """Parameters with updates that are as large as the weights."""
    lora = LoRA(rank, alpha, choose_targets(params, patterns))
    updates = init_updates(params, lora, jax.random.key(1))
    noise = np.random.default_rng(5)

    def draw(path, x):
        if path[-1].key == "lora_scale":
            return x
        return jnp.asarray(0.1 * noise.standard_normal(x.shape), jnp.float32)

    return join(params, jax.tree_util.tree_map_with_path(draw, updates))


def quiet(name):
    """A model whose roundings are far smaller than what is compared."""
    model, params = tiny(name)
    return model, jax.tree.map(lambda x: 0.4 * x, params)


def float64(x):
    return np.asarray(x, np.float64)


def near(got, want, tolerance):
    assert np.linalg.norm(float64(got) - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize("form", ["call", "to_groups", "from_groups"])
def test_a_linear_map_and_its_derivatives_in_float64(form):
    """x [3, T, in] by numpy: W' = W + s B A, dA = s B^T dW', dB = s dW' A^T."""
    size_in, size_out, rank, scale = 12, 18, 2, 1.5
    draw = np.random.default_rng(0).standard_normal
    x, weight = draw((3, 5, size_in)), draw((size_out, size_in))
    a, b = draw((rank, size_in)), draw((size_out, rank))
    # dy [3, T, out] is one array, cut as the outputs of each form are.
    dy = draw((3, 5, size_out))

    def run(a, b):
        linear = Linear(size_in, size_out, rngs=nnx.Rngs(0))
        linear.weight[...] = jnp.asarray(weight, jnp.float32)
        attach(linear, {"lora_A": a, "lora_B": b, "lora_scale": jnp.float32(scale)})
        with jax.default_matmul_precision("highest"):
            if form == "call":
                return linear(jnp.asarray(x, jnp.float32))
            if form == "to_groups":  # [3, groups, T, part] of each third of the output
                parts = linear.to_groups(jnp.asarray(x, jnp.float32), 3, 2)
                return jnp.concatenate([jnp.moveaxis(p, 1, 2).reshape(3, 5, 6) for p in parts], -1)
            groups = jnp.moveaxis(jnp.asarray(x, jnp.float32).reshape(3, 5, 4, 3), 2, 1)
            return linear.from_groups(groups)

    y, pullback = jax.vjp(run, jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    da, db = pullback(jnp.asarray(dy, jnp.float32))
    near(y, x @ (weight + scale * b @ a).T, 1e-6)
    dw = np.einsum("bto,bti->oi", dy, x)
    near(da, scale * b.T @ dw, 1e-6)
    near(db, scale * dw @ a.T, 1e-6)


@functools.partial(jax.jit, static_argnums=(0, 3))
def gradient_of(model, trained, frozen, config, batch, keys, experience=None):
    objective = Objective(model, config, eos_id=2, max_documents=2)
    whole = objective.mini_batch(batch)
    return objective.gradient(
        trained, batch, whole, keys=keys, experience=experience, frozen=frozen
    )


@functools.partial(jax.jit, static_argnums=(0, 2))
def roll_out(model, params, config, batch, keys):
    objective = Objective(model, config, eos_id=2, max_documents=2)
    return objective.roll_out(params, objective.read(params, batch), batch, keys, None)[0]


@pytest.mark.parametrize(
    ("name", "remat", "changes"),
    [
        ("lact", "none", {}),
        ("gated_deltanet", "full", {"rollouts": "batch"}),
        ("olmo", "dots", {"objective": "ntp"}),
    ],
)
def test_loss_and_gradient_are_those_of_the_merged_weights(name, remat, changes):
    """Of a step, or of an update whose rollouts are of updates before it (`rollouts=batch`);
    dA = s B^T dW and dB = s dW A^T of merged weights, in float64.
    """
    model, params = quiet(name)
    model = Model(model.config, dataclasses.replace(model.policy, remat=remat))
    params = with_updates(params)
    trained, frozen = split(params, "lora")
    assert len(jax.tree.leaves(trained)) == 2 * len(linear_maps(params))
    segments = np.ones((2, 40), np.int32)
    segments[1, 21:] = 2
    segments[1, 37:] = 0
    batch = {"tokens": jnp.asarray(tokens(3, 2, 40)), "segments": jnp.asarray(segments)}
    keys, config = jax.random.split(jax.random.key(4), 2), dataclasses.replace(REFINE, **changes)
    experience = None
    if config.rollouts == "batch":
        before = join(jax.tree.map(lambda x: 0.5 * x, trained), frozen)
        experience = roll_out(model, before, config, batch, keys)
    got, metrics = gradient_of(model, trained, frozen, config, batch, keys, experience)
    want, same = gradient_of(model, merge(params), None, config, batch, keys, experience)
    for part in metrics:
        np.testing.assert_allclose(metrics[part], same[part], rtol=1e-4, atol=1e-6, err_msg=part)
    if experience is not None:
        assert abs(metrics["policy/ppo_kl"]) > 1e-4  # the policy has moved
    assert jax.tree.structure(got) == jax.tree.structure(trained)
    updates, moved = linear_maps(want), flat(got)
    total = np.sqrt(sum(np.linalg.norm(float64(x)) ** 2 for x in jax.tree.leaves(got)))
    for target, dw in updates.items():
        leaves, dw = flat(params), float64(dw)
        a, b, scale = (
            float64(leaves[f"{target}.{leaf}"]) for leaf in ("lora_A", "lora_B", "lora_scale")
        )
        scale = scale[:, None, None]
        for leaf, formula in (
            ("lora_A", scale * np.swapaxes(b, 1, 2) @ dw),
            ("lora_B", scale * dw @ np.swapaxes(a, 1, 2)),
        ):
            error = np.linalg.norm(float64(moved[f"{target}.{leaf}"]) - formula)
            assert error <= 1e-4 * max(np.linalg.norm(formula), 1e-2 * total), (target, leaf)


def flat(tree, path=()):
    found = {}
    for name, x in tree.items():
        found |= flat(x, (*path, name)) if isinstance(x, dict) else {".".join((*path, name)): x}
    return found


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("lact", "w0 w1 w2 lr_proj momentum_proj ttt_scale_proj qk_scale qk_offset"),
        ("gated_deltanet", "b_proj a_proj A_log dt_bias g_proj"),
        ("qwen", "in_proj_a in_proj_b in_proj_z A_log dt_bias"),
    ],
)
def test_what_feeds_the_fast_weights(name, parts):
    params = tiny(name)[1]
    trained, frozen = split(params, "fast")
    assert {name.split(".attn.")[1].split(".")[0] for name in flat(trained)} == set(parts.split())
    assert join(trained, frozen) == params


def test_the_gradient_of_what_feeds_fast_weights_is_a_part_of_the_whole():
    model, params = quiet("lact")
    trained, frozen = split(params, "fast")
    batch = {"tokens": jnp.asarray(tokens(3, 2, 40))}
    keys = jax.random.split(jax.random.key(4), 2)
    got, _ = gradient_of(model, trained, frozen, REFINE, batch, keys)
    want, _ = gradient_of(model, params, None, REFINE, batch, keys)
    assert jax.tree.structure(got) == jax.tree.structure(trained)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(select(want, got)), strict=True):
        near(a, float64(b), 1e-5)


def test_updates_of_several_at_once_share_the_weights():
    """vmap over A and B alone: each row is what its own merged model computes."""
    model, params = quiet("lact")
    several = [with_updates(params, alpha=alpha) for alpha in (2.0, 9.0)]
    own = [split(p, "lora")[0] for p in several]
    own[1] = jax.tree.map(lambda x: -0.5 * x, own[1])
    frozen = split(several[0], "lora")[1]
    stacked, rows = jax.tree.map(lambda *x: jnp.stack(x), *own), tokens(2, 2, 24)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0))
    def run(own, row):
        return model.forward(join(own, frozen), row[None])[0][0]

    got = run(stacked, rows)
    for row, mine in enumerate(own):
        want, _ = jax.jit(model.forward)(merge(join(mine, frozen)), rows[row : row + 1])
        np.testing.assert_allclose(got[row], want[0], atol=2e-5)


def test_new_updates_change_nothing():
    _, params = quiet("qwen")
    lora = LoRA(4, 8.0, choose_targets(params, "in_proj_qkv,*mlp*"))
    updates = init_updates(params, lora, jax.random.key(0))
    assert set(flat(updates)) == {
        f"{target}.{leaf}" for target in lora.targets for leaf in ("lora_A", "lora_B", "lora_scale")
    }
    merged = merge(join(params, updates))
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    bound = 1 / np.sqrt(16)
    a = updates["layers"]["linear_attention"]["attn"]["in_proj_qkv"]["lora_A"]
    assert 0.9 * bound < np.abs(a).max() <= bound


def test_names_and_patterns_choose_targets():
    _, params = tiny("qwen")
    kinds = "layers.linear_attention", "layers.full_attention"
    assert choose_targets(params, "o_proj") == (f"{kinds[1]}.attn.o_proj",)
    both = choose_targets(params, "up_proj, *.linear_attention.attn.out_proj")
    assert set(both) == {f"{kind}.mlp.up_proj" for kind in kinds} | {f"{kinds[0]}.attn.out_proj"}
    assert len(choose_targets(params, "*")) == 5 + 4 + 2 * 3
    with pytest.raises(ModelConfigError, match=r"Got: 'qkv'.*in_proj_qkv"):
        choose_targets(params, "up_proj,qkv")
