"""Selection, rewards, advantages and policy loss against the golden data, and their laws."""

import ast
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from goldens import load_arrays, load_json, subtree
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_jax.models import head
from refine_jax.refine import grpo, rewards, selection

FOLDER = "refine_rl"
TOLERANCE = {"rtol": 0, "atol": 1e-5}
PROBABILITY_TOLERANCE = {"rtol": 0, "atol": 1e-6}

select = jax.jit(
    selection.select_positions,
    static_argnames=("num_positions", "rollout_length", "method", "temperature", "edge_margin"),
)


def names_like(arrays, pattern):
    """Matches of `pattern` among the names of `arrays`, each once, in order."""
    found = [re.fullmatch(pattern, name) for name in arrays]
    return list(dict.fromkeys(match.group(1) for match in found if match))


# Selection against the goldens


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
        got = selection.smooth_entropy(jnp.asarray(arrays["entropy"]), int(k))
        np.testing.assert_allclose(got, arrays[f"smoothed_k{k}"], **TOLERANCE)


def test_smoothing_of_padded_rows_matches_golden(golden_selection):
    arrays, _, _, k = golden_selection
    got = selection.smooth_entropy(jnp.asarray(arrays["entropy"]), k)
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
    for c in cs:
        expected = arrays[f"c{c}/start_for_index"]
        for i in range(expected.shape[-1]):
            chosen = jnp.asarray(arrays[f"c{c}/chunk_start"] + i)
            got = np.asarray(selection.response_starts(chosen, jnp.asarray(mask), k))
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
    got = grpo.group_advantages(
        jnp.asarray(values.reshape(shape)), jnp.ones(shape, bool), grouping=grouping
    )
    for g in np.unique(group):
        members = values[group == g]
        expected = (members - members.mean()) / (members.std(ddof=1) + 1e-6)
        np.testing.assert_allclose(np.ravel(got)[group == g], expected, **TOLERANCE)


# Drawing


def chi_square_p_value(draws, probabilities, size):
    """p-value of `draws` [n, spans] against `probabilities` [spans, >= size]; rare ones pooled."""
    statistic, freedom = 0.0, 0
    for j, p in enumerate(probabilities):
        expected = p[:size] / p[:size].sum() * len(draws)
        counts = np.bincount(draws[:, j], minlength=size)
        assert counts.size == size
        rare = expected < 5
        if rare.any():
            expected = np.append(expected[~rare], expected[rare].sum())
            counts = np.append(counts[~rare], counts[rare].sum())
        statistic += ((counts - expected) ** 2 / expected).sum()
        freedom += expected.size - 1
    return scipy.stats.chi2.sf(statistic, freedom) if freedom else 1.0


def draw(entropy, mask, count, **options):
    """Selections [count, c] of one row, drawn `count` times."""
    keys = jax.random.split(jax.random.key(1), count)
    rows = [jnp.broadcast_to(jnp.asarray(x), (count, len(x))) for x in (entropy, mask)]
    return select(keys, *rows, **options)


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


def test_temperature_sharpens_the_draws():
    entropy = np.random.default_rng(2).uniform(0, 2, 60).astype(np.float32)
    mask = np.ones(60, bool)
    options = {"num_positions": 3, "rollout_length": 1, "method": "entropy"}
    logits = entropy.reshape(3, 20) / 0.5
    probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
    for temperature, fits in ((0.5, True), (1.0, False)):
        chosen = draw(entropy, mask, 4000, temperature=temperature, **options).chosen
        draws = np.asarray(chosen) - np.array([0, 20, 40])
        assert (chi_square_p_value(draws, probabilities, 20) > 1e-5) == fits


def test_spans_of_a_row_are_drawn_independently():
    mask = np.ones(8, bool)
    options = {"num_positions": 2, "rollout_length": 1, "method": "uniform"}
    draws = np.asarray(draw(np.zeros(8), mask, 8000, **options).chosen)
    table = np.histogram2d(draws[:, 0], draws[:, 1] - 4, bins=4)[0]
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-5


def test_a_draw_depends_on_its_own_key_only():
    keys = jax.random.split(jax.random.key(3), 6)
    entropy = np.random.default_rng(3).uniform(0, 2, (6, 50)).astype(np.float32)
    mask = np.ones((6, 50), bool)
    options = {"num_positions": 4, "rollout_length": 3, "method": "entropy", "edge_margin": 2}
    together = select(keys, entropy, mask, **options)
    alone = [select(keys[i:][:2], entropy[i:][:2], mask[i:][:2], **options) for i in (0, 2, 4)]
    parts = jax.tree.map(lambda *x: np.concatenate(x), *alone)
    jax.tree.map(np.testing.assert_array_equal, together, parts)


