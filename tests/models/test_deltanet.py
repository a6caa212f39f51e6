"""The DeltaNet mixers against a token-by-token float64 implementation, and their laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from refine_jax.models.config import DeltaNetConfig, GatedDeltaNetConfig
from refine_jax.models.deltanet import DeltaNetMixer, DeltaState
from refine_jax.models.gated_delta import GatedDeltaNetMixer
from refine_jax.models.layout import Layout
from refine_jax.models.mixer import fork

TOKENS = 150
NEW = 66
# Rows: one with padding before, between and after two documents, one with a single full document.
SEGMENTS = np.concatenate(
    [np.repeat([0, 1, 0, 2, 0], [3, 70, 2, 66, 9])[None], np.ones((1, TOKENS), int)]
)
# Starts, ends and insides of documents and of blocks of saved states; padding.
POSITIONS = (0, 2, 3, 4, 64, 65, 73, 74, 75, 76, 128, 129, 139, 141, 150)

_COMMON = {"vocab_size": 11, "hidden_size": 12, "num_hidden_layers": 1}
_DELTA = functools.partial(DeltaNetConfig, **_COMMON, num_heads=2)
_GATED = functools.partial(GatedDeltaNetConfig, **_COMMON, num_heads=2, head_dim=4)
CONFIGS = {
    "released": _DELTA(),
    "no_beta_no_conv_gate": _DELTA(use_beta=False, use_short_conv=False, use_gate=True),
    "relu_two_taps": _DELTA(qk_activation="relu", conv_size=2, expand_v=0.5),
    "identity_no_conv": _DELTA(qk_activation="identity", use_short_conv=False, expand_k=2),
    "elu_sum_negative": _DELTA(qk_activation="elu", qk_norm="sum", allow_neg_eigval=True),
    "silu_sum": _DELTA(qk_norm="sum", expand_k=11.0),
    "gated_groups": _GATED(num_v_heads=4),
    "gated_plain": _GATED(use_short_conv=False, use_gate=False, allow_neg_eigval=True),
}


def make(name):
    """(graph definition, perturbed parameters, config)."""
    config = CONFIGS[name]
    family = GatedDeltaNetMixer if isinstance(config, GatedDeltaNetConfig) else DeltaNetMixer
    graph, state = nnx.split(family(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: np.asarray(x) + np.float32(0.4) * rng.standard_normal(x.shape, dtype=np.float32),
        nnx.to_pure_dict(state),
    )
    if name == "silu_sum":  # keep the sums away from 0, where x / sum(x) is not continuous
        for side in ("q", "k"):
            params[f"{side}_conv1d"]["weight"] = np.abs(params[f"{side}_conv1d"]["weight"])
            params[f"{side}_proj"]["weight"] = params[f"{side}_proj"]["weight"] + 1.0
    return graph, params, config


def inputs(name):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, TOKENS, 12), dtype=np.float32)
    new = rng.standard_normal((2, len(POSITIONS), NEW, 12), dtype=np.float32)
    return (np.abs(x), np.abs(new)) if name == "silu_sum" else (x, new)


class Walk:
    """The mixer in numpy, float64, one token of one document at a time."""

    def __init__(self, config, params):
        self.config = config
        self.p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
        self.gated = isinstance(config, GatedDeltaNetConfig)
        self.memory = np.zeros((config.num_value_heads, config.key_dim, config.value_dim))
        self.seen = {side: [] for side in "qkv"}

    def copy(self):
        other = Walk(self.config, self.p)
        other.memory = self.memory.copy()
        other.seen = {side: list(rows) for side, rows in self.seen.items()}
        return other

    def tail(self, side):
        rows = self.seen[side][-(self.config.conv_size - 1) :]
        width = self.p[f"{side}_proj"]["weight"].shape[0]
        return np.stack([np.zeros(width)] * (self.config.conv_size - 1 - len(rows)) + rows)

    def token(self, x):
        config, p = self.config, self.p
        silu = lambda z: z / (1 + np.exp(-z))  # noqa: E731
        channels = {}
        for side in "qkv":
            z = p[f"{side}_proj"]["weight"] @ x
            if config.use_short_conv:
                taps = np.concatenate([self.tail(side), z[None]])
                self.seen[side].append(z)
                z = (p[f"{side}_conv1d"]["weight"][:, 0].T * taps).sum(0)
            channels[side] = z
        activation = "silu" if self.gated else config.qk_activation
        act = {
            "silu": silu,
            "relu": lambda z: np.maximum(z, 0),
            "elu": lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))) + 1,
            "identity": lambda z: z,
        }[activation]
        heads = []
        for side in "qk":
            z = act(channels[side]).reshape(config.num_heads, -1)
            if not self.gated and config.qk_norm == "sum":
                z = z / z.sum(1, keepdims=True)
            else:
                z = z / np.sqrt((z * z).sum(1, keepdims=True) + 1e-6)
            heads.append(np.repeat(z, config.num_value_heads // config.num_heads, axis=0))
        q, k = heads
        v = silu(channels["v"]).reshape(config.num_value_heads, -1)
        sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
        beta = np.ones(config.num_value_heads)
        if self.gated or config.use_beta:
            beta = sigmoid(p["b_proj"]["weight"] @ x)
        if config.allow_neg_eigval:
            beta = 2 * beta
        if self.gated:
            step = np.log1p(np.exp(p["a_proj"]["weight"] @ x + p["dt_bias"]))
            self.memory *= np.exp(-np.exp(p["A_log"]) * step)[:, None, None]
        error = v - np.einsum("hkv,hk->hv", self.memory, k)
        self.memory += np.einsum("h,hk,hv->hkv", beta, k, error)
        out = np.einsum("hkv,hk->hv", self.memory, q) * config.key_dim**-0.5
        out = out / np.sqrt((out * out).mean(1, keepdims=True) + config.norm_eps)
        out = (out * p["o_norm"]["weight"]).reshape(-1)
        if config.use_gate:
            out = out * silu(p["g_proj"]["weight"] @ x)
        return p["o_proj"]["weight"] @ out


@functools.partial(jax.jit, static_argnames="graph")
def run(graph, params, x, layout, positions, new):
    """Forward, states of the forks, and their continuation in one piece and in three."""
    mixer = nnx.merge(graph, params)
    y, trace = mixer.forward(x, layout, None)
    state = fork(mixer, trace, positions, layout, None, None)
    whole, end = mixer.extend(new, state)
    pieces, other = [], state
    for piece in (new[:, :, :1], new[:, :, 1:-1], new[:, :, -1:]):
        out, other = mixer.extend(piece, other)
        pieces.append(out)
    return y, state, whole, jnp.concatenate(pieces, axis=2), end, other


def assert_close(got, want, message=""):
    scale = max(np.abs(want).max(), 1e-3)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * scale, err_msg=message)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_token_by_token(name):
    graph, params, config = make(name)
    x, new = inputs(name)
    positions = np.tile(np.asarray(POSITIONS, np.int32), (2, 1))
    layout = Layout.from_segments(jnp.asarray(SEGMENTS), max_documents=2)
    y, state, whole, pieces, end, end_of_pieces = jax.tree.map(
        np.asarray, run(graph, params, jnp.asarray(x), layout, positions, new)
    )
    for row in range(2):
        walk, walks, want = Walk(config, params), [], np.zeros((TOKENS, 12))
        for t in range(TOKENS + 1):
            walks.append(walk)
            if t < TOKENS and SEGMENTS[row, t]:
                starts = t == 0 or SEGMENTS[row, t] != SEGMENTS[row, t - 1]
                walk = Walk(config, params) if starts else walk.copy()
                want[t] = walk.token(x[row, t])
        real = SEGMENTS[row] != 0
        assert_close(y[row, real], want[real])
        for number, p in enumerate(POSITIONS):
            walk = walks[p].copy()
            assert_close(state.memory[row, number], walk.memory, f"memory at {p}")
            for side in range(3 if config.use_short_conv else 0):
                assert_close(
                    state.tails[side][row, number], walk.tail("qkv"[side]), f"tails at {p}"
                )
            continued = np.stack([walk.token(token) for token in new[row, number]])
            assert_close(whole[row, number], continued, f"continuation of {p}")
            assert_close(pieces[row, number], continued, f"continuation of {p} in pieces")
            assert_close(end.memory[row, number], walk.memory)
            assert_close(end_of_pieces.memory[row, number], walk.memory)


def test_fork_at_zero_is_the_initial_state():
    graph, params, _ = make("released")
    x = inputs("released")[0][:, :5]

    @jax.jit
    def both(params, x):
        mixer = nnx.merge(graph, params)
        _, trace = mixer.forward(x, None, None)
        forked = fork(mixer, trace, jnp.zeros((2, 3), jnp.int32), None, None, 4)
        return forked, mixer.init_state((2, 3), x.dtype)

    forked, initial = both(params, x)
    assert isinstance(initial, DeltaState)
    jax.tree.map(np.testing.assert_array_equal, forked, initial)


@pytest.mark.parametrize("name", ["released", "gated_groups"])
def test_gradients_equal_those_of_prefixes_alone(name):
    """Gradients through trunk and forks are those of running every prefix on its own."""
    graph, params, _ = make(name)
    x, new = (jnp.asarray(z) for z in inputs(name))
    new = new[:1, :, :4]
    # Position of a fork, slots of its document before it.
    forks = ((74, range(3, 73)), (140, range(75, 140)), (129, range(75, 129)), (75, range(3, 73)))
    positions = jnp.asarray([[p for p, _ in forks]], jnp.int32)
    layout = Layout.from_segments(jnp.asarray(SEGMENTS[:1]), max_documents=2)
    documents = (range(3, 73), range(75, 141))
    rng = np.random.default_rng(7)
    weights = jnp.asarray(rng.standard_normal((len(forks), 4, 12)), jnp.float32)
    trunk_weights = jnp.asarray(rng.standard_normal((TOKENS, 12)), jnp.float32)
    trunk_weights = trunk_weights * layout.mask[0, :, None]

    def by_forks(params, x, new):
        mixer = nnx.merge(graph, params)
        y, trace = mixer.forward(x, layout, None)
        state = fork(mixer, trace, positions, layout, None, 4)
        out, _ = mixer.extend(new[:, : len(forks)], state)
        return jnp.vdot(out[0], weights) + jnp.vdot(y[0], trunk_weights)

    def by_prefixes(params, x, new):
        mixer = nnx.merge(graph, params)
        # Prefixes at the left of rows of one length: what follows does not matter.
        length = max(len(slots) for _, slots in forks) + 4
        rows, cotangents = [], []
        cases = [(slots, new[0, i], weights[i]) for i, (_, slots) in enumerate(forks)]
        cases += [(slots, None, trunk_weights[np.asarray(slots)]) for slots in documents]
        for slots, continuation, weight in cases:
            row = x[0, np.asarray(slots)]
            if continuation is not None:
                row = jnp.concatenate([row, continuation])
                weight = jnp.pad(weight, ((len(slots), 0), (0, 0)))
            after = ((0, length - len(row)), (0, 0))
            rows.append(jnp.pad(row, after))
            cotangents.append(jnp.pad(weight, after))
        y, _ = mixer.forward(jnp.stack(rows), None, None)
        return jnp.vdot(y, jnp.stack(cotangents))

    arguments = (params, x[:1], new)
    got, want = (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments) for loss in (by_forks, by_prefixes)
    )
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)
    assert not np.any(np.asarray(got[1])[0, SEGMENTS[0] == 0]), "padding got a gradient"


def test_bfloat16_keeps_the_memory_in_float32():
    graph, params, _ = make("gated_groups")
    x, new = (jnp.asarray(z[:, :9], jnp.bfloat16) for z in inputs("gated_groups"))
    positions = jnp.full((2, 9), 7, jnp.int32)
    exact = run(graph, params, x.astype(jnp.float32), None, positions, new.astype(jnp.float32))
    y, state, whole, *_ = run(graph, params, x, None, positions, new)
    assert y.dtype == whole.dtype == jnp.bfloat16
    assert state.memory.dtype == jnp.float32
    for got, want in ((y, exact[0]), (state.memory, exact[1].memory), (whole, exact[2])):
        got, want = (np.asarray(z, np.float32) for z in (got, want))
        assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)
