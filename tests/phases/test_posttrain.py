"""Post-training: losses on answers against plain references, nested steps, GRPO, whole runs."""

import dataclasses
import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import scaled, tiny
from tiny_runs import comparable, tiny_run

from refine_jax.config import Config, RefineConfig
from refine_jax.main import execute
from refine_jax.models.layout import Layout
from refine_jax.phases import posttrain
from refine_jax.refine.answers import (
    AnswerMethod,
    answer_nll,
    answer_slots,
    make_policy_step,
    make_supervised_step,
    prompts_of,
)
from refine_jax.refine.step import TrainState
from refine_jax.report.held_out import read_held_out
from refine_jax.report.metrics import read_metrics
from refine_jax.report.monitor import Monitor

pytestmark = pytest.mark.usefixtures("compile_once")

EOS, PAD, WIDTH = 1, 52, 5  # WIDTH: A, most tokens of an answer
EARLIER = slice(6, 8)  # of row 1: the answer of an earlier turn
LENGTHS = ((15, 5), (17, 3), (13, 4), (0, 0))  # of prompts and answers; the last row is padding


def rows() -> dict[str, np.ndarray]:
    """Four rows of 24 slots; each answer ends with EOS. Row 1 has an earlier answer."""
    random = np.random.default_rng(0)
    batch = {
        "tokens": np.full((4, 24), PAD, np.int32),
        "segments": np.zeros((4, 24), np.int32),
        "answer_mask": np.zeros((4, 24), np.int32),
    }
    for row, (prompt, answer) in enumerate(LENGTHS):
        end = prompt + answer
        batch["tokens"][row, :end] = random.integers(2, 50, end)
        batch["segments"][row, :end] = 1
        batch["answer_mask"][row, prompt:end] = 1
        batch["tokens"][row, end - 1 : end] = EOS
    batch["answer_mask"][1, EARLIER] = 2
    return batch


@functools.cache
def method(name: str) -> AnswerMethod:
    options = {"max_answer_tokens": WIDTH, "eos_id": EOS, "pad_id": PAD}
    return AnswerMethod(tiny(name)[0], RefineConfig(), **options)


def log_softmax(hidden, head):
    return jax.nn.log_softmax(hidden.astype(jnp.float32) @ head.T)


def plain_loss(model, params, batch):
    """(loss summed over answer tokens, how many, how many are the likeliest): rows on their own.

    What fills a row comes after its text.
    """
    total, count, right = 0.0, 0, 0
    hidden, _ = model.forward(params, batch["tokens"][:3])
    for row in range(3):
        z, ids = log_softmax(hidden[row], model.head(params)), batch["tokens"][row]
        for slot in np.flatnonzero(rows()["answer_mask"][row]):
            total -= z[slot - 1, ids[slot]]
            right += jnp.argmax(z[slot - 1]) == ids[slot]
            count += 1
    return total, (count, right)


@pytest.mark.parametrize("name", ["lact", "deltanet"])
def test_the_answer_loss_is_that_of_rows_run_alone(name):
    model, params = tiny(name)
    nll_sum, stats, slots = jax.jit(method(name).nll)(params, rows())
    expected, (count, right) = jax.jit(functools.partial(plain_loss, model))(params, rows())
    assert float(nll_sum) == pytest.approx(float(expected), rel=1e-5)
    assert float(slots.weights.sum()) == count == 14
    assert float((stats.correct * slots.weights).sum()) == right


