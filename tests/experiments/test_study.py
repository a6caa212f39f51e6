"""The study of `experiments/study`: its tasks, its bookkeeping and its statistics."""

import dataclasses
import functools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments" / "study"))

import corpus as text
import report
import study as command
from arms import ARMS, BEST, CORE, FINAL, RULES, SMALL
from lab import Lab, _recall, calibration_error
from plans import make_task, plan_of
from signals import at_equal_cost, gradients, jackknife, signal
from study import ResultStore, Study
from tasks import SymbolTask

from refine_jax.base.errors import DataError
from refine_jax.config import Config, RefineConfig


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "vocabulary.model"
    text.train_vocabulary(path, 1024)
    return path


@pytest.fixture(scope="module")
def corpus(vocabulary):
    return text.FactCorpus(vocabulary)


@pytest.fixture(scope="module")
def decode(vocabulary):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    return [pieces.id_to_piece(index) for index in range(pieces.get_piece_size())]


def read_facts(tokens, recall, names):
    """[(key, value, whether each digit of it is marked)] of all facts and questions, in order."""
    found, words = [], [names[token] for token in tokens]
    for index, word in enumerate(words[: -text.VALUE - 1]):
        key, *value = words[index + 1 : index + 2 + text.VALUE]
        if word in "#?" and re.fullmatch("▁[a-z]{3,}", key) and "".join(value).isdecimal():
            marks = recall[index + 2 : index + 2 + text.VALUE].tolist()
            found.append((key, "".join(value), marks))
    return found


def test_documents_mark_the_values_that_were_mentioned_before(corpus, decode):
    shape = text.Shape(200, (2, 5), 3)
    rows = corpus.documents(shape, 20, 3, 4)
    assert rows.tokens.shape == rows.recall.shape == (20, 200)
    for tokens, recall in zip(rows.tokens, rows.recall, strict=True):
        known, mentions, marked = {}, 0, 0
        for name, value, marks in read_facts(tokens, recall, decode):
            if marks == [False] * 3 and name not in known:
                known[name] = value
            else:
                assert known[name] == value
                assert marks == [True] * 3
                marked += 3
            mentions += 1
        assert 2 <= len(known) <= 5
        assert mentions == 3 * len(known)
        assert marked == recall.sum()


def test_a_prompt_asks_for_one_of_its_facts(corpus, decode):
    rows = corpus.prompts(text.Shape(120, (2, 4)), 20, 3, 4)
    assert rows.tokens.shape == (20, 120 + text.ANSWER)
    asked_for = set()
    for tokens, recall in zip(rows.tokens, rows.recall, strict=True):
        *facts, (name, value, marks) = read_facts(tokens, recall, decode)
        names = [fact[0] for fact in facts]
        assert len(set(names)) == len(names)
        assert (name, value, [False] * 3) in facts
        assert marks == [True] * 3
        assert recall.sum() == text.VALUE
        assert tokens[-1] == corpus.eos
        asked_for.add(names.index(name) / len(names))
    assert len(asked_for) > 3


def test_rows_depend_on_their_number_alone(corpus):
    shape = text.Shape(100, (2, 3), 2)
    whole = corpus.documents(shape, 6, 1, 2)
    part = corpus.documents(shape, 2, 1, 2, first=3)
    np.testing.assert_array_equal(part.tokens, whole.tokens[3:5])
    other = corpus.documents(shape, 6, 1, 3)
    assert (whole.tokens != other.tokens).mean() > 0.5


def test_facts_that_leave_no_text_are_refused(corpus):
    with pytest.raises(DataError, match="fewer facts or mentions, or longer rows"):
        corpus.documents(text.Shape(60, (4, 4), 3), 1, 0)


# Symbols


def facts_of(row):
    """[(key, value)] of a row, in order."""
    return [(int(key), tuple(map(int, value))) for key, *value in row.reshape(-1, 4)]


