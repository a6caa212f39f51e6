"""Inside a training step nothing moves between the host and its devices."""

import contextlib
import functools

import jax
import numpy as np
import pytest
from tiny_runs import tiny_run

from refine_jax.config import Config, MeshConfig
from refine_jax.parallel import use_mesh
from refine_jax.phases import midtrain, posttrain

pytestmark = pytest.mark.usefixtures("compile_once")

PHASES = {
    "midtrain": (midtrain.prepare, midtrain.MidtrainLoop),
    "posttrain": (posttrain.prepare, posttrain.PosttrainLoop),
}


def settings(phase, folder):
    """Two updates a step, of four micro-batches or of four devices."""
    train = {"batch_size": 8, "mini_batch_size": 4, "micro_batch_size": 1, "eval_batches": 1}
    changes = {
        "model": {"fresh": {"use_short_conv": False}},
        "data": {"source": "recall", "limit_documents": 40, "sequence_length": 256},
        "prompts": {"max_answer_tokens": 8},
        "posttrain": {"mini_batch_size": 4},
        "train": train | {"steps": 2, "warmup_ntp_steps": 0},
    }
    if phase == "midtrain":
        for index in range(20):
            (folder / f"{index}.txt").write_text(f"{index} " * 60, encoding="utf-8")
        changes["data"] = {"source": str(folder), "sequence_length": 64, "min_remainder": 64}
        changes["train"] = train | {"steps": 4, "warmup_ntp_steps": 2}
    return Config.from_dict(tiny_run(phase, changes))


@pytest.mark.parametrize(
    ("phase", "devices"),
    [
        ("midtrain", 4),
        ("posttrain", 1),
        pytest.param("midtrain", 1, marks=pytest.mark.slow),
        pytest.param("posttrain", 4, marks=pytest.mark.slow),
    ],
)
def test_a_training_step_stays_on_its_devices(phase, devices, tmp_path, monkeypatch):
    monkeypatch.setattr("refine_jax.parallel.default_devices", lambda: jax.devices()[:devices])
    config = settings(phase, tmp_path)
    mesh = {"data": 2, "fsdp": 2} if devices == 4 else {}
    with use_mesh(MeshConfig(**mesh)):
        prepare, make_loop = PHASES[phase]
        loop = make_loop(prepare(config, tmp_path), tmp_path / "run")
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
