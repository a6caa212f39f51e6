"""Time and memory of a ReFINE step beside a next-token step and the truncated-prefix algorithm.

    python experiments/bench_refine_step.py --model=lact --tokens=4096 --rows=4 --json

A batch of rows of full length is one update of the parameters (AdamW), whose gradient is made of
micro-batches. A ReFINE step selects c = 8 positions of each row and rolls out n times k = 5 tokens
from each. All steps train the same small random model in one process; they run in turns, and
medians are reported, with the quartiles of the ratio turn by turn.

--truncated adds the truncated-prefix algorithm (`truncated_prefix.py`), which takes minutes. It
gets its best case: prefixes are not padded and generation is cached. Its programs have the lengths
of its prefixes; the learning rate is 0, so that positions stay and no compilation is counted, which
in training would come with every step.

Memory is XLA's plan of the largest program of a step (`harness.program_bytes`), plus the optimizer
state where that program does not take it.
"""

from __future__ import annotations

import statistics

import jax
import numpy as np
from harness import parser, program_bytes, report, seconds, small_model, timings, tree_bytes
from truncated_prefix import TruncatedPrefixStep

from refine_jax.config import OptimizerConfig, RefineConfig
from refine_jax.models.transformer import Model
from refine_jax.presets import PRESETS
from refine_jax.refine.optimizer import make_optimizer
from refine_jax.refine.step import TrainState, make_train_step

EOS = 2
MIB = 2**20


class PackageStep:
    """A training step of the package, with its state."""

    def __init__(
        self,
        model: Model,
        optimizer,
        config: RefineConfig,
        tokens: jax.Array,
        micro_batch: int,
    ):
        rows = tokens.shape[0]
        params = model.init(jax.random.key(0))
        self.batch = {"tokens": tokens}
        self.state = TrainState.create(params, optimizer, jax.random.key(1), config)
        self.train_step = make_train_step(
            model, optimizer, config, mini_batch=rows, micro_batch=micro_batch, eos_id=EOS
        )

    def run(self):
        """One step."""
        self.state, metrics = self.train_step(self.state, self.batch)
        return metrics

    def peak_bytes(self) -> int:
        """Memory of the step, which is one program."""
        return program_bytes(self.train_step.run, self.state, self.batch)


class TruncatedStep:
    """The same update by truncated prefixes, with its state."""

    def __init__(self, model: Model, optimizer, tokens: jax.Array):
        self.step = TruncatedPrefixStep(model, optimizer, RefineConfig(), eos_id=EOS)
        self.tokens = tokens
        self.params = model.init(jax.random.key(0))
        self.opt_state = optimizer.init(self.params)
        self.keys = jax.random.split(jax.random.key(1), tokens.shape[0])

    def run(self):
        """One step."""
        self.params, self.opt_state, total = self.step(
            self.params, self.opt_state, self.tokens, self.keys
        )
        return total

    def log_prob_seconds(self) -> float:
        """Time of the pass for rewards and old log-probabilities, once all is compiled."""
        experience = self.step.collect(self.params, self.tokens, self.keys)
        inputs = self.step.sequences(self.tokens, experience.starts, experience.tokens)
        return sum(seconds(lambda x=x: self.step.score(self.params, x)) for x in inputs)

    def peak_bytes(self) -> int:
        """Memory of the largest program, which is that of the longest prefix or of the rows."""
        step, params, tokens = self.step, self.params, self.tokens
        experience = step.collect(params, tokens, self.keys)
        sequence = max(
            step.sequences(tokens, experience.starts, experience.tokens), key=lambda x: x.shape[1]
        )
        row = experience.old_log_probs[0, :1], experience.advantages[0, :1, None]
        valid = experience.valid[0, :1]
        prefix = sequence[:, : -experience.tokens.shape[-1]]
        total, gradients = step.ntp_gradient(params, tokens)
        held = tree_bytes(self.opt_state)
        return max(
            held + program_bytes(step.read_rows, params, tokens),
            held + program_bytes(step.generate, params, prefix, self.keys[0]),
            held + program_bytes(step.score, params, sequence),
            held + program_bytes(step.ntp_gradient, params, tokens),
            held
            + program_bytes(
                step.add_policy_gradient,
                (gradients, total),
                params,
                sequence,
                *row,
                valid,
                experience.valid,
            ),
            program_bytes(step.apply, params, self.opt_state, gradients),
        )


def main():
    """Measure and print."""
    flags = parser(__doc__, repeats=7)
    flags.add_argument("--tokens", type=int, default=4096, help="tokens of a row")
    flags.add_argument("--rows", type=int, default=1, help="rows of the batch")
    flags.add_argument("--micro_batch", type=int, default=1, help="rows at a time")
    flags.add_argument("--rollouts", type=int, default=1, help="n: rollouts a position")
    flags.add_argument("--estimator", choices=("rollouts", "exact"), default="rollouts")
    flags.add_argument("--truncated", action="store_true", help="add truncated prefixes (minutes)")
    args = flags.parse_args()
    model = small_model(args.model)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.0), steps=1)
    shape = args.rows, args.tokens
    tokens = jax.random.randint(jax.random.key(2), shape, 3, model.config.vocab_size)

    config = RefineConfig(rollouts_per_position=args.rollouts)
    if args.estimator == "exact":
        config = RefineConfig(**PRESETS["exact"])
    ntp = RefineConfig(objective="ntp")
    steps = {
        "ntp": PackageStep(model, optimizer, ntp, tokens, args.micro_batch),
        "refine": PackageStep(model, optimizer, config, tokens, args.micro_batch),
    }
    if args.truncated:
        steps["truncated"] = TruncatedStep(model, optimizer, tokens)
    peaks = {name: step.peak_bytes() for name, step in steps.items()}
    turns = timings({name: step.run for name, step in steps.items()}, args.repeats)
    times = {name: statistics.median(values) for name, values in turns.items()}
    ratios = [b / a for a, b in zip(turns["ntp"], turns["refine"], strict=True)]
    low, high = np.quantile(ratios, (0.25, 0.75), method="weibull").tolist()

    result = {
        "model": args.model,
        "tokens": args.tokens,
        "rows": args.rows,
        "micro_batch": args.micro_batch,
        "estimator": config.estimator,
        "forks": config.num_positions * args.rollouts if config.estimator == "rollouts" else 0,
        **{f"{name}_s": value for name, value in times.items()},
        "ratio_to_ntp": times["refine"] / times["ntp"],
        "ratio_quartiles": [low, high],
        **{f"peak_bytes_{name}": value for name, value in peaks.items()},
    }
    lines = [
        f"{name:>9}: {times[name]:7.3f} s a step, {peaks[name] / MIB:7.0f} MiB" for name in steps
    ]
    lines.append(
        f"ReFINE / next-token: {result['ratio_to_ntp']:.2f} x the time (quartiles {low:.2f} to "
        f"{high:.2f}), {peaks['refine'] / peaks['ntp']:.2f} x the memory"
    )
    if args.truncated:
        log_probs = steps["truncated"].log_prob_seconds()
        result["speedup_over_truncated"] = times["truncated"] / times["refine"]
        lines.append(
            f"truncated / ReFINE: {result['speedup_over_truncated']:.1f} x; "
            f"{(times['truncated'] - log_probs) / times['refine']:.1f} x if the old "
            f"log-probabilities came with the generation ({log_probs:.3f} s less)"
        )
    report(result, lines, args.json)


if __name__ == "__main__":
    main()
