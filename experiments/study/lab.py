"""What the study does with one model on one task: pre-train, continue by an arm, adapt, measure.

Everything goes through the package's own objective and step; what is particular to the study is
the text, the sizes, what is measured, and the rules of `arms.RULES`. A program is compiled once for
all seeds, learning rates, weights and numbers of steps of an arm.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from arms import Arm
from corpus import VALUE, RecallRows
from tasks import Task

from refine_jax.config import OptimizerConfig, RefineConfig, TestTimeConfig
from refine_jax.models.config import model_config
from refine_jax.models.head import logits
from refine_jax.models.transformer import Model, Params
from refine_jax.refine.adapt import Adapter
from refine_jax.refine.answers import AnswerMethod, make_supervised_step, prompts_of
from refine_jax.refine.objective import Objective
from refine_jax.refine.optimizer import make_optimizer, make_schedule
from refine_jax.refine.reading import Batch, read_rows, target_weights
from refine_jax.refine.step import TrainState, make_train_step, update_rows

# First numbers of the keys that rows are drawn with.
PRETRAIN, CONTINUE, POSTTRAIN, MEASURE, TUNE, ASK = range(6)
_BINS = 10  # of the calibration


@dataclasses.dataclass(frozen=True)
class Training:
    """So many steps of `rows` rows, the first ones easy; the rate falls to 0 as a cosine.

    rate: at the start, where no arm says it. easy: part of the steps.
    """

    rows: int
    steps: int
    rate: float = 0.0
    easy: float = 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """How large everything is, for one family on one task.

    fields: of config.json. fast_rate: LaCT's initial rate (0.001 is made for chunks of 2048
    tokens); None: as published. sizes: of the section `refine`, for all arms. measured: held-out
    rows. scales: lengths that are measured, as multiples of the training length. bases: seeds
    of base models, which all seeds share in turn; none: each seed has its own.
    """

    fields: Mapping[str, Any]
    pretrain: Training
    arms: Training
    posttrain: Training
    sizes: Mapping[str, Any]
    fast_rate: float | None = None
    measured: int = 512
    adapted: int = 96
    scales: tuple[int, ...] = (1, 2, 4)
    bases: tuple[int, ...] = ()


class StudyObjective(Objective):
    """The library's objective with a weight of the policy loss that may be traced."""

    def __init__(self, model: Model, config: RefineConfig, weight: jax.Array, eos: int | None):
        super().__init__(model, config, eos_id=eos, max_documents=1)
        self.weight = weight

    def mini_batch(self, batch: Batch, policy_weight: jax.Array | float | None = None):
        """Count as `Objective` does, with this objective's own weight."""
        return super().mini_batch(batch, self.weight)


class RuleObjective(StudyObjective):
    """Next-token training whose tokens weigh by a rule of `arms.RULES`; rows come with `recall`."""

    def __init__(self, rule: str, *args: Any):
        super().__init__(*args)
        self.rule = rule

    def _loss(self, params, batch, whole, keys):
        tokens = batch["tokens"]
        hidden, _ = self.model.forward(params, tokens, None)
        log_probs = jax.nn.log_softmax(logits(hidden, self.model.head(params)))
        targets = jnp.roll(tokens, -1, axis=1)
        nll = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        p = jax.lax.stop_gradient(jnp.exp(-nll))
        extra = {
            "p": lambda: p * nll,
            "p^3": lambda: p**3 * nll,
            "1-p": lambda: (1 - p) * nll,
            "smoothing": lambda: -jnp.mean(log_probs, axis=-1),
            "oracle": lambda: jnp.roll(batch["recall"], -1, axis=1) * nll,
        }[self.rule]()
        weights = target_weights(tokens, None) / whole.token_count
        ntp = jnp.sum(weights * nll)
        return ntp + self.weight * jnp.sum(weights * extra), {"loss/ntp": ntp}


def _optimizer(rate: jax.Array | float) -> optax.GradientTransformation:
    """The library's AdamW at rate 1, scaled: its updates are linear in the rate."""
    config = OptimizerConfig(learning_rate=1.0, clip_norm=1.0)
    return optax.chain(make_optimizer(config, steps=1), optax.scale(rate))


