"""Traces of training steps: which steps they hold, and the names of a step's parts in them."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from refine_jax.refine.objective import Objective
from refine_jax.report.profile import PROFILE, Profile


def traced_steps(folder):
    """Numbers of the steps in all traces of a folder."""
    numbers = []
    for file in folder.glob(f"{PROFILE}/**/*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            events = [event for line in plane.lines for event in line.events]
            numbers += [dict(e.stats)["step_num"] for e in events if e.name == "train"]
    return sorted(numbers)


@pytest.mark.parametrize(
    ("first", "end", "there"),
    [(1, 5, [2, 3]), (3, 5, [3]), (1, 3, [2])],
    ids=["whole", "continued within", "interrupted within"],
)
def test_it_holds_the_steps_asked_for(tmp_path, first, end, there):
    said: list[str] = []
    with Profile(tmp_path, (2, 3), said.append) as profile:
        for number in range(first, end):
            with profile.step(number):
                jax.block_until_ready(jnp.arange(number) + 1)
    assert traced_steps(tmp_path) == there
    assert len(said) == 1 and str(tmp_path / PROFILE) in said[0]


def test_another_profiler_at_work_is_said_and_stops_nothing(tmp_path):
    said: list[str] = []
    done = []
    with jax.profiler.trace(str(tmp_path / "other")), Profile(tmp_path, (1, 2), said.append) as own:
        for number in (1, 2):
            with own.step(number):
                done.append(number)
    assert done == [1, 2] and len(said) == 1
    assert not traced_steps(tmp_path)


def test_other_processes_and_runs_without_it_trace_nothing(tmp_path):
    for steps, write in (((1, 1), False), (None, True)):
        with Profile(tmp_path, steps, print, write=write) as profile, profile.step(1):
            pass
    assert not list(tmp_path.iterdir())


def test_the_parts_of_a_step_have_names(tiny_step):
    """In the program itself, from which profilers take the names."""
    text = tiny_step.as_text(debug_info=True)
    for scope in ("update", "selection", "fork", "rollout", "score"):
        assert f"{scope}/" in text, scope
    assert Objective.select.__name__ == "select"  # the scope keeps the function's name


@pytest.fixture(scope="module")
def tiny_step():
    """A ReFINE step of a tiny model, traced and not compiled."""
    from tiny_runs import tiny_run

    from refine_jax.config import OptimizerConfig, RefineConfig
    from refine_jax.models.config import model_config
    from refine_jax.models.transformer import Model
    from refine_jax.refine.optimizer import make_optimizer
    from refine_jax.refine.step import TrainState, make_train_step

    fresh = tiny_run("midtrain").model.fresh.to_dict()
    model = Model(model_config(fresh))
    refine = RefineConfig(num_positions=2, rollout_length=2, edge_margin=2)
    optimizer = make_optimizer(OptimizerConfig(), steps=1, updates_per_step=1)
    state = jax.eval_shape(
        lambda key: TrainState.create(model.init(key), optimizer, key, refine), jax.random.key(0)
    )
    rows = {"tokens": jax.ShapeDtypeStruct((2, 32), jnp.int32)}
    step = make_train_step(model, optimizer, refine, mini_batch=2, micro_batch=2)
    return step.run.lower(state, rows)


def test_instructions_belong_to_the_innermost_scope(scopes):
    text = """    instructions {
      name: "dot.1"
      metadata {
        op_name: "jit(run)/update/while/body/rollout/dot_general"
      }
    }
    instructions {
      name: "add.2"
      metadata {
        op_name: "jit(run)/update/transpose(jvp(score))/add"
      }
    }
    instructions {
      name: "copy.3"
    }
    instructions {
      name: "mul.4"
      metadata {
        op_name: "jit(run)/update/mul"
      }
    }
"""
    found = {"dot.1": "rollout", "add.2": "score", "mul.4": "update"}
    assert scopes.scopes_of(text) == found


def test_a_step_is_shared_out_among_its_scopes(scopes, tmp_path):
    pytest.importorskip("xprof", reason="needs the extra [profile]")

    @jax.jit
    def run(x):
        with jax.named_scope("update"):
            with jax.named_scope("rollout"):
                x = x @ x @ x @ x
            return jnp.sin(x)

    x = jnp.ones((400, 400)) / 400
    run(x).block_until_ready()
    with Profile(tmp_path, (1, 1), print) as profile, profile.step(1):
        run(x).block_until_ready()
    seconds = scopes.shares(tmp_path)
    assert seconds["rollout"] > seconds["update"] > 0


@pytest.fixture
def scopes(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "experiments"))
    return importlib.import_module("profile_scopes")
