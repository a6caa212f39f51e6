"""Folders of runs that never ran, for tests of their page and for its size and time:

python tests/made_up_runs.py --steps=1000 --answers=500
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from refine_jax.evaluation.metrics import score
from refine_jax.report.command import compare_runs

WORDS = ("the", "state", "of", "a", "fast", "weight", "model", "holds", "what", "it", "has", "read")
HOSTILE = (
    "</script><script>document.title='ran'</script>",
    "<img src=x onerror=\"document.title='ran'\">",
    "\" onmouseover=\"document.title='ran'\" x='",
    "&lt;b&gt; &amp; <b>bold</b> <!-- open",
    "\u202eright to left\u2066 and \u200bzero",
    "\x00\x07\x1b[31m\x7f\x85",
    "\ud800 alone \udfff",
    "]]> ${document.title='ran'} {{7*7}} @{x} $name \u2028\u2029 \\u003c",
)
"""Texts that a page must show and never obey."""


def training(folder: Path, steps: int, *, seed: int = 0, texts=WORDS, every: int = 0) -> Path:
    """A folder with metrics and held-out text of a run of so many steps; a tenth are warm-up."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    every = every or max(1, steps // 20)
    with (
        (folder / "metrics.jsonl").open("w") as metrics,
        (folder / "held_out.jsonl").open("w") as kept,
    ):
        for step in range(steps + 1):
            record = {"step": step, "time/total": 2.0 * step}
            loss = 3 + 7 * np.exp(-5 * step / steps) - 0.02 * seed
            if step:
                record |= {"loss/ntp": loss + random.normal(0, 0.1), "grad/norm": random.gamma(2)}
                record |= {"entropy/mean": loss, "tokens_per_second": random.normal(2000, 50)}
                record |= {"time/step": 1.0, "time/update": 0.9, "time/data": 0.01}
                record |= {"learning_rate": 1e-3}
            if step > steps // 10:
                record |= {"reward/mean": step / steps + random.normal(0, 0.05), "reward/std": 0.1}
            if step % every == 0 or step == steps:
                held = held_out(step, loss, random, texts)
                sums = {name: sum(values) for name, values in held["rows"].items()}
                record |= {
                    "eval/loss": sums["nll"] / sums["tokens"],
                    "eval/accuracy": sums["correct"] / sums["tokens"],
                    "eval/entropy": loss,
                    "eval/reward": sums["reward"] / sums["rollouts"],
                }
                kept.write(json.dumps(held) + "\n")
            metrics.write(json.dumps(record) + "\n")
    return folder


def held_out(step: int, loss: float, random, texts, *, rows: int = 12) -> dict:
    """A record of held_out.jsonl: two rows of 512 tokens with eight positions each."""
    nll = 512 * (
        loss + np.random.default_rng(7).normal(0, 0.3, rows) + random.normal(0, 0.01, rows)
    )
    return {
        "step": step,
        "data": "rows",
        "rows": {
            "tokens": [512.0] * rows,
            "nll": nll.tolist(),
            "correct": (512 / nll * 300).tolist(),
            "reward": (8 * (1 - nll / 8000)).tolist(),
            "rollouts": [8.0] * rows,
        },
        "shown": [shown_row(row, loss, random, texts) for row in range(2)],
    }


def shown_row(row: int, loss: float, random, texts) -> dict:
    """A row of 512 tokens whose texts come in turn."""
    named = [f" {texts[(index + row) % len(texts)]}" for index in range(512)]
    starts = [20 + 60 * index for index in range(8)]
    return {
        "row": row,
        "reward": "binary",
        "length": 3,
        "tokens": 512,
        "segments": [
            {
                "first": 0,
                "texts": named,
                "entropy": [None, *np.round(random.gamma(2, loss / 2, 511), 3).tolist()],
                "match": [None, *np.round(random.beta(1, loss, 511), 4).tolist()],
            }
        ],
        "positions": [
            {
                "start": start,
                "truth": named[start : start + 3],
                "rollouts": [
                    {
                        "texts": [named[start], "other", named[start + 2]],
                        "same": [True, False, True],
                        "reward": round(2 / 3, 4),
                        "advantages": [round(float(random.normal()), 4)],
                    }
                ],
            }
            for start in starts
        ],
    }


def evaluation(
    folder: Path, answers: int, *, seed: int = 0, texts=WORDS, before: bool = False
) -> Path:
    """A folder with the answers of an evaluation: needles at two lengths, found more often late."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with (folder / "predictions.jsonl").open("w") as file:
        for index in range(answers):
            length, depth = (1024, 4096)[index % 2], float(random.uniform(0, 100))
            wanted = f"{texts[index % len(texts)]} {index}"
            found = random.random() < 0.3 + 0.1 * seed + 0.4 * depth / 100
            said = " ".join(random.choice(WORDS, 20)) + (f" {wanted}" if found else "")
            record = {
                "id": f"niah_single_1/{length}/{index}",
                "task": "niah_single_1",
                "set": f"niah_single_1/{length}",
                "index": index,
                "prompt_tokens": length - 20,
                "cut_tokens": 0,
                "response": said,
                "new_tokens": 20,
                "finish_reason": "length",
                "answers": [wanted],
                "metric": "ruler_recall",
                "score": score("ruler_recall", said, [wanted]),
                "seconds_read": 0.5,
                "seconds_generate": 0.1,
                "metadata": {"depths": [depth]},
            }
            if before:
                record["before"] = {"response": "nothing", "score": 0.0}
                record["adapt"] = {
                    "seconds": 1.0,
                    "steps": 2,
                    "tokens": 2 * length,
                    "rollout_tokens": 40,
                    "skipped": 0,
                    "compiled": index == 0,
                    "loss": 2.0,
                }
            file.write(json.dumps(record) + "\n")
    return folder


def main() -> None:
    """Print, as a line of JSON, seconds and bytes of a page of each kind."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--steps", type=int, default=1000)
    flags.add_argument("--answers", type=int, default=500)
    sizes = flags.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = {
            "training": [training(folder / "t", sizes.steps)],
            "two trainings": [folder / "t", training(folder / "t2", sizes.steps, seed=1)],
            "evaluation": [evaluation(folder / "e", sizes.answers)],
            "two evaluations": [folder / "e", evaluation(folder / "e2", sizes.answers, seed=1)],
        }
        compare_runs(kinds["training"], folder / "first.html")  # imports, and unpacks the library
        for kind, runs in kinds.items():
            begin = time.perf_counter()
            compare_runs(runs, folder / "page.html")
            seconds = round(time.perf_counter() - begin, 4)
            results[kind] = {"seconds": seconds, "bytes": (folder / "page.html").stat().st_size}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
