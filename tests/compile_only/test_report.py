"""The report of `--compile_only`: operations, verdicts, exit codes, messages; one real compile."""

import contextlib
import importlib.util
import json
import math
import os

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec
from tiny import CONFIGS

from refine_jax import main
from refine_jax.base.errors import run_command
from refine_jax.compile_only import child, command
from refine_jax.compile_only.estimate.chips import GIB
from refine_jax.compile_only.estimate.flops import (
    count_flops,
    forward_flops,
    matrix_parameters,
    mixer_flops,
)
from refine_jax.compile_only.programs import programs_of_run
from refine_jax.compile_only.programs.run import AbstractRun
from refine_jax.config import Config, defaults
from refine_jax.generation.generator import BLOCK
from refine_jax.kernels.delta_rule import delta_rule
from refine_jax.models.causal_attention import causal_attention
from refine_jax.models.config import model_config
from refine_jax.models.transformer import ComputePolicy, Model
from refine_jax.parallel import make_mesh

LACT_760M = {
    "model_type": "lact_swiglu",
    "hidden_size": 1536,
    "num_attn_heads": 24,
    "rope_theta": 1000000.0,
}
DELTANET_1_3B = {"model_type": "delta_net", "intermediate_size": 5632}


def flops(function, *args):
    return count_flops(jax.make_jaxpr(function)(*args))[0]


def test_loops_branches_and_calls_are_counted():
    x = jnp.ones((4, 8))
    w = jnp.ones((8, 8))
    once = 2 * 4 * 8 * 8

    def loop(x):
        return lax.scan(lambda y, _: (jax.checkpoint(jnp.dot)(y, w), None), x, length=6)[0]

    assert flops(jax.jit(loop), x) == 6 * once
    assert flops(lambda x: lax.fori_loop(0, 3, lambda _, y: loop(y), x), x) == 18 * once
    assert flops(lambda x: lax.cond(x[0, 0] > 0, loop, lambda y: y @ w, x), x) == 6 * once
    # Backward: products with both transposes; the forward pass once, and again in the checkpoint.
    layer = jax.checkpoint(lambda x, w: jnp.sin(x @ w))
    gradient = jax.grad(lambda x, w: jnp.sum(layer(x, w)), argnums=(0, 1))
    assert flops(gradient, x, w) == 4 * once


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 simulated devices")
def test_shards_count_on_each_device():
    mesh = Mesh(jax.devices()[:4], ("a",))
    spec = PartitionSpec("a")
    product = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    assert flops(product, jnp.ones((8, 16))) == 4 * 2 * 2 * 2 * 16


def test_kernels_count_the_branches_that_their_steps_take():
    def body(x, out):
        step, last = pl.program_id(1), pl.num_programs(1) - 1

        @pl.when(step == 0)
        def _():
            out[...] = x[...] @ x[...]

        @pl.when(jnp.logical_and(step > 0, step < last))
        def _():
            out[...] += x[...] @ x[...]

    x = jnp.ones((16, 16))
    call = pl.pallas_call(body, grid=(3, 5), out_shape=x, name="some_kernel")
    found, kernels = count_flops(jax.make_jaxpr(call)(x))
    assert found == 3 * 4 * 2 * 16**3
    assert {(kernel.name, kernel.flops) for kernel in kernels} == {("some_kernel", found)}


