"""Tasks that a run answers while it trains: scores of `config.evaluate`, and loss by position.

The figures stand beside the other held-out ones: `eval/task/SET`, the mean score of a task and
length (0 to 1), and `eval/position/FIRST-LAST`, nats a token after so many tokens of context.
"""

import dataclasses
import itertools
import math
import statistics

import jax

from refine_jax import distributed
from refine_jax.base.errors import ConfigError
from refine_jax.config import Config, MeshConfig
from refine_jax.data.pipeline import Corpus, Dataset
from refine_jax.data.prompts import PromptCorpus
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.evaluation.by_position import measure, position_edges
from refine_jax.evaluation.questions import Question, group_by_length, load_questions
from refine_jax.evaluation.runner import Answerer
from refine_jax.generation import Generator, Sampling
from refine_jax.models.layout import row_length
from refine_jax.models.transformer import Model, Params
from refine_jax.parallel import place_state, state_shardings, use_mesh

POSITION = "position"
"""The task that is no questions: loss by position of the held-out rows."""


class TrainingTasks:
    """The questions of `train.evaluate`, made once, and what answers them."""

    def __init__(
        self,
        config: Config,
        model: Model,
        tokenizer: Tokenizer,
        corpus: Corpus | PromptCorpus,
    ):
        """Make the questions, as an evaluation of the same settings does.

        corpus: holds the rows of the task `position`. Raises ConfigError, DataError: as
        `load_questions`, or `position` without held-out documents.
        """
        names = config.train.task_names
        self._rows: Dataset | None = None
        if POSITION in names:
            if config.phase != "midtrain" or not config.data.holdout:
                raise ConfigError(
                    "config.train.evaluate: the task position needs mid-training with held-out "
                    f"documents. Got: phase={config.phase!r}, data.holdout={config.data.holdout}."
                )
            # Every process reads all of them.
            self._rows = corpus.dataset("validation", config.train.micro_batch)
        self._length = config.data.sequence_length
        self._max_documents = config.data.max_documents if config.data.pack else 1
        self._model = model
        self._groups: list[list[Question]] = []
        asked = [name for name in names if name != POSITION]
        if asked:
            options = dataclasses.replace(config.evaluate, tasks=",".join(asked))
            questions = load_questions(
                options,
                tokenizer,
                bos=config.data.add_bos,
                max_new_tokens=config.generation.max_new_tokens,
                report=lambda note: distributed.say(f"note: {note}"),
            )
            self._groups = group_by_length(questions, options.batch_size, row_length)
            prefill = config.generation.prefill_tokens
            self._generator = Generator(model, tokenizer, prefill_tokens=prefill)

    def measure(self, params: Params) -> dict[str, float]:
        """Answer all questions greedily by the parameters; returns the figures.

        Several processes answer groups side by side, each with the whole model on its own devices.
        """
        # Not under the mesh of training: groups are as large as their prompts allow.
        if jax.process_count() > 1:
            params = distributed.fetch(params)
        with use_mesh(MeshConfig(), alone=True):
            params = place_state(params, state_shardings(params))
            scores = self._scores(params)
            return scores | self._by_position(params)

    def _scores(self, params: Params) -> dict[str, float]:
        if not self._groups:
            return {}
        answerer = Answerer(params, self._generator, Sampling(temperature=0.0))
        index, count = jax.process_index(), jax.process_count()
        mine = [
            [record["set"], record["id"], record["score"]]
            for group in self._groups[index::count]
            for record in answerer.answer(group)
        ]
        by_set: dict[str, list[float]] = {}
        for name, _, score in sorted(itertools.chain(*distributed.gather_json(mine))):
            by_set.setdefault(name, []).append(score)
        return {f"eval/task/{name}": statistics.fmean(part) for name, part in by_set.items()}

    def _by_position(self, params: Params) -> dict[str, float]:
        if self._rows is None:
            return {}
        edges = position_edges(self._length)
        _, buckets = measure(
            self._model, params, self._rows, edges, max_documents=self._max_documents
        )
        return {
            f"eval/position/{bucket.first}-{bucket.last}": bucket.loss.mean
            for bucket in buckets
            if math.isfinite(bucket.loss.mean)
        }