@pytest.mark.parametrize("scale", [1, 2])
def test_symbols_mark_the_values_that_were_mentioned_before(scale):
    task = SymbolTask(keys=9, symbols=5, facts=4, length=32)
    rows = task.documents(30, 3, 4, scale=scale)
    assert rows.tokens.shape == rows.recall.shape == (30, 32 * scale)
    assert rows.tokens.max() < task.vocab_size
    for tokens, recall in zip(rows.tokens, rows.recall, strict=True):
        known = {}
        for (key, value), marks in zip(facts_of(tokens), recall.reshape(-1, 4), strict=True):
            assert key < 9 <= min(value)
            assert marks.tolist() == [False] + [key in known] * 3
            assert known.setdefault(key, value) == value
        assert len(known) == 4


def test_easy_rows_have_fewer_facts():
    task = SymbolTask(keys=9, symbols=5, facts=8, length=64)
    rows = task.documents(8, 3, 4, easy=True)
    counts = [len({key for key, _ in facts_of(tokens)}) for tokens in rows.tokens]
    assert counts == [8, 4, 2, 1] * 2


def test_a_prompt_of_symbols_asks_for_a_fact_that_was_mentioned():
    rows = SymbolTask(keys=9, symbols=5, facts=4, length=32).prompts(30, 3, 4)
    places = set()
    for tokens, recall in zip(rows.tokens, rows.recall, strict=True):
        *before, asked = facts_of(tokens)
        assert asked in before
        assert recall.tolist() == [False] * 29 + [True] * 3
        places.add(before.index(asked))
    assert len(places) > 3


def test_held_out_symbols_are_others():
    task = SymbolTask()
    np.testing.assert_array_equal(task.documents(4, 1).tokens, task.documents(4, 1).tokens)
    others = (task.documents(4, 2), task.documents(4, 1, held_out=True))
    for other in others:
        assert (task.documents(4, 1).tokens != other.tokens).mean() > 0.5


# What is measured


def test_recall_counts_values_that_are_predicted_whole():
    recall = np.zeros((2, 9), bool)
    recall[0, 2:5] = recall[0, 6:9] = recall[1, 1:4] = True
    correct = np.zeros((2, 9))
    correct[0, 1:4] = 1  # predicts tokens 2 to 4
    correct[0, 5:7] = 1  # two of the three tokens 6 to 8
    correct[1, 0:3] = 1
    assert _recall(correct, text.RecallRows(np.zeros((2, 9), np.int32), recall)) == 2 / 3


def test_calibration_is_the_gap_of_confidence_and_accuracy():
    confidence = np.array([0.05, 0.95, 0.92, 0.91, 1.0])
    correct = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    # Bins: the first has a gap of 0.05, the last one |3 - 3.78|.
    assert calibration_error(confidence, correct) == pytest.approx((0.05 + 0.78) / 5)


def tiny_lab(family="deltanet"):
    plan = plan_of("symbols", family, small=True)
    return Lab(family, plan, make_task("symbols", Path(), small=True))


def test_sampled_recall_is_the_probability_of_whole_values():
    lab = tiny_lab()
    params = jax.jit(lab.model.init)(jax.random.key(0))
    figures, rows = lab.measure(params), lab.task.documents(8, 3, held_out=True)
    hidden = lab.model.forward(params, rows.tokens)[0]
    log_probs = np.asarray(jax.nn.log_softmax(hidden @ lab.model.head(params).T))
    chances = [
        np.exp(sum(log_probs[row, end - 3 + i, rows.tokens[row, end - 2 + i]] for i in range(3)))
        for row, end in zip(*np.nonzero(rows.recall), strict=True)
        if (end + 1) % 4 == 0
    ]
    assert figures["sampled_1"] == pytest.approx(np.mean(chances), rel=1e-4)
    assert set(figures) == {
        f"{name}_{scale}"
        for name in ("loss", "recall", "sampled", "calibration")
        for scale in (1, 2)
    }


def test_a_cooled_model_has_its_logits_divided():
    lab = tiny_lab()
    params = jax.jit(lab.model.init)(jax.random.key(0))
    hidden = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    plain, cooled = (
        hidden @ np.asarray(lab.model.head(each)).T for each in (params, lab.cooled(params, 0.5))
    )
    np.testing.assert_allclose(cooled, 2 * plain, rtol=1e-6)


