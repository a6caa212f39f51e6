"""The small model that comes with the package: its files, and what it can do."""

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from refine_jax.checkpoint import load_model, read_hf
from refine_jax.data.recall import RecallDocuments
from refine_jax.data.tasks import load_examples
from refine_jax.data.tokenizer import load_tokenizer
from refine_jax.generation import Generator, Sampling, load
from refine_jax.small import NAMES, folder


@pytest.mark.parametrize("name", NAMES)
def test_files_are_small_and_the_card_says_what_they_are(name):
    path = Path(folder(name))
    names = {file.name for file in path.iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        "README.md",
    }
    assert sum(file.stat().st_size for file in path.iterdir()) < 3e6
    arrays = {tuple(x.shape): x.dtype.name for x in _leaves(load_model(path).params)}
    assert set(arrays.values()) == {"bfloat16"}
    count = sum(x.size for x in _leaves(load_model(path).params))
    assert f"{count:,} parameters" in (path / "README.md").read_text(encoding="utf-8")


def test_a_hugging_face_folder_is_loaded_as_it_is_converted():
    path = Path(folder("deltanet"))
    loaded, converted = load_model(path, dtype="float32"), read_hf(path)
    assert loaded.config == converted.config == json.loads((path / "config.json").read_text())
    for mine, other in zip(_leaves(loaded.params), _leaves(converted.params), strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_array_equal(mine, other.astype(np.float32))
    assert Path(loaded.tokenizer) == path and loaded.step is None


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer_keeps_texts_and_has_a_token_for_each_digit(name):
    tokenizer = load_tokenizer(folder(name))
    text = RecallDocuments()[5] + "Anything else: über 12€, bagels\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    numbers = re.findall(r"\d{4}", RecallDocuments()[5])
    ids = [tokenizer.encode(number, bos=False) for number in numbers]
    assert {len(each) for each in ids} == {4} and len(set(np.concatenate(ids).tolist())) == 10


@pytest.mark.parametrize("name, least", [("deltanet", 0.15)])
def test_it_recalls_facts_of_its_prompt(name, least):
    """By chance one answer in 9,000 would be right. The card has the share of 512."""
    model, params, tokenizer = load(folder(name))
    examples = load_examples("recall", length=128, samples=48, tokenizer=tokenizer)
    generator = Generator(model, tokenizer)
    prefix = generator.read(params, generator.encode([example.prompt for example in examples]))
    answers = generator.generate(params, prefix, Sampling(max_new_tokens=5))
    pairs = zip(answers, examples, strict=True)
    assert np.mean([answer.text == f" {example.answers[0]}" for answer, example in pairs]) >= least


@pytest.mark.slow
def test_the_script_trains_and_exports_the_same_model_twice(tmp_path, monkeypatch, capsys):
    script = Path(__file__).parents[1] / "experiments"
    monkeypatch.syspath_prepend(str(script))
    import train_small

    for name, value in {"LENGTH": 64, "ROWS": 2, "DOCUMENTS": 60, "ASKED": 4}.items():
        monkeypatch.setattr(train_small, name, value)
    figures = []
    for workdir in ("first", "second"):
        arguments = ["train_small.py", "deltanet", "--steps=2", f"--workdir={tmp_path / workdir}"]
        monkeypatch.setattr(sys, "argv", arguments)
        train_small.main()
        figures.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
        del figures[-1]["training_seconds"]
    assert figures[0] == figures[1]
    exported = tmp_path / "first" / "deltanet-hf"
    content = (exported / "model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == figures[0]["sha256"]
    # The tokenizer that comes with the package is the one that the script learns.
    shipped = Path(folder("deltanet"))
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert json.loads((exported / file).read_text()) == json.loads((shipped / file).read_text())


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="the small models are deltanet"):
        folder("gpt")


def _leaves(tree):
    return (
        [leaf for value in tree.values() for leaf in _leaves(value)]
        if isinstance(tree, dict)
        else [tree]
    )
