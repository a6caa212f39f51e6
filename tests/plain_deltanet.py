"""DeltaNet in numpy, float64, token by token, from the published formulas and weights alone.

Shares no code with the package: a reference for log-probabilities that the golden data does not
hold. Options as in `deltanet_base` (silu, l2 norm, short convolution, beta, output norm).
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def silu(x):
    return x / (1 + np.exp(-x))


def rms(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


class PlainDeltaNet:
    """`log_probs(tokens)` [T, V]: of the token that follows each of `tokens`."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        self.weights = {name: array.astype(np.float64) for name, array in weights.items()}

    def log_probs(self, tokens) -> np.ndarray:
        config, weights = self.config, self.weights
        eps = config["norm_eps"]
        x = weights["model.embeddings.weight"][np.asarray(tokens)]
        for layer in range(config["num_hidden_layers"]):
            of = {
                name.removeprefix(f"model.layers.{layer}."): array
                for name, array in weights.items()
                if name.startswith(f"model.layers.{layer}.")
            }
            x = x + self._mix(rms(x, of["attn_norm.weight"], eps), of)
            y = rms(x, of["mlp_norm.weight"], eps)
            gated = silu(y @ of["mlp.gate_proj.weight"].T) * (y @ of["mlp.up_proj.weight"].T)
            x = x + gated @ of["mlp.down_proj.weight"].T
        z = rms(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    def score(self, tokens, context: int) -> tuple[float, bool]:
        """(log-probability of the tokens after `context`, whether each is the likeliest)."""
        table = self.log_probs(tokens[:-1])[context - 1 :]
        targets = np.asarray(tokens[context:])
        chosen = table[np.arange(len(targets)), targets]
        return float(chosen.sum()), bool(np.all(table.argmax(-1) == targets))

    def greedy(self, tokens, count: int) -> list[int]:
        """`count` greedy tokens after `tokens`."""
        tokens = list(tokens)
        for _ in range(count):
            tokens.append(int(self.log_probs(tokens)[-1].argmax()))
        return tokens[-count:]

    def _mix(self, x, of):
        heads = self.config["num_heads"]

        def convolved(name):
            y = x @ of[f"attn.{name}_proj.weight"].T
            taps = of[f"attn.{name}_conv1d.weight"][:, 0]
            size = taps.shape[1]
            padded = np.concatenate([np.zeros((size - 1, y.shape[1])), y])
            y = sum(padded[j : j + len(x)] * taps[:, j] for j in range(size))
            return silu(y).reshape(len(x), heads, -1)

        def unit(y):
            return y / np.sqrt(np.sum(y * y, -1, keepdims=True) + 1e-6)

        q, k, v = unit(convolved("q")), unit(convolved("k")), convolved("v")
        beta = 1 / (1 + np.exp(-(x @ of["attn.b_proj.weight"].T)))
        state = np.zeros((heads, k.shape[-1], v.shape[-1]))
        out = []
        for t in range(len(x)):
            error = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", state, k[t]))
            state = state + k[t][:, :, None] * error[:, None]
            out.append(np.einsum("hkv,hk->hv", state, q[t] * k.shape[-1] ** -0.5))
        out = rms(np.stack(out), of["attn.o_norm.weight"], self.config["norm_eps"])
        return out.reshape(len(x), -1) @ of["attn.o_proj.weight"].T
