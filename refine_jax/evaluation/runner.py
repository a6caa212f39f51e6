"""Answer questions greedily, score the answers, and keep each in WORKDIR/predictions.jsonl.

The parameters that a group of questions is answered with may be adapted to its prompts first
(`refine_jax.refine.adapt`). An evaluation that was interrupted continues with the groups that lack
a record; with reset `never`, the adaptation to the groups before is done again.

Several processes answer groups side by side, each with the whole model; all get all records, and
process 0 writes them.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from refine_jax import distributed
from refine_jax.base.errors import DataError
from refine_jax.base.files import (
    append,
    json_field,
    parse_object,
    path_of,
    recover_lines,
    short,
)
from refine_jax.base.growing import Journal
from refine_jax.compiling import Compilations
from refine_jax.evaluation.metrics import score
from refine_jax.evaluation.questions import Question
from refine_jax.generation import Generated, Generator, Sampling
from refine_jax.models.transformer import Params
from refine_jax.refine.adapt import Adapter, Cost

PREDICTIONS = "predictions.jsonl"
RECORD = "evaluation.json"
FIELDS: dict[str, type] = {
    "id": str,
    "task": str,
    "set": str,
    "index": int,
    "prompt_tokens": int,
    "cut_tokens": int,
    "response": str,
    "new_tokens": int,
    "finish_reason": str,
    "answers": list,
    "metric": str,
    "score": float,
    "seconds_read": float,
    "seconds_generate": float,
    "metadata": dict,
}
"""What a record holds."""
_COSTS = ("seconds", "compiled", "tokens", "rollout_tokens", "steps", "skipped")


class Predictions(contextlib.AbstractContextManager):
    """The records of an evaluation, one JSON object a question; written as they come.

    Every process has all of them; process 0 reads and writes. Lines that are no records go to
    `predictions.jsonl.dropped`, which is said; their questions are answered again.

    workdir: existing folder. required: fields that a record must have.

    Attributes:
      records: {name of the question: record} of all that are done.
    """

    def __init__(self, workdir: Path, required: Collection[str] = ("id", "score")):
        self._path = path_of(workdir) / PREDICTIONS
        mine = []
        if distributed.is_writer():
            mine = recover_lines(self._path, record_parser(required), distributed.say)
        records = distributed.gather_json(mine)[0]
        self.records = {record["id"]: record for record in records}
        self._file = None
        if distributed.is_writer():
            self._rewrite()

    def check(self, questions: Sequence[Question]) -> None:
        """Take out records that are not of these questions, like lines that are no records.

        So a file that was edited or brought from elsewhere neither ends the evaluation nor counts.
        """
        asked = {question.name: question for question in questions}
        faults: dict[str, str] = {}
        for name, record in self.records.items():
            wanted = _facts(asked[name]) if name in asked else {"id": "that of a question"}
            wrong = [field for field, value in wanted.items() if record.get(field) != value]
            if wrong:
                faults[name] = f"{wrong[0]} must be {short(wanted[wrong[0]])}"
        if not faults:
            return
        name, fault = next(iter(faults.items()))
        distributed.say(
            f"{self._path}: left out {len(faults)} records that are not of this evaluation's "
            f"questions, such as {short(name)} ({fault}). They are kept in {PREDICTIONS}.dropped."
        )
        dropped = [self.records.pop(name) for name in faults]
        if self._file:
            self._file.close()
            aside = self._path.with_name(f"{PREDICTIONS}.dropped")
            append(aside, "".join(map(_line, dropped)).encode("utf-8"))
            self._rewrite()

    def _rewrite(self) -> None:
        """Write all records and no other line; records to come are appended."""
        self._file = Journal(self._path, map(_line, self.records.values()))

    def add(self, records: Sequence[dict]) -> None:
        """Append records of questions that have none yet (see `Journal`)."""
        new = [record for record in records if record["id"] not in self.records]
        self.records |= {record["id"]: record for record in new}
        if self._file:
            self._file.add(*map(_line, new))

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()

    def __exit__(self, *exception) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class Answerer:
    """What answers a group of questions.

    params: of the trained model. generator: takes them, or the adapter's copies, if it makes some.
    sampling: of the answers. adapter: None: the trained parameters answer everything. before: the
    generator of answers by the trained parameters, to compare the adapter's with; None: no such.
    """

    params: Params
    generator: Generator
    sampling: Sampling
    adapter: Adapter | None = None
    before: Generator | None = None

    def prepare(self, group: Sequence[Question]) -> tuple[Params, list[Cost | None]]:
        """Return the parameters to answer a group with, and what they cost."""
        if self.adapter is None:
            return self.params, [None] * len(group)
        adapted = self.adapter.adapt([q.tokens for q in group], [q.name for q in group])
        return adapted.params, adapted.costs

    def answer(self, group: Sequence[Question]) -> list[dict]:
        """Adapt, generate and score: a record for each question."""
        asked = list(group)
        if self.adapter is not None and self.adapter.copies > 1:
            # As many rows as copies, so that all groups run in the same programs.
            asked += asked[:1] * (self.adapter.copies - len(asked))
        before: Sequence[Generated | None] = [None] * len(group)
        if self.before is not None:
            before, _, _ = self._generate(self.before, self.params, asked)
        params, costs = self.prepare(group)
        answers, read, generate = self._generate(self.generator, params, asked)
        times = {"seconds_read": read / len(group), "seconds_generate": generate / len(group)}
        return [
            _record(question, answer, cost, times, earlier)
            for question, answer, cost, earlier in zip(group, answers, costs, before, strict=False)
        ]

    def _generate(
        self, generator: Generator, params: Params, asked: Sequence[Question]
    ) -> tuple[Sequence[Generated], float, float]:
        """Answers, and the seconds of reading the prompts and of generating."""
        begin = time.perf_counter()
        prefix = generator.read(params, [question.tokens for question in asked])
        prefix.hidden.block_until_ready()
        read = time.perf_counter()
        answers = generator.generate(
            params,
            prefix,
            self.sampling,
            max_new_tokens=[question.budget for question in asked],
            ids=[_number(question.name) for question in asked],
            consume=True,
        )
        return answers, read - begin, time.perf_counter() - read


def evaluate(
    groups: Sequence[Sequence[Question]],
    answerer: Answerer,
    predictions: Predictions,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Answer all questions that have no record yet; returns whether all have one.

    stop: asked before each group (of each process); True ends the evaluation there, and is to be
        the same on all processes.
    """
    left = collections.Counter(question.set_name for question in _all(groups))
    carries = answerer.adapter is not None and answerer.adapter.carries_over
    index, count = jax.process_index(), jax.process_count()
    # disable=None: no bar where standard error is not a terminal.
    hidden = None if distributed.is_writer() else True
    with (
        tqdm(total=left.total(), unit="example", disable=hidden, dynamic_ncols=True) as bar,
        Compilations(_say) as compilations,
    ):
        for first in range(0, len(groups), count):
            if stop():
                return False
            turn = groups[first : first + count]
            mine: list[dict] = []
            for group in turn[index : index + 1]:
                longest = max(len(question.tokens) for question in group)
                with compilations.of(f"what answers prompts of {longest:,} tokens"):
                    if any(q.name not in predictions.records for q in group):
                        mine = answerer.answer(group)
                    elif carries:
                        answerer.prepare(group)
            for records in distributed.gather_json(mine):
                predictions.add(records)
            for question in _all(turn):
                bar.update()
                left[question.set_name] -= 1
                if not left[question.set_name]:
                    _say(_line_of_set(question.set_name, groups, predictions))
    return True