# Laws of selection


def brute_force_valid(starts, mask, document, k):
    valid = np.zeros(starts.shape, bool)
    for (row, j), start in np.ndenumerate(starts):
        if start >= 1 and start + k <= mask.shape[1]:
            slots = slice(start - 1, start + k)
            owner = document[row, slots]
            valid[row, j] = mask[row, slots].all() and (owner == owner[0]).all()
    return valid


@st.composite
def packed_rows(draw_from, batch=3, num_tokens=64):
    """Segments [B, T]: 0 is padding, anywhere; documents numbered in order."""
    segments = np.zeros((batch, num_tokens), np.int32)
    for row in segments:
        at = 0
        documents = draw_from(
            st.lists(st.tuples(st.integers(0, 9), st.integers(0, 64)), max_size=4)
        )
        for number, (pad, length) in enumerate(documents, start=1):
            row[at + pad : at + pad + length] = number
            at += pad + length
    return segments


@settings(max_examples=30, deadline=None)
@given(packed_rows(), st.sampled_from(selection.SELECTIONS), st.integers(0, 2**31 - 1))
def test_every_valid_position_has_its_truth(segments, method, seed):
    rng = np.random.default_rng(seed)
    batch, num_tokens = segments.shape
    c, k, margin = 4, 5, 8
    mask = segments != 0
    entropy = rng.uniform(0, 5, segments.shape).astype(np.float32)
    got = select(
        jax.random.split(jax.random.key(seed), batch),
        entropy,
        mask,
        num_positions=c,
        rollout_length=k,
        method=method,
        edge_margin=margin,
        document=np.maximum.accumulate(segments, axis=1),
    )
    got = jax.tree.map(np.asarray, got)
    assert ((got.starts >= 1) & (got.starts <= num_tokens - k)).all()
    count = mask.sum(axis=1)
    np.testing.assert_array_equal(got.chosen >= 0, np.broadcast_to(count[:, None] >= c, (batch, c)))
    for row in range(batch):
        real = np.flatnonzero(mask[row])
        size = real.size // c
        if size == 0:
            assert not got.valid[row].any()
            continue
        lower, upper = real[0] + margin, real[-1] + 1 - margin
        expected = np.minimum(np.maximum(got.chosen[row] + 1, lower), upper)
        document = np.maximum.accumulate(segments[row])
        valid = brute_force_valid(expected[None], mask[row, None], document[None], k)[0]
        np.testing.assert_array_equal(got.valid[row], valid)
        np.testing.assert_array_equal(got.starts[row][valid], expected[valid])
        for j in range(c):
            span = real[j * size : (j + 1) * size]
            assert got.chosen[row, j] in span
            if method in ("argmax", "argmin"):
                best = getattr(np, method)(entropy[row, span])
                assert got.chosen[row, j] == span[best]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 80), st.integers(0, 80), st.integers(0, 2**31 - 1))
def test_padding_on_either_side_shifts_the_positions(length, left, seed):
    left = min(left, 80 - length)
    entropy = np.random.default_rng(seed).uniform(0, 5, length).astype(np.float32)
    rows = np.zeros((2, 80), np.float32)
    mask = np.zeros((2, 80), bool)
    for row, start in enumerate((0, left)):
        rows[row, start : start + length] = entropy
        mask[row, start : start + length] = True
    keys = jax.random.split(jax.random.key(0), 2)
    got = select(keys, rows, mask, num_positions=4, rollout_length=5, method="argmax")
    np.testing.assert_array_equal(*np.asarray(got.valid))
    starts = np.asarray(got.starts) - np.array([[0], [left]])
    np.testing.assert_array_equal(*np.where(got.valid, starts, -1))


def test_ties_go_to_the_first():
    mask = np.ones((1, 60), bool)
    for method in ("argmax", "argmin"):
        got = draw(np.zeros(60), mask[0], 1, num_positions=3, rollout_length=5, method=method)
        np.testing.assert_array_equal(got.chosen, [[0, 20, 40]])


def test_unknown_names_are_refused():
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="Got: 'max'"):
        selection.selection_scores(x, 5, "max")
    with pytest.raises(ValueError, match="Got: 'dot'"):
        rewards.rollout_rewards("dot", x, x, x, x)
    with pytest.raises(ValueError, match="Got: 'batch'"):
        grpo.group_advantages(x[None], x[None] == 0, grouping="batch")
    with pytest.raises(ValueError, match="Got: 'mean'"):
        grpo.policy_loss(x, x, x, x, aggregation="mean")
    with pytest.raises(ValueError, match="Got: 'k3'"):
        grpo.kl_penalty(x, x, "k3")


# Rewards


