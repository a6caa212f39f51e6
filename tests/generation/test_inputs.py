"""Generation from checkpoints, prompts, settings and saved states as people have them."""

import dataclasses
import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import require_input
from tiny import tiny, tokens

from refine_jax import generate
from refine_jax.base.errors import CheckpointError, ConfigError, DataError, RunError
from refine_jax.checkpoint import save_model
from refine_jax.config import RefineConfig
from refine_jax.data.tokenizer import load_tokenizer, with_ends
from refine_jax.evaluation.scoring import Request, Scorer
from refine_jax.evaluation.stream import Reader
from refine_jax.generation import (
    CopiesGenerator,
    Generator,
    Sampling,
    load,
    load_prefix,
    save_prefix,
)
from refine_jax.models.transformer import ComputePolicy, Model
from refine_jax.refine.answers import AnswerMethod
from refine_jax.refine.rollout import fork_rollouts, sample_rollouts

BYTES = load_tokenizer("bytes")
DRAWN = Sampling(temperature=1.0, max_new_tokens=24, seed=5)
READ = ("--temperature", "1", "--max_new_tokens", "24", "--seed", "5", "--json", "--prompt", "fox")


@functools.cache
def model():
    return tiny("deltanet", vocab_size=259, num_hidden_layers=1)


def write(folder, params=None, tokenizer=None, **files):
    """A checkpoint; files: {name without .json: its JSON} beside the weights."""
    made, own = model()
    found = {path.name: path for path in tokenizer.iterdir()} if tokenizer else {}
    config = made.config.to_hf() | files.pop("config", {})
    for name, value in files.items():
        path = folder.with_name(f"{folder.name}.{name}.json")
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        found[f"{name}.json"] = path
    save_model(folder, own if params is None else params, json.dumps(config), found)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint without tokenizer files."""
    return write(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture
def run(capsys):
    """Runs the command; returns its exit code, standard output and error."""

    def run(*arguments):
        code = generate.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@functools.cache
def free():
    """Tokens after "fox" that nothing ends; READ asks for the same."""
    made, params = model()
    generator = Generator(made, with_ends(BYTES, ()))
    (result,) = generator.complete(params, ["fox"], DRAWN)
    assert result.finish_reason == "length" and len({*result.tokens}) > 12
    return result.tokens


def cut(ends):
    """The tokens of `free` up to and with the first of `ends`."""
    at = min(free().index(end) for end in ends)
    return list(free()[: at + 1])


# ---- Tokens that end a text ----


@pytest.mark.parametrize(
    ("file", "places"),
    [
        ({"generation_config": [9, 4]}, [9, 4]),
        ({"generation_config": 7}, [7]),
        ({"config": [6, 12]}, [6, 12]),
        ({"config": [6], "generation_config": [3]}, [6, 3]),
        ({"generation_config": None}, []),
    ],
)
def test_every_end_of_the_files_ends_a_text(file, places, tmp_path, run):
    ids = [free()[place] for place in places]
    files = {
        name: {"eos_token_id": [free()[i] for i in value] if isinstance(value, list) else value}
        for name, value in file.items()
    }
    if places == [7]:
        files = {"generation_config": {"eos_token_id": ids[0], "temperature": 9.0, "top_k": 1}}
    folder = write(tmp_path / "model", **files)
    code, out, err = run("--checkpoint", folder, "--tokenizer", "bytes", *READ)
    assert (code, err) == (0, "")
    line = json.loads(out)
    want = cut(ids) if ids else list(free())
    assert line["tokens"] == want
    assert line["finish_reason"] == ("eos" if ids else "length")
    assert line["text"] == BYTES.decode(want[:-1] if ids else want)


def test_every_end_of_a_tokenizer_ends_a_text(tmp_path):
    """With "dog" as an end, an answer ends with it and does not hold it."""
    folder = write(tmp_path / "model", tokenizer=require_input("tok_eos_list"))
    made, params, tokenizer = load(folder)
    assert tokenizer.end_ids == (2, 11)
    endless = load_tokenizer(folder)
    endless.end_ids = ()
    sampling = dataclasses.replace(DRAWN, max_new_tokens=300)
    results, wholes = (
        Generator(made, each).complete(params, ["fox"] * 8, sampling)
        for each in (tokenizer, endless)
    )
    for result, whole in zip(results, wholes, strict=True):
        places = [place for place, token in enumerate(whole.tokens) if token in (2, 11)]
        length = places[0] + 1 if places else 300
        assert result.tokens == whole.tokens[:length]
        assert result.finish_reason == ("eos" if places else "length")
        assert "dog" not in result.text
    assert {result.tokens[-1] for result in results} >= {2, 11}


@pytest.mark.parametrize(
    "value", ["2", 2.0, True, [2, None], [[2]], {"id": 2}, -1, 259, [2, 10**30]]
)
def test_ends_that_are_no_ids_are_refused(value, tmp_path, run):
    folder = write(tmp_path / "model", generation_config={"eos_token_id": value})
    code, out, err = run("--checkpoint", folder, "--tokenizer", "bytes", *READ)
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert "generation_config.json: eos_token_id must be" in err


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, '{"eos_token_id": NaN}'])
def test_a_generation_config_that_is_none_is_refused(text, tmp_path, run):
    folder = write(tmp_path / "model", generation_config=text)
    code, _, err = run("--checkpoint", folder, "--tokenizer", "bytes", *READ)
    assert code == 1 and err.count("\n") == 1 and "generation_config.json" in err


def test_rollouts_sample_none_of_the_ends():
    made, params = model()
    keys = jax.random.split(jax.random.key(0), 2)

    @functools.partial(jax.jit, static_argnums=0)
    def rollouts(forbidden):
        starts = jnp.full((2, 8), 6, jnp.int32)
        hidden, trace = made.forward(params, tokens(0, 2, 6), with_trace=True)
        forks = fork_rollouts(made, params, hidden, trace, starts, 4)
        return sample_rollouts(
            made, params, *forks, keys, rollout_length=4, forbidden_token=forbidden
        )

    ends = tuple(np.unique(rollouts(None))[:5].tolist())
    assert not np.isin(rollouts(ends), ends).any()
    np.testing.assert_array_equal(rollouts(ends[0]), rollouts(ends[:1]))


def test_an_answer_ends_with_the_first_of_the_ends():
    made, params = model()
    batch = {"tokens": tokens(1, 2, 12), "segments": np.ones((2, 12), np.int32)}
    batch["answer_mask"] = np.zeros((2, 12), np.int32)

    def answer(ends):
        method = AnswerMethod(made, RefineConfig(), max_answer_tokens=6, eos_id=ends, pad_id=0)
        return jax.tree.map(np.asarray, jax.jit(method.answer)(params, batch))

    whole, _ = answer(258)
    ends = (int(whole[0, 2]), int(whole[1, 4]))
    found, masks = answer(ends)
    np.testing.assert_array_equal(found, whole)
    for row, mask in zip(whole, masks, strict=True):
        places = [place for place, token in enumerate(row) if token in ends]
        assert places and mask.tolist() == [1.0] * (places[0] + 1) + [0.0] * (5 - places[0])


# ---- Predictions that are not finite ----


def spoiled(value=np.nan, token=None):
    """Parameters with `value` as the embedding of `token`, or in all embeddings."""
    _, params = model()
    rows = slice(None) if token is None else token
    weight = params["embeddings"]["weight"].at[rows].set(value)
    return params | {"embeddings": {"weight": weight}}


@pytest.mark.parametrize("options", [[], ["--temperature", "1"], ["--stream"], ["--json"]])
def test_nothing_is_generated_by_parameters_that_are_nan(options, tmp_path, run):
    folder = write(tmp_path / "model", spoiled())
    arguments = ["--checkpoint", folder, "--tokenizer", "bytes", "--prompt", "fox", *options]
    code, out, err = run(*arguments)
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert "predictions are not finite (NaN or infinite) after 0 new tokens" in err
    state = tmp_path / "state"
    code, _, err = run(*arguments, "--save_state", state, "--max_new_tokens", "0")
    assert code == 1 and "not finite" in err and not state.exists()


@pytest.mark.parametrize("sampling", [DRAWN, dataclasses.replace(DRAWN, temperature=0.0)])
def test_what_is_not_finite_later_is_said_where_it_is_met(sampling):
    """The token that ruins the state is generated; the one after it cannot be."""
    made, params = model()
    generator = Generator(made, with_ends(BYTES, ()))
    (result,) = generator.complete(params, ["fox"], sampling)
    # A token that is not in the prompt, at its first place.
    place = next(
        i for i, t in enumerate(result.tokens) if i > 2 and t not in (*result.tokens[:i], *b"fox")
    )
    message = f"not finite .* after {place + 1} new tokens"
    for value in (np.nan, np.inf):
        bad = spoiled(value, result.tokens[place])
        with pytest.raises(RunError, match=message):
            generator.complete(bad, ["fox"], sampling)
        # A row that ends before it is as it was.
        enough = dataclasses.replace(sampling, max_new_tokens=place + 1)
        (before,) = generator.complete(bad, ["fox"], enough)
        assert before.tokens == result.tokens[: place + 1]
    each = CopiesGenerator(made, generator.tokenizer)
    with pytest.raises(RunError, match=message):
        each.complete(jax.tree.map(lambda x: x[None], bad), ["fox"], sampling)


def test_scores_that_are_not_finite_are_said():
    made, _ = model()
    request = Request(tokens(0, 12), 4)
    bad = spoiled()
    with pytest.raises(RunError, match="not finite"):
        list(Scorer(made, bad).score([request]))
    with pytest.raises(RunError, match=r"not finite .* after 1 tokens"):
        Reader(made, bad, block=8).read(tokens(0, 1, 12))


# ---- Prompts, output, settings ----


def read(*arguments):
    return generate.read_prompts(
        generate.command().parse(["--checkpoint", "x", *map(str, arguments)])
    )


def test_prompts_are_cleaned_where_they_enter(tmp_path, monkeypatch):
    want = read("--prompt_file", require_input("prompt_plain.txt"))
    assert want == ["hello"]
    assert read("--prompt_file", require_input("prompt_bom.txt")) == want
    assert read("--prompt", "\ufeffhello") == want
    assert read("--prompt", os.fsdecode(b"caf\xe9")) == ["caf?"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfhello")))
    assert read("--prompt_file", "-") == want
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("hello")
    assert read("--prompt_file", "~/a.txt") == want
    for name, content, message in (
        ("utf16", "hello".encode("utf-16"), "mark of UTF-16: save it as UTF-8"),
        ("utf16le", "hello".encode("utf-16-le"), "null characters"),
        ("latin", b"caf\xe9", "not UTF-8"),
        ("mark", b"\xef\xbb\xbf", "is empty"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read("--prompt_file", tmp_path / name)
    for name, message in (
        (tmp_path, "it is a folder, no file"),
        (tmp_path / "none", "No such file"),
        ("gs:/bucket/a.txt", "must be a path, or a URL"),
        ("x" * 5000, "too long"),
    ):
        with pytest.raises(DataError, match=message):
            read("--prompt_file", name)


def test_a_prompt_that_is_not_utf8_and_an_output_that_takes_ascii_only(plain):
    command = [sys.executable, "-m", "refine_jax.generate", "--checkpoint", str(plain)]
    command += ["--tokenizer", "bytes", "--json", "--max_new_tokens", "30", "--prompt", b"caf\xe9"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    said = [line for line in done.stderr.splitlines() if not line.startswith(b"compiling ")]
    assert (done.returncode, said) == (0, [])
    line = json.loads(done.stdout.decode("ascii"))
    assert line["tokens_read"] == len("caf?") + 1
    assert line["text"] == BYTES.decode(line["tokens"]) and not line["text"].isascii()


@pytest.mark.parametrize("options", [[], ["--stream"], ["--json"]])
def test_output_of_ascii_escapes_what_it_cannot_say(options, plain, monkeypatch, capsys):
    arguments = ["--checkpoint", str(plain), "--tokenizer", "bytes", "--prompt", "café"]
    assert generate.main(arguments) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert generate.main([*arguments, *options]) == 0
    output.flush()
    shown = output.buffer.getvalue().removesuffix(b"\n")
    if options == ["--json"]:
        assert json.loads(shown)["text"] == text
    else:
        assert shown == text.encode("ascii", "backslashreplace")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [float("nan"), float("inf"), -1, 1e39, 10**400, "1", None, True, 1j]),
        ("top_k", [0, -1, 2.0, "2", True]),
        ("top_p", [0, 1.5, float("nan"), "1", [1]]),
        ("max_new_tokens", [-1, 10**12, 2**31, 1_000_001, 1.0, None, "8"]),
        ("stop", ["", "text", [""], [1], None, ["caf\udce9"], ["a", "\ud83d"]]),
        ("seed", [-1, 2**32, 10**30, 0.5, None]),
    ],
)
def test_settings_that_cannot_work_are_named(field, values):
    for value in values:
        with pytest.raises(ConfigError, match=f"^{field} must be") as raised:
            Sampling(**({"temperature": 1.0} | {field: value}))
        assert len(str(raised.value)) < 200


def test_settings_at_their_ends_work(run, plain):
    arguments = ["--checkpoint", plain, "--tokenizer", "bytes", "--prompt", "fox", "--json"]
    best = json.loads(run(*arguments, "--max_new_tokens", 4)[1])["tokens"]
    drawn = ["--temperature", "1", "--top_k", 10**30, "--top_p", "1e-300", "--seed", 2**32 - 1]
    assert json.loads(run(*arguments, *drawn, "--max_new_tokens", 4)[1])["tokens"] == best
    for options, message in (
        (["--max_new_tokens", 10**12], "max_new_tokens must be"),
        (["--max_new_tokens", -1], "max_new_tokens must be"),
        (["--seed", 2**32], "seed must be"),
        (["--temperature", "1", "--top_k", 0], "top_k must be"),
        (["--temperature", "nan"], "temperature must be"),
        (["--stop", ""], "stop must be"),
        (["--stop", os.fsdecode(b"caf\xe9")], "stop must be"),
        (["--adapt_steps", 10**12], "--adapt_steps must be at most"),
        (["--checkpoint", "gs:/bucket/model"], "must be a path, or a URL"),
        (["--save_state", "gs:/bucket/state"], "must be a path, or a URL"),
        (["--load_state", "gs:/bucket/state"], "must be a path, or a URL"),
    ):
        given = arguments[2:] if "--checkpoint" in options else arguments
        code, out, err = run(*given, *options)
        assert (code, out) == (1, "") and err.count("\n") == 1 and message in err


# ---- The tokenizer of a run ----


def test_the_tokenizer_that_the_run_was_trained_with(plain, tmp_path, run, caplog):
    def folder(name, **config):
        made = write(tmp_path / name)
        (made / "run.json").write_text(json.dumps({"config": config}))
        return made

    arguments = ("--prompt", "fox", "--max_new_tokens", 6)
    want = run("--checkpoint", plain, "--tokenizer", "bytes", *arguments)[1]
    run_of_bytes = folder("bytes", data={"tokenizer": "bytes"})
    assert run("--checkpoint", run_of_bytes, *arguments)[:2] == (0, want)
    assert len(caplog.records) == 1 and "run.json names bytes" in caplog.text
    later = folder(
        "later", data={"tokenizer": "checkpoint"}, model={"checkpoint": str(run_of_bytes)}
    )
    assert run("--checkpoint", later, *arguments)[:2] == (0, want)
    circle = tmp_path / "circle"
    folder("circle", data={"tokenizer": "checkpoint"}, model={"checkpoint": str(circle)})
    gone = folder("gone", data={"tokenizer": str(tmp_path / "tokenizer")})
    for path, message in (
        (circle, "--tokenizer"),
        (gone, "not there any more"),
        (plain, "--token"),
    ):
        code, out, err = run("--checkpoint", path, *arguments)
        assert (code, out) == (1, "") and err.count("\n") == 1 and message in err
    for index, config in enumerate(
        ([], {"data": []}, {"data": {"tokenizer": 3}}, {"data": {"tokenizer": ["bytes"]}})
    ):
        path = folder(f"damaged{index}")
        (path / "run.json").write_text(json.dumps({"config": config}))
        code, out, err = run("--checkpoint", path, *arguments)
        assert (code, out) == (1, "") and err.count("\n") == 1 and "run.json" in err
    (path / "run.json").write_text("[" * 100_000)
    code, out, err = run("--checkpoint", path, *arguments)
    assert (code, out) == (1, "") and "run.json is not valid JSON" in err
    # Another tokenizer, named, has the last word.
    code, _, err = run("--checkpoint", gone, "--tokenizer", "bytes", *arguments)
    assert (code, err) == (0, "")


# ---- Saved states ----


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    made, params = model()
    folder = tmp_path_factory.mktemp("state") / "state"
    prefix = Generator(made, BYTES).read(params, [list(b"fox"), list(b"the dog")])
    save_prefix(folder, prefix, made, params, BYTES)
    return folder, prefix


CHANGES = {
    "lengths": (
        None,
        3,
        "3",
        {},
        [],
        [3],
        [3, 7, 1],
        [7, 3],
        [3, "7"],
        [3, 7.0],
        [3, None],
        [-3, 7],
    ),
    "model": (None, "delta_net", [], {"model_type": 3}, {"hidden_size": "16"}),
    "parameters": (None, 3, "0" * 32, ["x"]),
    "tokenizer": (None, {}, "other"),
    "compute_dtype": (None, "bfloat16", 32),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_state_with_another_record_is_refused(field, state, tmp_path):
    folder, _ = state
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "arrays").symlink_to(folder / "arrays")
    fields = json.loads((folder / "state.json").read_text())
    for value in CHANGES[field]:
        if isinstance(value, dict) and field == "model":
            value = fields["model"] | value
        changed = fields | {field: value}
        (copy / "state.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError) as raised:
            load_prefix(copy, *model(), BYTES)
        assert str(copy) in str(raised.value) or str(folder) in str(raised.value)
        assert len(str(raised.value)) < 1000


def test_states_that_are_none_and_a_link_to_one(state, tmp_path, run, plain):
    folder, prefix = state
    made, params = model()
    (tmp_path / "link").symlink_to(folder)
    found = load_prefix(tmp_path / "link", made, params, BYTES)
    jax.tree.map(np.testing.assert_array_equal, found, prefix)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for content in (b"", b"[]", b"\xff", b"[" * 100_000, b'{"lengths": NaN}'):
        (damaged / "state.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"state\.json"):
            load_prefix(damaged, made, params, BYTES)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "state", tmp_path / "link", "/proc/state"):
        arguments = ["--checkpoint", plain, "--tokenizer", "bytes", "--prompt", "fox"]
        code, out, err = run(*arguments, "--save_state", path)
        assert (code, out) == (1, "") and err.count("\n") == 1 and str(Path(path).parent) in err
    # Parents that are not there are made.
    save_prefix(tmp_path / "a" / "b", prefix, made, params, BYTES)
    assert load_prefix(tmp_path / "a" / "b", made, params, BYTES).length.tolist() == [3, 7]
    low = Model(made.config, ComputePolicy(compute_dtype="bfloat16"))
    with pytest.raises(CheckpointError, match="another dtype"):
        load_prefix(folder, low, params, BYTES)
