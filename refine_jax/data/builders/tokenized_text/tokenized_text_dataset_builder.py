"""tensorflow-datasets builder: any text source to tokenised ArrayRecord, without TensorFlow.

Each record is {"tokens": [T] int32}, in the order of the source. `metadata.json` says how the
tokens were made, and `documents.npz` holds each document's length and content hash, so that a run
can plan its rows without reading the records.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from refine_jax.config import DataConfig
from refine_jax.data.sources import TextSource
from refine_jax.data.tokenizer import Tokenizer
from refine_jax.data.tokens import IndexBuilder, content_key, tokenize, unread

NAME_LENGTH = 40  # of what names the source in a folder's name


class Builder(tfds.core.GeneratorBasedBuilder):
    """Writes `<data_dir>/tokenized_text/<source>-<key>/<version>/`.

    The key depends on the source's files, the tokenizer and the options that change tokens. The
    folder appears when everything in it is complete.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012 (the name that tfds looks for)

    def __init__(
        self, *, source: TextSource, tokenizer: Tokenizer, options: DataConfig, **kwargs: Any
    ) -> None:
        """Set up; `prepare` is the way to call it.

        source: the documents.
        tokenizer: turns them into tokens.
        options: `add_bos`, `add_eos` and `limit_documents` count.
        **kwargs: `data_dir` and others of `tfds.core.GeneratorBasedBuilder`.
        """
        self._source, self._tokenizer, self._options = source, tokenizer, options
        name = f"{name_of(options.source)}-{content_key(source, tokenizer, options)}"
        config = tfds.core.BuilderConfig(name=name, description=options.source)
        super().__init__(config=config, file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        tokenizer, options = self._tokenizer, self._options
        return tfds.core.DatasetInfo(
            builder=self,
            description="Tokenised documents.",
            features=tfds.features.FeaturesDict(
                {"tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32)}
            ),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(
                source=options.source,
                tokenizer=tokenizer.name,
                tokenizer_fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
                add_bos=options.add_bos,
                add_eos=options.add_eos,
            ),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, np.ndarray]]]]:
        del dl_manager  # the source has its files already
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        index = IndexBuilder()
        for document, tokens in enumerate(tokenize(self._source, self._tokenizer, self._options)):
            index.add(tokens)
            yield document, {"tokens": tokens}
        documents = index.finish()
        # tfds works in a temporary folder here and writes the metadata after this.
        documents.save(self.data_dir)
        self.info.metadata["documents"] = len(documents.lengths)
        self.info.metadata["tokens"] = int(documents.lengths.sum())
        self.info.metadata["dropped"] = unread(self._source, self._options)


def name_of(source: str) -> str:
    """Name what a source holds, for a folder: its last path components, whole words of them.

    At most `NAME_LENGTH` letters, digits and "_"; file suffixes and signs of patterns are left out.
    """
    parts = [part for part in source.removeprefix("tfds:").split("/") if part not in ("", "~")]
    words: list[str] = []

    def fits(some: list[str]) -> bool:
        return len("_".join(some)) <= NAME_LENGTH

    for part in reversed(parts):
        stem = re.sub(r"(\.(jsonl?|ndjson|parquet|txt|md|csv|gz|zst|bz2|xz))+$", "", part.lower())
        pieces = re.findall(r"[a-z0-9]+", stem)
        if words and not fits(pieces + words):
            break
        words = pieces + words
    while not fits(words):  # of one component: its first words
        words.pop()
    return "_".join(words) or "documents"
