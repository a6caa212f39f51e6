"""Folders of hybrid models: names of tensors, other parts, and the way back, bit for bit."""

import json
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import CONFIGS

from refine_jax.checkpoint import CheckpointManager, arrays, load_model, read_hf, streams
from refine_jax.checkpoint.names import slots_of
from refine_jax.checkpoint.tree import abstract_params
from refine_jax.convert import from_hf, to_hf
from refine_jax.generation.loading import further_ends
from refine_jax.models.config import model_config

QWEN = CONFIGS["qwen"] | {"tie_word_embeddings": True}
OLMO = CONFIGS["olmo"]
FLA = CONFIGS["deltanet_hybrid"]
NESTED = {
    "model_type": "qwen3_5",
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "text_config": QWEN,
    "tie_word_embeddings": True,
    "vision_config": {"depth": 1},
}
# Of parts that no model here has, in dtypes that none takes, too.
OTHERS = {
    "model.visual.patch_embed.proj.weight": np.arange(96, dtype=np.float64).reshape(2, 3, 4, 4),
    "model.visual.blocks.0.norm1.bias": np.arange(7, dtype=np.int64),
    "mtp.fc.weight": np.full((3, 5), np.nan, np.float32),
}


def tensors_of(fields: dict) -> dict[str, np.ndarray]:
    """Random tensors by published name; rates and the norm of outputs in float32 among bfloat16."""
    shapes = {name: leaf.shape for name, leaf in abstract_params(fields).items()}
    rng, tensors = np.random.default_rng(0), {}
    for name, slot in slots_of(model_config(fields), shapes).items():
        wide = name.endswith(("A_log", "linear_attn.norm.weight"))
        dtype = np.float32 if wide else ml_dtypes.bfloat16
        tensors[name] = rng.standard_normal(slot.shape).astype(dtype)
    return tensors


