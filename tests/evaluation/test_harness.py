"""lm-eval runs our models: tasks in local files, a converted checkpoint, a numpy reference."""

import contextlib
import copy
import io
import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from goldens import load_arrays, require
from plain_deltanet import PlainDeltaNet

from refine_jax.base.errors import DataError, UserError
from refine_jax.checkpoint.hf import read_hf
from refine_jax.convert import from_hf
from refine_jax.data.tokenizer import ByteTokenizer
from refine_jax.models.config import model_config
from refine_jax.models.transformer import Model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'refine-jax[eval]'")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from refine_jax import lm_harness
from refine_jax.evaluation.harness import RefineLM, read_sampling
from refine_jax.generation import Sampling

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


class Numbers:
    """Tokens written as numbers: golden sequences as texts."""

    name = fingerprint = "numbers"
    vocab_size = 97
    bos_id, eos_id, pad_id = None, 96, 96
    end_ids = (96,)
    special_tokens, files = {}, {}

    def encode(self, text, bos=True, eos=False):
        assert not (bos or eos)
        return np.array([int(word) for word in text.split()], np.int32)

    def decode(self, ids):
        return " ".join(map(str, ids))


def instances(*arguments):
    return [
        SimpleNamespace(args=args, task_name="test", doc_id=i) for i, args in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def lact():
    """The golden LaCT, whose texts are numbers."""
    loaded = read_hf(require("lact_base"))
    params = jax.tree.map(jnp.asarray, loaded.params)
    return RefineLM(Model(model_config(loaded.config)), params, Numbers(), batch_size=2)


def test_lact_gives_the_golden_log_probabilities(lact):
    """Without a begin-of-sequence token; across LaCT's chunks of 16 tokens."""
    golden = load_arrays("lact_base", "expected.npz")
    text = {name: " ".join(map(str, array)) for name, array in golden.items() if array.ndim == 1}
    requests = [(text[f"cont/prefix{p}"], " " + text[f"cont/tokens{p}"]) for p in (23, 40)]
    requests += [(text[f"greedy/prompt{j}"], " " + text[f"greedy/tokens{j}"]) for j in (0, 1)]
    got = lact.loglikelihood(instances(*requests), disable_tqdm=True)
    for p, (log_prob, _) in zip((23, 40), got[:2], strict=True):
        assert abs(log_prob - golden[f"cont/logprobs{p}"].sum()) < 1e-4
    assert [greedy for _, greedy in got] == [False, False, True, True]


def test_order_does_not_matter(results, choices):
    _, lm = results
    requests = [(doc["question"], " " + choice) for doc in choices for choice in doc["choices"]]
    got = lm.loglikelihood(instances(*requests), disable_tqdm=True)
    order = np.random.default_rng(0).permutation(len(requests))
    again = lm.loglikelihood(instances(*[requests[i] for i in order]), disable_tqdm=True)
    for i, (log_prob, greedy) in zip(order, again, strict=True):
        assert abs(log_prob - got[i][0]) < 2e-5
        assert greedy == got[i][1]


def test_long_requests_are_cut_on_the_left(results, reference, pieces):
    lm = copy.copy(results[1])
    lm.max_length = 12
    question, choice = "this is the other thing of the kind", " over there"
    tokens, context = encode(pieces, question, choice.strip())
    assert len(tokens) > 13
    [got] = lm.loglikelihood(instances((question, choice)), disable_tqdm=True)
    want = reference.score(tokens[-13:], 13 - (len(tokens) - context))
    assert abs(got[0] - want[0]) < 1e-4

    # Rolling: windows of 12 tokens; each token once; the last window is full.
    ids = pieces.encode(question + choice)
    assert 12 < len(ids) < 24
    [got] = lm.loglikelihood_rolling(instances((question + choice,)), disable_tqdm=True)
    want = reference.score([pieces.bos_id(), *ids[:12]], 1)[0]
    want += reference.score(ids[-13:], 13 - (len(ids) - 12))[0]
    assert abs(got - want) < 1e-4

    [got] = lm.generate_until(instances((question, {"max_gen_toks": 4})), disable_tqdm=True)
    prompt = pieces.encode(question)[-8:]
    assert got == pieces.decode(reference.greedy(prompt, 4))
    with pytest.raises(DataError, match="max_length=12, max_gen_toks=12"):
        lm.generate_until(instances((question, {"max_gen_toks": 12})), disable_tqdm=True)
    with pytest.raises(DataError, match="more tokens than max_length=12"):
        lm.loglikelihood(instances(("The", question + choice)), disable_tqdm=True)


def test_repeats_of_a_sampled_prompt_differ_and_come_again(results):
    _, lm = results
    arguments = {"do_sample": True, "max_gen_toks": 8, "top_p": 0.95}
    requests = instances(*[("The quick", arguments)] * 3)
    first = lm.generate_until(requests, disable_tqdm=True)
    assert len(set(first)) == 3
    assert lm.generate_until(requests, disable_tqdm=True) == first


def test_half_an_emoji_is_a_question_mark_everywhere(results):
    """As in documents: JSON can hold lone surrogates, which no encoding of text can."""
    _, lm = results
    half, mark = "the \ud83d fox", "the ? fox"
    for call, requests in (
        (lm.loglikelihood, [(half, " there"), ("The", half), ("", half)]),
        (lm.loglikelihood_rolling, [(half,)]),
        (lm.generate_until, [(half, {"max_gen_toks": 3, "until": ["\ud83d"]})]),
    ):
        clean = [tuple(mark if x == half else x for x in request) for request in requests]
        got = call(instances(*requests), disable_tqdm=True)
        assert got == call(instances(*clean), disable_tqdm=True)


def test_a_context_of_spaces_belongs_to_the_continuation(results):
    _, lm = results
    [spaced] = lm.loglikelihood(instances((" ", "there")), disable_tqdm=True)
    [plain] = lm.loglikelihood(instances(("", " there")), disable_tqdm=True)
    assert spaced == plain


NEUTRAL = {
    "repetition_penalty": 1.0,
    "num_beams": 1,
    "length_penalty": 0.7,
    "early_stopping": True,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "min_p": None,
    "bad_words_ids": [],
    "use_cache": False,
    "until": [],
}


def test_arguments_that_change_nothing_are_accepted(results):
    _, lm = results
    for arguments in (NEUTRAL, *({name: value} for name, value in NEUTRAL.items())):
        assert read_sampling(arguments) == Sampling(max_new_tokens=256)
    requests = [("The quick", {"max_gen_toks": 3} | extra) for extra in ({}, NEUTRAL)]
    one, other = lm.generate_until(instances(*requests), disable_tqdm=True)
    assert one == other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repetition_penalty": 1.2}, "not supported. Got: {'repetition_penalty': 1.2}"),
        ({"num_beams": 4, "typical_p": 1.0}, "not supported. Got: {'num_beams': 4}"),
        ({"do_sample": True, "typical_p": 0.9}, "not supported. Got: {'typical_p': 0.9}"),
        ({"max_length": 30}, "not supported. Got: {'max_length': 30}"),
        ({"until": [3]}, "argument until must be a string or a list of strings. Got: [3]"),
        ({"until": {}}, "argument until must be"),
        ({"max_gen_toks": "many"}, "argument max_gen_toks must be a whole number"),
        ({"max_new_tokens": 10**18}, "argument max_new_tokens must be a whole number"),
        ({"max_tokens": -1}, "argument max_tokens must be a whole number"),
        ({"temperature": "hot"}, "argument temperature must be a number. Got: 'hot'"),
        ({"temperature": math.nan}, "temperature must be a number"),
        ({"do_sample": True, "top_k": 1.5}, "argument top_k must be a whole number"),
        ({"do_sample": "yes"}, "argument do_sample must be true or false. Got: 'yes'"),
        (7, "must be a mapping. Got: 7"),
    ],
)
def test_other_arguments_are_refused_by_name_with_the_value(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_sampling(arguments)


def test_bad_requests_end_in_one_message(lact):
    for call, arguments, message in (
        (lact.loglikelihood, ("1 2", ""), "document 0: a continuation to score is empty"),
        (lact.loglikelihood, ("1 2", " "), "no tokens of its own"),
        (lact.generate_until, ("1", {"num_beams": 4}), "not supported. Got: {'num_beams': 4}"),
        (lact.generate_until, ("1", {"min_p": 0.1}), "not supported"),
    ):
        with pytest.raises(DataError, match=message):
            call(instances(arguments), disable_tqdm=True)
    with pytest.raises(DataError, match="no chat template"):
        lact.apply_chat_template([{"role": "user", "content": "1"}])
    assert lact.loglikelihood_rolling(instances(("",)), disable_tqdm=True) == [0.0]
    for options, message in (
        ({"batch_size": "auto"}, "batch_size must be a number"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"add_bos": True}, "no bos token"),
        ({"seed": 2**63}, r"seed must be .* below 2\*\*32"),
    ):
        with pytest.raises(DataError, match=message):
            RefineLM(lact.model, lact.params, Numbers(), **options)
    with pytest.raises(DataError, match="more tokens than the model's vocabulary"):
        RefineLM(lact.model, lact.params, ByteTokenizer())


