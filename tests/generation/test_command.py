"""`python -m refine_jax.generate`, from a checkpoint's folder to text on standard output."""

import io
import itertools
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny

from refine_jax.checkpoint import save_model
from refine_jax.data.tokenizer import load_tokenizer
from refine_jax.generate import main
from refine_jax.generation import Generator, Sampling
from refine_jax.refine.optimizer import clip_by_norm

MARY = "Mary had a little lamb, its fleece was white as snow"
DRAWN = ["--temperature", "0.9", "--top_k", "500", "--top_p", "0.95", "--seed", "3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder, model, params) of a model with the published tokenizer."""
    model, params = tiny("deltanet", vocab_size=32000, num_hidden_layers=1)
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    config = json.dumps(model.config.to_hf())
    save_model(folder, params, config, load_tokenizer("mistral-v1").files)
    return str(folder), model, params


@pytest.fixture
def generate(checkpoint, capsys):
    """Runs the command; returns its exit code, standard output and error."""

    def run(*arguments):
        model = [] if "--checkpoint" in arguments else ["--checkpoint", checkpoint[0]]
        code = main([*model, *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def lines(output):
    return [json.loads(line) for line in output.splitlines()]


def test_prompts_and_files_of_any_length_are_continued_as_by_the_library(
    generate, checkpoint, tmp_path
):
    (tmp_path / "b.txt").write_bytes(b"Baa, baa,\r\nblack sheep\n")
    code, out, err = generate(
        *DRAWN,
        "--prompt",
        MARY,
        "--prompt_file",
        tmp_path / "b.txt",
        "--max_new_tokens",
        6,
        "--json",
    )
    assert (code, err) == (0, "")
    _, model, params = checkpoint
    generator = Generator(model, load_tokenizer("mistral-v1"))
    sampling = Sampling(temperature=0.9, top_k=500, top_p=0.95, max_new_tokens=6, seed=3)
    texts = [MARY, "Baa, baa,\r\nblack sheep\n"]
    want = generator.complete(params, texts, sampling)
    prompts = generator.encode(texts)
    assert prompts[0][0] == generator.tokenizer.bos_id
    for index, (got, expected) in enumerate(zip(lines(out), want, strict=True)):
        assert got["prompt"] == index
        assert got["text"] == expected.text
        assert got["tokens"] == list(expected.tokens)
        assert got["finish_reason"] == expected.finish_reason
        assert got["tokens_read"] == len(prompts[index])
        assert got["prefill_seconds"] > 0 and got["ms_per_token"] > 0
    code, out, _ = generate(*DRAWN, "--prompt", MARY, "--prompt", MARY, "--max_new_tokens", 6)
    first, second = out.split("--- 2 of 2\n")
    assert code == 0 and first == f"--- 1 of 2\n{want[0].text}\n" and second != f"{want[0].text}\n"


def test_one_prompt_streams_and_stops(generate):
    code, out, _ = generate("--prompt", MARY, "--max_new_tokens", 12)
    text = out.removesuffix("\n")
    assert code == 0 and len(text) > 12
    assert generate("--prompt", MARY, "--max_new_tokens", 12, "--stream")[1] == out
    stopped = generate("--prompt", MARY, "--stop", text[5:9], "--stop", "never", "--stream")[1]
    assert stopped == text[: text.index(text[5:9])] + "\n"


def test_the_time_of_a_token_counts_those_after_a_stop_string(generate, monkeypatch):
    """A clock that gains a second whenever it is read: generating takes one, whatever it does."""
    seconds = itertools.count()
    clock = types.SimpleNamespace(perf_counter=lambda: float(next(seconds)))
    monkeypatch.setattr("refine_jax.generate.time", clock)
    prompts = ["--prompt", MARY, "--prompt", "Baa, baa, black sheep", "--json"]
    whole = lines(generate(*prompts, "--max_new_tokens", 20)[1])
    assert [line["ms_per_token"] for line in whole] == [50, 50]
    # Both stop within the first block of 16 tokens, which is decoded whole.
    stops = [each for line in whole for each in ("--stop", line["text"][:3])]
    for line in lines(generate(*prompts, "--max_new_tokens", 20, *stops)[1]):
        assert line["finish_reason"] == "stop" and len(line["tokens"]) < 8
        assert line["ms_per_token"] == 62.5


def test_a_state_is_read_once_and_asked_twice(generate, tmp_path):
    state = tmp_path / "lamb.state"
    questions = ["--prompt", "What was white?", "--prompt", "And its fleece?", *DRAWN]
    options = ["--max_new_tokens", 5, "--json"]
    code, out, err = generate(
        "--prompt", MARY, "--save_state", state, "--max_new_tokens", 0, "--json"
    )
    assert (code, err) == (0, "")
    (read,) = lines(out)
    assert read["tokens"] == [] and read["ms_per_token"] is None
    code, out, _ = generate("--load_state", state, *questions, *options)
    asked = lines(out)
    tokenizer = load_tokenizer("mistral-v1")
    for line, question in zip(asked, (questions[1], questions[3]), strict=True):
        added = len(tokenizer.encode(question, bos=False))
        assert line["tokens_read"] == read["tokens_read"] + added
    assert (
        lines(generate("--load_state", state, *questions, *options)[1])[1]["text"]
        == (asked[1]["text"])
    )
    # Without a question, the document itself is continued.
    continued = generate("--load_state", state, "--max_new_tokens", 5)[1]
    assert continued == generate("--prompt", MARY, "--max_new_tokens", 5)[1]


def test_standard_input_is_the_prompt_in_a_process_of_its_own(generate, checkpoint, monkeypatch):
    want = generate("--prompt", MARY, "--max_new_tokens", 4)[1]
    command = [sys.executable, "-m", "refine_jax.generate", "--checkpoint", checkpoint[0]]
    done = subprocess.run(
        [*command, "--max_new_tokens", "4"], input=MARY.encode(), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout.decode()) == (0, want)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(MARY.encode())))
    assert generate("--prompt_file", "-", "--max_new_tokens", 4)[1] == want


CHAT = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
)


