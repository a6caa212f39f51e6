"""The programs that `tpu_kernels.py` compiles for TPUs, at the sizes of the published models.

`case(name, implementation)` returns `(fn, args)`, the form that ahead-of-time tools take. What a
program has to do at least, whatever computes it, is stated here: the floating point operations of
the matrix products that its op needs in its chunked form (`Case.flops`, 2 m n k a product; products
that are only made again to save memory, inverses and elementwise work are not counted), and the
bytes that must pass the HBM (`least_bytes`).

Arguments have the shapes in which a layer hands them over: [B, T, H * K] of projections, and for
LaCT the chunks [B, N, H, C, d] that the elementwise work after its projections writes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from refine_jax.kernels.cross_entropy import next_token_loss
from refine_jax.kernels.cross_entropy.specs import BENCH_SPECS as CROSS_ENTROPY_SPECS
from refine_jax.kernels.cross_entropy.specs import CrossEntropySpec
from refine_jax.kernels.delta_rule import delta_rule, delta_step
from refine_jax.kernels.delta_rule.specs import DeltaSpec
from refine_jax.kernels.fork_reads import (
    ForkRows,
    Reach,
    attend_row,
    attend_windows,
    read_weights,
)
from refine_jax.kernels.lact import (
    Options,
    Weights,
    apply_fast_weights,
    lact,
    update_sums,
)
from refine_jax.kernels.lact.pallas_tpu_inputs import InputsPlan, lact_inputs, rope_tables
from refine_jax.kernels.lact.pallas_tpu_outputs import OutputsPlan, lact_outputs
from refine_jax.kernels.window_attention import window_attention
from refine_jax.kernels.window_attention.specs import BENCH_SPECS as ATTENTION_SPECS
from refine_jax.kernels.window_attention.specs import WindowAttentionSpec

PALLAS = "pallas_tpu"


@dataclasses.dataclass(frozen=True)
class Case:
    """One program.

    shape: in words. function: implementation -> fn. args: shapes of the arguments of fn.
    flops: of the products it needs. kernel: the implementation that has the Pallas kernels; None
    where XLA's program is the one used on TPUs. again: arguments that must be read twice, by the
    forward and by the backward pass. donated: arguments whose memory the results may take.
    """

    name: str
    shape: str
    function: Callable[[str | None], Callable]
    args: tuple
    flops: int
    kernel: str | None = PALLAS
    again: tuple = ()
    donated: tuple[int, ...] = ()

    def program(self, implementation: str | None) -> tuple[Callable, tuple]:
        """`(fn, args)` with the op of that name."""
        return jax.jit(self.function(implementation), donate_argnums=self.donated), self.args

    def least_bytes(self) -> int:
        """Arguments and results once, what the backward pass reads again once more."""
        results = jax.eval_shape(self.function("xla"), *self.args)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((self.args, results))) + sum(
            x.size * x.dtype.itemsize for x in jax.tree.leaves(self.again)
        )


def case(name: str, implementation: str | None = PALLAS) -> tuple[Callable, tuple]:
    """`(fn, args)` of one of CASES; implementation "xla" or that of its kernels."""
    found = CASES[name]
    return found.program(implementation if implementation == "xla" else found.kernel)


def _array(*shape: int, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _forward_and_backward(name, shape, forward, args, flops, kernel=PALLAS) -> tuple[Case, Case]:
    """The forward pass alone, and with the gradients of all arguments.

    The gradient of a product is two products of its size.
    """

    def differentiated(implementation):
        def both(cotangent, *args):
            out, pullback = jax.vjp(forward(implementation), *args)
            return out, pullback(cotangent)

        return both

    out = jax.eval_shape(forward("xla"), *args)
    both = (out, *args)
    return (
        Case(name.format("fwd"), shape, forward, args, flops, kernel),
        Case(name.format("fwdbwd"), shape, differentiated, both, 3 * flops, kernel, again=args),
    )


def _delta_cases(name, tokens, heads=16, size=128, gated=False) -> tuple[Case, Case]:
    """The delta rule of DeltaNet-1.3B: one row of T tokens, bfloat16.

    The norms of keys and queries are part of the op.
    """
    spec = DeltaSpec(name, tokens, 1, heads, heads, size, size, chunk_size=64, gated=gated)

    def forward(implementation):
        def run(q, k, v, *rates):
            q, k, v = (x.reshape(1, tokens, heads, size) for x in (q, k, v))
            out, _, _ = delta_rule(q, k, v, *rates, normalize=True, implementation=implementation)
            return out.reshape(1, tokens, heads * size)

        return run

    row = _array(1, tokens, heads * size, dtype=jnp.bfloat16)
    rates = (_array(1, tokens, heads),) * (2 if gated else 1)
    shape = f"B 1, T {tokens}, {heads} heads of {size} x {size}, bfloat16"
    return _forward_and_backward(name, shape, forward, (row, row, row, *rates), spec.flops())


def _delta_further(name, sizes, dtype=jnp.bfloat16, continued=False) -> Case:
    """The delta rule as no published model has it, 1000 tokens forward and backward.

    sizes: K and V. continued: gated, four value heads for a pair of key heads, packed documents, a
    state to begin with, states saved, and the cotangents of all outputs.
    """
    key_dim, value_dim, tokens, heads = *sizes, 1000, 4
    value_heads = 2 * heads if continued else heads
    spec = DeltaSpec(name, tokens, 1, heads, value_heads, *sizes, chunk_size=64, gated=continued)

    def forward(implementation):
        def run(q, k, v, beta, log_decay, initial_state, document):
            if document is not None:
                document = document.astype(jnp.int32)
            return delta_rule(
                *(q, k, v, beta, log_decay),
                initial_state=initial_state,
                document=document,
                save_every=128 if continued else None,
                implementation=implementation,
            )[: 3 if continued else 1]

        return run

    def array(*shape, dtype=dtype):
        return _array(1, *shape, dtype=dtype)

    key, beta = array(tokens, heads, key_dim), array(tokens, value_heads, dtype=jnp.float32)
    log_decay = initial_state = document = None
    if continued:
        log_decay, document = beta, array(tokens, dtype=jnp.float32)
        initial_state = array(value_heads, *sizes, dtype=jnp.float32)
    args = (key, key, array(tokens, value_heads, value_dim), beta)
    args = (*args, log_decay, initial_state, document)
    shape = f"B 1, T {tokens}, {value_heads} heads of {key_dim} x {value_dim}"
    return _forward_and_backward(name, shape, forward, args, spec.flops())[1]


def _lact_cases(name, tokens, d, heads=4, chunk=2048) -> tuple[Case, Case]:
    """LaCT's fast weights with momentum: one row of T tokens, bfloat16, F = d.

    A chunk is read by 3 products of 2 C d F operations a head, and its update takes 6; the last
    chunk makes none.
    """
    count = tokens // chunk

    def forward(implementation):
        def run(*args):
            return lact(*args, implementation=implementation)[0]

        return run

    slots = (1, count, heads, chunk)
    token = _array(*slots, d, dtype=jnp.bfloat16)
    weights = Weights(*(_array(heads, d, d),) * 3)
    args = (token, token, token, _array(*slots, 3, 1), _array(*slots), weights)
    flops = 2 * heads * chunk * d * d * (3 * count + 6 * (count - 1))
    shape = f"B 1, T {tokens}, {heads} heads, d = F = {d}, chunk {chunk}, momentum, bfloat16"
    return _forward_and_backward(name, shape, forward, args, flops)


def _lact_further(name, d, hidden=None, dtype=jnp.bfloat16, resets=False, **options) -> Case:
    """LaCT's fast weights as no published model has them, two chunks forward and backward.

    resets: documents begin at chunks, and the states' cotangents are given too.
    """
    heads, count, chunk = 4, 2, 2048
    hidden, options = hidden or d, Options(**options)

    def forward(implementation):
        def run(q, k, v, rates, momentum, weights, begins):
            out, states = lact(
                *(q, k, v, rates, momentum, weights),
                reset=None if begins is None else begins > 0,
                options=options,
                implementation=implementation,
            )
            return (out, states) if resets else out

        return run

    slots = (1, count, heads, chunk)
    token = _array(*slots, d, dtype=dtype)
    shapes = (heads, hidden, d), (heads, d, hidden), (heads, hidden, d)
    weights = Weights(*(_array(*shape) for shape in shapes))
    begins = _array(1, count) if resets else None
    arrays = (token, token, token, _array(*slots, 3, 1), _array(*slots))
    flops = 2 * heads * chunk * d * hidden * (3 * count + 6 * (count - 1))
    shape = f"B 1, {count} chunks of {chunk}, {heads} heads, d = {d}, F = {hidden}, momentum"
    args = (*arrays, weights, begins)
    return _forward_and_backward(name, shape, forward, args, flops)[1]


def _delta_decode(name, forks, heads=16, size=128) -> Case:
    """One token of the gated delta rule for every fork; the state is replaced in place.

    Three products of 2 K V operations a head: k S, the outer product that is added, q S.
    """

    def function(implementation):
        def step(state, *token):
            return delta_step(*token, state=state, implementation=implementation)

        return step

    vector = _array(forks, heads, size, dtype=jnp.bfloat16)
    rate = _array(forks, heads)
    args = (_array(forks, heads, size, size), vector, vector, vector, rate, rate)
    flops = 3 * 2 * forks * heads * size * size
    shape = f"{forks} forks, {heads} heads of {size} x {size}"
    return Case(name, shape, function, args, flops, donated=(0,))


def _lact_decode(name, forks, heads=4, d=384) -> Case:
    """One token of a LaCT layer inside a chunk: read the weights, add to the update's sums.

    The sums are replaced in place. 9 products of 2 d F operations a head, as in `_lact_cases`.
    """

    def function(implementation):
        del implementation  # one form for all

        def step(sums, weights, q, k, v, rates):
            out = apply_fast_weights(weights, q)
            return out, jax.tree.map(jnp.add, sums, update_sums(weights, k, v, rates))

        return step

    matrix = _array(forks, heads, d, d)
    weights = Weights(matrix, matrix, matrix)
    token = _array(forks, heads, 1, d, dtype=jnp.bfloat16)
    args = (weights, weights, token, token, token, _array(forks, heads, 1, 3, 1))
    flops = 9 * 2 * forks * heads * d * d
    shape = f"{forks} forks, {heads} heads, d = F = {d}"
    return Case(name, shape, function, args, flops, kernel=None, donated=(0,))


# The heads of Qwen 3.5 from 0.8B to 27B.
_QWEN_HEADS = tuple(
    CrossEntropySpec(f"ce_248k_{size}", 16384, 1, size, 248_320)
    for size in (1024, 2048, 2560, 4096, 5120)
)


def _cross_entropy(spec: CrossEntropySpec) -> Case:
    """Next-token loss with entropies, and its gradients for hidden states and head."""

    def function(implementation):
        def loss(hidden, head, targets, weights):
            return next_token_loss(hidden, head, targets, weights, implementation=implementation)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    rows, size, words = (spec.batch, spec.tokens), spec.size, spec.vocabulary
    args = (
        _array(*rows, size, dtype=jnp.bfloat16),
        _array(words, size),
        _array(*rows, dtype=jnp.int32),
        _array(*rows),
    )
    shape = f"T {spec.tokens}, D {size}, V {words}, bfloat16 states, float32 head"
    return Case(spec.name, shape, function, args, spec.flops())


def _attention_cases(spec: WindowAttentionSpec) -> tuple[Case, Case]:
    """Window attention of one full row, bfloat16."""
    heads = spec.heads_per_group

    def forward(implementation):
        def run(q, k, v):
            return window_attention(
                q, k, v, spec.window, heads_per_group=heads, implementation=implementation
            )

        return run

    shape = spec.batch, spec.heads // heads, spec.tokens, heads * spec.head_dim
    row = _array(*shape, dtype=jnp.bfloat16)
    shape = (
        f"B {spec.batch}, T {spec.tokens}, {spec.heads} heads of {spec.head_dim}, "
        f"window {spec.window}, bfloat16"
    )
    name = spec.name + "_{}_16k"
    return _forward_and_backward(name, shape, forward, (row, row, row), spec.flops())


def _lact_inputs_cases(name, tokens, groups=12, heads=4, chunk=2048) -> tuple[Case, Case]:
    """What attention and fast weights of LaCT-760M take of a row's queries, keys and values."""

    def forward(implementation):
        def run(q, k, v, scales):
            tables = rope_tables(jnp.arange(tokens)[None], 1e6, 64)
            return lact_inputs(plan, q, k, v, scales, tables)

        return run

    plan = InputsPlan(heads=heads, chunk=chunk, head_dim=64, silu=True, silu_values=True, rope=True)
    row = _array(1, groups, tokens, 128, dtype=jnp.bfloat16)
    scales = _array(heads, 4, groups * 128 // heads)
    shape = f"B 1, T {tokens}, {groups} groups of 128, {heads} fast-weight heads, bfloat16"
    return _forward_and_backward(name, shape, forward, (row, row, row, scales), 0)


def _fork_reads_cases(name, tokens, forks=8, count=5, groups=12, window=2048) -> tuple[Case, Case]:
    """What forks of LaCT-760M read in one of 24 layers of a row: windows, and fast weights.

    Two products of 2 W hd operations for every query and head; three of 2 d F.
    """
    layers, chunk, heads, size = 24, 2048, 4, groups * 128 // 4

    def attend(implementation):
        run = functools.partial(attend_windows, implementation=implementation)
        return lambda new, k, v, where: run(new, k, v, where, window, 2)

    def read(implementation):
        return functools.partial(read_weights, implementation=implementation)

    place = _array(forks, dtype=jnp.int32)
    where = ForkRows(_array(dtype=jnp.int32), place, place, place, place)
    new = (_array(forks, groups, count, 128, dtype=jnp.bfloat16),) * 3
    rows = _array(layers, 1, groups, tokens, 128, dtype=jnp.bfloat16)
    matrix = _array(layers, 1, tokens // chunk, heads, size, size)
    query = _array(forks, heads, count, size, dtype=jnp.bfloat16)
    shape = f"{forks} forks of {count} tokens, T {tokens}, {layers} layers, bfloat16"
    flops = 2 * forks * count * groups * 128
    return (
        Case(name.format("windows"), shape, attend, (new, rows, rows, where), 2 * flops * window),
        Case(name.format("weights"), shape, read, (query, (matrix,) * 3, where), 3 * flops * size),
    )


def _fork_rows_cases(name, tokens, queries=80, groups=12) -> tuple[Case, Case]:
    """Attention of 8 forks of 5 tokens to a row of LaCT-760M, alone and with its gradient.

    queries: Of a group of two heads. Every query is taken to meet all keys of the row, in two
    products of 2 T hd operations forward and five backward.
    """
    query = _array(1, 1, groups, queries, 128, dtype=jnp.bfloat16)
    row = _array(1, groups, tokens, 128, dtype=jnp.bfloat16)
    slot = _array(1, 1, queries, dtype=jnp.int32)
    args = query, row, row, Reach(slot, slot)
    cotangents = tuple(_array(1, 1, groups, queries, *size) for size in ((128,), ()))

    def forward(implementation):
        return lambda *args: attend_row(*args, 0.125, 2048, implementation=implementation)

    def both(implementation):
        def run(args, cotangents):
            *arrays, reach = args
            out, pullback = jax.vjp(lambda *x: forward(implementation)(*x, reach), *arrays)
            return out, pullback(cotangents)

        return run

    shape = f"{queries} queries of {groups} groups of 128, T {tokens}, bfloat16"
    flops = 2 * queries * groups * tokens * 128
    return (
        Case(name.format("fwd"), shape, forward, args, 2 * flops),
        Case(name.format("fwdbwd"), shape, both, (args, cotangents), 7 * flops),
    )


def _lact_outputs_cases(name, tokens, groups=12, heads=4, chunk=2048) -> tuple[Case, Case]:
    """What the fast weights of LaCT-760M read, added to attention's output, of one row."""

    def forward(implementation):
        return lambda *arrays: lact_outputs(OutputsPlan(1e-5), *arrays)

    width = groups * 128 // heads
    row = _array(1, groups, tokens, 128, dtype=jnp.bfloat16)
    fast = _array(1, tokens // chunk, heads, chunk, width, dtype=jnp.bfloat16)
    args = fast, _array(1, heads, 1, tokens), _array(1, width), row
    shape = f"B 1, T {tokens}, {heads} fast-weight heads of {width}, bfloat16"
    return _forward_and_backward(name, shape, forward, args, 0)


_ALL = (
    *_delta_cases("delta_{}_8k", 8192),
    *_delta_cases("delta_{}_16k", 16384),
    *_delta_cases("gated_delta_{}_8k", 8192, gated=True),
    *_delta_cases("delta64_{}_8k", 8192, heads=32, size=64),
    _delta_further("delta_k64_v128", (64, 128)),
    _delta_further("delta_k256_v256", (256, 256)),
    _delta_further("delta_float32", (128, 256), dtype=jnp.float32),
    _delta_further("gated_delta_states", (128, 128), continued=True),
    *_lact_cases("lact760m_{}_16k", 16384, 384),
    *_lact_cases("lact3b_{}_16k", 16384, 768),
    _lact_further("lact_float32", 384, dtype=jnp.float32),
    _lact_further("lact_odd_size", 320, 480),
    _lact_further("lact_muon", 384, muon="bfloat16"),
    _lact_further("lact_prenorm_resets", 384, prenorm=True, resets=True),
    _lact_further("lact3b_prenorm_resets", 768, prenorm=True, resets=True),
    _delta_decode("delta_decode", 8),
    _delta_decode("delta_decode_64", 64),
    _lact_decode("lact_decode", 8),
    *map(_cross_entropy, (*CROSS_ENTROPY_SPECS, *_QWEN_HEADS)),
    *_attention_cases(*ATTENTION_SPECS),
    *_lact_inputs_cases("lact_inputs_{}_16k", 16384),
    *_lact_outputs_cases("lact_outputs_{}_16k", 16384),
    *_fork_reads_cases("fork_{}_16k", 16384),
    *_fork_rows_cases("fork_rows_{}_16k", 16384),
)
CASES = {each.name: each for each in _ALL}
