"""Operations of a program, counted in its jaxpr with loops multiplied out; and those of a model.

Only products of matrices count, 2 for each multiplication and addition. Shapes in a jaxpr are those
of whole arrays, inside a `shard_map` those of one device.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator

from refine_jax.models.config import Architecture, LaCTConfig
from refine_jax.models.layer_config import AttentionConfig


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas call: its name, the shapes of its results, the operations of one call."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    flops: float


def count_flops(jaxpr) -> tuple[float, set[Kernel]]:
    """Count operations of a jaxpr on all devices, Pallas kernels included; list the kernels.

    Of branches the most expensive one counts, but in kernels those that the step of the grid
    decides, and in splash attention those that causality leaves. A loop without a known number of
    turns counts as one, one that compares its counter with a constant as that many.
    """
    kernels: set[Kernel] = set()
    return _count(getattr(jaxpr, "jaxpr", jaxpr), kernels, {}), kernels


def _count(jaxpr, kernels: set[Kernel], known: dict) -> float:
    """known: integers by variable, in kernels those that follow from the step of the grid."""
    total = 0.0
    for equation in jaxpr.eqns:
        if "grid" in known:
            _evaluate(equation, known)
        total += _equation(equation, kernels, known)
    return total


def _equation(equation, kernels: set[Kernel], known: dict) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        left = equation.invars[0].aval.shape
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(left[axis] for axis in contracted)
        return 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        numbers, right = params["dimension_numbers"], equation.invars[1].aval.shape
        filter_size = math.prod(right) / right[numbers.rhs_spec[0]]
        return 2.0 * filter_size * math.prod(equation.outvars[0].aval.shape)
    if name == "pallas_call":
        work = _kernel_flops(params, kernels)
        shapes = tuple(tuple(var.aval.shape) for var in equation.outvars)
        kernels.add(Kernel(params["name"] or "", shapes, work))
        return work
    if name == "cond":
        branches, taken = params["branches"], _value(equation.invars[0], known)
        if taken is not None:
            branches = [branches[min(max(taken, 0), len(branches) - 1)]]
        return max(
            _count(branch.jaxpr, kernels, _passed(branch.jaxpr, equation.invars[1:], known))
            for branch in branches
        )
    if name == "while":
        turns = _turns(params["cond_jaxpr"].jaxpr)
        return turns * _count(params["body_jaxpr"].jaxpr, kernels, _grid(known))
    inner = 0.0
    for callee in _inner(params):
        same = name != "scan" and len(callee.invars) == len(equation.invars)
        inside = _passed(callee, equation.invars, known) if same else _grid(known)
        inner += _count(callee, kernels, inside)
    if name == "scan":
        return params["length"] * inner
    if name == "shard_map":
        sizes = params["mesh"].shape
        return inner * math.prod(sizes[axis] for axis in params["newly_manual_axes"])
    return inner


def _kernel_flops(params, kernels: set[Kernel]) -> float:
    """Count operations of one call: of each step of its grid."""
    # The size of a grid may be known only when the program runs.
    grid = tuple(d if isinstance(d, int) else 1 for d in params["grid_mapping"].grid)
    used = sorted(_branching_axes(params["jaxpr"], len(grid)))
    rest = math.prod(size for axis, size in enumerate(grid) if axis not in used)
    total = 0.0
    for steps in itertools.product(*(range(grid[axis]) for axis in used)):
        place = dict(zip(used, steps, strict=True))
        total += _count(params["jaxpr"], kernels, {"grid": grid, "place": place})
    return rest * total * _causal_share(params["name"] or "", grid)


def _causal_share(name: str, grid: tuple[int, ...]) -> float:
    """Share of the steps of a kernel of jax's splash attention that causality leaves.

    A table of the mask decides, which the jaxpr does not show. With a window the grid has fewer
    blocks of keys than of queries, and all of them count.
    """
    blocks = max(grid, default=1)
    if not name.startswith("splash_") or grid.count(blocks) < 2:
        return 1.0
    return (blocks + 1) / (2 * blocks)


def _branching_axes(jaxpr, axes: int) -> set[int]:
    """List axes of the grid that a kernel asks for its place on, if it branches at all."""
    text = {equation.primitive.name for equation in jaxpr.eqns}
    if "cond" not in text:
        return set()
    asked = [e.params["axis"] for e in jaxpr.eqns if e.primitive.name == "program_id"]
    return {axis for axis in asked if axis < axes}


# These are primitives of jax by name; those in the first line are called as in Python's `operator`.
_ALIKE = ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul")
_INTEGER_OPERATIONS = {name: getattr(operator, name) for name in _ALIKE} | {
    **{"and": operator.and_, "or": operator.or_, "not": operator.not_, "max": max, "min": min},
    **{"div": operator.floordiv, "rem": operator.mod, "convert_element_type": int, "squeeze": int},
}


def _evaluate(equation, known: dict) -> None:
    """Note the integer that an equation gives, if it follows from what is known."""
    name = equation.primitive.name
    integer = None
    if name == "program_id":
        integer = known["place"].get(equation.params["axis"])
    elif name == "num_programs":
        integer = known["grid"][equation.params["axis"]]
    elif name in _INTEGER_OPERATIONS:
        values = [_value(var, known) for var in equation.invars]
        negative = name in ("div", "rem") and any(v is None or v < 0 for v in values)
        if None not in values and not negative and 0 not in values[1:] * (name == "div"):
            integer = int(_INTEGER_OPERATIONS[name](*values))
    if integer is not None:
        known[equation.outvars[0]] = integer


def _value(var, known: dict) -> int | None:
    value = getattr(var, "val", None)
    if value is None:
        return known.get(var)
    return int(value) if getattr(value, "ndim", 0) == 0 else None


def _grid(known: dict) -> dict:
    return {key: known[key] for key in ("grid", "place") if key in known}


def _passed(jaxpr, operands, known: dict) -> dict:
    """Pass what is known into a call of `jaxpr`."""
    values = {
        var: value
        for var, operand in zip(jaxpr.invars, operands, strict=True)
        if "grid" in known and (value := _value(operand, known)) is not None
    }
    return _grid(known) | values


def _inner(params) -> Iterator:
    for value in params.values():
        for callee in value if isinstance(value, tuple | list) else (value,):
            callee = getattr(callee, "jaxpr", callee)
            if hasattr(callee, "eqns"):
                yield callee


def _turns(condition) -> int:
    limits = [
        int(equation.invars[1].val)
        for equation in condition.eqns
        if equation.primitive.name == "lt" and hasattr(equation.invars[1], "val")
    ]
    return max(min(limits, default=1), 1)


def matrix_parameters(config: Architecture) -> int:
    """Count the parameters of a layer's matrices that every token is multiplied with."""
    width, hidden = config.hidden_size, config.mlp_size
    mlp = 3 * width * hidden
    if isinstance(config, LaCTConfig):
        rates = 3 * config.num_lact_heads * config.lr_dim * width
        momentum = config.num_lact_heads * width if config.use_momentum else 0
        scale = config.num_lact_heads * width if config.learnable_ttt_scale else 0
        return 4 * width**2 + rates + momentum + scale + mlp
    keys = config.num_heads * config.key_dim
    values = config.num_value_heads * config.value_dim
    gate = width * values if config.use_gate else 0
    decay = width * config.num_value_heads if hasattr(config, "head_dim") else 0
    beta = width * config.num_value_heads if getattr(config, "use_beta", True) else 0
    return width * (2 * keys + values) + values * width + gate + decay + beta + mlp


