"""What the study does with one model: pre-train, mid-train, post-train, adapt, measure.

Everything goes through the package's own steps; what is particular to the study is the text, the
sizes and what is measured. Programs are compiled once for all seeds of a setting.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from corpus import ANSWER, VALUE, FactCorpus, RecallRows, Shape

from refine_jax.config import OptimizerConfig, RefineConfig, TestTimeConfig
from refine_jax.models.config import model_config
from refine_jax.models.transformer import Model, Params
from refine_jax.refine.adapt import Adapter
from refine_jax.refine.answers import AnswerMethod, make_supervised_step, prompts_of
from refine_jax.refine.objective import Objective
from refine_jax.refine.optimizer import make_optimizer
from refine_jax.refine.reading import read_rows
from refine_jax.refine.step import TrainState, make_eval_step, make_train_step

# First numbers of the keys that rows are drawn with.
PRETRAIN, MIDTRAIN, POSTTRAIN, MEASURE, TUNE, ASK, REPEAT = range(7)
# What is trained on prompts before the answers (the paper's Table 4), and its objective.
POSTTRAINING = {"sft": None, "nested_sft": "ntp", "nested_refine": "refine"}


@dataclasses.dataclass(frozen=True)
class Stage:
    """Training steps on documents of one shape, `rows` a step."""

    shape: Shape
    rows: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is.

    fields: of each model's config.json. repeated: rows of each pre-training step that are random
    sequences repeated, which window attention needs to learn copying in so few steps. fast_rate:
    LaCT's initial rates (0.001 is made for chunks of 2048 tokens).
    """

    fields: dict[str, dict[str, Any]]
    pretrain: dict[str, tuple[Stage, ...]]
    repeated: dict[str, int]
    fast_rate: float
    pretrain_rate: dict[str, float]
    midtrain: Stage
    posttrain: Stage
    measured: tuple[Shape, ...]  # held-out documents that final models are measured on
    questions: Shape
    vocabulary: int = 1024
    measured_rows: int = 48
    curve_rows: int = 24
    questions_asked: int = 192
    questions_adapted: int = 96
    curve_points: int = 4
    # Training of that much more steps than ReFINE's shows next-token training at equal compute.
    longest: float = 1.75


@functools.cache
def _optimizer(rate: float, steps: int = 1, **options):
    config = OptimizerConfig(learning_rate=rate, clip_norm=1.0, **options)
    return make_optimizer(config, steps=steps)