@pytest.fixture(scope="module")
def golden_rewards():
    arrays = load_arrays(FOLDER, "rewards.npz")
    inputs = ("response_hidden_states", "ground_truth_hidden_states", "responses")
    return arrays, [jnp.asarray(arrays[name]) for name in (*inputs, "ground_truth_ids")]


@pytest.mark.parametrize("kind", list(rewards.REWARDS))
def test_rewards_match_golden(golden_rewards, kind):
    arrays, inputs = golden_rewards
    per_token = rewards.REWARDS[kind](*inputs)
    np.testing.assert_allclose(per_token, arrays[f"{kind}/per_token"], **TOLERANCE)
    scores = rewards.rollout_rewards(kind, *inputs)
    expected = arrays[f"{kind}/scores"]
    np.testing.assert_allclose(scores, expected[:, -1], **TOLERANCE)
    assert not expected[:, :-1].any()


def test_a_truth_stands_against_several_rollouts(golden_rewards):
    """Leading axes broadcast: [c, n, k, D] rollouts against [c, 1, k, D] truths."""
    _, (hidden, truth, tokens, true_tokens) = golden_rewards
    repeat = functools.partial(jnp.repeat, repeats=3, axis=1)
    got = rewards.rollout_rewards(
        "hybrid",
        repeat(hidden[:, None]),
        truth[:, None],
        repeat(tokens[:, None]),
        true_tokens[:, None],
    )
    alone = rewards.rollout_rewards("hybrid", hidden, truth, tokens, true_tokens)
    np.testing.assert_allclose(got, np.repeat(alone[:, None], 3, axis=1), **TOLERANCE)


def test_rewards_accumulate_in_float32():
    hidden = jax.random.normal(jax.random.key(0), (3, 5, 4096)).astype(jnp.bfloat16)
    tokens = jnp.zeros((3, 5), jnp.int32)
    got = rewards.rollout_rewards("cosine", hidden, hidden, tokens, tokens)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 1.0, **TOLERANCE)


# Advantages

GROUP = 6
group_values = st.lists(
    st.floats(-2, 2, width=32, allow_subnormal=False), min_size=GROUP, max_size=GROUP
)
group_mask = st.lists(st.booleans(), min_size=GROUP, max_size=GROUP)
normalize = jax.jit(grpo.normalize_groups, static_argnames="normalize_std")


def test_advantages_match_golden():
    arrays = load_arrays(FOLDER, "grpo.npz")
    cases = names_like(arrays, r"(\w+)/group")
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


@settings(max_examples=50, deadline=None)
@given(group_values, group_mask, st.booleans(), st.randoms(use_true_random=False))
def test_advantages_of_a_group(values, valid, normalize_std, random):
    values, valid = np.float32(values), np.array(valid)
    got = np.asarray(normalize(values, valid, normalize_std=normalize_std))
    members = values[valid].astype(np.float64)
    expected = members
    if len(members) > 1:
        expected = members - members.mean()
        std = members.std(ddof=1)
    else:
        std = 1.0
    if normalize_std:
        expected = expected / (std + 1e-6)
    # Rounding of the rewards (ulp of 2) is divided by the std in both.
    scale = max(std, 1e-6) if normalize_std else 1.0
    np.testing.assert_allclose(got[valid], expected, rtol=1e-4, atol=1e-6 / scale)
    assert not got[~valid].any()
    if len(members) > 1:
        np.testing.assert_allclose(got.sum(), 0.0, atol=4e-6 / scale)
    # What is not valid has no influence, whatever it is.
    garbage = np.where(valid, values, np.float32(random.choice([np.nan, np.inf, -1e30])))
    np.testing.assert_array_equal(normalize(garbage, valid, normalize_std=normalize_std), got)
    order = np.array(random.sample(range(GROUP), GROUP))
    permuted = normalize(values[order], valid[order], normalize_std=normalize_std)
    np.testing.assert_allclose(permuted, got[order], rtol=1e-4, atol=1e-6 / scale)


@settings(max_examples=50, deadline=None)
@given(st.floats(-2, 2, width=32), group_mask, st.booleans())
def test_equal_rewards_give_exactly_zero(value, valid, normalize_std):
    valid = np.array(valid)
    got = np.asarray(
        normalize(np.full(GROUP, value, np.float32), valid, normalize_std=normalize_std)
    )
    if valid.sum() == 1:
        np.testing.assert_allclose(got[valid], value, rtol=1e-5)
    else:
        np.testing.assert_array_equal(got, 0.0)


