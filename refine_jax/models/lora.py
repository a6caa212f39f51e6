"""Low-rank updates of linear maps (LoRA, arXiv 2106.09685), as the peft package has them.

A map W [out, in] with an update computes `W x + s B (A x)`, with A [r, in], B [out, r] and
s = alpha / r. In the parameters the update stands beside the weight, stacked over layers like it:

    {"weight": [L, out, in], "lora_A": [L, r, in], "lora_B": [L, out, r], "lora_scale": [L]}

The product `B A` is added to W only by `merge`, not while a model runs. So W has no gradient, which
saves a third of a linear map's operations in a step, no layer has a second copy of its weights, and
where many updates run at once (vmap over A and B) the tokens of all of them meet W in one product.
Linear maps add the update themselves (`layers.Linear`): rows, forks and decode states need to know
nothing.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from refine_jax.base.errors import ModelConfigError
from refine_jax.base.files import short
from refine_jax.models.layers import LowRankUpdate
from refine_jax.models.trainable import Params
from refine_jax.settings import listed

LEAVES = ("lora_A", "lora_B", "lora_scale")
RANK, ALPHA = 8, 16.0


@dataclasses.dataclass(frozen=True)
class LoRA:
    """What updates there are.

    rank: r. alpha: s r. targets: the linear maps that have one, by names such as
    "layers.attn.q_proj".
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LoRA:
        """From JSON values of the fields; raises KeyError, TypeError or ValueError for others."""
        return cls(int(fields["rank"]), float(fields["alpha"]), tuple(map(str, fields["targets"])))

    @property
    def scale(self) -> float:
        """s, the factor of an update."""
        return self.alpha / self.rank


def linear_maps(params: Params) -> dict[str, Any]:
    """The weights [L, out, in] of the layers' linear maps by name, as `LoRA.targets` has it."""
    return {
        ".".join(path[:-1]): x
        for path, x in _leaves(params)
        if path[0] == "layers" and path[-1] == "weight" and x.ndim == 3
    }


def _leaves(tree: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, x in tree.items():
        if isinstance(x, Mapping):
            yield from _leaves(x, (*path, name))
        else:
            yield (*path, name), x


def choose_targets(params: Params, patterns: str) -> tuple[str, ...]:
    """The linear maps that have one of the names or patterns, joined by commas; "*": all.

    A name is the last part of a map's own, such as `q_proj`; a pattern is of the whole name, such
    as `*.mlp.*`. Raises ModelConfigError: none has.
    """
    known, chosen = list(linear_maps(params)), set()
    for pattern in listed(patterns):
        found = [
            name
            for name in known
            if name.rpartition(".")[2] == pattern or fnmatch.fnmatchcase(name, pattern)
        ]
        if not found:
            raise ModelConfigError(
                "config.model.lora_targets must be names or patterns of linear maps of the layers. "
                f"Got: {short(pattern)}. This model has: {', '.join(known)}."
            )
        chosen.update(found)
    return tuple(name for name in known if name in chosen)


def init_updates(params: Params, lora: LoRA, key: jax.Array) -> Params:
    """Draw updates that change nothing yet: A as the peft package does, B = 0; float32.

    params: of the model, or their shapes. Each update is drawn by its name alone.
    """

    def draw(name: str, weight: Any) -> Params:
        layers, size_out, size_in = weight.shape
        own, bound = jax.random.fold_in(key, zlib.crc32(name.encode())), 1 / math.sqrt(size_in)
        shape = (layers, lora.rank, size_in)
        return {
            "lora_A": jax.random.uniform(own, shape, jnp.float32, -bound, bound),
            "lora_B": jnp.zeros((layers, size_out, lora.rank), jnp.float32),
            "lora_scale": jnp.full((layers,), lora.scale, jnp.float32),
        }

    weights = linear_maps(params)
    return _nested({name: draw(name, weights[name]) for name in lora.targets})


def abstract_updates(params: Params, lora: LoRA) -> Params:
    """Shapes and dtypes of `init_updates`."""
    return jax.eval_shape(lambda key: init_updates(params, lora, key), jax.random.key(0))


def _nested(updates: Mapping[str, Params]) -> Params:
    """The nested dict of updates by the names of their maps."""
    root: Params = {}
    for name, update in updates.items():
        node = root
        for part in name.split("."):
            node = node.setdefault(part, {})
        node.update(update)
    return root


def take_updates(params: Params) -> tuple[Params, Params]:
    """Cut parameters in those of the model itself, and its updates."""

    def part(tree: Params, keeps: Callable[[str], bool]) -> Params:
        found = {}
        for name, x in tree.items():
            if not isinstance(x, Mapping):
                if keeps(name):
                    found[name] = x
            elif inner := part(x, keeps):
                found[name] = inner
        return found

    return part(params, lambda n: n not in LEAVES), part(params, lambda n: n in LEAVES)


def attach(module: nnx.Module, updates: Params) -> None:
    """Give the linear maps of a layer their updates, which lead with no L."""
    if "lora_A" in updates:
        module.update = nnx.data(LowRankUpdate(*(updates[name] for name in LEAVES)))
        return
    for name, inner in updates.items():
        attach(getattr(module, name), inner)


def merge(params: Params) -> Params:
    """Add the updates to their weights, in float32, and leave them out; arrays stay where they are.

    params: of numpy or jax arrays.
    """
    if "lora_A" in params:
        weight, *update = (params[name] for name in ("weight", *LEAVES))
        rest = {name: x for name, x in params.items() if name not in LEAVES}
        return rest | {"weight": _merged(weight, *update)}
    return {name: merge(x) if isinstance(x, Mapping) else x for name, x in params.items()}


def _merged(weight, a, b, scale):
    """W + s B A of all layers, one by one."""
    if isinstance(weight, jax.Array):

        def add(weight, a, b, scale):
            product = jnp.matmul(b, a, precision=lax.Precision.HIGHEST)
            return (weight.astype(jnp.float32) + scale * product).astype(weight.dtype)

        return jax.jit(lambda *x: lax.map(lambda x: add(*x), x))(weight, a, b, scale)
    merged = np.empty_like(weight)
    for layer in range(len(weight)):
        product = np.asarray(b[layer], np.float32) @ np.asarray(a[layer], np.float32)
        merged[layer] = np.asarray(weight[layer], np.float32) + np.float32(scale[layer]) * product
    return merged
