"""Hugging Face folders as people have them: read, or one message that names what is wrong."""

import json
import struct
import time
from pathlib import Path

import goldens
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refine_jax.base.errors import CheckpointError
from refine_jax.checkpoint import load_model, read_hf, write_hf
from refine_jax.checkpoint.folders import contained
from tests.checkpoint.test_convert import (
    BF16,
    LACT,
    assert_same_tensors,
    convert,
    fails,
    in_params,
    lact_tensors,
    read_tensors,
    write_source,
)

WEIGHTS = "model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"


def assert_reads(folder: Path, tensors: dict) -> None:
    params = read_hf(folder).params
    assert_same_tensors({name: in_params(params, name) for name in tensors}, tensors)


# ---- The inputs' table ----


@pytest.mark.parametrize("name", ["gdn_bom", "gdn_index_sub", "gdn_orig_mod", "gdn_with_D"])
def test_inputs_that_are_the_plain_model(name, tmp_path):
    """A byte order mark, shards in a subfolder, wrapped names, an unused tensor: one model."""
    tensors = load_file(goldens.require_input("gdn_plain", WEIGHTS))
    convert("from_hf", goldens.require_input(name), tmp_path / "jax")
    params = load_model(tmp_path / "jax").params
    assert_same_tensors({name: in_params(params, name) for name in tensors}, tensors)
    convert("to_hf", tmp_path / "jax", tmp_path / "back")
    assert_same_tensors(read_tensors(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["head_dim"] == 16


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gdn_plain", None),
        ("gdn_bom", None),
        ("gdn_with_D", "not used: tensors model.layers.*.attn.D (older versions"),
        ("gdn_orig_mod", "not used: the part '_orig_mod' of tensors' names"),
        ("gdn_tekken", "not used: files: params.json, tekken.json (tokenizers are read from"),
        ("gdn_tied_missing", None),
    ],
)
def test_what_is_left_out_is_said(name, said, tmp_path, capsys):
    convert("from_hf", goldens.require_input(name), tmp_path / "jax")
    summary, *lines = capsys.readouterr().out.splitlines()
    assert "float32" in summary and len(lines) == (said is not None)
    assert said is None or lines[0].startswith(said)


def test_inputs_that_are_one_message(tmp_path, capsys):
    message = fails(capsys, "from_hf", goldens.require_input("gdn_lfs"), tmp_path / "jax")
    assert "['model.safetensors']: pointers of git-lfs" in message and message.count("\n") == 1
    message = fails(capsys, "from_hf", goldens.require_input("gdn_tied_flag_lost"), tmp_path / "x")
    assert "lm_head.weight: missing, expected [259, 64]" in message
    assert "Set tie_word_embeddings to true" in message


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_config_with_nan_is_one_message(value, tmp_path, capsys):
    """Python writes and reads NaN and Infinity, which JSON does not have; 1e999 is a number."""
    source = write_source(tmp_path / "source", lact_tensors(), LACT | {"norm_eps": 1.5})
    config = source / "config.json"
    config.write_text(config.read_text().replace("1.5", value))
    message = fails(capsys, "from_hf", source, tmp_path / "jax")
    assert message.count("\n") == 1 and not (tmp_path / "jax").exists()
    words = "norm_eps must be a number" if value == "1e999" else f"{value} is no JSON value"
    assert words in message


# ---- Names ----


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
        lambda name: name.replace(".attn.", "._checkpoint_wrapped_module.attn."),
    ],
    ids=["module", "base_model", "compiled module", "compiled layer", "checkpointed"],
)
def test_names_of_wrappers_are_taken_off_and_said(rename, tmp_path):
    tensors = lact_tensors()
    source = write_source(tmp_path / "s", {rename(k): v for k, v in tensors.items()}, shards=2)
    assert_reads(source, tensors)
    assert len([line for line in read_hf(source).left_out if "names" in line]) >= 1


def test_a_prefix_of_some_names_is_no_prefix(tmp_path, capsys):
    tensors = {f"module.{name}": tensor for name, tensor in lact_tensors().items()}
    tensors["lm_head.weight"] = tensors.pop("module.lm_head.weight")
    message = fails(capsys, "from_hf", write_source(tmp_path / "s", tensors), tmp_path / "jax")
    assert "module.model.embeddings.weight: unknown, got [11, 8]" in message
    assert "  model.embeddings.weight: missing, expected [11, 8]" in message
    assert message.count("\n") < 50 and message.count("  and ") == 2


