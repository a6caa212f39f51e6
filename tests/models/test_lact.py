"""The LaCT mixer against a token-by-token float64 implementation, and its laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from refine_jax.models.config import LaCTConfig
from refine_jax.models.lact import LaCTMixer
from refine_jax.models.layout import Layout
from refine_jax.models.mixer import fork

TOKENS, ROLLOUT = 14, 9  # 3 chunks of 4 and a part; rollouts cross two or three boundaries
BASE = {
    "hidden_size": 24, "num_attn_heads": 3, "num_lact_heads": 2, "lact_chunk_size": 4,
    "window_size": 6, "w0_w2_low_rank": 3, "muon_dtype": "float32",
}  # fmt: skip
VARIANTS = {
    "released": {},
    "prenorm": {"ttt_prenorm": True, "use_muon": True, "inter_multi": 1.5, "window_size": 30},
    "rate_channels": {"lr_dim": 12, "use_momentum": False, "ttt_nope": True,
                      "learnable_ttt_scale": False, "w0_w2_low_rank": -1},
    "fused": {"use_fused_kernel": True, "use_muon": True, "no_v_silu": True, "qkv_bias": True,
              "window_size": 1},
    "qk_norm": {"attn_qk_norm": True, "qkv_silu": False, "use_fused_kernel": True,
                "lact_chunk_size": 1},
    "grouped": {"num_attn_heads": 4, "attn_qk_norm": True, "lact_chunk_size": 7},
}  # fmt: skip


def make(name):
    """(config, graph, params) of a variant with random, far from initial, parameters."""
    config = LaCTConfig(**(BASE | VARIANTS[name]))
    graph, state = nnx.split(nnx.eval_shape(lambda: LaCTMixer(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        noise = rng.normal(size=leaf.shape)
        if "lr_proj" in name and "bias" in name:
            return 4 + noise  # rates of about 0.1: chunks matter
        if "norm" in name or "qk_scale" in name:
            return 1 + 0.2 * noise
        return noise * (0.2 if leaf.ndim == 1 else leaf.shape[-1] ** -0.5)

    params = jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(state))
    return config, graph, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# The independent implementation


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms(x, weight):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * weight


def rotate(x, position, heads, theta):
    """Rope of one vector [D], as complex numbers."""
    a, b = np.split(x.reshape(heads, -1), 2, axis=1)
    turned = (a + 1j * b) * np.exp(1j * position * theta ** (-np.arange(a.shape[1]) / a.shape[1]))
    return np.concatenate([turned.real, turned.imag], 1)


def orthogonalise(g):
    if g.shape[0] > g.shape[1]:
        return orthogonalise(g.T).T
    x = g / (np.linalg.norm(g) + 1e-7)
    for a, b, c in (
        (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
    ):  # fmt: skip
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x


class FastHead:
    """One head's fast weights, token by token."""

    def __init__(self, config, w0, w1, w2):
        self.config, self.w, self.raw = config, [w0, w1, w2], [w0, w1, w2]
        self.rows = [np.linalg.norm(w, axis=1, keepdims=True) for w in self.w]
        self.last, self.tokens = [0, 0, 0], []

    def step(self, q, k, v, rates, momentum):
        if len(self.tokens) == self.config.lact_chunk_size:
            self.update()
        self.tokens.append((k, v, rates, momentum))
        return self.w[1] @ (silu(self.w[0] @ q) * (self.w[2] @ q))

    def update(self):
        config, (w0, w1, w2) = self.config, self.w
        d = [0, 0, 0]
        for k, v, (r0, r1, r2), _ in self.tokens:
            g, m, e = w0 @ k, w2 @ k, w1.T @ v
            slope = sigmoid(g) * (1 + g * (1 - sigmoid(g)))
            d[0] = d[0] + np.outer(e * m * slope, r0 * k)
            d[1] = d[1] + np.outer(v, r1 * silu(g) * m)
            d[2] = d[2] + np.outer(e * silu(g), r2 * k)
        if config.use_momentum:
            mean = np.mean([token[3] for token in self.tokens])
            d = self.last = [a + mean * b for a, b in zip(d, self.last, strict=True)]
        if config.use_muon and config.use_fused_kernel:
            both = orthogonalise(np.concatenate([d[0], d[2]]))
            d = [both[: len(d[0])], orthogonalise(d[1]), both[len(d[0]) :]]
        elif config.use_muon:
            d = [orthogonalise(x) for x in d]
        self.raw = [a + b for a, b in zip(self.raw, d, strict=True)]
        inside = config.use_fused_kernel and not config.ttt_prenorm
        for i, raw in enumerate(self.raw):
            square = np.sum(raw * raw, 1, keepdims=True)
            norm = np.sqrt(square + 1e-5) if inside else np.sqrt(square) + 1e-5
            self.w[i] = raw / norm * self.rows[i]
        if not config.ttt_prenorm:
            self.raw = list(self.w)
        self.tokens = []


