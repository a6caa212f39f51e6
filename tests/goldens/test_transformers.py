"""Hybrid models drawn anew, against the transformers package itself (needs PyTorch and it).

A model of random sizes and pattern of layers is saved by the package and read from its folder.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny, tokens

from refine_jax.checkpoint import read_hf, write_hf
from refine_jax.generation import Generator, Sampling
from refine_jax.models.config import model_config
from refine_jax.models.head import log_prob, logits
from refine_jax.models.transformer import Model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")

VOCABULARY, PROMPT, NEW = 61, 23, 50
LINEAR, FULL = "linear_attention", "full_attention"


class Digits:
    """A tokenizer without an end."""

    vocab_size, end_ids, bos_id, name = VOCABULARY, (), None, "digits"

    def decode(self, ids):
        return " ".join(map(str, ids))


def drawn_fields(rng) -> dict:
    """Sizes that both families have, and a pattern that holds both kinds of layers."""
    layers = int(rng.integers(2, 7))
    kinds = [LINEAR, FULL, *rng.choice([LINEAR, FULL], layers - 2)]
    heads, sharing = int(rng.integers(1, 3)), int(rng.integers(1, 4))
    value_sharing = int(rng.integers(1, 3))
    key_heads = int(rng.integers(1, 4))
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 8 * heads * sharing * int(rng.integers(1, 3)),
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "layer_types": [str(kind) for kind in rng.permutation(kinds)],
        "num_attention_heads": heads * sharing,
        "num_key_value_heads": heads,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * value_sharing,
        "linear_key_head_dim": int(rng.integers(3, 17)),
        "linear_value_head_dim": int(rng.integers(3, 17)),
        "linear_conv_kernel_dim": int(rng.integers(2, 5)),
        "attention_bias": bool(rng.integers(2)),
        "tie_word_embeddings": bool(rng.integers(2)),
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5])),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def published(family: str, seed: int):
    """A model of the package with weights far from their initial values."""
    from transformers import OlmoHybridConfig, OlmoHybridForCausalLM
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

    rng = np.random.default_rng(seed)
    fields = drawn_fields(rng)
    rope = {"rope_type": "default", "rope_theta": float(rng.choice([1e4, 1e6]))}
    if family == "olmo":
        # As it saves models, the package cuts the convolutions in three equal parts.
        keys = fields["linear_num_key_heads"] * fields["linear_key_head_dim"]
        values = fields["linear_num_value_heads"] * fields["linear_value_head_dim"]
        if (2 * keys + values) % 3:
            fields["linear_value_head_dim"] = fields["linear_key_head_dim"] * 3
        if rng.integers(2):
            rope["rope_theta"] = None
        fields |= {"rope_parameters": rope, "linear_allow_neg_eigval": bool(rng.integers(2))}
        made, config = OlmoHybridForCausalLM, OlmoHybridConfig(**fields)
    else:
        rope["partial_rotary_factor"] = float(rng.choice([0.25, 0.5, 1.0]))
        fields |= {"rope_parameters": rope, "head_dim": int(rng.choice([8, 16, 24]))}
        made, config = qwen.Qwen3_5ForCausalLM, Qwen3_5TextConfig(**fields)
    torch.manual_seed(seed)
    model = made._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            scale = 0.3 if x.ndim == 1 else 0.5 if "conv1d" in name else x.shape[-1] ** -0.5
            x.copy_(torch.randn(x.shape) * scale + (x if x.ndim == 1 else 0))
    return model


def greedy(model, prompt: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Tokens, each after running the whole sequence again, and their log-probabilities."""
    row, found = prompt.tolist(), []
    for _ in range(NEW):
        with torch.no_grad():
            z = model(torch.tensor([row]), use_cache=False).logits[0, -1].double()
        row.append(int(z.argmax()))
        found.append(float(torch.log_softmax(z, -1)[row[-1]]))
    return row[len(prompt) :], np.array(found)


@functools.partial(jax.jit, static_argnums=0)
def log_probs(model, params, row):
    hidden, _ = model.forward(params, row[None])
    return log_prob(logits(hidden[0, PROMPT - 1 : -1], model.head(params)), row[PROMPT:])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["qwen", "olmo"])
def test_tokens_and_log_probabilities_of_the_package(family, seed, tmp_path):
    theirs = published(family, seed)
    theirs.save_pretrained(tmp_path / "hf")
    loaded = read_hf(tmp_path / "hf")
    model, params = Model(model_config(loaded.config)), jax.tree.map(jnp.asarray, loaded.params)
    prompt = np.random.default_rng(seed).integers(0, VOCABULARY, PROMPT).astype(np.int32)
    want, want_log_probs = greedy(theirs, prompt)
    generator = Generator(model, Digits())
    sampling = Sampling(max_new_tokens=NEW)
    (got,) = generator.generate(params, generator.read(params, [prompt]), sampling)
    assert list(got.tokens) == want
    row = np.concatenate([prompt, np.array(want, np.int32)])
    np.testing.assert_allclose(log_probs(model, params, row), want_log_probs, atol=2e-4)


@pytest.mark.parametrize("name", ["qwen", "qwen_irregular", "olmo"])
def test_the_package_reads_what_is_written(name, tmp_path):
    """A model that began here, by the configuration and the names that are its own."""
    from transformers import AutoModelForCausalLM

    model, params = tiny(name)
    write_hf(tmp_path / "hf", params, json.dumps(model.config.to_hf()))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = tokens(1, 2, 40)
    with torch.no_grad():
        want = theirs(torch.tensor(ids), use_cache=False).logits
    hidden, _ = jax.jit(model.forward)(params, ids)
    np.testing.assert_allclose(logits(hidden, model.head(params)), want, atol=2e-4)
