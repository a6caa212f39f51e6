"""Next-token loss, entropies and their gradients in two Pallas kernels for TPUs.

Letters: N tokens, D model dim, V vocabulary; v a block of the vocabulary, n a block of tokens.

Three products of 2 N D V operations are needed, and no more are made:

1. `_forward_kernel` walks over the vocabulary for a block of tokens. It forms the logits of a
   block, their running maximum m and sums, and adds `exp(z - m) W` to the gradient of the hidden
   states, rescaled whenever m grows, as flash attention does with its values. The target's row is
   taken off at the end in float32, so that tokens predicted with confidence keep the digits of
   their small gradient. The exponentials are written out in the dtype of the operands, with the m
   that each block of them had.
2. `_head_kernel` scales the exponentials to the gradient of the logits and multiplies it with the
   hidden states, for the gradient of the head in float32.

The exponentials exist for `Blocks.span` tokens at a time; spans follow one another in a scan whose
carry, the gradients, is updated in place.

Static estimates of loss and gradients for N 16384, D 2048, V 32000, bfloat16 states, float32 head,
in ms (`experiments/tpu_kernels.py`, case ce_entropy). The floor is that of the matrix units; those
of the HBM are 0.2 to 0.8 ms. XLA's program takes 2048 tokens at a time:

    chip  floor  kernels  program  XLA
    v4     23.4                43   37
    v5e    32.7     34.3       38
    v5p    14.0              16.5   24
    v6e     7.0      8.4     10.7   20

On a v6e the first kernel keeps the matrix units busy for 82 % of its time, the second one for 87 %;
the rest of the program, 2.3 ms, is XLA's estimate of the head's cast to bfloat16 (1.0) and of two
transpositions (1.1). On a v4, whose VMEM has 16 MiB, blocks are too small and XLA is the default.

Tried on a v6e: XLA alone with blocks of 512, 2048 and 4096 tokens, 22.3, 19.7 and 19.3 ms; the
second kernel with exponentials transposed on the way or its sum transposed at the end, 3 times and
twice as slow (its result is therefore transposed, and XLA turns it once); turns of 256 tokens, 5 %
slower than of 512; steps of 1024 tokens in the second kernel, 18 % slower than of 4096.

It has not run on a TPU: it is tested in interpret mode and compiled ahead of time.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refine_jax.kernels import tpu
from refine_jax.kernels.cross_entropy.reference import TokenStats
from refine_jax.kernels.numerics import pad_axes
from refine_jax.kernels.tpu import nn, nt

_LANES = 128
_SPAN_BYTES = 2**30  # of the exponentials that are kept at a time, at most
_MASKED = -1e30  # of padded words: finite, as a difference of two infinities is NaN


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of blocks.

    tokens, words: of one grid step of the first kernel. head_tokens, head_words: of the second
    one; head_words divides words. rows: tokens of one turn of the loop in a step (twice as many in
    the second kernel where it has them). span: tokens whose exponentials are kept; a multiple of
    the other counts.
    """

    tokens: int
    words: int
    head_tokens: int
    head_words: int
    rows: int
    span: int


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _by_rows(tokens: int, rows: int):
    """A decorator that runs `body(slice of rows)` for all rows of a block of tokens."""

    def run(body):
        def step(index, _):
            body(pl.ds(pl.multiple_of(index * rows, rows), rows))
            return 0

        if rows == tokens:
            body(pl.ds(0, tokens))
        else:
            lax.fori_loop(0, tokens // rows, step, 0)

    return run


def _forward_kernel(
    vocabulary: int, rows: int, *, h, w, target, stats, m, s, u, t, acc=None, **of_gradient
):
    """Grid (tokens, words), words innermost.

    In: h [n, D], w [v, D], target [n, 128] (all lanes equal); with the gradient also chosen_rows,
    those of the head at the targets [n, D], and weight [n, 128]. Out: stats [n, 128] (nll, entropy,
    correct, log normaliser in lanes 0 to 3); with the gradient also e [n, v], top [1, n, 128], the
    maximum that e was taken with, and dh [n, D].
    """
    with_gradient = acc is not None
    j = pl.program_id(1)
    words = w.shape[0]

    @pl.when(j == 0)
    def _():
        m[...] = jnp.full_like(m, _MASKED)
        for sums in (s, u, t):
            sums[...] = jnp.zeros_like(sums)
        if with_gradient:
            acc[...] = jnp.zeros_like(acc)

    def by_lane(x):  # the sum over lanes waits for the last block
        return sum(x[:, i : i + _LANES] for i in range(0, words, _LANES))

    @_by_rows(h.shape[0], rows)
    def _(at):
        z = nt(h[at, :], w[...])
        word = j * words + lax.broadcasted_iota(jnp.int32, z.shape, 1)
        if vocabulary % words:
            z = jnp.where(word < vocabulary, z, _MASKED)
        old = m[at, :]
        top = jnp.maximum(old, jnp.max(z, axis=1, keepdims=True))
        m[at, :] = top
        shifted = z - _wide(top, words)
        e = jnp.exp(shifted)
        decay = jnp.exp(old - top)
        u[at, :] = decay * (u[at, :] + (old - top) * s[at, :]) + by_lane(e * shifted)
        s[at, :] = decay * s[at, :] + by_lane(e)
        t[at, :] += by_lane(jnp.where(word == _wide(target[at, :], words), z, 0.0))
        if with_gradient:
            e = e.astype(of_gradient["e"].dtype)
            of_gradient["e"][at, :] = e
            of_gradient["top"][0, at, :] = top
            acc[at, :] = _wide(decay, acc.shape[1]) * acc[at, :] + nn(e, w[...])

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        total = jnp.sum(s[...], axis=1, keepdims=True)
        chosen = jnp.sum(t[...], axis=1, keepdims=True)
        log_total, top = jnp.log(total), m[:, :1]
        columns = (
            log_total - (chosen - top),
            log_total - jnp.sum(u[...], axis=1, keepdims=True) / total,
            (chosen >= top).astype(jnp.float32),
            log_total + top,
        )
        lane = lax.broadcasted_iota(jnp.int32, stats.shape, 1)
        out = jnp.zeros(stats.shape, jnp.float32)
        for i, column in enumerate(columns):
            out = jnp.where(lane == i, column, out)
        stats[...] = out
        if with_gradient:
            chosen_rows, weight, dh = (of_gradient[x] for x in ("chosen_rows", "weight", "dh"))
            gradient = acc[...] / total - chosen_rows[...].astype(jnp.float32)
            dh[...] = (weight[:, :1] * gradient).astype(dh.dtype)


def _wide(x: jax.Array, size: int) -> jax.Array:
    """Columns [n, 128], all equal, as [n, size]: registers are used again, none is made."""
    copies = -(-size // x.shape[1])
    return (x if copies == 1 else jnp.concatenate([x] * copies, axis=1))[:, :size]


def _head_kernel(rows: int, *, span, h, e, top, normaliser, target, weight, old, out):
    """Grid (words, tokens), tokens innermost: old [D, v] plus the gradient of these words.

    span [1]: of the first one `old` is taken as zero. h [D, n] or [D, span]; e [n, v] and
    top [1, n, 128] of `_forward_kernel`; normaliser (its logarithm), target and weight [n, 128].
    """
    j, i = pl.program_id(0), pl.program_id(1)
    num_tokens, words = e.shape

    @pl.when(i == 0)
    def _():
        out[...] = jnp.where(span[0] == 0, 0.0, old[...])

    first = 0 if h.shape[1] == num_tokens else i * num_tokens

    @_by_rows(num_tokens, rows)
    def _(at):
        factor = weight[at, :] * jnp.exp(top[0, at, :] - normaliser[at, :])
        dz = e[at, :].astype(jnp.float32) * _wide(factor, words)
        word = j * words + lax.broadcasted_iota(jnp.int32, dz.shape, 1)
        is_target = word == _wide(target[at, :], words)
        dz -= jnp.where(is_target, _wide(weight[at, :], words), 0.0)
        tokens = pl.ds(pl.multiple_of(first + at.start, rows), rows)
        out[...] += nn(h[:, tokens], dz.astype(h.dtype))


def _step_bytes(block: int, words: int, size: int, itemsize: int) -> int:
    """VMEM of a step of `_forward_kernel`: blocks in two buffers, sums, logits, exponentials."""
    moved = 3 * block * size + words * size + block * words
    return 2 * itemsize * moved + 4 * block * (2 * size + 2 * words)


def _is_resident(size: int, span: int, itemsize: int) -> bool:
    """Whether `_head_kernel` keeps a span's hidden states, which every block of words reads."""
    return size * span * itemsize < 0.35 * tpu.vmem_bytes()


def _head_bytes(tokens: int, words: int, size: int, span: int, itemsize: int) -> int:
    """VMEM of a step of `_head_kernel`: two buffers of everything but resident hidden states."""
    resident = _is_resident(size, span, itemsize)
    hidden = itemsize * size * (span if resident else 2 * tokens)
    return hidden + 16 * size * words + 2 * tokens * (itemsize * words + 4 * 4 * _LANES)


def choose_blocks(
    tokens: int, size: int, vocabulary: int, dtype: jnp.dtype, span: int | None = None
) -> Blocks | None:
    """Blocks for N tokens of width D that fit the VMEM of the TPU; None if there are none."""
    vmem, itemsize = tpu.vmem_bytes(), jnp.dtype(dtype).itemsize
    words = next((w for w in (1280, 1024, 512, 256) if vocabulary % w == 0), 1024)
    if vmem < 32 * 2**20:
        words = min(words, 256)  # vocabularies are padded to a multiple of it
    words = min(words, _round_up(vocabulary, _LANES))
    for block in (1024, 512, 256, 128):
        if _step_bytes(block, words, size, itemsize) < 0.65 * vmem:
            break
    else:
        return None
    if span is None:
        # Each span passes over the head's gradient once: the larger, the less traffic.
        span = 8192 if vmem > 100 * 2**20 else 4096
        while span > 1024 and span * vocabulary * itemsize > _SPAN_BYTES:
            span //= 2
    count = -(-tokens // span)
    block = min(block, _round_up(-(-tokens // count), _LANES))
    span = _round_up(-(-tokens // count), block)
    # Long steps hide the exchange of the head's blocks between them.
    choices = [
        (steps * block, head_words)
        for head_words in dict.fromkeys((words, 256 if words % 256 == 0 else _LANES))
        for steps in (4, 2, 1)
        if span % (steps * block) == 0
        and _head_bytes(steps * block, head_words, size, span, itemsize) < 0.86 * vmem
    ]
    if not choices:
        return None
    # A float32 product is six passes of bfloat16 ones, unrolled: short turns bound the program.
    turns = (512, 384, 256, 128) if itemsize == 2 else (128,)
    rows = next(n for n in turns if block % n == 0)
    return Blocks(block, words, *choices[0], rows, span)


def unsupported(hidden: jax.Array, head: jax.Array, block_tokens: int | None = None) -> str | None:
    """Why there are no kernels for hidden [B, T, D] and head [V, D]; None if there are."""
    if hidden.dtype not in (jnp.float32, jnp.bfloat16):
        return f"hidden must be float32 or bfloat16, or use 'xla'. Got: {hidden.dtype}."
    (batch, length, size), vocabulary = hidden.shape, head.shape[0]
    if choose_blocks(batch * length, size, vocabulary, hidden.dtype, block_tokens) is None:
        return f"a block of width D does not fit the VMEM, use 'xla'. Got: D={size}."
    return None


def is_faster(hidden: jax.Array, head: jax.Array, block_tokens: int | None = None) -> bool:
    """Say whether the kernels beat XLA's program for hidden [N, D] and head [V, D].

    They do not where the vector memory holds small blocks only (v4).
    """
    return unsupported(hidden, head, block_tokens) is None and tpu.vmem_bytes() >= 32 * 2**20


def _forward(span, h, w, targets, blocks, vocabulary, for_gradient=None):
    """Run `_forward_kernel` over one span of h [N, D], w [V', D], targets [N, 128].

    Returns, by name, stats [span, 128] and, with for_gradient, e [span, V'], top [blocks of words,
    span, 128] and dh [N, D].

    for_gradient: the head's rows at the targets [N, D], weights [N, 128], and the dh whose rows of
    the span are written in place.
    """
    size, tokens, words = h.shape[1], blocks.tokens, blocks.words
    grid = (blocks.span // tokens, w.shape[0] // words)

    def of_all(width):
        return pl.BlockSpec((tokens, width), lambda i, j, s: (s[0] * grid[0] + i, 0))

    of_words = pl.BlockSpec((words, size), lambda i, j, s: (j, 0))
    of_span = pl.BlockSpec((tokens, _LANES), lambda i, j, s: (i, 0))
    inputs = {"h": (h, of_all(size)), "w": (w, of_words), "target": (targets, of_all(_LANES))}
    outputs = {"stats": ((blocks.span, _LANES), jnp.float32, of_span)}
    scratch = {name: pltpu.VMEM((tokens, _LANES), jnp.float32) for name in "msut"}
    if for_gradient is not None:
        chosen_rows, weights, dh = for_gradient
        of_both = pl.BlockSpec((tokens, words), lambda i, j, s: (i, j))
        of_tops = pl.BlockSpec((1, tokens, _LANES), lambda i, j, s: (j, i, 0))
        inputs |= {
            "chosen_rows": (chosen_rows, of_all(size)),
            "weight": (weights, of_all(_LANES)),
            "old": (dh, pl.BlockSpec(memory_space=pl.ANY)),
        }
        outputs |= {
            "e": ((blocks.span, w.shape[0]), h.dtype, of_both),
            "top": ((grid[1], blocks.span, _LANES), jnp.float32, of_tops),
            "dh": (h.shape, h.dtype, of_all(size)),
        }
        scratch["acc"] = pltpu.VMEM((tokens, size), jnp.float32)
    return tpu.call_kernel(
        functools.partial(_forward_kernel, vocabulary, blocks.rows),
        "cross_entropy_forward",
        grid,
        inputs,
        outputs,
        scratch,
        scalars={"span": span},
        parallel=1,
        vmem=15 / 16,
        in_place={} if for_gradient is None else {"old": "dh"},
    )


def _head_gradient(span, h, e, top, normaliser, targets, weights, total, blocks):
    """`total` [D, V'] plus the gradient of the head from one span, in its place; h [D, N].

    Transposed, since the product h^T dz then needs no operand transposed on the way.
    """
    size, words, tokens = h.shape[0], blocks.head_words, blocks.head_tokens
    grid = (total.shape[1] // words, blocks.span // tokens)
    if _is_resident(size, blocks.span, h.dtype.itemsize):
        hidden = pl.BlockSpec(
            (size, blocks.span), lambda j, i, s: (0, s[0]), pipeline_mode=pl.Buffered(1)
        )
    else:
        hidden = pl.BlockSpec((size, tokens), lambda j, i, s: (0, s[0] * grid[1] + i))
    head = pl.BlockSpec((size, words), lambda j, i, s: (0, j))
    share = blocks.words // words
    of_all = pl.BlockSpec((tokens, _LANES), lambda j, i, s: (s[0] * grid[1] + i, 0))
    inputs = {
        "h": (h, hidden),
        "e": (e, pl.BlockSpec((tokens, words), lambda j, i, s: (i, j))),
        "top": (top, pl.BlockSpec((1, tokens, _LANES), lambda j, i, s: (j // share, i, 0))),
        "normaliser": (normaliser, pl.BlockSpec((tokens, _LANES), lambda j, i, s: (i, 0))),
        "target": (targets, of_all),
        "weight": (weights, of_all),
        "old": (total, head),
    }
    rows = blocks.rows if tokens % (2 * blocks.rows) else 2 * blocks.rows
    return tpu.call_kernel(
        functools.partial(_head_kernel, rows),
        "cross_entropy_head",
        grid,
        inputs,
        {"out": (total.shape, jnp.float32, head)},
        scalars={"span": span},
        parallel=1,
        vmem=15 / 16,
        in_place={"old": "out"},
    )["out"]


def _lanes(x):
    """[N] -> [N, 128]: a row of numbers as kernels want it beside rows of a matrix."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], _LANES))


def _pad_rows(x, multiple):
    return pad_axes(x, {0: (0, -x.shape[0] % multiple)})


def token_stats(hidden, head, targets, blocks: Blocks):
    """nll, entropy and correct, each [N] float32, of hidden [N, D], head [V, D], targets [N]."""
    num_tokens, vocabulary = hidden.shape[0], head.shape[0]
    w = _pad_rows(head.astype(hidden.dtype), blocks.words)
    hidden, targets = (_pad_rows(x, blocks.span) for x in (hidden, targets))
    targets = _lanes(targets)

    def step(_, span):
        stats = _forward(span, hidden, w, targets, blocks, vocabulary)["stats"]
        return None, stats[:, :3]

    _, stats = lax.scan(step, None, _span_numbers(hidden, blocks))
    return tuple(stats.reshape(-1, 3)[:num_tokens].T)


def loss_gradients(hidden, head, targets, weights, blocks: Blocks):
    """`token_stats`, and the gradients of `sum(weights * nll)`: dh [N, D], dw [V, D] float32."""
    num_tokens, vocabulary = hidden.shape[0], head.shape[0]
    w = _pad_rows(head.astype(hidden.dtype), blocks.words)
    hidden, targets, weights = (_pad_rows(x, blocks.span) for x in (hidden, targets, weights))
    chosen_rows, transposed = w[targets], hidden.T
    targets, weights = _lanes(targets), _lanes(weights)

    def step(gradients, span):
        dh, total = gradients
        found = _forward(span, hidden, w, targets, blocks, vocabulary, (chosen_rows, weights, dh))
        stats, e, top, dh = (found[name] for name in ("stats", "e", "top", "dh"))
        normaliser = _lanes(stats[:, 3])
        total = _head_gradient(
            span, transposed, e, top, normaliser, targets, weights, total, blocks
        )
        return (dh, total), stats[:, :3]

    # Any memory will do: the kernels write all of it before it is read.
    gradients = lax.empty(hidden.shape, hidden.dtype), lax.empty(w.shape[::-1], jnp.float32)
    (dh, total), stats = lax.scan(step, gradients, _span_numbers(hidden, blocks))
    stats = tuple(stats.reshape(-1, 3)[:num_tokens].T)
    return stats, dh[:num_tokens], total.T[:vocabulary]


def _span_numbers(hidden, blocks):
    return jnp.arange(hidden.shape[0] // blocks.span, dtype=jnp.int32)[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def next_token_loss_pallas_tpu(hidden, head, targets, weights, block_tokens=None):
    """`next_token_loss` of api.py; the gradient is formed in the forward pass."""
    (batch, length, size), vocabulary = hidden.shape, head.shape[0]
    blocks = choose_blocks(batch * length, size, vocabulary, hidden.dtype, block_tokens)
    stats = token_stats(hidden.reshape(-1, size), head, targets.reshape(-1), blocks)
    return _loss(stats, weights)


def _loss(stats, weights):
    stats = TokenStats(*(x.reshape(weights.shape) for x in stats))
    return jnp.sum(stats.nll * weights), stats


def _loss_forward(hidden, head, targets, weights, block_tokens):
    (batch, length, size), vocabulary = hidden.shape, head.shape[0]
    blocks = choose_blocks(batch * length, size, vocabulary, hidden.dtype, block_tokens)
    stats, dh, head_gradient = loss_gradients(
        hidden.reshape(-1, size), head, targets.reshape(-1), weights.reshape(-1), blocks
    )
    return _loss(stats, weights), (dh.reshape(hidden.shape), head_gradient.astype(head.dtype))


def _loss_backward(block_tokens, residuals, cotangents):
    del block_tokens
    scale, _ = cotangents  # the statistics are constants
    gradients = (x * scale.astype(x.dtype) for x in residuals)
    return *gradients, None, None


next_token_loss_pallas_tpu.defvjp(_loss_forward, _loss_backward)
