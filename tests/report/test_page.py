"""The page report.html: what it says, that it is one file, and that text of others stays text."""

import base64
import hashlib
import html.parser
import json
import math
import re
import unicodedata

import made_up_runs
import numpy as np
import pytest
from made_up_runs import HOSTILE, WORDS, evaluation, training
from scipy import stats

from refine_jax import report
from refine_jax.evaluation.intervals import compare
from refine_jax.report import answers, charts, page
from refine_jax.report.held_out import differences, read_held_out, thinned
from refine_jax.report.markup import visible
from refine_jax.report.runs import changed_settings, read_run


class Parsed(html.parser.HTMLParser):
    """Elements of a page with their attributes, texts of scripts by id, and the text outside."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.text, self._script = [], [], [], None
        self.feed(source)
        self.close()
        self.shown = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._script = [dict(attributes), ""]

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.scripts.append(self._script)
            self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.text.append(data)
        else:
            self._script[1] += data

    def data(self, name):
        (found,) = [text for attributes, text in self.scripts if attributes.get("id") == name]
        return json.loads(found)


def page_of(*folders):
    source = page.page([read_run(folder) for folder in folders])
    return Parsed(source), source


def rows_of(source: str, caption: str) -> list[list[str]]:
    """The cells of the body of a table, as text."""
    (body,) = re.findall(rf"<caption>{caption}</caption>.*?<tbody>(.*?)</tbody>", source, re.S)
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.S)
    return [
        [
            html.unescape(re.sub(r"<[^>]*>", "", cell)).strip()
            for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.S)
        ]
        for row in rows
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(folder, page) of a run of 1000 steps."""
    folder = training(tmp_path_factory.mktemp("runs") / "plain", 1000)
    return folder, *page_of(folder)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(folder, page) of an evaluation with 500 answers, each also answered before."""
    folder = evaluation(tmp_path_factory.mktemp("runs") / "evaluated", 500, before=True)
    return folder, *page_of(folder)


# Text of others


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain <text> & more\n\ttab", "plain <text> & more\n\ttab"),
        ("café 日本 नमस्ते عربي 🙂", "café 日本 नमस्ते عربي 🙂"),
        ("\u202eabc\u202c", "‹U+202E›abc‹U+202C›"),
        ("a\x00b\x1bc\x7f\x85\r", "a‹U+0000›b‹U+001B›c‹U+007F›‹U+0085›‹U+000D›"),
        ("\ud800x\udfff", "\ufffdx\ufffd"),
        ("\u200b\ufeff\u2028", "‹U+200B›‹U+FEFF›‹U+2028›"),
        ("\u0915\u094d\u200d\u0937", "\u0915\u094d\u200d\u0937"),
    ],
)
def test_what_cannot_be_seen_gets_a_sign(given, shown):
    assert visible(given) == shown


@pytest.mark.parametrize("kind", ["training", "evaluation", "several"])
def test_hostile_text_stays_text(kind, tmp_path):
    name = "<b>run&amp;'\""
    if kind == "evaluation":
        folders = [evaluation(tmp_path / name, 20, texts=HOSTILE, before=True)]
    else:
        folders = [training(tmp_path / name, 6, texts=HOSTILE)]
        if kind == "several":
            folders.append(training(tmp_path / "other@{x}$y", 6, texts=HOSTILE))
    parsed, source = page_of(*folders)
    allowed = {"html", "head", "meta", "title", "style", "body", "header", "div", "p", "h1", "h2"}
    allowed |= {"h3", "bdi", "label", "select", "option", "nav", "a", "main", "section", "table"}
    allowed |= {"caption", "thead", "tbody", "tr", "th", "td", "small", "span", "i", "code", "ul"}
    allowed |= {"li", "figure", "figcaption", "button", "fieldset", "legend", "input", "output"}
    allowed |= {"sub", "dl", "dt", "dd", "article", "mark", "form", "footer", "script", "strong"}
    allowed |= {"em"}
    assert {tag for tag, _ in parsed.elements} <= allowed
    for _, attributes in parsed.elements:
        assert not [each for each in attributes if each.startswith("on") or each == "src"]
        assert attributes.get("href", "#").startswith("#")
    kinds = [attributes.get("id", "own") for attributes, _ in parsed.scripts]
    trains = ["charts-data", "method-data", "library"] if kind != "evaluation" else []
    assert kinds == ["own", *trains, "own"]  # the style, data, and the page's own script
    # Nothing invisible is in the file, and every text is on the page as it was given.
    hidden = {c for c in source if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert hidden <= {"\n"}
    if kind == "evaluation":
        for text in HOSTILE:
            assert " ".join(f"{visible(text)} ".split()) in parsed.shown
    else:
        data = parsed.data("method-data")
        assert {visible(f" {text}") for text in HOSTILE} == set(data["texts"][0])
        assert data["runs"][0]["name"] == name


def test_only_scripts_that_the_policy_knows_would_run(plain):
    _, parsed, source = plain
    (policy,) = [
        attributes["content"]
        for tag, attributes in parsed.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    own = parsed.scripts[-1][1]
    wanted = [
        "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for text in (own, charts.library())
    ]
    assert rules["script-src"].split() == wanted
    assert "</script" not in charts.library().lower() and source.count("<script") == 4


# What it says of a training run


def test_pages_are_small(plain, evaluated):
    assert len(plain[2].encode()) < 1_200_000  # of 1000 steps; the library is 470,000 of it
    assert len(evaluated[2].encode()) < 500_000  # of 500 answers


def test_before_and_after_are_those_of_the_records(plain):
    folder, _, source = plain
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    held = [json.loads(line) for line in (folder / "held_out.jsonl").open()]
    loss, accuracy, reward, entropy = rows_of(source, "Before and after")
    for row, name, scale in (
        (loss, "loss", 1),
        (accuracy, "accuracy", 100),
        (reward, "reward", 1),
        (entropy, "entropy", 1),
    ):
        before, after = (records[i][f"eval/{name}"] * scale for i in (0, -1))
        numbers = [float(cell.replace("−", "-").split()[0]) for cell in row[1:4]]
        assert numbers == pytest.approx([before, after, after - before], abs=1e-4)
    # All rows have 512 tokens, so the interval is Student's of the differences of their means.
    first, last = (np.array(held[i]["rows"]["nll"]) / 512 for i in (0, -1))
    low, high = stats.ttest_rel(last, first).confidence_interval(0.95)
    assert loss[4] == f"± {(high - low) / 2:.4f} over 12 rows" and "better" in loss[3]


def test_differences_weigh_rows_by_their_tokens():
    """The ratio estimator's interval, written out by its definition."""
    random = np.random.default_rng(0)
    tokens = random.integers(5, 50, 9).astype(float)
    nll = random.gamma(2, tokens, (2, 9))
    one, two = (
        {"data": "x", "rows": {"tokens": tokens.tolist(), "nll": each.tolist()}} for each in nll
    )
    mean, half, rows = differences(one, two, "nll", "tokens")
    ratio = (nll[1] - nll[0]).sum() / tokens.sum()
    residuals = nll[1] - nll[0] - ratio * tokens
    error = math.sqrt(9 * (residuals**2).sum() / 8) / tokens.sum()
    assert (mean, rows) == (pytest.approx(ratio), 9)
    assert half == pytest.approx(stats.t.ppf(0.975, 8) * error)
    assert differences(one, two | {"data": "other rows"}, "nll", "tokens") is None
    fewer = {"data": "x", "rows": {"tokens": tokens[:8].tolist(), "nll": nll[1, :8].tolist()}}
    assert differences(one, fewer, "nll", "tokens") is None


