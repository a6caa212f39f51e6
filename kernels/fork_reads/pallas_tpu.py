"""What forks read of the traces of all layers, in place, as Pallas kernels for TPUs.

A fork has few tokens and reads much: the keys and values of a window, and its chunk's fast weights.
Both stand in the traces [N, B, ...] of N layers and B rows. Here the place of a fork, scalars that
are there before the kernel begins, chooses the blocks that are brought to vector memory: nothing is
cut out, and the next block comes while one is worked on.

F forks, G groups of n heads side by side with L numbers, H fast-weight heads of width d with hidden
size D, S new tokens of a fork, T tokens of a row, W window. The operands of products have the dtype
of the tokens, everything else is float32.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refine_jax.kernels import tpu
from refine_jax.kernels.device import backend
from refine_jax.kernels.fork_reads.reference import ForkRows
from refine_jax.kernels.numerics import pad_axes
from refine_jax.kernels.tpu import nn, nt

_LANES, _SUBLANES = 128, 8
_BLOCK = 512  # most tokens of a block of a row
_MOST_NEW = 32  # tokens of a fork: scores of all groups with a block of the row stay near
_TOGETHER = 12  # groups that are worked on at once, so that no result is waited for
_MASKED = -1e30  # finite: the difference of two of them must not be NaN
_LOWEST = -1e29  # of maxima: with nothing but masked scores, all weights are 0


def takes_windows(keys: tuple[int, ...], num_new: int) -> bool:
    """Whether the kernel takes keys of this shape, and is compiled here."""
    whole = all(size % _LANES == 0 for size in keys[-2:])
    return whole and num_new <= _MOST_NEW and backend() == "tpu"


def takes_weights(weights: tuple[int, ...], num_new: int) -> bool:
    """Whether the kernel takes weights of this shape, and is compiled here."""
    whole = all(size % _LANES == 0 for size in weights[-2:])
    if not whole or num_new > _MOST_NEW or backend() != "tpu":
        return False
    # Two blocks of the three matrices of a head, which are float32.
    return 2 * 3 * 4 * math.prod(weights[-2:]) <= tpu.vmem_bytes() // 2


def _pad_tokens(x: jax.Array) -> jax.Array:
    """[..., S, L], S up to whole registers."""
    return pad_axes(x, {-2: (0, -x.shape[-2] % _SUBLANES)})


def _attend_kernel(
    heads, window, block, blocks, *, own, lasts, seens, new, row_k, row_v, out, top, total, acc,
    log_total=None, **_
):  # fmt: skip
    fork, step = pl.program_id(0), pl.program_id(1)
    last, seen = lasts[fork], seens[fork]
    _, groups, num_new, size = new.shape
    width, dtype = size // heads, new.dtype
    scale = width**-0.5
    lane = jax.lax.broadcasted_iota(jnp.int32, (num_new, size), 1) // width

    def token(shape, axis):  # of a fork's token the number, where heads stand above each other
        return jax.lax.broadcasted_iota(jnp.int32, shape, axis) % num_new

    def queries(group):  # [n S, L], the heads above each other, each beside zeros
        x = new[0, group].astype(jnp.float32)
        parts = [jnp.where(lane == head, x, 0.0) for head in range(heads)]
        return jnp.concatenate(parts).astype(dtype)

    @pl.when(step == 0)
    def _own():
        shape = heads * num_new, num_new
        back = token(shape, 0) - token(shape, 1)
        visible = (back >= 0) & (back < window) & (own[0] > 0)
        for group in range(groups):
            scores = nt(queries(group), new[1, group]) * scale
            scores = jnp.where(visible, scores, _MASKED)
            highest = jnp.maximum(jnp.max(scores, 1, keepdims=True), _LOWEST)
            weights = jnp.exp(scores - highest)
            top[group] = highest
            total[group] = jnp.sum(weights, 1, keepdims=True)
            acc[group] = nn(weights.astype(dtype), new[2, group])

    number = _first_block(last, window, block) + step

    @pl.when(number <= _last_block(last, block, blocks))
    def _row():
        shape = heads * num_new, block
        slot = number * block + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        # Token s of a fork has a distance of last - t + 1 + s to slot t.
        first = last + jnp.maximum(1 - seen, token(shape, 0) + 2 - window)
        visible = (slot >= first) & (slot <= last)
        for begin in range(0, groups, _TOGETHER):
            together = range(begin, min(begin + _TOGETHER, groups))
            scores = [nt(queries(group), row_k[group]) * scale for group in together]
            scores = [jnp.where(visible, x, _MASKED) for x in scores]
            old = [top[group] for group in together]
            highest = [jnp.max(x, 1, keepdims=True) for x in scores]
            new_top = [jnp.maximum(a, b) for a, b in zip(old, highest, strict=True)]
            decay = [jnp.exp(a - b) for a, b in zip(old, new_top, strict=True)]
            weights = [jnp.exp(x - b) for x, b in zip(scores, new_top, strict=True)]
            sums = [jnp.sum(x, 1, keepdims=True) for x in weights]
            values = [row_v[group] for group in together]
            found = [nn(x.astype(dtype), y) for x, y in zip(weights, values, strict=True)]
            for i, group in enumerate(together):
                top[group] = new_top[i]
                total[group] = decay[i] * total[group] + sums[i]
                acc[group] = decay[i] * acc[group] + found[i]

    @pl.when(step == pl.num_programs(1) - 1)
    def _end():
        for group in range(groups):
            found = acc[group] / jnp.maximum(total[group], 1e-30)
            if log_total is not None:
                log_total[group] = top[group] + jnp.log(jnp.maximum(total[group], 1e-30))
            y = found[:num_new]
            for head in range(1, heads):
                y = jnp.where(lane == head, found[head * num_new : (head + 1) * num_new], y)
            out[group] = y.astype(out.dtype)


def _first_block(last, window: int, block: int):
    """The block of keys with the first slot that the first new token sees."""
    return jnp.maximum(last - window + 2, 0) // block


def _last_block(last, block: int, blocks: int):
    return jnp.minimum(jnp.maximum(last, 0) // block, blocks - 1)


def attend_windows_tpu(new, row_k, row_v, where: ForkRows, own, window: int, heads: int):
    """Run `attend_windows` of api.py on one device's part of the rows.

    own: whether the forks' own tokens count: True, or [] bool where devices share the rows; only
    then is the log of the denominators returned, else None. On a CPU in interpret mode, for tests.
    """
    partly = own is not True
    forks, groups, count, size = new[0].shape
    padded = _pad_tokens(jnp.stack([x.astype(new[1].dtype) for x in new]))
    num_new, num_tokens = padded.shape[3], row_k.shape[3]
    block = math.gcd(num_tokens, _BLOCK)
    blocks = num_tokens // block
    steps = min(-(-max(window - 2, 0) // block) + 1, blocks)

    def of_row(fork, step, own, layer, row, last, seen):
        del own, seen
        number = _first_block(last[fork], window, block) + step
        number = jnp.minimum(number, _last_block(last[fork], block, blocks))
        return layer[0], row[fork], 0, number, 0

    def of_fork(fork, *_):
        return fork, 0, 0, 0

    tokens = pl.BlockSpec((None, None, groups, block, size), of_row)
    shape = forks, groups, num_new, size
    rows = groups, heads * num_new
    read = forks * steps * groups * block * size
    of_new = pl.BlockSpec((3, None, groups, num_new, size), lambda f, *_: (0, f, 0, 0, 0))
    shapes = {"out": shape, "log_total": (forks, *rows, 1)} if partly else {"out": shape}
    outputs = {
        name: (
            shape,
            jnp.float32 if partly else padded.dtype,
            pl.BlockSpec((None, *shape[1:]), of_fork),
        )
        for name, shape in shapes.items()
    }
    scalars = {"own": jnp.asarray(own, jnp.int32)[None], "layer": where.layer[None]}
    scalars |= {"row": where.row, "lasts": where.last, "seens": where.seen}
    found = tpu.call_kernel(
        functools.partial(_attend_kernel, heads, window, block, blocks),
        "fork_reads_attention",
        (forks, steps),
        {"new": (padded, of_new), "row_k": (row_k, tokens), "row_v": (row_v, tokens)},
        outputs,
        {
            "top": pltpu.VMEM((*rows, 1), jnp.float32),
            "total": pltpu.VMEM((*rows, 1), jnp.float32),
            "acc": pltpu.VMEM((*rows, size), jnp.float32),
        },
        scalars=scalars,
        parallel=1,
        moved=read * (row_k.dtype.itemsize + row_v.dtype.itemsize),
    )
    log_total = None
    if partly:
        log_total = found["log_total"].reshape(forks, groups, heads, num_new)[..., :count]
    return found["out"][:, :, :count], log_total


def _weights_kernel(*, q, w0, w1, w2, out, **_):
    x = q[...]
    gate, up = nt(x, w0[...].astype(x.dtype)), nt(x, w2[...].astype(x.dtype))
    hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
    out[...] = nt(hidden, w1[...].astype(x.dtype)).astype(out.dtype)


def read_weights_tpu(q, weights, where: ForkRows):
    """Run `read_weights` of api.py on one device's part of the chunks.

    On a CPU in interpret mode, for tests.
    """
    forks, heads, count, _ = q.shape
    padded = _pad_tokens(q)

    def of_chunk(head, fork, layer, row, chunk):
        return layer[0], row[fork], chunk[fork], head, 0, 0

    def matrix(w):
        return w, pl.BlockSpec((None, None, None, None, *w.shape[-2:]), of_chunk)

    tokens = pl.BlockSpec((None, None, *padded.shape[2:]), lambda h, f, *_: (f, h, 0, 0))
    inputs = {f"w{i}": matrix(w) for i, w in enumerate(weights)}
    found = tpu.call_kernel(
        _weights_kernel,
        "fork_reads_weights",
        (heads, forks),
        {"q": (padded, tokens)} | inputs,
        {"out": (padded.shape, q.dtype, tokens)},
        scalars={"layer": where.layer[None], "row": where.row, "chunk": where.chunk},
        parallel=1,
        moved=forks * sum(w[0, 0, 0].size * w.dtype.itemsize for w in weights),
    )
    return found["out"][:, :, :count]
