"""experiments/colab_demo.ipynb runs from its first cell to its last, in small; and its helpers."""

import html
import json
import re
import sys
import time
import types
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from refine_jax.convert import to_hf
from refine_jax.data.recall import RecallDocuments
from refine_jax.data.tokenizer import load_tokenizer
from refine_jax.notebook import entropy_html, live_curves
from refine_jax.report.metrics import read_metrics
from refine_jax.small import folder

NOTEBOOK = Path(__file__).parents[2] / "experiments" / "colab_demo.ipynb"
STEPS = 2
SMALL = {
    "DOCUMENTS": 24,
    "LENGTH": 96,
    "BATCH": 1,
    "STEPS": STEPS,
    "LENGTHS": "128",
    "SAMPLES": 4,
    "WORKDIR": "demo",
    "HUB": "hf://org/small",
}
# What the test looks at, gathered by a cell at the end.
FACTS = """
import json
facts = {
    "rollouts": rollouts,
    "figures": figures,
    "starts": seen["starts"].tolist(),
    "entropy": seen["entropy"].tolist(),
    "greedy": [answer.tokens for answer in greedy],
    "recall": {name: results["mean_by_task"] for name, results in recall.items()},
    "vocab_size": model.config.vocab_size,
}
Path("facts.json").write_text(json.dumps(facts))
"""


def load():
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook, folder, parameters, last=""):
    """Run a notebook with other parameters in `folder`, and one more cell at its end."""
    place = next(i for i, cell in enumerate(notebook.cells) if cell.id == "parameters")
    values = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(values))
    notebook.cells.append(nbformat.v4.new_code_cell(last))
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


def cell_of(notebook, name):
    return next(cell for cell in notebook.cells if cell.id == name)


def printed_by(cell):
    """Lines that a cell prints."""
    said = [output["text"] for output in cell.outputs if output.get("name") == "stdout"]
    return "".join(said).splitlines()


def kinds(cell):
    """MIME types of what a cell shows."""
    return {kind for output in cell.outputs for kind in output.get("data", {})}


def test_the_file_has_no_outputs_and_stable_ids():
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = load()
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"
    for cell in notebook.cells:
        assert re.fullmatch(r"[a-z-]+", cell.id)
        if cell.cell_type == "code":
            assert cell.execution_count is None and cell.outputs == []
        assert set(cell.metadata) <= {"tags"}
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


# One test, as parallel workers would each run the notebook again for theirs.
@pytest.mark.timeout(1200)
def test_every_cell_runs(tmp_path, monkeypatch, hub):
    hub.add_folder("models", "org/small", folder("deltanet"))
    home = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    for name, value in home.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    notebook = execute(load(), tmp_path, SMALL, FACTS)
    facts = json.loads((tmp_path / "facts.json").read_text())
    demo = tmp_path / "demo"

    check_training(demo, facts)
    check_rollouts(facts, "".join(cell_of(notebook, "entropy").outputs[-1]["data"]["text/html"]))
    check_answers(demo, facts)
    for name in ("rollouts-plot", "train", "recall"):
        assert "image/png" in kinds(cell_of(notebook, name)), name
    report = cell_of(notebook, "report").outputs[-1]["data"]["text/html"]
    page = html.unescape(re.fullmatch(r'<iframe srcdoc="(.*?)" style=.*', report, re.S)[1])
    assert page == (demo / "refine" / "report.html").read_text()
    check_hub(printed_by(cell_of(notebook, "hub")), facts)
    assert "the answer is" in cell_of(notebook, "recall-answers").outputs[0]["text"]
    check_conversion(demo / "refine", tmp_path, facts)