def test_two_names_of_one_tensor_are_refused(tmp_path, capsys):
    tensors = lact_tensors()
    tensors["model._orig_mod.norm.weight"] = tensors["model.norm.weight"]
    message = fails(capsys, "from_hf", write_source(tmp_path / "s", tensors), tmp_path / "jax")
    assert "model.norm.weight: there twice, " in message
    assert "model._orig_mod.norm.weight in model.safetensors" in message


def test_a_tensor_in_two_shards_is_refused(tmp_path, capsys):
    source = write_source(tmp_path / "source", lact_tensors(), shards=2)
    second = source / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {"lm_head.weight": np.zeros((11, 8), np.float32)}, second)
    message = fails(capsys, "from_hf", source, tmp_path / "jax")
    assert "lm_head.weight: there twice" in message
    assert "model-00001-of-00002.safetensors and lm_head.weight in model-00002" in message


def test_unused_tensors_of_one_family_are_unknown_in_another(tmp_path, capsys):
    tensors = lact_tensors() | {"model.layers.0.attn.D": np.ones(2, np.float32)}
    message = fails(capsys, "from_hf", write_source(tmp_path / "s", tensors), tmp_path / "jax")
    assert "model.layers.0.attn.D: unknown, got [2]" in message


def test_what_a_folder_holds_besides_is_said(tmp_path, capsys):
    config = LACT | {"dropout": 0.1, "use_cache": True, "pad_token_id": None, "nothing": None}
    buffers = {f"model.layers.{i}.attn.rotary.inv_freq": np.ones(2, np.float32) for i in (0, 1)}
    source = write_source(tmp_path / "source", lact_tensors() | buffers, config, shards=2)
    (source / "model-00009-of-00009.safetensors").write_bytes(b"of an earlier save")
    (source / "README.md").write_text("x")
    (source / ".gitattributes").write_text("x")
    convert("from_hf", source, tmp_path / "jax")
    assert capsys.readouterr().out.splitlines()[1:] == [
        "not used: tensors model.layers.*.attn.rotary.inv_freq (it follows from config.json), "
        "2 of them",
        "not used: fields of config.json that change nothing here: dropout",
        "not used: files: README.md, model-00009-of-00009.safetensors",
    ]


# ---- Values that are not finite ----


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(dtype, value, tmp_path, capsys):
    tensors = lact_tensors(dtype)
    bad = ["model.layers.1.attn.w1", "model.embeddings.weight"]
    for name in bad:
        tensors[name].reshape(-1)[-1] = value
    source = write_source(tmp_path / "source", tensors)
    message = fails(capsys, "from_hf", source, tmp_path / "jax")
    assert sorted(line.strip() for line in message.splitlines()[1:]) == sorted(bad)
    assert "--allow_nonfinite" in message and not (tmp_path / "jax").exists()
    convert("from_hf", source, tmp_path / "jax", "--allow_nonfinite")
    message = fails(capsys, "to_hf", tmp_path / "jax", tmp_path / "back")
    assert all(name in message for name in bad) and not (tmp_path / "back").exists()
    convert("to_hf", tmp_path / "jax", tmp_path / "back", "--allow_nonfinite")
    assert_same_tensors(read_tensors(tmp_path / "back"), tensors)


def test_the_largest_finite_values_pass_and_overflow_in_a_cast_is_said(tmp_path, capsys):
    tensors = lact_tensors()
    tensors["model.norm.weight"][:3] = [np.finfo(np.float32).max, -3.4e38, 1e-45]
    convert("from_hf", write_source(tmp_path / "source", tensors), tmp_path / "jax")
    convert("to_hf", tmp_path / "jax", tmp_path / "same")
    assert_same_tensors(read_tensors(tmp_path / "same"), tensors)
    message = fails(capsys, "to_hf", tmp_path / "jax", tmp_path / "half", "--dtype", "float16")
    assert message.splitlines()[1:] == ["  model.norm.weight"]


def test_every_block_of_a_large_tensor_is_copied_and_checked(tmp_path):
    """The copy goes in blocks: the value that is not finite is found wherever it stands."""
    fields = LACT | {"vocab_size": 40_001, "num_hidden_layers": 1}
    tensors = {k: v for k, v in lact_tensors().items() if "layers.1." not in k}
    rng = np.random.default_rng(0)
    for name in ("model.embeddings.weight", "lm_head.weight"):
        tensors[name] = rng.normal(size=(40_001, 8)).astype(np.float32)
    source = write_source(tmp_path / "source", tensors, fields)
    assert_reads(source, tensors)
    for at in (0, 262_143, 262_144, -1):
        damaged = tensors | {"lm_head.weight": tensors["lm_head.weight"].copy()}
        damaged["lm_head.weight"].reshape(-1)[at] = np.nan
        save_file(damaged, source / WEIGHTS)
        with pytest.raises(CheckpointError, match=r"NaN or infinite values.*\n  lm_head.weight$"):
            read_hf(source)


