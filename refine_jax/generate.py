"""Generate text from a checkpoint.

    python -m refine_jax.generate --checkpoint DIR --prompt "Once upon a time"
    python -m refine_jax.generate --checkpoint DIR --prompt_file a.txt --prompt_file b.txt --json
    python -m refine_jax.generate --checkpoint DIR --temperature 0.7 --top_p 0.9 < prompt.txt

A long document is read once, and asked any number of questions:

    python -m refine_jax.generate --checkpoint DIR --prompt_file book.txt --save_state book.state \\
        --max_new_tokens 0
    python -m refine_jax.generate --checkpoint DIR --load_state book.state --prompt "Who is Ahab?"

DIR is a checkpoint that refine_jax.convert or a training run wrote. Prompts are taken as they are,
line ends at their end too. Time and memory a token do not depend on the length of the prompt.
Exit code 1: bad input, with one message on standard error.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from refine_jax.checkpoint import CheckpointError, load_model
from refine_jax.checkpoint.folders import check_free
from refine_jax.convert import step_argument
from refine_jax.data.options import DataError
from refine_jax.data.tokenizer import Tokenizer, load_tokenizer
from refine_jax.generation import Generated, Generator, Prefix, Sampling, take_rows
from refine_jax.generation.states import load_prefix, save_prefix
from refine_jax.models.config import ModelConfigError, model_config
from refine_jax.models.transformer import ComputePolicy, Model, Params
from refine_jax.settings import ConfigError

_ERRORS = (CheckpointError, ConfigError, DataError, ModelConfigError, OSError)


class Loaded(NamedTuple):
    """What a checkpoint gives: a model, its parameters on the device, and a tokenizer."""

    model: Model
    params: Params
    tokenizer: Tokenizer


def load(
    checkpoint: str, *, step: int | str, tokenizer: str | None, compute_dtype: str | None
) -> Loaded:
    """Load a checkpoint to generate from.

    step: of a training run: "latest", "best" or a number. tokenizer: name or path; None: that of
    the checkpoint. compute_dtype: None: float32 on CPU, bfloat16 on accelerators.

    Raises:
      CheckpointError: No checkpoint, or a corrupt one.
      DataError: No such tokenizer, or the checkpoint has none.
    """
    found = load_model(checkpoint, step=step)
    if tokenizer is None and found.tokenizer is None:
        raise DataError(
            f"{checkpoint} has no tokenizer files. Name a tokenizer: --tokenizer mistral-v1, bytes "
            "or a path."
        )
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    policy = ComputePolicy(compute_dtype=compute_dtype or default)
    return Loaded(
        Model(model_config(found.config), policy),
        jax.device_put(found.params),
        load_tokenizer(tokenizer or str(found.tokenizer)),
    )


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for; prints the texts."""
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        stop=tuple(options.stop),
        seed=options.seed,
    )
    if options.save_state is not None:
        check_free(options.save_state)
    texts = read_prompts(options)
    _check_stream(options, len(texts))
    model, params, tokenizer = load(
        options.checkpoint,
        step=options.step,
        tokenizer=options.tokenizer,
        compute_dtype=options.compute_dtype,
    )
    generator = Generator(model, tokenizer)
    saved = None
    if options.load_state is not None:
        saved = load_prefix(options.load_state, model, params, tokenizer)
    begin = time.perf_counter()
    prefix = jax.block_until_ready(read(generator, params, texts, saved))
    prefill_seconds = time.perf_counter() - begin
    rows = prefix.length.shape[0]
    _check_stream(options, rows)
    if options.save_state is not None:
        save_prefix(options.save_state, prefix, model, params, tokenizer)
    if options.json:
        print_json(generator, params, prefix, sampling, prefill_seconds)
    elif options.stream or (rows == 1 and sys.stdout.isatty()):
        for _, piece in generator.stream(params, prefix, sampling):
            print("\n" if isinstance(piece, Generated) else piece, end="", flush=True)
    else:
        results = generator.generate(params, prefix, sampling)
        for number, result in enumerate(results, 1):
            if rows > 1:
                print(f"--- {number} of {rows}")
            print(result.text)