@pytest.mark.parametrize("grouping", grpo.GROUPINGS)
def test_groupings(grouping):
    shape = (3, 4, 2)
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    valid = np.random.default_rng(1).random((3, 4, 1)) < 0.7
    got = grpo.group_advantages(jnp.asarray(values), jnp.asarray(valid), grouping=grouping)
    groups = {"sequence": [(b,) for b in range(3)], "position": list(np.ndindex(3, 4))}[grouping]
    for index in groups:
        members = np.broadcast_to(valid, shape)[index]
        inside = values[index][members]
        if inside.size:
            expected = (inside - inside.mean()) / (inside.std(ddof=1) + 1e-6)
            np.testing.assert_allclose(np.asarray(got)[index][members], expected, **TOLERANCE)
    assert not np.asarray(got)[~np.broadcast_to(valid, shape)].any()


# Policy loss


@functools.partial(jax.jit, static_argnames=("aggregation",))
def loss_and_gradient(log_probs, old_log_probs, advantages, mask, *, whole=None, **options):
    loss = functools.partial(grpo.policy_loss, mini_batch_mask=whole, **options)
    return jax.value_and_grad(loss, has_aux=True)(log_probs, old_log_probs, advantages, mask)


def golden_policy_cases():
    """(name, settings as our arguments, arrays) of every setting, from what the data says of it."""
    arrays = load_arrays(FOLDER, "policy_loss.npz")
    meanings = load_json(FOLDER, "arrays.json")["policy_loss.npz"]
    names = names_like(arrays, r"(\w+)/token-mean/loss")
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
    got = grpo.kl_penalty(
        jnp.asarray(arrays["log_prob"]), jnp.asarray(arrays["ref_log_prob"]), kind
    )
    np.testing.assert_allclose(got, arrays[kind], **TOLERANCE)


def random_rollouts(rows=12, k=5, seed=0):
    rng = np.random.default_rng(seed)
    old = -rng.exponential(2, (rows, k)).astype(np.float32)
    new = old + rng.normal(0, 0.5, (rows, k)).astype(np.float32)
    advantages = rng.normal(size=(rows, 1)).repeat(k, axis=1).astype(np.float32)
    mask = (rng.random((rows, k)) < 0.8).astype(np.float32)
    mask[[2, 7]] = 0
    return [new, old, advantages, mask]


@pytest.mark.parametrize("aggregation", grpo.AGGREGATIONS)
def test_micro_batches_add_up_to_the_mini_batch(aggregation):
    inputs = random_rollouts()
    whole = loss_and_gradient(*inputs, aggregation=aggregation)
    parts = [
        loss_and_gradient(*(x[i : i + 4] for x in inputs), whole=inputs[3], aggregation=aggregation)
        for i in range(0, 12, 4)
    ]
    losses = jax.tree.map(lambda *x: np.sum(x, axis=0), *(part[0] for part in parts))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), losses, whole[0])
    gradient = np.concatenate([part[1] for part in parts])
    np.testing.assert_allclose(gradient, whole[1], rtol=1e-5)


@pytest.mark.parametrize("aggregation", grpo.AGGREGATIONS)
def test_masked_tokens_and_rollouts_have_no_influence(aggregation):
    *values, mask = random_rollouts()
    expected = loss_and_gradient(*values, mask, aggregation=aggregation)
    for garbage in (np.nan, np.inf, 1e30):
        other = [np.where(mask != 0, x, np.float32(garbage)) for x in values]
        got = loss_and_gradient(*other, mask, aggregation=aggregation)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert not np.asarray(expected[1])[mask == 0].any()
    kept = mask.any(axis=1)
    removed = loss_and_gradient(*(x[kept] for x in (*values, mask)), aggregation=aggregation)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, expected[0], removed[0])
    close(np.asarray(expected[1])[kept], removed[1])


@pytest.mark.parametrize("aggregation", grpo.AGGREGATIONS)
def test_a_batch_without_valid_rollouts_gives_zero(aggregation):
    *values, mask = random_rollouts()
    got = loss_and_gradient(*values, np.zeros_like(mask), aggregation=aggregation)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), got)


# Entropy and log-probabilities: the head, given logits through an identity matrix


def test_entropy_and_log_probs_match_golden():
    arrays = load_arrays(FOLDER, "entropy_logprob.npz")
    logits, labels = jnp.asarray(arrays["logits"]), jnp.asarray(arrays["labels"])
    with jax.default_matmul_precision("highest"):
        identity = jnp.eye(logits.shape[-1])
        log_probs, entropy = head.token_log_probs(logits, identity, labels)
        _, stats = head.next_token_loss(logits, identity, labels, jnp.ones(labels.shape))
    for got in (log_probs, -stats.nll, head.log_prob(logits, labels)):
        np.testing.assert_allclose(got, arrays["logprobs"], **TOLERANCE)
    for got in (entropy, stats.entropy, head.entropy(logits)):
        np.testing.assert_allclose(got, arrays["entropy"], **TOLERANCE)