def test_gradients_are_zero_but_where_tokens_of_answers_are_predicted():
    random = np.random.default_rng(1)
    batch = rows()
    hidden = jnp.asarray(random.standard_normal((4, 24, 8)), jnp.float32)
    head = jnp.asarray(random.standard_normal((53, 8)), jnp.float32)

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(hidden, tokens):
        slots = answer_slots(batch | {"tokens": tokens}, WIDTH)
        return answer_nll(hidden, head, slots)[0]

    # Of softmax cross entropy with respect to logits: p - onehot at predictors, 0 elsewhere.
    logits_gradient = np.zeros((4, 24, 53), np.float64)
    total = 0.0
    for row in range(len(LENGTHS)):
        for slot in np.flatnonzero(batch["answer_mask"][row]) - 1:
            z = np.asarray(head, np.float64) @ np.asarray(hidden[row, slot], np.float64)
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            target = batch["tokens"][row, slot + 1]
            total -= np.log(p[target])
            logits_gradient[row, slot] = p
            logits_gradient[row, slot, target] -= 1
    value, gradient = loss_and_gradient(hidden, batch["tokens"])
    assert float(value) == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(gradient, logits_gradient @ np.asarray(head), atol=1e-5)
    elsewhere = np.roll(batch["answer_mask"], -1, axis=1) == 0
    assert np.all(np.asarray(gradient)[elsewhere] == 0)
    # Other tokens of the prompts as labels: not a bit changes.
    other = np.where(batch["answer_mask"] != 0, batch["tokens"], 7)
    again, same = loss_and_gradient(hidden, other)
    assert value == again
    np.testing.assert_array_equal(gradient, same)


def test_prompts_are_the_rows_without_their_answers():
    batch = rows()
    prompts = prompts_of(batch, PAD)
    for row, (prompt, _) in enumerate(LENGTHS):
        assert prompts["segments"][row].tolist() == [1] * prompt + [0] * (24 - prompt)
        expected = [*batch["tokens"][row, :prompt], *[PAD] * (24 - prompt)]
        assert prompts["tokens"][row].tolist() == expected


def state_of(params, optimizer):
    copy = scaled(params, 1)  # a step gives the buffers of its state away
    return TrainState.create(copy, optimizer, jax.random.key(5), RefineConfig())


