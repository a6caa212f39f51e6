"""Documents to batches of tokens.

    from refine_jax.config import DataConfig
    from refine_jax.data import load_corpus

    corpus = load_corpus(DataConfig(source="corpus.jsonl", sequence_length=4096))
    for batch in corpus.dataset("train", batch_size=8):
        ...  # {"tokens": [8, 4096] int32, "segments": [8, 4096] int32, 0 = padding}

Names are loaded at first use: grain and pyarrow take seconds to import.
"""

import importlib
from typing import Any

_MODULES = {
    "ChatTemplate": "chat",
    "encode_chat": "chat",
    "load_chat_template": "chat",
    "BatchIterator": "pipeline",
    "Corpus": "pipeline",
    "Dataset": "pipeline",
    "load_corpus": "pipeline",
    "PromptCorpus": "prompts",
    "cut_prompt": "prompts",
    "load_prompts": "prompts",
    "Statistics": "rows",
    "TextSource": "sources",
    "open_source": "sources",
    "Tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