def write_folder(folder: Path, fields: dict, tensors: dict, shards: int = 1) -> Path:
    """A published folder, its weights written by the safetensors package."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model.safetensors-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def assert_same_folders(got: Path, want: Path) -> None:
    """All files are there, with the same bytes."""
    assert sorted(p.name for p in got.iterdir()) == sorted(p.name for p in want.iterdir())
    for path in want.iterdir():
        assert (got / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("fields", [NESTED, QWEN, OLMO, FLA], ids=["nested", "flat", "olmo", "fla"])
def test_there_and_back_is_the_same_folder(tmp_path, fields, shards):
    others = OTHERS if fields in (NESTED, QWEN) else {}
    source = write_folder(tmp_path / "a", fields, tensors_of(fields) | others, shards)
    said = from_hf(str(source), str(tmp_path / "b"))
    assert ("3 tensors of other parts (model, mtp): kept" in said) == bool(others)
    params = load_model(tmp_path / "b").params
    assert "visual" not in str(params.keys())
    to_hf(str(tmp_path / "b"), str(tmp_path / "c"))
    assert_same_folders(tmp_path / "c", source)


def test_conversions_hold_no_whole_shard(tmp_path, monkeypatch):
    """Both ways take the memory of some blocks, however large the model is."""
    fields = NESTED | {"text_config": QWEN | {"vocab_size": 20000, "hidden_size": 64}}
    source = write_folder(tmp_path / "a", fields, tensors_of(fields), 3)
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    assert largest > 2**21  # else the rest of a conversion is more than the arrays
    for module in (streams, arrays):
        monkeypatch.setattr(module, "BLOCK", 2**16)
    monkeypatch.setattr(arrays, "ROOM", 2**17)
    for convert, names in ((from_hf, "ab"), (to_hf, "bc")):
        tracemalloc.start()
        try:
            convert(*(str(tmp_path / name) for name in names))
            assert tracemalloc.get_traced_memory()[1] < largest / 2
        finally:
            tracemalloc.stop()
    assert_same_folders(tmp_path / "c", source)


def test_all_end_tokens_end_a_text(tmp_path):
    """Those of generation_config.json, and those that a nested configuration lists."""
    fields = NESTED | {"text_config": QWEN | {"eos_token_id": [3, 9]}}
    source = write_folder(tmp_path / "a", fields, tensors_of(fields))
    from_hf(str(source), str(tmp_path / "b"))
    model = load_model(tmp_path / "b")
    path = model.files["generation_config.json"]
    assert further_ends(model.config, path) == (3, 9, 7)
    assert further_ends(NESTED, path) == (7, 9)


def test_a_single_shard_without_an_index(tmp_path):
    source = write_folder(tmp_path / "a", NESTED, tensors_of(NESTED))
    name = "model.safetensors-00001-of-00001.safetensors"
    (source / "model.safetensors").rename(source / name)
    from_hf(str(source), str(tmp_path / "b"))
    to_hf(str(tmp_path / "b"), str(tmp_path / "c"))
    assert_same_folders(tmp_path / "c", source)


def test_a_training_run_carries_other_parts_along(tmp_path):
    """The parameters of a step go back with the tensors and files that the run began with."""
    source = write_folder(tmp_path / "a", NESTED, tensors_of(NESTED) | OTHERS, 3)
    from_hf(str(source), str(tmp_path / "b"))
    model = load_model(tmp_path / "b")
    files = {"config_json": model.config_json, "files": model.files}
    with CheckpointManager(tmp_path / "run" / "checkpoints", **files) as manager:
        changed = jax.tree.map(lambda x: -x, model.params)
        manager.save(1, {"params": changed}, force=True)
    to_hf(str(tmp_path / "run"), str(tmp_path / "c"))
    for path in sorted(source.glob("*.safetensors")):
        got, want = load_file(tmp_path / "c" / path.name), load_file(path)
        assert got.keys() == want.keys()
        for name in want:
            sign = 1 if name in OTHERS else -1
            np.testing.assert_array_equal(got[name], sign * want[name])


def test_other_parts_stay_where_the_parameters_are_cast(tmp_path):
    source = write_folder(tmp_path / "a", NESTED, tensors_of(NESTED) | OTHERS, 3)
    from_hf(str(source), str(tmp_path / "b"))
    to_hf(str(tmp_path / "b"), str(tmp_path / "c"), dtype="float16")
    got = load_file(tmp_path / "c" / "model.safetensors")
    assert got.keys() == (tensors_of(NESTED) | OTHERS).keys()
    for name, tensor in OTHERS.items():
        np.testing.assert_array_equal(got[name], tensor)
        assert got[name].dtype == tensor.dtype
    assert {x.dtype.name for name, x in got.items() if name not in OTHERS} == {"float16"}


def test_a_head_that_is_tied_and_stored_is_written_back(tmp_path):
    tensors = tensors_of(NESTED)
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    source = write_folder(tmp_path / "a", NESTED, tensors)
    from_hf(str(source), str(tmp_path / "b"))
    to_hf(str(tmp_path / "b"), str(tmp_path / "c"))
    assert_same_folders(tmp_path / "c", source)


RENAMED = {
    "attention_layer_norm": "input_layernorm",
    "feedforward_layer_norm": "post_attention_layernorm",
}


def other_names(tensors: dict) -> dict:
    """Olmo's tensors by the other names that the published code reads."""
    for old, new in RENAMED.items():
        tensors = {name.replace(old, new): x for name, x in tensors.items()}
    return tensors


def fused(tensors: dict) -> dict:
    """The convolutions of q, k and v as one tensor."""
    found = {name: x for name, x in tensors.items() if "_conv1d" not in name}
    for name in tensors:
        if "q_conv1d" in name:
            parts = [tensors[name.replace("q_conv1d", f"{part}_conv1d")] for part in "qkv"]
            found[name.replace("q_conv1d", "conv1d")] = np.concatenate(parts)
    return found


def cut_in_three(tensors: dict) -> dict:
    """The convolutions cut into equal parts, as the package saves them."""
    found = fused(tensors)
    for name in list(found):
        if "conv1d" in name:
            for part, x in zip("qkv", np.split(found.pop(name), 3), strict=True):
                found[name.replace("conv1d", f"{part}_conv1d")] = x
    return found


def feedforward_first(tensors: dict) -> dict:
    """The first norm of attention layers by the name that older files have."""
    post = "post_attention_layernorm"
    return {name.replace(post, "feedforward_layer_norm"): x for name, x in tensors.items()}


@pytest.mark.parametrize("change", [other_names, fused, cut_in_three, feedforward_first])
def test_names_and_forms_of_olmo(tmp_path, change):
    """All are read as the same parameters, and written back as they were."""
    tensors = tensors_of(OLMO)
    plain = write_folder(tmp_path / "plain", OLMO, tensors)
    source = write_folder(tmp_path / "a", OLMO, change(tensors))
    assert change(tensors).keys() != tensors.keys() or change is cut_in_three
    want, got = read_hf(plain).params, read_hf(source).params
    assert repr(got) == repr(want)
    from_hf(str(source), str(tmp_path / "b"))
    to_hf(str(tmp_path / "b"), str(tmp_path / "c"))
    assert_same_folders(tmp_path / "c", source)
