"""Golden tests of the method's functions: everything in `refine_rl` but the task scores.

Settings are read from the data itself.
"""

import ast
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from goldens import load_arrays, load_json, subtree
from goldens.refine_rl import (
    brute_force_valid,
    chi_square_p_value,
    draw,
    loss_and_gradient,
    normalize,
    select,
)

from refine_jax.models import head
from refine_jax.refine import grpo, rewards, selection

FOLDER = "refine_rl"
TOLERANCE = {"rtol": 0, "atol": 1e-5}
PROBABILITY_TOLERANCE = {"rtol": 0, "atol": 1e-6}


def names_like(arrays, pattern):
    """Matches of `pattern` among the names of `arrays`, each once, in order."""
    found = [re.fullmatch(pattern, name) for name in arrays]
    return list(dict.fromkeys(match.group(1) for match in found if match))


# Selection


@pytest.fixture(scope="module")
def golden_selection():
    arrays = load_arrays(FOLDER, "selection.npz")
    cs = [int(c) for c in names_like(arrays, r"c(\d+)/chunk_size")]
    assert cs
    return arrays, cs, arrays["attention_mask"].astype(bool), int(arrays["k"])


def test_smoothing_matches_golden():
    arrays = load_arrays(FOLDER, "smoothing.npz")
    lengths = names_like(arrays, r"smoothed_k(\d+)")
    assert lengths
    for k in lengths:
        got = jax.jit(selection.smooth_entropy, static_argnums=1)(arrays["entropy"], int(k))
        np.testing.assert_allclose(got, arrays[f"smoothed_k{k}"], **TOLERANCE)


def test_smoothing_of_padded_rows_matches_golden(golden_selection):
    arrays, _, _, k = golden_selection
    got = jax.jit(selection.smooth_entropy, static_argnums=1)(arrays["entropy"], k)
    np.testing.assert_allclose(got, arrays["smoothed"], **TOLERANCE)


def test_spans_match_golden(golden_selection):
    arrays, cs, mask, _ = golden_selection
    for c in cs:
        expected = np.full(mask.shape, -1)
        for row, size in enumerate(arrays[f"c{c}/chunk_size"]):
            for j, start in enumerate(arrays[f"c{c}/chunk_start"][row]):
                expected[row, start : start + size] = j
        np.testing.assert_array_equal(selection.assign_spans(jnp.asarray(mask), c), expected)


@pytest.mark.parametrize(("method", "name"), [("entropy", "probs"), ("uniform", "probs_uniform")])
def test_probabilities_match_golden(golden_selection, method, name):
    arrays, cs, mask, k = golden_selection
    scores = selection.selection_scores(jnp.asarray(arrays["entropy"]), k, method)
    for c in cs:
        span = np.asarray(selection.assign_spans(jnp.asarray(mask), c))
        for row, j in np.ndindex(len(mask), c):
            got = scipy.special.softmax(np.asarray(scores)[row, span[row] == j])
            expected = arrays[f"c{c}/{name}"][row, j]
            np.testing.assert_allclose(got, expected[: got.size], **PROBABILITY_TOLERANCE)
            assert not expected[got.size :].any()


def test_starts_match_golden_for_every_index(golden_selection):
    arrays, cs, mask, k = golden_selection
    starts = jax.jit(selection.response_starts, static_argnums=2)
    for c in cs:
        expected = arrays[f"c{c}/start_for_index"]
        for i in range(expected.shape[-1]):
            got = np.asarray(starts(arrays[f"c{c}/chunk_start"] + i, mask, k))
            exists = expected[..., i] >= 0
            np.testing.assert_array_equal(got[exists], expected[..., i][exists])


def select_golden(golden_selection, c, method):
    arrays, _, mask, k = golden_selection
    keys = jax.random.split(jax.random.key(0), len(mask))
    return select(keys, arrays["entropy"], mask, num_positions=c, rollout_length=k, method=method)


@pytest.mark.parametrize("method", ["argmax", "argmin"])
def test_extremal_starts_match_golden(golden_selection, method):
    arrays, cs, mask, k = golden_selection
    for c in cs:
        got = select_golden(golden_selection, c, method)
        expected = arrays[f"c{c}/start_{method}"]
        valid = brute_force_valid(expected, mask, np.ones_like(mask, np.int32), k)
        np.testing.assert_array_equal(got.valid, valid)
        assert valid.any()
        np.testing.assert_array_equal(np.asarray(got.starts)[valid], expected[valid])


