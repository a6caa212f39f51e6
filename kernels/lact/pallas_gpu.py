"""The LaCT fast-weight op on GPUs: Pallas kernels by way of Triton.

Every pass of the op is some products of [C, d] by [d, F], a formula of them element by element, and
products of the results [C, F] with something else:

    read                  gate, up                          -> hidden
    its backward pass     gate, up, d_hidden                -> hidden, d_gate, d_up
    update sums           gate, up, error                   -> the left factors of the three sums
    their backward pass   those, three of the sums' gradients -> factors, d_gate, d_up, d_error

One kernel, `_fused`, does the first half: a program a block of tokens and of F forms all products
of its block together, reads q, k or v once for them, and writes the results of the formula in the
operand dtype. Left to XLA these would be float32 arrays [C, F] in memory, two to six a pass. The
plain products that follow are XLA's (cuBLAS), and so is the small update of the weights between
chunks. All chunks are read in one call; nothing [C, F] is kept for the backward pass.

Tested in interpret mode and compiled ahead of time for A100 and H100; none of it has run on a GPU.
Block sizes and warps come from the compiler's register counts, not from timings.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from refine_jax.kernels import triton
from refine_jax.kernels.lact.reference import FastState, Weights
from refine_jax.kernels.lact.xla import lact_by_parts
from refine_jax.kernels.numerics import einsum, pad_axes

_BLOCK = 64  # tokens, columns of F and of d in one product
_FEW_PRODUCTS = 3  # whose sums [64, 64] fit the registers


def lact_pallas_gpu(q, k, v, rates, momentum, weights, **keywords) -> tuple[jax.Array, FastState]:
    """Run `lact` of api.py, with its shapes: q [B, N, H, C, d]; interpreted on a CPU.

    Raises:
      ValueError: for arrays of other dtypes than float32 and bfloat16.
    """
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"lact with implementation='pallas_gpu': q must be float32 or bfloat16. Got: {q.dtype}."
        )
    return lact_by_parts(_read, _sums, q, k, v, rates, momentum, weights, **keywords)


@jax.custom_vjp
def _read(weights: Weights, q: jax.Array) -> jax.Array:
    """`W1 (silu(W0 q) * (W2 q))` for q [..., C, d] and weights with the same leading axes."""
    (hidden,) = _fused(
        _hidden,
        products={"gate": ("q", "w0"), "up": ("q", "w2")},
        tokens={"q": q},
        weights={"w0": weights.w0, "w2": weights.w2},
        outputs=("hidden",),
    )
    return einsum("...cf,...df->...cd", hidden, weights.w1, q.dtype).astype(q.dtype)


def _read_forward(weights, q):
    return _read(weights, q), (weights, q)


def _read_backward(residuals, d_out):
    weights, q = residuals
    product = functools.partial(einsum, dtype=q.dtype)
    hidden, d_gate, d_up = _fused(
        _hidden_gradients,
        products={"gate": ("q", "w0"), "up": ("q", "w2"), "d_hidden": ("d_out", "w1")},
        tokens={"q": q, "d_out": d_out},
        weights=weights._asdict(),
        outputs=("hidden", "d_gate", "d_up"),
    )
    d_q = product("...cf,...fd->...cd", d_gate, weights.w0)
    d_q += product("...cf,...fd->...cd", d_up, weights.w2)
    d_weights = Weights(
        product("...cf,...cd->...fd", d_gate, q),
        product("...cd,...cf->...df", d_out, hidden),
        product("...cf,...cd->...fd", d_up, q),
    )
    return d_weights, d_q.astype(q.dtype)


_read.defvjp(_read_forward, _read_backward)


@jax.custom_vjp
def _sums(weights: Weights, k: jax.Array, v: jax.Array, rates: jax.Array) -> Weights:
    """`update_sums` of xla.py."""
    k0, k2 = _rated_keys(k, rates)
    x0, x1, x2 = _fused(
        _factors,
        products={"gate": ("k", "w0"), "up": ("k", "w2"), "error": ("v", "w1")},
        tokens={"k": k, "v": v},
        weights=weights._asdict(),
        outputs=("x0", "x1", "x2"),
        **_rates_of_kernel(rates),
    )
    product = functools.partial(einsum, dtype=k.dtype)
    return Weights(
        product("...cf,...cd->...fd", x0, k0),
        product("...cd,...cf->...df", v, x1),
        product("...cf,...cd->...fd", x2, k2),
    )


def _sums_forward(weights, k, v, rates):
    return _sums(weights, k, v, rates), (weights, k, v, rates)


def _sums_backward(residuals, d_sums):
    weights, k, v, rates = residuals
    k0, k2 = _rated_keys(k, rates)
    product = functools.partial(einsum, dtype=k.dtype)
    products = {"gate": ("k", "w0"), "up": ("k", "w2"), "error": ("v", "w1")}
    products |= {"d_x0": ("k0", "d_sum0"), "d_x1": ("v", "d_sum1"), "d_x2": ("k2", "d_sum2")}
    *results, d_rates = _fused(
        _factor_gradients,
        products=products,
        tokens={"k": k, "v": v, "k0": k0, "k2": k2},
        weights=weights._asdict() | {"d_sum0": d_sums.w0, "d_sum1": d_sums.w1, "d_sum2": d_sums.w2},
        outputs=("x0", "x1", "x2", "d_gate", "d_up", "d_error"),
        rate_gradients=True,
        **_rates_of_kernel(rates),
    )
    x0, x1, x2, d_gate, d_up, d_error = results
    d_weights = Weights(
        product("...cf,...cd->...fd", d_gate, k),
        product("...cd,...cf->...df", v, d_error),
        product("...cf,...cd->...fd", d_up, k),
    )
    d_k = product("...cf,...fd->...cd", d_gate, weights.w0)
    d_k += product("...cf,...fd->...cd", d_up, weights.w2)
    d_k0 = product("...cf,...fd->...cd", x0, d_sums.w0)
    d_k2 = product("...cf,...fd->...cd", x2, d_sums.w2)
    if rates.shape[-1] == 1:
        d_k += d_k0 + d_k2
    else:
        d_k += d_k0 * rates[..., 0, :] + d_k2 * rates[..., 2, :]
        d_rates = jnp.stack([d_k0 * k, d_rates, d_k2 * k], axis=-2)
    d_v = product("...cf,...df->...cd", d_error, weights.w1)
    d_v += product("...cf,...df->...cd", x1, d_sums.w1)
    return d_weights, d_k.astype(k.dtype), d_v.astype(v.dtype), d_rates


_sums.defvjp(_sums_forward, _sums_backward)


def _rated_keys(k, rates):
    """Right factors of the sums of W0 and W2: rates of one channel are put into the left ones."""
    if rates.shape[-1] == 1:
        return k, k
    return (k * rates[..., 0, :]).astype(k.dtype), (k * rates[..., 2, :]).astype(k.dtype)


def _rates_of_kernel(rates):
    """What of the rates [..., C, 3, E] the kernel multiplies: [..., 3, C], or of W1 [..., C, F]."""
    if rates.shape[-1] == 1:
        return {"token_rates": jnp.swapaxes(rates[..., 0], -1, -2)}
    return {"hidden_rates": rates[..., 1, :]}


def _silu(gate):
    """silu and its derivative."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return silu, sigmoid + silu * (1 - sigmoid)