def reference_mixer(config, params, x):
    """x [T, D], one document -> y [T, D], float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64)
    heads, attn_heads, d = config.num_lact_heads, config.num_attn_heads, config.lact_head_dim

    def affine(name, x):
        return x @ p[name]["weight"].T + p[name].get("bias", 0)

    def compose(w):
        if not isinstance(w, dict):
            return w
        product = w["w_left"] @ w["w_right"]
        return product + 0.5 * np.eye(*product.shape[1:])

    w0, w2 = compose(p["w0"]), compose(p["w2"])
    fast_heads = [FastHead(config, w0[h], p["w1"][h], w2[h]) for h in range(heads)]
    keys, values, outputs = [], [], []
    for t, token in enumerate(x):
        q, k, v = np.split(affine("qkv", token), 3)
        if config.attn_qk_norm:
            q, k = rms(q, p["q_norm"]["weight"]), rms(k, p["k_norm"]["weight"])
        query = rotate(q, t, attn_heads, config.rope_theta)
        keys.append(rotate(k, t, attn_heads, config.rope_theta))
        values.append(v.reshape(attn_heads, -1))
        seen = slice(max(0, t + 1 - config.window_size), t + 1)
        scores = np.einsum("ah,tah->at", query, keys[seen]) / np.sqrt(query.shape[1])
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        attention = np.einsum("at,tah->ah", weights, values[seen]).reshape(-1)

        inputs = []
        for i, z in enumerate((q, k)):
            z = z * p["qk_scale"][:, i] + p["qk_offset"][:, i]
            z = (silu(z) if config.qkv_silu else z).reshape(heads, d)
            z = z / (np.linalg.norm(z, axis=1, keepdims=True) + 1e-5)
            if not config.ttt_nope:
                z = rotate(z.reshape(-1), t, attn_heads, config.rope_theta).reshape(heads, d)
            inputs.append(z)
        value = silu(v) if config.qkv_silu and not config.no_v_silu else v
        rates = np.log1p(np.exp(affine("lr_proj", token) + np.log(np.exp(0.001) - 1)))
        rates = rates.reshape(heads, 3, config.lr_dim)
        momentum = sigmoid(affine("momentum_proj", token)) if config.use_momentum else [0] * heads
        arguments = zip(*inputs, value.reshape(heads, d), rates, momentum, strict=True)
        fast = np.stack([h.step(*a) for h, a in zip(fast_heads, arguments, strict=True)])
        fast = rms(fast, p["ttt_norm"]["weight"])
        if config.learnable_ttt_scale:
            fast = fast * silu(affine("ttt_scale_proj", token))[:, None]
        outputs.append(affine("o_proj", attention + fast.reshape(-1)))
    return np.stack(outputs)


# The laws


def run_forward(config, graph, params, x, segments=None):
    layout = None if segments is None else Layout.from_segments(segments, max_documents=2)
    plan = LaCTMixer.plan(config, layout, x.shape[:2])
    mixer = nnx.merge(graph, params)
    return (*mixer.forward(x, layout, plan), layout, plan)


def extend(mixer, x, state):
    """What the model does with the state of its only layer."""
    y, change = mixer.extend(x, state)
    layers = [jax.tree.map(lambda leaf: leaf[None], tree) for tree in (state, change)]
    return y, jax.tree.map(lambda leaf: leaf[0], mixer.advance(*layers))


def run_forks(config, graph, splits, horizon, params, x, positions, rollouts, segments=None):
    """Forward's y; the rollouts' [B, R, S, D], from forks extended by `splits`; the last state."""
    y, trace, layout, plan = run_forward(config, graph, params, x, segments)
    mixer = nnx.merge(graph, params)
    state = fork(mixer, trace, positions, layout, plan, horizon)
    outputs, start = [], 0
    for size in splits:
        output, state = extend(mixer, rollouts[:, :, start : start + size], state)
        outputs.append(output)
        start += size
    return y, jnp.concatenate(outputs, axis=2), state


def assert_equal(got, want, config):
    """Within 1e-5 of the output's scale; Newton-Schulz amplifies rounding."""
    error = np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)
    assert error < (3e-5 if config.use_muon else 1e-5), error