def test_training_batch_matches_golden(golden_selection):
    """Prefixes, truths and groups of the published code's batch follow from the starts."""
    arrays, _, mask, k = golden_selection
    repeats = [int(n) for n in names_like(arrays, r"batch_n(\d+)/group")]
    assert repeats
    for n in repeats:
        batch = subtree(arrays, f"batch_n{n}")
        c = len(batch["group"]) // (n * len(mask))
        starts = select_golden(golden_selection, c, "argmax").starts
        slots = np.asarray(selection.rollout_slots(starts, k))
        row = np.arange(len(mask))[:, None, None]
        for name, source in (
            ("ground_truth_ids", "input_ids"),
            ("ground_truth_hidden_states", "hidden_states"),
        ):
            truth = arrays[source][row, slots]
            truth = np.repeat(truth.reshape(-1, *truth.shape[2:]), n, axis=0)
            np.testing.assert_array_equal(truth, batch[name])
        for fork, start in enumerate(np.repeat(np.ravel(starts), n)):
            prefix = arrays["input_ids"][fork // (c * n), :start]
            padded = np.full(mask.shape[1], arrays["pad_id"])
            padded[mask.shape[1] - start :] = prefix
            np.testing.assert_array_equal(padded, batch["input_ids"][fork])
        check_grouping(batch["group"], (len(mask), c, n), "sequence" if n == 1 else "position")


def check_grouping(group, shape, grouping):
    values = np.random.default_rng(0).normal(size=group.shape).astype(np.float32)
    run = jax.jit(grpo.group_advantages, static_argnames="grouping")
    got = run(values.reshape(shape), np.ones(shape, bool), grouping=grouping)
    for g in np.unique(group):
        members = values[group == g]
        expected = (members - members.mean()) / (members.std(ddof=1) + 1e-6)
        np.testing.assert_allclose(np.ravel(got)[group == g], expected, **TOLERANCE)


# Drawing


@pytest.mark.parametrize(("method", "name"), [("entropy", "probs"), ("uniform", "probs_uniform")])
def test_draws_follow_the_golden_probabilities(golden_selection, method, name):
    arrays, cs, mask, k = golden_selection
    for c in cs:
        for row in (0, len(mask) - 1):
            size = int(arrays[f"c{c}/chunk_size"][row])
            got = draw(
                arrays["entropy"][row],
                mask[row],
                4000,
                num_positions=c,
                rollout_length=k,
                method=method,
            )
            draws = np.asarray(got.chosen) - arrays[f"c{c}/chunk_start"][row]
            probabilities = arrays[f"c{c}/{name}"][row]
            assert chi_square_p_value(draws, probabilities, size) > 1e-5


# Rewards


@pytest.fixture(scope="module")
def golden_rewards():
    arrays = load_arrays(FOLDER, "rewards.npz")
    inputs = ("response_hidden_states", "ground_truth_hidden_states", "responses")
    return arrays, [jnp.asarray(arrays[name]) for name in (*inputs, "ground_truth_ids")]


@pytest.mark.parametrize("kind", ["cosine", "binary", "hybrid"])  # the published ones
def test_rewards_match_golden(golden_rewards, kind):
    arrays, inputs = golden_rewards
    per_token = jax.jit(rewards.REWARDS[kind])(*inputs)
    np.testing.assert_allclose(per_token, arrays[f"{kind}/per_token"], **TOLERANCE)
    scores = jax.jit(rewards.token_rewards, static_argnums=0)(kind, *inputs).mean(-1)
    expected = arrays[f"{kind}/scores"]
    np.testing.assert_allclose(scores, expected[:, -1], **TOLERANCE)
    assert not expected[:, :-1].any()


# Advantages


def test_advantages_match_golden():
    arrays = load_arrays(FOLDER, "grpo.npz")
    cases = names_like(arrays, r"([^/]+)/group")
    assert cases
    for case in cases:
        data = subtree(arrays, case)
        scores, mask, ids = data["rewards"].sum(axis=-1), data["mask"], data["group"]
        groups = [np.flatnonzero(ids == g) for g in np.unique(ids)]
        size = max(map(len, groups))
        values, valid = np.full((2, len(groups), size), np.nan, np.float32)
        for row, members in enumerate(groups):
            values[row, : len(members)] = scores[members]
        valid = ~np.isnan(values)
        for name, normalize_std in (("advantages_std", True), ("advantages_nostd", False)):
            got = np.asarray(normalize(values, valid, normalize_std=normalize_std))
            per_rollout = np.zeros(len(ids), np.float32)
            for row, members in enumerate(groups):
                per_rollout[members] = got[row, : len(members)]
            np.testing.assert_allclose(
                per_rollout[:, None] * mask, data[name], err_msg=case, **TOLERANCE
            )


# Policy loss


def golden_policy_cases():
    """(name, settings as our arguments, arrays) of every setting, from what the data says of it."""
    arrays = load_arrays(FOLDER, "policy_loss.npz")
    meanings = load_json(FOLDER, "arrays.json")["policy_loss.npz"]
    names = names_like(arrays, r"([^/]+)/token-mean/loss")
    assert names
    for name in names:
        meaning = meanings[f"{name}/token-mean/loss"]["meaning"]
        stated = re.search(r"settings (\{.*?\})", meaning)
        if stated:
            given_settings = ast.literal_eval(stated.group(1))
        else:
            clip, dual = re.search(r"clip ([\d.]+), clip_ratio_c ([\d.]+)", meaning).groups()
            given_settings = {"cliprange": float(clip), "clip_ratio_c": float(dual)}
        clip = given_settings["cliprange"]
        options = {
            "clip_low": given_settings.get("cliprange_low", clip),
            "clip_high": given_settings.get("cliprange_high", clip),
            "dual_clip": given_settings.get("clip_ratio_c", 3.0),
        }
        log_probs = arrays["old_log_prob" if "log_prob = old" in meaning else "log_prob"]
        inputs = [log_probs, *(arrays[x] for x in ("old_log_prob", "advantages", "mask"))]
        yield name, options, inputs, subtree(arrays, name)


def test_policy_loss_matches_golden():
    clamped = 0
    for name, options, inputs, expected in golden_policy_cases():
        rows = inputs[-1].any(axis=1)
        for aggregation in grpo.AGGREGATIONS:
            (loss, metrics), gradient = loss_and_gradient(
                *inputs, aggregation=aggregation, **options
            )
            case = f"{name}/{aggregation}"
            assert f"{aggregation}/loss" in expected
            want = {x: expected[f"{aggregation}/{x}"] for x in ("loss", "grad")}
            if not rows.all() and aggregation == "seq-mean-token-mean":
                assert np.isfinite(loss)  # the published code's is NaN
                continue
            if not rows.all() and aggregation == "seq-mean-token-sum":
                # The published code divides by rows without tokens too.
                want = {x: y / rows.mean() for x, y in want.items()}
            np.testing.assert_allclose(loss, want["loss"], err_msg=case, **TOLERANCE)
            np.testing.assert_allclose(gradient, want["grad"], err_msg=case, rtol=0, atol=1e-6)
            outside = np.abs(inputs[0] - inputs[1]) > 20
            assert not np.asarray(gradient)[outside].any()
            clamped += outside.sum()
        names = {
            "clipfrac": "clip_fraction",
            "clipfrac_lower": "clip_fraction_lower",
            "ppo_kl": "ppo_kl",
        }
        for theirs, ours in names.items():
            if theirs in expected:
                np.testing.assert_allclose(
                    metrics[ours], expected[theirs], err_msg=f"{name}/{theirs}", **TOLERANCE
                )
    assert clamped


@pytest.mark.parametrize("kind", grpo.KL_PENALTIES)
def test_kl_penalty_matches_golden(kind):
    arrays = load_arrays(FOLDER, "kl_penalty.npz")
    penalty = jax.jit(grpo.kl_penalty, static_argnums=2)
    got = penalty(arrays["log_prob"], arrays["ref_log_prob"], kind)
    np.testing.assert_allclose(got, arrays[kind], **TOLERANCE)


# Entropy and log-probabilities: the head, given logits through an identity matrix


def test_entropy_and_log_probs_match_golden():
    arrays = load_arrays(FOLDER, "entropy_logprob.npz")
    logits, labels = jnp.asarray(arrays["logits"]), jnp.asarray(arrays["labels"])

    @jax.jit
    def all_forms(logits, labels):
        """Log-probabilities, and entropies, each by three functions."""
        with jax.default_matmul_precision("highest"):
            identity = jnp.eye(logits.shape[-1])
            log_probs, entropy = head.token_log_probs(logits, identity, labels)
            _, stats = head.next_token_loss(logits, identity, labels, jnp.ones(labels.shape))
        direct = head.log_prob(logits, labels)
        return (log_probs, -stats.nll, direct), (entropy, stats.entropy, head.entropy(logits))

    for found, name in zip(all_forms(logits, labels), ("logprobs", "entropy"), strict=True):
        for got in found:
            np.testing.assert_allclose(got, arrays[name], **TOLERANCE)