def test_the_method_shows_what_evaluations_kept(plain):
    folder, parsed, _ = plain
    records = read_held_out(folder / "held_out.jsonl")
    data = parsed.data("method-data")
    (run,) = data["runs"]
    assert [each["step"] for each in run["evaluations"]] == [record["step"] for record in records]
    for shown, record in zip(run["evaluations"], records, strict=True):
        for row, kept in zip(shown["rows"], record["shown"], strict=True):
            (segment,), (of,) = row["segments"], kept["segments"]
            assert data["texts"][segment["texts"]] == of["texts"]
            assert (segment["entropy"], segment["match"]) == (of["entropy"], of["match"])
            assert row["positions"] == kept["positions"]


def test_thinned_keeps_both_ends():
    assert thinned(range(5), 8) == [0, 1, 2, 3, 4]
    assert thinned(range(100), 5) == [0, 25, 50, 74, 99]


def test_long_runs_are_drawn_by_means():
    records = [{"step": step, "loss/ntp": float(step % 2)} for step in range(1, 4001)]
    steps, values = charts._values(records, charts.CHARTS[0].series[0])
    assert len(steps) == 1334 and steps[0] == 2 and steps[-1] == 4000
    assert values[0] == pytest.approx(2 / 3) and values[1] == pytest.approx(1 / 3)