@pytest.mark.parametrize(
    ("name", "in_group"),
    [*((name, 1) for name in VARIANTS if name != "grouped"), ("released", 3), ("grouped", 2)],
)
def test_forward_and_every_fork_match_token_by_token(monkeypatch, name, in_group):
    """Full rows; forks after every p, extended over chunk boundaries in uneven pieces.

    in_group: attention heads side by side, as TPUs have them.
    """
    monkeypatch.setattr("refine_jax.models.lact_layer.heads_in_group", lambda *_: in_group)
    config, graph, params = make(name)
    x, rollouts = draw(1, TOKENS, 24), draw(1, TOKENS + 1, ROLLOUT, 24, seed=1)
    positions = np.arange(TOKENS + 1)[None]
    # The first piece is longer than a chunk: `extend` cuts it into blocks and a rest.
    run = jax.jit(functools.partial(run_forks, config, graph, (5, 4), None))
    y, got, _ = run(params, x, positions, rollouts)
    assert_equal(y[0], reference_mixer(config, params, x[0]), config)
    for p in range(TOKENS + 1):
        whole = np.concatenate([x[0, :p], rollouts[0, p]])
        assert_equal(got[0, p], reference_mixer(config, params, whole)[p:], config)


@pytest.mark.parametrize("name", ["released", "prenorm"])
def test_padding_and_packing_change_nothing(name):
    """Left, middle and right padding and two documents a row, forward and forks."""
    config, graph, params = make(name)
    segments = np.zeros((2, 20), np.int32)
    segments[0, 3:9], segments[0, 9:18] = 1, 2
    segments[1, :5], segments[1, 7:20] = 1, 2
    x = draw(2, 20, 24)
    positions = np.array([[0, 2, 3, 5, 9, 13, 18, 20], [0, 1, 4, 6, 7, 8, 11, 20]])
    rollouts = draw(2, 8, 5, 24, seed=1)
    # With a horizon only the pending updates that can be needed are computed.
    run = jax.jit(functools.partial(run_forks, config, graph, (1, 4), 5))
    y, forked, _ = run(params, x, positions, rollouts, segments)
    for b in range(2):
        for document in (1, 2):
            rows = np.flatnonzero(segments[b] == document)
            assert_equal(y[b, rows], reference_mixer(config, params, x[b, rows]), config)
        for r, p in enumerate(positions[b]):
            before = segments[b, :p]
            current = before[before > 0][-1:]
            prefix = x[b, :p][before == current] if current.size else x[b, :0]
            whole = np.concatenate([prefix, rollouts[b, r]])
            assert_equal(forked[b, r], reference_mixer(config, params, whole)[-5:], config)


