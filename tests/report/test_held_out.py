"""What evaluations during a run keep of held-out rows: held_out.jsonl."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny, tokens

from refine_jax.config import RefineConfig
from refine_jax.refine.step import make_eval_step
from refine_jax.report.held_out import (
    HELD_OUT_FILE,
    SHOWN_TOKENS,
    HeldOutLog,
    HeldOutRecord,
    _spans,
    read_held_out,
)


class Names:
    """A tokenizer whose tokens are called by their numbers."""

    def decode(self, ids):
        return "".join(f"<{int(i)}>" for i in ids)


def read(rows: np.ndarray, segments: np.ndarray, **settings):
    """(record, what the model's plain logits say: log-probabilities [B, T, V])."""
    model, params = tiny("deltanet")
    config = RefineConfig(num_positions=2, edge_margin=2, **settings)
    step = make_eval_step(model, config, max_documents=2)
    batch = {"tokens": jnp.asarray(rows), "segments": jnp.asarray(segments)}
    sums, seen = step(params, batch, jax.random.key(3), 0)
    record = HeldOutRecord(Names(), config, "rows")
    record.add(batch["tokens"], seen)
    plain = jax.jit(lambda params, ids: model.forward(params, ids)[0] @ model.head(params).T)
    logits = np.float64(plain(params, rows[:, :20]))  # row 0 fills 20 slots
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return json.loads(json.dumps(record.fields())), log_probs, jax.device_get(sums)


@pytest.fixture(scope="module")
def kept():
    rows = tokens(1, 2, 24)
    segments = np.ones((2, 24), np.int32)
    segments[0, 20:] = 0  # padding
    segments[1, 10:] = 2  # two documents
    return rows, *read(rows, segments, rollout_length=3, rollouts_per_position=2, reward="binary")


def test_entropy_and_match_stand_with_the_token_that_they_predict(kept):
    rows, record, log_probs, _ = kept
    shown = record["shown"][0]
    (segment,) = shown["segments"]
    assert (shown["tokens"], segment["first"]) == (20, 0)
    assert segment["texts"] == [f"<{i}>" for i in rows[0, :20]]
    entropy = -(np.exp(log_probs) * log_probs).sum(-1)[0]
    assert segment["entropy"][0] is None and segment["match"][0] is None
    np.testing.assert_allclose(segment["entropy"][1:], entropy[:19], rtol=6e-3)
    # A rollout of the three tokens from slot t on is right with the product of their probabilities.
    chances = [np.exp(log_probs[0, t - 1, rows[0, t]]) for t in range(1, 20)]
    expected = [np.prod(chances[t : t + 3]) for t in range(17)] + [0.0, 0.0]
    np.testing.assert_allclose(segment["match"][1:], expected, rtol=6e-3)


def test_positions_hold_the_truth_and_what_was_right(kept):
    rows, record, _, _ = kept
    for shown, row in zip(record["shown"], rows, strict=True):
        assert len(shown["positions"]) == 2 and shown["length"] == 3
        for position in shown["positions"]:
            start = position["start"]
            truth = [f"<{i}>" for i in row[start : start + 3]]
            assert position["truth"] == truth and len(position["rollouts"]) == 2
            for rollout in position["rollouts"]:
                same = [a == b for a, b in zip(rollout["texts"], truth, strict=True)]
                assert rollout["same"] == same
                assert rollout["reward"] == pytest.approx(sum(same) / 3, abs=1e-4)
            # Rewards of a position are compared with each other: their advantages cancel.
            advantages = [rollout["advantages"][0] for rollout in position["rollouts"]]
            assert sum(advantages) == pytest.approx(0, abs=1e-3)


def test_rows_add_up_to_the_evaluation(kept):
    rows, record, log_probs, sums = kept
    names = {"tokens": "token_count", "nll": "nll_sum", "correct": "correct_sum"}
    names |= {"reward": "reward_sum", "rollouts": "rollout_count"}
    for name, total in names.items():
        assert len(record["rows"][name]) == 2
        assert sum(record["rows"][name]) == pytest.approx(float(sums[total]), rel=1e-5)
    truth = log_probs[0, np.arange(19), rows[0, 1:20]]
    assert record["rows"]["nll"][0] == pytest.approx(-truth.sum(), rel=1e-5)
    assert record["rows"]["tokens"] == [19, 22]


def test_of_long_rows_what_is_around_positions_is_kept():
    assert _spans(3, 100, [20, 60], 5) == [(3, 100)]
    starts = [1000, 1010, 9000, 16300]
    spans = _spans(0, 16384, starts, 5)
    assert sum(b - a for a, b in spans) <= SHOWN_TOKENS + 5 * len(starts)
    assert len(spans) == 3 and spans[-1][1] <= 16384
    for start in starts:
        assert any(a + 8 <= start and start + 5 + 8 <= b for a, b in spans)
    assert all(b < a for (_, b), (a, _) in itertools.pairwise(spans))
    assert _spans(0, 16384, [], 5) == [(0, SHOWN_TOKENS)]


class Kept:
    """A record that holds a number."""

    def __init__(self, value):
        self.value = value

    def fields(self):
        return {"data": "rows", "rows": {"nll": [self.value]}, "shown": []}


def values(folder):
    return {r["step"]: r["rows"]["nll"][0] for r in read_held_out(folder / HELD_OUT_FILE)}


def test_a_run_that_goes_on_leaves_each_evaluation_once(tmp_path):
    said = []
    log = HeldOutLog(tmp_path, 0, said.append, write=True)
    for step in (0, 2, 4):
        log.add(step, Kept(step))
    with (tmp_path / HELD_OUT_FILE).open("a") as file:
        file.write('{"step":6,"da')
    log = HeldOutLog(tmp_path, 2, said.append, write=True)  # a checkpoint of step 2
    assert values(tmp_path) == {0: 0, 2: 2} and len(said) == 1 and "line 4" in said[0]
    log.add(2, Kept(99))  # it is there already
    log.add(4, Kept(5))
    assert values(tmp_path) == {0: 0, 2: 2, 4: 5}
    HeldOutLog(tmp_path, 0, said.append, write=False).add(9, Kept(9))
    assert values(tmp_path) == {0: 0, 2: 2, 4: 5}


@pytest.mark.parametrize(
    "bad",
    [
        {"step": -1, "data": "", "rows": {}, "shown": []},
        {"step": 1, "rows": {}, "shown": []},
        {"step": 1, "data": "", "rows": {"nll": ["1"]}, "shown": []},
        {"step": 1, "data": "", "rows": {"nll": [True]}, "shown": []},
        {"step": 1, "data": "", "rows": {"nll": 3}, "shown": []},
        {"step": 1, "data": "", "rows": {}, "shown": [3]},
        {"step": 1, "data": "", "rows": {}, "shown": [{"row": 1}]},
    ],
)
def test_lines_that_are_no_records_are_left_out(tmp_path, bad):
    good = {"step": 0, "data": "", "rows": {"nll": [1.5, None]}, "shown": []}
    lines = [json.dumps(good), json.dumps(bad), json.dumps(good), "[1]", ""]
    (tmp_path / HELD_OUT_FILE).write_text("\n".join(lines))
    assert read_held_out(tmp_path / HELD_OUT_FILE) == [good]
