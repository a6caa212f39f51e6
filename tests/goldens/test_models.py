"""Golden models: outputs of the official PyTorch code.

`$REFINE_GOLDEN` names the folder (default `../shared/golden`). All model folders in it are taken
up by their config.json, whatever they are called.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens import GOLDEN, load_arrays, load_json, model_folders, require, subtree
from tiny import IMPLEMENTATION

from refine_jax.checkpoint.hf import read_hf
from refine_jax.checkpoint.tree import flatten
from refine_jax.config import OptimizerConfig, RefineConfig
from refine_jax.models.config import model_config
from refine_jax.models.head import entropy, log_prob, logits
from refine_jax.models.layout import Layout
from refine_jax.models.transformer import ComputePolicy, Model
from refine_jax.parallel import take_tokens
from refine_jax.refine.grpo import group_advantages, policy_loss
from refine_jax.refine.objective import MiniBatch, Objective
from refine_jax.refine.optimizer import make_optimizer
from refine_jax.refine.reading import read_rows
from refine_jax.refine.rewards import REWARDS
from refine_jax.refine.rollout import Experience, fork_rollouts, score_rollouts, scores_of
from refine_jax.refine.selection import rollout_slots


@functools.cache
def load(folder: str, muon_dtype: str | None = None):
    """(Model, params) of a golden checkpoint."""
    loaded = read_hf(require(folder))
    config = model_config(loaded.config)
    if muon_dtype is not None:
        config = dataclasses.replace(config, muon_dtype=muon_dtype)
    policy = ComputePolicy(implementation=IMPLEMENTATION)
    return Model(config, policy), jax.tree.map(jnp.asarray, loaded.params)


@functools.cache
def slots(folder: str):
    """Where the tensors of a golden checkpoint went."""
    return read_hf(require(folder)).slots


def to_tensors(folder: str, params) -> dict[str, np.ndarray]:
    """Parameters (or their gradients) by the names of the folder."""
    named = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
    tensors = {}
    for name, slot in slots(folder).items():
        whole = named[slot.param] if slot.layer is None else named[slot.param][slot.layer]
        tensors[name] = whole if slot.rows is None else whole[slice(*slot.rows)]
    return tensors


@functools.cache
def muon_dtype(folder: str) -> str | None:
    """Precision of Newton-Schulz that a folder was made with; config.json does not tell.

    meta.json does: evaluating the rest in float64 moves single logits by 0.04 where a bfloat16
    step follows, and by 4e-5 where it does not. Without it, what is nearer decides.
    """
    if not load_json(folder, "config.json").get("use_muon", False):
        return None
    if (GOLDEN / folder / "meta.json").exists():
        noise = load_json(folder, "meta.json")["max_abs_diff_float32_vs_float64"]["logits"]
        return "bfloat16" if noise > 1e-3 else "float32"
    expected = load_arrays(folder, "expected.npz")
    length = max(lengths(expected))
    distance = {}
    for dtype in ("float32", "bfloat16"):
        got = run(*load(folder, dtype), expected[f"L{length}/input_ids"])
        distance[dtype] = np.abs(got["entropy"] - expected[f"L{length}/entropy"]).mean()
    return min(distance, key=distance.get)


def load_exact(folder: str):
    return load(folder, muon_dtype(folder))


def is_rounded(folder: str) -> bool:
    """Whether bfloat16 rounding inside the model amplifies every difference (golden README 10)."""
    return muon_dtype(folder) == "bfloat16"


def is_hybrid(folder: str) -> bool:
    """Whether layers are of several kinds: PyTorch itself computes these less exactly."""
    return model_config(load_json(folder, "config.json")).layer_kinds is not None


def lengths(expected) -> list[int]:
    return sorted({int(name[1:].split("/")[0]) for name in expected if name.startswith("L")})


@functools.partial(jax.jit, static_argnums=0)
def _run(model, params, tokens):
    trunk = read_rows(model, params, {"tokens": tokens}, with_trace=False)
    z = logits(trunk.hidden, model.head(params))
    return {
        "hidden": trunk.hidden,
        "logits": z,
        "entropy": trunk.stats.entropy,
        "entropy of logits": entropy(z),
        "nll": trunk.stats.nll,
    }


def run(model, params, tokens):
    return jax.tree.map(np.asarray, _run(model, params, tokens))


def run_lengths(model, params, rows: dict) -> dict:
    """Outputs for rows {length: tokens [2, length]}.

    Run together, filled up to one length: the models are causal. The shortest, and one in the
    middle, are run at their own length as well, for programs of other shapes.
    """
    longest = max(rows)
    stacked = [np.pad(ids, ((0, 0), (0, longest - n))) for n, ids in rows.items()]
    together = run(model, params, np.concatenate(stacked))
    outputs = []
    for i, n in enumerate(rows):
        outputs.append((n, {name: x[2 * i : 2 * i + 2, :n] for name, x in together.items()}))
    for n in sorted(rows)[: len(rows) - 1 : 3]:
        outputs.append((n, run(model, params, rows[n])))
    return outputs


FOLDERS = model_folders()
if not FOLDERS:
    FOLDERS = [pytest.param(None, marks=pytest.mark.skip(f"no golden models in {GOLDEN}"))]


@pytest.mark.parametrize("folder", FOLDERS)
def test_outputs(folder):
    expected = load_arrays(folder, "expected.npz")
    model, params = load_exact(folder)
    rows = {n: expected[f"L{n}/input_ids"] for n in lengths(expected)}
    for n, got in run_lengths(model, params, rows):
        want = subtree(expected, f"L{n}")
        at = want.get("positions", np.arange(n))
        if n > 1:
            loss = got["nll"][:, :-1].mean()
            tolerance = 1e-2 if is_rounded(folder) else 1e-5
            np.testing.assert_allclose(loss, want["loss"], rtol=0, atol=tolerance)
        if is_rounded(folder):
            differences = np.abs(got["logits"][:, at] - want["logits"])
            assert differences.mean() < 0.02
            first_chunk = at < model.config.lact_chunk_size
            assert differences[:, first_chunk].max() < 2e-4
            continue
        of_logits, of_entropy = (3e-4, 5e-5) if is_hybrid(folder) else (1e-4, 1e-4)
        for name in ("logits", "hidden"):
            close(got[name][:, at], want[name], of_logits, f"{name}, length {n}")
        for name in ("entropy", "entropy of logits"):
            close(got[name], want["entropy"], of_entropy, f"{name}, length {n}")


def close(got, want, atol, what=""):
    got = np.asarray(got).reshape(np.shape(want))
    np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=what)


def relative_l2(got, want) -> float:
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-12)


def assert_gradients(got: dict, want: dict, tolerance: float):
    """Every parameter's gradient, by published name, within a relative L2 distance."""
    assert got.keys() == want.keys()
    errors = {name: relative_l2(np.asarray(got[name]), want[name]) for name in want}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, f"{worst}: relative L2 {errors[worst]:.2e}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_gradients(folder):
    expected = load_arrays(folder, "expected.npz")
    want = subtree(expected, "grad")
    if not want:
        pytest.skip(f"{folder} holds no gradients")
    if is_rounded(folder):
        pytest.skip("gradients through bfloat16 Newton-Schulz are not comparable (golden README)")
    model, params = load_exact(folder)
    longest = max(n for n in lengths(expected) if n <= 77)  # of which the gradient is
    tokens = expected[f"L{longest}/input_ids"]

    def loss(params):
        trunk = read_rows(model, params, {"tokens": tokens}, with_trace=False)
        return trunk.nll_sum / trunk.weights.sum()

    tolerance = 3e-4 if is_hybrid(folder) else 1e-4
    assert_gradients(to_tensors(folder, jax.jit(jax.grad(loss))(params)), want, tolerance)