# Arms


@pytest.mark.parametrize("name", ARMS)
def test_arms_are_configurations_of_a_run(name):
    for task in command.TASKS:
        plan = plan_of(task, "deltanet", small=False)
        refine = {**plan.sizes, **ARMS[name].fields}
        fields = {**plan.fields, "vocab_size": 64}
        data = {"sequence_length": 64, "min_tokens": 64}
        config = Config.from_dict({"model": {"fresh": fields}, "refine": refine, "data": data})
        assert config.refine == ARMS[name].config(plan.sizes)


def test_arms_are_known_by_name():
    assert {arm.rule for arm in ARMS.values()} == {None, *RULES}
    assert {arm.rate_of for arm in ARMS.values()} <= {None, *ARMS}
    assert set(BEST) | set(CORE) <= set(ARMS)
    assert not set(FINAL.final) & set(FINAL.tuning)


def test_rules_are_what_they_say():
    """p is the exact objective for k = 1; an oracle of all tokens scales; smoothing is uniform.

    By gradients with respect to the vocabulary head, to which every rule comes down.
    """
    lab = tiny_lab()
    params = jax.tree.map(lambda x: 1.5 * x, jax.jit(lab.model.init)(jax.random.key(0)))
    rows, ntp = lab.task.documents(4, 1), RefineConfig(objective="ntp")
    batch = {"tokens": rows.tokens, "recall": np.ones_like(rows.recall)}

    def of(rule, weight, config=ntp, recall=batch["recall"]):
        objective = lab.objective(config, rule, weight)
        marked = batch | {"recall": recall}
        whole = objective.mini_batch(marked)

        def loss(head):
            # The library's own objective reads the head's parameters through `head_params`.
            return objective._loss(params | {"lm_head": head}, marked, whole, None)[0]

        return jax.jit(jax.grad(loss))(params["lm_head"])["weight"]

    exact = RefineConfig(estimator="exact", selection="all", reward="whole", rollout_length=1)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
    p, plain = of("p", 3.0), of("oracle", 0.0)
    close(p, of(None, 3.0, exact))
    close(of("oracle", 0.5), 1.5 * plain)
    close(3 * of("1-p", 1.0) + p, 7 * plain)  # plain + 3 (1 - p) and plain + 3 p
    both = [of("oracle", 2.0, recall=recall) for recall in (rows.recall, ~rows.recall)]
    close(sum(both), 4 * plain)
    assert np.abs(both[0] - both[1]).max() > 0.01 * np.abs(plain).max()

    hidden = lab.model.forward(params, rows.tokens)[0][:, :-1]

    def by_hand(head):
        log_probs = jax.nn.log_softmax(hidden @ head.T)
        true = jnp.take_along_axis(log_probs, rows.tokens[:, 1:, None], axis=-1)
        # The gradient of p^3 / 3 weighs that of log p by p^3.
        return jnp.mean(true), jnp.mean(log_probs), jnp.mean(jnp.exp(3 * true)) / 3

    truth, uniform, cubed = jax.jit(jax.jacrev(by_hand))(params["lm_head"]["weight"])
    close(plain, -truth)
    close(of("smoothing", 0.4), -truth - 0.4 * uniform)
    close(of("p^3", 0.4), -truth - 0.4 * cubed)


def test_arms_read_the_same_rows():
    """With weight 0 every arm is next-token training, and one without steps changes nothing."""
    lab = tiny_lab()
    params = jax.jit(lab.model.init)(jax.random.key(0))
    names = ("ntp", "exact whole", "published")
    weightless = {
        name: dataclasses.replace(ARMS[name], fields=ARMS[name].fields | {"lambda_rl": 0.0})
        for name in names
    }
    trained = {name: lab.continue_by(params, arm, 1e-3, 0) for name, arm in weightless.items()}
    for name in names[1:]:
        for one, two in zip(*map(jax.tree.leaves, (trained["ntp"], trained[name])), strict=True):
            np.testing.assert_allclose(one, two, atol=2e-5)
    moved = lab.fingerprint(trained["ntp"])
    assert moved != lab.fingerprint(params)
    assert moved == lab.fingerprint(lab.continue_by(params, ARMS["ntp"], 1e-3, 0))
    assert moved != lab.fingerprint(lab.continue_by(params, ARMS["ntp"], 1e-3, 1))