def test_settings_that_differ_are_named():
    config = {
        "phase": "midtrain",
        "refine": {"rollout_length": 3, "num_positions": 8, "unknown": 1},
        "train": {"steps": 7},
    }
    changed = changed_settings(config)
    assert {name: values[:2] for name, values in changed.items()} == {
        "refine.rollout_length": (3, 5),
        "train.steps": (7, 100),
    }


def test_what_the_device_held_is_drawn_where_it_says_so(plain, tmp_path):
    assert "Memory of the device" not in plain[2] and "reported no memory" in plain[2]
    folder = training(tmp_path / "run", 9)
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.open()]
    path.write_text("".join(json.dumps(r | {"memory/peak": 3 << 30}) + "\n" for r in records))
    _, source = page_of(folder)
    assert "peak so far: 3.0000 → 3.0000" in source and "reported no memory" not in source


# What it says of evaluations


def test_scores_and_what_training_gained_are_those_of_the_answers(evaluated):
    folder, parsed, source = evaluated
    records = [json.loads(line) for line in (folder / "predictions.jsonl").open()]
    for row in rows_of(source, "Scores")[:-1]:
        scores = [record["score"] for record in records if record["set"] == row[0]]
        test = stats.binomtest(int(sum(scores)), len(scores))
        low, high = test.proportion_ci(0.95, method="wilson")
        assert row[1] == f"{100 * np.mean(scores):.1f}"
        assert row[2] == f"{100 * low:.1f} – {100 * high:.1f}"
    for row in rows_of(source, "Scores after minus before, in points"):
        scores = [record["score"] for record in records if record["set"] == row[0]]
        assert row[1] == f"+{100 * np.mean(scores):.1f}"
        assert row[4] == f"{int(sum(scores))} / 0"
    assert [tag for tag, _ in parsed.elements].count("article") == 500
    kinds = [a["data-kind"] for tag, a in parsed.elements if tag == "article"]
    assert kinds == ["right" if record["score"] == 1 else "wrong" for record in records]


def test_references_in_answers_stand_out(tmp_path):
    folder = evaluation(tmp_path / "run", 3)
    path = folder / "predictions.jsonl"
    records = [json.loads(line) for line in path.open()]
    records[0] |= {"response": "It is THE 0 & <b>", "answers": ["the 0", "& <b>"]}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    _, source = page_of(folder)
    assert "It is <mark>THE 0</mark> <mark>&amp; &lt;b&gt;</mark>" in source


