"""Full attention: each implementation of the op against its definition, and what forks share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIGS, tiny, tokens

from refine_jax.checkpoint.tree import flatten
from refine_jax.generation import prefill
from refine_jax.models.causal_attention import IMPLEMENTATIONS, attend, causal_attention, join
from refine_jax.models.config import model_config
from refine_jax.models.layout import Layout
from refine_jax.models.transformer import Model

ROWS, GROUPS, SHARING, LENGTH, WIDTH = 2, 2, 3, 300, 8
SEGMENTS = np.zeros((ROWS, LENGTH), np.int32)
SEGMENTS[0, 3:140], SEGMENTS[0, 140:290] = 1, 2
SEGMENTS[1, :280] = 1


def inputs(length=LENGTH):
    """q, k, v and a cotangent of the output, float32."""
    rng = np.random.default_rng(0)
    shapes = [(ROWS, GROUPS, SHARING, length, WIDTH), *[(ROWS, GROUPS, length, WIDTH)] * 2]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    return *arrays, rng.standard_normal(shapes[0]).astype(np.float32)


def definition(q, k, v, window, segments):
    """Softmax over the earlier keys of the query's own document, in float64 and T x T at once."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    slot = np.arange(q.shape[3])
    seen = slot[:, None] >= slot
    if window is not None:
        seen = seen & (slot[:, None] - slot < window)
    seen = np.broadcast_to(seen, (ROWS, *seen.shape))
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, :, None]
    scores = np.einsum("bgnqh,bgkh->bgnqk", q, k) / np.sqrt(WIDTH)
    weights = np.where(seen[:, None, None], np.exp(scores), 0)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bgnqk,bgkh->bgnqh", weights / np.where(total == 0, 1, total), v)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("name", ["xla", "splash"])
def test_equals_the_definition(name, window, packed):
    q, k, v, _ = inputs()
    layout = Layout.from_segments(jnp.asarray(SEGMENTS), 2) if packed else None
    run = functools.partial(causal_attention, implementation=name)
    got = jax.jit(run, static_argnums=3)(q, k, v, window, layout)
    want = definition(q, k, v, window, SEGMENTS if packed else None)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("name", ["xla", "splash"])