class Lab:
    """One model on one task."""

    def __init__(self, family: str, plan: Plan, task: Task):
        self.family, self.plan, self.task = family, plan, task
        self.model = Model(model_config({**plan.fields, "vocab_size": task.vocab_size}))

    # -- training -------------------------------------------------------------------------------

    def pretrain(self, seed: int) -> Params:
        """A base model from random weights."""
        training = self.plan.pretrain
        params = jax.jit(self.model.init)(jax.random.key(seed))
        if self.plan.fast_rate is not None:
            # Rates are softplus(projection + softplus^-1(0.001)).
            shift = math.log(math.expm1(self.plan.fast_rate) / math.expm1(0.001))
            params["layers"]["attn"]["lr_proj"]["bias"] += shift
        warmup = training.steps // 20
        return self._train(
            params, Arm({"objective": "ntp"}), training, seed, PRETRAIN, training.rate, warmup
        )

    def continue_by(self, params: Params, arm: Arm, rate: float, seed: int) -> Params:
        """Train on by an arm; all arms of a seed read the same rows in the same order."""
        steps = arm.times * self.plan.arms.steps
        training = dataclasses.replace(self.plan.arms, steps=steps)
        return self._train(params, arm, training, seed, CONTINUE, rate, 0)

    def _train(self, params, arm, training, seed, stream, rate, warmup) -> Params:
        schedule = OptimizerConfig(learning_rate=rate, schedule="cosine", warmup_steps=warmup)
        rates = np.asarray(make_schedule(schedule, training.steps)(np.arange(training.steps)))
        state, update = self._begin(params, arm, seed), self._update(arm)
        batches = self._batches(training, stream, seed)
        for batch, step_rate in zip(batches, rates, strict=True):
            state = update(state, batch, step_rate, arm.config(self.plan.sizes).lambda_rl)
        return state.params

    def _begin(self, params: Params, arm: Arm, seed: int) -> TrainState:
        copy = jax.tree.map(jnp.copy, params)
        config = arm.config(self.plan.sizes)
        return TrainState.create(copy, _optimizer(1.0), jax.random.key(seed), config)

    def objective(self, config: RefineConfig, rule: str | None, weight: Any) -> StudyObjective:
        """The objective of an arm."""
        args = (self.model, config, weight, self.task.eos)
        return StudyObjective(*args) if rule is None else RuleObjective(rule, *args)

    def _update(self, arm: Arm) -> Callable[..., TrainState]:
        config = dataclasses.replace(arm.config(self.plan.sizes), lambda_rl=1.0)
        return self._program(config, arm.rule)

    @functools.cache  # noqa: B019 - a Lab lives as long as the study
    def _program(self, config: RefineConfig, rule: str | None) -> Callable[..., TrainState]:
        @functools.partial(jax.jit, donate_argnums=0)
        def update(state, batch, rate, weight):
            objective = self.objective(config, rule, weight)
            return update_rows(objective, _optimizer(rate), state, batch)[0]

        return update

    def _batches(self, training: Training, *key: int) -> Iterator[Batch]:
        for step in range(training.steps):
            easy = step < training.easy * training.steps
            rows = self.task.documents(training.rows, *key, step, easy=easy)
            yield {"tokens": rows.tokens, "recall": rows.recall}

    def step_seconds(self, params: Params, arms: Mapping[str, Arm], rounds: int = 16) -> dict:
        """Median seconds of a training step of each arm.

        They take turns, so that whatever else the machine does slows all of them. Seconds are of
        this process' processor time, which other processes slow least.
        """
        programs = {name: self._update(arm) for name, arm in arms.items()}
        states = {name: self._begin(params, arm, 0) for name, arm in arms.items()}
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        training = dataclasses.replace(self.plan.arms, steps=rounds + 1)
        for number, batch in enumerate(self._batches(training, TUNE, 0)):
            for name, update in programs.items():
                begin = time.process_time()
                states[name] = jax.block_until_ready(update(states[name], batch, 0.0, 1.0))
                if number > 0:  # the first one compiles
                    seconds[name].append(time.process_time() - begin)
        return {name: statistics.median(times) for name, times in seconds.items()}

    # -- prompts with answers -------------------------------------------------------------------

    def posttrain(self, params: Params, arm: Arm | None, rate: float, seed: int) -> Params:
        """Train on prompts by an arm, then on their answers, batch by batch; None: on answers."""
        training, nested = self.plan.posttrain, arm is not None
        arm = arm or Arm({"objective": "ntp"})
        on_prompts, on_answers = self._posttrain_steps(arm.config(self.plan.sizes))
        state = self._begin(params, arm, seed)
        for step in range(training.steps):
            rows = self.task.prompts(training.rows, POSTTRAIN, seed, step)
            batch = {
                "tokens": rows.tokens,
                "segments": np.ones_like(rows.tokens),
                "answer_mask": self._answers(rows),
            }
            if nested:
                state = on_prompts(state, batch, rate)
            state = on_answers(state, batch, rate)
        return state.params

    def _answers(self, rows: RecallRows) -> np.ndarray:
        mask = np.zeros_like(rows.tokens)
        mask[:, -self.task.answer :] = 1
        return mask

    @functools.cache  # noqa: B019
    def _posttrain_steps(self, config: RefineConfig):
        rows, pad = self.plan.posttrain.rows, self.task.eos or 0
        sizes = {"mini_batch": rows, "micro_batch": rows}
        method = AnswerMethod(
            self.model,
            config,
            max_answer_tokens=self.task.answer,
            eos_id=pad,
            pad_id=pad,
        )

        @jax.jit
        def on_prompts(state, batch, rate):
            step = make_train_step(
                self.model, _optimizer(rate), config, eos_id=self.task.eos, **sizes
            )
            return step.run(state, prompts_of(batch, pad))[0]

        @jax.jit
        def on_answers(state, batch, rate):
            step = make_supervised_step(method, _optimizer(rate), **sizes)
            return step.update(state, batch)[0]

        return on_prompts, on_answers

    def answer(self, params: Params, *, stream: int = ASK) -> dict[str, float]:
        """{"recall": fraction of held-out questions answered whole}."""
        rows = self.task.prompts(self.plan.measured, stream, held_out=True)
        return {"recall": self._figures(params, rows)["recall"]}

    def adapt_and_answer(
        self, params: Params, arm: Arm, rate: float, seed: int, *, stream: int = ASK
    ) -> dict[str, float]:
        """Adapt a copy of the parameters to each prompt by an arm, then answer it.

        {"recall": of the first prompts of those that `answer` asks, "recall_before": without}
        """
        rows, answer = self.task.prompts(self.plan.adapted, stream, held_out=True), self.task.answer
        copies = min(8, self.plan.adapted)
        adapter = Adapter(
            self.model,
            params,
            _optimizer(rate),
            arm.config(self.plan.sizes),
            TestTimeConfig(reset="example", copies=copies),
            key=jax.random.key(seed),
            eos_id=self.task.eos,
            pad_id=self.task.eos or 0,
        )
        correct = []
        for begin in range(0, len(rows.tokens), copies):
            group = rows.tokens[begin : begin + copies]
            names = [str(begin + index) for index in range(len(group))]
            adapted = adapter.adapt(group[:, :-answer].tolist(), names)
            read = jax.vmap(self._read)(adapted.params, group[:, None])
            correct.append(np.asarray(read["correct"])[:, 0])
        before = self._figures(params, rows)["recall"]
        return {"recall": _recall(np.concatenate(correct), rows), "recall_before": before}

    # -- measuring ------------------------------------------------------------------------------

    def measure(self, params: Params, stream: int = MEASURE) -> dict[str, float]:
        """Figures of held-out rows of each length, `NAME_S` for those of S times the training's.

        loss: nats a token. recall: fraction of repeated values that greedy decoding gets whole.
        sampled: the same for sampling at temperature 1, as its exact expectation. calibration: of
        repeated values' tokens, the mean difference of confidence and accuracy over BINS equal
        bins of confidence, weighted by their tokens.
        """
        found = {}
        for scale in self.plan.scales:
            rows = self.task.documents(self.plan.measured, stream, held_out=True, scale=scale)
            figures = self._figures(params, rows)
            found |= {f"{name}_{scale}": value for name, value in figures.items()}
        return found

    def cooled(self, params: Params, temperature: float) -> Params:
        """The same model with its logits divided by a temperature."""
        head = jax.tree.map(lambda x: x / temperature, params["lm_head"])
        return {**params, "lm_head": head}

    def fingerprint(self, params: Params) -> str:
        """A name of the parameters, the same for the same numbers only."""
        digest = hashlib.blake2b(digest_size=6)
        for leaf in jax.tree.leaves(params):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def _read(self):
        @jax.jit
        def read(params, tokens):
            reading = read_rows(self.model, params, {"tokens": tokens}, with_trace=False)
            highest = jnp.max(logits(reading.hidden, self.model.head(params)), axis=-1)
            total = jax.nn.logsumexp(logits(reading.hidden, self.model.head(params)), axis=-1)
            return {
                "correct": reading.stats.correct,
                "nll": reading.stats.nll,
                "confidence": jnp.exp(highest - total),
            }

        return read

    def _figures(self, params: Params, rows: RecallRows) -> dict[str, float]:
        size = max(8192 // rows.tokens.shape[1], 1)
        parts = [
            self._read(params, rows.tokens[begin : begin + size])
            for begin in range(0, len(rows.tokens), size)
        ]
        read = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        marked = rows.recall[:, 1:]
        nll = read["nll"][:, :-1]
        whole = np.exp(-nll[marked].reshape(-1, VALUE).sum(axis=1))
        return {
            "loss": float(nll.mean()),
            "recall": _recall(read["correct"], rows),
            "sampled": float(whole.mean()),
            "calibration": calibration_error(
                read["confidence"][:, :-1][marked], read["correct"][:, :-1][marked]
            ),
        }


def _recall(correct: np.ndarray, rows: RecallRows) -> float:
    """Fraction of the rows' values that are predicted whole, by correct [n, T] (of t + 1)."""
    return float(correct[:, :-1][rows.recall[:, 1:]].reshape(-1, VALUE).all(axis=1).mean())


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Mean of |accuracy - confidence| [n] over equal bins of confidence, weighted by their size."""
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [
        abs(np.sum(correct[bins == index] - confidence[bins == index])) for index in range(_BINS)
    ]
    return float(np.sum(gaps) / len(confidence))