@functools.partial(jax.jit, static_argnums=0)
def prefill(model, params, prompt, position):
    """Hidden state after `position` tokens of a prompt [1, T], and the decode state there."""
    hidden, trace = model.forward(params, prompt, with_trace=True)
    state = model.fork(params, trace, jnp.full((1, 1), position))
    return hidden[:, position - 1][:, None], state


@functools.partial(jax.jit, static_argnums=0)
def greedy_step(model, params, hidden, state):
    token = jnp.argmax(logits(hidden, model.head(params)), axis=-1).astype(jnp.int32)
    hidden, state = model.extend(params, token[..., None], state)
    return token[0, 0], hidden[:, :, 0], state


@pytest.mark.parametrize("folder", FOLDERS)
def test_greedy_tokens(folder):
    """Prefill, fork at the end, then one token at a time from the carried state."""
    cases = subtree(load_arrays(folder, "expected.npz"), "greedy")
    if not cases:
        pytest.skip(f"{folder} holds no greedy tokens")
    model, params = load_exact(folder)
    prompts = {name: x for name, x in cases.items() if name.startswith("prompt")}
    longest = max(map(len, prompts.values()))
    for name, prompt in prompts.items():
        filled = np.pad(prompt, (0, longest - len(prompt)))[None]
        hidden, state = prefill(model, params, filled, len(prompt))
        want, got = cases[name.replace("prompt", "tokens")].tolist(), []
        state = model.resize(state, longest + len(want))
        for _ in want:
            token, hidden, state = greedy_step(model, params, hidden, state)
            got.append(int(token))
        assert got == want


