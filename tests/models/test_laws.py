"""The laws that every model keeps (DESIGN, section 2), forward and backward.

1. Extending the initial state is the forward pass; splitting a sequence anywhere changes nothing.
2. A fork at p is the state after the first p tokens, also when what follows crosses LaCT's chunk
   boundaries (chunks of 8 tokens here, so that up to 20 tokens cross one, two or three).
3. Padding on either side and packed neighbours change nothing.
4. Gradients obey 1 to 3.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIGS, scaled, tiny, tokens

from refine_jax.models.config import model_config
from refine_jax.models.layout import Layout
from refine_jax.models.transformer import Model
from refine_jax.refine import rollout
from refine_jax.refine.reading import read_rows
from refine_jax.refine.rollout import score_rollouts

# Tokens of the rows and of what continues them: few, so that few programs are compiled; positions
# vary freely.
LENGTHS = ((9, 5), (26, 20))
MODELS = sorted(CONFIGS)
# One of each family; the options of the mixers have tests of their own.
FAMILIES = ["lact", "deltanet", "gated_deltanet", "qwen_irregular", "olmo"]
HYBRIDS = ["qwen", "qwen_irregular", "olmo", "deltanet_hybrid"]
# Newton-Schulz steps amplify rounding (golden README, section 10).
FORWARD, BACKWARD = {"lact_muon": 1e-4}, {"lact_muon": 2e-3}
laws = settings(max_examples=5, deadline=None, derandomize=True)


def assert_same(got, want, tolerance=1e-5):
    """Equal to `tolerance`, relative to the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    scale = max(np.abs(want).max(initial=0), 1e-3)
    error = np.abs(got - want).max(initial=0) / scale
    assert error <= tolerance, f"relative error {error:.2e}"


def assert_same_gradients(got, want, tolerance=1e-4):
    """Relative L2 of the whole gradient; single parameters on the scale of a tenth of it.

    A parameter whose gradient is far smaller than the rest is a difference of large terms, with
    their rounding.
    """
    got, want = jax.device_get((got, want))
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    norms = [np.linalg.norm(b) for _, b in pairs]
    differences = [np.linalg.norm(a - b) for a, b in pairs]
    total = np.linalg.norm(norms)
    assert np.linalg.norm(differences) <= tolerance * total
    for difference, norm in zip(differences, norms, strict=True):
        assert difference <= tolerance * max(norm, 0.1 * total)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, ids, segments=None):
    layout = None if segments is None else Layout.from_segments(segments, 3)
    return model.forward(params, ids, layout, with_trace=True)


@functools.partial(jax.jit, static_argnums=0)
def extend(model, params, ids, state):
    return model.extend(params, ids, state)


@functools.partial(jax.jit, static_argnums=(0, 4))
def fork(model, params, trace, positions, copies=1):
    return model.fork(params, trace, positions, copies=copies)


@functools.partial(jax.jit, static_argnums=0)
def forward_forks(model, params, trace, positions, ids):
    return model.forward_forks(params, trace, positions, ids)


@functools.partial(jax.jit, static_argnums=(0, 2))
def initial_state(model, params, shape):
    return model.init_state(params, shape)


def filled(rows, length):
    """Rows of tokens [N, length]. The models are causal: what fills a row changes nothing before
    it, and one length for all is one program.
    """
    return np.stack([np.pad(row, (0, length - len(row))) for row in rows])


def each_alone(model, params, rows):
    """Hidden states [N, 46, D] of rows of tokens, each one document, filled up to 46."""
    return np.asarray(forward(model, params, filled(rows, 46))[0])


def well_conditioned(name):
    """A tiny model whose hidden states depend less on roundings than is tested.

    Parameters of some, as they are, move what follows some inputs by 7e-5 if each is rounded
    (6e-8); halves of them move it by 1e-6.
    """
    model, params = tiny(name)
    return model, params if name in ("lact", "deltanet") else scaled(params, 0.5)