def mixer_flops(config: Architecture, length: int) -> float:
    """Count operations a token of a mixer, without projections, forward over `length` tokens.

    Attention: the scores and sums over the window. LaCT: the fast weights applied, and the three
    matrices' updates, for all chunks but the last. Delta rule: reading from the state and writing
    to it, `S k`, `v k^T` and `S q`, which the chunk-wise form can only exceed.
    """
    if not isinstance(config, LaCTConfig):
        return 6.0 * config.num_value_heads * config.key_dim * config.value_dim
    window = min(config.window_size, length)
    # The first tokens of a row see less than a window.
    seen = window - window * (window - 1) / (2 * length)
    attention = 4.0 * config.hidden_size * seen
    d, hidden, heads = config.lact_head_dim, config.fast_hidden, config.num_lact_heads
    chunks = -(-length // config.lact_chunk_size)
    updated = (chunks - 1) * config.lact_chunk_size / length
    return attention + 2.0 * heads * d * hidden * (3 + 6 * updated)


def forward_flops(config: Architecture, length: int) -> float:
    """Count operations a token of a forward pass over `length`, the head's logits included."""
    head = 2.0 * config.vocab_size * config.hidden_size
    if config.layer_kinds is None:
        layer = 2.0 * matrix_parameters(config) + mixer_flops(config, length)
        return config.num_hidden_layers * layer + head
    return head + sum(_hybrid_layer_flops(config, kind, length) for kind in config.layer_kinds)


def _hybrid_layer_flops(config: Architecture, kind: str, length: int) -> float:
    """Count operations a token of a layer of a hybrid model, with its MLP."""
    part, width = config.layer_config(kind), config.hidden_size
    mlp = 3 * width * config.mlp_size
    if isinstance(part, AttentionConfig):
        queries, keys = part.num_heads * part.head_dim, part.num_kv_heads * part.head_dim
        window = min(part.window or length, length)
        seen = window - window * (window - 1) / (2 * length)
        matrices = width * (queries * (3 if part.gated else 2) + 2 * keys)
        return 2.0 * (matrices + mlp) + 4.0 * queries * seen
    if part is config:
        return 2.0 * matrix_parameters(config) + mixer_flops(config, length)
    keys, values = part.num_heads * part.key_dim, part.num_value_heads * part.value_dim
    matrices = width * (2 * keys + 3 * values + 2 * part.num_value_heads)
    return 2.0 * (matrices + mlp) + 6.0 * values * part.key_dim