def test_extend_from_the_start_is_forward():
    config, graph, params = make("released")
    x = draw(1, TOKENS, 24)

    @jax.jit
    def token_by_token(params, x):
        mixer = nnx.merge(graph, params)

        def step(state, x):
            y, state = extend(mixer, x[None, None, None], state)
            return state, y[0, 0, 0]

        state = mixer.init_state((1, 1), x.dtype)
        shapes = jax.tree.map(lambda a: (a.shape, a.dtype), state)
        state, y = jax.lax.scan(step, state, x)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == shapes
        return y

    assert_equal(token_by_token(params, x[0]), reference_mixer(config, params, x[0]), config)


def test_gradients_of_forks_are_those_of_truncated_prefixes():
    config, graph, params = make("released")
    positions = np.array([[0, 2, 4, 7, 11, 14]])  # within a chunk, at boundaries, the whole row
    forks = positions.shape[1]
    x, rollouts = draw(1, TOKENS, 24), draw(1, forks, ROLLOUT, 24, seed=1)
    cotangent = draw(forks, ROLLOUT, 24, seed=2)

    def forked(params, x, rollouts):
        split = (ROLLOUT,)
        y = run_forks(config, graph, split, ROLLOUT, params, x, positions, rollouts)[1]
        return jnp.sum(y[0] * cotangent)

    def truncated(params, x, rollouts):
        # Everything behind the rollout is cut off by causality: one shape for all prefixes.
        rows = [
            jnp.concatenate([x[0, :p], rollouts[0, r], x[0, p:]])
            for r, p in enumerate(positions[0])
        ]
        y = run_forward(config, graph, params, jnp.stack(rows))[0]
        parts = [y[r, p : p + ROLLOUT] for r, p in enumerate(positions[0])]
        return jnp.sum(jnp.stack(parts) * cotangent)

    got, want = (
        jax.jit(jax.grad(f, argnums=(0, 1, 2)))(params, x, rollouts) for f in (forked, truncated)
    )
    flat, tree = jax.tree_util.tree_flatten_with_path(want)
    assert jax.tree.structure(got) == tree
    for (path, b), a in zip(flat, jax.tree.leaves(got), strict=True):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < 1e-4, f"{jax.tree_util.keystr(path)}: {error:.1e}"


def test_padding_gets_no_gradient_and_gives_none():
    """A padded, packed row of two documents has the gradients of its documents alone."""
    config, graph, params = make("released")
    segments = np.zeros((1, 20), np.int32)
    segments[0, 1:5], segments[0, 8:19] = 1, 2
    x, cotangent = draw(1, 20, 24), draw(1, 20, 24, seed=1)
    real = segments[0] > 0

    def packed(params, x):
        y = run_forward(config, graph, params, x, segments)[0]
        return jnp.sum(jnp.where(real[:, None], y[0] * cotangent[0], 0))

    def alone(params, x):
        total = 0
        for document in (1, 2):
            rows = np.flatnonzero(segments[0] == document)
            y = run_forward(config, graph, params, x[:, rows])[0]
            total += jnp.sum(y * cotangent[:, rows])
        return total

    got, want = (jax.jit(jax.grad(f, argnums=(0, 1)))(params, x) for f in (packed, alone))
    assert not np.any(np.asarray(got[1])[0, ~real])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert 0 < np.linalg.norm(b) > 1e5 * np.linalg.norm(a - b)


def test_bfloat16_keeps_states_float32():
    config, graph, params = make("released")
    x, rollouts = draw(1, TOKENS, 24), draw(1, 2, 5, 24, seed=1)
    positions = jnp.array([[6, 12]])
    run = jax.jit(functools.partial(run_forks, config, graph, (5,), 5))
    _, exact, _ = run(params, x, positions, rollouts)
    _, low, state = run(params, x.astype(jnp.bfloat16), positions, rollouts.astype(jnp.bfloat16))
    assert low.dtype == state.keys.dtype == state.values.dtype == jnp.bfloat16
    kept = jax.tree.leaves((state.fast, state.sums, state.momentum_sum))
    assert {a.dtype for a in kept} == {jnp.dtype("float32")}
    error = np.linalg.norm(low.astype(jnp.float32) - exact) / np.linalg.norm(exact)
    assert error < 0.02, error
