"""Models of this package in lm-evaluation-harness (PyPI lm-eval, the extra [eval]).

    import lm_eval
    from refine_jax.evaluation.harness import RefineLM

    lm = RefineLM.from_checkpoint("checkpoints/lact-760m")
    results = lm_eval.simple_evaluate(model=lm, tasks=["lambada_openai", "hellaswag"])

`python -m refine_jax.lm_harness` does the same from the command line. No PyTorch is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        f"{error}: lm-evaluation-harness is an optional dependency, pip install 'refine-jax[eval]'"
    ) from error

from refine_jax.base.errors import DataError
from refine_jax.base.files import short, valid_unicode
from refine_jax.data.chat import (
    ChatTemplate,
    load_chat_template,
    mark_special_tokens,
    tokens_of_marked,
)
from refine_jax.data.references import whole_number
from refine_jax.data.tasks.files import MAX_ANSWER
from refine_jax.data.tokenizer import Tokenizer, check_ends
from refine_jax.evaluation.scoring import Request, Score, Scorer
from refine_jax.generation import Generator, Sampling, load, take_rows
from refine_jax.models.transformer import Model, Params

_MAX_GEN_TOKS = 256  # where a task names no number, as for lm-eval's other models
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GENERATION_ARGUMENTS = (
    f"until, {_LENGTHS[0]} ({', '.join(_LENGTHS[1:])}), do_sample, temperature, top_k, top_p"
)
# Values that change nothing, beside None, in Hugging Face's and vLLM's generation.
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "min_p": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": 0.0,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_tokens": 0,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "remove_invalid_values": False,
    "renormalize_logits": False,
}
# Arguments that change nothing whatever they are: speed, padding, and what is read with beams only.
_IDLE = {"use_cache", "pad_token_id", "length_penalty", "early_stopping", "diversity_penalty"}


class RefineLM(TemplateLM):
    """A model as lm-eval's tasks see one.

    Texts are encoded as by lm-eval's Hugging Face models: with the begin-of-sequence token first,
    if the tokenizer has one and `add_bos` is not False; a text without context follows that token,
    else the end-of-sequence token. One difference: rolling log-likelihoods do not score a second
    begin-of-sequence token between that context and the text.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        add_bos: bool | None = None,
        seed: int = 0,
    ):
        """Wrap a model.

        batch_size: rows of a forward pass, and prompts generated from together. max_length: most
            tokens of a request; what is longer is cut on the left, with a warning (of a generation
            the prompt, to leave room). None: no limit, which the models do not have. add_bos: None
            does what the tokenizer can. seed: of sampled generations.

        Raises DataError: options or a tokenizer that cannot work with the model.
        """
        super().__init__()
        check_options(batch_size, max_length, seed)
        if tokenizer.bos_id is None and tokenizer.eos_id is None:
            raise DataError(
                f"the tokenizer {tokenizer.name} has neither a bos nor an eos token: a text "
                "without a context would have nothing to follow."
            )
        check_ends(tokenizer, bos=bool(add_bos))
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed
        self.add_bos = tokenizer.bos_id is not None if add_bos is None else add_bos
        self.scorer = Scorer(model, params, batch_size=batch_size)
        self.generator = Generator(model, tokenizer)
        self._template: ChatTemplate | None = None  # loaded where a chat is rendered

    @classmethod
    def from_checkpoint(
        cls,
        path: str,
        *,
        step: int | str = "latest",
        tokenizer: str | None = None,
        compute_dtype: str | None = None,
        adapter: str | None = None,
        **options: Any,
    ) -> RefineLM:
        """Wrap the model of a checkpoint folder or of a training run.

        step: of a run: "latest", "best" or a number. tokenizer: "mistral-v1", "bytes" or a path;
        None: that of the checkpoint. compute_dtype: None: float32 on CPU, bfloat16 on accelerators.
        adapter: folder of the peft package, to add to the weights. options: of the constructor.

        Raises:
          CheckpointError: No checkpoint, or a corrupt one.
          DataError: No tokenizer, or options that cannot work.
        """
        given = {"step": step, "tokenizer": tokenizer, "compute_dtype": compute_dtype}
        loaded = load(path, adapter=adapter, **given)
        return cls(*loaded, **options)

    # What TemplateLM asks for

    @property
    def eot_token_id(self) -> int | None:
        """The end-of-sequence token."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context follows."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """For caches of requests."""
        return self.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a text, after bos if `add_special_tokens`, by default `add_bos`, says so.

        Lone surrogates become "?". All texts of tasks come through here. Once a chat template was
        applied, special tokens in them are such, but for those that messages spell; bos is then
        added where the template has not written it.
        """
        del kwargs
        string = valid_unicode(string)
        bos = self.add_bos if add_special_tokens is None else add_special_tokens
        bos = bos and self.tokenizer.bos_id is not None
        if self._template is None:
            return self.tokenizer.encode(string, bos=bos).tolist()
        ids = tokens_of_marked(self.tokenizer, [string])[0].tolist()
        return [self.tokenizer.bos_id, *ids] if bos and ids[:1] != [self.tokenizer.bos_id] else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render messages as one text, by the template beside the tokenizer.

        add_generation_prompt: end with what begins an answer; False: the text ends within the last
            message, which goes on.

        Raises DataError: there is no template, or it refuses the messages.
        """
        if self._template is None:
            self._template = load_chat_template(self.tokenizer)
        messages = mark_special_tokens(self.tokenizer, chat_history)
        text = self._template.render(messages, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        begun = messages[-1]["content"]
        start = text.rfind(begun.strip())
        if start < 0:
            raise DataError(
                f"{self._template.where} must show the last message as it is, for the model to "
                f"continue it. Got: {short(text[-80:])}, after {short(begun)}."
            )
        whole = begun.lstrip()
        return text[:start] + (whole if text.startswith(whole, start) else begun.strip())

    def get_model_info(self) -> dict[str, Any]:
        """Describe the model, for what lm-eval writes beside the results."""
        leaves = jax.tree.leaves(self.params)
        return {
            "model_type": self.model.config.model_type,
            "model_num_parameters": sum(leaf.size for leaf in leaves),
            "model_dtype": self.model.policy.compute_dtype,
            "tokenizer": self.tokenizer.name,
            "max_length": self.max_length,
            "scoring": dataclasses.asdict(self.scorer.usage),
        }

    # Log-likelihoods

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score each continuation after its context: (log-probability, whether it is greedy).

        Raises:
          DataError: a continuation without tokens, which lm-eval's Hugging Face models refuse, too.
        """
        pairs = []
        for request in requests:
            context, continuation = request.args
            if context == "":
                context_ids = [self.prefix_token_id]
                ids = self.tok_encode(continuation, add_special_tokens=False)
                if ids[:1] == context_ids:
                    ids = ids[1:]
            else:
                context_ids, ids = self._encode_pair(context, continuation)
                # A context of spaces alone, which belong to the continuation, without bos.
                context_ids = context_ids or [self.prefix_token_id]
            if not ids:
                raise DataError(
                    f"task {request.task_name}, document {request.doc_id}: a continuation to score "
                    f"is empty, it has no tokens of its own after its context. Got: "
                    f"{short(continuation)} after {short(context[-60:])}."
                )
            pairs.append(((context, continuation), context_ids, ids))
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Score (strings, context, continuation), which share what their tokens share."""
        del kwargs
        whole, longest = [], 0
        for _, context, continuation in requests:
            whole.append(self._fit(context, continuation))
            longest = max(longest, len(context) + len(continuation))
        if self.max_length is not None and longest > self.max_length + 1:
            logging.warning(
                "Requests of up to %d tokens were cut on the left to max_length=%d.",
                longest,
                self.max_length,
            )
        results: list[Score | None] = [None] * len(whole)
        progress = tqdm(total=len(whole), disable=disable_tqdm, desc="Scoring requests")
        for index, score in self.scorer.score(whole):
            results[index] = score
            strings = requests[index][0]
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, tuple(score))
            progress.update()
        progress.close()
        return [tuple(score) for score in results]

    def _fit(self, context: list[int], continuation: list[int]) -> Request:
        """Cut a request: its input, all tokens but the last, has at most max_length tokens."""
        tokens = np.array(context + continuation, np.int32)
        if self.max_length is not None:
            if len(continuation) > self.max_length:
                raise DataError(
                    f"a continuation has more tokens than max_length={self.max_length}. "
                    f"Got: {len(continuation)}."
                )
            tokens = tokens[-(self.max_length + 1) :]
        return Request(tokens, len(tokens) - len(continuation))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts; each token is scored once, in windows of max_length."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length or max(len(tokens), 1), 1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (log_prob, _) in zip(owners, scores, strict=True):
            totals[owner] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate after each context, up to a stop string or the end of sequence.

        Raises:
          DataError: Arguments that are not supported, or no room; before anything is generated.
        """
        groups: dict[Sampling, dict[int, tuple[int, ...]]] = {}
        for index, request in enumerate(requests):
            context, arguments = request.args
            sampling = read_sampling(arguments, self.seed)
            groups.setdefault(sampling, {})[index] = self._prompt(context, sampling)
        results = [""] * len(requests)
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Generating")
        for sampling, prompts in groups.items():
            for batch in self._batches(prompts):
                for index, text in self._generate(batch, prompts, sampling):
                    results[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    progress.update()
        progress.close()
        return results

    def _batches(self, prompts: Mapping[int, tuple[int, ...]]) -> Iterator[list[int]]:
        """Group requests to generate from: of similar length, equal prompts side by side."""
        order = sorted(prompts, key=lambda i: (-len(prompts[i]), prompts[i]))
        for first in range(0, len(order), self.batch_size):
            yield order[first : first + self.batch_size]

    def _generate(
        self, batch: list[int], prompts: Mapping[int, tuple[int, ...]], sampling: Sampling
    ) -> Iterator[tuple[int, str]]:
        """Generate (request, text) of a batch; equal prompts are read once."""
        unique = list(dict.fromkeys(prompts[i] for i in batch))
        prefix = self.generator.read(self.params, unique)
        rows = jnp.array([unique.index(prompts[i]) for i in batch], jnp.int32)
        generated = self.generator.generate(
            self.params, take_rows(prefix, rows), sampling, ids=batch
        )
        yield from zip(batch, (row.text for row in generated), strict=True)

    def _prompt(self, text: str, sampling: Sampling) -> tuple[int, ...]:
        ids = self.tok_encode(text) or [self.prefix_token_id]
        if self.max_length is not None:
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise DataError(
                    "max_length leaves no room for a prompt. Got: "
                    f"max_length={self.max_length}, max_gen_toks={sampling.max_new_tokens}."
                )
            if len(ids) > room:
                logging.warning("A prompt of %d tokens was cut on the left to %d.", len(ids), room)
                ids = ids[-room:]
        return tuple(ids)


def check_options(batch_size: int, max_length: int | None, seed: int) -> None:
    """Raise DataError for what no `RefineLM` can be made with; needs no model."""
    if not isinstance(batch_size, int) or batch_size < 1:  # lm-eval also knows "auto"
        raise DataError(f"batch_size must be a number, at least 1. Got: {batch_size!r}.")
    if max_length is not None and max_length < 2:
        raise DataError(f"max_length must be at least 2, or None. Got: {max_length!r}.")
    if not 0 <= seed < 2**32:
        raise DataError(f"seed must be at least 0 and below 2**32. Got: {seed!r}.")


def read_sampling(arguments: Mapping[str, Any], seed: int = 0) -> Sampling:
    """Translate lm-eval's generation arguments into ours.

    Raises DataError: one that is not supported, unless its value changes nothing, or a bad value.
    """

    def check(name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise DataError(
                f"the generation argument {name} must be {wanted}. Got: {short(given[name])}."
            )

    if not isinstance(arguments, Mapping):
        raise DataError(f"generation arguments must be a mapping. Got: {short(arguments)}.")
    given = {name: value for name, value in arguments.items() if value is not None}
    until = given.get("until", [])
    until = [until] if isinstance(until, str) else until
    texts = isinstance(until, list | tuple) and all(isinstance(stop, str) for stop in until)
    check("until", texts, "a string or a list of strings")
    check("do_sample", isinstance(given.get("do_sample", False), bool), "true or false")
    for name in _LENGTHS:
        fits = name not in given or whole_number(given[name], 0, MAX_ANSWER) is not None
        check(name, fits, f"a whole number from 0 to {MAX_ANSWER:,}")
    for name, kind, wanted in (
        ("temperature", int | float, "a number"),
        ("top_p", int | float, "a number"),
        ("top_k", int, "a whole number"),
    ):
        value = given.get(name, 0)
        check(name, isinstance(value, kind) and not isinstance(value, bool), wanted)
    names = ("do_sample", "temperature", "top_k", "top_p", *_LENGTHS)
    unknown = {
        name: value
        for name, value in given.items()
        if name not in ("until", *names, *_IDLE)
        and not (name in _NEUTRAL and value == _NEUTRAL[name])
    }
    if unknown:
        raise DataError(
            f"generation arguments of this kind are not supported. Got: {unknown}; "
            f"supported: {_GENERATION_ARGUMENTS}."
        )
    chosen = {name: given[name] for name in names if name in given}
    chosen = dict(normalize_gen_kwargs(chosen, _MAX_GEN_TOKS))
    temperature = chosen.get("temperature", 1.0 if chosen["do_sample"] else 0.0)
    top_k = chosen.get("top_k")
    return Sampling(
        temperature=temperature,
        # Hugging Face writes 0 for no top_k, and tasks give both to greedy generations too.
        top_k=top_k if temperature and top_k else None,
        top_p=chosen.get("top_p") if temperature else None,
        max_new_tokens=chosen["max_gen_toks"],
        stop=tuple(valid_unicode(stop) for stop in until if stop),
        seed=seed,
    )