# Bookkeeping


def test_a_finished_run_is_never_repeated(tmp_path):
    path, calls = tmp_path / "results.jsonl", []

    def run():
        calls.append(1)
        return {"measured": {"loss": 1 / 3}, "recall": 0.5}

    what = {"kind": "final", "arm": "ntp", "rate": 1e-3, "seed": 0}
    line = ResultStore(path).get(what, run)
    assert line["measured"] == {"loss": 0.333333}
    assert ResultStore(path).get(what, run) == line
    assert len(calls) == 1
    ResultStore(path).get(what | {"rate": 2e-3}, run)
    assert len(calls) == 2
    assert len(path.read_text().splitlines()) == 2


class CountingLab:
    """Stands for a Lab; rates of 1e-3 are the best everywhere."""

    family = "lact"
    plan = plan_of("symbols", "lact", small=True)

    def __init__(self):
        self.calls, self.model = [], self

    def abstract_params(self):
        return {"w": np.zeros(1)}

    def pretrain(self, seed):
        self.calls.append(("pretrain", seed))
        return {"w": np.full(1, float(seed))}

    def fingerprint(self, params):
        return f"{params['w'][0]:g}"

    def measure(self, params, stream=None):
        return {"recall_1": -abs(float(params["w"][0]) - 1e-3)}

    def continue_by(self, params, arm, rate, seed):
        self.calls.append((arm, rate, seed))
        return {"w": np.full(1, rate)}

    def step_seconds(self, params, arms, rounds):
        return {name: 1.0 + len(name) / 10 for name in arms}

    def posttrain(self, params, arm, rate, seed):
        self.calls.append((arm, rate, seed))
        return {"w": np.full(1, rate)}

    def answer(self, params, *, stream):
        return {"recall": self.measure(params)["recall_1"]}

    def adapt_and_answer(self, params, arm, rate, seed, *, stream):
        assert params["w"][0] == 1e-3
        return {"recall": -abs(rate - 1e-3), "recall_before": 0.0}


def counting_study(folder):
    seeds = dataclasses.replace(SMALL, rates=(3e-4, 1e-3))
    return Study(CountingLab(), "text", ResultStore(folder / "results.jsonl"), folder, seeds)


def test_a_study_chooses_rates_then_runs_all_seeds_once(tmp_path):
    study = counting_study(tmp_path)
    study.saturation()
    study.compare(("ntp", "exact whole", "exact whole, k=2"))
    study.answers()
    calls = [call for call in study.lab.calls if call[0] != "pretrain"]
    assert study.lab.calls.count(("pretrain", 1000)) == 1
    assert len(study.lab.calls) - len(calls) == 3
    tuned = [call for call in calls if call[2] == 1000]
    # Two arms with rates of their own, then post-training: answers alone, next tokens, the best.
    assert len(tuned) == 2 * 2 + (2 + len(BEST)) * 2 + (1 + len(BEST)) * 2
    for name in ("exact whole", "exact whole, k=2"):
        runs = study.store.find(kind="final", arm=name)
        assert [run["seed"] for run in runs] == [0, 1]
        assert {run["rate"] for run in runs} == {1e-3}
    saturation = study.store.find(kind="saturation")
    assert {(run["rate"], run["seed"]) for run in saturation} == {
        (rate, seed) for rate in (3e-4, 1e-3) for seed in (0, 1)
    }
    again = counting_study(tmp_path)
    again.saturation()
    again.compare(("ntp", "exact whole", "exact whole, k=2"))
    again.answers()
    assert again.lab.calls == []


def test_seeds_may_share_base_models(tmp_path):
    study = counting_study(tmp_path)
    study.lab.plan = dataclasses.replace(study.lab.plan, bases=(7,))
    study.compare(("ntp",))
    assert [call for call in study.lab.calls if call[0] == "pretrain"] == [("pretrain", 7)]
    runs = study.store.find(kind="final", arm="ntp")
    assert [(run["seed"], run["base"]) for run in runs] == [(0, "7"), (1, "7")]


