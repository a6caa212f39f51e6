"""The study of `experiments/study`: its text, its bookkeeping and its statistics."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments" / "study"))

import corpus as text
import report
import sizes
from lab import TUNE, Lab, _jackknife, _recalls
from study import ABLATIONS, ESTIMATORS, ResultStore, begin, measure_signals, study

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


def test_recall_counts_values_that_are_predicted_whole():
    recall = np.zeros((2, 9), bool)
    recall[0, 2:5] = recall[0, 6:9] = recall[1, 1:4] = True
    correct = np.zeros((2, 9))
    correct[0, 1:4] = 1  # predicts tokens 2 to 4
    correct[0, 5:7] = 1  # two of the three tokens 6 to 8
    correct[1, 0:3] = 1
    assert _recalls(correct, text.RecallRows(np.zeros((2, 9), np.int32), recall)) == [0.5, 1.0]


def test_a_finished_run_is_repeated_only_with_other_settings(tmp_path):
    records, calls = ResultStore(tmp_path), []

    def run():
        calls.append(1)
        return {"w": np.arange(3.0)}, {"loss": len(calls)}

    assert records.get("a", {"rate": 1e-3, "marks": (1, 2)}, run) == {"loss": 1}
    assert ResultStore(tmp_path).get("a", {"rate": 1e-3, "marks": (1, 2)}, run) == {"loss": 1}
    np.testing.assert_array_equal(records.params("a", {"w": np.zeros(3)})["w"], np.arange(3.0))
    assert records.get("a", {"rate": 2e-3, "marks": (1, 2)}, run) == {"loss": 2}


def test_refine_without_policy_loss_is_next_token_training(corpus):
    """Both objectives see the same documents: with lambda_rl = 0 their models are the same."""
    plan = sizes.SIZES["small"].sizes
    lab = Lab("deltanet", dataclasses.replace(plan, measured=plan.measured[:1]), corpus)
    params = jax.jit(lab.model.init)(jax.random.key(0))
    trained, figures = {}, {}
    for name, config in {
        "ntp": RefineConfig(objective="ntp"),
        "refine": RefineConfig(lambda_rl=0.0),
    }.items():
        trained[name], run = lab.midtrain(params, config, 1e-3, 0, stream=TUNE)
        figures[name] = run["measured"]["3"]["loss_128"]
    assert figures["ntp"] == pytest.approx(figures["refine"], rel=1e-6)
    for one, two, before in zip(*map(jax.tree.leaves, (*trained.values(), params)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
        assert np.abs(one - before).max() > 1e-4


_FIGURES = ("signal", "same_documents", "norm_ratio", "cosine")
_FIGURES += ("signal_error", "same_documents_error")


class CountingLab:
    """Stands for a Lab; rates of 1e-3 are the best everywhere."""

    def __init__(self, name, plan, corpus):
        self.calls, self.model = [], self
        CountingLab.last = self

    def abstract_params(self):
        return {"w": np.zeros(1)}

    def _trained(self, name, rate, **figures):
        self.calls.append(name)
        return {"w": np.full(1, rate)}, figures

    def pretrain(self):
        return self._trained("pretrain", 0.0, curve=[{"tokens": 0}, {"tokens": 9, "loss": 3.5}])

    def measure(self, params):
        return {}

    def gradients(self, params, config):
        return self.calls.append("gradients")

    def signal(self, label, policy, next_token):
        return {name: len(label) / 100 for name in _FIGURES}

    def step_seconds(self, params, configs):
        return {"ntp": 1.0, "refine": 1.4}

    def midtrain(self, params, config, rate, seed, **options):
        loss = {str(3): {"loss_192": abs(rate - 1e-3)}}
        return self._trained(f"midtrain {config.objective} {rate:g} {seed}", rate, measured=loss)

    def answers(self, params):
        return {"recall": 0.0}

    def posttrain(self, params, variant, rate, seed, **options):
        return self._trained(f"{variant} {rate:g} {seed}", rate, recall=-abs(rate - 1e-3))

    def testtime(self, params, objective, rate, seed, **options):
        return self._trained(f"testtime {objective} {rate:g} {seed}", rate, recall=rate)[1]


@pytest.mark.usefixtures("programs_kept_elsewhere")
def test_a_study_chooses_rates_then_runs_all_seeds_once(tmp_path, monkeypatch):
    monkeypatch.setattr("lab.Lab", CountingLab)
    monkeypatch.setattr("corpus.FactCorpus", lambda vocabulary: None)
    (tmp_path / "vocabulary.model").touch()
    plan = dataclasses.replace(sizes.SIZES["small"], rates=(1e-4, 1e-3), answer_rates=(1e-3, 3e-3))
    study("lact", plan, tmp_path)
    calls = CountingLab.last.calls
    assert calls.count("gradients") == len(ESTIMATORS) + 1
    calls = [call for call in calls if call != "gradients"]
    study("lact", plan, tmp_path)
    assert CountingLab.last.calls == []
    assert len(set(calls)) == len(calls) - 1  # the one ablation has ReFINE's name, rate and seed
    tried = {call for call in calls if call.endswith(" 1000")}
    assert len(tried) == 2 * 2 + 3 * 2 + 2 * 2  # objectives, variants, objectives; two rates each
    seeds = [call.split() for call in calls if call not in tried and call != "pretrain"]
    assert {rate for *_, rate, _ in seeds} == {"0.001"}
    assert {seed for *_, seed in seeds} == {"0", "1"}
    chosen = json.loads((tmp_path / "lact" / "chosen.json").read_text())
    assert chosen["rates"]["nested_sft"] == chosen["rates"]["testtime-ntp"] == 1e-3


@pytest.mark.usefixtures("programs_kept_elsewhere")
def test_signals_alone_need_no_more_than_the_base(tmp_path, monkeypatch):
    monkeypatch.setattr("lab.Lab", CountingLab)
    monkeypatch.setattr("corpus.FactCorpus", lambda vocabulary: None)
    (tmp_path / "vocabulary.model").touch()
    plan = sizes.SIZES["small"]
    with pytest.raises(FileNotFoundError, match="run with --signals first"):
        report.report_signals(tmp_path, plan, ESTIMATORS)
    measure_signals(begin("lact", plan, tmp_path))
    assert CountingLab.last.calls == ["pretrain"] + ["gradients"] * (len(ESTIMATORS) + 1)
    measure_signals(begin("lact", plan, tmp_path))
    assert CountingLab.last.calls == []
    *table, empty, line = report.report_signals(tmp_path, plan, ESTIMATORS).splitlines()
    assert not empty
    assert len(table) == len(ESTIMATORS) + 2
    assert "| published | 9.0 (9.0) | 9.0 (9.0) | 0.09 | +0.090 |" in table
    figures = json.loads(line)
    assert list(figures) == ["lact"]
    assert figures["lact"]["base"] == {"tokens": 9, "loss": 3.5}
    assert figures["lact"]["signals"]["published"] == dict.fromkeys(_FIGURES, 0.09)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_are_configurations_of_a_run(name):
    fields = sizes.SIZES["full"].sizes.fields["deltanet"] | {"vocab_size": 64}
    config = Config.from_dict({"model": {"fresh": fields}, "refine": ESTIMATORS[name]})
    assert config.refine == RefineConfig(**ESTIMATORS[name])


def test_signal_is_what_independent_gradients_have_in_common():
    """By the law of total variance: a share for the mean, one for documents, one for sampling."""
    random = np.random.default_rng(0)
    batches, draws, size = 400, 3, 200
    mean = np.full(size, 0.5)
    documents = random.normal(size=(batches, 1, size))
    sampling = 2 * random.normal(size=(batches, draws, size))
    gradients = (mean + documents + sampling).reshape(-1, size)
    products = (gradients @ gradients.T).reshape(batches, draws, batches, draws)
    shares, errors = _jackknife(products)
    true = np.array([0.25, 1.25]) / 5.25
    assert np.all(errors < 0.01)
    assert np.all(np.abs(shares - true) < 4 * errors)
    # Without noise all is signal, without gradients nothing is.
    for products, share in ((np.ones((4, 2, 4, 2)), 1.0), (np.zeros((4, 2, 4, 2)), 0.0)):
        shares, errors = _jackknife(products)
        np.testing.assert_allclose(shares, share)
        np.testing.assert_allclose(errors, 0.0)


def test_exact_gradients_depend_on_the_documents_alone(corpus):
    lab = Lab("deltanet", sizes.SIZES["small"].sizes, corpus)
    params = jax.jit(lab.model.init)(jax.random.key(0))
    names = ("next-token", "exact, whole, all", "exact, whole, entropy")
    gradients = {
        name: lab.gradients(params, RefineConfig(**ESTIMATORS[name]), batches=3) for name in names
    }
    found = {
        name: lab.signal(name, gradient, gradients["next-token"])
        for name, gradient in gradients.items()
    }
    for name in names[:2]:
        assert found[name]["same_documents"] == pytest.approx(1.0)
        assert found[name]["signal"] < 0.99
    assert found["exact, whole, entropy"]["same_documents"] < 0.99
    assert found["next-token"]["norm_ratio"] == found["next-token"]["cosine"] == pytest.approx(1.0)


_ANSWERS = {"none": 0.3, "sft": 0.4, "nested_sft": 0.5, "nested_refine": 0.6}


@pytest.fixture
def finished(tmp_path):
    """A study of one model whose ReFINE runs recall 10, 11, 12 points more than their NTP runs."""
    plan = sizes.SIZES["small"]
    plan = dataclasses.replace(plan, seeds=3, ablation_seeds=2)
    folder = tmp_path / "deltanet"
    folder.mkdir()

    def write(name, results):
        record = {"settings": {}, "results": results}
        (folder / f"{name}.json").write_text(json.dumps(record))

    def figures(recall):
        lengths = {f"recall_{length}": recall for length in (128, 192)}
        lengths |= {f"recalls_{length}": [recall] * 8 for length in (128, 192)}
        return lengths | {"loss_128": 2.0, "loss_192": 2.0 - recall, "reward": recall / 2}

    def curve(recall):
        return [{"step": step, "loss": 2.0, "recall": recall * step / 3} for step in (2, 3)]

    write("base", {"curve": [{"tokens": 0, "loss": 3.0, "recall": 0.0}]})
    write("before", figures(0.1))
    for objective, loss in (("ntp", 2.5), ("refine", 2.6)):
        tuned = {"loss_192": loss, "recall_192": 0.25}
        write(f"tune-{objective}-0.001", {"measured": {"3": tuned}})
    for seed in range(3):
        ntp, refine = 0.2 + seed / 10, 0.3 + seed / 10 + seed / 100
        runs = {"rewards": [0.5, 0.6, 0.7]}
        after = {"3": figures(ntp), "4": figures(ntp + 0.05)}
        write(f"mid-ntp-{seed}", runs | {"curve": curve(ntp), "measured": after})
        after = {"3": figures(refine)}
        write(f"mid-refine-{seed}", runs | {"curve": curve(refine), "measured": after})
        if seed < 2:
            write(f"ablation-k=1-{seed}", runs | {"curve": [], "measured": after})
        for name, recall in _ANSWERS.items():
            answers = {"recall": recall, "recalls": [recall] * 8}
            write(f"post-{name}-{seed}", answers)
        for name in ("ntp", "refine"):
            answers = {"recall": 0.7 + seed / 100, "recalls": [0.7] * 8}
            # NTP's time is not known at all, ReFINE's of two seeds.
            answers["seconds"] = None if name == "ntp" or seed == 0 else seed / 2
            write(f"testtime-{name}-{seed}", answers)
    chosen = {"rates": {"ntp": 1e-3, "refine": 3e-4}, "step_seconds": {"ntp": 1.0, "refine": 1.3}}
    chosen |= {"steps": 3, "equal_compute_steps": 4}
    (folder / "chosen.json").write_text(json.dumps(chosen))
    return tmp_path, plan


def test_the_report_compares_seed_by_seed(finished):
    workdir, plan = finished
    written = report.report(workdir, plan, ABLATIONS, ESTIMATORS)
    content = json.loads((workdir / "study.json").read_text())["deltanet"]
    assert (workdir / "study.md").read_text() == written
    assert (workdir / "study.png").stat().st_size > 10_000
    tests = {row["ReFINE - NTP"]: row for row in content["tests"]}
    equal_steps = tests["equal steps: recall 192, %"]
    assert equal_steps["difference"] == "+11"
    # Differences 10, 11, 12: standard error 1 / sqrt(3), t = 19.05 of 2 degrees of freedom.
    assert equal_steps["p, by seed"] == "0.003"
    assert equal_steps["95 % interval"] == "+8.52 to +13.5"  # 11 -+ 4.303 / sqrt(3)
    # Eight documents, all better: the sign-flip test's smallest p is 2 / 2**8.
    assert equal_steps["p, by document"] == "0.008"
    assert tests["equal time: recall 192, %"]["difference"] == "+6"
    (tuned,) = content["learning rates"]
    assert tuned["one seed, other documents"] == "rate 0.001"
    assert (tuned["NTP: loss 192, nats"], tuned["ReFINE: recall 192, %"]) == ("2.500", "25.0")
    rows = {row["mid-training"]: row for row in content["mid-training"]}
    assert rows["ReFINE, 3 steps"]["recall 192, %"] == "41.0 (11.0)"
    assert rows["NTP, 4 steps (equal time)"]["recall 192, %"] == "35.0 (10.0)"
    questions = {row["answers right, %"]: row for row in content["questions"]}
    assert questions["no post-training"]["mean (deviation)"] == "30.0 (0.0)"
    times = [name.split(", ")[2] for name in questions if "test-time" in name]
    assert times == ["-", "0.75 s a prompt"]
    assert [row["2 seeds"] for row in content["ablations"]][-1] == "k=1"


def test_the_report_of_nothing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the study first"):
        report.report(tmp_path, sizes.SIZES["small"], ABLATIONS, ESTIMATORS)