def test_needles_are_legible_on_every_colour():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    for share in range(101):
        cell = answers._cell(share / 100, 3)
        colour, ink = re.search(r"--b:(#\w{6});--t:#(\w)", cell).groups()
        light, dark = sorted((luminance(colour), float(ink == "f")), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, share


# Several runs


def test_several_runs_are_compared_row_by_row(tmp_path):
    folders = [training(tmp_path / name, 50, seed=seed) for seed, name in enumerate("ab")]
    _, source = page_of(*folders)
    one, two = (read_held_out(folder / "held_out.jsonl")[-1]["rows"] for folder in folders)
    loss = rows_of(source, "Differences from a")[0]
    test = stats.ttest_rel(np.array(two["nll"]) / 512, np.array(one["nll"]) / 512)
    low, high = test.confidence_interval(0.95)
    mean = np.mean(np.subtract(two["nll"], one["nll"])) / 512
    assert loss[:3] == ["b", "Loss nats a token", "50"]
    assert loss[3].startswith(f"{mean:+.4f}".replace("-", "−"))
    assert loss[4] == f"{low:+.4f} – {high:+.4f}".replace("-", "−")


def test_several_evaluations_are_compared_prompt_by_prompt(tmp_path):
    folders = [evaluation(tmp_path / name, 60, seed=seed) for seed, name in enumerate("ab")]
    parsed, source = page_of(*folders)
    scores = []
    for folder in folders:
        records = [json.loads(line) for line in (folder / "predictions.jsonl").open()]
        scores.append([r["score"] for r in records if r["set"] == "niah_single_1/1024"])
    found = compare(*scores)
    row = rows_of(source, "Scores minus those of a, in points")[0]
    assert row[:3] == [
        "b",
        "niah_single_1/1024",
        f"{100 * found.difference:+.1f}".replace("-", "−"),
    ]
    assert row[4] == f"{found.p_value:.3f}"
    changed = [a for tag, a in parsed.elements if "changed" in a.get("data-kind", "")]
    assert len(changed) >= sum(x != y for x, y in zip(*scores, strict=True)) > 0


def test_the_command_takes_one_run_or_several(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [training(tmp_path / name, 12, seed=seed) for seed, name in enumerate("ab")]
    assert report.main([str(folders[0])]) == 0
    written = {"report.html", "results.json", "training.png"}
    assert written <= {path.name for path in folders[0].iterdir()}
    assert report.main([*map(str, folders)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(figures) == ["a", "b"] and figures["b"]["steps"] == 12
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<option") > 3
    assert report.main([str(folders[0]), "--out=one.html"]) == 0
    assert (tmp_path / "one.html").exists()
    evaluation(tmp_path / "c", 3)
    # A comparison holds runs of both kinds, and its folder stands for them.
    assert report.main(["a", "c"]) == 0
    both = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert both.count('<section id="scores">') == both.count('<section id="curves">') == 1
    (tmp_path / "compared").mkdir()
    for name in "abc":
        (tmp_path / name).rename(tmp_path / "compared" / name)
    capsys.readouterr()
    assert report.main(["compared"]) == 0
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])) == ["a", "b", "c"]
    assert (tmp_path / "compared" / "report.html").exists()
    monkeypatch.chdir(tmp_path / "compared")
    assert report.main(["a", "./a"]) == 1
    assert "another folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main([])
    assert capsys.readouterr().err.startswith("error: RUN is needed: folder of a run")


def test_lines_that_are_no_records_are_left_out_of_the_page(tmp_path):
    folder = training(tmp_path / "run", 8)
    before = page.page([read_run(folder)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"eval/loss": "<b>low</b>"}\n{"step": 2, "eval/loss": 7}\n[1]\n{"step": 9, "e')
    after = page.page([read_run(folder)])
    rows = [rows_of(source, "Before and after") for source in (before, after)]
    assert rows[0] == rows[1] and "<b>low" not in after


def test_a_run_without_held_out_text_has_a_page(tmp_path):
    folder = training(tmp_path / "old", 5)
    (folder / "held_out.jsonl").unlink()
    parsed, source = page_of(folder)
    assert 'id="method"' not in source and 'id="curves"' in source
    assert parsed.data("method-data") == {"runs": [], "texts": []}
    assert WORDS[0] in page_of(training(tmp_path / "new", 5))[1]


def test_sizes_and_times_are_printed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["made_up_runs.py", "--steps=20", "--answers=4"])
    made_up_runs.main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(results) == {"training", "two trainings", "evaluation", "two evaluations"}
    assert all(each["bytes"] > 10_000 and each["seconds"] > 0 for each in results.values())
