"""Post-training on prompts with reference answers: nested learning (ReFINE, arXiv 2602.16704).

A training step takes one batch of prompts and, if `posttrain.nested`, first trains on the prompts
alone, as mid-training would: ReFINE (`refine.objective="refine"`, its reward should be `hybrid`) or
the next-token loss (`"ntp"`), one update a `train.mini_batch_size`. Then it trains on the answers
of the same batch with the prompts as context: supervised on the reference answers' tokens, the end
of sequence among them (`posttrain.answers="sft"`), or by GRPO on sampled answers (`"grpo"`), one
update a `posttrain.mini_batch_size`.

| the paper's Table 4 | nested | objective | answers |
|---|---|---|---|
| SFT | False | | sft |
| nested SFT | True | ntp | sft |
| nested ReFINE | True | refine | sft |

There is one optimizer. Its moments run through all updates of a step, those on prompts and those on
answers; the learning rate changes from training step to training step only. As officially, the
reference answers of a batch make a single update unless `posttrain.mini_batch_size` says otherwise.

`run` prepares everything without writing, then continues the run that its folder holds or starts
one (`refine_jax.phases.loop`). Beside what the loop writes: WORKDIR/answers.jsonl, answers of the
final model to some held-out prompts.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refine_jax import distributed
from refine_jax.base.errors import ConfigError
from refine_jax.base.files import given_path, write_text
from refine_jax.config import Config
from refine_jax.data.pipeline import Batch, Dataset
from refine_jax.data.prompts import PromptCorpus, load_prompts, trim_batch, trimmed_width
from refine_jax.data.references import FRACTIONS
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.evaluation.metrics import METRICS, score
from refine_jax.parallel import use_mesh
from refine_jax.phases import loop
from refine_jax.phases.loop import Loop, TrainingParts
from refine_jax.phases.setup import data_options, only_run_in, rows_at_once
from refine_jax.refine.answers import (
    AnswerMethod,
    make_answer_eval,
    make_policy_step,
    make_supervised_step,
    prompts_of,
)
from refine_jax.refine.step import TrainState, make_eval_step, make_train_step
from refine_jax.report.held_out import HeldOutRecord
from refine_jax.settings import suggestion

ANSWERS_FILE = "answers.jsonl"
SHOWN_CHARACTERS = 400  # of the end of a prompt


def prepare(config: Config, workdir: Path, allow_change: Sequence[str] = ()) -> TrainingParts:
    """Build and check all that a run needs; see `refine_jax.phases.loop.prepare`."""
    if config.posttrain.metric not in METRICS:
        raise ConfigError(
            f"config.posttrain.metric must be one of {', '.join(METRICS)}. "
            f"Got: {config.posttrain.metric!r}.{suggestion(config.posttrain.metric, METRICS)}"
        )
    return loop.prepare(config, workdir, allow_change, _load)


def _load(config: Config, tokenizer: Tokenizer) -> PromptCorpus:
    return load_prompts(
        prompts=config.prompts,
        alternatives=config.posttrain.metric not in FRACTIONS,
        **data_options(config, tokenizer),
    )


def run(config: Config, workdir: str | Path, allow_change: Sequence[str] = ()) -> dict:
    """Train, or go on training, and report.

    Arguments, result and errors are those of `refine_jax.phases.midtrain.run`.
    """
    workdir = given_path(workdir, "workdir", write=True).absolute()
    with only_run_in(workdir) as check, use_mesh(config.mesh), distributed.Interrupt() as interrupt:
        return PosttrainLoop(prepare(config, workdir, allow_change), workdir).run(interrupt, check)


class PosttrainLoop(Loop):
    """Steps on prompts, then on their answers."""

    def __init__(self, parts: TrainingParts, workdir: Path):
        config, tokenizer = parts.config, parts.tokenizer
        train, posttrain = config.train, config.posttrain
        mini_batch = posttrain.mini_batch_size or train.batch_size
        super().__init__(parts, workdir)
        self.prompt_step = make_train_step(
            parts.model,
            self.optimizer,
            config.refine,
            mini_batch=train.mini_batch,
            micro_batch=rows_at_once(config),
            eos_id=tokenizer.end_ids,
            steps=train.steps,
            time_rollouts=train.time_rollouts,
        )
        method = AnswerMethod(
            parts.model,
            config.refine,
            max_answer_tokens=config.prompts.max_answer_tokens,
            eos_id=tokenizer.end_ids,
            pad_id=tokenizer.pad_id,
        )
        sizes = {"mini_batch": mini_batch, "micro_batch": rows_at_once(config)}
        self.supervised_step = make_supervised_step(method, self.optimizer, **sizes)
        self.policy_step = make_policy_step(
            method,
            self.optimizer,
            samples=posttrain.samples,
            temperature=config.refine.sampling_temperature,
            **sizes,
        )
        self.prompt_eval = make_eval_step(parts.model, config.refine, eos_id=tokenizer.end_ids)
        self.answer_eval = make_answer_eval(method)

    def describe_data(self) -> str:
        """Say what became of the prompts."""
        return self.parts.training.statistics.summary()

    def place(self, batch: Batch, dataset: Dataset) -> Batch:
        """Cut off the slots that are padding in all rows, and place the batch."""
        width = max(distributed.gather(trimmed_width(batch)))
        return super().place(trim_batch(batch, width), dataset)

    def train_step(
        self, step: int, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Any]]:
        """Run training step number `step` (from 0)."""
        rows = _rows(batch)
        metrics: dict[str, Any] = {}
        if self.config.posttrain.nested:
            prompts = prompts_of(rows, self.parts.tokenizer.pad_id)
            state, metrics = self.prompt_step(state, prompts)
        else:
            state = dataclasses.replace(state, step=_next(state.step))
        if self.config.posttrain.answers == "sft":
            state, on_answers = self.supervised_step(state, rows)
        else:
            examples = distributed.fetch(batch["example"])
            state, on_answers = self.policy_step(
                state, rows, step, lambda tokens, mask: self.rewards(examples, tokens, mask)
            )
        if self.config.posttrain.nested:
            on_answers["answer/grad_norm"] = on_answers.pop("grad/norm")
        return state, metrics | on_answers

    def describe_step(self, step: int) -> str:
        """Name the step; prompts of another width make it another program."""
        return "the training step"

    def rewards(self, examples: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Score answers [B, n, A]: [B, n]; 0 in rows of padding (example -1)."""
        scores = np.zeros(tokens.shape[:2], np.float32)
        for row, sample in np.ndindex(*scores.shape):
            if examples[row] >= 0:
                text = self.text(tokens[row, sample], mask[row, sample])
                scores[row, sample] = self.score(examples[row], text)
        return scores

    def text(self, tokens: np.ndarray, mask: np.ndarray) -> str:
        """Decode a sampled answer [A]; special tokens have no text."""
        tokenizer = self.parts.tokenizer
        answer = tokens[mask != 0]
        return tokenizer.decode(answer[~np.isin(answer, tokenizer.end_ids)])

    def score(self, example: int, response: str) -> float:
        """Score a response as configured."""
        return score(self.config.posttrain.metric, response, self.parts.corpus.answers[example])

    def evaluate(self, state: TrainState, record: HeldOutRecord) -> dict[str, float]:
        """Compute held-out figures; the same prompts and random keys every time.

        Of the reference answers: loss in nats a token, accuracy of the likeliest token, exact:
        answers of which every token is the likeliest. score of the greedy answers. Of the prompts:
        prompt_loss in nats a token, and the reward of ReFINE's rollouts.
        """
        sums: dict[str, float] = {"score_sum": 0.0}
        for index, batch in enumerate(self.parts.held_out):
            batch = self.place(batch, self.parts.held_out)
            examples, rows = distributed.fetch(batch["example"]), _rows(batch)
            answered, tokens, mask = distributed.fetch(self.answer_eval(state.model_params, rows))
            scores = self.rewards(examples, tokens[:, None], mask[:, None])
            prompts = prompts_of(rows, self.parts.tokenizer.pad_id)
            first = index * len(examples)
            of_prompts, seen = self.prompt_eval(state.model_params, prompts, self.eval_key, first)
            record.add(prompts["tokens"], seen)
            record.add_rows(score=scores[:, 0], real=examples >= 0)
            of_prompts = jax.device_get(of_prompts)
            answered |= {f"prompt_{name}": value for name, value in of_prompts.items()}
            for name, value in (answered | {"score_sum": scores.sum()}).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        tokens, rows = sums["token_count"], sums["row_count"]
        figures = {
            "eval/loss": sums["nll_sum"] / tokens,
            "eval/accuracy": sums["correct_sum"] / tokens,
            "eval/exact": sums["exact_sum"] / rows,
            "eval/score": sums["score_sum"] / rows,
            "eval/prompt_loss": sums["prompt_nll_sum"] / max(sums["prompt_token_count"], 1.0),
        }
        if sums["prompt_rollout_count"]:
            figures["eval/reward"] = sums["prompt_reward_sum"] / sums["prompt_rollout_count"]
        return figures

    def show_examples(self, state: TrainState) -> None:
        """Write the final answers to the first held-out prompts."""
        batch = self.place(next(iter(self.parts.held_out)), self.parts.held_out)
        examples, rows = distributed.fetch(batch["example"]), _rows(batch)
        _, tokens, mask = self.answer_eval(state.model_params, rows)
        prompts = prompts_of(rows, self.parts.tokenizer.pad_id)
        tokens, mask, prompts = distributed.fetch((tokens, mask, prompts))
        if not distributed.is_writer():
            return
        lines = []
        for row, example in enumerate(examples):
            if example < 0:
                continue
            response = self.text(tokens[row], mask[row])
            ids = prompts["tokens"][row][prompts["segments"][row] != 0]
            record = {
                "prompt_end": self.parts.tokenizer.decode(ids)[-SHOWN_CHARACTERS:],
                "answers": self.parts.corpus.answers[example],
                "response": response,
                "score": self.score(example, response),
            }
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        write_text(self.workdir / ANSWERS_FILE, "".join(lines))


@jax.jit
def _next(step: jax.Array) -> jax.Array:
    return step + 1


def _rows(batch: Batch) -> dict[str, jax.Array]:
    """Take the rows for a step, without what says which prompts of the corpus they are."""
    return {name: jnp.asarray(x) for name, x in batch.items() if name != "example"}