def _say(message: str) -> None:
    with tqdm.external_write_mode(file=sys.stdout):
        distributed.say(message)


def _all(groups: Sequence[Sequence[Question]]) -> Iterator[Question]:
    return (question for group in groups for question in group)


def _line_of_set(set_name: str, groups, predictions: Predictions) -> str:
    scores = [predictions.records[q.name]["score"] for q in _all(groups) if q.set_name == set_name]
    return f"{set_name}: {100 * math.fsum(scores) / len(scores):.1f} % of {len(scores)}"


def _facts(question: Question) -> dict[str, Any]:
    """Return what a record says of its question."""
    example = question.example
    return {
        "id": question.name,
        "task": example.task,
        "set": question.set_name,
        "index": example.index,
        "prompt_tokens": len(question.tokens),
        "cut_tokens": question.cut,
        "answers": list(example.answers),
        "metric": question.metric,
    }


def _record(
    question: Question,
    answer: Generated,
    cost: Cost | None,
    times: dict[str, float],
    before: Generated | None,
) -> dict[str, Any]:
    example = question.example
    record = {
        **_facts(question),
        "response": answer.text,
        "new_tokens": len(answer.tokens),
        "finish_reason": answer.finish_reason,
        "score": score(question.metric, answer.text, example.answers),
        **{name: round(seconds, 6) for name, seconds in times.items()},
        "metadata": dict(example.metadata),
    }
    if cost is not None:
        record["adapt"] = cost._asdict() | {
            "seconds": round(cost.seconds, 6),
            "loss": cost.loss if math.isfinite(cost.loss) else None,
        }
    if before is not None:
        points = score(question.metric, before.text, example.answers)
        record["before"] = {"response": before.text, "score": points}
    return record


def record_parser(required: Collection[str]) -> Callable[[bytes], dict[str, Any]]:
    """Make a parser of the lines of one `predictions.jsonl`: each question once."""
    seen: set[str] = set()

    def get(fields: dict, name: str, kind: Any) -> Any:
        return json_field(fields, name, kind, where="it", error=DataError)

    def parse(line: bytes) -> dict[str, Any]:
        record = parse_object(line, "it", DataError)
        fields = {name: get(record, name, kind) for name, kind in FIELDS.items()}
        missing = [name for name in required if fields[name] is None]
        if missing:
            raise DataError(f"it has no {', '.join(missing)}")
        if not 0 <= (fields["score"] or 0) <= 1:
            raise DataError(f"score must be from 0 to 1. Got: {short(fields['score'])}")
        costs = get(record, "adapt", dict)
        for name in _COSTS if costs is not None else ():
            if get(costs, name, (float, bool)) is None:
                raise DataError(f"adapt has no {name}")
        before = get(record, "before", dict)
        for name, kind in {"response": str, "score": float}.items() if before is not None else ():
            if get(before, name, kind) is None:
                raise DataError(f"before has no {name}")
        if record["id"] in seen:
            raise DataError(f"{short(record['id'])} is there already")
        seen.add(record["id"])
        return record

    return parse


def _number(name: str) -> int:
    """Hash a question to 32 bits, for where texts are drawn at random."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"