def test_splash_attention_counts_the_blocks_that_causality_leaves():
    """Of 8 x 8 blocks of 512 tokens 36: two products in the forward pass, then three and four."""
    queries = jax.ShapeDtypeStruct((1, 2, 3, 4096, 128), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((1, 2, 4096, 128), jnp.bfloat16)

    def attend(q, k, v):
        return causal_attention(q, k, v, implementation="splash").sum()

    product = 36 * 2 * 6 * 512**2 * 128
    assert flops(attend, queries, keys, keys) == 2 * product
    assert flops(jax.grad(attend, argnums=(0, 1, 2)), queries, keys, keys) == (
        pytest.approx((2 + 3 + 4) * product, rel=1e-3)
    )


HYBRID = [fields for fields in CONFIGS.values() if model_config(fields).layer_kinds is not None]
UNIFORM = [fields for fields in CONFIGS.values() if fields not in HYBRID]


@pytest.mark.parametrize("fields", HYBRID)
def test_operations_of_layers_of_several_kinds(fields):
    config = model_config(fields)
    layers = Model(config, ComputePolicy()).abstract_params()["layers"]
    leaves = jax.tree_util.tree_leaves_with_path(layers)
    matrices = [x for path, x in leaves if "proj" in str(path) and x.ndim == 3]
    want = 2 * sum(math.prod(x.shape) for x in matrices) + 2 * 53 * 16
    for kind in config.layer_kinds:
        part = config.layer_config(kind)
        if kind == "full_attention":
            window = min(part.window or 40, 40)
            seen = sum(min(token, window) for token in range(1, 41)) / 40
            want += 4 * part.num_heads * part.head_dim * seen
        else:
            want += 6 * part.num_value_heads * part.key_dim * part.value_dim
    assert forward_flops(config, 40) == pytest.approx(want)


@pytest.mark.parametrize("fields", [LACT_760M, DELTANET_1_3B, *UNIFORM])
def test_parameters_that_tokens_are_multiplied_with(fields):
    config = model_config(dict(fields))
    layers = Model(config, ComputePolicy()).abstract_params()["layers"]
    leaves = jax.tree_util.tree_leaves_with_path(layers)
    matrices = [x for path, x in leaves if "proj" in str(path) or "qkv" in str(path)]
    count = sum(math.prod(x.shape[1:]) for x in matrices if x.ndim == 3 and x.shape[-1] > 4)
    assert matrix_parameters(config) == count


def test_operations_of_the_published_models_by_hand():
    # 24 layers: q, k, v, o; beta; MLP. The state of 16 heads of 128 x 128 is read, corrected and
    # read again. The head.
    config = model_config(dict(DELTANET_1_3B))
    layer = 4 * 2048**2 + 16 * 2048 + 3 * 2048 * 5632
    mixer = 6 * 16 * 128 * 128
    head = 2048 * 32000
    assert forward_flops(config, 16384) == 24 * (2 * layer + mixer) + 2 * head
    # Window attention: of 16,384 queries the first 2047 see fewer than 2048 tokens. Fast weights:
    # 3 matrices of 384 x 384 a head applied for all tokens, 6 products for 7 of 8 chunks' updates.
    config = model_config(dict(LACT_760M))
    seen = (sum(range(1, 2048)) + (16384 - 2047) * 2048) / 16384
    fast = 2 * 4 * 384 * 384 * (3 + 6 * 7 / 8)
    assert mixer_flops(config, 16384) == pytest.approx(4 * 1536 * seen + fast)


def test_a_forward_pass_multiplies_with_the_matrices_and_runs_the_mixer():
    model = Model(model_config(dict(CONFIGS["deltanet"])), ComputePolicy(implementation="xla"))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    q = jax.ShapeDtypeStruct((1, 8, 2, 8), jnp.float32)
    beta = jax.ShapeDtypeStruct((1, 8, 2), jnp.float32)
    rule = flops(lambda *x: delta_rule(*x, implementation="xla"), q, q, q, beta)
    layer = 8 * 2 * matrix_parameters(model.config) + rule
    assert flops(model.forward, model.abstract_params(), tokens) == 2 * layer


# The report


def figures(name, **changes):
    """What the compiler found of a program, as `child.compile_program` gives it."""
    memory = {"arguments": 2 * GIB, "outputs": GIB, "aliased": GIB, "temporaries": 3 * GIB}
    memory |= {"code": 0, "resident": 0, "peak": 5 * GIB}
    return {
        "name": name,
        "meaning": f"the {name}",
        "runs": 0,
        "compared": False,
        "fits": True,
        "memory": memory,
        "model_flops": 197e12,
        "flops": 250e12,
        "bytes": 3e9,
        "states": 0,
        "collectives": {"all-gather": {"count": 48, "bytes": 1.5e9}},
        "seconds": 2.0,
        "parts": {"kernels": 0.5, "xla": 1.25, "waits": 0.25, "links": 0.5},
        "unknown_loops": 0,
        "buffers": [{"bytes": GIB, "shape": "f32[16,16384]", "source": "jit(update)/dot"}],
        "trace_seconds": 1.0,
        "compile_seconds": 30.0,
        "compiler_message": "",
    } | changes


FACTS = {
    "model_type": "delta_net",
    "model": DELTANET_1_3B,
    "parameter_count": 1300000000,
    "params": 2 * GIB,
    "optimizer": 4 * GIB,
    "mesh": {"data": 1, "fsdp": 16, "tensor": 1, "sequence": 1},
}


def config(**train):
    values = defaults()
    values.model.fresh = dict(DELTANET_1_3B)
    values.train.update(batch_size=128, mini_batch_size=32, micro_batch_size=2, **train)
    return values


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Stands in for the child processes; gives {program: figures} to fill, and a libtpu.so."""
    programs = {
        "update": figures("update", runs=1, seconds=18.0, model_flops=9 * 197e12),
        "ntp_update": figures("ntp_update", seconds=12.0, compared=True),
    }

    def in_child(task):
        assert Config.from_dict(task["config"]).train.micro_batch == 2
        if task["program"] is None:
            return FACTS | {"programs": list(programs)}
        return programs[task["program"]]

    (tmp_path / "libtpu.so").touch()
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "libtpu.so"))
    monkeypatch.setattr(command, "in_child", in_child)
    return programs


def test_a_run_that_fits(compiler, capsys, tmp_path):
    code = main.compile_for(config(), "v5e:4x4", str(tmp_path / "run"), None)
    out = capsys.readouterr().out
    assert code == 0
    written = json.loads((tmp_path / "run" / "compile_only.json").read_text())
    assert written["fits"] is True
    assert written["advice"] == []
    step = written["step"]
    # 128 rows of 16,384 tokens; 9 times the operations of a second at the chip's peak.
    assert step["seconds"] == 18
    assert step["tokens_per_second"] == 128 * 16384 / 18
    assert step["mfu"] == pytest.approx(9 / 18)
    assert (step["ntp_seconds"], step["ratio"]) == (12, 1.5)
    for words in (
        "fsdp=16",
        "parameters 2.00 GiB, optimizer 4.00 GiB",
        "arguments 2.00 GiB, outputs 1.00 GiB, aliased 1.00 GiB, temporaries 3.00 GiB",
        "5.00 GiB of 15.75 GiB",
        "all-gather 48 x, 1.50 GB",
        "250.00 TFLOP (197.00 TFLOP of the model), 3.00 GB of HBM traffic",
        "f32[16,16384]  jit(update)/dot",
        "training step (static estimate): 18.00 s",
        "utilisation 50.0%",
        "ReFINE takes 1.50 times as long",
        "fits v5e:4x4",
    ):
        assert words in out


def test_a_run_that_does_not_fit(compiler, capsys, tmp_path):
    memory = compiler["update"]["memory"] | {"temporaries": 30 * GIB, "peak": 32 * GIB}
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM"
    compiler["update"] |= {"fits": False, "memory": memory, "seconds": None}
    compiler["update"] |= {"compiler_message": message}
    out_file = tmp_path / "figures.json"
    assert main.compile_for(config(), "v5e:4x4", None, str(out_file)) == command.NOT_FITTING == 2
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    assert message in out
    assert "does not fit v5e:4x4: update" in out
    advice = json.loads(out_file.read_text())["advice"]
    # By what each saves: of 30 GiB of temporaries, of 6 GiB of state.
    assert [text.split(":")[0] for text in advice] == [
        "config.model.remat='full'",
        "config.train.micro_batch_size=1",
        "config.model.param_dtype='bfloat16'",
        "config.optimizer.first_moment_dtype='bfloat16'",
        "a larger slice",
    ]
    assert "16.25 GiB more" in advice[-1]


def test_what_is_only_compared_with_may_not_fit(compiler, capsys):
    """The run fits, and only that is said of it."""
    compiler["prefill"] = figures("prefill", compared=True) | {"fits": False}
    assert main.compile_for(config(), "v5e:4x4", None, None) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not any("NOT FIT" in line for line in lines)
    (line,) = [line for line in lines if line.startswith("prefill ") and "GiB of" in line]
    assert "(too large)" in line and "not a part of the run" in line
    assert lines[-2] == "fits v5e:4x4"
    assert lines[-1].startswith("not a part of the run, and too large for this slice: prefill; ")
    assert "config.generation.prefill_tokens=16384" in lines[-1]
    # Where the phase generates, it is the run's.
    compiler["prefill"] |= {"compared": False}
    assert main.compile_for(config(), "v5e:4x4", None, None) == command.NOT_FITTING
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "does not fit v5e:4x4: prefill" in out


def test_a_program_that_does_not_compile(compiler, capsys):
    compiler["update"] = {"error": "compile", "message": "ended by SIGABRT: libtpu has a fault"}
    assert main.compile_for(config(), "v5e:4x4", None, None) == command.FAILED == 3
    assert "update          does not compile: ended by SIGABRT" in capsys.readouterr().out


def test_bad_input_is_one_message(compiler, capsys, monkeypatch, tmp_path):
    def complaint(values, topology, file=None):
        assert run_command(lambda: main.compile_for(values, topology, None, file)) == 1
        captured = capsys.readouterr()
        assert captured.err.count("error: ") == 1
        return captured.err

    assert "--topology must be GENERATION:SIZES" in complaint(config(), "h100:8")
    assert "--config=FILE" in complaint(None, "v5e:4x4")
    assert "There is no folder" in complaint(config(), "v5e:4x4", "/no/such/folder/x.json")
    os.mkfifo(tmp_path / "pipe")
    for file, words in (
        (tmp_path, "It is a folder"),
        (tmp_path / "pipe", "It is no regular file"),
        ("/dev/null", "It is no regular file"),
        (tmp_path / ("x" * 300), "the name is too long"),
        ("s3://bucket/x.json", "--json must be a path of a file system"),
    ):
        assert words in complaint(config(), "v5e:4x4", str(file))
    for name in ("v5q:4x4", "V5E:4x4", "v5e:4x4x4", "v5e:0x4", "v5e:99999x4", "v5e:٤x٤", "v5e"):
        assert "--topology" in complaint(config(), name)
    assert "Did you mean 'v5e'?" in complaint(config(), "V5E:4x4")
    monkeypatch.setattr(command, "in_child", lambda _: {"error": "input", "message": "3 heads"})
    assert "error: 3 heads" in complaint(config(), "v5e:4x4")
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/no/libtpu.so")
    assert "must name a libtpu.so. Got: /no/libtpu.so" in complaint(config(), "v5e:4x4")
    monkeypatch.delenv("TPU_LIBRARY_PATH")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install -e '.[tpu]'" in complaint(config(), "v5e:4x4")


def test_advice_by_what_is_large(compiler, capsys):
    values = config()
    values.train.micro_batch_size = 2
    values.model.remat = "full"
    values.model.param_dtype = "bfloat16"
    compiler["update"] |= {"fits": False}
    assert main.compile_for(values, "v5e:4x4", None, None) == 2
    out = capsys.readouterr().out
    assert "micro_batch_size=1" in out
    assert "bfloat16'" not in out


def advice_of(tmp_path, values, topology="v5e:4x4"):
    """First words of what would help, in its order, and all of it by them."""
    out = tmp_path / "figures.json"
    assert main.compile_for(values, topology, None, str(out)) == command.NOT_FITTING
    texts = json.loads(out.read_text())["advice"]
    return {text.split(" with ")[0].split(":")[0]: text for text in texts}


@pytest.fixture
def rollouts_of_lact(compiler, monkeypatch):
    """(the facts, a configuration) of LaCT rollouts that do not fit, a row a chip at a time."""
    values = config()
    values.model.fresh = dict(LACT_760M)
    values.train.micro_batch_size = 1
    facts = FACTS | {"model_type": "lact_swiglu", "model": LACT_760M, "mesh": dict(FACTS["mesh"])}
    memory = compiler["update"]["memory"] | {"temporaries": 15 * GIB, "peak": 17 * GIB}
    compiler["update"] |= {"fits": False, "memory": memory, "states": 6 * GIB}

    def in_child(task):
        if task["program"] is None:
            return facts | {"programs": list(compiler)}
        return compiler[task["program"]]

    monkeypatch.setattr(command, "in_child", in_child)
    return facts, values


def test_decode_states_are_divided_by_heads(rollouts_of_lact, tmp_path):
    _, values = rollouts_of_lact
    advice = advice_of(tmp_path, values)
    order = list(advice)
    assert order.index("config.mesh.tensor=2") < order.index("config.mesh.sequence=2")
    tensor, sequence = advice["config.mesh.tensor=2"], advice["config.mesh.sequence=2"]
    # Half of the 6 GiB of states.
    assert "with fsdp=8" in tensor and "at least 3.00 GiB less a chip" in tensor
    assert "all of the decode states" in sequence
    # Updates of 16 rows leave one to each of 16 chips, and two to each of 8.
    values.train.update(mini_batch_size=16, micro_batch_size=2)
    tensor = advice_of(tmp_path, values)["config.mesh.tensor=2"]
    assert "with fsdp=8, config.train.micro_batch_size=1:" in tensor


def test_traces_are_divided_by_tokens(rollouts_of_lact, compiler, tmp_path):
    _, values = rollouts_of_lact
    compiler["update"]["states"] = GIB
    order = list(advice_of(tmp_path, values))
    assert order.index("config.mesh.sequence=2") < order.index("config.mesh.tensor=2")


def test_only_meshes_that_the_model_allows_are_named(rollouts_of_lact, tmp_path):
    facts, values = rollouts_of_lact
    # 24 attention heads, 4 fast-weight heads: by 4, not by 8.
    facts["mesh"] |= {"fsdp": 8, "tensor": 2}
    assert "config.mesh.tensor=4" in advice_of(tmp_path, values)
    facts["mesh"] |= {"fsdp": 4, "tensor": 4}
    advice = advice_of(tmp_path, values)
    assert not [text for text in advice if "mesh.tensor" in text]
    assert "config.mesh.sequence=2" in advice
    # 16,384 tokens are 8 chunks of 2048: each of the chips that share a row has whole ones.
    facts["mesh"] |= {"fsdp": 2, "tensor": 1, "sequence": 4096}
    assert not [text for text in advice_of(tmp_path, values) if "mesh.sequence" in text]
    # Rows of an odd number of chips cannot be given away.
    facts["mesh"] |= {"fsdp": 5, "tensor": 1, "sequence": 1}
    assert not [text for text in advice_of(tmp_path, values) if "mesh" in text]


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 simulated devices")
def test_states_on_a_chip_are_those_of_its_rows_and_heads():
    values = small_config()
    values.model.fresh = dict(CONFIGS["lact"])
    values.data.sequence_length = 64
    forks = values.refine.num_positions = 2

    def on_a_chip(**sizes):
        values.mesh.update(dict.fromkeys(("fsdp", "tensor", "sequence"), 1) | sizes)
        checked, count = Config.from_dict(values), math.prod(sizes.values())
        run = AbstractRun(checked, jax.devices()[0])
        mesh = make_mesh(checked.mesh, jax.devices()[:count])
        with jax.set_mesh(mesh) if count > 1 else contextlib.nullcontext():
            return {child.bytes_of(part) for part in programs_of_run(run)["update"]().states}

    model = Model(model_config(dict(CONFIGS["lact"])), ComputePolicy())
    state = jax.eval_shape(lambda p: model.init_state(p, (1, forks)), model.abstract_params())
    whole = child.bytes_of(state)
    counts = child.bytes_of((state.cursor, state.position))
    assert on_a_chip() == {whole}
    assert on_a_chip(fsdp=2) == {whole}  # a row each
    assert on_a_chip(fsdp=2, sequence=2) == {whole}
    assert on_a_chip(fsdp=2, tensor=2) == {(whole - counts) // 2 + counts}


def test_caches_have_room_for_a_prompt_and_its_answer():
    values = small_config()
    values.model.fresh = dict(CONFIGS["qwen"])

    def room():
        run = AbstractRun(Config.from_dict(values), jax.devices()[0])
        program = programs_of_run(run)["decode"]()
        return run.model.capacity(program.args[1].state)

    assert values.generation.max_new_tokens is None
    assert 1024 + BLOCK <= room() <= 2048
    values.generation.max_new_tokens = 3000
    assert room() >= 1024 + 3000


def test_gradients_of_frozen_matrices_are_not_counted():
    """As in the program of the step: it lacks the products of tokens that make them."""
    counted, asked = {}, {}
    wide = {"hidden_size": 64, "intermediate_size": 96}
    for trainable in ("all", "lora"):
        values = small_config()
        values.model.fresh = CONFIGS["deltanet"] | wide
        values.model.lora_rank = 1 if trainable == "lora" else None
        values.model.remat = "none"
        values.train.trainable = trainable
        values.train.update(batch_size=1, mini_batch_size=1)
        values.refine.objective = "ntp"
        values.data.sequence_length = 64
        run = AbstractRun(Config.from_dict(values), jax.devices()[0])
        program = programs_of_run(run)["update"]()
        counted[trainable] = count_flops(program.function.trace(*program.args).jaxpr)[0]
        asked[trainable] = program.model_flops
    saved = asked["all"] - asked["lora"]
    assert saved > 0.1 * asked["all"]
    # The loss makes the head's gradient beside itself; where nothing reads it, XLA leaves it out.
    head = 2 * 64 * 53 * 64
    assert saved == pytest.approx(counted["all"] - counted["lora"] + head, rel=0.01)


def test_prompts_that_adapt_updates_share_the_weights():
    """Three at once: three updates with their moments, and the model once."""
    values = small_config()
    values.model.fresh = dict(CONFIGS["deltanet"])
    values.model.lora_rank = 2
    values.train.trainable = "lora"
    values.phase = "testtime"
    values.testtime.copies = 3
    run = AbstractRun(Config.from_dict(values), jax.devices()[0])
    model = child.bytes_of(run.model.abstract_params())
    updates = child.bytes_of(run.state.params)
    layers, size, hidden, heads = 2, 16, 24, 2
    widths = [4 * (size + size), size + heads, 3 * (size + hidden)]  # in and out of linear maps
    assert updates == 4 * layers * 2 * sum(widths)
    facts = child.summary(run)
    assert 2 * updates <= facts["optimizer"] <= 2 * updates + 16
    assert model <= child.bytes_of(run.state.frozen) <= model + 4 * layers * 8  # with scales
    programs = programs_of_run(run)
    for name in ("adaptation", "prefill", "decode"):
        program = programs[name]()
        taken = child.bytes_of(program.args)
        jax.eval_shape(program.function, *program.args)
        if name == "adaptation":
            tokens = child.bytes_of(program.args[1])
            assert taken <= model + 3 * 3 * updates + tokens + 1024
            assert child.bytes_of(program.resident) == updates


# The compiler

needs_libtpu = pytest.mark.skipif(
    not os.environ.get("TPU_LIBRARY_PATH") and importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, in this environment or as TPU_LIBRARY_PATH",
)


def small_config():
    values = defaults()
    sizes = {"hidden_size": 256, "num_heads": 2, "num_hidden_layers": 3, "intermediate_size": 512}
    values.model.fresh = DELTANET_1_3B | sizes | {"vocab_size": 512}
    values.data.sequence_length = 1024
    values.train.update(batch_size=8, mini_batch_size=4, micro_batch_size=1)
    return values


@needs_libtpu
def test_compiles_a_sharded_update():
    task = {"config": Config.from_dict(small_config()).to_dict(), "topology": "v5e:2x2"}
    task |= {"program": "update", "debug": False}
    found = command.in_child(task)
    assert found.get("fits"), found
    assert found["runs"] == 1  # all mini-batches of a step are updates of one program
    memory = found["memory"]
    assert memory["aliased"] > 0  # the state is given away
    assert memory["peak"] == (
        memory["arguments"]
        + memory["outputs"]
        - memory["aliased"]
        + memory["temporaries"]
        + memory["code"]
        + memory["resident"]
    )
    # One micro-batch of 4 rows, read and differentiated; chunks and rollouts only add to it.
    model = model_config(dict(small_config().model.fresh.to_dict()))
    assert found["model_flops"] >= 3 * 1024 * forward_flops(model, 1024)
    assert found["flops"] > found["model_flops"]
    assert found["collectives"]
    assert found["seconds"] >= found["parts"]["kernels"] > 0
    assert found["unknown_loops"] == 0
    # Without code the program is the same.
    planned = command.in_child(task | {"plan": True})
    assert planned["planned"] and planned["fits"]
    assert planned["collectives"] == found["collectives"]
    assert planned["memory"]["arguments"] == memory["arguments"]
    assert planned["memory"]["temporaries"] == pytest.approx(memory["temporaries"], rel=0.2)
    assert planned["seconds"] > 0


@needs_libtpu
def test_a_mesh_that_does_not_divide_is_bad_input():
    values = small_config()
    values.mesh.tensor = 4
    task = {"config": Config.from_dict(values).to_dict(), "topology": "v5e:2x2"}
    found = command.in_child(task | {"program": None, "debug": False})
    assert found["error"] == "input"
    assert "config.mesh.tensor must divide the heads" in found["message"]