def check_training(demo, facts):
    """The run is complete, and starts from a model that has learnt the text."""
    results = json.loads((demo / "refine" / "results.json").read_text())
    assert results["steps"] == results["refine_steps"] == STEPS
    records = read_metrics(demo / "refine" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    assert results == facts["figures"]
    assert results["validation_loss_before"] < 2.0 < np.log(facts["vocab_size"])


def check_rollouts(facts, shown):
    """The truth of each rollout is the text that follows its position."""
    assert shown.count("<span") == SMALL["LENGTH"]
    # Rollouts of neighbouring spans may overlap in so short a text.
    framed = {start + offset for start in facts["starts"] for offset in range(5)}
    assert shown.count("border: solid") == len(framed)
    tokenizer = load_tokenizer(folder("deltanet"))
    source = tokenizer.encode(RecallDocuments()[0])
    assert len(facts["rollouts"]) == len(facts["starts"]) == 8
    for start, (reward, truth, _) in zip(facts["starts"], facts["rollouts"], strict=True):
        assert truth == tokenizer.decode(source[start : start + 5])
        assert -1 <= reward <= 1
    assert all(0 <= nats <= np.log(facts["vocab_size"]) + 1e-4 for nats in facts["entropy"])


def check_answers(demo, facts):
    """Texts are as long as was asked for, and both models have answered the same questions."""
    assert all(len(tokens) == 8 or tokens[-1] == 1 for tokens in facts["greedy"])
    assert list(facts["recall"]) == ["before", "after"]
    before, after = (read_metrics(demo / name / "predictions.jsonl") for name in facts["recall"])
    assert len(before) == len(after) == SMALL["SAMPLES"]
    references = [{record["id"]: record["answers"] for record in part} for part in (before, after)]
    assert references[0] == references[1]
    assert all(record["prompt_tokens"] <= 128 - 8 for record in before)


def check_hub(printed, facts):
    """The small model of the package came from the hub, and answers as one that was trained on."""
    assert printed[0] == "demo/published: 31 tensors, 144,992 parameters, bfloat16"
    assert len(printed) == 1 + len(facts["greedy"])


def check_conversion(trained, place, facts):
    """The first cells take another Hugging Face folder."""
    to_hf(str(trained), str(place / "hf"))
    notebook = load()
    end = next(i for i, cell in enumerate(notebook.cells) if cell.id == "model")
    notebook.cells = notebook.cells[: end + 1]
    parameters = SMALL | {"CHECKPOINT": str(place / "hf"), "WORKDIR": "converted"}
    execute(notebook, place, parameters, "print(model.config.vocab_size)")
    assert "parameters, float32" in cell_of(notebook, "model").outputs[-1]["text"]
    assert int(notebook.cells[-1].outputs[0]["text"]) == facts["vocab_size"]


def test_a_missing_installation_asks_for_the_repository(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    source = cell_of(load(), "install").source.replace("%pip", "pass  #")
    with pytest.raises(SystemExit, match="Set REPOSITORY"):
        exec(source, {"REPOSITORY": None})


def test_entropy_of_a_token_shades_the_next_one():
    tokenizer = load_tokenizer("bytes")
    text = "a<é"
    shown = entropy_html(
        tokenizer, tokenizer.encode(text), [0.0, 2.0, 1.0, 4.0, 0.0], [3], length=2
    )
    spans = re.findall(r"<span(.*?) style=\"(.*?)\">(.*?)</span>", shown)
    assert [piece for _, _, piece in spans] == ["", "a", "&lt;", "", "é"]
    assert [title for title, _, _ in spans][1:] == [
        f' title="{nats:.2f} nats"' for nats in (0, 2, 1, 4)
    ]
    assert [re.search(r"11, (.*?)\)", style)[1] for _, style, _ in spans] == [
        "0.00", "0.00", "0.40", "0.20", "0.80",
    ]  # fmt: skip
    assert ["border" in style for _, style, _ in spans] == [False, False, False, True, True]


def test_curves_are_drawn_while_the_block_runs(tmp_path, monkeypatch):
    updates = []

    class Shown:
        def update(self, image):
            updates.append(image)

    module = types.ModuleType("IPython.display")
    module.HTML = str
    module.Image = lambda data, format: data
    module.display = lambda shown, display_id: Shown()
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    with live_curves(tmp_path / "run", seconds=0.01):
        (tmp_path / "run").mkdir()
        metrics = tmp_path / "run" / "metrics.jsonl"
        metrics.write_text('{"step": 0, "eval/loss": 2.0}\n')
        assert updates == []
        with metrics.open("a") as file:
            record = {"step": 1, "loss/ntp": 2.0, "time/step": 1.0, "time/data": 0.1}
            file.write(json.dumps(record) + '\n{"step": 2, "loss')
            file.flush()
            for _ in range(1000):
                if updates:
                    break
                time.sleep(0.02)
        assert len(updates) == 1
    assert len(updates) == 2 and all(image.startswith(b"\x89PNG") for image in updates)
    with pytest.raises(RuntimeError, match="of the run"), live_curves(tmp_path / "none"):
        raise RuntimeError("of the run")