class Lab:
    """One model on the study's text."""

    def __init__(self, name: str, sizes: Sizes, corpus: FactCorpus):
        self.name, self.sizes, self.corpus = name, sizes, corpus
        self.model = Model(model_config(sizes.fields[name] | {"vocab_size": corpus.vocab_size}))

    # -- training -------------------------------------------------------------------------------

    def pretrain(self) -> tuple[Params, dict[str, Any]]:
        """A base model from random weights, and its curve by tokens read."""
        stages = self.sizes.pretrain[self.name]
        total = sum(stage.steps for stage in stages)
        optimizer = _optimizer(
            self.sizes.pretrain_rate[self.name],
            total,
            schedule="cosine",
            warmup_steps=max(total // 20, 1),
            final_fraction=0.1,
        )
        params = self._initial_params()
        config = RefineConfig(objective="ntp")
        state = TrainState.create(params, optimizer, jax.random.key(1), config)
        curve, tokens = [{"tokens": 0} | self._point(state.params)], 0
        for number, stage in enumerate(stages):
            train_step = make_train_step(
                self.model, optimizer, config, mini_batch=stage.rows, micro_batch=stage.rows
            )
            marks = _spread(stage.steps, 3 * self.sizes.curve_points)
            for step, batch in enumerate(self._batches(stage, PRETRAIN, number), 1):
                if repeated := self.sizes.repeated[self.name]:
                    batch["tokens"][:repeated] = self.corpus.repeats(
                        stage.shape.length, repeated, REPEAT, number, first=step * repeated
                    )
                state, _ = train_step(state, batch)
                tokens += batch["tokens"].size
                if step in marks:
                    short = self.corpus.documents(stage.shape, 32, MEASURE, held_out=True)
                    recall = {"recall_here": self._read(state.params, short)["recall"]}
                    curve.append({"tokens": tokens} | self._point(state.params) | recall)
                    self._say("pre-training", curve[-1])
        return state.params, {"curve": curve}

    def _initial_params(self) -> Params:
        params = jax.jit(self.model.init)(jax.random.key(0))
        if self.name == "lact":
            # Rates are softplus(projection + softplus^-1(0.001)).
            shift = math.log(math.expm1(self.sizes.fast_rate) / math.expm1(0.001))
            params["layers"]["attn"]["lr_proj"]["bias"] += shift
        return params

    def midtrain(
        self,
        params: Params,
        config: RefineConfig,
        rate: float,
        seed: int,
        *,
        steps: int | None = None,
        marks: Iterable[int] = (),
        stream: int = MEASURE,
    ) -> tuple[Params, dict[str, Any]]:
        """Continue on longer documents: parameters after the last step, and the figures.

        seed: of the documents and the rollouts; every configuration sees the same documents.
        marks: steps whose models are measured as the last one is. stream: of the held-out rows.
        """
        stage = self.sizes.midtrain
        steps = steps or stage.steps
        batches = self._batches(dataclasses.replace(stage, steps=steps), MIDTRAIN, seed)
        train_step, optimizer = self._midtrain_step(config, rate)
        params = jax.tree.map(jnp.copy, params)
        state = TrainState.create(params, optimizer, jax.random.key(seed), config)
        shown = _spread(stage.steps, self.sizes.curve_points)
        curve, measured, rewards = [], {}, []
        for step, batch in enumerate(batches, 1):
            state, metrics = train_step(state, batch)
            if "reward/mean" in metrics:
                rewards.append(float(metrics["reward/mean"]))
            if step in shown and stream == MEASURE:
                curve.append({"step": step} | self._point(state.params))
            if step in marks and step < steps:
                measured[str(step)] = self.measure(state.params, stream)
        last = self.measure(state.params, stream)
        self._say(f"mid-training {config.objective} seed {seed} rate {rate:g}", last)
        return state.params, {
            "curve": curve,
            "rewards": rewards,
            "measured": measured | {str(steps): last},
        }

    def step_seconds(
        self, params: Params, configs: Mapping[str, tuple[RefineConfig, float]], rounds: int = 16
    ) -> dict[str, float]:
        """Median seconds of a training step of each (configuration, rate), by the same names.

        They take turns, so that whatever else the machine does slows all of them.
        """
        states, train_steps, seconds = {}, {}, {name: [] for name in configs}
        for name, (config, rate) in configs.items():
            train_steps[name], optimizer = self._midtrain_step(config, rate)
            copy = jax.tree.map(jnp.copy, params)
            states[name] = TrainState.create(copy, optimizer, jax.random.key(0), config)
        stage = dataclasses.replace(self.sizes.midtrain, steps=rounds + 1)
        for number, batch in enumerate(self._batches(stage, MIDTRAIN, TUNE)):
            for name, train_step in train_steps.items():
                states[name], metrics = train_step(states[name], batch)
                if number > 0:  # the first one compiles
                    seconds[name].append(metrics["time/update"] + metrics.get("time/collect", 0.0))
        return {name: statistics.median(times) for name, times in seconds.items()}

    @functools.cache  # noqa: B019 - a Lab lives as long as the study
    def _midtrain_step(self, config: RefineConfig, rate: float):
        optimizer, rows = _optimizer(rate), self.sizes.midtrain.rows
        train_step = make_train_step(
            self.model,
            optimizer,
            config,
            mini_batch=rows,
            micro_batch=rows,
            eos_id=self.corpus.eos,
        )
        return train_step, optimizer

    def posttrain(
        self, params: Params, variant: str, rate: float, seed: int, *, stream: int = ASK
    ) -> tuple[Params, dict[str, Any]]:
        """Train on prompts and answers; `variant` of POSTTRAINING."""
        stage = self.sizes.posttrain
        on_prompts, on_answers, optimizer, config = self._posttrain_steps(variant, rate)
        params = jax.tree.map(jnp.copy, params)
        state = TrainState.create(params, optimizer, jax.random.key(seed), config)
        for step in range(stage.steps):
            rows = self.corpus.prompts(
                stage.shape, stage.rows, POSTTRAIN, seed, first=step * stage.rows
            )
            batch = {
                "tokens": rows.tokens,
                "segments": np.ones_like(rows.tokens),
                "answer_mask": _answers(rows),
            }
            if on_prompts is not None:
                state, _ = on_prompts(state, prompts_of(batch, self.corpus.eos))
            state, _ = on_answers(state, batch)
        figures = self.answers(state.params, stream)
        self._say(f"post-training {variant} seed {seed} rate {rate:g}", figures)
        return state.params, figures

    @functools.cache  # noqa: B019
    def _posttrain_steps(self, variant: str, rate: float):
        stage, objective = self.sizes.posttrain, POSTTRAINING[variant]
        optimizer = _optimizer(rate)
        config = RefineConfig(objective=objective or "ntp", reward="hybrid")
        sizes = {"mini_batch": stage.rows, "micro_batch": stage.rows}
        on_prompts = None
        if objective is not None:
            on_prompts = make_train_step(
                self.model, optimizer, config, eos_id=self.corpus.eos, **sizes
            )
        method = AnswerMethod(
            self.model,
            config,
            max_answer_tokens=ANSWER,
            eos_id=self.corpus.eos,
            pad_id=self.corpus.eos,
        )
        return on_prompts, make_supervised_step(method, optimizer, **sizes), optimizer, config

    # -- measuring ------------------------------------------------------------------------------

    def measure(self, params: Params, stream: int = MEASURE) -> dict[str, Any]:
        """Figures of held-out documents of each length, and of rollouts from them.

        {"recall_T": fraction of repeated values that greedy decoding gets whole, "loss_T": nats a
        token, "recalls_T": the recall of each document}; "reward": fraction of tokens of rollouts
        from uniform places that are the text's own.
        """
        found: dict[str, Any] = {}
        for shape in self.sizes.measured:
            rows = self.corpus.documents(shape, self.sizes.measured_rows, stream, held_out=True)
            figures = self._read(params, rows)
            found |= {f"{name}_{shape.length}": value for name, value in figures.items()}
            if shape.length == self.sizes.midtrain.shape.length:
                found["reward"] = self._reward(params, rows)
        return found

    def answers(self, params: Params, stream: int = ASK) -> dict[str, Any]:
        """{"recall": fraction of held-out questions answered whole, "recalls": each}."""
        rows = self.questions(self.sizes.questions_asked, stream)
        figures = self._read(params, rows)
        return {"recall": figures["recall"], "recalls": figures["recalls"]}

    def questions(self, count: int, stream: int = ASK) -> RecallRows:
        """Held-out prompts with their answers."""
        return self.corpus.prompts(self.sizes.questions, count, stream, held_out=True)

    def testtime(
        self, params: Params, objective: str, rate: float, seed: int, *, stream: int = ASK
    ) -> dict[str, Any]:
        """Adapt a copy of the parameters to each prompt, then answer it.

        {"recall", "recalls", "seconds": of adapting, a prompt; None where all prompts waited for
        compilation}
        """
        rows = self.questions(self.sizes.questions_adapted, stream)
        copies = 8
        adapter = Adapter(
            self.model,
            params,
            _optimizer(rate),
            RefineConfig(objective=objective, reward="binary", lambda_rl=0.4),
            TestTimeConfig(reset="example", copies=copies),
            key=jax.random.key(seed),
            eos_id=self.corpus.eos,
            pad_id=self.corpus.eos,
        )
        correct, seconds = [], []
        for begin in range(0, len(rows.tokens), copies):
            group = rows.tokens[begin : begin + copies]
            names = [str(begin + index) for index in range(len(group))]
            adapted = adapter.adapt(group[:, :-ANSWER].tolist(), names)
            seconds += [cost.seconds for cost in adapted.costs if not cost.compiled]
            read = jax.vmap(self._correct)(adapted.params, group[:, None])
            correct.append(np.asarray(read[0])[:, 0])
        recalls = _recalls(np.concatenate(correct), rows)
        figures = {"recall": float(np.mean(recalls)), "recalls": recalls}
        self._say(f"test-time {objective} seed {seed} rate {rate:g}", figures)
        return figures | {"seconds": statistics.median(seconds) if seconds else None}

    def gradients(
        self, params: Params, config: RefineConfig, batches: int = 12, draws: int = 2
    ) -> np.ndarray:
        """Gradients [batches, draws, P] float32 of batches of mid-training, P parameters in a row.

        The draws of a batch have its documents, and positions and rollouts of their own. ReFINE is
        measured without its next-token loss: the policy loss, or minus the expected reward.
        """
        stage = dataclasses.replace(self.sizes.midtrain, steps=batches)
        objective = Objective(
            self.model,
            dataclasses.replace(config, lambda_sft=0.0, lambda_rl=1.0),
            eos_id=self.corpus.eos,
            max_documents=1,
        )

        @jax.jit
        def gradient(params, batch, key):
            keys = jax.random.split(key, batch["tokens"].shape[0])
            whole = objective.mini_batch(batch)
            tree, _ = objective.gradient(params, batch, whole, keys=keys)
            return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])

        gradients = []
        for number, batch in enumerate(self._batches(stage, MIDTRAIN, TUNE)):
            keys = jax.random.split(jax.random.key(number), draws)
            gradients.append([np.asarray(gradient(params, batch, key)) for key in keys])
        return np.stack(gradients)

    def signal(self, label: str, policy: np.ndarray, next_token: np.ndarray) -> dict[str, float]:
        """How much the `gradients` of a policy say, and how they compare with the next-token loss'.

        {"signal": squared norm of the expected gradient, as a fraction of the expected squared norm
        (unbiased; 1: no noise), "same_documents": the same with the documents given, so that only
        the draw of positions and rollouts is noise, "signal_error", "same_documents_error":
        standard errors over batches, "norm_ratio": of the policy's gradients to those of the
        next-token loss, both root mean squares, "cosine": of the two mean gradients}
        """
        flat = [
            draws.reshape(-1, draws.shape[-1]).astype(np.float64) for draws in (policy, next_token)
        ]
        squares = [np.mean(np.sum(draws**2, axis=1)) for draws in flat]
        means = [draws.mean(axis=0) for draws in flat]
        norms = [np.linalg.norm(mean) for mean in means]
        shares, errors = _jackknife((flat[0] @ flat[0].T).reshape(2 * policy.shape[:2]))
        figures = {
            "signal": float(shares[0]),
            "signal_error": float(errors[0]),
            "same_documents": float(shares[1]),
            "same_documents_error": float(errors[1]),
            "norm_ratio": float(np.sqrt(squares[0] / squares[1])),
            # Without any rollout that was rewarded there is no direction.
            "cosine": float(means[0] @ means[1] / np.prod(norms)) if norms[0] else 0.0,
        }
        self._say(f"signal of {label}", figures)
        return figures

    def _point(self, params: Params) -> dict[str, float]:
        rows = self._curve_rows()
        figures = self._read(params, rows)
        return {"loss": figures["loss"], "recall": figures["recall"]}

    @functools.cache  # noqa: B019
    def _curve_rows(self) -> RecallRows:
        shape, rows = self.sizes.midtrain.shape, self.sizes.curve_rows
        return self.corpus.documents(shape, rows, MEASURE, 1, held_out=True)

    @functools.cached_property
    def _correct(self):
        @jax.jit
        def read(params, tokens):
            trunk = read_rows(self.model, params, {"tokens": tokens}, with_trace=False)
            return trunk.stats.correct, trunk.nll_sum, jnp.sum(trunk.weights)

        return read

    def _read(self, params: Params, rows: RecallRows) -> dict[str, Any]:
        size = max(self.sizes.midtrain.rows * self.sizes.midtrain.shape.length, 1)
        size = max(size // rows.tokens.shape[1], 1)
        correct, nll, count = [], 0.0, 0.0
        for begin in range(0, len(rows.tokens), size):
            part = self._correct(params, rows.tokens[begin : begin + size])
            correct.append(np.asarray(part[0]))
            nll, count = nll + float(part[1]), count + float(part[2])
        recalls = _recalls(np.concatenate(correct), rows)
        values = np.sum(rows.recall, axis=1) / VALUE
        return {
            "loss": nll / count,
            "recall": float(np.average(recalls, weights=values)),
            "recalls": recalls,
        }

    @functools.cached_property
    def _eval_step(self):
        config = RefineConfig(reward="binary", selection="uniform", num_positions=16)
        return make_eval_step(self.model, config, eos_id=self.corpus.eos)

    def _reward(self, params: Params, rows: RecallRows) -> float:
        size = self.sizes.midtrain.rows
        total = count = 0.0
        for index, begin in enumerate(range(0, len(rows.tokens) - size + 1, size)):
            batch = {"tokens": rows.tokens[begin : begin + size]}
            sums, _ = self._eval_step(params, batch, jax.random.key(index))
            total, count = total + float(sums["reward_sum"]), count + float(sums["rollout_count"])
        return total / count

    def _batches(self, stage: Stage, *key: int) -> Iterator[dict[str, np.ndarray]]:
        for step in range(stage.steps):
            rows = self.corpus.documents(stage.shape, stage.rows, *key, first=step * stage.rows)
            yield {"tokens": rows.tokens}

    def _say(self, what: str, figures: dict[str, Any]) -> None:
        words = [f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, int | float)]
        print(f"{self.name}: {what}: {', '.join(words)}", flush=True)


