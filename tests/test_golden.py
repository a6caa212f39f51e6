"""Everything in the golden folder: outputs of the official PyTorch code.

`$REFINE_GOLDEN` names the folder (default `../shared/golden`). All model folders in it are taken
up by their config.json, whatever they are called; `ops` and `refine_rl` are in files of their own
and imported here, so that this file covers the folder.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_ops import *  # noqa: F403
from golden_refine_rl import *  # noqa: F403
from goldens import GOLDEN, load_arrays, load_json, model_folders, require, subtree

from refine_jax.checkpoint.hf import published_slots, read_hf
from refine_jax.checkpoint.tree import flatten
from refine_jax.config import OptimizerConfig, RefineConfig
from refine_jax.models.config import model_config
from refine_jax.models.head import entropy, log_prob, logits
from refine_jax.models.layout import Layout
from refine_jax.models.transformer import Model
from refine_jax.refine.grpo import group_advantages, policy_loss
from refine_jax.refine.optimizer import make_optimizer
from refine_jax.refine.rewards import REWARDS
from refine_jax.refine.rollout import score_rollouts, take_slots
from refine_jax.refine.selection import rollout_slots
from refine_jax.refine.step import Experience, Method, run_trunk


@functools.cache
def load(folder: str, muon_dtype: str | None = None):
    """(Model, params) of a golden checkpoint."""
    loaded = read_hf(require(folder))
    config = model_config(loaded.config)
    if muon_dtype is not None:
        config = dataclasses.replace(config, muon_dtype=muon_dtype)
    return Model(config), jax.tree.map(jnp.asarray, loaded.params)


def to_tensors(params) -> dict[str, np.ndarray]:
    """Parameters (or their gradients) by published name."""
    named = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
    slots = published_slots({name: leaf.shape for name, leaf in named.items()})
    return {
        name: named[slot.param][... if slot.layer is None else slot.layer]
        for name, slot in slots.items()
    }


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


def lengths(expected) -> list[int]:
    return sorted({int(name[1:].split("/")[0]) for name in expected if name.startswith("L")})


@functools.partial(jax.jit, static_argnums=0)
def _run(model, params, tokens):
    trunk = run_trunk(model, params, {"tokens": tokens}, with_trace=False)
    z = logits(trunk.hidden, model.head(params))
    loss = trunk.nll_sum / trunk.weights.sum()
    blockwise = trunk.stats.entropy
    return {
        "hidden": trunk.hidden,
        "logits": z,
        "entropy": blockwise,
        "entropy_of_logits": entropy(z),
        "loss": loss,
    }


def run(model, params, tokens):
    return jax.tree.map(np.asarray, _run(model, params, tokens))


FOLDERS = model_folders()
if not FOLDERS:
    FOLDERS = [pytest.param(None, marks=pytest.mark.skip(f"no golden models in {GOLDEN}"))]


@pytest.mark.parametrize("folder", FOLDERS)
def test_outputs(folder):
    expected = load_arrays(folder, "expected.npz")
    model, params = load_exact(folder)
    for n in lengths(expected):
        want = subtree(expected, f"L{n}")
        got = run(model, params, want["input_ids"])
        at = want.get("positions", np.arange(n))
        if n > 1:
            np.testing.assert_allclose(
                got["loss"], want["loss"], rtol=0, atol=1e-2 if is_rounded(folder) else 1e-5
            )
        if is_rounded(folder):
            differences = np.abs(got["logits"][:, at] - want["logits"])
            assert differences.mean() < 0.02
            first_chunk = at < model.config.lact_chunk_size
            assert differences[:, first_chunk].max() < 2e-4
            continue
        for name, value in (
            ("logits", got["logits"][:, at]),
            ("hidden", got["hidden"][:, at]),
            ("entropy", got["entropy"]),
            ("entropy", got["entropy_of_logits"]),
        ):
            np.testing.assert_allclose(
                value, want[name], rtol=0, atol=1e-4, err_msg=f"{name}, length {n}"
            )


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
    tokens = expected[f"L{max(lengths(expected))}/input_ids"]

    @jax.jit
    def loss(params):
        trunk = run_trunk(model, params, {"tokens": tokens}, with_trace=False)
        return trunk.nll_sum / trunk.weights.sum()

    assert_gradients(to_tensors(jax.grad(loss)(params)), want, 1e-4)


@functools.partial(jax.jit, static_argnums=0)
def prefill(model, params, prompt):
    """Hidden state after a prompt [T] and the decode state behind it."""
    hidden, trace = model.forward(params, prompt[None], with_trace=True)
    return hidden[:, -1:], model.fork(params, trace, jnp.full((1, 1), len(prompt)))


@pytest.mark.parametrize("folder", FOLDERS)
def test_greedy_tokens(folder):
    """Prefill, fork at the end, then one token at a time from the carried state."""
    expected = load_arrays(folder, "expected.npz")
    cases = subtree(expected, "greedy")
    if not cases:
        pytest.skip(f"{folder} holds no greedy tokens")
    model, params = load_exact(folder)
    head = model.head(params)
    extend = jax.jit(model.extend)
    for j in itertools.count():
        if f"prompt{j}" not in cases:
            break
        hidden, state = prefill(model, params, jnp.asarray(cases[f"prompt{j}"]))
        got = []
        for _ in cases[f"tokens{j}"]:
            token = jnp.argmax(logits(hidden, head)[:, -1], axis=-1).astype(jnp.int32)
            got.append(int(token[0]))
            hidden, state = extend(params, token[:, None, None], state)
            hidden = hidden[:, 0]
        assert got == cases[f"tokens{j}"].tolist()


@pytest.mark.parametrize("folder", FOLDERS)
def test_continuations(folder):
    """Log-probabilities of a continuation: forked from the prefix, and in one forward pass."""
    cases = subtree(load_arrays(folder, "expected.npz"), "cont")
    if not cases:
        pytest.skip(f"{folder} holds no continuations")
    model, params = load_exact(folder)
    head = model.head(params)
    atol = 1e-2 if is_rounded(folder) else 1e-4
    for name in sorted(cases):
        if not name.startswith("prefix"):
            continue
        prefix, tokens = cases[name], cases[name.replace("prefix", "tokens")]
        want = cases[name.replace("prefix", "logprobs")]
        p, k = len(prefix), len(tokens)
        whole = jnp.concatenate([prefix, tokens])[None]
        hidden, trace = model.forward(params, whole, with_trace=True)
        direct = log_prob(logits(hidden[:, p - 1 : -1], head), whole[:, p:])
        np.testing.assert_allclose(direct[0], want, rtol=0, atol=atol)
        starts = jnp.full((1, 1), p)
        forked = score_rollouts(
            model, params, hidden, trace, starts, jnp.asarray(tokens[None, None])
        )
        np.testing.assert_allclose(forked.log_probs.reshape(k), want, rtol=0, atol=atol)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(folder, side):
    """Padded rows give the unpadded logits.

    The official LaCT lets padding into the fast weights (golden README 11); ours does not.
    """
    if not (GOLDEN / folder / "padding.npz").exists():
        pytest.skip(f"{folder} holds no padding case")
    arrays = load_arrays(folder, "padding.npz")
    model, params = load_exact(folder)
    tokens, pad_id = arrays["input_ids"], int(arrays["pad_id"])
    pads = sorted(int(name.removeprefix("logits_pad")) for name in arrays if "logits_pad" in name)
    for pad in pads:
        width = ((0, 0), (pad, 0) if side == "left" else (0, pad))
        row = np.pad(tokens, width, constant_values=pad_id)
        layout = Layout.from_segments(np.pad(np.ones_like(tokens), width))
        hidden, _ = model.forward(params, row, layout)
        real = hidden[:, pad:] if side == "left" else hidden[:, : tokens.shape[1]]
        got = logits(real, model.head(params))
        np.testing.assert_allclose(got, arrays["logits_pad0"], rtol=0, atol=1e-4)


def refine_steps() -> list:
    folder = GOLDEN / "refine_step"
    names = sorted(path.stem for path in folder.glob("*.npz")) if folder.is_dir() else []
    return names or [pytest.param(None, marks=pytest.mark.skip(f"no refine_step in {GOLDEN}"))]


class StepCase:
    """A refine_step file as batch and rollouts, [B, c, ...]."""

    def __init__(self, name: str):
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
        self.method = Method(self.model, self.config, eos_id=None, max_documents=1)
        self.experience = Experience(
            starts=self.starts,
            valid=jnp.ones(self.starts.shape, bool),
            tokens=self.tokens,
            rewards=self.rollouts("rewards"),
            advantages=self.rollouts("advantages")[..., 0],
            old_log_probs=self.rollouts("old_log_probs"),
            ref_log_probs=None,
        )
        self.token_count = jnp.float32(self.batch["tokens"][:, 1:].size)

    def rollouts(self, name: str):
        array = self.arrays[name]
        return jnp.asarray(array.reshape(self.rows, -1, *array.shape[1:]))

    def loss(self, params):
        return self.method.loss(params, self.batch, self.experience, token_count=self.token_count)


@pytest.fixture(scope="module", params=refine_steps())
def step_case(request):
    return StepCase(request.param)


def close(got, want, atol):
    np.testing.assert_allclose(np.asarray(got).reshape(np.shape(want)), want, rtol=0, atol=atol)


def test_refine_step_collection(step_case):
    """Entropies, log-probabilities, compared states, rewards and advantages, by fork."""
    case, arrays = step_case, step_case.arrays
    trunk = case.method.trunk(case.params, case.batch)
    scores = case.method.score(case.params, trunk, case.starts, case.tokens)
    slots = rollout_slots(case.starts, case.k)
    truth = take_slots(case.batch["tokens"], slots)
    true_hidden = take_slots(trunk.hidden, slots)
    close(trunk.stats.entropy, arrays["entropy"], 1e-4)
    close(scores.log_probs, arrays["old_log_probs"], 1e-4)
    close(scores.hidden, arrays["rollout_hidden"], 1e-4)
    close(true_hidden, arrays["ground_truth_hidden"], 1e-4)
    np.testing.assert_array_equal(np.asarray(truth).reshape(-1, case.k), arrays["ground_truth_ids"])
    compared = scores.hidden, true_hidden, case.tokens, truth
    cosine = REWARDS["cosine"](*compared)
    close(cosine, arrays["cosine_per_token"], 1e-5)
    close(cosine.mean(-1), arrays["rewards"], 1e-5)
    close(REWARDS["binary"](*compared).mean(-1), arrays["binary_rewards"], 1e-5)
    advantages = group_advantages(cosine.mean(-1)[..., None], True)
    close(jnp.repeat(advantages, case.k, axis=-1), arrays["advantages"], 1e-4)


def test_refine_step_update(step_case):
    """Losses, gradients, and the parameters after one step of SGD and of AdamW."""
    case, arrays = step_case, step_case.arrays
    gradient, metrics = jax.jit(jax.grad(case.loss, has_aux=True))(case.params)
    close(metrics["loss/policy"], arrays["pg_loss"], 1e-5)
    close(metrics["loss/ntp"], arrays["ntp_loss"], 1e-5)
    close(metrics["loss/total"], arrays["total_loss"], 1e-5)
    close(optax.global_norm(gradient), arrays["grad_norm"], 1e-5 * arrays["grad_norm"])
    gradients = to_tensors(gradient)
    assert_gradients(gradients, subtree(arrays, "grad"), 1e-4)

    after_sgd = jax.tree.map(lambda w, g: w - 0.1 * g, case.params, gradient)
    sgd, want = to_tensors(after_sgd), subtree(arrays, "sgd")
    for name, value in want.items():
        close(sgd[name], value, 2e-5)

    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), steps=1)
    updates, _ = optimizer.update(gradient, optimizer.init(case.params), case.params)
    adamw = to_tensors(optax.apply_updates(case.params, updates))
    scale = min(1.0, 0.2 / (float(arrays["grad_norm"]) + 1e-6))
    for name, value in subtree(arrays, "adamw").items():
        # Adam's first step is lr * sign(g): where g is at rounding level its sign is not defined.
        defined = np.abs(arrays[f"grad/{name}"]) * scale > 1e-6
        close(np.asarray(adamw[name])[defined], value[defined], 1e-5)
        close(adamw[name], value, 2e-3)

    want = subtree(arrays, "after_sgd")
    trunk = case.method.trunk(after_sgd, case.batch)
    scores = case.method.score(after_sgd, trunk, case.starts, case.tokens)
    close(scores.log_probs, want["log_probs"], 1e-4)
    _, metrics = case.loss(after_sgd)
    close(metrics["loss/policy"], want["pg_loss"], 1e-5)
    close(metrics["loss/ntp"], want["ntp_loss"], 2e-5)
    close(metrics["policy/clip_fraction"], want["clipfrac"], 1e-5)
    close(metrics["policy/ppo_kl"], want["ppo_kl"], 1e-5)

    def policy(log_probs):
        old, advantages = arrays["old_log_probs"], arrays["advantages"]
        return policy_loss(log_probs, old, advantages, jnp.ones_like(log_probs))[0]

    close(jax.grad(policy)(scores.log_probs.reshape(-1, case.k)), want["grad_log_prob"], 1e-5)