# Signals


@pytest.mark.usefixtures("programs_kept_elsewhere")
def test_signals_alone_need_no_more_than_the_base(tmp_path):
    lab = tiny_lab()
    lab.step_seconds = lambda params, arms, rounds: dict.fromkeys(arms, 1.0)
    names = ("exact whole", "exact whole, entropy")
    found = Study(lab, "symbols", ResultStore(tmp_path / "results.jsonl"), tmp_path, SMALL)
    found.signals(names)
    kinds = [line["kind"] for line in found.store.lines]
    assert kinds == ["base", "signal", "cost", "signal", "cost"]
    exact, chosen = found.store.find(kind="signal")
    # An objective that draws nothing has no noise but of the rows.
    assert exact["same_rows"] == pytest.approx(1.0)
    assert exact["signal"] < 0.99
    assert chosen["same_rows"] < 0.99
    table = report.report(found.store.lines)
    assert "| exact whole, entropy |" in table


def test_signal_against_itself():
    lab = tiny_lab()
    params = jax.jit(lab.model.init)(jax.random.key(0))
    of_ntp = gradients(lab, params, ARMS["ntp"], batches=3)
    found = signal(of_ntp, of_ntp)
    for name in ("norm_ratio", "cosine", "same_rows"):
        assert found[name] == pytest.approx(1.0)


def test_a_dearer_step_has_fewer_rows():
    """A gradient of unit signal and unit noise, with a fifth of the rows: noise is 5."""
    assert at_equal_cost(0.5, 5.0) == pytest.approx(1 / 6)
    assert at_equal_cost(0.3, 1.0) == pytest.approx(0.3)


def test_signal_is_what_independent_gradients_have_in_common():
    """By the law of total variance: a share for the mean, one for documents, one for sampling."""
    random = np.random.default_rng(0)
    batches, draws, size = 400, 3, 200
    mean = np.full(size, 0.5)
    documents = random.normal(size=(batches, 1, size))
    sampling = 2 * random.normal(size=(batches, draws, size))
    gradients = (mean + documents + sampling).reshape(-1, size)
    products = (gradients @ gradients.T).reshape(batches, draws, batches, draws)
    shares, errors = jackknife(products)
    true = np.array([0.25, 1.25]) / 5.25
    assert np.all(errors < 0.01)
    assert np.all(np.abs(shares - true) < 4 * errors)
    # Without noise all is signal, without gradients nothing is.
    for products, share in ((np.ones((4, 2, 4, 2)), 1.0), (np.zeros((4, 2, 4, 2)), 0.0)):
        shares, errors = jackknife(products)
        np.testing.assert_allclose(shares, share)
        np.testing.assert_allclose(errors, 0.0)


# Tables


def line(kind, arm, seed, recall, **more):
    measured = {"recall_1": recall, "loss_1": 2 - recall, "sampled_1": recall / 2}
    common = {"task": "symbols", "family": "deltanet", "kind": kind, "base": f"b{seed}"}
    return common | {"arm": arm, "seed": seed, "rate": 1e-3, "measured": measured} | more


def test_the_report_compares_seed_by_seed():
    """Exact runs recall 10, 11, 12 points more than next-token runs, at 1.9 times the cost."""
    lines = [line("base", None, seed, 0.2) for seed in range(3)]
    lines += [line("saturation", "ntp", seed, 0.2 + seed / 1000) for seed in range(3)]
    for seed in range(3):
        ntp = 0.2 + seed / 10
        lines.append(line("final", "ntp", seed, ntp))
        lines.append(line("final", "exact whole", seed, ntp + 0.1 + seed / 100))
        lines.append(line("final", "ntp, 2 x steps", seed, ntp + 0.04))
    lines.append(line("final", "exact whole", 3, 0.9, base="another"))  # has no pair
    lines.append(line("cost", "exact whole", 0, 0.0, ratio=1.9))
    lines += [line("cooled", None, seed, 0.22, temperature=0.5) for seed in range(3)]
    table = report.report(lines)
    # Differences 10, 11, 12: 11 -+ 4.303 / sqrt(3).
    assert "| +11.00 +- 2.48 |" in table
    assert "| -0.1100 +- 0.0248 |" in table
    assert "| +5.50 +- 1.24 |" in table
    assert "| 0.5 | 3 | +1.00 +- 0.00 | -0.0200 +- 0.0000 |" in table
    assert "| 1.90 x | +7.00 +- 2.48 |" in table
    assert "| exact whole | 4 |" in table
    (row,) = [row for row in table.splitlines() if row.startswith("| rate 0.001")]
    assert "| +0.10 +- 0.25 |" in row