def test_command(checkpoint, tasks, tmp_path, capsys, results):
    arguments = [
        f"--checkpoint={checkpoint}",
        "--tasks=local_rolling",
        f"--include_path={tasks}",
        "--limit=2",
        "--log_samples",
        f"--output={tmp_path / 'results.json'}",
    ]
    assert lm_harness.main(arguments) == 0
    out = capsys.readouterr().out
    assert "|local_rolling|" in out
    summary = json.loads(out.splitlines()[-1])
    written = json.loads((tmp_path / "results.json").read_text())
    assert summary["results"] == written["results"]
    assert summary["scoring"]["requests"] == 2
    got = [sample["resps"][0][0] for sample in written["samples"]["local_rolling"]]
    want = [value for [value] in responses(results[0], "rolling")[:2]]
    np.testing.assert_allclose(got, want, atol=1e-5)

    assert lm_harness.main(arguments) == 1
    assert "choose another --output" in capsys.readouterr().err
    for changed, message in (
        ([f"--include_path={tmp_path / 'none'}"], "include_path is no folder"),
        (["--output=none/results.json"], "does not exist"),
        (["--checkpoint=none"], "none is not a checkpoint"),
        (["--batch_size=0"], "batch_size must be a number"),
    ):
        assert lm_harness.main([*arguments[:-1], *changed]) == 1
        assert message in capsys.readouterr().err
