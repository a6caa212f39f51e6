"""Throughput of a needle evaluation, against running the whole sequence again for every token.

    python experiments/bench_eval.py --model=lact --json

Examples of niah_single_1 at 4096 tokens are read, answered and scored as the phase `evaluate`
does it: one forward pass over the prompts, then a decode state of fixed size. The official code
generates from LaCT without a state, by a forward pass over everything for each token. Such a pass,
with logits of the last token only, is timed over the same batch; an answer takes as many as it has
tokens. Weights are random, so that answers mostly go on to the end of their budget.
"""

from __future__ import annotations

import jax
import numpy as np
from harness import make_rerun, medians, parser, report, small_model

from refine_jax.config import EvaluateConfig
from refine_jax.data.tokenizer import load_tokenizer
from refine_jax.evaluation.questions import load_questions
from refine_jax.evaluation.runner import Answerer
from refine_jax.generation import Generator, Sampling


def main():
    """Measure and print."""
    flags = parser(__doc__, repeats=3)
    flags.add_argument("--tokens", type=int, default=4096, help="of prompt and answer")
    flags.add_argument("--batch", type=int, default=2, help="examples answered at once")
    args = flags.parse_args()
    model, tokenizer = small_model(args.model), load_tokenizer("mistral-v1")
    params = model.init(jax.random.key(0))
    config = EvaluateConfig(tasks="niah_single_1", lengths=str(args.tokens), samples=args.batch)
    questions = load_questions(config, tokenizer, bos=True)
    answerer = Answerer(params, Generator(model, tokenizer), Sampling())

    tokens = np.zeros((args.batch, args.tokens), np.int32)
    for row, question in zip(tokens, questions, strict=True):
        row[: len(question.tokens)] = question.tokens
    last = np.array([len(question.tokens) - 1 for question in questions])
    records = answerer.answer(questions)
    rerun = make_rerun(model)
    times = medians(
        {
            "evaluate": lambda: answerer.answer(questions) and (),
            "rerun": lambda: rerun(params, tokens, last),
        },
        args.repeats,
    )

    new_tokens = max(record["new_tokens"] for record in records)
    carried, again = times["evaluate"], times["rerun"] * new_tokens
    result = {
        "model": args.model,
        "tokens": args.tokens,
        "batch": args.batch,
        "new_tokens": new_tokens,
        "seconds_per_example": carried / args.batch,
        "seconds_per_example_rerun": again / args.batch,
        "tokens_per_second": sum(r["prompt_tokens"] + r["new_tokens"] for r in records) / carried,
        "ratio": again / carried,
    }
    lines = [
        f"{args.batch} examples of {args.tokens} tokens, {new_tokens} of them generated:",
        f"carried state  {result['seconds_per_example']:8.2f} s an example, "
        f"{result['tokens_per_second']:,.0f} tokens a second",
        f"re-run         {result['seconds_per_example_rerun']:8.2f} s an example "
        f"({times['rerun']:.2f} s a pass over the batch, {new_tokens} passes)",
        f"ratio          {result['ratio']:8.1f}",
    ]
    report(result, lines, args.json)


if __name__ == "__main__":
    main()