@functools.partial(jax.jit, static_argnums=0)
def continuation(model, params, row, start, tokens):
    """Log-probabilities of tokens [k] at slot `start` of row [1, T]: directly, and forked."""
    hidden, trace = model.forward(params, row, with_trace=True)
    before = jnp.take(hidden[0], start - 1 + jnp.arange(len(tokens)), axis=0)
    direct = log_prob(logits(before, model.head(params)), tokens)
    starts = jnp.full((1, 1), start)
    forked = score_rollouts(model, params, hidden, trace, starts, tokens[None, None])
    return direct, forked.log_probs[0, 0]


@pytest.mark.parametrize("folder", FOLDERS)
def test_continuations(folder):
    cases = subtree(load_arrays(folder, "expected.npz"), "cont")
    if not cases:
        pytest.skip(f"{folder} holds no continuations")
    model, params = load_exact(folder)
    names = [name for name in cases if name.startswith("prefix")]
    longest = max(len(cases[name]) for name in names) + max(
        len(x) for name, x in cases.items() if name.startswith("tokens")
    )
    for name in names:
        prefix, tokens = cases[name], cases[name.replace("prefix", "tokens")]
        row = np.concatenate([prefix, tokens])
        row = np.pad(row, (0, longest - len(row)))[None]
        want = cases[name.replace("prefix", "logprobs")]
        for got in continuation(model, params, row, len(prefix), tokens):
            close(got, want, 1e-2 if is_rounded(folder) else 2e-4 if is_hybrid(folder) else 1e-4)


@functools.partial(jax.jit, static_argnums=0)
def padded_logits(model, params, row, segments):
    hidden, _ = model.forward(params, row, Layout.from_segments(segments))
    return logits(hidden, model.head(params))


@pytest.mark.parametrize("folder", FOLDERS)
def test_padding_changes_nothing(folder):
    """Padded rows give the unpadded logits, wherever the padding stands.

    The official LaCT lets padding into the fast weights (golden README 11); ours does not.
    """
    if not (GOLDEN / folder / "padding.npz").exists():
        pytest.skip(f"{folder} holds no padding case")
    arrays = load_arrays(folder, "padding.npz")
    model, params = load_exact(folder)
    tokens, pad_id = arrays["input_ids"], int(arrays["pad_id"])
    length = tokens.shape[1]
    pads = [int(name.removeprefix("logits_pad")) for name in arrays if "logits_pad" in name]
    for left in pads:
        width = ((0, 0), (left, max(pads) - left))
        row = np.pad(tokens, width, constant_values=pad_id)
        segments = np.pad(np.ones_like(tokens), width)
        got = padded_logits(model, params, row, segments)[:, left : left + length]
        close(got, arrays["logits_pad0"], 1e-4)


