"""Generate text from a checkpoint that refine_jax.convert or a training run wrote.

Prompts are taken as they are, line ends at their end too; with --chat, each is the message of a
user. Texts end at the end tokens of generation_config.json, at --stop or after --max_new_tokens.

Examples:

    python -m refine_jax.generate --checkpoint=DIR --prompt_file=book.txt --save_state=book.state \\
        --max_new_tokens=0
    python -m refine_jax.generate --checkpoint=DIR --load_state=book.state --prompt="Who is Ahab?"
    python -m refine_jax.generate --checkpoint=DIR --prompt_file=doc.txt --adapt_steps=2
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from absl import logging

from refine_jax.base.errors import ConfigError, DataError, print_json
from refine_jax.base.files import clean_text, decode_text, given_path, read_text
from refine_jax.base.remote import RemotePath
from refine_jax.commands import Command, Options, step_argument
from refine_jax.config import OptimizerConfig, RefineConfig, TestTimeConfig
from refine_jax.settings import expand_flags

if TYPE_CHECKING:
    from refine_jax.generation import Generator, Loaded, Prefix, Sampling
    from refine_jax.models.transformer import Params
    from refine_jax.refine.adapt import Adapter

# What takes long to import, jax above all, is imported where it is used: help comes at once.

_MOST_STEPS = 1_000_000  # of training on one prompt


class Adaptation(NamedTuple):
    """How the parameters are trained on a prompt."""

    method: RefineConfig
    optimizer: OptimizerConfig
    options: TestTimeConfig


def run(options: Options) -> None:
    """Do what the command line asks for; prints the texts."""
    from refine_jax.compiling import announced

    if not (options.prompt or options.prompt_file or options.load_state):
        options.prompt_file = ["-"]
    logging.set_verbosity(logging.WARNING)
    with announced():
        answer(options)


def answer(options: Options) -> None:
    """Read the prompts, and generate from them or from copies that are trained on them."""
    import jax

    from refine_jax.generation import Generator, Sampling, load
    from refine_jax.generation.states import check_state_path, load_prefix, save_prefix

    expand_flags(vars(options), "checkpoint", "adapter", "tokenizer", "load_state", "save_state")
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        stop=tuple(options.stop),
        seed=options.seed,
    )
    if options.save_state is not None:
        check_state_path(options.save_state)
    adaptation = read_adaptation(options)
    texts = read_prompts(options)
    _check_stream(options, len(texts))
    loaded = load(
        options.checkpoint,
        step=options.step,
        tokenizer=options.tokenizer,
        compute_dtype=options.compute_dtype,
        adapter=options.adapter,
    )
    model, params, tokenizer = loaded
    generator = Generator(model, tokenizer)
    prompts = encode(generator, texts, options)
    if adaptation is not None:
        adapter = make_adapter(loaded, adaptation, sampling.seed)
        run_adapted(generator, adapter, texts, prompts, sampling, options)
        return
    saved = None
    if options.load_state is not None:
        saved = load_prefix(options.load_state, model, params, tokenizer)
    begin = time.perf_counter()
    prefix = jax.block_until_ready(read(generator, params, prompts, saved))
    prefill_seconds = time.perf_counter() - begin
    _check_stream(options, prefix.length.shape[0])
    if options.save_state is not None:
        save_prefix(options.save_state, prefix, model, params, tokenizer)
    show(generator, params, prefix, sampling, options, {"prefill_seconds": prefill_seconds})


def run_adapted(
    generator: Generator,
    adapter: Adapter,
    texts: list[str],
    prompts: list[np.ndarray],
    sampling: Sampling,
    options: Options,
) -> None:
    """Adapt a copy of the parameters to each prompt and generate with it, prompt by prompt.

    prompts: of the texts, [T] int32 each.
    """
    import jax

    for number, (text, ids) in enumerate(zip(texts, prompts, strict=True)):
        # The prompt itself decides its random numbers: other prompts beside it change nothing.
        params, (cost,) = adapter.adapt([ids], [text])
        begin = time.perf_counter()
        prefix = jax.block_until_ready(generator.read(params, [ids]))
        facts = {
            "prefill_seconds": time.perf_counter() - begin,
            "adapt_seconds": cost.seconds,
            "adapt_tokens": cost.tokens + cost.rollout_tokens,
        }
        show(generator, params, prefix, sampling, options, facts, first=number, of=len(texts))


def show(
    generator: Generator,
    params: Params,
    prefix: Prefix,
    sampling: Sampling,
    options: Options,
    facts: dict[str, float],
    *,
    first: int = 0,
    of: int | None = None,
) -> None:
    """Generate, and print it as the command line asks for.

    facts: of reading the prompts, for --json. first, of: number of the first row, and of all rows,
    where these are not all.
    """
    from refine_jax.generation import Generated

    rows = prefix.length.shape[0]
    of, ids = of or rows, range(first, first + rows)
    if options.json:
        show_json(generator, params, prefix, sampling, ids, facts)
    elif options.stream or (of == 1 and sys.stdout.isatty()):
        for _, piece in generator.stream(params, prefix, sampling, ids=ids):
            print("\n" if isinstance(piece, Generated) else piece, end="", flush=True)
    else:
        results = generator.generate(params, prefix, sampling, ids=ids)
        for number, result in zip(ids, results, strict=True):
            if of > 1:
                print(f"--- {number + 1} of {of}")
            print(result.text, flush=True)


def read_adaptation(options: Options) -> Adaptation | None:
    """What --adapt_steps and its like ask for; None: nothing.

    Raises ConfigError for values that cannot work, and for a saved state: it holds no prompt to
    adapt to, and would be of parameters that nobody keeps.
    """
    steps, rate = options.adapt_steps, options.adapt_learning_rate
    if steps < 0:
        raise ConfigError(f"--adapt_steps must be at least 0. Got: {steps}.")
    if steps > _MOST_STEPS:
        raise ConfigError(f"--adapt_steps must be at most {_MOST_STEPS:,}. Got: {steps}.")
    if not steps:
        for name in ("adapt_objective", "adapt_learning_rate"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name} needs --adapt_steps of at least 1. Got: {steps}.")
        return None
    if rate is not None and not 0 <= rate < math.inf:
        raise ConfigError(f"--adapt_learning_rate must be a number, at least 0. Got: {rate}.")
    for name in ("load_state", "save_state"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"--adapt_steps cannot be used with --{name}: states are of the parameters that "
                "made them, and each prompt adapts parameters of its own."
            )
    return Adaptation(
        RefineConfig(objective=options.adapt_objective or "refine", reward="binary", lambda_rl=0.4),
        OptimizerConfig() if rate is None else OptimizerConfig(learning_rate=rate),
        TestTimeConfig(steps=options.adapt_steps, reset="example"),
    )


def make_adapter(loaded: Loaded, adaptation: Adaptation, seed: int) -> Adapter:
    """What adapts copies of the parameters to prompts."""
    import jax

    from refine_jax.refine.adapt import Adapter
    from refine_jax.refine.optimizer import make_optimizer

    return Adapter(
        loaded.model,
        loaded.params,
        make_optimizer(adaptation.optimizer, steps=adaptation.options.steps),
        adaptation.method,
        adaptation.options,
        key=jax.random.key(seed),
        eos_id=loaded.tokenizer.end_ids,
        pad_id=loaded.tokenizer.pad_id,
    )


def encode(generator: Generator, texts: list[str], options: Options) -> list[np.ndarray]:
    """Encode the prompts, [T] int32 each: texts, what continues a state, or messages of a user.

    Raises DataError: the tokenizer has no chat template, or one that fails.
    """
    from refine_jax.data.tokenizer import encode_continuations

    if options.chat:
        from refine_jax.data.chat import encode_chat, load_chat_template

        tokenizer, template = generator.tokenizer, load_chat_template(generator.tokenizer)
        chats = ([{"role": "user", "content": text}] for text in texts)
        return [encode_chat(tokenizer, template, c, add_generation_prompt=True) for c in chats]
    if options.load_state is not None:
        return encode_continuations(generator.tokenizer, texts)
    return generator.encode(texts)


def read(
    generator: Generator, params: Params, prompts: list[np.ndarray], saved: Prefix | None
) -> Prefix:
    """Read the prompts, [T] int32 each, or continue the saved states by them.

    One saved state is continued by every prompt; of several, each by its own.
    Raises DataError if the number of prompts does not fit.
    """
    from refine_jax.generation import take_rows

    if saved is None:
        return generator.read(params, prompts)
    rows = saved.length.shape[0]
    if not prompts:
        return saved
    if rows == 1:
        saved = take_rows(saved, np.zeros(len(prompts), np.int32))
    elif rows != len(prompts):
        raise DataError(
            f"The saved state is of {rows} prompts: it takes no prompt, or one for each. "
            f"Got: {len(prompts)}."
        )
    return generator.extend(params, saved, prompts)


def read_prompts(options: Options) -> list[str]:
    """The texts of --prompt and --prompt_file, else of standard input.

    Raises DataError for a file that cannot be read, is not UTF-8, or empty.
    """
    texts = [clean_text(text) for text in options.prompt]
    for name in options.prompt_file:
        if name == "-":
            name = "standard input"
            text = decode_text(sys.stdin.buffer.read(), name, DataError)
        else:
            text = read_text(_prompt_file(name), DataError)
        if not text:
            raise DataError(f"{name} is empty: no prompt. For a text out of nothing: --prompt ''.")
        if "\0" in text:
            raise DataError(
                f"{name} holds null characters: it is no text, or UTF-16. Save it as UTF-8."
            )
        texts.append(text)
    return texts


def _prompt_file(name: str) -> Path:
    path = given_path(name, "--prompt_file", DataError)
    if isinstance(path, RemotePath):
        return path
    with contextlib.suppress(OSError):  # such as a name that is too long: reading it says so
        # A shell's <(command) is one, too, with a writer: a named pipe may wait for ever.
        endless = path.is_char_device() or (path.is_fifo() and path.parent != Path("/dev/fd"))
        if endless:
            raise DataError(
                f"--prompt_file={name!r} is a pipe or a device: give its text to standard input."
            )
    return path


def show_json(
    generator: Generator,
    params: Params,
    prefix: Prefix,
    sampling: Sampling,
    ids: Sequence[int],
    facts: dict[str, float],
) -> None:
    """Generate, and print one JSON object a prompt.

    ids: numbers of the rows. state_mib: memory of a prompt's state, which grows with the context in
    layers of full attention. facts: `prefill_seconds` of all rows, compilation included, and what
    adaptation cost. ms_per_token: of one decoded token of all rows, without compilation; a stop
    string is looked for when several tokens are decoded, so that these may be more than are shown.
    """
    import jax

    # One token compiles all that the timed call runs.
    once = dataclasses.replace(sampling, max_new_tokens=1)
    generator.generate(params, prefix, once, ids=ids)
    before, begin = generator.decode_steps, time.perf_counter()
    results = generator.generate(params, prefix, sampling, ids=ids)
    seconds = time.perf_counter() - begin
    steps = generator.decode_steps - before
    size = sum(x.nbytes for x in jax.tree.leaves(prefix.state)) / prefix.length.shape[0]
    for index, result in enumerate(results):
        line = {
            "prompt": ids[index],
            "text": result.text,
            "tokens": result.tokens,
            "finish_reason": result.finish_reason,
            "tokens_read": int(prefix.length[index]),
            "state_mib": round(size / 2**20, 3),
            **{name: round(value, 4) for name, value in facts.items()},
            "ms_per_token": round(1e3 * seconds / steps, 3) if steps else None,
        }
        print_json(line)


def _check_stream(options: Options, prompts: int) -> None:
    if options.stream and prompts > 1:
        raise ConfigError(f"--stream shows one prompt as it is continued. Got: {prompts} prompts.")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command().run(run, arguments, imports=("jax", "refine_jax.generation"))


def command() -> Command:
    """The command, its flags and its page of help."""
    made = Command("refine_jax.generate", __doc__, "--checkpoint=DIR")
    flag = made.flag
    made.group("model")
    flag("checkpoint", "model to load", metavar="DIR", needed=True)
    flag("adapter", "of the peft package, to add to it", metavar="DIR")
    flag("step", "of a run: latest, best, or a number", step_argument, default="latest")
    flag("tokenizer", "mistral-v1, bytes or a path (default: DIR's, or that of its run)")
    dtypes = ("float32", "bfloat16")
    flag("compute_dtype", "of activations (default: the device's)", choices=dtypes)
    made.group("prompts, any number; none: standard input")
    flag("prompt", "a prompt", default=[], every=True)
    flag("prompt_file", "one of UTF-8; -: stdin", default=[], every=True, metavar="FILE")
    flag("chat", "each is the message of a user", bool, default=False, without="load_state")
    flag("load_state", "saved state that the prompts, if any, continue", metavar="DIR")
    flag("save_state", "keep the state after the prompts; must not exist", metavar="DIR")
    made.group("sampling")
    flag("max_new_tokens", "most tokens of a text", int, default=128)
    flag("temperature", "of the draws; 0 is greedy", float, default=0.0)
    flag("top_k", "draw among the k most likely tokens", int)
    flag("top_p", "draw among the likeliest tokens of this probability in all", float)
    flag("stop", "ends a text; any number", default=[], every=True)
    flag("seed", "of the draws", int, default=0)
    made.group("training on the prompt: a copy of the parameters for each; nothing is kept")
    flag("adapt_steps", "steps; 0: none", int, default=0)
    objectives = ("refine", "ntp")
    flag("adapt_objective", "next-token loss alone by ntp (default refine)", choices=objectives)
    rate = OptimizerConfig().learning_rate
    flag("adapt_learning_rate", f"of these steps (default {rate})", float)
    made.group("output")
    flag("stream", "show text as it comes (default on a terminal)", bool, default=False)
    text = "one line a prompt: text, tokens, times"
    flag("json", text, bool, default=False, without="stream")
    return made


if __name__ == "__main__":
    sys.exit(main())
