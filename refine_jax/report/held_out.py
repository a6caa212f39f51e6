"""What evaluations during a run saw of held-out rows: `held_out.jsonl`, for the page of the run.

One JSON object an evaluation: `step`; `data`, the fingerprint of the held-out rows; `rows`, figures
of each row in order ({name: [numbers]}), which runs on the same rows are compared by; `shown`, a
few rows token by token with their rollouts. It holds no times, so that a run which was stopped and
continued writes the same file.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refine_jax import distributed
from refine_jax.base.errors import DataError
from refine_jax.base.files import (
    json_field,
    parse_object,
    path_of,
    read_lines,
    recover_lines,
    short,
)
from refine_jax.base.growing import Journal
from refine_jax.config import RefineConfig
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.generation.text import token_texts

HELD_OUT_FILE = "held_out.jsonl"
SHOWN_ROWS = 2
SHOWN_TOKENS = 512
"""Most tokens of a row that are kept: of a longer row only those around its positions."""
_ROW_FIGURES = {
    "tokens": "row_token_count",
    "nll": "row_nll_sum",
    "correct": "row_correct_sum",
    "reward": "row_reward_sum",
    "rollouts": "row_rollout_count",
}
"""What `rows` holds, by the names of `refine.step.make_eval_step`."""


class HeldOutRecord:
    """One evaluation as it goes: figures of every row, and the first rows that rollouts fit in.

    Args:
      tokenizer: Of the model.
      refine: How the rollouts were made.
      data: Fingerprint of the held-out rows.
    """

    def __init__(self, tokenizer: Tokenizer, refine: RefineConfig, data: str):
        self._tokenizer, self._refine, self._data = tokenizer, refine, data
        self._rows: dict[str, list[float]] = {}
        self._shown: list[dict[str, Any]] = []
        self._batches = 0

    def add(self, tokens, seen: Mapping[str, Any]) -> None:
        """Take a batch [B, T] and what `refine.step.make_eval_step` saw of it.

        Every process calls this, as the arrays may be spread over all of them.
        """
        of_rows = {figure: seen[name] for figure, name in _ROW_FIGURES.items()}
        self.add_rows(**distributed.fetch(of_rows))
        if self._batches == 0:
            tokens, seen = distributed.fetch((tokens, seen))
            usable = np.flatnonzero(np.asarray(seen["valid"]).any(axis=1))
            self._shown = [self._show(row, tokens[row], seen) for row in usable[:SHOWN_ROWS]]
        self._batches += 1

    def add_rows(self, **figures) -> None:
        """Append figures of the rows of a batch, [B] each."""
        for name, values in figures.items():
            kept = self._rows.setdefault(name, [])
            kept += [rounded(value, 6) for value in np.asarray(values, np.float64)]

    def fields(self) -> dict[str, Any]:
        """Give the record as JSON values, without its step."""
        return {"data": self._data, "rows": self._rows, "shown": self._shown}

    def _show(self, row: int, tokens: np.ndarray, seen: Mapping[str, Any]) -> dict[str, Any]:
        """Give a row as JSON values: its text in segments, its positions with their rollouts."""
        k, n = self._refine.rollout_length, self._refine.rollouts_per_position
        starts, valid = seen["starts"][row][::n], seen["valid"][row].reshape(-1, n).all(axis=1)
        groups = {
            name: np.asarray(seen[name][row]).reshape(len(starts), n, *seen[name].shape[2:])
            for name in ("rewards", "advantages", "tokens", "truth")
        }
        order = [index for index in np.argsort(starts, kind="stable") if valid[index]]
        real = np.flatnonzero(seen["mask"][row])
        first, end = int(real[0]), int(real[-1]) + 1
        texts = token_texts(self._tokenizer.decode, tokens[first:end])
        # Figures of the prediction of slot t + 1, made in slot t, stand with slot t + 1 here.
        ahead = {
            name: [None, *(to_digits(x, 3) for x in seen[name][row][first : end - 1])]
            for name in ("entropy", "match")
        }
        spans = _spans(first, end, [int(starts[index]) for index in order], k)
        return {
            "row": int(row),
            "reward": self._refine.reward,
            "length": k,
            "tokens": end - first,
            "segments": [
                {
                    "first": a - first,
                    "texts": texts[a - first : b - first],
                    **{name: values[a - first : b - first] for name, values in ahead.items()},
                }
                for a, b in spans
            ],
            "positions": [
                {
                    "start": int(starts[index]) - first,
                    "truth": self._texts(groups["truth"][index, 0]),
                    "rollouts": [
                        {
                            "texts": self._texts(groups["tokens"][index, sample]),
                            "same": (
                                groups["tokens"][index, sample] == groups["truth"][index, sample]
                            ).tolist(),
                            "reward": rounded(groups["rewards"][index, sample], 4),
                            "advantages": [
                                rounded(x, 4) for x in groups["advantages"][index, sample]
                            ],
                        }
                        for sample in range(n)
                    ],
                }
                for index in order
            ],
        }

    def _texts(self, tokens: np.ndarray) -> list[str]:
        return token_texts(self._tokenizer.decode, tokens)


def _spans(first: int, end: int, starts: Sequence[int], k: int) -> list[tuple[int, int]]:
    """Choose the slots of a row from `first` to `end` to keep: all, or those around the starts."""
    if end - first <= SHOWN_TOKENS or not starts:
        return [(first, min(end, first + SHOWN_TOKENS))]
    room = max(SHOWN_TOKENS // len(starts) - k, 8)
    spans: list[tuple[int, int]] = []
    for start in starts:
        a, b = max(first, start - room * 2 // 3), min(end, start + k + room // 3)
        if spans and a <= spans[-1][1]:
            before = spans.pop()
            a, b = before[0], max(b, before[1])
        spans.append((a, b))
    return spans


def rounded(value, digits: int) -> float | None:
    """Round a number to so many decimals; None where it is not finite."""
    value = float(value)
    return round(value, digits) if math.isfinite(value) else None


def to_digits(value, digits: int) -> float | None:
    """Round a number to so many significant digits; None where it is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