@pytest.mark.parametrize("name", FAMILIES)
@laws
@given(parts=st.lists(st.sampled_from((1, 11)), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_splitting_changes_nothing(name, parts, seed):
    model, params = well_conditioned(name)
    ids = tokens(seed, 2, 1, 40)
    # Run to one length for all, so that one forward pass is compiled; it is causal.
    want = np.asarray(forward(model, params, ids[:, 0])[0])
    state = model.resize(initial_state(model, params, (2, 1)), 44)
    at = 0
    for size in parts:
        got, state = extend(model, params, ids[:, :, at : at + size], state)
        assert_same(np.asarray(got)[:, 0], want[:, at : at + size])
        at += size


@pytest.mark.parametrize("name", MODELS)
@laws
@given(data=st.data())
def test_fork_is_the_state_after_the_prefix(name, data):
    model, params = well_conditioned(name)
    length, size = data.draw(st.sampled_from(LENGTHS if name in FAMILIES else LENGTHS[-1:]))
    seed = data.draw(st.integers(0, 99))
    position = st.integers(0, length)
    positions = data.draw(st.lists(position, min_size=6, max_size=6))
    positions = np.asarray(positions, np.int32).reshape(2, 3)
    ids, new = tokens(seed, 2, length), tokens(seed + 1, 2, 3, size)
    _, trace = forward(model, params, ids)
    results = [forward_forks(model, params, trace, positions, new)]
    if name in FAMILIES:  # in two steps, and with states that may be extended without an end
        state = fork(model, params, trace, positions)
        results.append(extend(model, params, new, state)[0])
    forks = list(np.ndindex(2, 3))
    rows = [np.concatenate([ids[b, : positions[b, r]], new[b, r]]) for b, r in forks]
    results = jax.device_get(results)
    for (b, r), hidden in zip(forks, each_alone(model, params, rows), strict=True):
        want = hidden[positions[b, r] :][:size]
        for result in results:
            assert_same(result[b, r], want, FORWARD.get(name, 1e-5))


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_token_by_token(name):
    """A fork extended one token at a time, across chunk boundaries."""
    model, params = tiny(name)
    ids = tokens(3, 2, 40)
    want = np.asarray(forward(model, params, ids)[0])
    _, trace = forward(model, params, ids[:, :9])
    state = model.resize(fork(model, params, trace, jnp.full((2, 1), 9)), 40)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    for t in range(9, 40):
        got, state = extend(model, params, ids[:, None, t : t + 1], state)
        assert_same(np.asarray(got)[:, 0, 0], want[:, t])
    assert {leaf.shape for leaf in jax.tree.leaves(state)} == shapes


def packed(data, width=40):
    """Rows of up to three documents with padding around them: segments, document slices."""
    rows, slices = np.zeros((2, width), np.int32), []
    for b in range(2):
        at, found = 0, []
        for number in range(1, data.draw(st.integers(1, 3)) + 1):
            at += data.draw(st.integers(0, 5))
            size = min(data.draw(st.integers(1, 20)), width - at)
            if size <= 0:
                break
            rows[b, at : at + size] = number
            found.append(slice(at, at + size))
            at += size
        slices.append(found)
    return rows, slices


@pytest.mark.parametrize("name", MODELS)
@laws
@given(data=st.data())
def test_padding_and_neighbours_change_nothing(name, data):
    model, params = well_conditioned(name)
    segments, slices = packed(data)
    ids = tokens(data.draw(st.integers(0, 99)), 2, 40)
    hidden, trace = forward(model, params, ids, segments)
    hidden, new = np.asarray(hidden), tokens(7, 2, 3, 5)
    ends = [([s.stop for s in row] * 3)[:3] for row in slices]
    middles = [([(s.start + s.stop + 1) // 2 for s in row] * 3)[:3] for row in slices]
    for positions in np.asarray([ends, middles], np.int32):
        continued = np.asarray(forward_forks(model, params, trace, positions, new))
        forks = list(np.ndindex(2, 3))
        starts = [(slices[b] * 3)[r].start for b, r in forks]
        prefixes = [
            ids[b, start : positions[b, r]] for (b, r), start in zip(forks, starts, strict=True)
        ]
        rows = [np.concatenate([p, new[f]]) for f, p in zip(forks, prefixes, strict=True)]
        alone, tolerance = each_alone(model, params, rows), FORWARD.get(name, 1e-5)
        for (b, r), start, prefix, want in zip(forks, starts, prefixes, alone, strict=True):
            size = len(prefix)
            assert_same(hidden[b, start : start + size], want[:size], tolerance)
            assert_same(continued[b, r], want[size : size + 5], tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_fork_before_any_token_is_the_initial_state(name):
    """At slot 0 and inside left padding."""
    model, params = tiny(name)
    segments = np.asarray([[0] * 3 + [1] * 7 + [0] * 30] * 2, np.int32)
    ids, new = tokens(5, 2, 40), tokens(6, 2, 3, 5)
    _, trace = forward(model, params, ids, segments)
    got = forward_forks(model, params, trace, np.asarray([[0, 2, 3]] * 2, np.int32), new)
    want, _ = extend(model, params, new, initial_state(model, params, (2, 3)))
    assert_same(got, want)


def draw(seed, *shape):
    """Weights that make a scalar of hidden states, whose gradient is generic."""
    return np.float32(np.random.default_rng(seed).standard_normal(shape))


@functools.partial(jax.jit, static_argnums=0)
def row_gradient(model, params, rows, weights):
    """The gradient of weighted hidden states of rows [N, T]."""
    return jax.grad(lambda p: jnp.sum(model.forward(p, rows)[0] * weights))(params)


@functools.partial(jax.jit, static_argnums=0)
def fork_gradient(model, params, ids, segments, positions, new, weights):
    """(Value, gradient) of weighted hidden states of rows [B, T] and of forks, one after the other.

    weights: of the rows [B, T, D] and of the forks [B, R, S, D].
    """
    layout = None if segments is None else Layout.from_segments(segments, 3)

    def loss(params):
        hidden, trace = model.forward(params, ids, layout, with_trace=True)
        forks = model.forward_forks(params, trace, positions, new)
        return jnp.sum(hidden * weights[0]) + jnp.sum(forks * weights[1])

    return jax.value_and_grad(loss)(params)


def prefix_gradient(model, params, parts):
    """The gradient of weighted hidden states of (tokens [n], weights [at most n, D]).

    The weights are of the last tokens. Eight rows of 42 tokens at most, so that all tests share
    a program.
    """
    weights = np.zeros((8, 42, 16), np.float32)
    for row, (text, of_text) in zip(weights, parts, strict=False):
        row[len(text) - len(of_text) : len(text)] = of_text
    rows = [text for text, _ in parts] + [np.zeros(1, np.int32)] * (8 - len(parts))
    return row_gradient(model, params, filled(rows, 42), weights)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_through_forks_are_those_of_prefixes(name):
    """Rollouts of 12 tokens from within a chunk and from its edges: they cross one or two more."""
    model, params = tiny(name)
    ids, new = tokens(11, 2, 30), tokens(12, 2, 3, 12)
    positions = np.asarray([[6, 8, 21], [3, 15, 24]])
    weights = draw(0, 2, 30, 16), draw(12, 2, 3, 12, 16)
    # Every prefix with its rollout as a row of its own.
    parts = list(zip(ids, weights[0], strict=True))
    for b, r in np.ndindex(2, 3):
        parts.append((np.concatenate([ids[b, : positions[b, r]], new[b, r]]), weights[1][b, r]))
    assert_same_gradients(
        fork_gradient(model, params, ids, None, positions, new, weights)[1],
        prefix_gradient(model, params, parts),
        BACKWARD.get(name, 1e-4),
    )


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("lact", "full"),
        ("deltanet", "none"),
        ("gated_deltanet", "dots"),
        ("qwen", "full"),
        ("qwen_irregular", "none"),
        ("olmo", "dots"),
    ],
)
def test_rows_and_forks_in_one_pass(name, remat):
    model, params = tiny(name)
    remade = Model(model.config, dataclasses.replace(model.policy, remat=remat))
    ids, new = tokens(13, 2, 30), tokens(14, 2, 6, 5)
    segments = np.asarray([[0] * 2 + [1] * 10 + [2] * 18, [1] * 30], np.int32)
    positions = np.asarray([[7, 12, 25], [0, 16, 30]])  # two forks each
    weights = draw(0, 2, 30, 16) * (segments > 0)[..., None], draw(12, 2, 6, 5, 16)

    @jax.jit
    @jax.value_and_grad
    def together(params):
        layout = Layout.from_segments(segments, 3)
        hidden, forks = remade.forward_with_forks(params, ids, layout, positions, new)
        return jnp.sum(hidden * weights[0]) + jnp.sum(forks * weights[1])

    repeated = np.repeat(positions, 2, axis=1)
    got = together(params)
    want = fork_gradient(model, params, ids, segments, repeated, new, weights)
    assert_same(got[0], want[0])
    assert_same_gradients(got[1], want[1], 1e-5)


@pytest.mark.parametrize("name", ["deltanet", "qwen"])
def test_forks_of_one_position_are_equal(name):
    model, params = tiny(name)
    positions = np.asarray([[7, 12], [0, 16]])
    _, trace = forward(model, params, tokens(13, 2, 30))
    got = fork(model, params, trace, positions, 3)
    want = fork(model, params, trace, np.repeat(positions, 3, axis=1))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), got, want)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_ignore_padding_and_neighbours(name):
    model, params = tiny(name)
    ids, new = tokens(13, 2, 30), tokens(14, 2, 6, 5)
    # In the second row nothing is weighted: it is there for the shapes of `fork_gradient`.
    segments = np.asarray(
        [[0] * 2 + [1] * 10 + [2] * 9 + [0] * 1 + [3] * 5 + [0] * 3, [1] * 30], np.int32
    )
    documents = [slice(2, 12), slice(12, 21), slice(22, 27)]
    positions = np.asarray([[7, 21, 25] * 2, [0] * 6])
    weights = np.zeros((2, 30, 16), np.float32), np.zeros((2, 6, 5, 16), np.float32)
    whole, continued = [], []
    for r, document in enumerate(documents):
        weights[0][0, document] = draw(r, document.stop - document.start, 16)
        weights[1][0, r] = draw(r, 5, 16)
        whole.append((ids[0, document], weights[0][0, document]))
        prefix = ids[0, document.start : positions[0, r]]
        continued.append((np.concatenate([prefix, new[0, r]]), weights[1][0, r]))
    assert_same_gradients(
        fork_gradient(model, params, ids, segments, positions, new, weights)[1],
        prefix_gradient(model, params, whole + continued),
        BACKWARD.get(name, 1e-4),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_recomputation_changes_no_gradient(name):
    model, params = tiny(name)
    # Of the shapes of `prefix_gradient`, whose program this is without recomputation.
    ids, weights = tokens(15, 8, 42), draw(0, 8, 42, 16)
    want = row_gradient(model, params, ids, weights)
    for remat in ("dots", "full"):
        other = Model(model.config, dataclasses.replace(model.policy, remat=remat))
        assert_same_gradients(row_gradient(other, params, ids, weights), want, 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_near_float32(name):
    """Activations in bfloat16, states in float32.

    The yardstick is float32 with the weights alone rounded to bfloat16: what no bfloat16 model can
    avoid. Rounded activations may add to it, but not much (measured: 0.7 to 1.9 times in all).
    """
    model, params = tiny(name)
    low = Model(model.config, dataclasses.replace(model.policy, compute_dtype="bfloat16"))
    ids, new = tokens(17, 2, 30), tokens(18, 2, 2, 5)
    positions = np.asarray([[4, 20], [8, 30]])

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, params):
        hidden, trace = model.forward(params, ids, with_trace=True)
        state = model.fork(params, trace, positions)
        return (hidden, model.forward_forks(params, trace, positions, new)), state

    def errors(outputs):
        pairs = zip(outputs, exact, strict=True)
        return [np.linalg.norm(np.float32(x) - y) / np.linalg.norm(y) for x, y in pairs]

    exact, _ = run(model, params)
    rounded, _ = run(
        model, jax.tree.map(lambda w: np.asarray(w).astype(jnp.bfloat16).astype(np.float32), params)
    )
    outputs, state = run(low, params)
    for output, error, unavoidable in zip(outputs, errors(outputs), errors(rounded), strict=True):
        assert output.dtype == jnp.bfloat16
        assert 1e-5 < error < 3 * unavoidable
    if name in HYBRIDS:
        state = state["linear_attention"]
    fast_weights = (state.fast, state.sums) if name == "lact" else state.memory
    assert {leaf.dtype for leaf in jax.tree.leaves(fast_weights)} == {jnp.dtype("float32")}


PERIODIC = {"layer_types": None, "full_attention_interval": 3}


@pytest.mark.parametrize(
    ("name", "few", "many"), [("lact", 2, 12), ("deltanet", 2, 12), ("qwen", 12, 24)]
)
def test_depth_adds_no_code(name, few, many):
    """Layers are scanned: the program of many layers is as long as that of few."""

    def size(layers):
        periodic = PERIODIC if name == "qwen" else {}
        fields = CONFIGS[name] | periodic | {"num_hidden_layers": layers}
        model = Model(model_config(fields))
        params = model.abstract_params()
        ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
        positions = jax.ShapeDtypeStruct((2, 3), jnp.int32)
        new = jax.ShapeDtypeStruct((2, 3, 5), jnp.int32)

        def loss(params, ids, positions, new):
            trunk = read_rows(model, params, {"tokens": ids}, with_trace=True)
            scores = score_rollouts(model, params, trunk.hidden, trunk.trace, positions, new)
            return trunk.nll_sum + scores.log_probs.sum()

        return len(jax.jit(jax.grad(loss)).lower(params, ids, positions, new).as_text().split("\n"))

    assert size(many) == size(few)


@pytest.mark.parametrize("name", ["lact", "lact_prenorm"])
def test_rollouts_are_the_same_where_states_stay_as_they_are(monkeypatch, name):
    """As on accelerators: every step reads a rollout's tokens from the fork's state once more."""
    model, params = tiny(name)
    starts = jnp.asarray([[1, 7, 8, 20], [3, 5, 15, 31]])  # some rollouts cross chunks of 8
    keys = jax.random.split(jax.random.key(3))

    @functools.partial(jax.jit, static_argnums=2)
    def sample(params, ids, again):
        monkeypatch.setattr(rollout, "_reads_again", lambda *_: again)
        hidden, trace = model.forward(params, ids, with_trace=True)
        forks = rollout.fork_rollouts(model, params, hidden, trace, starts, 6)
        options = {"rollout_length": 6, "forbidden_token": 2}
        return rollout.sample_rollouts(model, params, *forks, keys, **options)

    ids = tokens(4, 2, 32)
    in_steps, again = (sample(params, ids, again) for again in (False, True))
    np.testing.assert_array_equal(again, in_steps)
    assert len(np.unique(again)) > 10