def _hidden(x, rates):
    del rates
    return {"hidden": _silu(x["gate"])[0] * x["up"]}


def _hidden_gradients(x, rates):
    del rates
    silu, slope = _silu(x["gate"])
    return {
        "hidden": silu * x["up"],
        "d_gate": x["d_hidden"] * x["up"] * slope,
        "d_up": x["d_hidden"] * silu,
    }


def _factors(x, rates):
    """Left factors [C, F] of the three sums, of gate = W0 k, up = W2 k and error = W1^T v."""
    silu, slope = _silu(x["gate"])
    rate0, rate1, rate2 = rates
    return {
        "x0": x["error"] * x["up"] * slope * rate0,
        "x1": silu * x["up"] * rate1,
        "x2": x["error"] * silu * rate2,
    }


def _factor_gradients(x, rates):
    """The factors again, and gradients of gate, up and error for d_x0, d_x1, d_x2; and of rates."""
    gate, up, error = x["gate"], x["up"], x["error"]
    rate0, rate1, rate2 = rates
    sigmoid = jax.nn.sigmoid(gate)
    silu, slope = _silu(gate)
    bend = sigmoid * (1 - sigmoid) * (2 + gate * (1 - 2 * sigmoid))  # second derivative of silu
    x0, x1, x2 = error * up * slope, silu * up, error * silu
    d_x0, d_x1, d_x2 = x["d_x0"] * rate0, x["d_x1"] * rate1, x["d_x2"] * rate2
    return {
        "x0": x0 * rate0,
        "x1": x1 * rate1,
        "x2": x2 * rate2,
        "d_gate": up * (d_x0 * error * bend + d_x1 * slope) + d_x2 * error * slope,
        "d_up": d_x0 * error * slope + d_x1 * silu,
        "d_error": d_x0 * up * slope + d_x2 * silu,
        "d_rate0": x["d_x0"] * x0,
        "d_rate1": x["d_x1"] * x1,
        "d_rate2": x["d_x2"] * x2,
    }


