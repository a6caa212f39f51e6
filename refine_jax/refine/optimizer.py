"""The optimizer: clipping by the global norm, then AdamW with a schedule in training steps."""

import jax
import jax.numpy as jnp
import optax

from refine_jax.config import OptimizerConfig


def decayed(schedule: str, done: jax.Array) -> jax.Array:
    """Decay from 1 to 0 as `done` goes from 0 to 1; "constant" stays at 1."""
    return {
        "constant": jnp.ones_like(done),
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
    }[schedule]


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Make the learning rate of training step 0, 1, ...: linear warm-up, then constant or decay.

    `cosine` and `linear` end at `final_fraction` of the peak in the last of `steps` steps.
    """
    peak, warmup = config.learning_rate, config.warmup_steps

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup) / max(steps - 1 - warmup, 1), 0.0, 1.0)
        decay = decayed(config.schedule, done)
        if config.schedule != "constant":
            decay = config.final_fraction + (1.0 - config.final_fraction) * decay
        # The first step already learns: step 0 of 10 warm-up steps has a tenth of the peak.
        return peak * decay * jnp.minimum((step + 1.0) / max(warmup, 1), 1.0)

    return rate


def make_optimizer(
    config: OptimizerConfig, *, steps: int, updates_per_step: int = 1
) -> optax.GradientTransformation:
    """Make AdamW after clipping; weight decay on all parameters, as in the official code.

    steps: training steps of the run. updates_per_step: optimizer updates (mini-batches) in a
    training step; all of a step have the same learning rate.
    """
    schedule = make_schedule(config, steps)
    adamw = optax.adamw(
        lambda update: schedule(update // updates_per_step),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=config.first_moment_dtype,
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(clip_by_norm(config.clip_norm), adamw)


def clip_by_norm(limit: float) -> optax.GradientTransformation:
    """Scale by `min(1, limit / (norm + 1e-6))`, as PyTorch's `clip_grad_norm_` does.

    optax's own clipping has no such term; the difference shows where the norm is tiny.
    """

    def update(gradients, state, params=None):
        del params
        scale = jnp.minimum(1.0, limit / (optax.tree.norm(gradients) + 1e-6))
        return jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