# ---- Damaged weights ----


def header(fields: object, size: int | None = None) -> bytes:
    text = json.dumps(fields).encode() if not isinstance(fields, bytes) else fields
    return struct.pack("<Q", len(text) if size is None else size) + text


def norm(**changes) -> dict:
    entry = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]} | changes
    return {"model.norm.weight": entry}


DAMAGED = {
    "empty": (b"", "it is empty"),
    "short": (b"\x08\0\0", "it ends after 3 bytes, in its header"),
    "huge header": (header({}, 2**62), "it ends after"),
    "long header": (header(b" " * (2**25 + 1)), "is no model's"),
    "no header": (header(b"x" * 8), "not a readable safetensors file"),
    "not UTF-8": (header(b'{"\xff": 1}'), "not a readable safetensors file"),
    "list": (header([]), "not a readable safetensors file"),
    "nested": (header(b"[" * 100_000), "not a readable safetensors file"),
    "truncated": (header(norm()) + b"\0" * 31, "not a readable safetensors file"),
    "too long": (header(norm()) + b"\0" * 33, "not a readable safetensors file"),
    "shape": (header(norm(shape=[9])) + b"\0" * 32, "not a readable safetensors file"),
    "overflow": (header(norm(shape=[2**40, 2**40])) + b"\0" * 32, "not a readable safetensors"),
    "backwards": (header(norm(data_offsets=[32, 0])) + b"\0" * 32, "not a readable safetensors"),
    "overlap": (
        header(norm() | {"b": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}})
        + b"\0" * 32,
        "not a readable safetensors file",
    ),
    "int8": (header(norm(dtype="I8", shape=[32])) + b"\0" * 32, "dtype I8 is not supported"),
    "float64": (header(norm(dtype="F64", shape=[4])) + b"\0" * 32, "dtype F64 is not supported"),
    "fp8": (header(norm(dtype="F8_E4M3", shape=[32])) + b"\0" * 32, "F8_E4M3 is not supported"),
    "unknown dtype": (header(norm(dtype="Q4")) + b"\0" * 32, "not a readable safetensors file"),
    "odd name": (
        header({"\x1b[31m\n": norm()["model.norm.weight"]}) + b"\0" * 32,
        r"\x1b[31m\n: unknown, got [8]",
    ),
    "long name": (header({"n" * 10**5: norm()["model.norm.weight"]}) + b"\0" * 32, "nnn..."),
    "pointer": (POINTER, "pointers of git-lfs"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_weights_are_one_message(case, tmp_path, capsys):
    content, words = DAMAGED[case]
    source = write_source(tmp_path / "source", {})
    (source / WEIGHTS).write_bytes(content)
    started = time.process_time()
    message = fails(capsys, "from_hf", source, tmp_path / "jax")
    assert time.process_time() - started < 5
    assert words in message and len(message) < 6000 and message.count("\n") < 50
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_many_layers_are_few_lines(tmp_path, capsys):
    source = write_source(tmp_path / "source", lact_tensors(), LACT | {"num_hidden_layers": 1024})
    message = fails(capsys, "from_hf", source, tmp_path / "jax")
    assert "model.layers.2.attn.w1: missing, expected [2, 4, 4]" not in message  # sorted by name
    assert message.count("\n") < 50 and " more" in message


INDEX = f"{WEIGHTS}.index.json"


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (None, "has no weight_map"),
        ([], "has no weight_map"),
        ({}, "has no weight_map"),
        ("model.safetensors", "has no weight_map"),
        ({"lm_head.weight": 3}, "the name of a file for 'lm_head.weight'. Got: a whole number"),
        ({"lm_head.weight": None}, "Got: null"),
        ({"lm_head.weight": ["a"]}, "Got: a list"),
        ({"lm_head.weight": "../x.safetensors"}, "'../x.safetensors' is no name of a file in this"),
        ({"lm_head.weight": "sub/../../x"}, "is no name of a file in this folder"),
        ({"lm_head.weight": "/etc/passwd"}, "'/etc/passwd' is no name of a file in this folder"),
        ({"lm_head.weight": ""}, "'' is no name of a file"),
        ({"lm_head.weight": "a\0b"}, "is no name of a file"),
        ({"lm_head.weight": "\ud83d"}, "is no name of a file"),
        ({"lm_head.weight": "."}, "is no name of a file"),
        ({"lm_head.weight": "sub"}, "names files that are not there: ['sub']"),
        ({"lm_head.weight": "gone.safetensors"}, "not there: ['gone.safetensors']"),
        ({"lm_head.weight": "x" * 5000}, "x"),
        ({"lm_head.weight": "linked.safetensors"}, "is a link that leaves its folder"),
    ],
)
def test_a_bad_index_is_one_message(weight_map, words, tmp_path, capsys):
    source = write_source(tmp_path / "source", lact_tensors())
    (source / WEIGHTS).rename(tmp_path / "x.safetensors")
    (source / "linked.safetensors").symlink_to(tmp_path / "x.safetensors")
    (source / "sub").mkdir()
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    message = fails(capsys, "from_hf", source, tmp_path / "jax")
    assert words in message and message.count("\n") == 1 and len(message) < 6000