def _fused(
    formula,
    *,
    products,
    tokens,
    weights,
    outputs,
    token_rates=None,
    hidden_rates=None,
    rate_gradients=False,
):
    """Results [..., C, F] of a formula of products [C, F], in the dtype of the tokens.

    formula: of a dict of products (float32 blocks) and the three rates, returns named blocks.
    products: {name: (name in tokens, name in weights)}.
    tokens: arrays [..., C, d] of one dtype. weights: [..., F, d], but w1 and d_sum1 [..., d, F].
    token_rates: [..., 3, C] float32, or hidden_rates [..., C, F] of the second alone, or neither.
    rate_gradients: return the sums over F of d_rate0 to d_rate2 as well, as rates [..., C, 3, 1];
      with hidden_rates that of the second alone, [..., C, F].
    """
    some = next(iter(tokens.values()))
    *lead, size, dim = some.shape
    hidden = weights["w0"].shape[-2]
    count = math.prod(lead)
    sizes = [triton.rounded_size(n, _BLOCK) for n in (size, dim, hidden)]
    block, dim_block, hidden_block = (min(n, _BLOCK) for n in sizes)
    if len(products) > _FEW_PRODUCTS or some.dtype == jnp.float32:
        hidden_block = max(16, hidden_block // 2)
    if some.dtype == jnp.float32:
        dim_block = max(16, dim_block // 2)
    hidden_blocks = sizes[2] // hidden_block

    def flat(x, rows, columns, dtype=some.dtype):
        x = x.astype(dtype).reshape(count, *x.shape[-2:])
        return pad_axes(x, {1: (0, rows - x.shape[1]), 2: (0, columns - x.shape[2])})

    # Letters of axes: heads of all chunks g, tokens t, features d, hidden h, its blocks i, rates r.
    across = ("w1", "d_sum1")
    axes = dict.fromkeys(tokens, "gtd") | dict.fromkeys(outputs, "gth")
    axes |= {name: "gdh" if name in across else "ghd" for name in weights}
    axes |= {"hidden_rates": "gth", "d_hidden_rates": "gth"}
    axes |= {"token_rates": "grt", "d_token_rates": "igrt"}
    whole = {"g": count, "t": sizes[0], "d": sizes[1], "h": sizes[2], "i": hidden_blocks, "r": 3}

    def place(program, g):
        t, h = lax.div(program, hidden_blocks), lax.rem(program, hidden_blocks)
        return {"g": g, "t": t, "d": 0, "h": h, "i": h, "r": 0}

    inputs = {name: flat(x, sizes[0], sizes[1]) for name, x in tokens.items()}
    inputs |= {
        name: flat(w, *((sizes[1], sizes[2]) if name in across else (sizes[2], sizes[1])))
        for name, w in weights.items()
    }
    if token_rates is not None:
        inputs["token_rates"] = flat(token_rates, 3, sizes[0], jnp.float32)
    if hidden_rates is not None:
        inputs["hidden_rates"] = flat(hidden_rates, sizes[0], sizes[2], jnp.float32)
    written = dict.fromkeys(outputs, some.dtype)
    if rate_gradients:
        written["d_token_rates" if hidden_rates is None else "d_hidden_rates"] = jnp.float32

    results = triton.call(
        functools.partial(_kernel, formula, products, across, dim_block, tuple(written)),
        f"lact{formula.__name__}",
        (sizes[0] // block * hidden_blocks, count),
        inputs,
        written,
        axes=axes,
        sizes=whole,
        blocks=whole | {"g": None, "t": block, "h": hidden_block, "i": None},
        place=place,
        warps=4,
        stages=2,
    )
    last = results.popitem()[1] if rate_gradients else None
    found = [x[:, :size, :hidden].reshape(*lead, size, hidden) for x in results.values()]
    if not rate_gradients:
        return found
    if hidden_rates is not None:
        return *found, last[:, :size, :hidden].reshape(*lead, size, hidden)
    sums = jnp.swapaxes(last.sum(axis=0)[:, :, :size], 1, 2)
    return *found, sums.reshape(*lead, size, 3, 1)


def _kernel(formula, products, across, dim_block, outputs, **refs):
    """All products of a block of tokens and of F, then the formula."""
    shape = refs[outputs[0]].shape

    def add(i, sums):
        at = pl.ds(i * dim_block, dim_block)
        tokens = {name: refs[name][:, at] for name, _ in products.values()}
        return tuple(
            total
            + (
                triton.dot(tokens[row], refs[weight][at, :])
                if weight in across
                else triton.dot(tokens[row], refs[weight][:, at], transpose_b=True)
            )
            for total, (row, weight) in zip(sums, products.values(), strict=True)
        )

    steps = refs[next(iter(products.values()))[0]].shape[1] // dim_block
    zeros = (jnp.zeros(shape, jnp.float32),) * len(products)
    sums = lax.fori_loop(0, steps, add, zeros)
    rates = (1.0, 1.0, 1.0)
    if "token_rates" in refs:
        rates = tuple(refs["token_rates"][i, :][:, None] for i in range(3))
    elif "hidden_rates" in refs:
        rates = (1.0, refs["hidden_rates"][...], 1.0)
    results = formula(dict(zip(products, sums, strict=True)), rates)
    for name in outputs:
        ref = refs[name]
        if name == "d_token_rates":
            for i in range(3):
                ref[i, :] = jnp.sum(results[f"d_rate{i}"], axis=1)
        else:
            name = "d_rate1" if name == "d_hidden_rates" else name
            ref[...] = results[name].astype(ref.dtype)
