"""Static facts of one call of the LaCT kernels over chunks, and their block specs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from refine_jax.kernels import tpu
from refine_jax.kernels.lact.pallas_tpu_blocks import LANES


def rows(start: jax.Array | int, size: int = LANES) -> pl.Slice:
    """Slice `size` rows from `start`, a scalar and multiple of 128."""
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, LANES), size)


@dataclasses.dataclass(frozen=True)
class LaCTPlan:
    """Sizes (padded), options and blocks of a call.

    block, sub: tokens of a grid step, and of the parts it is computed in.
    tile: hidden features that a step works on at a time.
    resets: whether chunks may begin documents.
    save_scales: whether the forward keeps what the backward needs of the rescalings.
    cotangents: fields of the states whose cotangents the backward is given.
    fetch_slots: parts of 128 rows of the momentum and of the cotangents of the states that the
        backward has room for. weight_buffers: 2 to fetch the weights of the next chunk early.
    reverse: whether the chunks are walked from the last to the first.
    """

    batch: int
    chunks: int
    heads: int
    chunk: int
    dim: int
    hidden: int
    momentum: bool
    prenorm: bool
    eps_inside: bool
    resets: bool
    block: int = 0
    sub: int = 0
    tile: int = 0
    save_scales: bool = False
    cotangents: tuple[str, ...] = ()
    reverse: bool = False
    fetch_slots: int = 1
    weight_buffers: int = 2

    @property
    def blocks(self) -> int:
        """Blocks of a chunk."""
        return self.chunk // self.block

    @property
    def groups(self) -> tuple[str, ...]:
        """Fields of FastState that are there."""
        names = ("weights", True), ("momentum", self.momentum), ("accumulator", self.prenorm)
        return tuple(name for name, present in names if present)

    @property
    def fetched(self) -> tuple[str, ...]:
        """What the backward reads at the end of a chunk."""
        given = tuple(f"ct_{name}" for name in self.cotangents)
        return ("momentum", *given) if self.momentum else given

    @property
    def row_parts(self) -> int:
        """Parts of 128 rows of all three matrices."""
        return (2 * self.hidden + self.dim) // LANES

    @property
    def tiles(self) -> int:
        """Tiles of the hidden axis. The kernels loop if there are several.

        The compiler unrolls vector work, and is slow where there is much of it.
        """
        return self.hidden // self.tile

    def fold(self, count: int, body: Callable, carry):
        """`carry = body(i, carry)` for all i < count: unrolled if there is one tile, or a loop."""
        if self.tiles > 1:
            return lax.fori_loop(0, count, body, carry)
        for i in range(count):
            carry = body(i, carry)
        return carry

    def each(self, count: int, body: Callable) -> None:
        """`body(i)` for all i < count, likewise."""
        self.fold(count, lambda i, _: body(i), None)

    def pair_start(self, half: int, start: jax.Array | int) -> jax.Array | int:
        """Find a row, a scalar, of W0 (half 0) or W2 (1) in the stack of their tiles in turn."""
        return (start // self.tile * 2 + half) * self.tile + start % self.tile

    def views(self, w02, w1) -> list[tuple[int, pl.Slice, jax.Ref]]:
        """Stacked matrices in VMEM as the op has them: (number, rows, view of these rows)."""
        pairs = [
            (
                2 * half,
                rows(start, self.tile),
                w02.at[rows(self.pair_start(half, start), self.tile)],
            )
            for half in (0, 1)
            for start in range(0, self.hidden, self.tile)
        ]
        return [*pairs, (1, rows(0, self.dim), w1)]

    def chunk_index(self, step: jax.Array | int) -> jax.Array | int:
        """Return the chunk at work in a step (a scalar) of the grid's chunk axis."""
        return self.chunks - 1 - step if self.reverse else step

    def _place(self, step, block, clip):
        """The chunk of a step and its block; with clip, of what the last chunk does not read."""
        chunk = self.chunk_index(step)
        if not clip:
            return chunk, block
        # The last chunk makes no update. Its keys and values stay where they are: the blocks of
        # the neighbour in time, which are in VMEM already.
        final = max(self.chunks - 2, 0)
        resting = 0 if self.reverse else self.blocks - 1
        return jnp.minimum(chunk, final), jnp.where(chunk > final, resting, block)

    def token_spec(self, clip: bool = False) -> pl.BlockSpec:
        """Blocks of [B, N, H, C, d]."""

        def index(b, h, n, j, *_):
            n, j = self._place(n, j, clip)
            return b, n, h, j, 0

        return pl.BlockSpec((None, None, None, self.block, self.dim), index)

    def rates_spec(self, clip: bool = False) -> pl.BlockSpec:
        """Blocks of [B, N, H, 3, C]."""

        def index(b, h, n, j, *_):
            n, j = self._place(n, j, clip)
            return b, n, h, 0, j

        return pl.BlockSpec((None, None, None, 3, self.block), index)

    def chunk_spec(self, shape: tuple[int, int], shift: int = 0, buffers: int = 2) -> pl.BlockSpec:
        """Blocks of [B, N, H, *shape], one a chunk: those of the chunk `shift` further."""

        def index(b, h, n, j, *_):
            return b, jnp.maximum(self.chunk_index(n) + shift, 0), h, 0, 0

        mode = {} if buffers == 2 else {"pipeline_mode": pl.Buffered(buffers)}
        return pl.BlockSpec((None, None, None, *shape), index, **mode)

    def head_spec(self, array: jax.Array) -> pl.BlockSpec:
        """One block a head of [H, ...] with two more axes."""
        return pl.BlockSpec((None, *array.shape[1:]), lambda b, h, *_: (h, 0, 0))

    def call(self, kernel, name: str, mean, reset, inputs, outputs, scratch) -> dict:
        """Run `kernel(plan, **references)` over all chunks; the outputs by name.

        mean, reset: the mean momentum [B, N, H] and resets [B, N] (or None), which go to scalar
        memory. inputs, outputs, scratch: as `tpu.call_kernel` takes them.
        """
        scalars = {}
        if self.momentum:
            scalars["mean"] = mean.astype(jnp.float32).reshape(-1)
        if self.resets:
            scalars["reset"] = reset.astype(jnp.int32).reshape(-1)
        grid = self.batch, self.heads, self.chunks, self.blocks
        arguments = functools.partial(kernel, self), name, grid, inputs, outputs, scratch
        return tpu.call_kernel(*arguments, scalars=scalars, parallel=2, vmem=1.0)
