"""tensorflow-datasets builder: RULER's needle sets, one split for each task and length.

    builder = Builder(lengths=(4096, 8192), samples=500, essays="essays/", data_dir="data")
    builder.download_and_prepare()
    builder.as_data_source("niah_single_1_4096")[0]["prompt"]

The examples are those of `refine_jax.data.tasks.load_examples`, in its order.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from refine_jax.base.errors import DataError
from refine_jax.data.tasks import TASKS, load_examples, needs_essays
from refine_jax.data.tasks.haystack import load_essays
from refine_jax.data.tokenizer import load_tokenizer

_BUILT = ("niah", "ruler")
NIAH = tuple(name for name, task in TASKS.items() if task.group == "niah")


class Builder(tfds.core.GeneratorBasedBuilder):
    """Writes `<data_dir>/needle_sets/<key>/<version>/`, where the key depends on all arguments."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012 (the name that tfds looks for)

    def __init__(
        self,
        *,
        tasks: Sequence[str] = NIAH,
        lengths: Sequence[int] = (4096,),
        samples: int = 500,
        tokenizer: str = "mistral-v1",
        seed: int = 0,
        essays: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Set up; `download_and_prepare` writes.

        tasks: needle tasks, or vt, cwe and fwe. lengths: most tokens of bos, prompt and answer.
        samples: examples of a split. tokenizer: name or path of the tokenizer that counts them.
        seed: of the sets. essays: as `load_examples` takes it. **kwargs: `data_dir` and others of
        `tfds.core.GeneratorBasedBuilder`.

        Raises:
            DataError: a task is not one that is built from a seed, or has no essays; no examples.
        """
        wrong = [name for name in tasks if name not in TASKS or TASKS[name].group not in _BUILT]
        if wrong:
            raise DataError(f"needle_sets holds tasks that are built from a seed. Got: {wrong}.")
        if not (tasks and lengths and samples > 0):
            raise DataError(
                "needle_sets needs a task, a length and a sample at least. "
                f"Got: tasks={tuple(tasks)}, lengths={tuple(lengths)}, samples={samples}."
            )
        self._tasks, self._lengths = tuple(tasks), tuple(lengths)
        self._tokenizer = load_tokenizer(tokenizer)
        self._options = {"samples": samples, "seed": seed, "essays": essays}
        text = load_essays(essays).fingerprint if any(map(needs_essays, tasks)) else ""
        made_of = [self._tasks, self._lengths, samples, self._tokenizer.fingerprint, seed, text]
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
        config = tfds.core.BuilderConfig(name=key, description=json.dumps(made_of))
        super().__init__(config=config, file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description="RULER's needle sets (arXiv 2404.06654), seeded per sample.",
            features=tfds.features.FeaturesDict(
                {
                    "task": text,
                    "index": tfds.features.Scalar(np.int64),
                    "prompt": text,
                    "answers": tfds.features.Sequence(text),
                    "max_new_tokens": tfds.features.Scalar(np.int64),
                    "metadata": text,  # JSON
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing is downloaded
        return {
            f"{task}_{length}": self._generate_examples(task, length)
            for task in self._tasks
            for length in self._lengths
        }

    def _generate_examples(self, task: str, length: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for example in load_examples(
            task, length=length, tokenizer=self._tokenizer, **self._options
        ):
            yield (
                example.index,
                {
                    "task": example.task,
                    "index": example.index,
                    "prompt": example.prompt,
                    "answers": list(example.answers),
                    "max_new_tokens": example.max_new_tokens,
                    "metadata": json.dumps(dict(example.metadata)),
                },
            )