@pytest.fixture(scope="module")
def chat(checkpoint, tmp_path_factory):
    """A checkpoint whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT})
    )
    (folder / "chat_template.jinja").write_text(
        f"{CHAT}{{% if add_generation_prompt %}}answer:{{% endif %}}"
    )
    files = {path.name: path for path in folder.iterdir()} | load_tokenizer("mistral-v1").files
    save_model(
        folder / "model", checkpoint[2], json.dumps(checkpoint[1].config.to_hf()), dict(files)
    )
    return folder / "model"


def test_a_prompt_becomes_the_message_of_a_user(generate, checkpoint, chat, tmp_path):
    _, model, params = checkpoint
    tokenizer = load_tokenizer("mistral-v1")
    texts, plain = [MARY, "</s> Baa\n"], {"bos": False}
    (tmp_path / "baa").write_text(texts[1])
    given = ["--chat", "--checkpoint", chat, "--prompt", MARY, "--prompt_file", tmp_path / "baa"]
    code, out, err = generate(*given, *DRAWN, "--max_new_tokens", 6, "--json")
    assert (code, err) == (0, "")
    ends = [2, *tokenizer.encode("answer:", **plain)]
    prompts = [
        [1, *tokenizer.encode("user: " + MARY, **plain), *ends],
        # A special token in a message is text, which its place is cut out of.
        [
            1,
            *tokenizer.encode("user: <", **plain),
            *tokenizer.encode("\n/s> Baa\n", **plain)[len(tokenizer.encode("\n", **plain)) :],
            *ends,
        ],
    ]
    sampling = Sampling(temperature=0.9, top_k=500, top_p=0.95, max_new_tokens=6, seed=3)
    generator = Generator(model, tokenizer)
    want = generator.generate(params, generator.read(params, prompts), sampling)
    for got, expected, prompt in zip(lines(out), want, prompts, strict=True):
        assert got["tokens"] == list(expected.tokens) and got["text"] == expected.text
        assert got["tokens_read"] == len(prompt)
    # The state after a chat is continued by texts.
    state = tmp_path / "state"
    generate(*given[:5], "--save_state", state, "--max_new_tokens", 0)
    answer = [*DRAWN, "--max_new_tokens", 6]
    continued = generate("--checkpoint", chat, "--load_state", state, *answer)
    assert continued == (0, want[0].text + "\n", "")
    adapted = generate(*given, "--adapt_steps", 1, *answer, "--json", "--adapt_objective", "ntp")
    assert [line["tokens_read"] for line in lines(adapted[1])] == [len(ids) for ids in prompts]


def test_chats_that_cannot_be_end_in_one_message(generate, chat, tmp_path, capsys):
    given = ["--chat", "--prompt", "x"]
    refusing = tmp_path / "tokenizer"
    refusing.mkdir()
    for path in chat.iterdir():
        if path.name.startswith("tokenizer"):
            (refusing / path.name).write_bytes(path.read_bytes())
    (refusing / "chat_template.jinja").write_text("{{ raise_exception('No ' ~ messages[0].role) }}")
    for arguments, message in (
        ([*given, "--tokenizer", "mistral-v1"], "mistral-v1 has no chat template"),
        ([*given, "--tokenizer", "bytes"], "the tokenizer bytes has no chat template"),
        ([*given, "--tokenizer", refusing], "chat_template.jinja refuses the messages: No user."),
    ):
        code, out, err = generate(*arguments)
        assert (code, out) == (1, "") and err.startswith("error: ")
        assert message in err and err.count("\n") == 1
    with pytest.raises(SystemExit):
        generate(*given, "--load_state", tmp_path / "state")
    assert "--chat cannot stand beside --load_state" in capsys.readouterr().err


def test_mistakes_end_in_one_message(generate, checkpoint, tmp_path):
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty").touch()
    (tmp_path / "taken").mkdir()
    bytes_only = tmp_path / "bytes"
    save_model(bytes_only, checkpoint[2], json.dumps(checkpoint[1].config.to_hf()))
    prompt = ["--prompt", "x"]
    for arguments, message in (
        (["--prompt_file", tmp_path / "none"], "No such file"),
        (["--prompt_file", tmp_path / "latin"], "is not UTF-8"),
        (["--prompt_file", tmp_path / "empty"], "is empty"),
        ([*prompt, "--adapt_objective", "ntp"], "--adapt_objective needs --adapt_steps"),
        ([*prompt, "--adapt_steps", -1], "--adapt_steps must be at least 0. Got: -1"),
        ([*prompt, "--temperature", "-1"], "temperature must be"),
        ([*prompt, "--top_k", "3"], "temperature 0"),
        ([*prompt, *prompt, "--stream"], "one prompt"),
        ([*prompt, "--save_state", tmp_path / "taken"], "exists"),
        ([*prompt, "--load_state", tmp_path / "taken"], "not a saved state"),
        ([*prompt, "--tokenizer", "gpt"], "no tokenizer 'gpt'"),
        ([*prompt, "--step", "5", "--checkpoint", tmp_path], "not a checkpoint"),
        ([*prompt, "--checkpoint", bytes_only], "--tokenizer mistral-v1, bytes or a path"),
    ):
        code, out, err = generate(*arguments)
        assert (code, out) == (1, "")
        assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if "state" in path.name]
    assert not np.any(list((tmp_path / "taken").iterdir()))
    with pytest.raises(SystemExit):
        main(["--checkpoint", checkpoint[0], "--json", "--stream"])


def test_each_prompt_is_continued_by_a_copy_trained_on_it(generate, checkpoint):
    _, model, params = checkpoint
    tokenizer = load_tokenizer("mistral-v1")
    adapt = ["--adapt_steps", 2, "--adapt_objective", "ntp", "--adapt_learning_rate", 0.01]
    texts = [MARY, "Baa, baa, black sheep"]
    prompts = [argument for text in texts for argument in ("--prompt", text)]
    code, out, err = generate(*adapt, *prompts, "--max_new_tokens", 6, "--json")
    assert (code, err) == (0, "")

    generator, optimizer = (
        Generator(model, tokenizer),
        optax.chain(clip_by_norm(0.2), optax.adamw(0.01, weight_decay=0.01)),
    )
    sampling = Sampling(max_new_tokens=6)

    @jax.grad
    def gradient(params, rows, last):
        hidden, _ = model.forward(params, rows)
        log_probs = jax.nn.log_softmax(hidden[:, :-1] @ model.head(params).T)
        taken = jnp.take_along_axis(log_probs, rows[:, 1:, None], axis=-1)[0, :, 0]
        return -jnp.sum(jnp.where(jnp.arange(len(taken)) < last, taken, 0)) / last

    @jax.jit
    def update(params, moments, rows, last):
        updates, moments = optimizer.update(gradient(params, rows, last), moments, params)
        return optax.apply_updates(params, updates), moments

    for got, ids in zip(lines(out), generator.encode(texts), strict=True):
        rows = np.zeros((1, 64), np.int32)
        rows[0, : len(ids)] = ids
        trained, moments = params, jax.jit(optimizer.init)(params)
        for _ in range(2):
            trained, moments = update(trained, moments, rows, len(ids) - 1)
        want = generator.generate(trained, generator.read(trained, [ids]), sampling)
        assert got["text"] == want[0].text
        assert got["adapt_tokens"] == 2 * len(ids) and got["adapt_seconds"] > 0
    assert [line["prompt"] for line in lines(out)] == [0, 1]


def test_training_on_a_prompt_and_saved_states_exclude_each_other(generate, tmp_path):
    code, out, err = generate("--prompt", MARY, "--adapt_steps", 1, "--save_state", tmp_path / "s")
    assert (code, out) == (1, "") and "--adapt_steps cannot be used with --save_state" in err