def test_the_trade_is_a_curve_over_the_weight(tmp_path):
    lines = [line("final", "ntp", seed, 0.2 + seed / 10) for seed in range(2)]
    for name, gain in (("exact whole", 0.05), ("exact whole, lambda_rl=1", 0.03)):
        lines += [line("final", name, seed, 0.2 + seed / 10 + gain) for seed in range(2)]
    lines.append(line("final", "exact whole, k=2", 0, 0.9))  # differs in k
    np.testing.assert_allclose(
        report.trade(lines, "exact whole", "recall_1"), [(1, -0.03, 3), (10, -0.05, 5)]
    )
    report.plot_trade(lines, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_equal_time_gives_next_tokens_at_least_the_time():
    runs = {name: [1] for name in ("ntp", "ntp, 2 x steps", "ntp, 4 x steps", "exact whole")}
    names = [report.equal_time(cost, runs) for cost in (0.9, 1.04, 1.2, 2.5, 9.0)]
    assert names == ["ntp", "ntp", "ntp, 2 x steps", "ntp, 4 x steps", None]


def test_differences_of_answers():
    lines = []
    for seed in (0, 1):
        common = {"task": "symbols", "family": "lact", "seed": seed, "base": "b", "rate": 1e-3}
        for name, recall in (("answers only", 0.5), ("ntp", 0.52 + seed / 50)):
            lines.append(common | {"kind": "posttrain", "arm": name, "recall": recall})
        figures = {"recall": 0.6 + seed / 50, "recall_before": 0.6}
        lines.append(common | {"kind": "testtime", "arm": "ntp"} | figures)
    lines.append(lines[0] | {"seed": 1000, "recall": 0.0})  # a tuning run
    table = report.report(lines)
    # Differences 2 and 4: 3 -+ 12.706; and 0 and 2: 1 -+ 12.706.
    assert "| post-training: ntp | 53.0 | 2 | +3.00 +- 12.71 |" in table
    assert "| test time, after answers only: ntp | 61.0 | 2 | +1.00 +- 12.71 |" in table


def test_the_report_of_nothing_says_so():
    with pytest.raises(FileNotFoundError, match="run the study first"):
        report.report([])


def test_the_results_are_of_declared_arms():
    """The lines that are kept beside the study are of arms that it still declares."""
    lines = ResultStore(command.RESULTS).lines
    assert {one["arm"] for one in lines if "arm" in one} <= {*ARMS, "answers only"}


@pytest.mark.slow
@pytest.mark.usefixtures("programs_kept_elsewhere")
@pytest.mark.parametrize(("family", "task"), [("deltanet", "text"), ("lact", "crowded")])
def test_the_study_in_small(tmp_path, family, task, vocabulary):
    """An arm of each kind, and answers."""
    (tmp_path / "vocabulary.model").write_bytes(vocabulary.read_bytes())
    lab = Lab(family, plan_of(task, family, small=True), make_task(task, tmp_path, small=True))
    study = Study(lab, task, ResultStore(tmp_path / "results.jsonl"), tmp_path, SMALL)
    arms = ("ntp", "exact whole", "published, adaptive k", "oracle")
    study.saturation()
    study.compare(arms)
    study.answers()
    text = report.report(ResultStore(tmp_path / "results.jsonl").lines)
    for name in (*arms, *(f"post-training: {name}" for name in ("answers only", *BEST))):
        assert f"| {name} |" in text
