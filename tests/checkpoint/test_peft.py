"""Adapters in the peft package's format: what is refused, and the package itself as oracle.

The tests with the package need PyTorch, transformers and peft.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import tiny, tokens

from refine_jax.base.errors import CheckpointError
from refine_jax.checkpoint import write_hf
from refine_jax.checkpoint.peft import read_adapter, write_adapter
from refine_jax.checkpoint.tree import flatten
from refine_jax.models.head import logits
from refine_jax.models.lora import LoRA, choose_targets, init_updates
from refine_jax.models.trainable import join


def updated(name, patterns="*", rank=3, alpha=6.0):
    """(model, its parameters with drawn updates, which these are)."""
    model, params = tiny(name)
    lora = LoRA(rank, alpha, choose_targets(params, patterns))
    updates = init_updates(params, lora, jax.random.key(1))
    noise = np.random.default_rng(5)

    def draw(path, x):
        still = path[-1].key == "lora_scale"
        return x if still else jnp.asarray(0.1 * noise.standard_normal(x.shape), jnp.float32)

    return model, join(params, jax.tree_util.tree_map_with_path(draw, updates)), lora


@pytest.fixture
def adapter(tmp_path):
    """(folder, configuration) of an adapter that is right, to be spoiled."""
    model, params, lora = updated("gated_deltanet", "q_proj,down_proj")
    write_adapter(tmp_path / "adapter", params, lora, model.config)
    return tmp_path / "adapter", model.config


@pytest.mark.parametrize("name", ["lact", "deltanet_hybrid", "qwen_irregular", "olmo"])
def test_updates_are_read_as_they_were_written(name, tmp_path):
    model, params, lora = updated(name)
    write_adapter(tmp_path / "adapter", params, lora, model.config)
    again, updates = read_adapter(tmp_path / "adapter", model.config)
    assert again == lora
    kept, found = flatten(params), flatten(updates)
    assert found.keys() == {name for name in kept if "lora" in name}
    for leaf, x in found.items():
        np.testing.assert_array_equal(x, kept[leaf])


def change_fields(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NAME = "base_model.model.model.layers.1.attn.q_proj.lora_A.weight"
WRONG_TENSORS = {
    "missing": (lambda x: x.pop(NAME), f"{NAME}: missing"),
    "unknown": (
        lambda x: x.update({NAME.replace("q_proj", "z_proj"): x[NAME]}),
        "z_proj.lora_A.weight: is of no linear map",
    ),
    "shape": (lambda x: x.update({NAME: x[NAME][:2]}), r"expected \[3, 16\], got \[2, 16\]"),
    "values": (lambda x: x.update({NAME: x[NAME] * np.nan}), "not all values are finite"),
    "none": (lambda x: x.clear() or x.update(x=np.zeros(1)), "x: is of no linear map"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_that_are_no_updates_of_the_model_are_named(adapter, case):
    (folder, config), (change, message) = adapter, WRONG_TENSORS[case]
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be 'LORA'. Got: 'IA3'"),
        ({"use_dora": True}, "use_dora must be False, as of plain LoRA. Got: True"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern must be {}"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save must be None"),
        ({"r": 0}, "r must be at least 1"),
        ({"lora_alpha": "much"}, "lora_alpha must be a whole number or a number"),
    ],
)
def test_other_kinds_of_adapters_are_refused(adapter, fields, message):
    folder, config = adapter
    change_fields(folder, **fields)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder, config)


def test_a_folder_without_an_adapter_is_named(adapter, tmp_path):
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model.safetensors"):
        read_adapter(*adapter)


def test_rank_stabilised_updates_are_scaled_by_the_root(adapter):
    folder, config = adapter
    change_fields(folder, use_rslora=True)
    lora, updates = read_adapter(folder, config)
    assert lora.scale == pytest.approx(6 / 3**0.5)
    scale = updates["layers"]["attn"]["q_proj"]["lora_scale"]
    np.testing.assert_allclose(scale, np.full(2, 6 / 3**0.5), rtol=1e-6)


# The package itself


def all_logits(model, params, ids):
    hidden, _ = jax.jit(model.forward)(params, ids)
    return np.asarray(logits(hidden, model.head(params)))


def published(folder):
    transformers = pytest.importorskip("transformers", minversion="5.20")
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize(
    ("name", "patterns"),
    [("qwen", "*"), ("qwen_irregular", "in_proj_qkv,*full_attention.mlp*"), ("olmo", "*proj")],
)
def test_the_package_computes_the_same_with_updates_of_ours(name, patterns, tmp_path):
    pytest.importorskip("peft")
    model, params, lora = updated(name, patterns)
    write_hf(tmp_path / "hf", tiny(name)[1], json.dumps(model.config.to_hf()))
    theirs = published(tmp_path / "hf")
    import peft
    import torch

    write_adapter(tmp_path / "adapter", params, lora, model.config, base=str(tmp_path / "hf"))
    ids = tokens(1, 2, 40)
    plain = all_logits(model, tiny(name)[1], ids)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        want = theirs(torch.tensor(ids), use_cache=False).logits.numpy()
    assert np.abs(plain - want).max() > 0.1
    np.testing.assert_allclose(all_logits(model, params, ids), want, atol=2e-4)


@pytest.mark.parametrize("name", ["qwen", "olmo"])
def test_updates_of_the_package_compute_the_same_here(name, tmp_path):
    peft = pytest.importorskip("peft")
    model, params = tiny(name)
    write_hf(tmp_path / "hf", params, json.dumps(model.config.to_hf()))
    theirs = published(tmp_path / "hf")
    import torch

    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1
    )
    theirs = peft.get_peft_model(theirs, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter, x in theirs.named_parameters():
            if "lora" in parameter:
                x.copy_(0.1 * torch.randn(x.shape))
    theirs.save_pretrained(tmp_path / "adapter")
    lora, updates = read_adapter(tmp_path / "adapter", model.config)
    assert lora == LoRA(2, 5.0, choose_targets(params, "*"))
    ids = tokens(1, 2, 40)
    with torch.no_grad():
        want = theirs(torch.tensor(ids), use_cache=False).logits.numpy()
    updates = jax.tree.map(jnp.asarray, updates)
    np.testing.assert_allclose(all_logits(model, join(params, updates), ids), want, atol=2e-4)
