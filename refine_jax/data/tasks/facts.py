"""Made-up facts, one of which is asked for (`refine_jax.data.recall`): what small models can do."""

from refine_jax.data.recall import RecallPrompts
from refine_jax.data.tasks.example import Example
from refine_jax.data.tokenizer import Tokenizer

MAX_NEW_TOKENS = 8
_STREAM = 1 << 32  # apart from the seeds of the prompts that post-training takes


def make_examples(*, length: int, samples: int, tokenizer: Tokenizer, seed: int) -> list[Example]:
    """Return the samples of a set.

    length: the most tokens of prompt and answer: prompts have as many facts as fit. tokenizer:
    counts the tokens. seed: of the set.

    Raises DataError: the length is too short.
    """
    prompts = RecallPrompts(length - MAX_NEW_TOKENS, tokenizer, seed=_STREAM + seed, full=True)
    examples = []
    for index in range(samples):
        prompt, answers = prompts[index]
        tokens = len(tokenizer.encode(prompt, bos=True))
        depth = round(100 * prompt.index(answers[0]) / len(prompt))
        metadata = {"length": length, "prompt_tokens": tokens, "depths": [depth]}
        examples.append(Example("recall", index, prompt, answers, MAX_NEW_TOKENS, metadata))
    return examples
