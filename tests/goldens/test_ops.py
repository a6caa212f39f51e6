"""The golden `ops`: outputs of single functions of the official PyTorch code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import load_arrays, subtree

from refine_jax.kernels.delta_rule import IMPLEMENTATIONS as DELTA_IMPLEMENTATIONS
from refine_jax.kernels.delta_rule import delta_rule
from refine_jax.kernels.lact import IMPLEMENTATIONS, Options, Weights, lact, newton_schulz
from refine_jax.kernels.lact.reference import newton_schulz_reference
from refine_jax.kernels.numerics import l2_norm_fla
from refine_jax.kernels.window_attention import window_attention
from refine_jax.models.layers import l2_norm_lact, rms_norm, rope, short_conv

DELTA_CASES = ("delta", "delta_initial", "delta_negeig", "gated", "gated_initial")
# Between chunks pallas_gpu is the xla implementation: its tests are those of what it does inside.
LACT_IMPLEMENTATIONS = [name for name in IMPLEMENTATIONS if name != "pallas_gpu"]


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_golden_norms():
    arrays = {name: jnp.asarray(x) for name, x in load_arrays("ops", "norms.npz").items()}
    x, weight, gate = arrays["x"], arrays["weight"], arrays["gate"]
    close(l2_norm_lact(x), arrays["l2_lact"])
    close(l2_norm_fla(x), arrays["l2_delta"])
    close(rms_norm(x, weight, 1e-5), arrays["rms_eps1e5"])
    gated = rms_norm(x, weight, 1e-6) * gate / (1 + jnp.exp(-gate))
    close(gated, arrays["rms_gated_eps1e6"])


def test_golden_rope():
    arrays = load_arrays("ops", "attention_rope_conv.npz")
    positions = jnp.arange(arrays["q"].shape[1])[None]
    for name, x, shift in (("q", "q", 0), ("k", "k", 0), ("q_offset5", "q", 5)):
        got = rope(jnp.asarray(arrays[x]), (positions + shift)[..., None], 10000.0)
        close(got, arrays[f"rope_{name}"])


def test_golden_convolution():
    arrays = load_arrays("ops", "attention_rope_conv.npz")
    x, weight = jnp.asarray(arrays["conv/x"]), arrays["conv/weight"]
    before = ((0, 0), (weight.shape[-1] - 1, 0), (0, 0))
    got = short_conv(jnp.pad(x, before), jnp.asarray(weight))
    close(got, arrays["conv/out"])
    close(got / (1 + jnp.exp(-got)), arrays["conv/out_silu"])


def test_golden_windows():
    golden = load_arrays("ops", "attention_rope_conv.npz")
    q, k, v = (golden[name].swapaxes(1, 2) for name in "qkv")
    attend = jax.jit(window_attention, static_argnums=3)
    windows = [int(name[6:-4]) for name in golden if name.startswith("window")]
    assert windows
    for window in windows:
        out = np.asarray(attend(q, k, v, window)).swapaxes(1, 2)
        np.testing.assert_allclose(out, golden[f"window{window}/out"], atol=1e-5)


@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        (case, implementation)
        for implementation in sorted(DELTA_IMPLEMENTATIONS)
        for case in (DELTA_CASES[-1:] if "pallas" in implementation else DELTA_CASES)
    ],
)
def test_golden_delta_rule(case, implementation):
    golden = load_arrays("ops", "delta_rule.npz")
    want = subtree(golden, case)
    gated, initial = case.startswith("gated"), case.endswith("initial")
    arrays = {name: golden[name] for name in ("q", "k", "v", "beta")}
    arrays |= {"g": golden["g"]} if gated else {}
    if case == "delta_negeig":
        arrays["beta"] = 2 * arrays["beta"]

    def loss(arrays):
        out, final, _ = delta_rule(
            l2_norm_fla(arrays["q"]),
            l2_norm_fla(arrays["k"]),
            arrays["v"],
            arrays["beta"],
            arrays.get("g"),
            initial_state=golden["initial_state"] if initial else None,
            chunk_size=16,
            implementation=implementation,
        )
        return jnp.vdot(out, golden["cotangent"]), (out, final)

    gradients, (out, final) = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    np.testing.assert_allclose(out, want["out"], atol=1e-5)
    np.testing.assert_allclose(final, want["final_state"], atol=1e-5)
    for name in want:
        if name.startswith("grad_"):
            np.testing.assert_allclose(gradients[name[5:]], want[name], atol=1e-5)


def test_golden_newton_schulz():
    golden = load_arrays("ops", "newton_schulz.npz")
    for name in sorted({key.split("/")[0] for key in golden}):
        given = jnp.asarray(golden[f"{name}/input"])
        for function in (newton_schulz, newton_schulz_reference):
            run = jax.jit(function, static_argnums=1)
            np.testing.assert_allclose(
                run(given, "float32"), golden[f"{name}/output_f32"], atol=1e-5
            )
            # One unit in the last place of bfloat16 at the most, and almost everywhere none.
            error = np.abs(run(given, "bfloat16") - golden[f"{name}/output_bf16"])
            assert error.max() <= 2**-7 and np.mean(error > 1e-6) < 0.02, name


@pytest.mark.parametrize("implementation", LACT_IMPLEMENTATIONS)
def test_golden_lact(implementation):
    golden = load_arrays("ops", "lact_ttt.npz")
    chunk = int(golden["chunk_size"])
    length = golden["q"].shape[1]
    chunks = -(-length // chunk)

    def cut(x):  # [H, T, ...] -> [1, N, H, C, ...]
        x = np.pad(x, ((0, 0), (0, chunks * chunk - length), (0, 0)))
        return jnp.asarray(x.reshape(x.shape[0], chunks, chunk, -1).swapaxes(0, 1)[None])

    def join(x):  # the way back
        return np.asarray(x)[0].swapaxes(0, 1).reshape(x.shape[2], chunks * chunk, -1)[:, :length]

    mask = (jnp.arange(chunks * chunk) < length).reshape(1, chunks, chunk)
    q, k, v, *rates = (cut(golden[name]) for name in ("q", "k", "v", "lr0", "lr1", "lr2"))
    given = q, k, v, jnp.stack(rates, -2), cut(golden["momentum"])[..., 0]
    weights = Weights(*(jnp.asarray(golden[name]) for name in ("w0", "w1", "w2")))
    tags = sorted({key.split("/")[0] for key in golden if key.endswith("/out")})
    assert tags
    if implementation == "pallas_tpu":  # simulated; the specs have all its paths
        tags = [tag for tag in tags if f"{tag}/grad_q" in golden and "muon" not in tag]
    for tag in tags:
        muon = "muonf32" in tag
        options = Options(
            prenorm="pre" in tag, muon="float32" if muon else None, fused="fused" in tag
        )

        use_momentum = "momentum" in tag

        def run(arrays, weights, options=options, use_momentum=use_momentum):
            *arrays, momentum = arrays
            return lact(
                *arrays,
                momentum if use_momentum else None,
                weights,
                mask=mask,
                options=options,
                implementation=implementation,
            )[0]

        tolerance = 1e-4 if muon else 1e-5
        if f"{tag}/grad_q" not in golden:
            out = jax.jit(run)(given, weights)
            np.testing.assert_allclose(join(out), golden[f"{tag}/out"], atol=tolerance, err_msg=tag)
            continue

        @jax.jit
        def both(given, weights, run=run):
            value, pullback = jax.vjp(run, given, weights)
            return value, pullback(cut(golden["cotangent"]))

        out, ((dq, dk, dv, d_rates, d_momentum), d_weights) = both(given, weights)
        np.testing.assert_allclose(join(out), golden[f"{tag}/out"], atol=tolerance, err_msg=tag)
        gradients = {"q": dq, "k": dk, "v": dv, "momentum": d_momentum[..., None]}
        gradients |= {f"lr{i}": d_rates[..., i, :] for i in range(3)}
        gradients = {name: join(x) for name, x in gradients.items()}
        gradients |= d_weights._asdict()
        for name, gradient in gradients.items():
            expected = golden[f"{tag}/grad_{name}"]
            error = np.sqrt(np.mean((gradient - expected) ** 2) / np.mean(expected**2))
            assert error <= (2e-3 if muon else 2e-5), f"{tag} {name}: {error:.1e}"