def test_gradients(name):
    """Against autodiff of a softmax over all keys at once."""
    q, k, v, cotangent = inputs(140)
    segments = SEGMENTS[:, :140]

    def plain(q, k, v):
        slot = np.arange(140)
        seen = (slot[:, None] >= slot) & (segments[:, :, None] == segments[:, None])
        scores = jnp.einsum("bgnqh,bgkh->bgnqk", q, k) / np.sqrt(WIDTH)
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
        out = jnp.einsum("bgnqk,bgkh->bgnqh", weights, v)
        return jnp.where((segments > 0)[:, None, None, :, None], out, 0)

    def ours(q, k, v):
        layout = Layout.from_segments(jnp.asarray(segments), 2)
        return causal_attention(q, k, v, None, layout, implementation=name)

    want, got = (
        jax.jit(lambda *x, f=f: jax.vjp(f, *x)[1](jnp.asarray(cotangent)))(q, k, v)
        for f in (plain, ours)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_parts_that_are_joined_are_the_whole():
    """Keys in two sets, of which some queries see one alone."""
    q, k, v, _ = inputs(60)
    q = q[:, :, 0]
    last = np.broadcast_to(np.arange(60), (ROWS, 60))
    zero = np.zeros_like(last)

    @jax.jit
    def both(q, k, v):
        whole, _ = attend(q, k, v, zero, last)
        parts = [
            attend(q, k[:, :, :25], v[:, :, :25], zero, np.minimum(last, 24)),
            attend(q, k[:, :, 25:], v[:, :, 25:], zero, last - 25),
        ]
        return join(parts), whole

    joined, whole = both(q, k, v)
    np.testing.assert_allclose(joined, whole, atol=1e-6)


def test_memory_does_not_grow_with_the_square_of_the_row():
    """The largest array of a long row's forward and backward pass is far from T x T."""
    length = 1 << 15
    shapes = [
        jax.ShapeDtypeStruct((1, 1, 2, length, 8), jnp.float32),
        *[jax.ShapeDtypeStruct((1, 1, length, 8), jnp.float32)] * 2,
    ]

    def loss(q, k, v):
        return causal_attention(q, k, v, implementation="xla").sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
    # Its arguments are 4 MiB; all pairs of queries and keys would take 8 GiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20


def test_an_implementation_that_does_not_fit_says_why():
    q, k, v, _ = inputs(16)
    with pytest.raises(ValueError, match="must be None or one of"):
        causal_attention(q, k, v, implementation="pallas")
    with pytest.raises(ValueError, match=r"'cudnn': arrays must be bfloat16.*Got: float32"):
        causal_attention(q, k, v, implementation="cudnn")
    assert sorted(IMPLEMENTATIONS) == ["cudnn", "splash", "xla"]


def test_forks_share_the_keys_and_values_of_their_row():
    """A state of R forks holds the row's once; of their own there is room for the rollout."""
    model, params = tiny("qwen")
    ids = tokens(1, 2, 64)

    def state(forks):
        def run(params, positions):
            _, trace = model.forward(params, ids, with_trace=True)
            return model.fork(params, trace, positions, horizon=4)["full_attention"]

        return jax.eval_shape(run, params, jax.ShapeDtypeStruct((2, forks), jnp.int32))

    for forks in (2, 32):
        found = state(forks)
        assert found.row.k.shape == (2, 2, 2, 64, 8)  # [L, B, G, T, hd]
        assert found.keys.shape == (2, 2, forks, 2, 4, 8)


def test_states_drop_what_leaves_the_window():
    """After 70 tokens and 90 more caches hold 64 slots, and compute what a forward pass does."""
    model, params = tiny("deltanet_hybrid")  # with a window of 7
    ids, read = tokens(1, 2, 160), 70

    @jax.jit
    def begin(params):
        hidden, trace = model.forward(params, ids[:, :read], with_trace=True)
        return hidden, model.fork(params, trace, jnp.full((2, 1), read))

    def kept(length):  # slots of the caches after a prompt
        row, lengths = jnp.zeros((1, length), jnp.int32), jnp.full((1,), length)
        state = jax.eval_shape(lambda p: prefill(model, p, row, lengths).state, params)
        return model.capacity(state)

    assert kept(64) == kept(1024) == 6
    extend = jax.jit(model.extend)
    hidden, state = begin(params)
    kind = "full_attention"
    assert state[kind].keys.shape[4] == 6
    parts = [hidden[:, None]]
    for at in range(read, 160, 30):
        state = model.with_room(state, 30)
        assert model.capacity(state) == 64 == model.room_after(at, 30)
        hidden, state = extend(params, ids[:, None, at : at + 30], state)
        parts.append(hidden)
    assert (state[kind].own == 160).all() and (state[kind].dropped > 90).all()
    want, _ = jax.jit(model.forward)(params, ids)
    got = jnp.concatenate(parts, axis=2)[:, 0]
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_more_tokens_than_a_state_has_room_for_are_refused():
    model, params = tiny("qwen")
    state = jax.jit(lambda params: model.resize(model.init_state(params, (1, 1)), 3))(params)
    with pytest.raises(ValueError, match=r"must have room for the tokens.*4 tokens, room for 3"):
        jax.eval_shape(model.extend, params, tokens(1, 1, 1, 4), state)


def turned(x, position, theta):
    """Rotary positions on halves of the last axis, by complex numbers."""
    half = x.shape[-1] // 2
    angle = position[:, None] * theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.parametrize("window", [None, 4])
def test_a_layer_of_the_published_fast_weight_code(window):
    """`fla.layers.attn.Attention` in float64: biases, norms of heads, fewer heads of keys."""
    spec = {"layers": [0], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "qk_norm": True}
    fields = CONFIGS["deltanet"] | {"num_hidden_layers": 1}
    spec |= {"window_size": window, "rope_theta": 500.0}
    model = Model(model_config(fields | {"attn": spec}))
    params = jax.tree.map(
        lambda x: x + np.random.default_rng(x.size).standard_normal(x.shape, np.float32),
        jax.device_get(jax.jit(model.init)(jax.random.key(0))),
    )
    layer = jax.tree.map(lambda x: x[0], params["layers"]["full_attention"])
    x = np.random.default_rng(3).standard_normal((1, 11, 16)).astype(np.float32)
    run = jax.jit(
        lambda layer: model._block("full_attention", layer).attn.forward(x, None, None)[0]
    )
    got = run(layer)

    names = {name: np.asarray(w, np.float64) for name, w in flatten(layer["attn"]).items()}

    def heads(name, count):
        y = x[0] @ names[f"{name}.weight"].T + names[f"{name}.bias"]
        return y.reshape(11, count, 4).swapaxes(0, 1)

    def norm(y, name):
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * names[name]

    slot = np.arange(11)
    q = turned(norm(heads("q_proj", 4), "q_norm.weight"), slot, 500.0)
    k = turned(norm(heads("k_proj", 2), "k_norm.weight"), slot, 500.0)
    v = heads("v_proj", 2)
    seen = (slot[:, None] >= slot) & (slot[:, None] - slot < (window or 11))
    out = np.zeros((11, 16))
    for head in range(4):
        weights = np.where(seen, np.exp(q[head] @ k[head // 2].T / 2), 0)
        out[:, 4 * head : 4 * head + 4] = weights @ v[head // 2] / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(got[0], out @ names["o_proj.weight"].T, atol=2e-5)