class HeldOutLog:
    """Appends records to `held_out.jsonl`; those after step `start` are removed first.

    So a run that continues from an earlier checkpoint leaves each evaluation once. Lines that are
    no records go to `held_out.jsonl.dropped`, which `say` is told. write: whether this process
    writes.
    """

    def __init__(self, workdir: Path, start: int, say: Callable[[str], None], *, write: bool):
        path = path_of(workdir) / HELD_OUT_FILE
        self._write, self._steps = write, set[int]()
        if not write:
            return
        records = [r for r in recover_lines(path, _parser(), say) if r["step"] <= start]
        self._steps = {record["step"] for record in records}
        self._file = Journal(path, map(_line, records))

    def add(self, step: int, record: HeldOutRecord) -> None:
        """Append the evaluation after `step`, once; it is on disk when this returns."""
        if self._write and step not in self._steps:
            self._steps.add(step)
            self._file.add(_line({"step": step} | record.fields()))
            self._file.flush()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":")) + "\n"


def read_held_out(path: Path) -> list[dict[str, Any]]:
    """Read a `held_out.jsonl` in the order of its steps; no records if there is no file."""
    records = read_lines(path, _parser())[0] if path.exists() else []
    return sorted(records, key=lambda record: record["step"])


def _parser() -> Callable[[bytes], dict[str, Any]]:
    """Make a parser of lines, each step once, with what the page reads of the right types."""
    seen: set[int] = set()

    def parse(line: bytes) -> dict[str, Any]:
        record = parse_object(line, "it", DataError)
        step = _get(record, "step", int)
        if not 0 <= step < 1 << 53:
            raise DataError(f"it must have a step, a whole number. Got: {short(step)}")
        _get(record, "data", str)
        for name, values in _get(record, "rows", dict).items():
            _numbers(values, name)
        for shown in _objects(_get(record, "shown", list)):
            _check_shown(shown)
        if step in seen:
            raise DataError(f"step {step} is there already")
        seen.add(step)
        return record

    return parse


def _check_shown(shown: dict[str, Any]) -> None:
    for name, kind in {"row": int, "length": int, "tokens": int, "reward": str}.items():
        _get(shown, name, kind)
    for segment in _objects(_get(shown, "segments", list)):
        _get(segment, "first", int)
        texts = _strings(_get(segment, "texts", list))
        for name in ("entropy", "match"):
            if len(_numbers(_get(segment, name, list), name)) != len(texts):
                raise DataError(f"{name} must have a number for each token")
    for position in _objects(_get(shown, "positions", list)):
        _get(position, "start", int)
        _strings(_get(position, "truth", list))
        for rollout in _objects(_get(position, "rollouts", list)):
            texts = _strings(_get(rollout, "texts", list))
            if len(_get(rollout, "same", list)) != len(texts):
                raise DataError("same must say true or false of each token")
            _numbers([rollout.get("reward")], "reward")
            _numbers(_get(rollout, "advantages", list), "advantages")


def _get(fields: dict[str, Any], name: str, kind: type) -> Any:
    value = json_field(fields, name, kind, where="it", error=DataError)
    if value is None:
        raise DataError(f"it has no {name}")
    return value


def _objects(values: list) -> list[dict[str, Any]]:
    return _all(values, dict, "an object")


def _strings(values: list) -> list[str]:
    return _all(values, str, "a text")


def _numbers(values: Any, name: str) -> list[float | None]:
    known = [value for value in values if value is not None] if isinstance(values, list) else [""]
    for value in known:
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
            raise DataError(f"{name} must be a list of numbers")
    return values


def _all(values: list, kind: type, what: str) -> list:
    if not all(isinstance(value, kind) for value in values):
        raise DataError(f"what it lists must be {what} each")
    return values


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], figure: str, count: str
) -> tuple[float, float | None, int] | None:
    """Compare a mean over held-out rows between two records, paired by row.

    figure, count: names of the sums whose ratio is the mean, as "nll" over "tokens".

    Returns the second mean minus the first, half of its 95 % interval (None with one row), and the
    number of rows; None where the records are not of the same rows. The interval is that of a
    ratio of sums over rows (Cochran, Sampling Techniques, 1977, section 6.3), Student's.
    """
    from scipy.special import stdtrit

    sums = [record["rows"].get(name) for record in (first, second) for name in (figure, count)]
    if first["data"] != second["data"] or None in sums:
        return None
    if len({len(values) for values in sums}) > 1:
        return None
    rows = [row for row in zip(*sums, strict=True) if None not in row and row[1] and row[3]]
    if not rows or any(row[1] != row[3] for row in rows):
        return None
    before, counts, after, _ = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    mean = (after.sum() - before.sum()) / counts.sum()
    if len(rows) < 2:
        return float(mean), None, len(rows)
    residuals = after - before - mean * counts
    deviation = np.sqrt(len(rows) / (len(rows) - 1) * np.sum(residuals**2)) / counts.sum()
    return float(mean), float(stdtrit(len(rows) - 1, 0.975) * deviation), len(rows)


def thinned(records: Sequence[Any], most: int) -> list[Any]:
    """Choose at most so many of the records, evenly spread, the first and the last among them."""
    if len(records) <= most:
        return list(records)
    places = np.linspace(0, len(records) - 1, most).round().astype(int)
    return [records[place] for place, _ in itertools.groupby(places)]