@pytest.mark.parametrize("folder", FOLDERS)
def test_packing_changes_nothing(folder):
    """Texts that share a row, with padding around them, give the logits of each alone."""
    expected = load_arrays(folder, "expected.npz")
    sizes = [n for n in (17, 33, 5, 64) if n in lengths(expected)]
    if len(sizes) < 4 or is_rounded(folder):
        pytest.skip(f"{folder} holds no texts that can be compared")
    model, params = load_exact(folder)
    row, segments, places, at = np.zeros((2, 136), np.int32), np.zeros((2, 136), np.int32), [], 3
    for number, n in enumerate(sizes, 1):
        row[:, at : at + n] = expected[f"L{n}/input_ids"]
        segments[:, at : at + n] = number
        places.append(at)
        at += n + 5 * (number == 2)
    got = packed_logits(model, params, row, segments)
    for n, at in zip(sizes, places, strict=True):
        want = expected[f"L{n}/logits"]
        close(got[:, at : at + n], want, 3e-4 if is_hybrid(folder) else 1e-4, f"length {n}")


@functools.partial(jax.jit, static_argnums=0)
def packed_logits(model, params, row, segments):
    hidden, _ = model.forward(params, row, Layout.from_segments(segments, 4))
    return logits(hidden, model.head(params))


def refine_steps() -> list:
    folder = GOLDEN / "refine_step"
    names = sorted(path.stem for path in folder.glob("*.npz")) if folder.is_dir() else []
    return names or [pytest.param(None, marks=pytest.mark.skip(f"no refine_step in {GOLDEN}"))]


class StepCase:
    """A refine_step file as batch and rollouts, [B, c, ...]."""

    def __init__(self, name: str):
        self.name = name
        self.arrays = load_arrays("refine_step", f"{name}.npz")
        self.model, self.params = load_exact(name)
        self.batch = {"tokens": jnp.asarray(self.arrays["input_ids"])}
        self.rows = len(self.arrays["input_ids"])
        order = np.argsort(self.arrays["sequence"], kind="stable")
        assert (self.arrays["sequence"][order] == self.arrays["sequence"]).all()
        self.starts = self.rollouts("starts")
        self.tokens = self.rollouts("rollouts")
        _, self.c, self.k = self.tokens.shape
        self.config = RefineConfig(num_positions=self.c, rollout_length=self.k)
        self.objective = Objective(self.model, self.config, eos_id=None, max_documents=1)
        self.experience = Experience(
            starts=self.starts,
            valid=jnp.ones(self.starts.shape, bool),
            tokens=self.tokens,
            rewards=self.rollouts("rewards"),
            advantages=self.rollouts("advantages"),
            old_log_probs=self.rollouts("old_log_probs"),
            ref_log_probs=None,
        )
        token_count = jnp.float32(self.batch["tokens"][:, 1:].size)
        self.whole = MiniBatch(token_count, self.config.lambda_rl, self.experience.valid)
        self.observe = jax.jit(self._observe)
        self.gradient = jax.jit(self._gradient)

    def _observe(self, params):
        """What a step sees: entropies, scores, and the true continuations."""
        trunk = self.objective.read(params, self.batch)
        last, state = fork_rollouts(
            self.model, params, trunk.hidden, trunk.trace, self.starts, self.k
        )
        hidden, _ = self.model.extend(params, self.tokens, state)
        collected = scores_of(self.model, params, last, hidden, self.tokens)
        rows, forks = self.model.forward_with_forks(
            params, self.batch["tokens"], None, self.starts, self.tokens
        )
        before = take_tokens(rows, self.starts - 1)
        trained = scores_of(self.model, params, before, forks, self.tokens)
        slots = rollout_slots(self.starts, self.k)
        truth = take_tokens(self.batch["tokens"], slots)
        true_hidden = take_tokens(trunk.hidden, slots)
        return trunk.stats.entropy, (trained, collected), truth, true_hidden

    def _gradient(self, params):
        return self.objective.gradient(params, self.batch, self.whole, experience=self.experience)

    def rollouts(self, name: str):
        array = self.arrays[name]
        return jnp.asarray(array.reshape(self.rows, -1, *array.shape[1:]))


