"""lm-eval runs our models: tasks in local files, a converted checkpoint, a numpy reference."""

import contextlib
import io
import json
import math
import os
import shutil

import numpy as np
import pytest
import sentencepiece
from goldens import require
from plain_deltanet import PlainDeltaNet

from refine_jax.convert import from_hf

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'refine-jax[eval]'")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from refine_jax.evaluation.harness import RefineLM

TEXT = (
    "The quick brown fox jumps over the lazy dog, and the other dogs think that nothing of the "
    "kind has ever happened there before. Then the fox thinks it over: this is the other thing. "
) * 4

CHOICES = [
    {"question": "The quick brown fox", "choices": ["jumps over", "thinks", "there", "the dog"]},
    {"question": "Then the other dogs", "choices": ["think", "happened before"]},
    {"question": "Nothing of the kind ", "choices": ["has ever happened", "is", "this thing over"]},
    {"question": "", "choices": ["the fox", "The"]},
]
TEXTS = ["The lazy dog thinks it over. Nothing happened.", "there", "The kind fox: " * 6]
STOPS = ("er", "q")
PROMPTS = ["The quick brown", "Then", "this is the other thing. The"]

TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "generate": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{want}}"
generation_kwargs: {until: ["er", "q"], max_gen_toks: 14, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def reference():
    return PlainDeltaNet(require("deltanet_base"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The golden DeltaNet and a tokenizer with as many pieces, converted."""
    folder = tmp_path_factory.mktemp("checkpoint")
    source = folder / "hf"
    shutil.copytree(require("deltanet_base"), source)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT]),
        model_writer=model,
        model_type="bpe",
        vocab_size=97,
        minloglevel=2,
    )
    (source / "tokenizer.model").write_bytes(model.getvalue())
    from_hf(str(source), str(folder / "jax"))
    return folder / "jax"


@pytest.fixture(scope="module")
def pieces(checkpoint):
    return sentencepiece.SentencePieceProcessor(str(checkpoint / "tokenizer.model"))


@pytest.fixture(scope="module")
def choices(reference, pieces):
    """Questions with answers; one of them is what the model would say."""
    for question in sorted(set(TEXT.split())):
        [token] = reference.greedy([pieces.bos_id(), *pieces.encode(question)], 1)
        likeliest = pieces.id_to_piece(token).removeprefix("▁")
        tokens, context = encode(pieces, question, likeliest)
        if tokens[context:] == [token]:
            return [*CHOICES, {"question": question, "choices": ["over it", likeliest, "fox"]}]
    raise AssertionError("no word has a word as its likeliest continuation")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, reference, pieces, choices):
    """The folder of the tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    docs = {"choice": [], "rolling": [{"text": text} for text in TEXTS], "generate": []}
    for number, doc in enumerate(choices):
        scores = [reference.score(*encode(pieces, doc["question"], c)) for c in doc["choices"]]
        answer = int(np.argmax([score for score, _ in scores]))
        # Half of the answers are what the model prefers: the accuracy is known, and not trivial.
        docs["choice"].append(doc | {"answer": answer if number % 2 else (answer + 1) % 2})
    for number, prompt in enumerate(PROMPTS):
        want = greedy_text(reference, pieces, prompt, 14, STOPS)
        docs["generate"].append({"text": prompt, "want": want if number else want + "x"})
    for name, rows in docs.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(
            f"task: local_{name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            f'target_delimiter: " "\n{TASKS[name]}'
        )
    return folder


def encode(pieces, question: str, choice: str):
    """(tokens, how many of them are the context), as lm-eval's models cut them."""
    bos = pieces.bos_id()
    if not question:
        return [bos, *pieces.encode(" " + choice)], 1
    stripped = question.rstrip()
    context = [bos, *pieces.encode(stripped)]
    whole = [bos, *pieces.encode(question + " " + choice)]
    return [*context, *whole[len(context) :]], len(context)


def greedy_text(reference, pieces, prompt: str, count: int, stops) -> str:
    tokens = [pieces.bos_id(), *pieces.encode(prompt)]
    new = []
    for token in reference.greedy(tokens, count):
        new.append(token)
        text = pieces.decode(new)
        if token == pieces.eos_id() or any(stop in text for stop in stops):
            break
    for stop in stops:
        text = text.split(stop)[0]
    return text


@pytest.fixture(scope="module")
def results(checkpoint, tasks):
    lm = RefineLM.from_checkpoint(str(checkpoint), batch_size=4)
    with contextlib.redirect_stderr(io.StringIO()):
        results = simple_evaluate(
            model=lm,
            tasks=["local_choice", "local_rolling", "local_generate"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            bootstrap_iters=0,
        )
    return results, lm


def responses(results, name: str):
    samples = sorted(results["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
    return [[resps[0] for resps in sample["resps"]] for sample in samples]


def test_log_likelihoods_are_the_reference(results, reference, pieces, choices):
    results, _ = results
    likeliest = 0
    for doc, got in zip(choices, responses(results, "choice"), strict=True):
        for choice, (log_prob, greedy) in zip(doc["choices"], got, strict=True):
            want = reference.score(*encode(pieces, doc["question"], choice))
            assert abs(log_prob - want[0]) < 1e-4
            assert greedy == want[1]
            likeliest += greedy
    assert likeliest == 1
    assert results["results"]["local_choice"]["acc,none"] == pytest.approx(2 / 5)


def test_choices_share_the_pass_over_their_question(results, pieces, choices):
    usage = results[0]["config"]["scoring"]
    answers = [encode(pieces, doc["question"], c) for doc in choices for c in doc["choices"]]
    texts = [pieces.encode(text) for text in TEXTS]
    assert usage["requests"] == len(answers) + len(texts)
    assert usage["rows"] <= len(choices) + 1 + len(texts)  # no question: at most a row an answer
    assert usage["rows"] + usage["forks"] <= len(answers) + len(texts)
    alone = sum(len(tokens) - 1 for tokens, _ in answers) + sum(map(len, texts))
    assert usage["row_tokens"] + usage["fork_tokens"] < 0.75 * alone
    assert usage["programs"] <= 6


def test_perplexity_is_the_reference(results, reference, pieces):
    results, _ = results
    totals = []
    for text, [got] in zip(TEXTS, responses(results, "rolling"), strict=True):
        want, _ = reference.score([pieces.bos_id(), *pieces.encode(text)], 1)
        assert abs(got - want) < 1e-4
        totals.append(want)
    count = sum(len(text.encode()) for text in TEXTS)
    want = math.exp(-sum(totals) / count)
    got = results["results"]["local_rolling"]["byte_perplexity,none"]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_generated_strings_are_the_reference(results, reference, pieces):
    results, _ = results
    got = [text for [text] in responses(results, "generate")]
    assert got == [greedy_text(reference, pieces, p, 14, STOPS) for p in PROMPTS]
    assert results["results"]["local_generate"]["exact_match,none"] == pytest.approx(2 / 3)
