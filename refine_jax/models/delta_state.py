"""What forks of DeltaNet's rows keep: traces, what is cut out of them, and decode states.

Letters as in deltanet.py.
"""

from typing import NamedTuple

import jax


class DeltaTrace(NamedTuple):
    """What forks need of a forward pass.

    x: [B, T, D], the mixer's input: a fork needs the keys and values of at most N tokens, which it
    computes again. states: [B, ceil(T / N), Hv, K, V] float32, before every N-th token.
    """

    x: jax.Array
    states: jax.Array


class DeltaPick(NamedTuple):
    """What R forks of a row need of a trace.

    memory: [B, R, Hv, K, V] float32, the states saved before the blocks of N tokens that the forks
    lie in. start: [B, R] int32, where N tokens begin that hold what of the block the row has. x:
    [B, R, N, D], the mixer's inputs there. before, tails: [B, R, W - 1, D], its inputs before
    these, and before the forks; None without convolutions.
    """

    memory: jax.Array
    start: jax.Array
    x: jax.Array
    before: jax.Array | None
    tails: jax.Array | None


class DeltaTaps(NamedTuple):
    """What R forks need of a forward pass that knows where they are.

    memory, start, tails: as of `DeltaPick`. k, v: [B, R, N, channels], the outputs of the
    convolutions there. beta, log_decay: [B, R, N, Hv] float32.
    """

    memory: jax.Array
    start: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array
    log_decay: jax.Array | None
    tails: jax.Array | None


class DeltaState(NamedTuple):
    """A decode state; its size does not depend on the tokens seen.

    memory: [B, R, Hv, K, V] float32. tails: the last W - 1 inputs of the convolutions of q, k and
    v, [B, R, W - 1, channels] each; None without convolutions.
    """

    memory: jax.Array
    tails: tuple[jax.Array, jax.Array, jax.Array] | None