@pytest.fixture(scope="module", params=refine_steps())
def step_case(request):
    return StepCase(request.param)


def test_refine_step_collection(step_case):
    """Entropies, log-probabilities, compared states, rewards and advantages, by fork."""
    case, arrays = step_case, step_case.arrays
    entropies, both, truth, true_hidden = case.observe(case.params)
    close(entropies, arrays["entropy"], 1e-4)
    for scores in both:
        close(scores.log_probs, arrays["old_log_probs"], 1e-4)
        close(scores.hidden, arrays["rollout_hidden"], 1e-4)
    close(true_hidden, arrays["ground_truth_hidden"], 1e-4)
    np.testing.assert_array_equal(np.asarray(truth).reshape(-1, case.k), arrays["ground_truth_ids"])
    compared = scores.hidden, true_hidden, case.tokens, truth

    @jax.jit
    def judged(*compared):
        cosine, binary = (REWARDS[name](*compared) for name in ("cosine", "binary"))
        return cosine, binary, group_advantages(cosine.mean(-1)[..., None], True)

    cosine, binary, advantages = jax.device_get(judged(*compared))
    close(cosine, arrays["cosine_per_token"], 1e-5)
    close(cosine.mean(-1), arrays["rewards"], 1e-5)
    close(binary.mean(-1), arrays["binary_rewards"], 1e-5)
    close(np.repeat(advantages, case.k, axis=-1), arrays["advantages"], 1e-4)


def test_refine_step_update(step_case):
    """Losses, gradients, and the parameters after one step of SGD and of AdamW."""
    case, arrays = step_case, step_case.arrays
    gradient, metrics = case.gradient(case.params)
    close(metrics["loss/policy"], arrays["pg_loss"], 1e-5)
    close(metrics["loss/ntp"], arrays["ntp_loss"], 1e-5)
    close(metrics["loss/total"], arrays["total_loss"], 1e-5)
    norm = np.linalg.norm([np.linalg.norm(x) for x in jax.tree.leaves(gradient)])
    close(norm, arrays["grad_norm"], 1e-5 * arrays["grad_norm"])
    gradients = to_tensors(case.name, gradient)
    assert_gradients(gradients, subtree(arrays, "grad"), 1e-4)

    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), steps=1)

    @jax.jit
    def updated(params, gradient):
        """Parameters after SGD and after AdamW."""
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        after_sgd = jax.tree.map(lambda w, g: w - 0.1 * g, params, gradient)
        return after_sgd, optax.apply_updates(params, updates)

    after_sgd, after_adamw = updated(case.params, gradient)
    sgd, want = to_tensors(case.name, after_sgd), subtree(arrays, "sgd")
    for name, value in want.items():
        close(sgd[name], value, 2e-5)

    adamw = to_tensors(case.name, after_adamw)
    scale = min(1.0, 0.2 / (float(arrays["grad_norm"]) + 1e-6))
    for name, value in subtree(arrays, "adamw").items():
        # Adam's first step is lr * sign(g): where g is at rounding level its sign is not defined.
        defined = np.abs(arrays[f"grad/{name}"]) * scale > 1e-6
        close(np.asarray(adamw[name])[defined], value[defined], 1e-5)
        close(adamw[name], value, 2e-3)

    want = subtree(arrays, "after_sgd")
    _, (scores, _), _, _ = case.observe(after_sgd)
    close(scores.log_probs, want["log_probs"], 1e-4)
    _, metrics = case.gradient(after_sgd)
    close(metrics["loss/policy"], want["pg_loss"], 1e-5)
    close(metrics["loss/ntp"], want["ntp_loss"], 2e-5)
    close(metrics["policy/clip_fraction"], want["clipfrac"], 1e-5)
    close(metrics["policy/ppo_kl"], want["ppo_kl"], 1e-5)

    def policy(log_probs):
        old, advantages = arrays["old_log_probs"], arrays["advantages"]
        return policy_loss(log_probs, old, advantages, jnp.ones_like(log_probs))[0]

    close(
        jax.jit(jax.grad(policy))(scores.log_probs.reshape(-1, case.k)), want["grad_log_prob"], 1e-5
    )