def _answers(rows: RecallRows) -> np.ndarray:
    """[n, T] int32: 1 at the answers, their ends of sequence among them."""
    mask = np.zeros_like(rows.tokens)
    mask[:, -ANSWER:] = 1
    return mask


def _recalls(correct: np.ndarray, rows: RecallRows) -> list[float]:
    """Fraction of each row's values that are predicted whole, by correct [n, T] (of t + 1)."""
    recalls = []
    for row, marked in zip(correct, rows.recall, strict=True):
        values = row[:-1][marked[1:]].reshape(-1, VALUE)
        recalls.append(float(values.all(axis=1).mean()))
    return recalls


def _spread(steps: int, points: int) -> set[int]:
    return {round(steps * (index + 1) / points) for index in range(points)}


def _jackknife(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shares of signal, and their standard errors by leaving out one batch at a time."""
    batches = len(products)
    without = [
        _signal_shares(np.delete(np.delete(products, batch, axis=0), batch, axis=2))
        for batch in range(batches)
    ]
    return _signal_shares(products), np.sqrt((batches - 1) * np.var(without, axis=0))


def _signal_shares(products: np.ndarray) -> np.ndarray:
    """Shares of gradients' mean square that batches have in common, and draws of one batch.

    products: inner products [b, n, b, n] of the gradients of b batches, n draws of each. Those of
    two independent gradients have the squared norm of what both expect as their mean.
    """
    batches, draws = products.shape[:2]
    squares, same = np.einsum("bnbn->", products), np.einsum("bnbm->", products)
    if not squares:  # no rollout was rewarded
        return np.zeros(2)
    of_batches = (products.sum() - same) / ((batches - 1) * draws)
    of_draws = (same - squares) / (draws - 1)
    return np.array([of_batches, of_draws]) / squares