def test_shards_in_subfolders(tmp_path):
    tensors = lact_tensors()
    source = write_source(tmp_path / "source", tensors, shards=3)
    (source / "a" / "b").mkdir(parents=True)
    index = json.loads((source / INDEX).read_text())
    for number, place in ((1, "a"), (2, "a/b")):
        name = f"model-{number:05d}-of-00003.safetensors"
        (source / name).rename(source / place / name)
        index["weight_map"] = {
            tensor: f"{place}/{name}" if file == name else file
            for tensor, file in index["weight_map"].items()
        }
    (source / INDEX).write_text(json.dumps(index))
    assert_reads(source, tensors)
    assert read_hf(source).left_out == ()


# ---- Links ----


def test_links_that_leave_the_folder_are_not_followed(tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.write_text("{}")
    names = ("tokenizer.json", "generation_config.json", "modeling.py", "config.json", WEIGHTS)
    for number, name in enumerate(names):
        source = write_source(tmp_path / f"source{number}", lact_tensors())
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to(secret)
        message = fails(capsys, "from_hf", source, tmp_path / "jax")
        assert f"{source / name} is a link that leaves its folder, to {secret}" in message
        (source / name).unlink()
        (source / name).symlink_to(f"../{secret.name}")
        assert "link that leaves" in fails(capsys, "from_hf", source, tmp_path / "jax")
    # A folder that is a link is followed to nothing outside either.
    source = write_source(tmp_path / "parts", lact_tensors(), shards=2)
    index = (source / INDEX).read_text().replace("model-00001", "sub/model-00001")
    (source / INDEX).write_text(index)
    (source / "sub").symlink_to(tmp_path)
    assert "link that leaves" in fails(capsys, "from_hf", source, tmp_path / "jax")


def test_links_inside_the_folder_and_in_the_cache_are_followed(tmp_path, capsys):
    """huggingface_hub keeps files in blobs/ and snapshots/REVISION/ full of links to them."""
    tensors = lact_tensors()
    source = write_source(tmp_path / "source", tensors)
    (source / "store").mkdir()
    (source / WEIGHTS).rename(source / "store" / "weights")
    (source / WEIGHTS).symlink_to("store/weights")
    assert_reads(source, tensors)

    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    shards = write_source(tmp_path / "shards", tensors, shards=2)
    for number, path in enumerate(sorted(shards.iterdir())):
        path.rename(repository / "blobs" / f"{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert_reads(snapshot, tensors)
    (tmp_path / "link").symlink_to(snapshot)
    assert_reads(tmp_path / "link", tensors)
    convert("from_hf", tmp_path / "link", tmp_path / "jax")
    assert (tmp_path / "jax" / "tokenizer.model").read_bytes() == b"\x00\xff pieces\r\n"
    assert not (tmp_path / "jax" / "tokenizer.model").is_symlink()
    (snapshot / "tokenizer.json").symlink_to("../../../../outside")
    (tmp_path / "outside").write_text("{}")
    assert "link that leaves" in fails(capsys, "from_hf", snapshot, tmp_path / "x")
    # Without blobs/ beside it, a folder called snapshots is one like others.
    (repository / "blobs").rename(repository / "objects")
    with pytest.raises(CheckpointError, match="link that leaves"):
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to("../../objects/0")
        read_hf(snapshot)


def test_a_loop_of_links_is_one_message(tmp_path, capsys):
    source = write_source(tmp_path / "source", lact_tensors())
    (source / WEIGHTS).unlink()
    (source / WEIGHTS).symlink_to(WEIGHTS)
    assert "has no weights" in fails(capsys, "from_hf", source, tmp_path / "jax")
    with pytest.raises(CheckpointError):
        contained(source, "..")


def test_companions_that_are_pointers_are_refused(tmp_path, capsys):
    source = write_source(tmp_path / "source", lact_tensors())
    (source / "tokenizer.model").write_bytes(POINTER)
    message = fails(capsys, "from_hf", source, tmp_path / "jax")
    assert "tokenizer.model: pointers of git-lfs" in message
    (source / "config.json").write_bytes(POINTER)
    assert "pointer of git-lfs" in fails(capsys, "from_hf", source, tmp_path / "jax")


# ---- Round trips ----


def test_end_tokens_survive_the_round_trip(tmp_path):
    config = LACT | {"eos_token_id": [2, 5], "bos_token_id": None}
    source = write_source(tmp_path / "source", lact_tensors(), config)
    convert("from_hf", source, tmp_path / "jax")
    convert("to_hf", tmp_path / "jax", tmp_path / "back")
    written = (tmp_path / "back" / "config.json").read_bytes()
    assert written == (source / "config.json").read_bytes()
    convert("to_hf", tmp_path / "jax", tmp_path / "half", "--dtype", "bfloat16")
    fields = json.loads((tmp_path / "half" / "config.json").read_text())
    assert fields == config | {"torch_dtype": "bfloat16"}


def test_parameters_of_another_dtype_are_not_written(tmp_path):
    params = read_hf(write_source(tmp_path / "source", lact_tensors())).params
    params["norm"]["weight"] = params["norm"]["weight"].astype(np.float64)
    with pytest.raises(CheckpointError, match=r"norm.weight: dtype float64 is not supported"):
        write_hf(tmp_path / "hf", params, json.dumps(LACT))
    params["norm"]["weight"] = params["norm"]["weight"].astype(ml_dtypes.bfloat16)
    write_hf(tmp_path / "hf", params, json.dumps(LACT))


# ---- pytorch_model.bin ----


def bin_source(folder: Path, state: object, **options) -> Path:
    """A folder whose pytorch_model.bin holds what torch.save makes of `state`."""
    torch = pytest.importorskip("torch", reason="pytorch_model.bin needs the extra [torch]")
    source = write_source(folder, {})
    (source / WEIGHTS).unlink()
    torch.save(state, source / "pytorch_model.bin", **options)
    return source


def torch_tensors() -> dict:
    torch = pytest.importorskip("torch", reason="pytorch_model.bin needs the extra [torch]")
    return {name: torch.from_numpy(tensor) for name, tensor in lact_tensors().items()}


@pytest.mark.parametrize("case", ["sparse", "meta", "endless", "number", "name", "nested", "list"])
def test_odd_pytorch_files_are_one_message(case, tmp_path, capsys):
    state = torch_tensors()
    import torch

    name = "lm_head.weight"
    if case == "sparse":
        state[name] = state[name].to_sparse()
    elif case == "meta":
        state[name] = torch.empty(11, 8, device="meta")
    elif case == "endless":  # one number in the file, any number of them in the tensor
        state[name] = torch.zeros(1).expand(2**50)
    elif case == "number":
        state[name] = 3
    elif case == "name":
        state[3] = state[name]
    elif case == "nested":
        state = {"model": state}
    else:
        state = list(state.values())
    message = fails(capsys, "from_hf", bin_source(tmp_path / "s", state), tmp_path / "jax")
    assert "pytorch_model.bin must hold a dict of" in message and message.count("\n") == 1


@pytest.mark.parametrize("name", ["legacy", "strided", "parameters"])
def test_pytorch_files_in_other_forms(name, tmp_path):
    """As PyTorch before 1.6 wrote them, not contiguous, and with gradients."""
    state, options = torch_tensors(), {}
    import torch

    if name == "legacy":
        options = {"_use_new_zipfile_serialization": False}
    elif name == "strided":
        state = {k: v.clone().t().contiguous().t() if v.ndim == 2 else v for k, v in state.items()}
    else:
        state = {key: torch.nn.Parameter(tensor) for key, tensor in state.items()}
    assert_reads(bin_source(tmp_path / "source", state, **options), lact_tensors())


def test_a_damaged_pytorch_file_is_one_message(tmp_path, capsys):
    source = bin_source(tmp_path / "source", torch_tensors())
    file = source / "pytorch_model.bin"
    content = file.read_bytes()
    for damaged in (b"", b"x", content[:100], content[: len(content) // 2], POINTER):
        file.write_bytes(damaged)
        message = fails(capsys, "from_hf", source, tmp_path / "jax")
        assert str(source) in message and message.count("\n") == 1
