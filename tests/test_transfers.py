"""Inside a training step nothing moves between the host and its devices."""

import contextlib
import functools

import jax
import numpy as np
import pytest

from refine_jax.config import Config, MeshConfig, defaults
from refine_jax.parallel import use_mesh
from refine_jax.phases import midtrain, posttrain

pytestmark = pytest.mark.usefixtures("compile_once")

PHASES = {"midtrain": midtrain, "posttrain": posttrain}


def settings(phase, folder):
    """Two updates a step, of four micro-batches or of four devices."""
    config = defaults()
    config.phase = phase
    config.model.fresh = {
        "model_type": "delta_net",
        "vocab_size": 259,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_heads": 1,
        "intermediate_size": 8,
        "use_short_conv": False,
    }
    config.data.update(tokenizer="bytes", sequence_length=64, min_remainder=64)
    config.refine.update(num_positions=2, rollout_length=2)
    config.train.update(batch_size=8, mini_batch_size=4, micro_batch_size=1, eval_batches=1)
    config.train.update(steps=4 if phase == "midtrain" else 2, warmup_ntp_steps=2)
    if phase == "posttrain":
        config.data.update(source="recall", limit_documents=40, sequence_length=256)
        config.prompts.max_answer_tokens = 8
        config.posttrain.mini_batch_size = 4
    else:
        for index in range(20):
            (folder / f"{index}.txt").write_text(f"{index} " * 60, encoding="utf-8")
        config.data.source = str(folder)
    return Config.from_dict(config)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("phase", PHASES)
def test_a_training_step_stays_on_its_devices(phase, devices, tmp_path, monkeypatch):
    monkeypatch.setattr("refine_jax.parallel.default_devices", lambda: jax.devices()[:devices])
    config = settings(phase, tmp_path)
    mesh = {"data": 2, "fsdp": 2} if devices == 4 else {}
    with use_mesh(MeshConfig(**mesh)):
        loop = PHASES[phase]._Loop(PHASES[phase].prepare(config, tmp_path), tmp_path / "run")
        state = loop.initial_state()
        batches = iter(loop.parts.training)
        for step in range(config.train.steps):
            batch = jax.device_put(loop.place(next(batches), loop.parts.training))
            compiled = step % 2 == 1  # at the step before, for next tokens at 0 and ReFINE at 2
            with jax.transfer_guard("disallow") if compiled else contextlib.nullcontext():
                state, metrics = loop.train_step(step, state, batch)
            assert ("reward/mean" in metrics) == (phase == "posttrain" or step >= 2)
            if compiled:
                # The guard does not see what the host reads of a CPU's arrays; tracing stops there.
                program = jax.make_jaxpr(functools.partial(loop.train_step, step))(state, batch)
                assert "scan" in str(program) and "callback" not in str(program)
    assert int(state.step) == config.train.steps and np.isfinite(metrics["grad/norm"])
