"""Generation from a carried state: constant time and memory a token, whatever was read before.

    model, params, tokenizer = load("checkpoints/lact-760m")
    generator = Generator(model, tokenizer)
    sampling = Sampling(max_new_tokens=64, temperature=0.7, top_p=0.9, stop=("\\n\\n",), seed=0)
    print(generator.complete(params, ["One prompt", "Another one"], sampling)[0].text)

`Generator.read` makes a Prefix of prompts, which `extend` continues and `generate` and `stream`
generate from as often as wanted; `save_prefix` and `load_prefix` keep it in a folder.
"""

from refine_jax.generation.copies import CopiesGenerator
from refine_jax.generation.engine import Prefix, advance, decode, empty_prefix, prefill, take_rows
from refine_jax.generation.generator import Generated, Generator
from refine_jax.generation.loading import Loaded, load
from refine_jax.generation.sampling import Sampler, Sampling, row_keys, sample
from refine_jax.generation.states import load_prefix, save_prefix

__all__ = [
    "CopiesGenerator",
    "Generated",
    "Generator",
    "Loaded",
    "Prefix",
    "Sampler",
    "Sampling",
    "advance",
    "decode",
    "empty_prefix",
    "load",
    "load_prefix",
    "prefill",
    "row_keys",
    "sample",
    "save_prefix",
    "take_rows",
]
