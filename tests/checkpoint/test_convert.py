"""PyTorch <-> JAX conversion: bit for bit both ways, and one message that lists what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import goldens
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from refine_jax.base.errors import CheckpointError
from refine_jax.checkpoint import (
    CheckpointManager,
    load_model,
    read_hf,
    save_model,
)
from refine_jax.convert import main

BF16 = np.dtype(ml_dtypes.bfloat16)

LACT = {
    "model_type": "lact_swiglu",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attn_heads": 2,
    "num_lact_heads": 2,
    "intermediate_size": 12,
    "w0_w2_low_rank": -1,
    "lact_chunk_size": 4,
    "window_size": 4,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

# Written down from the published model code, not from ours.
LACT_LAYER = {
    "attn.qkv.weight": (24, 8),
    "attn.qk_scale": (8, 2),
    "attn.qk_offset": (8, 2),
    "attn.lr_proj.weight": (6, 8),
    "attn.lr_proj.bias": (6,),
    "attn.momentum_proj.0.weight": (2, 8),
    "attn.momentum_proj.0.bias": (2,),
    "attn.ttt_scale_proj.weight": (2, 8),
    "attn.ttt_scale_proj.bias": (2,),
    "attn.ttt_norm.weight": (4,),
    "attn.w0": (2, 4, 4),
    "attn.w1": (2, 4, 4),
    "attn.w2": (2, 4, 4),
    "attn.o_proj.weight": (8, 8),
    "attn_norm.weight": (8,),
    "mlp_norm.weight": (8,),
    "mlp.gate_proj.weight": (12, 8),
    "mlp.up_proj.weight": (12, 8),
    "mlp.down_proj.weight": (8, 12),
}


def lact_tensors(dtype=np.float32) -> dict[str, np.ndarray]:
    """Random tensors of a LACT model by published name."""
    shapes = {"model.embeddings.weight": (11, 8), "model.norm.weight": (8,)}
    shapes["lm_head.weight"] = (11, 8)
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in LACT_LAYER.items()}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write_source(folder: Path, tensors: dict, config: dict = LACT, shards: int = 1) -> Path:
    """A Hugging Face folder as PyTorch's libraries write it, with some odd bytes in its texts."""
    folder.mkdir()
    # Windows line ends, an unusual order and no newline at the end must all survive.
    (folder / "config.json").write_bytes(
        json.dumps(config, indent=1).replace("\n", "\r\n").encode()
    )
    (folder / "tokenizer.model").write_bytes(b"\x00\xff pieces\r\n")
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(sorted(tensors.items())[number::shards])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_tensors(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert got[name].shape == want[name].shape, name
        assert got[name].tobytes() == want[name].tobytes(), name


def in_params(params: dict, name: str) -> np.ndarray:
    """The part of `params` that a published tensor is, by the rules that the models state."""
    path = name.removeprefix("model.").replace("momentum_proj.0", "momentum_proj").split(".")
    layer = None
    if path[0] == "layers":
        layer = int(path.pop(1))
    leaf = params
    for key in path:
        leaf = leaf[key]
    return np.asarray(leaf if layer is None else leaf[layer])


# Parts of hybrid models' names, written down from the published model code.
HYBRID = {
    "embed_tokens": "embeddings",
    "linear_attn": "attn",
    "self_attn": "attn",
    "input_layernorm": "attn_norm",
    "attention_layer_norm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "feedforward_layer_norm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_norm",
}


def in_hybrid_params(params: dict, name: str, tensors: dict, fields: dict) -> np.ndarray:
    """`in_params` for models whose layers are stacked by kind."""
    kinds = fields["layer_types"]
    path = name.removeprefix("model.").removeprefix("language_model.").split(".")
    leaf, layer = params, None
    if path[0] == "layers":
        kind = kinds[int(path[1])]
        layer = kinds[: int(path.pop(1))].count(kind)
        post_norm = fields["model_type"] == "olmo_hybrid" and kind == "full_attention"
        if post_norm and path[1] in ("post_attention_layernorm", "feedforward_layer_norm"):
            path[1] = "attn_norm"
        path.insert(1, kind)
    rows = slice(None)
    if path[-2] in ("q_conv1d", "k_conv1d", "v_conv1d"):
        sizes = [len(tensors[name.replace(path[-2], f"{part}_conv1d")]) for part in "qkv"]
        start = sum(sizes[: "qkv".index(path[-2][0])])
        rows, path[-2] = slice(start, start + len(tensors[name])), "conv1d"
    for key in path:
        leaf = leaf[HYBRID.get(key, key)]
    return np.asarray(leaf if layer is None else leaf[layer][rows])


def convert(*arguments) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def fails(capsys, *arguments) -> str:
    """Run a conversion that must fail; returns its message."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return captured.err


@pytest.mark.parametrize("folder", goldens.model_folders() or ["absent"])
def test_golden_folders_round_trip(folder, tmp_path, capsys):
    source = goldens.require(folder)
    convert("from_hf", source, tmp_path / "jax")
    fields = json.loads((source / "config.json").read_text())
    fields = fields.get("text_config", fields)
    # Those of other parts are carried along.
    want = {n: x for n, x in read_tensors(source).items() if not n.startswith("model.visual.")}
    count = sum(tensor.size for tensor in want.values())
    assert f"{len(want)} tensors, {count:,} parameters, float32" in capsys.readouterr().out
    model = load_model(tmp_path / "jax")
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == count
    if "layer_types" in fields:
        found = {name: in_hybrid_params(model.params, name, want, fields) for name in want}
    else:
        found = {name: in_params(model.params, name) for name in want}
    assert_same_tensors(found, want)
    convert("to_hf", tmp_path / "jax", tmp_path / "back")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes(), file


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
def test_shards_dtypes_buffers_and_other_files(tmp_path, dtype, capsys):
    """Shards in, shards out; one parameter of another dtype than the rest, as some files have."""
    tensors = lact_tensors(dtype)
    tensors |= {k: v.astype(np.float32) for k, v in tensors.items() if k.endswith("lr_proj.bias")}
    buffers = {f"model.layers.{i}.attn.rotary.inv_freq": np.ones(2, np.float32) for i in (0, 1)}
    source = write_source(tmp_path / "source", tensors | buffers, shards=3)
    convert("from_hf", source, tmp_path / "jax")
    assert f"{len(tensors)} tensors" in capsys.readouterr().out
    model = load_model(tmp_path / "jax")
    assert model.tokenizer == tmp_path / "jax"
    assert sorted(model.files) == ["tokenizer.model", "tokenizer_config.json"]
    assert_same_tensors({name: in_params(model.params, name) for name in tensors}, tensors)

    size = 1000
    convert("to_hf", tmp_path / "jax", tmp_path / "back", "--max_shard_size", size)
    assert_same_tensors(read_tensors(tmp_path / "back"), tensors)
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    shards = {file.name: load_file(file) for file in (tmp_path / "back").glob("*.safetensors")}
    assert index["weight_map"] == {k: file for file, part in shards.items() for k in part}
    assert len(shards) > 2
    modes = {file.stat().st_mode for file in (tmp_path / "back").iterdir()}
    assert len(modes) == 1, "shards are as readable as the other files"
    assert all(sum(t.nbytes for t in part.values()) <= size for part in shards.values())
    assert_same_tensors(
        read_hf(tmp_path / "back").params["layers"]["mlp"]["up_proj"],
        model.params["layers"]["mlp"]["up_proj"],
    )


def test_jax_to_pytorch_and_back(tmp_path):
    source = write_source(tmp_path / "source", lact_tensors())
    first = read_hf(source)
    params = jax.tree.map(lambda x: jax.device_put((3 * x).astype(BF16)), first.params)
    save_model(tmp_path / "a", params, first.config_json)
    convert("to_hf", tmp_path / "a", tmp_path / "b")
    convert("from_hf", tmp_path / "b", tmp_path / "c")
    again = load_model(tmp_path / "c")
    assert jax.tree.structure(again.params) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == np.asarray(b).tobytes()
    assert again.tokenizer is None


def test_load_onto_devices_and_cast(tmp_path):
    source = write_source(tmp_path / "source", lact_tensors(BF16))
    convert("from_hf", source, tmp_path / "jax")
    want = load_model(tmp_path / "jax").params
    sharding = SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: sharding, want)
    got = load_model(tmp_path / "jax", shardings=shardings, dtype="float32").params
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(a, jax.Array) and a.sharding == sharding and a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b.astype(np.float32))


def make_run(folder: Path, source: Path) -> dict[int, dict]:
    """A training run of three steps; the params of each."""
    model = read_hf(source)
    saved = {}
    with CheckpointManager(
        folder / "checkpoints",
        keep=3,
        best_metric="loss",
        config_json=model.config_json,
        files=model.files,
    ) as manager:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
            saved[step] = jax.tree.map(lambda x, step=step: x * np.float32(step), model.params)
            state = {"params": saved[step], "opt_state": saved[step], "key": jax.random.key(0)}
            manager.save(step, state, {"row": step}, {"loss": loss}, force=True)
    return saved


def test_a_training_run_goes_back_to_pytorch(tmp_path, capsys):
    source = write_source(tmp_path / "source", lact_tensors())
    run = tmp_path / "run"
    saved = make_run(run, source)
    for options, step in (((), 3), (("--step", "best"), 2), (("--step", "1"), 1)):
        target = tmp_path / f"step{step}"
        convert("to_hf", run, target, *options)
        tensors = read_tensors(target)
        assert_same_tensors(tensors, {name: in_params(saved[step], name) for name in tensors})
        assert len(tensors) == len(lact_tensors())
        assert (target / "tokenizer.model").read_bytes() == (
            source / "tokenizer.model"
        ).read_bytes()
    assert load_model(run / "checkpoints").step == 3
    assert "no step 7. Got: steps [1, 2, 3]" in fails(
        capsys, "to_hf", run, tmp_path / "x", "--step", "7"
    )
    largest = max((run / "checkpoints" / "3").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-40])
    message = fails(capsys, "to_hf", run, tmp_path / "x")
    assert str(run / "checkpoints" / "3") in message and "corrupt" in message
    assert not (tmp_path / "x").exists()


def test_export_in_another_dtype(tmp_path):
    tensors = lact_tensors()
    convert("from_hf", write_source(tmp_path / "source", tensors), tmp_path / "jax")
    convert("to_hf", tmp_path / "jax", tmp_path / "half", "--dtype", "float16")
    want = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    assert_same_tensors(read_tensors(tmp_path / "half"), want)
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config == LACT | {"torch_dtype": "float16"}


def test_all_wrong_tensors_are_listed(tmp_path, capsys):
    tensors = lact_tensors()
    del tensors["model.layers.1.attn.qkv.weight"], tensors["lm_head.weight"]
    tensors["model.layers.0.attn.w1"] = np.ones((2, 4, 5), np.float32)
    tensors["model.layers.2.attn.w1"] = np.ones((2, 4, 4), np.float32)
    tensors["model.norm.bias"] = np.ones(8, np.float64)
    for name in ("mlp_norm.weight", "attn.w2"):
        tensors[f"model.layers.1.{name}"] = tensors[f"model.layers.1.{name}"].astype(BF16)
    source = write_source(tmp_path / "source", tensors)
    lines = fails(capsys, "from_hf", source, tmp_path / "jax").splitlines()
    assert sorted(line.strip() for line in lines[1:]) == sorted(
        [
            "lm_head.weight: missing, expected [11, 8]",
            "model.layers.1.attn.qkv.weight: missing, expected [24, 8]",
            "model.layers.0.attn.w1: expected [2, 4, 4], got [2, 4, 5]",
            "model.layers.2.attn.w1: unknown, got [2, 4, 4]",
            "model.norm.bias: unknown, got [8]",
            "model.norm.bias: dtype F64 is not supported, "
            "expected one of ['float32', 'bfloat16', 'float16']",
            "layers.mlp_norm.weight: layers must have one dtype, "
            "got float32 in layers [0]; bfloat16 in layers [1]",
            "layers.attn.w2: layers must have one dtype, "
            "got float32 in layers [0]; bfloat16 in layers [1]",
        ]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_tied_embeddings(tmp_path, capsys):
    tied = LACT | {"tie_word_embeddings": True}
    tensors = lact_tensors(BF16)
    head = tensors.pop("lm_head.weight")
    same = {"lm_head.weight": tensors["model.embeddings.weight"]}
    without = write_source(tmp_path / "without", tensors, tied)
    with_same = write_source(tmp_path / "with", tensors | same, tied)
    for source in (without, with_same):
        convert("from_hf", source, tmp_path / f"{source.name}.jax")
        assert "lm_head" not in load_model(tmp_path / f"{source.name}.jax").params
        convert("to_hf", tmp_path / f"{source.name}.jax", tmp_path / f"{source.name}.back")
        assert_same_tensors(read_tensors(tmp_path / f"{source.name}.back"), tensors)
    other = write_source(tmp_path / "other", tensors | {"lm_head.weight": head}, tied)
    message = fails(capsys, "from_hf", other, tmp_path / "jax")
    assert "lm_head.weight differs from model.embeddings.weight" in message
    assert not (tmp_path / "jax").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


BROKEN = {
    "no config": (lambda s: (s / "config.json").unlink(), "it has no config.json"),
    "bad json": (lambda s: (s / "config.json").write_text("{"), "config.json is not valid JSON"),
    "no object": (lambda s: (s / "config.json").write_text("[]"), "must hold a JSON object"),
    "model": (lambda s: (s / "config.json").write_text('{"model_type": "llama"}'), "llama"),
    "truncated": (lambda s: truncate(s / "model-00002-of-00002.safetensors"), "not a readable"),
    "no shard": (
        lambda s: (s / "model-00001-of-00002.safetensors").unlink(),
        "names files that are not there: ['model-00001-of-00002.safetensors']",
    ),
    "no weights": (lambda s: (s / "model.safetensors.index.json").unlink(), "has no weights"),
    "bad index": (
        lambda s: (s / "model.safetensors.index.json").write_text("{}"),
        "has no weight_map",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_source_is_one_message_and_leaves_nothing(tmp_path, capsys, case):
    source = write_source(tmp_path / "source", lact_tensors(), shards=2)
    damage, words = BROKEN[case]
    damage(source)
    message = fails(capsys, "from_hf", source, tmp_path / "jax")
    assert words in message and message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nothing_is_overwritten_unasked(tmp_path, capsys):
    source = write_source(tmp_path / "source", lact_tensors())
    target = tmp_path / "jax"
    convert("from_hf", source, target)
    before = sorted(target.rglob("*"))
    assert "exists" in fails(capsys, "from_hf", source, target)
    assert sorted(target.rglob("*")) == before
    doubled = {name: tensor * 2 for name, tensor in lact_tensors().items()}
    convert("from_hf", write_source(tmp_path / "new", doubled), target, "--overwrite")
    params = load_model(target).params
    assert_same_tensors({name: in_params(params, name) for name in doubled}, doubled)

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "final.tex").write_text("x")
    message = fails(capsys, "from_hf", source, tmp_path / "thesis", "--overwrite")
    assert "no checkpoint: it is not overwritten" in message
    assert (tmp_path / "thesis" / "final.tex").exists()
    make_run(tmp_path / "run", source)
    message = fails(capsys, "from_hf", source, tmp_path / "run" / "checkpoints", "--overwrite")
    assert "holds a training run" in message
    assert "is SRC itself" in fails(capsys, "from_hf", source, source, "--overwrite")
    assert "is SRC itself" in fails(capsys, "from_hf", source, tmp_path, "--overwrite")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_not_a_checkpoint_is_said(tmp_path, capsys):
    source = write_source(tmp_path / "source", lact_tensors())
    assert "convert from_hf SRC DST" in fails(capsys, "to_hf", source, tmp_path / "x")
    assert "has no config.json" in fails(capsys, "to_hf", tmp_path / "nowhere", tmp_path / "x")
    save = (tmp_path / "jax", read_hf(source).params)
    other = LACT | {"hidden_size": 16}
    save_model(*save, json.dumps(other))
    message = fails(capsys, "to_hf", tmp_path / "jax", tmp_path / "x")
    assert "layers.attn.qkv.weight: expected [2, 48, 16], got [2, 24, 8]" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "from_hf | to_hf"),
        (["to_hf", "a"], "DST"),
        (["to_hf", "a", "b", "--max_shard_size", "5XB"], "a size such as 5GB"),
        (["to_hf", "a", "b", "--step", "first"], "latest, best or a number"),
        (["to_hf", "a", "b", "--dtype", "int8"], "float32"),
    ],
)
def test_wrong_usage(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 1 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["from", "a", "b"], "from_hf or to_hf comes first. Got: 'from'"),
        (["from_hf", "a", "b", "--dtype=float32"], "--dtype goes with to_hf"),
        (["to_hf", "a", "b", "c"], "More is given than the command takes: 'c'"),
    ],
)
def test_words_and_flags_that_do_not_fit(arguments, words, capsys):
    try:
        assert main(arguments) == 1
    except SystemExit as ended:
        assert ended.code == 1
    assert words in capsys.readouterr().err


def test_the_command_fails_with_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "refine_jax.convert", "to_hf", "a", "b"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr == "error: a is not a checkpoint: it has no config.json.\n"


def torch_source(folder: Path, dtype, shards: int = 1) -> tuple[Path, dict]:
    """A folder with pytorch_model.bin, and its tensors."""
    torch = pytest.importorskip("torch", reason="pytorch_model.bin needs the extra [torch]")
    tensors = lact_tensors(np.float32)
    source = write_source(folder, tensors)
    (source / "model.safetensors").unlink()
    exact = {name: torch.from_numpy(t).to(getattr(torch, dtype)) for name, t in tensors.items()}
    names = sorted(exact)
    files = ["pytorch_model.bin"]
    if shards > 1:
        files = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
        weight_map = {name: files[i % shards] for i, name in enumerate(names)}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for i, file in enumerate(files):
        torch.save({name: exact[name] for name in names[i::shards]}, source / file)
    kind = BF16 if dtype == "bfloat16" else np.dtype(dtype)
    return source, {name: tensor.astype(kind) for name, tensor in tensors.items()}


@pytest.mark.parametrize(("dtype", "shards"), [("float32", 1), ("bfloat16", 2), ("float16", 1)])
def test_pytorch_files(tmp_path, dtype, shards):
    source, want = torch_source(tmp_path / "source", dtype, shards)
    params = read_hf(source).params
    assert_same_tensors({name: in_params(params, name) for name in want}, want)


def test_code_in_a_pytorch_file_is_not_run(tmp_path, capsys):
    source, _ = torch_source(tmp_path / "source", "float32")
    import torch

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was_run",))

    torch.save({"model.norm.weight": Evil()}, source / "pytorch_model.bin")
    assert "no plain tensors" in fails(capsys, "from_hf", source, tmp_path / "jax")
    assert not (tmp_path / "was_run").exists()


def test_pytorch_files_without_pytorch(tmp_path, capsys, monkeypatch):
    source = write_source(tmp_path / "source", lact_tensors())
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    message = fails(capsys, "from_hf", source, tmp_path / "jax")
    assert "refine-jax[torch]" in message


def test_missing_params_in_a_model_checkpoint(tmp_path):
    source = write_source(tmp_path / "source", lact_tensors())
    model = read_hf(source)
    del model.params["norm"]
    save_model(tmp_path / "jax", model.params, model.config_json)
    with pytest.raises(CheckpointError, match=r"norm\.weight: missing, expected \[8\]"):
        load_model(tmp_path / "jax")