def read(generator: Generator, params: Params, texts: list[str], saved: Prefix | None) -> Prefix:
    """Read the prompts `texts`, or continue the saved states by them.

    One saved state is continued by every text; of several, each by its own.
    Raises DataError if the number of texts does not fit.
    """
    if saved is None:
        return generator.read(params, generator.encode(texts))
    rows = saved.length.shape[0]
    if not texts:
        return saved
    if rows == 1:
        saved = take_rows(saved, np.zeros(len(texts), np.int32))
    elif rows != len(texts):
        raise DataError(
            f"The saved state is of {rows} prompts: it takes no prompt, or one for each. "
            f"Got: {len(texts)}."
        )
    continuations = generator.tokenizer.encode_batch(texts, bos=False)
    return generator.extend(params, saved, continuations)


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The texts of --prompt and --prompt_file, else of standard input.

    Raises DataError for a file that is not UTF-8.
    """
    texts = list(options.prompt)
    for name in options.prompt_file:
        try:
            data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
            texts.append(data.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{name} is not UTF-8 text: {error}.") from None
    return texts


def print_json(
    generator: Generator,
    params: Params,
    prefix: Prefix,
    sampling: Sampling,
    prefill_seconds: float,
) -> None:
    """Generate, and print one JSON object a prompt.

    prefill_seconds: of all prompts, compilation included. ms_per_token: of one step of all rows,
    without compilation.
    """
    # One token compiles all that the timed call runs.
    generator.generate(params, prefix, dataclasses.replace(sampling, max_new_tokens=1))
    begin = time.perf_counter()
    results = generator.generate(params, prefix, sampling)
    seconds = time.perf_counter() - begin
    steps = max(len(result.tokens) for result in results)
    for index, result in enumerate(results):
        line = {
            "prompt": index,
            "text": result.text,
            "tokens": result.tokens,
            "finish_reason": result.finish_reason,
            "tokens_read": int(prefix.length[index]),
            "prefill_seconds": round(prefill_seconds, 4),
            "ms_per_token": round(1e3 * seconds / steps, 3) if steps else None,
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)


def _check_stream(options: argparse.Namespace, prompts: int) -> None:
    if options.stream and prompts > 1:
        raise ConfigError(f"--stream shows one prompt as it is continued. Got: {prompts} prompts.")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    if not (options.prompt or options.prompt_file or options.load_state):
        options.prompt_file = ["-"]
    logging.set_verbosity(logging.ERROR)
    try:
        run(options)
    except _ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m refine_jax.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="model to load")
    add(
        "--step",
        type=step_argument,
        default="latest",
        help="of a run: latest (default), best, a number",
    )
    add("--tokenizer", metavar="NAME", help="mistral-v1, bytes or a path (default: DIR's)")
    add("--compute_dtype", choices=("float32", "bfloat16"), help="default: the device's")

    prompts = parser.add_argument_group("prompts", "Any number; none: standard input.")
    add = prompts.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt")
    add("--prompt_file", action="append", default=[], metavar="FILE", help="one of UTF-8; -: stdin")
    add("--load_state", metavar="DIR", help="saved state that the prompts, if any, continue")
    add("--save_state", metavar="DIR", help="keep the state after the prompts; must not exist")

    sampling = parser.add_argument_group("sampling")
    add = sampling.add_argument
    defaults = Sampling()
    add("--max_new_tokens", type=int, default=defaults.max_new_tokens, help="default %(default)s")
    add("--temperature", type=float, default=defaults.temperature, help="0 (default) is greedy")
    add("--top_k", type=int, help="draw among the k most likely tokens")
    add("--top_p", type=float, help="draw among the likeliest tokens of this probability in all")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends a text; any number")
    add("--seed", type=int, default=defaults.seed, help="of the draws (default %(default)s)")

    output = parser.add_mutually_exclusive_group()
    add = output.add_argument
    add("--stream", action="store_true", help="show text as it comes (default on a terminal)")
    add("--json", action="store_true", help="one line a prompt: text, tokens, times")
    return parser


if __name__ == "__main__":
    sys.exit(main())