def assert_close(left, right, atol):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def test_a_supervised_step_is_one_update_by_the_mean_over_answer_tokens():
    model, params = tiny("deltanet")
    optimizer = optax.sgd(0.1)
    step = make_supervised_step(method("deltanet"), optimizer, mini_batch=4, micro_batch=2)
    state, metrics = step(state_of(params, optimizer), jax.tree.map(jnp.asarray, rows()))

    def mean(params):
        total, (count, _) = plain_loss(model, params, rows())
        return total / count

    loss, gradient = jax.jit(jax.value_and_grad(mean))(params)
    assert float(metrics["answer/loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert_close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), 2e-6)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
    assert float(metrics["grad/norm"]) == pytest.approx(norm, rel=1e-4)
    assert int(state.step) == 0  # it belongs to the training step of the prompts


SAMPLES = 3


@functools.cache
def plain_policy():
    """Policy loss at ratio 1, its gradient, and what it comes from, of sampled answers.

    Each prompt with its answer is run as one row. Gives ((loss, (log probabilities [B, n, A],
    log softmax [B, n, A, V])), gradient) from (params, batch, tokens [B, n, A], weights [B, n, A]).
    """
    model, _ = tiny("deltanet")

    def loss(params, batch, answers, weights):
        prompts = prompts_of(batch, PAD)
        widen = functools.partial(jnp.pad, pad_width=((0, 0), (0, WIDTH)))
        tokens, segments = (
            jnp.repeat(widen(prompts[name]), SAMPLES, axis=0) for name in ("tokens", "segments")
        )
        ends = np.repeat([max(prompt, 1) for prompt, _ in LENGTHS], SAMPLES)
        for index, end in enumerate(ends):
            tokens = tokens.at[index, end : end + WIDTH].set(answers.reshape(-1, WIDTH)[index])
            segments = segments.at[index, end : end + WIDTH].set(1)
        hidden, _ = model.forward(params, tokens, Layout.from_segments(segments))
        z = log_softmax(hidden, model.head(params))
        slots = ends[:, None] + np.arange(WIDTH)
        index = np.arange(len(ends))[:, None]
        chosen = z[index, slots - 1, tokens[index, slots]].reshape(answers.shape)
        value = -jnp.sum(jnp.where(weights != 0, chosen * weights, 0.0))
        return value, (chosen, z[index, slots - 1].reshape(*answers.shape, -1))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_grpo_on_sampled_answers():
    """Its log probabilities, mask and first gradient; nothing to learn from equal rewards."""
    _, params = tiny("deltanet")
    batch = jax.tree.map(jnp.asarray, rows())
    keys = jax.random.split(jax.random.key(3), 4)
    ours = method("deltanet")
    # Nearly uniform, so that answers end early now and then.
    flat = params | {"lm_head": {"weight": params["lm_head"]["weight"] * 0.2}}
    sample = jax.jit(functools.partial(ours.sample, samples=SAMPLES, temperature=1.0))
    answers = sample(flat, batch, keys)
    while np.all(np.asarray(answers.mask[:3]).sum(-1) == WIDTH):
        keys = jax.vmap(lambda key: jax.random.split(key)[0])(keys)
        answers = sample(flat, batch, keys)
    for tokens, mask in zip(
        np.asarray(answers.tokens).reshape(-1, WIDTH),
        np.asarray(answers.mask).reshape(-1, WIDTH),
        strict=True,
    ):
        length = tokens.tolist().index(EOS) + 1 if EOS in tokens else WIDTH
        assert mask.tolist() in ([1.0] * length + [0.0] * (WIDTH - length), [0.0] * WIDTH)
    assert np.all(np.asarray(answers.mask).any(-1) == [[True]] * 3 + [[False]])

    rewards = np.array([[1, 0, 0], [0.5, 1, 0], [1, 1, 0], [9, 0, 0]], np.float32)
    advantages = np.asarray(ours.advantages(rewards, answers))
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    by_hand = centred / (np.std(rewards, axis=1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(advantages[:3], by_hand[:3], atol=1e-5)
    assert np.all(advantages[3] == 0)
    (_, (expected, _)), _ = plain_policy()(flat, batch, answers.tokens, answers.mask)
    difference = np.abs(np.asarray(expected - answers.old_log_probs))
    assert np.max(difference * np.asarray(answers.mask)) < 1e-4

    optimizer = optax.sgd(0.1)
    step = make_policy_step(
        ours, optimizer, samples=SAMPLES, temperature=1.0, mini_batch=4, micro_batch=4
    )
    seen = []

    def after(rewards):
        def judge(tokens, mask):
            seen.append((tokens, mask))
            return rewards

        return step(state_of(flat, optimizer), batch, 7, judge)

    state, metrics = after(rewards)
    tokens, mask = seen[0]
    (_, _), gradient = plain_policy()(
        flat, batch, tokens, advantages[..., None] * mask / mask.sum()
    )
    assert_close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, flat, gradient), 2e-6)
    assert metrics["answer/score"] == pytest.approx(rewards[:3].mean())
    assert metrics["answer/length"] == pytest.approx(mask[:3].sum(-1).mean())
    # Nothing is learnt from equal rewards; the same step draws the same answers.
    state, metrics = after(np.ones((4, SAMPLES)))
    assert_close(state.params, flat, 0)
    np.testing.assert_array_equal(seen[1][0], tokens)


def test_greedy_answers_are_the_likeliest_tokens():
    _, params = tiny("deltanet")
    batch = jax.tree.map(jnp.asarray, rows())
    tokens, mask = jax.jit(method("deltanet").answer)(params, batch)
    repeated = jnp.repeat(tokens[:, None], SAMPLES, axis=1)
    (_, (_, z)), _ = plain_policy()(params, batch, repeated, np.zeros((4, SAMPLES, WIDTH)))
    likeliest = np.asarray(z[:3, 0].argmax(-1))
    np.testing.assert_array_equal(np.asarray(tokens[:3]), likeliest)
    assert np.all(np.asarray(mask[:3, 0]) == 1) and np.all(np.asarray(mask[3]) == 0)


STEPS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    records = [
        {"prompt": f"The code is {i}{i}. " * 5 + "The code is ", "answers": [f"{i}{i}", "none"]}
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def small(source, **sections):
    """A run on rows of 112 tokens."""
    changes = {
        "data": {"source": str(source), "sequence_length": 112, "holdout": 0.2},
        "prompts": {"answer_field": "answers", "max_answer_tokens": 6, "target": "random"},
        "refine": {"reward": "hybrid"},
        "posttrain": {"samples": 2},
        "train": {
            "steps": STEPS,
            "batch_size": 4,
            "mini_batch_size": 2,
            "eval_every": 2,
            "eval_batches": 2,
            "checkpoint_every": 2,
            "log_every": 0,
        },
    }
    return tiny_run("posttrain", changes, sections)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """(folder, figures) of a nested run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, posttrain.run(Config.from_dict(small(source)), workdir)


def restored(config, workdir):
    loop = posttrain.PosttrainLoop(posttrain.prepare(config, workdir), workdir)
    with loop.open_checkpoints() as manager:
        return manager.restore(STEPS, jax.eval_shape(loop.initial_state)).state


def test_a_nested_run_learns_and_reports(whole, source):
    workdir, figures = whole
    assert figures["validation_loss_after"] < figures["validation_loss_before"] - 0.2
    assert figures["posttrain_steps"] == STEPS and figures["skipped_updates"] == 0
    assert {"validation_exact_after", "validation_score_after"} <= figures.keys()
    assert json.loads((workdir / "results.json").read_text()) == figures
    records = read_metrics(workdir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    names = {"loss/ntp", "loss/policy", "reward/mean", "grad/norm", "answer/loss"}
    names |= {"answer/accuracy", "answer/grad_norm", "learning_rate", "time/answers"}
    assert all(names <= record.keys() for record in records[1:])
    for line in (workdir / "answers.jsonl").read_text(encoding="utf-8").splitlines():
        shown = json.loads(line)
        assert shown["prompt_end"].endswith("The code is ") and len(shown["answers"]) == 2
        line = shown["response"].split("\n")[0]
        assert shown["score"] == any(answer in line for answer in shown["answers"])
    page = (workdir / "report.html").read_text(encoding="utf-8")
    for label in ("Score of greedy answers", "Loss on prompts", "The method in this text"):
        assert label in page
    last = read_held_out(workdir / "held_out.jsonl")[-1]["rows"]
    assert sum(last["score"]) / sum(last["real"]) == pytest.approx(records[-1]["eval/score"])
    prompt_loss = sum(last["nll"]) / sum(last["tokens"])
    assert prompt_loss == pytest.approx(records[-1]["eval/prompt_loss"], rel=1e-5)
    # 2 updates on the prompts and 1 on the answers a step.
    state = restored(Config.from_dict(small(source)), workdir)
    counts = [x for x in jax.tree.leaves(state.opt_state) if jnp.issubdtype(x.dtype, jnp.integer)]
    assert counts and all(int(count) == 3 * STEPS for count in counts)


def test_an_interrupted_run_continues_bit_for_bit(whole, source, tmp_path, monkeypatch):
    config = Config.from_dict(small(source))
    record = Monitor.record

    def interrupt(self, step, metrics):
        record(self, step, metrics)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "record", interrupt)
        assert posttrain.run(config, tmp_path) == {"interrupted": "SIGTERM", "step": 3}
    posttrain.run(config, tmp_path)
    assert comparable(tmp_path) == comparable(whole[0])
    held_out = [(folder / "held_out.jsonl").read_bytes() for folder in (tmp_path, whole[0])]
    assert held_out[0] == held_out[1]
    pair = [restored(config, folder) for folder in (tmp_path, whole[0])]
    pair = [dataclasses.replace(x, key=jax.random.key_data(x.key)) for x in pair]
    assert_close(*pair, 0)


def test_a_nested_step_trains_on_prompts_and_then_on_answers(source, tmp_path):
    parts = posttrain.prepare(Config.from_dict(small(source)), tmp_path)
    loop = posttrain.PosttrainLoop(parts, tmp_path)
    batch = next(iter(loop.parts.training))
    start = loop.initial_state()
    copy = jax.tree.map(jnp.copy, start)  # a step gives the buffers of its state away
    got, metrics = loop.train_step(0, copy, dict(batch))
    rows = {name: x for name, x in batch.items() if name != "example"}
    prompts = {"tokens": rows["tokens"].copy(), "segments": rows["segments"].copy()}
    for row, mask in enumerate(rows["answer_mask"]):
        prompts["tokens"][row, mask == 1] = loop.parts.tokenizer.pad_id
        prompts["segments"][row, mask == 1] = 0
    state, on_prompts = loop.prompt_step(start, jax.tree.map(jnp.asarray, prompts))
    expected, on_answers = loop.supervised_step(state, jax.tree.map(jnp.asarray, rows))
    assert_close(got.params, expected.params, 0)
    assert int(got.step) == int(expected.step) == 1
    assert float(metrics["loss/total"]) == float(on_prompts["loss/total"])
    assert float(metrics["grad/norm"]) == float(on_prompts["grad/norm"])
    assert float(metrics["answer/grad_norm"]) == float(on_answers["grad/norm"])


def test_grpo_is_rewarded_by_the_score_of_the_task(source, tmp_path):
    sections = {"posttrain": {"nested": False, "answers": "grpo"}, "train": {"steps": 2}}
    sections["train"] |= {"best_metric": "score"}
    assert execute(small(source, **sections), str(tmp_path / "run")) == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for record in records[1:]:
        assert 0 <= record["answer/score"] <= 1 and 1 <= record["answer/length"] <= 6
        assert "loss/ntp" not in record and "answer/policy_loss" in record
    parts = posttrain.prepare(Config.from_dict(small(source)), tmp_path / "other")
    loop = posttrain.PosttrainLoop(parts, tmp_path / "other")
    texts = ["77", "7\n77", " none"]
    tokens = np.full((2, 3, 6), 257, np.int32)
    for index, text in enumerate(texts):
        tokens[:, index, : len(text)] = list(text.encode())
    scores = loop.rewards(np.array([7, -1]), tokens, np.ones_like(tokens, np.float32))
    assert scores.tolist() == [[1, 0, 1], [0, 0, 0]]


BAD_INPUT = {
    "metric": ({"posttrain": {"metric": "ruler_qa_refin"}}, "Did you mean 'ruler_qa_refine'?"),
    "source": ({"data": {"source": "stdlib"}}, "has no prompts"),
    "missing": ({"data": {"source": "/no/such/prompts.jsonl"}}, "/no/such/prompts.jsonl"),
    "field": ({"prompts": {"prompt_field": "question"}}, "set prompts.prompt_field"),
    "messages": ({"prompts": {"messages_field": "chat"}}, "bytes has no chat template"),
    "epochs": ({"data": {"epochs": 1}, "train": {"steps": 100}}, "epochs=1"),
    "packed": ({"data": {"pack": True}}, "config.data.pack is for documents"),
    "answers": ({"prompts": {"max_answer_tokens": 100}}, "must hold 44 tokens of a prompt"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message_and_nothing_is_written(case, source, tmp_path, capsys):
    changes, words = BAD_INPUT[case]
    assert execute(small(source, **changes), str(tmp_path / "run")) == 1
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and words in output.err
    assert output.err.count("\n") == 1 and not output.out
    assert not list(tmp_path.iterdir())
