"""Which of a model's parameters are trained; the others are frozen.

`split` cuts the nested dict of parameters in two and `join` puts it together again. A step
differentiates, updates and saves the trained part alone: the frozen part has no gradient and no
optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Params = dict[str, Any]

TRAINABLE = ("all", "lora", "fast")

# Parts of mixers that feed the fast weights alone, or gate what is read from them.
_FAST = {
    *("w0", "w1", "w2"),  # initial values
    *("lr_proj", "b_proj", "in_proj_b"),  # rates
    *("momentum_proj", "a_proj", "in_proj_a", "A_log", "dt_bias"),  # decays
    *("qk_scale", "qk_offset", "ttt_scale_proj", "g_proj", "in_proj_z"),  # gates
}


def is_trained(path: tuple[str, ...], trainable: str) -> bool:
    """Whether the parameter at a path of names is trained.

    trainable: "all"; "lora", the low-rank updates of linear maps (lora.py); or "fast", the initial
    values, rates, decays and gates of the fast weights.
    """
    if trainable == "lora":
        return path[-1] in ("lora_A", "lora_B")
    if trainable == "fast":
        return "attn" in path and path[path.index("attn") + 1] in _FAST
    return True


def split(params: Params, trainable: str) -> tuple[Params, Params | None]:
    """Cut parameters in those that are trained and those that are frozen; None if none are."""
    if trainable == "all":
        return params, None
    return (
        _part(params, lambda path: is_trained(path, trainable)),
        _part(params, lambda path: not is_trained(path, trainable)),
    )


def _part(tree: Params, keeps: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()):
    found = {}
    for name, x in tree.items():
        here = (*path, name)
        if isinstance(x, Mapping):
            if part := _part(x, keeps, here):
                found[name] = part
        elif keeps(here):
            found[name] = x
    return found


def join(params: Params | None, more: Params | None) -> Params | None:
    """Put two parts of a nested dict together; where one is None, the other is all there is.

    Of what both have, that of the second is taken.
    """
    if params is None or more is None:
        return more if params is None else params
    both = dict(params)
    for name, x in more.items():
        both[name] = join(both[name], x) if isinstance(x, Mapping) and name in both else x
    return both


def select(tree: Params, like: Params) -> Params:
    """Take the leaves of a nested dict that `like` has, too."""
    return {
        name: select(tree[name], x) if isinstance(x, Mapping) else tree[name]
        for name, x in like.items()
        if name in tree
    }
