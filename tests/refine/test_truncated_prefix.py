"""The ReFINE step against the truncated-prefix algorithm, which shares no fork with it."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import REFINE, tiny, tokens

from refine_jax.config import RefineConfig
from refine_jax.refine.objective import Objective

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))

from truncated_prefix import TruncatedPrefixStep

CONFIG = dataclasses.replace(REFINE, num_positions=1, rollout_length=5, edge_margin=6)
EOS = 3


def moments(values):
    return {"mean": jnp.mean(values), "square": jnp.mean(values**2)}


@pytest.mark.parametrize("name", ["lact", "deltanet"])
def test_the_step_is_that_of_truncated_prefixes(name):
    """From the same keys: positions, rollouts, rewards, loss and gradient."""
    model, params = tiny(name)
    ids = tokens(1, 1, 40)
    keys = jax.random.split(jax.random.key(4), 1)

    by_prefix = TruncatedPrefixStep(model, optax.sgd(0.1), CONFIG, eos_id=EOS)
    experience = by_prefix.collect(params, ids, keys)
    want_loss, want = by_prefix.gradient(params, ids, experience)
    assert experience.valid.all()
    assert not (experience.tokens == EOS).any()

    objective = Objective(model, CONFIG, eos_id=EOS, max_documents=1)
    batch = {"tokens": ids}
    got, metrics = jax.jit(
        lambda p: objective.gradient(p, batch, objective.mini_batch(batch), keys=keys)
    )(params)

    for quantity, values in (("reward", experience.rewards), ("advantage", experience.advantages)):
        for moment, value in moments(values).items():
            np.testing.assert_allclose(metrics[f"{quantity}/{moment}"], value, atol=1e-5)
    np.testing.assert_allclose(metrics["loss/total"], want_loss, rtol=1e-5)
    got, want = jax.device_get((got, want))
    total = optax.tree.norm(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * max(np.linalg.norm(b), 1e-2 * total)
    # The policy has its part in what was compared.
    _, ntp_only = by_prefix.ntp_gradient(params, ids)
    assert optax.tree.norm(jax.tree.map(np.subtract, want, jax.device_get(ntp_only))) > 0.05 * total


def test_what_has_no_truncated_form_is_refused():
    model, _ = tiny("deltanet")
    with pytest.raises(ValueError, match="Got: objective='ntp'"):
        TruncatedPrefixStep(model, optax.sgd(0.1), RefineConfig(objective="ntp"))
