"""The small trained model that comes with the package, for the demo, the notebook and tests.

    from refine_jax.small import folder
    config.model.checkpoint = folder("deltanet")

It is a Hugging Face folder in bfloat16, with its tokenizer and a model card (README.md).
`experiments/train_small.py` has trained it, on made-up facts (`refine_jax.data.recall`).
"""

from pathlib import Path

NAMES = ("deltanet",)


def folder(name: str) -> str:
    """The folder of one of `NAMES`. Raises ValueError for another name."""
    if name not in NAMES:
        raise ValueError(f"the small models are {', '.join(NAMES)}. Got: {name!r}.")
    return str(Path(__file__).parent / name)
